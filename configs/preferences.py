"""Preferences: a chat model learns to prefer the chosen to the rejected answer of each prompt (Rafailov et al. 2023).

    python train.py configs/preferences.py --init MODEL --data.path pairs.jsonl
    python train.py configs/preferences.py --init MODEL --data.path pairs.jsonl --adapter.rank 8 --optimizer.rate 2e-5
    python train.py configs/preferences.py --init MODEL --data.path pairs.jsonl --task.objective simpo --task.beta 2

MODEL is a folder or a hub name with a chat template.  If the tokenizer has no template, --task.template sets its Jinja
source.  A row has a column `prompt` and two answers, `chosen` and `rejected`: texts, lists of {"role": ..., "content":
...}, or whole conversations that begin alike, also as transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...").

The reference is the model that the run starts from.  With --adapter.rank it is the model without its adapter, and no
second copy is in memory.

Hardware         one GPU or TPU chip for models up to 1B parameters with --adapter.rank
Time, score      not measured yet
"""

from jaxlm import DataConfig, OptimizerConfig, Preference, RunConfig


def config() -> RunConfig:
    return RunConfig(
        model=None,
        task=Preference(),
        data=DataConfig(length=1024),
        optimizer=OptimizerConfig(rate=1e-6, schedule="cosine", warmup=0.1, final=0.1, weight_decay=0.0, beta2=0.999),
        dropout=0.0,
        examples=32,
        epochs=1,
        log_every=10,
    )

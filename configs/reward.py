"""A reward model: it gives each answer a number, larger for the better answers (Ouyang et al. 2022, section 3.5).

    python train.py configs/reward.py --init MODEL --data.path pairs.jsonl
    python -m jaxlm predict runs/reward pairs.jsonl

MODEL is a folder or a hub name.  If its tokenizer has no chat template, --task.template sets its Jinja source.  The
rows are those of configs/preferences.py.  The export is a model for sequence classification with one output.

Hardware         one GPU or TPU chip for models up to 1B parameters with --adapter.rank
Time, score      not measured yet
"""

from jaxlm import DataConfig, OptimizerConfig, Reward, RunConfig


def config() -> RunConfig:
    return RunConfig(
        model=None,
        task=Reward(),
        data=DataConfig(length=1024),
        optimizer=OptimizerConfig(rate=1e-5, schedule="cosine", warmup=0.1, final=0.1, weight_decay=0.0, beta2=0.999),
        dropout=0.0,
        examples=32,
        epochs=1,
        log_every=10,
    )

"""Continued pre-training of any checkpoint on a folder of text, before fine-tuning on texts of the same domain.

    python train.py configs/adapt.py --init MODEL --data.path FOLDER --workdir runs/adapt
    python train.py configs/finetune_csv.py --init runs/adapt --data.path FILE --task.text COLUMN --task.label COLUMN

MODEL is a folder, a run or a hub name; its own tokenizer encodes the text.  A word after the config selects the
objective, which must match the kind of the model:

    masked      masked language modelling, for an encoder such as BERT (the default)
    permuted    permutation language modelling, for XLNet
    causal      next-token prediction, for a decoder such as GPT-2 or Llama
    spans       span corruption, for T5
    infilling   text infilling and sentence permutation, for BART

Each file is one document.  If a line or a paragraph is one document, set --data.documents line or blank_line.  A tenth
of the documents is held out, or the end of the text if there is a single file.  The first line of scores is that of the
initial weights.

Hardware, time   not measured
Expected score   1 to 10 points more in tasks of the same domain (Gururangan et al. 2020, Don't Stop Pretraining)
"""

from jaxlm import (
    CausalLM,
    DataConfig,
    Infilling,
    MaskedLM,
    OptimizerConfig,
    PermutedLM,
    RunConfig,
    SpanCorruption,
    UserError,
)

TASKS = {"masked": MaskedLM(), "permuted": PermutedLM(), "causal": CausalLM(), "spans": SpanCorruption()}
TASKS |= {"infilling": Infilling()}
ADAMW = OptimizerConfig(rate=5e-5, schedule="linear", warmup=0.06, final=0.0, weight_decay=0.01, beta2=0.999)
# T5 was pretrained with Adafactor (Raffel et al. 2020).
ADAFACTOR = OptimizerConfig(
    name="adafactor", rate=1e-3, relative=True, schedule="constant", warmup=0.05, weight_decay=0.0
)


def config(kind: str = "masked") -> RunConfig:
    if kind not in TASKS:
        raise UserError(f"{kind!r} is not an objective; choose one of {', '.join(TASKS)}")
    return RunConfig(
        model=None,
        task=TASKS[kind],
        data=DataConfig(documents="file", length=256),
        optimizer=ADAFACTOR if kind == "spans" else ADAMW,
        batch=32,
        epochs=1,
        log_every=20,
    )

"""Continued pre-training: any checkpoint learns the language of a folder of text before it is fine-tuned.

    python train.py configs/adapt.py --init MODEL --data.path FOLDER --workdir runs/adapt
    python train.py configs/finetune_csv.py --init runs/adapt --data.path FILE --task.text COLUMN --task.label COLUMN

MODEL is a folder, a run or a hub name; its own tokenizer reads the text.  A word after the config says what is learned,
which depends on the kind of the model:

    masked      an encoder such as BERT: masked words (the default)
    causal      a decoder such as GPT-2 or Llama: the next token
    spans       T5: spans that were taken out
    infilling   BART: gaps of any length, and the order of sentences

Each file is one document.  Where a line or a paragraph is one: --data.documents line, or blank_line.  A tenth of the
documents is held out; of a single file its end.  The first line of scores is that of the weights as they were given.

Gururangan et al. 2020 (Don't Stop Pretraining) gain 1 to 10 points in tasks of the same domain.
"""

from jaxlm import CausalLM, DataConfig, Infilling, MaskedLM, OptimizerConfig, RunConfig, SpanCorruption, UserError

TASKS = {"masked": MaskedLM(), "causal": CausalLM(), "spans": SpanCorruption(), "infilling": Infilling()}
ADAMW = OptimizerConfig(rate=5e-5, schedule="linear", warmup=0.06, final=0.0, weight_decay=0.01, beta2=0.999)
# T5 was pre-trained, and is trained further, by Adafactor (Raffel et al. 2020).
ADAFACTOR = OptimizerConfig(
    name="adafactor", rate=1e-3, relative=True, schedule="constant", warmup=0.05, weight_decay=0.0
)


def config(kind: str = "masked") -> RunConfig:
    if kind not in TASKS:
        raise UserError(f"{kind!r} is no kind of pre-training; give one of {', '.join(TASKS)}")
    return RunConfig(
        model=None,
        task=TASKS[kind],
        data=DataConfig(documents="file", length=256),
        optimizer=ADAFACTOR if kind == "spans" else ADAMW,
        batch=32,
        epochs=1,
        log_every=20,
    )

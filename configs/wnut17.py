"""WNUT-17: rare and emerging names of persons, places and products (Derczynski et al. 2017).

    python train.py configs/wnut17.py --init MODEL --data.path wnut17train.conll --data.eval-path emerging.dev.conll

MODEL is a folder or a hub name.  The files are in CoNLL format: a word and its tag per line, and a blank line between
sentences.  Other files with IOB2 tags work as well.

Measured in November 2026 with MiniLM-L6 and seed 0:

Hardware         2 CPU cores, shared with other processes
Time             12 min for five epochs
Score            span F1 44.02 on emerging.test, with the best epoch on emerging.dev (F1 58.70)
transformers     43.96 with the same recipe, after the last epoch
"""

from jaxlm import DataConfig, OptimizerConfig, RunConfig, Tagging


def config() -> RunConfig:
    return RunConfig(
        model=None,
        task=Tagging(),
        data=DataConfig(format="conll", length=128),
        optimizer=OptimizerConfig(rate=1e-4, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=16,
        epochs=5,
        unroll=6,
        log_every=50,
    )

"""WNUT-17: names of persons, places, products ... that few have written about (Derczynski et al. 2017).

    python train.py configs/wnut17.py --init MODEL --data.path wnut17train.conll --data.eval-path emerging.dev.conll

MODEL is a folder or a hub name.  The files are CoNLL's: a word and its tag on a line, sentences apart by a blank line.
Other such files of IOB2 tags do as well.

Measured so with MiniLM-L6 on 2 CPU cores (November 2026, seed 0): span F1 44.02 on emerging.test, by the best of five
epochs on emerging.dev (F1 58.70); transformers by the same recipe, after the last epoch: 43.96.  It took 12 minutes
beside other work.
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

"""Tagging of words in your own files: names, parts of speech, any column of a CoNLL file, or lists in a table.

    python train.py configs/tagging.py --init MODEL --data.path train.conll --data.eval-path dev.conll

MODEL is a folder or a hub name.  Each line has a word and its tag, and a blank line ends a sentence.  Files in CoNLL-U,
with an index column or with comments are also supported; `--data.columns id tokens lemma tags` names other columns.  In
csv, json lines and parquet files, --task.tokens and --task.tags name columns of lists.  A tenth is held out unless
--data.eval-path is set.  --task.scheme IOB1 or IOBES selects how spans are marked; by default it is detected.

Hardware, time, score   see wnut17.py, which has a similar recipe
"""

from jaxlm import DataConfig, OptimizerConfig, RunConfig, Tagging


def config() -> RunConfig:
    return RunConfig(
        model=None,
        task=Tagging(),
        data=DataConfig(length=128),
        optimizer=OptimizerConfig(rate=5e-5, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=16,
        epochs=5,
        log_every=50,
    )

"""Tags of words from files of your own: names, parts of speech, any column of CoNLL files, or lists in a table.

    python train.py configs/tagging.py --init MODEL --data.path train.conll --data.eval-path dev.conll

MODEL is a folder or a hub name.  A line holds a word and its tag, a blank line ends a sentence; files in CoNLL-U, with
an index column or with comments are read too, and `--data.columns id tokens lemma tags` names the columns of others.
Csv, json lines and parquet hold lists: --task.tokens and --task.tags name their columns.  A tenth is held out unless
--data.eval-path gives other data.  --task.scheme IOB1 or IOBES says how spans are marked.

The recipe is that of `wnut17.py`, which says what it scored.
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

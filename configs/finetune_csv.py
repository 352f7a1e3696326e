"""A classifier from a table of your own: csv, tsv, json lines or parquet.

    python train.py configs/finetune_csv.py --init MODEL --data.path FILE --task.text COLUMN --task.label COLUMN

MODEL is a folder or a hub name.  Two columns after --task.text are a pair.  The labels are found in the file; a tenth
of each class is held out, unless --data.eval-path gives other data.  --task.problem regression makes it a regression,
--task.problem multi_label allows several labels at once.
"""

from jaxlm import Classification, DataConfig, OptimizerConfig, RunConfig


def config() -> RunConfig:
    return RunConfig(
        model=None,
        task=Classification(),
        data=DataConfig(length=128),
        optimizer=OptimizerConfig(rate=5e-5, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=32,
        epochs=3,
        log_every=20,
    )

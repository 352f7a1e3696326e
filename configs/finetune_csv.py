"""A classifier trained on your own table: csv, tsv, json lines or parquet.

    python train.py configs/finetune_csv.py --init MODEL --data.path FILE --task.text COLUMN --task.label COLUMN

MODEL is a folder or a hub name.  Two columns after --task.text form a pair.  The labels are read from the file, and a
tenth of each class is held out unless --data.eval-path is set.  --task.problem regression trains a regression, and
--task.problem multi_label allows several labels for a text.

Hardware, time, score   depend on the model and the table; sst2.py, trec.py and glue.py are examples of the same recipe
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

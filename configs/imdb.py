"""IMDb: is a film review positive?  (Maas et al. 2011)

    python train.py configs/imdb.py --init MODEL

MODEL is a folder or a hub name.  The data is `imdb_reviews` of tensorflow-datasets.  To use your own files with the
columns `text` and `label`, set --data.path and --data.eval-path.

Hardware, time, score   not measured yet
"""

from jaxlm import Classification, DataConfig, OptimizerConfig, RunConfig


def config() -> RunConfig:
    return RunConfig(
        model=None,
        task=Classification(),
        data=DataConfig(path="tfds:imdb_reviews", eval_split="test", length=512),
        optimizer=OptimizerConfig(rate=3e-5, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=32,
        epochs=2,
        log_every=50,
    )

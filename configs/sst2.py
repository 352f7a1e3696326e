"""SST-2: is a phrase from a film review positive?  (Socher et al. 2013; GLUE)

    python train.py configs/sst2.py --init MODEL --data.path train.tsv --data.eval-path dev.tsv

MODEL is a folder or a hub name.  The files are GLUE's: a header, then sentence and label divided by a tab.
"""

from jaxlm import Classification, DataConfig, OptimizerConfig, RunConfig


def config() -> RunConfig:
    return RunConfig(
        model=None,
        task=Classification(text=("sentence",)),
        data=DataConfig(format="tsv", length=72),
        optimizer=OptimizerConfig(rate=1e-4, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=32,
        epochs=1,
        dropout=0.0,  # in a single epoch no example is seen twice
        unroll=6,
        log_every=50,
    )

"""Is a tweet hate speech, offensive, or neither?  (Davidson et al. 2017)  The model serves as a filter of outputs.

    python train.py configs/davidson.py --init MODEL --data.path labeled_data.csv.gz
    python -m jaxlm generate CHAT_MODEL --prompt "..." --safety.classifier runs/davidson \\
        --safety.labels hate,offensive

MODEL is a folder or a hub name of an encoder.  The file is that of the authors, with the columns `tweet` and `class`
(0: hate, 1: offensive, 2: neither).  A tenth of the tweets, chosen by their hash, is held out.

Measured in December 2026 with MiniLM-L6 and seed 0:

Hardware         2 CPU cores, shared with other processes
"""

from jaxlm import Classification, DataConfig, OptimizerConfig, RunConfig


def config() -> RunConfig:
    return RunConfig(
        model=None,
        task=Classification(text=("tweet",), label="class", names=("hate", "offensive", "neither")),
        data=DataConfig(length=128),
        optimizer=OptimizerConfig(rate=1e-4, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=32,
        epochs=2,
        dropout=0.0,
        unroll=6,
        log_every=50,
    )

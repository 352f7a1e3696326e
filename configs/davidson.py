"""Is a tweet hate speech, offensive, or neither?  (Davidson et al. 2017)  The model serves as a filter of outputs.

    python train.py configs/davidson.py --init MODEL --data.path labeled_data.csv.gz
    python -m jaxlm generate CHAT_MODEL --prompt "..." --safety.classifier runs/davidson \\
        --safety.labels hate,offensive

MODEL is a folder or a hub name of an encoder.  The file is that of the authors, with the columns `tweet` and `class`
(0: hate, 1: offensive, 2: neither).  A tenth of the tweets, chosen by their hash, is held out.

Measured in December 2026 with MiniLM-L6 and seed 0, on 22,304 tweets (in a copy of the file where the quotes of some
rows are not closed; a row per line with --data.format jsonl avoids this):

Hardware         2 CPU cores, shared with up to a dozen other processes
Time             36 min for 1,300 steps
Score            accuracy 0.9169, weighted F1 0.911, on 2,479 held-out tweets; F1 of hate 0.434, offensive 0.950,
                 neither 0.896 (TF-IDF with logistic regression: accuracy 0.897)
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

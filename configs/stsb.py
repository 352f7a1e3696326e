"""STS benchmark: similarity of two sentences from 0 to 5 (Cer et al. 2017), predicted by the cosine of their vectors.

    python train.py configs/stsb.py --init MODEL --data.path sts-train.csv --data.eval-path sts-dev.csv

MODEL is a folder or a hub name.  The files are the original ones, separated by tabs and without a header.

Measured in November 2026 with MiniLM-L6 and seed 0; the best checkpoint on sts-dev is that of the first of four epochs
(Spearman 0.8958):

Hardware         2 CPU cores
Time             7 min 15 s
Score            Spearman 0.8541 on sts-test (0.8203 with the initial weights)
"""

from jaxlm import DataConfig, OptimizerConfig, RunConfig, Similarity


def config() -> RunConfig:
    return RunConfig(
        model=None,
        task=Similarity(text=("sentence1", "sentence2"), label="score", highest=5.0),
        data=DataConfig(
            format="tsv",
            columns=("genre", "file", "year", "id", "score", "sentence1", "sentence2"),
            length=256,
        ),
        optimizer=OptimizerConfig(rate=2e-5, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=16,
        epochs=4,
        unroll=6,
        log_every=50,
    )

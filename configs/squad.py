"""SQuAD: find the answer to a question in a text (Rajpurkar et al. 2016, 2018).

    python train.py configs/squad.py --init MODEL --data.path train-v2.0.json --data.eval-path dev-v2.0.json

MODEL is a folder or a hub name.  For SQuAD 1.1, where every question has an answer, add --task.no-unanswerable.

Measured in November 2026 with MiniLM-L6, seed 0 and two epochs on half of SQuAD 2.0's dev part, with three articles
held out (`python benchmarks/peers_finetune.py data` writes these files):

Hardware         2 CPU cores, shared with other processes
Time             56 min
Score            1,265 held-out questions: exact match 50.04, F1 50.84, F1 with the best threshold 52.35
                 838 questions of English XQuAD: exact match 35.68, F1 49.12
                 (`jaxlm evaluate RUN xquad.json --task.no-unanswerable`)
transformers     with the same recipe: 51.78, F1 52.33; XQuAD 35.20, F1 49.48

With a different order of the dropout draws the scores were 50.36, 51.01, 52.35; XQuAD 36.28, 49.94.
"""

from jaxlm import DataConfig, OptimizerConfig, QuestionAnswering, RunConfig


def config() -> RunConfig:
    return RunConfig(
        model=None,
        task=QuestionAnswering(),
        data=DataConfig(format="squad", length=384),
        optimizer=OptimizerConfig(rate=1e-4, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=16,
        epochs=2,
        unroll=6,
        log_every=50,
    )

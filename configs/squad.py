"""SQuAD: where in a text the answer to a question stands (Rajpurkar et al. 2016, 2018).

    python train.py configs/squad.py --init MODEL --data.path train-v2.0.json --data.eval-path dev-v2.0.json

MODEL is a folder or a hub name.  For SQuAD 1.1, whose questions all have an answer, add --task.no-unanswerable.

Measured with MiniLM-L6 on 2 CPU cores (November 2026, seed 0) on half of SQuAD 2.0's dev part, three articles held out
(`python benchmarks/peers_finetune.py data` writes the parts), after two epochs:

    1,265 questions held out            exact 50.04, F1 50.84, F1 by the best threshold 52.35
    838 of XQuAD, English               exact 35.68, F1 49.12, by `jaxlm evaluate RUN xquad.json --task.no-unanswerable`
    transformers by the same recipe     51.78, 52.33; 35.20, 49.48

Another order of the dropout draws gave 50.36, 51.01, 52.35; 36.28, 49.94.
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

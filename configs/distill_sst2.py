"""SST-2 with half of the layers: a student learns from the model that `sst2.py` trained (Sanh et al. 2019).

    python train.py configs/distill_sst2.py TEACHER --data.path train.tsv --data.eval-path dev.tsv

TEACHER is the folder of a run of `sst2.py`, or another model for the task.  The student starts with the embeddings, the
head and every second layer of the teacher, and learns from the labels, and from the predictions and hidden states of
the teacher.

Hardware, time, score   MEASURED
"""

from jaxlm import Classification, DataConfig, DistillConfig, OptimizerConfig, RunConfig


def config(teacher: str = "runs/sst2") -> RunConfig:
    return RunConfig(
        model=None,
        init=teacher,
        distill=DistillConfig(teacher, layers="even", hidden=1.0),
        task=Classification(text=("sentence",)),
        data=DataConfig(format="tsv", length=72),
        optimizer=OptimizerConfig(rate=1e-4, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=32,
        epochs=1,
        dropout=0.0,  # in a single epoch no example is repeated
        unroll=3,
        log_every=50,
    )

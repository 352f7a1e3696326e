"""SST-2 with half of the layers: a student learns from the model that `sst2.py` trained (Sanh et al. 2019).

    python train.py configs/distill_sst2.py TEACHER --data.path train.tsv --data.eval-path dev.tsv

TEACHER is the folder of a run of `sst2.py`, or another model for the task.  The student starts with the embeddings, the
head and every second layer of the teacher, and learns from the labels, and from the predictions and hidden states of
the teacher.

Measured in November 2026 with seed 0 and a teacher of 6 layers, MiniLM-L6 after `sst2.py`, on 60,614 phrases of GLUE's
training part.  Accuracy on 6,735 held-out phrases of that part, and on the 872 sentences of GLUE's dev part:

Hardware         2 CPU cores, shared with up to 12 other processes
Time             58 min
Score            student of 3 layers: 0.9430 and 0.8853; its teacher: 0.9443 and 0.9025; the same student without a
                 teacher, from the same layers (`jaxlm.shrink`): 0.9416 and 0.8819

On 872 sentences the standard error of an accuracy is 0.01, so that one seed does not separate the two students.
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

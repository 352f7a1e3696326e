"""Three tasks on one body with one head each: sentiment of phrases, classes of questions, names in messages.

    python train.py configs/multi_task.py SST2.tsv TREC.train WNUT.conll --init MODEL

MODEL is a folder or a hub name.  The three words before it are the data files, in the formats of `sst2.py`, `trec.py`
and `wnut17.py`.  A tenth of each file is held out.  Each batch contains rows of all three tasks, in proportion to the
sizes of the data sets unless `Part(..., weight=)` is set.  `export/` has a folder for each task.

Hardware, time, score   not measured yet
"""

from jaxlm import Classification, DataConfig, MultiTask, OptimizerConfig, Part, RunConfig, Tagging


def config(sst2: str = "train.tsv", trec: str = "TREC.train", wnut: str = "wnut17train.conll") -> RunConfig:
    questions = DataConfig(
        path=trec, format="text", pattern=r"(?P<label>[A-Z]+):(?P<fine>\S+) (?P<text>.*)", encoding="iso-8859-1"
    )
    return RunConfig(
        model=None,
        task=MultiTask(
            {
                "feeling": Part(Classification(text=("sentence",)), DataConfig(path=sst2, format="tsv")),
                "question": Part(Classification(), questions),
                "names": Part(Tagging(), DataConfig(path=wnut, format="conll")),
            }
        ),
        data=DataConfig(length=128),
        optimizer=OptimizerConfig(rate=1e-4, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=48,
        epochs=3,
        unroll=6,
        log_every=50,
        workdir="runs/multi_task",
    )

"""GLUE: nine tasks of understanding one or two sentences (Wang et al. 2019).

    python train.py configs/glue.py rte --init MODEL --data.path RTE/train.tsv --data.eval-path RTE/dev.tsv
    python train.py configs/glue.py rte tfds --init MODEL --data.path FOLDER

MODEL is a folder or a hub name.  The first word is the task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli.
The second says where the data are from: GLUE's own tsv folders, or a tensorflow-datasets folder that was prepared
elsewhere (`tfds.builder("glue/rte", file_format="array_record").download_and_prepare()` wants TensorFlow), which names
the columns otherwise.
"""

from typing import NamedTuple

from jaxlm import Classification, DataConfig, OptimizerConfig, RunConfig, UserError


class Glue(NamedTuple):
    """Where a task's texts and labels stand, and how it is ranked."""

    text: tuple[str, ...]  # columns of the tsv files
    label: str
    tfds: tuple[str, ...]  # columns of tfds, whose label is `label`
    best: str  # score by which the task is ranked
    columns: tuple[str, ...] = ()  # of a file without header
    eval_split: str = "validation"
    epochs: int = 3


TASKS = {
    "cola": Glue(("sentence",), "label", ("sentence",), "matthews", ("source", "label", "star", "sentence")),
    "sst2": Glue(("sentence",), "label", ("sentence",), "accuracy"),
    "mrpc": Glue(("#1 String", "#2 String"), "Quality", ("sentence1", "sentence2"), "f1", epochs=5),
    "qqp": Glue(("question1", "question2"), "is_duplicate", ("question1", "question2"), "f1"),
    "stsb": Glue(("sentence1", "sentence2"), "score", ("sentence1", "sentence2"), "spearman", epochs=5),
    "mnli": Glue(
        ("sentence1", "sentence2"), "gold_label", ("premise", "hypothesis"), "accuracy", (), "validation_matched"
    ),
    "qnli": Glue(("question", "sentence"), "label", ("question", "sentence"), "accuracy"),
    "rte": Glue(("sentence1", "sentence2"), "label", ("sentence1", "sentence2"), "accuracy", epochs=5),
    "wnli": Glue(("sentence1", "sentence2"), "label", ("sentence1", "sentence2"), "accuracy", epochs=5),
}


def config(task: str = "rte", source: str = "tsv") -> RunConfig:
    if task not in TASKS or source not in ("tsv", "tfds"):
        raise UserError(
            f"{task!r} from {source!r} is no task of GLUE; give one of {', '.join(TASKS)}, then tsv or tfds"
        )
    glue = TASKS[task]
    tsv = source == "tsv"
    return RunConfig(
        model=None,
        task=Classification(
            problem="regression" if task == "stsb" else "single_label",
            text=glue.text if tsv else glue.tfds,
            label=glue.label if tsv else "label",
        ),
        data=DataConfig(
            format="tsv" if tsv else "suffix",
            columns=glue.columns if tsv else (),
            eval_split="" if tsv else glue.eval_split,
            length=128,
        ),
        optimizer=OptimizerConfig(rate=5e-5, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        best=glue.best,
        examples=32,
        epochs=glue.epochs,
        log_every=50,
    )

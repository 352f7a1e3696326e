"""GLUE: nine tasks over one or two sentences (Wang et al. 2019).

    python train.py configs/glue.py rte --init MODEL --data.path RTE/train.tsv --data.eval-path RTE/dev.tsv
    python train.py configs/glue.py rte tfds --init MODEL --data.path FOLDER

MODEL is a folder or a hub name.  The first word after the config is the task: cola, sst2, mrpc, qqp, stsb, mnli, qnli,
rte or wnli.  The second word is the source of the data: GLUE's own tsv files (the default), or `tfds` for a folder that
tensorflow-datasets prepared on a machine with TensorFlow
(`tfds.builder("glue/rte", file_format="array_record").download_and_prepare()`), which has other column names.

Hardware, time, score   not measured here; sst2.py gives measurements for one of the tasks
"""

from typing import NamedTuple

from jaxlm import Classification, DataConfig, OptimizerConfig, RunConfig, UserError


class Glue(NamedTuple):
    """The columns, the score and the epochs of a task."""

    text: tuple[str, ...]  # text columns of the tsv files
    label: str
    tfds: tuple[str, ...]  # text columns in tfds; the label column is `label`
    best: str  # score that ranks the task and selects the checkpoint
    columns: tuple[str, ...] = ()  # all columns of a tsv file without header
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
            f"{task!r} from {source!r} is not a task of GLUE; choose one of {', '.join(TASKS)}, then tsv or tfds"
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

"""The output of a head for each label: fine-tuning continues from the head of the weights, in its order."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import (
    Classification,
    DataConfig,
    ModelConfig,
    MultipleChoice,
    MultiTask,
    OptimizerConfig,
    Part,
    RunConfig,
    Tagging,
    TokenizerConfig,
    UserError,
    families,
)
from jaxlm.data.formats.lines import Place
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.families import PRESETS
from jaxlm.hub import safetensors
from jaxlm.lm import LM
from jaxlm.nn.transformer import Transformer
from jaxlm.run.fit import Stopped, fit
from jaxlm.tasks import TASKS, labels
from jaxlm.tasks import tags as schemes
from jaxlm.tasks.cells import Records

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps")
NLI = ("entailment", "neutral", "contradiction")


# Names of labels


@pytest.mark.parametrize(
    ("found", "names", "expected"),
    [
        (["b", "a"], "a b c", "b a"),  # some of the names, unchanged
        (["Entailment", "NEUTRAL "], " ".join(NLI), "entailment neutral"),
        (["not entailment", "Not-Neutral"], "not_entailment not_neutral", "not_entailment not_neutral"),
        (["0", "2"], " ".join(NLI), "entailment contradiction"),
        (["LABEL_1", "label_0"], " ".join(NLI), "neutral entailment"),
        (["1", "0"], "LABEL_0 LABEL_1", "LABEL_1 LABEL_0"),
        (["false", "true"], "LABEL_0 LABEL_1", "LABEL_0 LABEL_1"),
        (["1", "5"], "1 2 3 4 5", "1 5"),  # the names are numbers, so the labels are names
        (["0", "1"], "1 2 3", None),
        (["1", "2"], "1_star 2_stars 3_stars", None),  # the label 1 is not the second name
        (["0", "3"], " ".join(NLI), None),
        (["neg", "pos"], "LABEL_0 LABEL_1", None),
        (["0", "00"], " ".join(NLI), None),
        (["A", "a"], "a b", None),
        (["a"], "A a", "a"),
        (["x"], "X x_", "X"),
        (["x-"], "X x_", "x_"),
        (["true"], " ".join(NLI), None),
        (["entailment", "1"], " ".join(NLI), None),
        (["9" * 5000], " ".join(NLI), None),
    ],
)
def test_labels_match_names_of_outputs(found, names, expected):
    name_of = labels.match_labels(found, names.split())
    assert name_of == (None if expected is None else dict(zip(found, expected.split())))


MULTI = Classification(problem="multi_label")
NAMED = Classification(names=("b", "a"))


@pytest.mark.parametrize(
    ("task", "values", "outputs", "expected"),
    [
        (NAMED, [0, 1], ("a", "b"), ["b", "a"]),  # the names define the numbers, as in training
        (NAMED, ["c", "b"], ("a", "b", "c"), ["c", "b"]),
        (NAMED, ["b"], ("LABEL_0", "LABEL_1"), ["b"]),
        (replace(MULTI, names=("b", "a")), [[1, 0], [0, 0]], ("a", "b"), [("b",), ()]),
        (MULTI, [[1, 0, 0], [0, 1, 1]], ("a", "b", "c"), [("a",), ("b", "c")]),
        (MULTI, [[True, False, True]], ("a", "b", "c"), [("a", "c")]),
        (MULTI, [[1, 0, 0, 0]], ("a", "b", "c"), None),
        (MULTI, [[0, 1]], ("a", "b", "c"), [("a", "b")]),  # class numbers
    ],
)
def test_labels_of_other_data_mean_the_same_as_in_training(task, values, outputs, expected):
    kind = TASKS[Classification]
    places = [Place("rows", n) for n in range(len(values))]
    part = Records([kind.read(task, {"text": "x", "label": label}, places[0]) for label in values], places)
    outputs = labels.output_names(task, outputs)
    if expected is None:
        with pytest.raises(UserError):
            labels.to_outputs(kind, task, part, outputs)
        return
    found = labels.to_outputs(kind, task, part, outputs)
    assert [record["label"] for record in found.records] == expected


def test_lists_of_0_and_1_have_a_value_for_each_output():
    kind = TASKS[Classification]
    places = [Place("rows", n) for n in range(3)]
    part = Records([kind.read(MULTI, {"text": "x", "label": [1, 0, 0]}, place) for place in places], places)
    kind.finalize_labels(MULTI, part, ())  # reading a data set calls this too
    with pytest.raises(UserError, match="holds 3 values of 0 and 1, and there are 4 classes"):
        labels.align_labels(kind, MULTI, part, part, Records([], []), ("a", "b", "c", "d"))


# Tags of any scheme

SENTENCE = "B-PER I-PER O B-LOC B-LOC"
SPANS = [("PER", 0, 1), ("LOC", 3, 3), ("LOC", 4, 4)]


@pytest.mark.parametrize(
    ("kind", "tags"),
    [
        ("spans", SENTENCE),
        ("spans", "I-PER I-PER O I-LOC B-LOC"),  # IOB1
        ("spans", "B-PER E-PER O S-LOC S-LOC"),  # IOBES
        ("spans", "B-PER L-PER O U-LOC U-LOC"),  # BILOU
        ("spans", "B-PER E-PER O W-LOC W-LOC"),  # BMEWO
        ("spans", "B_PER I_PER O B_LOC B_LOC"),
        ("spans", "b-PER i-PER O b-LOC b-LOC"),
        ("spans", "b-PER i-PER o b-LOC b-LOC"),
        ("spans", "B:PER I:PER O B:LOC B:LOC"),
        ("suffixed", "PER-B PER-I O LOC-B LOC-B"),
        ("suffixed", "PER_B PER_E O LOC_S LOC_S"),
    ],
)
def test_schemes_mark_the_same_spans(kind, tags):
    assert schemes.tag_kind(tags.split()) == kind
    found = schemes.spans(schemes.iob2(tags.split(), kind))
    assert [tuple(span) for span in found] == SPANS


@pytest.mark.parametrize(
    ("kind", "tags", "spans"),
    [
        ("untyped", "B I O B B", [("", 0, 1), ("", 3, 3), ("", 4, 4)]),
        ("untyped", "I I O B S", [("", 0, 1), ("", 3, 3), ("", 4, 4)]),
        ("untyped", "B L O U U", [("", 0, 1), ("", 3, 3), ("", 4, 4)]),
        ("inside", "PER PER O LOC LOC", [("PER", 0, 1), ("LOC", 3, 4)]),
        ("classes", "DET NOUN VERB", None),
        ("classes", "M S W", None),
        ("mixed", "O B-PER LOC", None),
        ("mixed", "_ B-PER I-PER", None),
        ("mixed", "0 B-PER E-PER", None),
        ("classes", "V-FIN S-PRO B-VERB", None),
        ("inside", "VITAMIN-B VITAMIN-K O", [("VITAMIN-B", 0, 0), ("VITAMIN-K", 1, 1)]),
        ("untyped", "b i o b", [("", 0, 1), ("", 3, 3)]),
    ],
)
def test_tags_have_the_expected_kind(kind, tags, spans):
    tags = tags.split()
    assert schemes.tag_kind(tags) == kind
    if spans is not None:
        assert [tuple(span) for span in schemes.spans(schemes.iob2(tags, kind))] == spans


HEADS = {
    "IOB2": ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
    "IO": ("O", "LOC", "PER"),
    "I- tags": ("O", "I-LOC", "I-PER"),
    "IOBES": ("S-PER", "B-PER", "I-PER", "E-PER", "O", "S-LOC", "B-LOC", "I-LOC", "E-LOC"),
    "BILOU": ("U-PER", "B-PER", "I-PER", "L-PER", "O", "U-LOC", "B-LOC", "I-LOC", "L-LOC"),
    "other tags too": ("[CLS]", "O", "B-PER", "I-PER", "B-LOC", "I-LOC", "X"),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("data", ["B-PER I-PER O B-LOC O", "B-PER E-PER O S-LOC O", "B-per L-per O U-loc O"])
def test_tags_of_the_data_become_those_of_the_head(head, data):
    names = HEADS[head]
    record = TASKS[Tagging].read(Tagging(), {"tokens": list("abcde"), "tags": data.split()}, Place("rows", 1))
    part = Records([record], [Place("rows", 1)])
    [mapped_part] = TASKS[Tagging].map_labels(Tagging(), [part], names)
    tags = mapped_part.records[0]["label"]
    assert set(tags) <= set(names)
    kind = schemes.head_kind(names)
    assert [tuple(s) for s in schemes.spans(schemes.iob2(tags, kind))] == [("PER", 0, 1), ("LOC", 3, 3)]
    [again] = TASKS[Tagging].map_labels(Tagging(), [mapped_part], names)
    assert again.records[0]["label"] == tags
    if head == "BILOU":
        assert tags == ["B-PER", "L-PER", "O", "U-LOC", "O"]


def tagging_records(*sentences: str, **fields: Any) -> tuple[Tagging, Records]:
    task = Tagging(**fields)
    rows = [{"tokens": sentence.split(), "tags": sentence.split()} for sentence in sentences]
    rows = [row | {"tags": [int(tag) if tag.isdigit() else tag for tag in row["tags"]]} for row in rows]
    places = [Place("rows", n) for n in range(len(rows))]
    return task, Records([TASKS[Tagging].read(task, row, place) for row, place in zip(rows, places)], places)


@pytest.mark.parametrize(
    ("sentence", "fields", "names", "scores"),
    [
        ("B I O", {}, "O B I", "f1"),
        ("PER O", {}, "O PER", "f1"),
        ("B-A L-A U-B O", {}, "O B-A I-A B-B I-B", "f1"),
        ("DET NOUN", {}, "DET NOUN", "accuracy"),
        ("N O V", {"scheme": "none"}, "N O V", "accuracy"),
        ("N V", {"scheme": "IO"}, "O N V", "f1"),
        ("B-N V", {"scheme": "IO"}, "O B-N V", "f1"),
        ("A-B A-I o", {}, "O B-A I-A", "f1"),
        ("b i o", {}, "O B I", "f1"),
        ("0 1 2", {"names": ("O", "B-X", "I-X")}, "O B-X I-X", "f1"),
        ("0 1", {"names": ("NOUN", "VERB")}, "NOUN VERB", "accuracy"),
    ],
)
def test_tags_of_any_kind_have_outputs(sentence, fields, names, scores):
    task, part = tagging_records(sentence, **fields)
    kind = TASKS[Tagging]
    found, train, _ = labels.align_labels(kind, task, part, part, Records([], []), None)
    assert found == tuple(names.split())
    trained_task = kind(task, 16, 0, None, found)
    assert trained_task.scores[0] == scores
    correct = [{"prediction": record["label"]} for record in train.records]
    assert trained_task.score(train.records, correct)[scores] == 1.0
    trained_task.describe_labels(train)
    trained_task.sections(train, [row | {"confidence": 1.0} for row in correct])


def test_numbers_without_names_are_refused():
    task, part = tagging_records("0 1 2")
    with pytest.raises(UserError, match=r"'tags' holds numbers, 0, 1, 2 .*--task.names"):
        TASKS[Tagging].names(task, part)


# Training continues from the head

ENCODER = ModelConfig(
    structure="encoder", heads_on_top=(), vocabulary=80, max_length=32, width=16, layers=1, heads=2, types=2
)


def random_text(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, 6))


def class_row(random: np.random.Generator, names: Any = NLI) -> dict[str, Any]:
    return {"text": random_text(random), "label": names[random.integers(len(names))]}


def tags_row(random: np.random.Generator, names: Any) -> dict[str, Any]:
    return {"tokens": random_text(random).split(), "tags": [names[i] for i in random.integers(len(names), size=6)]}


def multi_label_row(random: np.random.Generator) -> dict[str, Any]:
    return {"text": random_text(random), "label": [name for name in ("a", "b", "c") if random.random() < 0.5]}


def choice_row(random: np.random.Generator) -> dict[str, Any]:
    return {
        "question": random_text(random),
        "options": [random_text(random), random_text(random)],
        "label": int(random.integers(2)),
    }


TINY = {"vocabulary": 80, "max_length": 32, "width": 16, "layers": 1, "heads": 2, "mlp_width": 24}
ORDER = ("O", "I-PER", "B-PER", "I-LOC", "B-LOC")
CASES: dict[str, tuple[Any, str, tuple[str, ...], Any]] = {  # the task, its head, the names of the outputs, a row
    "classes in another order": (Classification(), "classes", NLI, class_row),
    "tags in another order": (Tagging(), "tokens", ORDER, lambda random: tags_row(random, sorted(ORDER))),
    "numbers as labels": (
        Classification(),
        "classes",
        ("LABEL_0", "LABEL_1", "LABEL_2"),
        lambda r: class_row(r, (2, 0, 1)),
    ),
    "capital letters": (Classification(), "classes", NLI, lambda r: class_row(r, [name.title() for name in NLI])),
    "several labels": (Classification(problem="multi_label"), "classes", ("c", "a", "b"), multi_label_row),
    "fewer labels": (Classification(), "classes", NLI, lambda random: class_row(random, NLI[1:])),
    "another scheme of tags": (
        *(Tagging(), "tokens", ("O", "U-A", "B-A", "L-A", "I-A")),
        lambda random: tags_row(random, ("O", "B-A", "I-A")),
    ),
    "choices": (MultipleChoice(), "classes", ("LABEL_0",), choice_row),
}
FAST = ("tags in another order",)


@pytest.fixture
def start(tmp_path):
    """Returns a function that saves a model with a head and returns a run that continues from it, and the rows."""
    tokenizer = tokenizers.train(WORDS, TokenizerConfig(train="wordpiece"), ENCODER.vocabulary)

    def make_run(task: Any, head: str, names: tuple[str, ...], row: Any, **fields: Any) -> tuple[RunConfig, list[Any]]:
        config = replace(ENCODER, heads_on_top=(head,), labels=names)
        jaxlm.save(LM(config, Transformer(config), random_params(config), tokenizer), tmp_path / "model")
        random = np.random.default_rng(0)
        rows = [row(random) for _ in range(40)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(path=str(tmp_path / "rows.jsonl"), length=32, cache=str(tmp_path / "cache"))
        optimizer = OptimizerConfig(rate=1e-12, weight_decay=0.0)
        run = RunConfig(None, task, data, optimizer=optimizer, batch=4, steps=1, init=str(tmp_path / "model"))
        return replace(run, workdir=str(tmp_path / "run"), **fields), rows

    return make_run


@pytest.fixture
def quick(devices, no_plots):
    """Uses one device and draws no plots."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.long) for name in CASES])
def test_predictions_do_not_change_in_a_step_of_a_tiny_rate(name, start, quick):
    task, _, names, _ = CASES[name]
    run, rows = start(*CASES[name])
    before = jaxlm.predict(jaxlm.load(run.init), rows, task=task, length=32)
    lm = fit(run)
    assert lm.config.labels == names
    for model in (lm, jaxlm.load(run.workdir)):
        after = jaxlm.predict(model, rows, task=task, length=32)
        assert [row["prediction"] for row in after] == [row["prediction"] for row in before]
    assert len({str(row["prediction"]) for row in before}) > 1  # otherwise the comparison would be trivial
    scores = jaxlm.evaluate(lm, rows, task, length=32)
    assert scores["examples"] == len(rows)


@pytest.mark.parametrize(
    ("names", "row", "words"),
    [
        (("a", "b", "c"), class_row, ["3 outputs, a, b, c", "contradiction, entailment, neutral", "--new-head"]),
        (("a", "b"), class_row, ["2 outputs, a, b", "needs 3"]),
        (("LABEL_0", "LABEL_1", "LABEL_2"), class_row, ["in the order of the outputs", "--task.names"]),
    ],
)
def test_other_labels_are_refused_with_both_sets(start, names, row, words):
    run, _ = start(Classification(), "classes", names, row)
    with pytest.raises(UserError) as error:
        fit(run)
    assert all(word in str(error.value) for word in words), error.value
    assert not (Path(run.workdir) / "config.json").exists()


def test_new_head_initialises_the_head_randomly(start, quick):
    run, _ = start(Classification(), "classes", ("a", "b", "c"), class_row, new_head=True)
    lm = fit(run)
    assert lm.config.labels == ("contradiction", "entailment", "neutral")
    old = jaxlm.load(run.init).params["classes_head"]
    same = {name: np.allclose(old[name]["kernel"], lm.params["classes_head"][name]["kernel"]) for name in old}
    assert same == {"dense": True, "out": False}


def test_given_names_name_the_outputs_of_a_head_without_names(start):
    run, _ = start(Classification(names=NLI), "classes", ("LABEL_0", "LABEL_1", "LABEL_2"), class_row)
    from jaxlm.run.weights import known_labels
    from jaxlm.tasks import prepare

    known = known_labels(run, None)
    assert known == ("LABEL_0", "LABEL_1", "LABEL_2")
    tokenizer = jaxlm.load(run.init).tokenizer
    assert prepare(run, tokenizer, lambda _: None, known).labels == NLI
    other = replace(run, task=Classification(names=NLI[::-1]))
    assert prepare(other, tokenizer, lambda _: None, NLI).labels == NLI


def multi_task_run(start, parts: dict[str, tuple[Any, Any]], head: str, names: tuple[str, ...], **fields: Any):
    """Returns a run of several tasks from weights with this head, and the rows of each part."""
    first = next(iter(parts.values()))
    run, _ = start(first[0], head, names, first[1], **fields)
    rows: dict[str, list[Any]] = {}
    parts_by_name: dict[str, Part] = {}
    for seed, (name, (task, row)) in enumerate(parts.items()):
        random = np.random.default_rng(seed)
        rows[name] = [row(random) for _ in range(40)]
        path = Path(run.init).parent / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        parts_by_name[name] = Part(task, DataConfig(path=str(path)))
    return replace(run, task=MultiTask(parts_by_name)), rows


def other_row(random: np.random.Generator) -> dict[str, Any]:
    return class_row(random, ("x", "y"))


@pytest.mark.long
@pytest.mark.parametrize("from_python", [False, True])
def test_a_part_of_several_tasks_keeps_the_head_of_the_weights(start, quick, capsys, from_python):
    parts = {"nli": (Classification(), class_row), "letters": (Classification(), other_row)}
    run, rows = multi_task_run(start, parts, "classes", NLI)
    model = jaxlm.load(run.init)
    before = jaxlm.predict(model, rows["nli"], task=Classification(), length=32)
    if from_python:
        fit(replace(run, init=""), model=model)
    else:
        fit(run)
    lines = capsys.readouterr().err.splitlines()
    lm = jaxlm.load(Path(run.workdir) / "export" / "nli")
    assert lm.config.labels == NLI
    after = jaxlm.predict(lm, rows["nli"], task=Classification(), length=32)
    assert [row["prediction"] for row in after] == [row["prediction"] for row in before]
    assert len({row["prediction"] for row in before}) > 1
    assert [line for line in lines if "other labels" in line] == [
        "labels    the head of the part letters is randomly initialised: the weights have a head with other labels"
    ]
    assert [line for line in lines if line.startswith("randomly initialised")] == [
        "randomly initialised, since the given weights have none: own_letters"
    ]
    assert jaxlm.load(Path(run.workdir) / "export" / "letters").config.labels == ("x", "y")


@pytest.mark.parametrize(
    ("head", "names", "parts"),
    [
        ("tokens", ORDER, {"ner": (Tagging(), lambda random: tags_row(random, sorted(ORDER)))}),
        ("classes", NLI, {"nli": (Classification(), class_row), "also": (Classification(), class_row)}),
        ("classes", NLI, {"nli": (Classification(), class_row), "choice": (MultipleChoice(), choice_row)}),
    ],
)
@pytest.mark.long
def test_parts_of_every_kind_keep_the_head_of_the_weights(start, quick, capsys, head, names, parts):
    run, rows = multi_task_run(start, parts, head, names)
    fit(run)
    lines = capsys.readouterr().err.splitlines()
    for name, (task, _) in parts.items():
        lm = jaxlm.load(Path(run.workdir) / "export" / name)
        if isinstance(task, MultipleChoice):
            assert "randomly initialised, since the given weights have none: own_choice" in lines
            continue
        assert lm.config.labels == names
        before, after = (jaxlm.predict(m, rows[name], task=task, length=32) for m in (jaxlm.load(run.init), lm))
        assert [row["prediction"] for row in after] == [row["prediction"] for row in before]


def test_parts_without_the_labels_of_the_head_are_refused_with_both_sets(start):
    parts = {"letters": (Classification(), other_row), "ner": (Tagging(), lambda random: tags_row(random, ORDER))}
    run, _ = multi_task_run(start, parts, "classes", NLI)
    with pytest.raises(UserError, match=r"letters: the head of the weights .* 3 outputs, .*needs 2: x, y.*--new-head"):
        fit(run)


def test_new_head_initialises_the_heads_of_several_tasks_randomly(start, quick):
    run, _ = multi_task_run(start, {"letters": (Classification(), other_row)}, "classes", NLI, new_head=True)
    returned = fit(replace(run, matmul_precision="highest", attention="xla"))
    assert (returned.module.precision, returned.module.kernel) == ("highest", "xla")  # the settings of the training
    lm, old = jaxlm.load(Path(run.workdir) / "export" / "letters"), jaxlm.load(run.init).params["classes_head"]
    assert lm.config.labels == ("x", "y")
    assert np.allclose(old["dense"]["kernel"], lm.params["classes_head"]["dense"]["kernel"])


@pytest.mark.long
def test_a_run_of_several_tasks_from_a_head_resumes(start, quick):
    parts = {"nli": (Classification(), class_row), "letters": (Classification(), other_row)}
    run, _ = multi_task_run(start, parts, "classes", NLI)
    run = replace(run, steps=4, checkpoint_every=2, optimizer=OptimizerConfig(rate=1e-3))
    fit(run)
    interrupted = replace(run, workdir=run.workdir + "_cut")
    calls: list[bool] = []
    with pytest.raises(Stopped):
        fit(interrupted, stop=lambda: calls.append(True) or len(calls) > 2)
    fit(interrupted)
    for name in parts:
        whole, resumed = (jaxlm.load(Path(r.workdir) / "export" / name) for r in (run, interrupted))
        assert whole.config == resumed.config
        for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params)):
            np.testing.assert_array_equal(one, other)


def test_weights_that_changed_since_a_run_began_are_refused(start, quick):
    run, _ = start(Classification(), "classes", NLI, class_row)
    fit(run)
    weights = Path(run.init) / "model.safetensors"
    content = weights.read_bytes()
    os.utime(weights, ns=(0, 0))
    fit(run)  # the time differs, but the content is the same
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        UserError, match=r"finished run that started from other weights: those in .*model have changed.*--workdir"
    ):
        fit(run)
    (Path(run.workdir) / "scores.json").rename(Path(run.workdir) / "no.json")  # the run looks unfinished
    fit(run)  # resumes from its checkpoint
    (Path(run.workdir) / "no.json").unlink()
    with pytest.raises(UserError, match="finished run that started from other weights"):
        fit(run)
    shutil.rmtree(run.init)
    with pytest.raises(UserError, match="model"):
        fit(run)


@pytest.mark.long
@pytest.mark.parametrize(
    ("head", "names", "task", "row"),
    [
        ("classes", ("b", "a"), Tagging(scheme="none"), lambda random: tags_row(random, ("a", "b"))),
        ("tokens", ("y", "x"), Classification(), lambda random: class_row(random, ("x", "y"))),
    ],
)
def test_a_head_of_another_kind_is_not_reused(start, quick, capsys, monkeypatch, head, names, task, row):
    """BERT stores both heads as classifier.weight, here with the same number of outputs."""
    monkeypatch.setitem(globals(), "ENCODER", replace(PRESETS["bert-base"], **TINY))
    run, _ = start(task, head, names, row)
    assert "classifier.weight" in safetensors.read(Path(run.init))
    lm = fit(run)
    assert lm.config.labels == tuple(sorted(names))
    other = "tokens" if head == "classes" else "classes"
    assert f"randomly initialised, since the given weights have none: {other}_head" in capsys.readouterr().err
    old = jaxlm.load(run.init).params[f"{head}_head"]["out"]["kernel"]
    assert not np.allclose(old, lm.params[f"{other}_head"]["out"]["kernel"])


ENCODERS = (
    "albert-base",
    "bert-base",
    "deberta-v3-small",
    "distilbert-base",
    "electra-small",
    "modernbert-base",
    "mpnet-base",
    "nomic-bert",
    "gte-base-en-v1.5",
    "roberta-base",
    "longformer-base-4096",
)


@pytest.mark.parametrize("preset", ENCODERS)
@pytest.mark.parametrize(("head", "other"), [("classes", "tokens"), ("tokens", "classes")])
def test_outputs_of_another_head_are_initialised_randomly_in_every_family(tmp_path, preset, head, other):
    config = replace(PRESETS[preset], **TINY, heads_on_top=(head,))
    jaxlm.save(LM(config, Transformer(config), random_params(config)), tmp_path / "model")
    assert f"{other}_head/out/kernel" in families.open_folder(tmp_path / "model", head=other).fresh
    assert not families.open_folder(tmp_path / "model", head=head).fresh


@pytest.mark.parametrize(
    ("sentences", "words"),
    [
        (["(LOC) *", "(PER* *) *"], ["open and close spans by brackets", "'(LOC)'", "--task.scheme none"]),
        (["B-loc _", "B-per I-per"], ["the tag '_' has no prefix", "write it as O"]),
    ],
)
def test_tags_in_other_notations_are_refused(sentences, words):
    places = [Place("rows", n) for n in range(1, len(sentences) + 1)]
    rows = [{"tokens": list("abcde")[: len(tags.split())], "tags": tags.split()} for tags in sentences]
    part = Records([TASKS[Tagging].read(Tagging(), row, place) for row, place in zip(rows, places)], places)
    with pytest.raises(UserError) as error:
        TASKS[Tagging].names(Tagging(), part)
    assert "rows:1: " in str(error.value) and all(word in str(error.value) for word in words), error.value

"""Bad and unusual input of fine-tuning, prediction and evaluation at the command line.

Bad input of every kind leads to one error message (value, limit, remedy) and exit code 2, and changes no file. Unusual
but valid input is accepted, and the output describes it.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import (
    CausalLM,
    Classification,
    DataConfig,
    ModelConfig,
    MultipleChoice,
    QuestionAnswering,
    RunConfig,
    Similarity,
    Tagging,
    TokenizerConfig,
    UserError,
    families,
)
from jaxlm.__main__ import main
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.lm import LM
from jaxlm.nn.transformer import Transformer
from jaxlm.run import folder
from jaxlm.run.trained_model import task_of
from jaxlm.tasks import make_task, prepare

ROOT = Path(__file__).parent.parent
TEXT = "the good bad film plot actor scene great awful boring fine story music was is very quite never always rather"
MODEL = ModelConfig(
    structure="encoder", heads_on_top=(), vocabulary=90, max_length=64, width=32, layers=2, heads=2, types=2
)
LENGTH = 32

CONFIG = """
from pathlib import Path
import jaxlm
from jaxlm import DataConfig, ModelConfig, RunConfig, TokenizerConfig

HERE = Path(__file__).parent

def config(kind="Classification"):
    return RunConfig(
        model=ModelConfig(structure="encoder", vocabulary=90, max_length=64, width=32, layers=2, heads=2, types=2),
        task=getattr(jaxlm, kind)(),
        data=DataConfig(path=str(HERE / "good.csv"), length=32, cache=str(HERE / "cache")),
        tokenizer=TokenizerConfig(train="wordpiece"),
        batch=8, steps=2, workdir=str(HERE / "run"),
    )
"""


def lines(*rows: Any) -> str:
    """Returns the rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(labels: list[Any]) -> str:
    """Returns the text of a csv file with these labels."""
    return "text,label\n" + "".join(f"{TEXT},{label}\n" for label in labels)


def conll(*sentences: list[tuple[str, str]]) -> str:
    return "".join("".join(f"{word}\t{tag}\n" for word, tag in sentence) + "\n" for sentence in sentences)


def squad(*questions: dict[str, Any], context: str = TEXT) -> str:
    article = {"paragraphs": [{"context": context, "qas": questions}]}
    return json.dumps({"data": [{"title": title, **article} for title in "abc"]})


def question(text: str, start: Any, wording: str = "what is good", **more: Any) -> dict[str, Any]:
    return {"id": "1", "question": wording, "answers": [{"text": text, "answer_start": start}], **more}


LABELS = ["pos", "neg"] * 10
ROWS = [{"text": TEXT, "label": label} for label in LABELS]
PLAIN = [(word, "O") for word in TEXT.split()]
NAMED = [("the", "B-PER"), ("film", "I-PER"), *PLAIN]
CHOICE = {"question": TEXT, "options": ["good", "bad"], "label": 1}
PAIR = {"text_a": TEXT, "text_b": "the film", "label": 0.5}
GOOD = {"text": ["film"], "answer_start": [13]}


@pytest.fixture
def cwd(tmp_path, monkeypatch) -> Path:
    """Returns the working directory, which has a config and valid data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(CONFIG)
    (tmp_path / "good.csv").write_text(table(LABELS))
    return tmp_path


# Training data: the task, the file name, its content, further flags, and the words that the message must contain.
DATA: dict[str, tuple[str, str, str, list[str], list[str]]] = {
    "empty file": ("Classification", "x.csv", "", [], ["x.csv", "no training example", "give more"]),
    "a duplicate column": (
        *("Classification", "x.csv", table(LABELS).replace("text,label", "label,label"), []),
        ["x.csv:1", "'label' twice", "rename"],
    ),
    "only rows that are dropped": (
        "QuestionAnswering",
        "x.json",
        squad(question("film", 14)),
        ["--data.format", "squad", "--task.wrong-offsets", "drop"],
        ["x.json (3 rows, 3 dropped)", "no training example"],
    ),
    "only a header": ("Classification", "x.csv", "text,label\n", [], ["x.csv", "no training example"]),
    "one row": ("Classification", "x.csv", table(["pos"]), [], ["x.csv", "no held-out example"]),
    "a file that ends mid-row": (
        *("Classification", "x.csv", table(LABELS) + '"the good fi', []),
        ["x.csv:22", "unexpected end", "correct the quotes"],
    ),
    "a file that ends mid-object": (
        *("Classification", "x.jsonl", lines(*ROWS) + '{"text": "the g', []),
        ["x.jsonl:21", "not a JSON object", "column 10"],
    ),
    "no column of text": (
        *("Classification", "x.csv", table(LABELS).replace("text", "words"), []),
        ["x.csv:2", "'text'", "'words', 'label'", "--task.text"],
    ),
    "no column of labels": (
        *("Classification", "x.csv", table(LABELS), ["--task.label", "lable"]),
        ["x.csv:2", "'lable'", "'text', 'label'", "--task.label"],
    ),
    "text that is a number": (
        *("Classification", "x.jsonl", lines(*ROWS, {"text": 5, "label": "pos"}), []),
        ["x.jsonl:21", "int 5", "--task.text"],
    ),
    "an empty cell": ("Classification", "x.csv", table([*LABELS, ""]), [], ["x.csv:22", "no label", "leave the row"]),
    "a blank cell": ("Classification", "x.csv", table([*LABELS, "  "]), [], ["x.csv:22", "no label", "leave the row"]),
    "a label that is null": (
        "Classification",
        "x.jsonl",
        lines(*ROWS, ROWS[0] | {"label": None}),
        [],
        ["x.jsonl:21", "no label"],
    ),
    "a missing key": (
        *("Classification", "x.jsonl", lines(*ROWS, {"text": TEXT}), []),
        ["x.jsonl:21", "no column 'label'", "'text'", "--task.label"],
    ),
    "numbers and text": (
        *("Classification", "x.jsonl", lines(*[{"text": TEXT, "label": x} for x in [1, "a"] * 5]), []),
        ["'label'", "numbers (x.jsonl:", "text (x.jsonl:", "one type"],
    ),
    "numbers and booleans": (
        *("Classification", "x.jsonl", lines(*[{"text": TEXT, "label": x} for x in [1, True] * 5]), []),
        ["numbers (x.jsonl:", "true or false (x.jsonl:", "one type"],
    ),
    "NaN in json": (
        *("Classification", "x.jsonl", lines(*ROWS, ROWS[0] | {"label": float("nan")}), []),
        ["x.jsonl:21", "float nan", "fix it"],
    ),
    "infinity in json": (
        *("Classification", "x.jsonl", lines(*ROWS, ROWS[0] | {"label": float("inf")}), []),
        ["x.jsonl:21", "float inf", "fix it"],
    ),
    "nan among numbers": (
        *("Classification", "x.csv", table([1, 2, "nan"] * 6), []),
        ["x.csv:", "'nan' among numbers", "fix it"],
    ),
    "a list as a class": (
        *("Classification", "x.jsonl", lines(*ROWS, ROWS[0] | {"label": ["pos"]}), []),
        ["x.jsonl:21", "list ['pos']", "not a label", "--task.label"],
    ),
    "an object as classes": (
        *("Classification", "x.jsonl", lines(*ROWS, ROWS[0] | {"label": {"a": 1}}), ["--task.problem", "multi_label"]),
        ["x.jsonl:21", "dict {'a': 1}", "not a label"],
    ),
    "fractions as classes": (
        *("Classification", "x.csv", table([0.5, 1.5, 2.0] * 6), []),
        ["3 different values", "not all integers", "--task.problem regression", "--task.names"],
    ),
    "too many classes": (
        *("Classification", "x.csv", table(list(range(10_000))), []),
        ["different values in", "'0'", "max_classes is 1,000", "--task.problem regression", "--task.max-classes"],
    ),
    "one class": (
        *("Classification", "x.csv", table(["pos"] * 20), []),
        ["'label'", "only the label 'pos'", "needs several"],
    ),
    "no class in any row": (
        *("Classification", "x.jsonl", lines(*[{"text": TEXT, "label": []}] * 20), ["--task.problem", "multi_label"]),
        ["'label'", "no label in"],
    ),
    "no classes in a cell": (
        *("Classification", "x.csv", table([*LABELS, ""]), ["--task.problem", "multi_label"]),
        ["x.csv:22", "no label", "an empty list or the separator ','"],
    ),
    "a label that is not in the names": (
        *("Classification", "x.csv", table(LABELS), ["--task.names", "pos", "other"]),
        ["x.csv:", "'neg'", "--task.names pos, other", "add it"],
    ),
    "a duplicate name": (
        *("Classification", "x.csv", table(LABELS), ["--task.names", "pos", "neg", "pos"]),
        ["a name twice", "pos, neg, pos"],
    ),
    "a word as a number": (
        *("Classification", "x.csv", table([1, 2, 3, "great"]), ["--task.problem", "regression"]),
        ["x.csv:5", "'great'", "not a number", "--task.label"],
    ),
    "a decimal comma": (
        *("Classification", "x.csv", table([1, 2, 3, '"-3,25"']), ["--task.problem", "regression"]),
        ["x.csv:5", "'-3,25'", "not a number", "write it as -3.25"],
    ),
    "nan as a number": (
        *("Classification", "x.csv", table([1, 2, "nan", 3]), ["--task.problem", "regression"]),
        ["x.csv:4", "'nan'", "finite"],
    ),
    "a number beyond float32": (
        *("Classification", "x.csv", table([1, 2, "1e300", 3]), ["--task.problem", "regression"]),
        ["x.csv:4", "'1e300'", "at most 1e+15"],
    ),
    "rows longer than the model": (
        *("Classification", "x.csv", table(LABELS), ["--data.length", "65"]),
        ["data.length is 65", "64 positions", "lower --data.length"],
    ),
    "three texts": (
        *("Classification", "x.csv", table(LABELS), ["--task.text", "a", "b", "c"]),
        ["has 3 columns", "or two for a pair"],
    ),
    "columns missing in conll": (
        *("Tagging", "x.conll", conll(*[NAMED] * 4) + "the\tB-PER\ngood\n\n", []),
        ["x.conll:94", "'good' has 1 columns, line 1 has 2", "a token, its tag last"],
    ),
    "no tags in conll": ("Tagging", "x.conll", "the\nfilm\n\n", [], ["x.conll:1", "no column 'tags'", "'tokens'"]),
    "a tag without a scheme": (
        *("Tagging", "x.conll", conll(*[NAMED] * 4, [("the", "PERSON")]), []),
        ["x.conll:93", "'PERSON' has no prefix", "'B-PER'", "--task.scheme"],
    ),
    "a tag of another scheme": (
        *("Tagging", "x.conll", conll(*[NAMED] * 4, [("the", "S-PER")]), ["--task.scheme", "IOB2"]),
        ["x.conll:93", "'S-PER' is not one of IOB2", "--task.scheme"],
    ),
    "tags that are numbers": (
        *("Tagging", "x.jsonl", lines(*[{"tokens": ["the"], "tags": [0]}] * 4), []),
        ["'tags' holds numbers, 0", "--task.names O B-PER I-PER"],
    ),
    "tags that are fractions": (
        *("Tagging", "x.jsonl", lines(*[{"tokens": ["the"], "tags": [0.5]}] * 4), []),
        ["x.jsonl:1", "'tags' holds [0.5]", "not a list of texts", "--task.tags"],
    ),
    "more tokens than tags": (
        *("Tagging", "x.jsonl", lines({"tokens": ["the", "film"], "tags": ["O"]}), []),
        ["x.jsonl:1", "2 tokens and 1 tags", "a tag for each"],
    ),
    "no tag but O": ("Tagging", "x.conll", conll(*[PLAIN] * 4), [], ["'tags'", "no tag but O", "nothing to learn"]),
    "an answer at another position": (
        *("QuestionAnswering", "x.json", squad(question("film", 13), question("film", 14)), ["--data.format", "squad"]),
        ["x.json:2", "'film' is not at character 14 of its text", "'ilm '", "--task.wrong-offsets drop"],
    ),
    "an answer at a negative position": (
        *("QuestionAnswering", "x.json", squad(question("film", -3)), ["--data.format", "squad"]),
        ["x.json:1", "'film' is not at character -3"],
    ),
    "an empty answer": (
        *("QuestionAnswering", "x.json", squad(question("", 13)), ["--data.format", "squad"]),
        ["x.json:1", "is empty", "fix it"],
    ),
    "no answer where one is required": (
        "QuestionAnswering",
        "x.json",
        squad(question("film", 13), question("film", 13, is_impossible=True)),
        ["--data.format", "squad", "--task.no-unanswerable"],
        ["x.json:2", "no answer", "--task.unanswerable"],
    ),
    "no answers": (
        *("QuestionAnswering", "x.jsonl", lines({"question": "a", "context": "b"}), []),
        ["x.jsonl:1", "no 'answers'", "'question', 'context'", "empty lists"],
    ),
    "answers in another format": (
        *("QuestionAnswering", "x.jsonl", lines({"question": "a", "context": "b", "answers": ["b"]}), []),
        ["x.jsonl:1", "['b']", "'text' and 'answer_start'", "two lists"],
    ),
    "answers that are not lists": (
        "QuestionAnswering",
        "x.jsonl",
        lines({"question": "a", "context": TEXT, "answers": {"text": "film", "answer_start": 13}}),
        [],
        ["x.jsonl:1", "'text': 'film'", "two lists"],
    ),
    "more answers than positions": (
        "QuestionAnswering",
        "x.jsonl",
        lines({"question": "a", "context": TEXT, "answers": {"text": ["film", "plot"], "answer_start": [13]}}),
        [],
        ["x.jsonl:1", "two lists of the same length"],
    ),
    "a position that is a word": (
        "QuestionAnswering",
        "x.jsonl",
        lines({"question": "a", "context": TEXT, "answers": {"text": ["film"], "answer_start": ["x"]}}),
        [],
        ["x.jsonl:1", "'film' at 'x'", "an integer"],
    ),
    "a question as long as the row": (
        "QuestionAnswering",
        "x.json",
        squad(question("film", 13, wording=TEXT)),
        ["--data.format", "squad", "--data.length", "16", "--task.stride", "4"],
        ["data.length 16 leaves 0 tokens", "task.stride 4", "task.max_question_tokens"],
    ),
    "a stride as long as the row": (
        "QuestionAnswering",
        "x.json",
        squad(question("film", 13)),
        ["--data.format", "squad", "--task.stride", "40"],
        ["data.length 32 leaves", "task.stride 40", "lower task.stride"],
    ),
    "a label beyond the options": (
        *("MultipleChoice", "x.jsonl", lines(*[CHOICE] * 6, CHOICE | {"label": 2}), []),
        ["x.jsonl:7", "holds 2", "2 options", "a number from 0, a letter from A"],
    ),
    "a label that is a fraction": (
        *("MultipleChoice", "x.jsonl", lines(*[CHOICE] * 6, CHOICE | {"label": 1.5}), []),
        ["x.jsonl:7", "holds 1.5", "2 options"],
    ),
    "an ambiguous label": (
        *("MultipleChoice", "x.jsonl", lines(CHOICE | {"options": ["1", "2"], "label": "1"}), []),
        ["x.jsonl:1", "'1'", "the text of one option and the number or letter of another", "as letters"],
    ),
    "one option": (
        *("MultipleChoice", "x.jsonl", lines(CHOICE | {"options": ["good"]}), []),
        ["x.jsonl:1", "1 options", "at least 2"],
    ),
    "options that are text": (
        *("MultipleChoice", "x.jsonl", lines(CHOICE | {"options": "good"}), []),
        ["x.jsonl:1", "'good'", "not a list of texts"],
    ),
    "too many options": (
        *("MultipleChoice", "x.jsonl", lines(*[CHOICE | {"options": list("abcdefghij")}] * 6), []),
        ["10 options", "data.length 32 takes 8", "raise the length"],
    ),
    "a score outside the range": (
        *("Similarity", "x.jsonl", lines(*[PAIR] * 6, PAIR | {"label": 4.2}), []),
        ["x.jsonl:7", "4.2", "0 to 1", "--task.highest"],
    ),
    "a score that is NaN": (
        *("Similarity", "x.jsonl", lines(*[PAIR] * 6, PAIR | {"label": float("nan")}), []),
        ["x.jsonl:7", "nan", "0 to 1"],
    ),
    "bounds in the wrong order": (
        *("Similarity", "x.jsonl", lines(*[PAIR] * 6), ["--task.lowest", "5"]),
        ["task.lowest is 5.0 and task.highest 1.0", "must be larger"],
    ),
}


def only_error(output: str) -> str:
    """Returns the error message of the output, which must be the only one."""
    assert len(re.findall(r"^error: ", output, re.MULTILINE)) == 1 and "Traceback" not in output, output
    return output[output.index("error: ") :]


@pytest.mark.parametrize("name", DATA)
def test_bad_training_data_is_an_error_before_anything_is_compiled(cwd, capsys, monkeypatch, name):
    kind, file, content, flags, words = DATA[name]
    import jax

    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("something is compiled"))
    (cwd / file).write_text(content)
    assert main(["train", "tiny.py", kind, "--data.path", file, *flags]) == 2
    message = only_error(capsys.readouterr().err)
    assert all(word in message for word in words), message
    assert not (cwd / "run" / "config.json").exists() and (cwd / file).read_text() == content


HELD_OUT = {
    "a class": (
        "Classification",
        "csv",
        table(LABELS),
        table(["pos", "other"]),
        ["e.csv:3", "'other'", "neg, pos", "--task.names"],
    ),
    "one of several classes": (
        *("Classification", "jsonl", lines(*[{"text": TEXT, "label": ["a", "b"]}] * 8)),
        *(lines({"text": TEXT, "label": ["a", "z"]}), ["e.jsonl:1", "'z'", "a, b"]),
    ),
    "a type of entity": (
        *("Tagging", "conll", conll(*[NAMED] * 4), conll([("the", "B-LOC")])),
        ["e.conll:1", "'B-LOC'", "B-PER, I-PER, O", "--task.names"],
    ),
    "no row": ("Classification", "csv", table(LABELS), "text,label\n", ["no held-out example", "e.csv (20 rows)"]),
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_bad_held_out_data_is_an_error(cwd, capsys, name):
    kind, suffix, train, held_out, words = HELD_OUT[name]
    (cwd / f"x.{suffix}").write_text(train)
    (cwd / f"e.{suffix}").write_text(held_out)
    flags = ["--task.problem", "multi_label"] if suffix == "jsonl" else []
    paths = ["--data.path", f"x.{suffix}", "--data.eval-path", f"e.{suffix}"]
    assert main(["train", "tiny.py", kind, *paths, *flags]) == 2
    message = only_error(capsys.readouterr().err)
    assert all(word in message for word in words), message


# Unusual but valid data: the task, the file name, its content, fields of the data config, the labels, and a part
# of the description.
UNUSUAL: dict[str, tuple[Any, str, str, dict[str, Any], tuple[str, ...] | None, str]] = {
    "numbers in order": (
        *(Classification(), "x.csv", table([10, 2, 0, 1] * 5), {}),
        *(("0", "1", "2", "10"), ", 10 4 ("),
    ),
    "integers as floats": (
        *(Classification(), "x.jsonl", lines(*[{"text": TEXT, "label": x} for x in [0.0, 1.0] * 5]), {}),
        *(("0", "1"), "0 4"),
    ),
    "booleans": (
        *(Classification(), "x.jsonl", lines(*[{"text": TEXT, "label": x} for x in [True, False] * 5]), {}),
        *(("false", "true"), "true 4"),
    ),
    "names in any script": (
        *(Classification(), "x.jsonl", lines(*[{"text": TEXT, "label": x} for x in ["a, b", "é|ü", "中文"] * 4]), {}),
        *(("a, b", "é|ü", "中文"), "中文 4"),
    ),
    "names in a given order": (
        *(Classification(names=("pos", "neg", "other")), "x.csv", table(LABELS), {}),
        *(("pos", "neg", "other"), "other 0 (0.0%)"),
    ),
    "fractions that are names": (
        *(Classification(names=("0.5", "1.5")), "x.csv", table([0.5, 1.5] * 8), {}),
        *(("0.5", "1.5"), "0.5 7"),
    ),
    "several classes in a cell": (
        *(Classification(problem="multi_label"), "x.csv", table(['" b , a"', "a", '","', '"a,,a"'] * 4), {}),
        *(("a", "b"), "a "),
    ),
    "several classes that are numbers": (
        *(
            Classification(problem="multi_label"),
            "x.jsonl",
            lines(*[{"text": TEXT, "label": x} for x in [3, 3.0, [3, 4]]]),
        ),
        *({"eval_fraction": 0.3}, ("3", "4"), "3 2"),
    ),
    "types of entities in one sentence each": (
        *(Tagging(), "x.conll", conll(*[NAMED] * 3, *[[*PLAIN, ("a", f"B-{x}")] for x in "ABCDEFGH"])),
        *({"eval_fraction": 0.5}, ("O", *(f"{b}-{x}" for x in [*"ABCDEFGH", "PER"] for b in "BI")), "words; spans: "),
    ),
    "I- after O": (
        *(Tagging(), "x.conll", conll(*[[*PLAIN, ("the", "I-PER"), ("film", "I-LOC")]] * 5), {}),
        *(("O", "B-LOC", "I-LOC", "B-PER", "I-PER"), "8 I- tags that follow no tag of their type are read as B-"),
    ),
    "I- after O in IOB1": (
        *(Tagging(scheme="IOB1"), "x.conll", conll(*[[*PLAIN, ("the", "I-PER")]] * 5), {}),
        *(("O", "B-PER", "I-PER"), "PER 4"),
    ),
    "dropped answers": (
        *(QuestionAnswering(wrong_offsets="drop"), "x.json", squad(question("film", 13), question("film", 14))),
        *({"format": "squad"}, None, "2 questions with an answer, 0 without"),
    ),
    "plausible answers to impossible questions": (
        *(QuestionAnswering(), "x.json", squad(question("film", 13, is_impossible=True), question("film", 13))),
        *({"format": "squad"}, None, "2 questions with an answer, 2 without"),
    ),
    "options by number, letter and text": (
        MultipleChoice(first=1),
        "x.jsonl",
        lines(*[CHOICE | {"label": label} for label in (2, "2", 2.0, "B", "b", "bad")]),
        {"eval_fraction": 0.2},
        ("score",),
        "option 2 right ",
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_data_is_accepted_and_described(cwd, name):
    task, file, content, fields, labels, words = UNUSUAL[name]
    (cwd / file).write_text(content)
    data = DataConfig(path=file, **{"length": LENGTH, "cache": str(cwd / "cache"), **fields})
    run = RunConfig(MODEL, task, data, TokenizerConfig(train="characters"))
    prepared = prepare(run, None, lambda _: None)
    assert labels is None or prepared.labels == labels
    description = make_task(run, prepared.tokenizer, prepared.labels).describe_labels(prepared.train)
    assert words in description and description.count("I- tags") == words.count("I- tags"), description
    if name == "dropped answers":
        assert prepared.rows["rows"] == 6 and prepared.rows["dropped"] == 3


# Models


def tokenizer() -> Any:
    return tokenizers.train([TEXT, "a b c d"], TokenizerConfig(train="wordpiece"), MODEL.vocabulary)


def model(**fields: Any) -> LM:
    config = ModelConfig(**{**vars(MODEL), **fields})
    return LM(config, Transformer(config), random_params(config), tokenizer())


KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {  # task, model, data of a run
    "class": (Classification(), {"heads_on_top": ("classes",), "labels": ("neg", "pos")}, {"path": "x.csv"}),
    "classes": (Classification(problem="multi_label"), {"heads_on_top": ("classes",), "labels": ("a", "b")}, {}),
    "number": (Classification(problem="regression"), {"heads_on_top": ("classes",), "labels": ("score",)}, {}),
    "tags": (Tagging(), {"heads_on_top": ("tokens",), "labels": ("O", "B-PER", "I-PER")}, {"path": "x.conll"}),
    "answers": (QuestionAnswering(stride=4), {"heads_on_top": ("span",)}, {"path": "x.json", "format": "squad"}),
    "choices": (MultipleChoice(), {"heads_on_top": ("classes",), "labels": ("score",)}, {"path": "x.jsonl"}),
    "pairs": (Similarity(), {}, {"path": "x.jsonl"}),
    "lines": (
        Classification(),
        {"heads_on_top": ("classes",), "labels": ("NUM", "LOC")},
        {
            "path": "old.train.gz",
            "format": "text",
            "pattern": r"(?P<label>\w+):\S+ (?P<text>.*)",
            "encoding": "latin-1",
        },
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_load() -> Iterator[None]:
    """Loads each folder once, so that all commands for a model share its compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxlm, "load", lru_cache(jaxlm.load))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Returns a folder with one finished run of each kind, and with folders that have no export or no tokenizer."""
    top = tmp_path_factory.mktemp("runs")
    for name, (task, fields, data) in KINDS.items():
        (top / name).mkdir()
        run = RunConfig(MODEL, task, DataConfig(length=LENGTH, **data), workdir=str(top / name))
        folder.begin(run, top / name, "")
        jaxlm.save(model(**fields), top / name / "export")
    (top / "unfinished").mkdir()
    folder.begin(run, top / "unfinished", "")
    (top / "empty").mkdir()
    for name, structure in (("masked_lm", "encoder"), ("lm", "decoder"), ("lm", "encoder_decoder")):
        jaxlm.save(model(structure=structure, heads_on_top=(name,)), top / structure)
    jaxlm.save(model(heads_on_top=("classes",)), top / "mute")
    for file in (top / "mute").glob("*token*"):
        file.unlink()
    return top


STARTS = {
    "a missing folder": ("gone", ["gone is not a folder"]),
    "an empty folder": ("{runs}/empty", ["empty has no config.json"]),
    "an unfinished run": ("{runs}/unfinished", ["unfinished", "no export yet"]),
    "no tokenizer": ("{runs}/mute", ["mute has no tokenizer", "--tokenizer.path"]),
    "an encoder-decoder": ("{runs}/encoder_decoder", ["encoder-decoder", "start from another"]),
}


@pytest.mark.parametrize("name", STARTS)
def test_bad_initial_weights_are_an_error(cwd, runs, capsys, name):
    init, words = STARTS[name]
    (cwd / "start.py").write_text(re.sub(r"model=.*,\n", "model=None,\n", CONFIG).replace('train="wordpiece"', ""))
    assert main(["train", "start.py", "--init", init.format(runs=runs)]) == 2
    message = only_error(capsys.readouterr().err)
    assert all(word in message for word in words), message


# The arguments, the files of the working directory, and the words that the message must contain.
VERBS: dict[str, tuple[list[str], dict[str, str | bytes], list[str]]] = {
    "predict with a missing folder": (["predict", "gone", "x.csv"], {}, ["gone is not a folder"]),
    "predict with an empty folder": (["predict", "{runs}/empty", "x.csv"], {}, ["empty has no config.json"]),
    "predict with an unfinished run": (["predict", "{runs}/unfinished", "x.csv"], {}, ["no export yet"]),
    "predict without a tokenizer": (["predict", "{runs}/mute", "x.csv"], {"x.csv": "text\na\n"}, ["no tokenizer"]),
    "predict without a head": (["predict", "{runs}/encoder", "x.csv"], {}, ["masked_lm", "fine-tune it"]),
    "predict with a language model": (["predict", "{runs}/decoder", "x.csv"], {}, ["heads: lm", "fine-tune it"]),
    "flags first": (
        ["predict", "--output", "o.csv", "{runs}/class", "good.csv"],
        {},
        ["requires a model and a file", "jaxlm predict MODEL FILE"],
    ),
    "a path for training": (
        ["predict", "{runs}/class", "good.csv", "--data.path", "x.csv"],
        {},
        ["--data.path", "applies to training", "after the model"],
    ),
    "a length for training": (
        ["predict", "{runs}/class", "good.csv", "--data.length", "8"],
        {},
        ["--data.length", "--length"],
    ),
    "predict a missing file": (
        ["predict", "{runs}/class", "god.csv"],
        {},
        ["'god.csv'", "perhaps you meant 'good.csv'"],
    ),
    "predict an empty file": (["predict", "{runs}/class", "x.csv"], {"x.csv": ""}, ["no row", "at least one"]),
    "predict a file with only a header": (["predict", "{runs}/class", "x.csv"], {"x.csv": "text,label\n"}, ["no row"]),
    "predict no row into a file": (
        ["predict", "{runs}/class", "x.csv", "--output", "o.csv"],
        {"x.csv": "text,label\n"},
        ["no row"],
    ),
    "predict a file with other columns": (
        ["predict", "{runs}/class", "x.csv"],
        {"x.csv": "words,label\na,b\n"},
        ["x.csv:2", "no column 'text'", "'words', 'label'", "--task.text"],
    ),
    "predict text as tokens": (
        ["predict", "{runs}/tags", "x.txt"],
        {"x.txt": "the film\n"},
        ["x.txt:1", "'tokens'", "'text'", "--task.tokens"],
    ),
    "predict a file that is not UTF-8": (
        ["predict", "{runs}/class", "x.csv"],
        {"x.csv": b"text\nna\xefve\n"},
        ["x.csv:2", "not UTF-8", "--data.encoding"],
    ),
    "predict a broken row": (
        ["predict", "{runs}/class", "x.csv", "--output", "o.csv"],
        {"x.csv": "text\n" + "the film\n" * 5000 + '"a,b\n'},
        ["x.csv:5002", "unexpected end"],
    ),
    "output in another format": (
        ["predict", "{runs}/class", "good.csv", "--output", "o.txt"],
        {},
        ["'o.txt'", ".csv or .jsonl"],
    ),
    "output in a missing folder": (
        ["predict", "{runs}/class", "good.csv", "--output", "gone/o.csv"],
        {},
        ["gone/o.csv cannot be written", "No such file", "--output"],
    ),
    "output to an existing file": (
        ["predict", "{runs}/class", "good.csv", "--output", "x.csv"],
        {"x.csv": "precious\n"},
        ["'x.csv', which exists", "choose another --output"],
    ),
    "output to the input": (
        ["predict", "{runs}/class", "good.csv", "--output", "good.csv"],
        {},
        ["'good.csv', which exists"],
    ),
    "rows with other columns in csv": (
        ["predict", "{runs}/class", "x.jsonl", "--output", "o.csv"],
        {"x.jsonl": lines({"text": "a"}, {"text": "b", "id": 1})},
        ["row 2", "text, id", "--output FILE.jsonl"],
    ),
    "a length beyond the model": (
        ["predict", "{runs}/class", "good.csv", "--length", "65"],
        {},
        ["length is 65", "64 positions", "lower it"],
    ),
    "a negative length": (
        ["predict", "{runs}/class", "good.csv", "--length", "-1"],
        {},
        ["length is -1", "at least 2"],
    ),
    "a negative batch": (["predict", "{runs}/class", "good.csv", "--batch", "-1"], {}, ["batch is -1", "at least 1"]),
    "classes as a number": (
        ["predict", "{runs}/class", "good.csv", "--task.problem", "regression"],
        {},
        ["one output", "neg, pos", "trained for"],
    ),
    "a number as a class": (
        ["predict", "{runs}/number", "good.csv", "--task.problem", "single_label"],
        {},
        ["several outputs", "score", "trained for"],
    ),
    "a question as long as the row": (
        ["predict", "{runs}/answers", "x.csv"],
        {"x.csv": f"question,context\n{TEXT} {TEXT},{TEXT}\n"},
        ["leaves 0 tokens", "task.stride 4", "task.max_question_tokens"],
    ),
    "evaluate an empty file": (["evaluate", "{runs}/class", "x.csv"], {"x.csv": ""}, ["no row", "at least one"]),
    "evaluate without labels": (
        ["evaluate", "{runs}/class", "x.csv"],
        {"x.csv": "text\nthe film\n"},
        ["x.csv:2", "no column 'label'", "'text'", "--task.label"],
    ),
    "evaluate an empty label": (
        ["evaluate", "{runs}/class", "x.csv"],
        {"x.csv": table(["pos", ""])},
        ["x.csv:3", "no label"],
    ),
    "evaluate a new label": (
        ["evaluate", "{runs}/class", "x.csv"],
        {"x.csv": table(["pos", "pso"])},
        ["x.csv:3", "'pso'", "perhaps you meant 'pos'", "leave the row out"],
    ),
    "evaluate a new label among several": (
        ["evaluate", "{runs}/classes", "x.csv"],
        {"x.csv": table(["a", '"a,z"'])},
        ["x.csv:3", "'z'", "a, b"],
    ),
    "evaluate a new tag": (
        ["evaluate", "{runs}/tags", "x.conll"],
        {"x.conll": conll([("the", "B-LOC")])},
        ["x.conll:1", "'B-LOC'", "B-PER, I-PER, O"],
    ),
    "evaluate a wrong answer": (
        ["evaluate", "{runs}/answers", "x.json"],
        {"x.json": squad(question("film", 14))},
        ["x.json:1", "is not at character 14", "--task.wrong-offsets drop"],
    ),
    "evaluate when all rows are dropped": (
        ["evaluate", "{runs}/answers", "x.json", "--task.wrong-offsets", "drop"],
        {"x.json": squad(question("film", 14))},
        ["no row to score", "3 are dropped"],
    ),
    "evaluate a wrong option": (
        ["evaluate", "{runs}/choices", "x.jsonl"],
        {"x.jsonl": lines(CHOICE | {"label": 2})},
        ["x.jsonl:1", "holds 2", "2 options"],
    ),
}


@pytest.mark.parametrize("name", VERBS)
def test_a_mistake_in_predict_or_evaluate_is_one_error(cwd, runs, capsys, name):
    arguments, files, words = VERBS[name]
    for file, content in files.items():
        (cwd / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = {path: path.read_bytes() for path in cwd.iterdir()}
    assert main([word.format(runs=runs) for word in arguments]) == 2
    message = only_error(capsys.readouterr().err)
    assert all(word in message for word in words), message
    assert {path: path.read_bytes() for path in cwd.iterdir()} == before  # no file is changed, removed or added


# Predictions for unusual but valid files: the run, the file name, its content, and values of the rows of the output.
OUTPUTS: dict[str, tuple[str, str, str, list[dict[str, Any]]]] = {
    "no label": ("class", "x.csv", "text\nthe film\n", [{"text": "the film", "prediction": str}]),
    "a new label": ("class", "x.csv", table(["other", ""]), [{"label": "other"}, {"label": ""}]),
    "a label of another type": ("class", "x.jsonl", lines({"text": "a", "label": [1]}), [{"label": "[1]"}]),
    "no text": ("class", "x.csv", 'text,id\n,1\n"  ",2\n\u200b,3\n', [{"id": "1"}, {"id": "2"}, {"id": "3"}]),
    "a text longer than the row": ("class", "x.csv", f"text\n{' '.join([TEXT] * 99)}\n", [{"prediction": str}]),
    "quotes, commas and line ends": (
        *("class", "x.csv", 'text,n\n"a ""b"", c\nd",1\n'),
        [{"text": 'a "b", c\nd', "n": "1"}],
    ),
    "columns with the names of predictions": (
        *("class", "x.csv", "text,prediction,prediction_new\nthe film,a,b\n"),
        [{"prediction": "a", "prediction_new": "b", "prediction_new_new": str, "confidence": str}],
    ),
    "columns in another order": (
        *("class", "x.jsonl", lines({"text": "a", "id": 1}, {"id": 2, "text": "b"})),
        [{"text": "a", "id": "1"}, {"text": "b", "id": "2"}],
    ),
    "numbers are not rounded": (
        *("class", "x.jsonl", lines({"text": "a", "price": 1234567.891, "id": 2**60 + 1})),
        [{"price": "1234567.891", "id": str(2**60 + 1)}],
    ),
    "several classes": ("classes", "x.csv", "text\nthe film\n", [{"prediction": str}]),
    "a number": ("number", "x.csv", "text\nthe film\n", [{"prediction": str}]),
    "words without tags": (
        *("tags", "x.conll", "the\nfilm\n\n\u200b\n\n"),
        [{"tokens": '["the", "film"]', "prediction": str}, {"confidence": "1"}],
    ),
    "no words": ("tags", "x.jsonl", lines({"tokens": []}, {"tokens": ["a"]}), [{"prediction": ""}, {}]),
    "questions of a table": (
        *("answers", "x.csv", "question,context,id\nwhat,the film,1\n,the film,2\nwhat,,3\n"),
        [{"id": "1"}, {"id": "2"}, {"id": "3", "prediction": ""}],
    ),
    "answers at wrong positions": (
        *("answers", "x.json", squad(question("film", 14))),
        [{"title": "a"}, {"title": "b"}, {"title": "c"}],
    ),
    "options without a label": (
        *("choices", "x.jsonl", lines({k: v for k, v in CHOICE.items() if k != "label"})),
        [{"prediction": str, "option": str}],
    ),
    "a label that is not an option": ("choices", "x.jsonl", lines(CHOICE | {"label": -1}), [{"label": "-1"}]),
    "a score outside the range": ("pairs", "x.jsonl", lines(PAIR | {"label": 7}), [{"label": "7"}]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_predictions_are_written_to_the_standard_output_and_to_files(cwd, runs, capsys, name):
    """Each output has the columns of the input, then the predictions."""
    run, file, content, rows = OUTPUTS[name]
    (cwd / file).write_text(content)
    command = ["predict", str(runs / run), file]
    assert main(command) == main([*command, "--output", "o.csv"]) == main([*command, "--output", "o.jsonl"]) == 0
    printed = capsys.readouterr()
    assert printed.out == (cwd / "o.csv").read_text()
    # Each of the three commands reports the number of truncated texts, and nothing else.
    assert all(
        re.fullmatch(r"warning: .* longer than \d+ tokens and (was|were) cut .*", x) for x in printed.err.splitlines()
    )
    with open(cwd / "o.csv", newline="") as stream:
        csv_rows = list(csv.DictReader(stream))
    assert len(csv_rows) == len(rows)
    for row, expected in zip(csv_rows, rows):
        for column, value in expected.items():
            assert row[column] if value is str else row[column] == value
    json_rows = [json.loads(line) for line in (cwd / "o.jsonl").read_text().splitlines()]
    assert [list(row) for row in json_rows] == [list(json_rows[0])] * len(json_rows) or "order" in name
    for row, csv_row in zip(json_rows, csv_rows):
        assert set(row) == set(csv_row)
        if isinstance(row.get("confidence"), float):
            assert float(csv_row["confidence"]) == pytest.approx(row["confidence"], rel=1e-5)


def test_json_lines_may_differ_in_their_columns(cwd, runs):
    (cwd / "x.jsonl").write_text(lines({"text": "a"}, {"text": "b", "prediction": None, "more": [{"é": 1}]}))
    assert main(["predict", str(runs / "class"), "x.jsonl", "--output", "o.jsonl"]) == 0
    first, second = map(json.loads, (cwd / "o.jsonl").read_text().splitlines())
    assert list(first) == ["text", "prediction", "confidence"]
    assert list(second) == ["text", "prediction", "more", "prediction_new", "confidence"]
    assert second["more"] == [{"é": 1}] and "é" in (cwd / "o.jsonl").read_text()


def test_values_of_parquet_files_are_unchanged(cwd, runs):
    """The output has the same lists, texts, dates and large numbers as the input."""
    import datetime

    import pyarrow
    import pyarrow.parquet

    columns = {
        "text": [b"the film", b"na\xc3\xafve"],
        "vector": [[1.5, 2.25], [4.123456789]],
        "day": [datetime.datetime(2020, 1, 2)] * 2,
        "number": [2**60 + 1, None],
        "price": [1234567.891, 0.1],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), cwd / "x.parquet")
    assert main(["predict", str(runs / "class"), "x.parquet", "--output", "o.csv"]) == 0
    with open(cwd / "o.csv", newline="") as stream:
        first, second = csv.DictReader(stream)
    assert first["vector"] == "[1.5, 2.25]" and first["number"] == str(2**60 + 1) and second["number"] == ""
    assert second["text"] == "naïve" and first["price"] == "1234567.891" and first["day"] == "2020-01-02 00:00:00"

    words = {"tokens": [["the", "film"], ["a"]], "tags": [["B-PER", "O"], ["O"]]}
    pyarrow.parquet.write_table(pyarrow.table(words), cwd / "y.parquet")
    assert main(["evaluate", str(runs / "tags"), "y.parquet"]) == 0


def test_lines_are_read_as_in_training(cwd, runs, capsys):
    """An unknown suffix does not replace the pattern of training, which separates the label from the text."""
    (cwd / "new.test").write_bytes("NUM:date Wann ist M\xe4rz ?\nLOC:city Where ?\n".encode("latin-1"))
    assert main(["predict", str(runs / "lines"), "new.test"]) == 0
    first, second = csv.DictReader(capsys.readouterr().out.splitlines())
    assert first["text"] == "Wann ist März ?" and first["label"] == "NUM" and second["text"] == "Where ?"
    assert main(["evaluate", str(runs / "lines"), "new.test"]) == 0
    (cwd / "new.jsonl").write_text(lines({"text": "März"}))  # a known suffix replaces it
    assert main(["predict", str(runs / "lines"), "new.jsonl"]) == 0
    assert "März," in capsys.readouterr().out


def test_a_model_without_a_format_keeps_its_problem_type(tmp_path):
    """transformers and `task_of` read problem_type."""
    lm = model(heads_on_top=("classes",), labels=("a", "b"))
    origin = families.Origin({"problem_type": "multi_label_classification"}, heads=None)
    jaxlm.save(dataclasses.replace(lm, origin=origin), tmp_path / "export")
    assert task_of(jaxlm.load(tmp_path / "export")) == Classification(problem="multi_label")


def test_evaluation_reports_the_number_of_dropped_rows(cwd, runs, capsys):
    """In Python, rows that come from no file have the same loss."""
    content = squad(question("film", 13), question("film", 14))
    (cwd / "x.json").write_text(content)
    assert main(["evaluate", str(runs / "answers"), "x.json", "--task.wrong-offsets", "drop"]) == 0
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    printed = {name.strip(): float(value) for name, value in printed.items()}
    assert printed["examples"] == 3 and printed["dropped"] == 3

    lm = jaxlm.load(runs / "answers")
    rows = [{"question": "what is good", "context": TEXT, "answers": GOOD}] * 3
    scores = jaxlm.evaluate(lm, rows, QuestionAnswering(stride=4), length=LENGTH)
    assert "dropped" not in scores and scores["loss"] == pytest.approx(printed["loss"], abs=1e-4)


EXAMPLES: dict[str, tuple[str, Any, dict[str, Any], list[str]]] = {
    "one text": ("class", "a text", {}, ["one string", "'a text'", "a list"]),
    "one row": ("class", {"text": "a"}, {}, ["of type dict", "a list"]),
    "a number": ("class", [5], {}, ["5", "a text, a tuple of texts, or a dict"]),
    "None": ("class", ["a", None], {}, ["None"]),
    "a pair": ("class", [("a", "b")], {}, ["2 texts", "Classification(text=('a', 'b'))"]),
    "one text of a pair": ("pairs", ["a"], {"task": Similarity()}, ["1 texts", "text_a, text_b"]),
    "a question without its context": (
        "answers",
        ["a"],
        {"task": QuestionAnswering(stride=4)},
        ["1 texts", "question, context"],
    ),
    "another column": ("class", ["a", {"words": "b"}], {}, ["example:2", "'text'", "'words'"]),
    "a task with another head": ("class", ["a"], {"task": Tagging()}, ["requires the head tokens", "has classes"]),
    "a task without predictions": ("class", ["a"], {"task": CausalLM()}, ["CausalLM does not predict examples"]),
    "options with many outputs": ("class", [CHOICE], {"task": MultipleChoice()}, ["one output", "neg, pos"]),
    "too long": ("class", ["a"], {"length": 65}, ["65", "64 positions"]),
    "no rows in a batch": ("class", ["a"], {"batch": 0}, ["batch is 0", "at least 1 and at most 65,536"]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_mistake_in_an_example_is_an_error(runs, name):
    run, examples, arguments, words = EXAMPLES[name]
    with pytest.raises(UserError) as raised:
        jaxlm.predict(jaxlm.load(runs / run), examples, **arguments)
    assert all(word in str(raised.value) for word in words), raised.value


def test_examples_may_have_many_forms(runs):
    lm = jaxlm.load(runs / "class")
    assert jaxlm.predict(lm, []) == []
    forms = [["the film", ""], iter(["the film", ""]), [{"text": "the film", "label": "new"}, {"text": None}]]
    first, *others = [jaxlm.predict(lm, form, length=LENGTH) for form in forms]
    assert first == others[0] == others[1] and first[0]["prediction"] in ("neg", "pos")
    pair = jaxlm.predict(lm, [("the", "film")], task=Classification(text=("a", "b")), length=LENGTH)
    assert pair == jaxlm.predict(lm, [{"a": "the", "b": "film"}], task=Classification(text=("a", "b")), length=LENGTH)
    tags = jaxlm.load(runs / "tags")
    predictions = jaxlm.predict(
        tags, ["the film", ["the", "film"], {"tokens": np.array(["the", "film"])}], length=LENGTH
    )
    assert predictions[0] == predictions[1] == predictions[2] and len(predictions[0]["prediction"]) == 2


@pytest.mark.parametrize("rows", [1, 3])
def test_predictions_do_not_depend_on_the_batch_size(cwd, runs, capsys, rows):
    (cwd / "x.csv").write_text(table(LABELS))
    command = ["predict", str(runs / "class"), "x.csv"]
    assert main(command) == main([*command, "--batch", str(rows)]) == 0
    found = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    first, second = found[: len(LABELS)], found[len(LABELS) + 1 :]
    assert [row["prediction"] for row in first] == [row["prediction"] for row in second]
    for one, other in zip(first, second):
        assert float(one["confidence"]) == pytest.approx(float(other["confidence"]), abs=1e-5)


def predict_command(run: Path, file: Path, *more: str, after: str = "") -> list[str]:
    command = "import sys; from jaxlm.__main__ import main; code = main(sys.argv[1:])"
    return [sys.executable, "-c", f"{command}{after}; sys.exit(code)", "predict", str(run), str(file), *more]


def test_the_reader_of_the_output_may_stop(cwd, runs):
    """`jaxlm predict ... | head -1` ends as other commands do, and prints no message."""
    (cwd / "x.csv").write_text("text\n" + "the film\n" * 20_000)
    run = partial(subprocess.Popen, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with run(predict_command(runs / "class", cwd / "x.csv")) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "text,prediction,confidence\n"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_a_full_disk_leaves_no_output_file(cwd, runs):
    """RLIMIT_FSIZE simulates a full disk."""
    (cwd / "x.csv").write_text("text\n" + "the film\n" * 2_000)
    command = predict_command(runs / "class", cwd / "x.csv", "--output", "o.csv")
    command[2] = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); {command[2]}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)
    assert result.returncode == 1, result.stderr
    assert "o.csv cannot be written: File too large; free disk space" in only_error(result.stderr)
    assert not list(cwd.glob("o.csv*"))


@pytest.mark.long
def test_rows_are_predicted_as_a_stream(cwd, runs):
    """Three times as many rows require no more memory."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the test reads the peak of memory from /proc")
    peaks = []
    for count in (20_000, 60_000):
        file = cwd / f"{count}.csv"
        file.write_text("text,more\n" + f"{TEXT},{'-' * 12_000}\n" * count)
        after = (
            "; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"  # ru_maxrss includes the parent
        )
        command = predict_command(runs / "class", file, "--output", str(file.with_suffix(".jsonl")), after=after)
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout) / 1024)
        assert len(file.with_suffix(".jsonl").read_text().splitlines()) == count
    assert peaks[1] < peaks[0] + 150, peaks  # MiB; the further rows have 460, the allocator varies by 110

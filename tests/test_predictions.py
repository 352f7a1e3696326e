"""The fields of predictions, the warnings for truncated texts, and the inputs that Python users may give."""

from __future__ import annotations

import csv
import json
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
    QuestionAnswering,
    RunConfig,
    Seq2Seq,
    Similarity,
    Tagging,
    TokenizerConfig,
    UserError,
)
from jaxlm.__main__ import main
from jaxlm.config import Chat, Decoding, MaskedLM, check_task
from jaxlm.data.batches import Batches
from jaxlm.data.formats.lines import Place
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.errors import to_python_names
from jaxlm.lm import LM, with_task
from jaxlm.nn.transformer import Transformer
from jaxlm.run.trained_model import task_for
from jaxlm.tasks import TASKS, metrics
from jaxlm.tasks.cells import Records

TEXT = "the good bad film plot actor scene great awful boring fine story music was is very quite never always rather"
MODEL = ModelConfig(
    structure="encoder", heads_on_top=(), vocabulary=120, max_length=64, width=16, layers=1, heads=2, types=2
)
TOKENIZER = tokenizers.train([TEXT, "U.S. 's , . - a b c d"], TokenizerConfig(train="wordpiece"), 110)
LONG = len(TOKENIZER.encode_with_special_tokens([TEXT])[0][0])  # number of tokens of the text
NAMES = ("no", "so", "yes")
HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "class": (Classification(text=("review",)), {"heads_on_top": ("classes",), "labels": NAMES}),
    "classes": (Classification(problem="multi_label"), {"heads_on_top": ("classes",), "labels": NAMES}),
    "number": (Classification(problem="regression"), {"heads_on_top": ("classes",), "labels": ("score",)}),
    "tags": (Tagging(), {"heads_on_top": ("tokens",), "labels": ("O", "B-PER", "I-PER")}),
    "speech": (Tagging(), {"heads_on_top": ("tokens",), "labels": ("DET", "NOUN")}),
    "answers": (QuestionAnswering(stride=4, max_question_tokens=4), {"heads_on_top": ("span",)}),
    "choice": (MultipleChoice(first=1), {"heads_on_top": ("classes",), "labels": ("score",)}),
    "pairs": (Similarity(lowest=1, highest=5), {}),
}


def model(name: str, length: int = 16) -> LM:
    task, fields = HEADS[name]
    config = replace(MODEL, **fields)
    return with_task(LM(config, Transformer(config), random_params(config), TOKENIZER), task, length)


# The task of a model


def test_a_model_stores_its_task_its_columns_and_its_length(tmp_path):
    lm = model("class")
    jaxlm.save(lm, tmp_path / "export")
    jaxlm.save(jaxlm.load(tmp_path / "export"), tmp_path / "again")
    for found in (lm, jaxlm.load(tmp_path / "export"), jaxlm.load(tmp_path / "again")):
        assert found.trained == (HEADS["class"][0], 16)
        rows = [{"review": TEXT, "text": 7}]
        assert jaxlm.predict(found, rows) == jaxlm.predict(found, [TEXT]) == jaxlm.predict(found, rows, length=16)
    assert jaxlm.load(tmp_path / "export", head="tokens", log=lambda _: None).trained is None
    assert jaxlm.load(tmp_path / "export", head="classes").trained is not None
    (tmp_path / "export" / "jaxlm_task.json").unlink()
    assert jaxlm.load(tmp_path / "export").trained is None


def test_an_export_without_a_task_file_has_the_task_of_its_run(tmp_path):
    from jaxlm.run import folder

    run = RunConfig(None, Classification(text=("review",)), DataConfig(path="x", length=24), init="y")
    folder.begin(run, tmp_path, "")
    lm = replace(model("class"), files={})
    jaxlm.save(lm, tmp_path / "export")
    assert jaxlm.load(tmp_path).trained == (run.task, 24)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"task": 3, "length": 8}', '{"task": {"kind": "Tagging", "tags": 3}, "length": 8}',
     '{"task": {"kind": "Tagging", "gone": 3}, "length": 8}', '{"task": {"kind": "Tagging"}, "length": true}',
     "[" * 5000],
)  # fmt: skip
def test_a_broken_task_file_is_refused(content):
    lm = replace(model("tags"), files={"jaxlm_task.json": content.encode()})
    with pytest.raises(UserError, match=r"jaxlm_task\.json"):
        jaxlm.predict(lm, ["a"])


def test_the_message_names_a_task_that_is_not_registered():
    lm = replace(model("tags"), files={"jaxlm_task.json": b'{"task": {"kind": "Stars"}, "length": 8}'})
    with pytest.raises(UserError, match=r"trained for the task Stars.*register it"):
        jaxlm.predict(lm, ["a"])
    assert task_for(lm, Tagging()) == Tagging()


def test_errors_in_python_name_arguments_instead_of_flags():
    assert to_python_names("set --data.eval-path, a--b or --no-x y") == "set data.eval_path, a--b or no_x y"
    with pytest.raises(UserError) as error:
        jaxlm.predict(model("class"), [{"words": "a"}])
    assert "choose with task.text" in str(error.value) and "--" not in str(error.value)


# Predictions


@pytest.mark.parametrize("name", ["class", "classes", "choice"])
def test_every_class_has_a_probability(name):
    lm, task = model(name), HEADS[name][0]
    rows = [{"question": "the", "options": ["good", "bad", "film"]}] if name == "choice" else ["the film", "bad", ""]
    plain = jaxlm.predict(lm, rows)
    predictions = jaxlm.predict(lm, rows, probabilities=True, top_k=2)
    for row, before in zip(predictions, plain):
        p = row["probabilities"]
        assert {key: row[key] for key in before} == before
        assert list(p) == ([1, 2, 3] if name == "choice" else list(NAMES))
        ranked = sorted(p, key=lambda label: -p[label])
        assert row["top"] == [{"label": label, "probability": p[label]} for label in ranked[:2]]
        if name == "classes":
            assert row["prediction"] == [label for label in NAMES if p[label] > 0.5]
        else:
            assert row["prediction"] == ranked[0] and row["confidence"] == pytest.approx(p[ranked[0]])
            assert sum(p.values()) == pytest.approx(1)
    if name == "class":
        ids = np.array([TOKENIZER.encode_with_special_tokens(["the film"])[0][0]])
        expected = jax.nn.softmax(lm(ids).logits[0])
        np.testing.assert_allclose(list(predictions[0]["probabilities"].values()), expected, rtol=1e-4)
    assert task is HEADS[name][0]


@pytest.mark.parametrize("name", ["number", "tags", "answers", "pairs"])
def test_tasks_without_classes_have_no_probabilities(name):
    for option in ({"probabilities": True}, {"top_k": 1}):
        with pytest.raises(UserError, match="no probabilities of classes"):
            jaxlm.predict(model(name), [], **option)


def test_similarity_is_in_the_units_of_the_labels():
    [prediction] = jaxlm.predict(model("pairs"), [("the film", "bad")])
    [cosine] = jaxlm.predict(model("pairs"), [("the film", "bad")], task=Similarity())
    assert prediction["prediction"] == pytest.approx(1 + 4 * cosine["prediction"], abs=1e-5)
    rows = [{"text_a": "the film", "text_b": b, "label": label} for b, label in (("bad", 1), ("film", 5), ("is", 2))]
    scores = jaxlm.evaluate(model("pairs"), rows)
    other = jaxlm.evaluate(model("pairs"), [row | {"label": (row["label"] - 1) / 4} for row in rows], Similarity())
    assert scores == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(
    "label", ["9" * 60, 10**60, 10**400, 10**5000, "x", [1], float("nan")], ids=lambda label: type(label).__name__
)
def test_a_label_that_is_not_a_score_is_a_user_error(label):
    with pytest.raises(UserError, match="column 'label' holds"):
        jaxlm.evaluate(model("pairs"), [{"text_a": "a", "text_b": "b", "label": label}])


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("class", {"review": "a", "label": 10**5000}),
        ("class", {"review": 10**5000, "label": "no"}),
        ("number", {"text": "a", "label": 10**5000}),
        ("number", {"text": "a", "label": 10**60}),
        ("tags", {"tokens": ["a"], "tags": [10**5000]}),
        ("tags", {"tokens": ["a"], "tags": [""]}),
        ("choice", {"question": "a", "options": ["b", "c"], "label": 10**5000}),
        ("choice", {"question": "a", "options": 10**5000, "label": 1}),
        ("answers", {"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": [10**5000]}}),
        ("answers", {"question": "a", "context": "b", "answers": {"text": [10**5000], "answer_start": [0]}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "row",
)
def test_numbers_of_many_digits_are_a_user_error(name, row):
    with pytest.raises(UserError, match="example:1: "):
        jaxlm.evaluate(model(name), [row])


@pytest.mark.parametrize("title", [7, ["a"], {"a": 1}])
def test_a_title_that_is_not_a_string_is_a_user_error(title):
    row = {"context": "the film", "question": "what", "title": title}
    with pytest.raises(UserError, match="column 'title' holds"):
        jaxlm.predict(model("answers"), [row])


def test_text_is_split_into_words():
    text = "Bob's U.S. trip (2,000 km) - well-known: @ann #x https://a.b/c?d don't."
    [prediction] = jaxlm.predict(model("tags", 48), [text])
    assert prediction["words"] == [
        "Bob", "'s", "U.S.", "trip", "(", "2,000", "km", ")", "-", "well-known", ":", "@ann", "#x", "https://a.b/c?d",
        "don", "'t", ".",
    ]  # fmt: skip
    assert len(prediction["prediction"]) == len(prediction["words"])


def test_a_string_with_a_list_of_words_is_read_as_a_list():
    predictions = jaxlm.predict(model("tags"), [{"tokens": "['the', 'U.S. film']"}, {"tokens": '["a", "b"]'}])
    assert [row["words"] for row in predictions] == [["the", "U.S. film"], ["a", "b"]]
    [prediction] = jaxlm.predict(model("tags"), ["[he laughs] the film [and ends]"])
    assert prediction["words"][:3] == ["[", "he", "laughs"]


@pytest.mark.parametrize("tokens", ["the film, was (very) good", ["the", "film", "was", "very", "good"]])
def test_entities_have_character_positions_and_scores(tokens):
    task = TASKS[Tagging](Tagging(), 16, 0, TOKENIZER, HEADS["tags"][1]["labels"])
    record = task.read(Tagging(), {"tokens": tokens}, Place("rows", 1))
    text = tokens if isinstance(tokens, str) else " ".join(tokens)
    assert [text[s : s + len(w)] for w, s in zip(record["tokens"], record.get("starts", ()))] == [
        *(record["tokens"] if isinstance(tokens, str) else ())
    ]
    n = len(record["tokens"])
    tags = np.array([1, 2, *[0] * (n - 3), 1])
    confidence = np.linspace(0.5, 0.9, n)
    prediction = task.predict(record, [[{"words_BT": np.arange(n), "tags_BT": tags, "confidence_BT": confidence}]])
    assert prediction["words"] == record["tokens"] and prediction["confidence"] == pytest.approx(0.5)
    last = len(text) - 4 if isinstance(tokens, str) is False else text.index("good")
    assert prediction["entities"] == [
        {"type": "PER", "text": "the film", "start": 0, "end": 8, "score": pytest.approx(confidence[:2].mean())},
        {"type": "PER", "text": "good", "start": last, "end": last + 4, "score": pytest.approx(0.9)},
    ]


def test_tags_without_spans_have_no_entities():
    [prediction] = jaxlm.predict(model("speech"), [["the", "film"]])
    assert set(prediction) == {"prediction", "confidence", "words"} and set(prediction["prediction"]) <= {"DET", "NOUN"}
    rows = [{"tokens": ["the", "film"], "tags": ["det", "noun"]}]
    right = np.mean([a == b for a, b in zip(prediction["prediction"], ("DET", "NOUN"))])
    assert jaxlm.evaluate(model("speech"), rows)["accuracy"] == right


def test_answers_have_character_positions():
    rows = [{"context": TEXT, "question": "what film"}, {"context": "", "question": "the"}]
    for task in (None, QuestionAnswering(stride=4, unanswerable=False)):
        for row, prediction in zip(rows, jaxlm.predict(model("answers"), rows, task=task)):
            if prediction["prediction"]:
                assert row["context"][prediction["start"] : prediction["end"]] == prediction["prediction"]
            else:
                assert prediction["start"] is None and prediction["end"] is None


def test_csv_has_a_column_for_each_value(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.verbs.machine.configure_process", lambda: None)
    (tmp_path / "x.jsonl").write_text('{"text": "the film", "tokens": "the film, bad", "review": "a"}\n')
    table = {}
    for name, flags in (("class", ["--probabilities", "--top-k", "2"]), ("classes", []), ("tags", [])):
        jaxlm.save(model(name), tmp_path / name)
        out = tmp_path / f"{name}.csv"
        assert main(["predict", str(tmp_path / name), str(tmp_path / "x.jsonl"), "--output", str(out), *flags]) == 0
        [table[name]] = csv.DictReader(out.read_text().splitlines())
    input_columns = ["text", "tokens", "review", "prediction", "confidence"]
    assert list(table["class"]) == [
        *input_columns, "probability_no", "probability_so", "probability_yes", "top_1", "top_1_probability", "top_2",
        "top_2_probability",
    ]  # fmt: skip
    predictions = jaxlm.predict(model("classes"), ["the film"])[0]["prediction"]
    assert table["classes"]["prediction"] == ",".join(predictions)
    assert table["tags"]["words"] == "the film , bad" and len(table["tags"]["prediction"].split(" ")) == 4
    json.loads(table["tags"]["entities"])
    assert main(["evaluate", str(tmp_path / "class"), str(tmp_path / "x.jsonl"), "--probabilities"]) == 2


# Truncation


def warning_text(name: str, rows: list[Any], capsys) -> str:
    capsys.readouterr()
    jaxlm.predict(model(name), rows)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "long", "short", "words"),
    [
        (
            "class",
            TEXT,
            "the film",
            ["1 of 3 texts is longer than 16 tokens", f"has {LONG}", "raise length", "task.windows"],
        ),
        ("pairs", (TEXT, "a"), ("a", "b"), ["1 of 3 pairs is longer than 8 tokens", f"has {LONG}"]),
        (
            "answers",
            {"context": TEXT, "question": "the good bad film plot"},
            {"context": TEXT, "question": "the"},
            ["1 of 3 questions is longer than 4 tokens", "has 5", "task.max_question_tokens"],
        ),
        (
            "choice",
            {"question": TEXT, "options": ["a", "b"]},
            {"question": "the", "options": ["a", "b"]},
            ["1 of 3 questions is longer than 8 tokens", f"has {LONG + 2}"],
        ),
        ("tags", TEXT, "the film", []),  # long lists of words are split, not truncated
    ],
)
def test_truncated_texts_are_counted(name, long, short, words, capsys):
    printed = warning_text(name, [short, long, short], capsys)
    assert all(word in printed for word in words) and printed.count("\n") == bool(words), printed
    assert warning_text(name, [short], capsys) == ""


def test_training_counts_truncated_sources_and_targets():
    tokenizer = tokenizers.train([TEXT], TokenizerConfig(train="bpe"), 300, add_eos=True)
    task = TASKS[Seq2Seq](Seq2Seq(), 8, 0, tokenizer).replace_fields(source_length=12, start=0)
    texts = ["the", TEXT, "the film"]
    records = [{"source": source, "label": (target,)} for source in texts for target in texts]
    examples = task.examples(Records(records, []), True)
    lengths = [len(ids) for ids, _ in tokenizer.encode_with_special_tokens(texts)]
    assert examples.truncation("S") == (3, 9, 12, lengths[1]) and examples.truncation("T") == (3, 9, 8, lengths[1])
    lines = task.truncation_warnings(Batches(examples, 2, 8, 4, 0, 12))
    assert [line.split(";")[0].split(" (")[0] for line in lines] == [
        "3 of 9 targets are longer than 8 tokens and were cut",
        "3 of 9 sources are longer than 12 tokens and were cut",
    ]
    assert sorted(set(examples.true_lengths.tolist())) == sorted(set(lengths))
    task = task.replace_fields(source_length=None)  # a decoder truncates the beginning of its prompt
    assert task.examples(Records(records, []), True).truncation("T").cut >= 5


def test_lengths_of_the_report_are_those_before_truncation():
    task = TASKS[Classification](Classification(), 16, 0, TOKENIZER, NAMES)
    records = [{"texts": (text,), "label": "no"} for text in ("the", TEXT, "the film")]
    batches = Batches(task.examples(Records(records, []), True), 2, 16, 4, 0)
    assert batches.lengths.tolist() == [3, 16, 4] and batches.true_lengths.tolist() == [3, LONG, 4]


# Windows


@pytest.mark.parametrize("windows", ["mean", "max"])
def test_long_texts_are_read_in_windows(windows):
    lm, task = model("class"), Classification(text=("review",), windows=windows, stride=4)
    [prediction] = jaxlm.predict(lm, [TEXT], task=task, probabilities=True)
    ids = TOKENIZER.encode(TEXT)
    window = 14
    starts = [start for start in range(0, len(ids), window - 4) if start == 0 or start + 4 < len(ids)]
    logits = [lm(np.array([TOKENIZER.add_special_tokens(ids[s : s + window])[0]])).logits[0] for s in starts]
    pooled = getattr(np, windows)(logits, axis=0)
    np.testing.assert_allclose(list(prediction["probabilities"].values()), jax.nn.softmax(pooled), rtol=1e-4)
    short = jaxlm.predict(lm, ["the film"], task=task)
    assert short[0]["confidence"] == pytest.approx(jaxlm.predict(lm, ["the film"])[0]["confidence"], abs=1e-5)
    default = replace(task, stride=0)  # the default is a quarter of the 14 tokens of a window
    assert jaxlm.predict(lm, [TEXT], task=default) == jaxlm.predict(lm, [TEXT], task=replace(task, stride=3))
    built_task = TASKS[Classification](task, 16, 0, TOKENIZER, NAMES)
    records = [{"texts": (text,), "label": "so"} for text in (TEXT, "the film")]
    examples = built_task.examples(Records(records, []), True)
    assert examples.record_of.tolist() == [0] * len(starts) + [1]
    assert (examples.joined(np.arange(len(starts)), ["labels_BE"]).features["labels_BE"] == 1).all()
    assert not examples.truncation("T").cut


def test_impossible_windows_are_refused():
    with pytest.raises(UserError, match=r"overlap by task\.stride 14"):
        jaxlm.predict(model("class"), ["the"], task=Classification(text=("review",), windows="mean", stride=14))
    with pytest.raises(UserError, match="pairs of texts have no windows"):
        check_task(Classification(text=("a", "b"), windows="mean"))


# Fields that would be ignored


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (Classification(problem="regression", class_weights="balanced"), "task.class_weights is 'balanced'"),
        (Classification(problem="multi_label", label_smoothing=0.1), "task.label_smoothing is 0.1"),
        (Classification(problem="regression", label_smoothing=0.1), "task.label_smoothing is 0.1"),
        (Classification(problem="regression", names=("a",)), "task.names"),
        (Classification(separator="|"), "task.separator is '|'"),
        (Classification(stride=8), "task.stride is 8"),
        (Similarity(objective="contrastive", highest=5), "task.highest is 5"),
        (Similarity(temperature=0.1), "task.temperature is 0.1"),
        (MaskedLM(short_rate=0.5), "task.short_rate is 0.5"),
        (Chat(answer="a"), "task.answer is 'a'"),
        (Seq2Seq(decoding=Decoding(temperature=1.0, n_best=2)), "task.decoding.n_best is 2"),
    ],
)
def test_fields_without_an_effect_are_refused(task, words):
    with pytest.raises(UserError) as error:
        check_task(task)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "task",
    [
        Classification(problem="multi_label", class_weights="balanced", separator="|"),
        Classification(class_weights="balanced", label_smoothing=0.1, names=("a", "b")),
        Similarity(objective="contrastive", temperature=0.1),
        MaskedLM(next_sentence=True, short_rate=0.5),
    ],
)
def test_fields_with_an_effect_are_accepted(task):
    check_task(task)


# Scores of classes


def test_scores_of_classes_equal_those_of_scikit_learn(capsys):
    from sklearn.metrics import precision_recall_fscore_support

    random = np.random.default_rng(0)
    true, found = random.integers(3, size=(2, 50))
    by_class = metrics.per_class_scores(
        true[:, None] == np.arange(4), found[:, None] == np.arange(4), ("a", "b", "c", "d")
    )
    theirs = precision_recall_fscore_support(true, found, labels=range(4), zero_division=0)
    for n, scores in enumerate(by_class.values()):
        assert [scores[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(
            [values[n] for values in theirs]
        )
    rows = [{"review": text, "label": label} for text, label in zip(TEXT.split(), [*NAMES] * 9)]
    scores = jaxlm.evaluate(model("class"), rows)
    assert {f"{key}/{name}" for key in ("precision", "recall", "f1") for name in NAMES} <= set(scores)
    assert np.mean([scores[f"f1/{name}"] for name in NAMES]) == pytest.approx(scores["macro_f1"])


def test_predictions_of_a_single_class_cause_a_warning(capsys):
    lm = model("class")
    lm.params["classes_head"]["out"]["bias"] = np.array([0, 99, 0], np.float32)
    rows = [{"review": text, "label": label} for text, label in zip(TEXT.split(), NAMES)]
    jaxlm.evaluate(lm, rows)
    assert "warning: all 3 predictions are the class 'so'" in capsys.readouterr().err
    jaxlm.evaluate(lm, [row | {"label": "so"} for row in rows])
    assert "warning" not in capsys.readouterr().err


# Arguments of Python users


class Frame:
    """Imitates a DataFrame of pandas. An iteration over it returns the names of columns."""

    columns = ("review",)

    def __iter__(self):
        return iter(self.columns)

    def to_dict(self, orient):
        assert orient == "records"
        return [{"review": "the film"}, {"review": "bad"}]


def test_examples_may_have_the_usual_python_types():
    lm = model("class")
    expected = jaxlm.predict(lm, ["the film", "bad"])
    forms = (
        ("the film", "bad"),
        (text for text in ("the film", "bad")),
        np.array(["the film", "bad"]),
        np.array(["the film", "bad"], object),
        [{"review": np.str_("the film")}, {"review": "bad"}],
        [("the film",), ["bad"]],
        Frame(),
    )
    for form in forms:
        predictions = jaxlm.predict(lm, form, length=np.int64(16), batch=np.int32(4))
        assert [row["prediction"] for row in predictions] == [row["prediction"] for row in expected]
    rows = [{"review": "the film", "label": np.str_("no")}, {"review": "bad", "label": "so"}]
    assert jaxlm.evaluate(lm, iter(rows)) == jaxlm.evaluate(lm, tuple(rows))
    words = jaxlm.predict(model("tags"), [np.array(["the", "film"])])
    assert words == jaxlm.predict(model("tags"), [("the", "film")]) == jaxlm.predict(model("tags"), [["the", "film"]])


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
@pytest.mark.parametrize(
    "examples",
    [
        None,
        3,
        "the film",
        b"x",
        Path("x.csv"),
        {"review": "a"},
        {"the film"},
        bytearray(b"x"),
        np.array("a"),
        [None],
        [3],
        [b"x"],
        [Path("x")],
    ],
)
def test_other_examples_are_a_user_error(verb, examples):
    with pytest.raises(UserError, match=r"give|choose"):
        getattr(jaxlm, verb)(model("class"), examples)


@pytest.mark.parametrize(
    "option",
    [{"length": 8.0}, {"length": True}, {"length": "8"}, {"batch": 1.5}, {"batch": False}, {"batch": 10**18},
     {"probabilities": "yes"},
     {"top_k": -1},
     {"top_k": "2"}, {"task": "Classification"}, {"task": Classification}, {"task": 3}],
)  # fmt: skip
def test_invalid_options_are_a_user_error(option):
    with pytest.raises(UserError, match=next(iter(option))):
        jaxlm.predict(model("class"), ["a"], **option)


@pytest.mark.parametrize("lm", ["runs/x", None, Path("runs/x"), {}])
def test_an_object_that_is_not_a_model_is_a_user_error(lm):
    for verb in (jaxlm.predict, jaxlm.evaluate):
        with pytest.raises(UserError, match=r"jaxlm\.load"):
            verb(lm, ["a"])

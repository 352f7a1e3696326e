"""Baselines: predictions equal those of scikit-learn's own pipelines, and n-grams predict what the model predicts."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.metrics import f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline

import jaxlm
from jaxlm import (
    CausalLM,
    Classification,
    DataConfig,
    MaskedLM,
    ModelConfig,
    MultipleChoice,
    MultiTask,
    QuestionAnswering,
    RunConfig,
    Similarity,
    Tagging,
)
from jaxlm.__main__ import main
from jaxlm.baselines import arpa, classifiers, comparison, language, ngrams
from jaxlm.baselines.classifiers import baselines_of, most_frequent
from jaxlm.baselines.result import Baseline
from jaxlm.config import BaselineConfig, Part
from jaxlm.data.batches import Batches
from jaxlm.data.corpus import Corpus, Prepared
from jaxlm.data.formats.lines import Place
from jaxlm.run import baseline as verb
from jaxlm.tasks import TASKS, metrics
from jaxlm.tasks.cells import Records
from jaxlm.tasks.pretraining import CausalLMTask

DATA = Path(__file__).parents[2] / "shared" / "data"
WORDS = {"good": ["fine", "great", "nice", "lovely"], "bad": ["dull", "weak", "poor", "sad"], "so": ["plain", "usual"]}
COMMON = ["the", "film", "is", "a", "story", "of", "two", "friends", ",", "and", "not", "much", "more", "."]
TFIDF = {"ngram_range": (1, 2), "token_pattern": r"\w+|[^\w\s]"}


def text_about(random, label, count=6):
    return " ".join([*random.choice(COMMON, count), *random.choice(WORDS[label], 2)])


def rows_of(seed, count, label=lambda random: str(random.choice(["good", "bad", "bad", "so"]))):
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        name = label(random)
        rows.append({"text": text_about(random, name), "other": text_about(random, "so"), "label": name})
    return rows


def bound(task, train, held_out, names=None):
    """Return the task of two lists of rows, and both as records."""
    kind = TASKS[type(task)]
    read = lambda rows: [kind.read(task, row, Place("rows", n)) for n, row in enumerate(rows, start=1)]
    parts = [Records(read(rows), [Place("rows", n + 1) for n in range(len(rows))]) for rows in (train, held_out)]
    names = names or kind.names(task, parts[0])
    return kind(task, 32, 0, None, tuple(names)), *kind.map_labels(task, parts, tuple(names))


def results(task, train, held_out, examples=100_000, **options):
    return list(baselines_of(*bound(task, train, held_out, **options), examples))


# Labels


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_single_labels_equal_scikit_learns_pipeline(weights):
    train, held_out = rows_of(0, 200), rows_of(1, 100)
    majority, logistic = results(Classification(class_weights=weights), train, held_out)
    assert (majority.name, logistic.name) == ("majority", "TF-IDF + logistic regression")
    texts, labels = ([row[name] for row in train] for name in ("text", "label"))
    held_texts, held_labels = ([row[name] for row in held_out] for name in ("text", "label"))
    balanced = "balanced" if weights == "balanced" else None
    model = make_pipeline(TfidfVectorizer(**TFIDF), LogisticRegression(C=10, max_iter=1000, class_weight=balanced)).fit(
        texts, labels
    )
    assert logistic.scores["accuracy"] == model.score(held_texts, held_labels) > 0.8
    macro = f1_score(held_labels, model.predict(held_texts), average="macro")
    assert logistic.scores["macro_f1"] == pytest.approx(macro)
    dummy = DummyClassifier(strategy="most_frequent").fit(texts, labels)
    assert majority.scores["accuracy"] == dummy.score(held_texts, held_labels)
    assert majority.scores["matthews"] == 0


def test_the_texts_of_a_pair_have_their_own_features():
    train, held_out = rows_of(0, 200), rows_of(1, 100)
    swapped = [row | {"text": row["other"], "other": row["text"]} for row in held_out]
    task = Classification(text=("text", "other"))
    assert results(task, train, held_out)[1].scores["accuracy"] > 0.8
    assert results(task, train, swapped)[1].scores["accuracy"] < 0.6


def test_multiple_labels_equal_scikit_learns_pipeline():
    def row(random):
        labels = [name for name in WORDS if random.random() < 0.7 - 0.2 * (name == "so")]
        return {"text": " ".join(["it", *(text_about(random, name, 1) for name in labels)]), "label": labels}

    random = np.random.default_rng(0)
    train, held_out = ([row(random) for _ in range(count)] for count in (200, 80))
    task = Classification(problem="multi_label")
    majority, logistic = results(task, train, held_out)
    names = bound(task, train, held_out)[0].labels
    indicators = [np.array([np.isin(names, r["label"]) for r in rows], int) for rows in (train, held_out)]
    model = make_pipeline(TfidfVectorizer(**TFIDF), OneVsRestClassifier(LogisticRegression(C=10, max_iter=1000))).fit(
        [r["text"] for r in train], indicators[0]
    )
    predicted = model.predict([r["text"] for r in held_out])
    assert logistic.scores == metrics.multi_label_scores(indicators[1], predicted)
    applies = np.tile(indicators[0].mean(0) > 0.5, (len(held_out), 1)).astype(int)
    assert majority.scores == metrics.multi_label_scores(indicators[1], applies)


@pytest.mark.parametrize("always", [True, False])
def test_a_label_that_never_varies_is_no_problem(always):
    train = [row | {"label": [row["label"], *(["extra"] * always)]} for row in rows_of(0, 50)]
    names = ("bad", "extra", "good", "so")
    logistic = results(Classification(problem="multi_label"), train, train, names=names)[1]
    assert logistic.scores["accuracy"] > 0.9


def test_numbers_equal_those_of_scikit_learn():
    train = [row | {"label": float(len(row["label"])) + n % 3} for n, row in enumerate(rows_of(0, 100))]
    held_out = [row | {"label": float(len(row["label"]))} for row in rows_of(1, 60)]
    mean, ridge = results(Classification(problem="regression"), train, held_out)
    model = make_pipeline(TfidfVectorizer(**TFIDF), Ridge()).fit(
        [r["text"] for r in train], [r["label"] for r in train]
    )
    labels = [r["label"] for r in held_out]
    expected = metrics.regression_scores(labels, model.predict([r["text"] for r in held_out]))
    assert ridge.scores == pytest.approx(expected, rel=1e-4)
    constant = DummyRegressor().fit([[0]] * 100, [r["label"] for r in train]).predict([[0]] * 60)
    assert mean.scores == pytest.approx(metrics.regression_scores(labels, constant))


def cosines(rows, fitted):
    first, second = (fitted.transform([row[side] for row in rows]).toarray() for side in ("text", "other"))
    return (first * second).sum(1)


def similar_rows(seed, count):
    rows = rows_of(seed, count)
    random = np.random.default_rng(seed)
    for row in rows:
        words = row["text"].split()
        kept = int(random.integers(1, len(words)))
        row |= {"other": " ".join([*words[:kept], "unlike"]), "label": 5 * kept / len(words)}
    return rows


def test_scores_of_pairs_follow_the_cosine():
    train, held_out = similar_rows(0, 80), similar_rows(1, 50)
    fitted = TfidfVectorizer(token_pattern=TFIDF["token_pattern"]).fit(
        [row[side] for row in train for side in ("text", "other")]
    )
    labels = np.array([row["label"] for row in held_out])
    [similarity] = results(Similarity(text=("text", "other"), highest=5), train, held_out)
    expected = metrics.regression_scores(labels / 5, cosines(held_out, fitted))
    assert similarity.name == "TF-IDF cosine" and similarity.scores == pytest.approx(expected)
    regression = results(Classification(problem="regression", text=("text", "other")), train, held_out)[1]
    line = LinearRegression().fit(cosines(train, fitted)[:, None], [row["label"] for row in train])
    predicted = line.predict(cosines(held_out, fitted)[:, None])
    assert regression.scores == pytest.approx(metrics.regression_scores(labels, predicted))


def test_retrieval_ranks_all_second_texts():
    rows = [{"text": f"question {n} about w{n}", "other": f"answer on w{n} is {n % 7}"} for n in range(40)]
    rows += [{"text": "nothing in common", "other": "zebra"}, {"text": "x w1", "other": "answer on w1 is 1"}]
    [baseline] = results(Similarity(objective="contrastive", text=("text", "other")), rows, rows)
    assert baseline.scores["recall@1"] == pytest.approx(41 / 42)
    assert baseline.scores["recall@10"] == pytest.approx(41 / 42)  # a tie of all documents is the last rank


def test_tags_are_the_most_frequent_ones_of_each_word():
    train = [{"tokens": ["a", "run", "of", "runs"], "tags": ["D", "N", "P", "N"]}]
    train += [{"tokens": ["they", "run", "a", "run"], "tags": ["P", "V", "D", "N"]}]
    held_out = [{"tokens": ["a", "new", "run", "of"], "tags": ["D", "A", "V", "P"]}]
    majority, by_word = results(Tagging(scheme="none"), train, held_out, names=("A", "D", "N", "P", "V"))
    assert majority.scores["accuracy"] == 0  # N everywhere
    assert by_word.scores["accuracy"] == 0.5  # D N N P
    assert by_word.name == "most frequent tag of each word"


def test_spans_are_scored_as_those_of_a_model():
    row = {"tokens": ["Anna", "met", "Bo", "in", "Rome"], "tags": ["B-PER", "O", "B-PER", "O", "B-LOC"]}
    majority, by_word = results(Tagging(), [row], [row])
    assert majority.scores == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 0.4}
    assert by_word.scores["f1"] == by_word.scores["accuracy"] == 1


def test_choices_and_answers_have_trivial_baselines():
    choice = lambda label, count: {"question": "q", "options": [*"abcd"[:count]], "label": label}
    train = [choice(3, 4), choice(3, 4), choice(1, 4), choice(1, 2), choice(3, 4)]
    [place] = results(MultipleChoice(), train, [choice(3, 4), choice(1, 2), choice(0, 3)])
    assert place.scores == {"accuracy": pytest.approx(2 / 3)}  # without a fourth option, the second is chosen
    answer = lambda text: {"context": "in Rome", "question": "where", "title": "", "answers": text}
    known, unknown = answer({"text": ["Rome"], "answer_start": [3]}), answer({"text": [], "answer_start": []})
    [silent] = results(QuestionAnswering(), [known, unknown], [known, unknown, unknown])
    assert silent.name == "no answer" and silent.scores["exact"] == pytest.approx(2 / 3)
    assert not results(QuestionAnswering(unanswerable=False), [known], [known])


def test_a_tie_is_decided_by_the_order_of_the_names():
    assert most_frequent(["b", "a", "c", "c", "b"], ("a", "c", "b")) == "c"
    assert most_frequent(["b", "a"]) == "b"


@pytest.mark.parametrize(
    ("train", "options", "note"),
    [
        ([{"text": "a b", "label": "x"}] * 3, {"names": ("x", "y")}, "all 3 training examples have the label 'x'"),
        ([{"text": " ", "label": "x"}, {"text": "", "label": "y"}], {}, "the training texts contain no words"),
    ],
)
def test_a_baseline_without_a_result_gives_the_reason(train, options, note):
    majority, logistic = results(Classification(), train, [{"text": "a", "label": "x"}], **options)
    assert majority.scores["accuracy"] == 1
    assert logistic.scores == {} and note in logistic.note
    table = comparison.comparison_table({"accuracy": 0.5}, [majority, logistic], [])
    assert table.rows[2][1] == "–" and note in table.note


def test_the_number_of_training_examples_is_limited(monkeypatch):
    train = rows_of(0, 200) + [{"text": "good fine great", "other": "", "label": "bad"}] * 200
    held_out = rows_of(1, 50)
    few, all_rows = (results(Classification(), train, held_out, examples=n)[1] for n in (20, 1000))
    assert few.scores != all_rows.scores
    assert few.note == "TF-IDF uses 20 of 400 training examples." and all_rows.note == ""
    monkeypatch.setattr(classifiers, "MAX_LOGITS", 100)  # of three classes
    assert "uses 33 of 400" in results(Classification(), train, held_out)[1].note
    assert [baseline.name for baseline in results(Classification(), train, held_out, examples=0)] == ["majority"]


def test_several_tasks_have_the_baselines_of_each(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(seed, 60)))
    parts = {
        name: Part(Classification(), DataConfig(path=str(tmp_path / f"{name}.jsonl"), length=32)) for name in ("a", "b")
    }
    run = RunConfig(model=None, task=MultiTask(parts=parts), data=DataConfig(length=32))
    task, data = verb._read(run, print)
    found = comparison.run_baselines(task, data, BaselineConfig())
    assert [baseline.name for baseline in found][::2] == ["a: majority", "b: majority"]
    assert comparison.compared_scores(task, "mean") == ["a/accuracy", "b/accuracy"]
    assert {"a/accuracy"} <= found[0].scores.keys() and "b/accuracy" in found[3].scores


# Language models


def corpus(texts):
    """Return a corpus of lists of tokens, each a document of one sentence."""
    bounds = np.cumsum([0, *map(len, texts)])
    tokens = np.concatenate([*map(np.asarray, texts), np.zeros(0)]).astype(np.uint16)
    return Corpus(tokens, bounds, np.arange(len(texts) + 1), 3 * len(tokens), 3 * np.diff(bounds))


def tokenizer(bos, eos):
    return SimpleNamespace(bos=bos, eos=eos, size=20)


def random_texts(seed, count=60, first=(), last=()):
    random = np.random.default_rng(seed)
    return [[*first, *random.choice(np.arange(3, 18), random.integers(1, 30)), *last] for _ in range(count)]


FRAMES = {
    "none": (tokenizer(None, None), random_texts(0), random_texts(1, 7)),
    "both": (tokenizer(1, 2), random_texts(0, 60, [1], [2]), random_texts(1, 7, [1], [2])),
    "one": (tokenizer(1, 1), random_texts(0, 60, [1]), random_texts(1, 7, [1])),  # as GPT-2's
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("frame", FRAMES)
def test_ngrams_predict_the_tokens_that_the_model_predicts(frame, stream):
    special, train, held_out = FRAMES[frame]
    task = CausalLMTask(CausalLM(stream=stream), 16, 0, special)
    data = Prepared(special, corpus(train), corpus(held_out), {}, "")
    batches = Batches(task.examples(data.held_out, False), 4, 16, task.max_examples, None)
    labels = np.zeros(20)
    for batch in (batches.batch_at(step) for step in range(len(batches))):
        np.add.at(labels, batch["labels_BT"][batch["weights_BT"] > 0], 1)
    options = BaselineConfig(order=1)
    model = language.fit_ngrams(task, data, options)
    baseline = language.ngram_baseline(task, data, options, model)
    nats = -model.log10_probs[0].astype(float) * np.log(10)  # of each token, in a model without contexts
    assert baseline.scores["loss"] == pytest.approx(labels @ nats / labels.sum())
    labels[task.frame] = 0
    bits = labels @ nats / np.log(2) / (3 * len(data.held_out.tokens))
    assert baseline.scores["bits_per_byte"] == pytest.approx(bits)
    assert np.exp(-nats).sum() == pytest.approx(1, rel=1e-5)  # over all ids of the tokenizer


def test_ngrams_count_at_most_the_given_tokens():
    special, train, held_out = FRAMES["both"]
    task = CausalLMTask(CausalLM(stream=False), 16, 0, special)
    data = Prepared(special, corpus(train), corpus(held_out), {}, "")
    options = BaselineConfig(order=3, tokens=100)
    model = language.fit_ngrams(task, data, options)
    whole = [text for text in train if sum(map(len, train[: train.index(text) + 1])) <= 100]
    rest = np.concatenate(train)[sum(map(len, whole)) : 100]
    first = language.fit_ngrams(task, data._replace(train=corpus([*whole, rest])), BaselineConfig(order=3))
    for a, b in zip(model.keys, first.keys):
        np.testing.assert_array_equal(a, b)
    note = language.ngram_baseline(task, data, options, model).note
    assert f"counts 100 of {len(data.train.tokens):,} training tokens" in note and "are fixed for the order" in note
    assert comparison.run_baselines(task, data, BaselineConfig(tokens=0)) == []


@pytest.mark.parametrize("is_text", [True, False])
def test_data_that_cannot_be_read_again_have_a_note(is_text):
    special, train, _ = FRAMES["both"]
    task = CausalLMTask(CausalLM(), 16, 0, special) if is_text else bound(Classification(), *[rows_of(0, 9)] * 2)[0]
    [baseline] = comparison.run_baselines(task, Prepared(special, iter(train), iter(train), {}, ""), BaselineConfig())
    assert baseline.scores == {} and "cannot be read a second time" in baseline.note
    table = comparison.comparison_table({"loss": 1.0}, [baseline], [])
    assert table.columns and baseline.note in table.note and not comparison.describe_best([baseline], ["loss"])


@pytest.mark.parametrize("frame", FRAMES)
def test_empty_documents_change_nothing(frame):
    special, train, held_out = FRAMES[frame]
    task = CausalLMTask(CausalLM(stream=False), 16, 0, special)
    scores = []
    for texts in (train, [[], *train[:5], [], [], *train[5:], []]):
        data = Prepared(special, corpus(texts), corpus([*held_out[:2], [], *held_out[2:]]), {}, "")
        [baseline] = comparison.run_baselines(task, data, BaselineConfig())
        scores.append(baseline.scores)
    assert scores[0] == scores[1]


# Comparison


@pytest.mark.parametrize(
    ("name", "ours", "better"),
    [
        ("accuracy", 0.9, False),
        ("accuracy", 0.8, True),
        ("accuracy", 0.7, True),
        ("bits_per_byte", 0.7, False),
        ("bits_per_byte", 0.8, True),
        ("mse", 0.9, True),
        ("a/macro_f1", 0.9, False),
    ],
)
def test_a_sentence_reports_a_model_that_is_not_better(name, ours, better):
    worse = {name: 2.0 if name in ("bits_per_byte", "mse") else 0.1}
    baselines = [Baseline("one", worse), Baseline("two", {name: 0.8}), Baseline("none", {})]
    sentences = comparison.find_better({name: ours}, baselines, [name, "absent"])
    assert len(sentences) == better
    assert all("two" in sentence and "80" in sentence for sentence in sentences)
    assert comparison.describe_best(baselines, [name]).startswith("two, ")


# The verb and the report


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Write a config of a task, its data and a held-out part, and return the path of the config."""

    def write(task, rows=(), text=""):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
        data = tmp_path / ("data.txt" if text else "data.jsonl")
        data.write_text(text or "".join(json.dumps(row) + "\n" for row in rows))
        heads = {CausalLM: ("lm",), MaskedLM: ("masked_lm",)}.get(type(task), ("classes",))
        model = ModelConfig(
            structure="decoder" if heads == ("lm",) else "encoder",
            heads_on_top=heads,
            vocabulary=300,
            max_length=32,
            width=16,
            layers=1,
            heads=2,
        )
        (tmp_path / "mine.py").write_text(
            f"from jaxlm import *\nfrom jaxlm.config import RotaryScaling\n\ndef config():\n"
            f"    return RunConfig(model={model!r}, task={task!r}, data=DataConfig(path={str(data)!r}, length=32), "
            f"tokenizer=TokenizerConfig(train='byte_bpe'), steps=2, batch=8)\n"
        )
        return tmp_path / "mine.py"

    return write


TEXT = "\n".join(" ".join(text_about(np.random.default_rng(n), "good", 9) for _ in range(2)) for n in range(120))


def test_the_verb_prints_and_stores_a_table(tmp_path, config, capsys):
    file = config(Classification(), rows_of(0, 100))
    assert main(["baseline", str(file), "--workdir", "out"]) == 0
    output = capsys.readouterr().out
    assert "| majority " in output and "accuracy" in output
    stored = json.loads((tmp_path / "out" / "baseline.json").read_text())
    assert [entry["name"] for entry in stored] == ["majority", "TF-IDF + logistic regression"]
    assert f"{100 * stored[1]['scores']['accuracy']:.2f} %" in output
    assert main(["baseline", str(file)]) == 0
    assert not (tmp_path / "runs").exists()


def test_the_verb_writes_the_ngram_model(tmp_path, config, capsys):
    file = config(CausalLM(), text=TEXT)
    assert main(["baseline", str(file), "--arpa", "m.arpa.gz", "--baseline.order=3"]) == 0
    assert "3-gram" in capsys.readouterr().out
    model, words = arpa.read(tmp_path / "m.arpa.gz")
    run = dataclasses.replace(jaxlm.config.python_files.read(file), baseline=BaselineConfig(order=3))
    task, data = verb._read(run, print)
    ids = {int(word): n for n, word in enumerate(words) if word.isdigit()}
    tokens = np.array([ids[token] for token in data.held_out.tokens.tolist()])
    log_probs = ngrams.log_probs(model, tokens, [0, len(tokens)])
    [baseline] = comparison.run_baselines(task, data, run.baseline)
    assert -log_probs[1:].mean() == pytest.approx(baseline.scores["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        (Classification(), ["--arpa", "m.arpa"], "--arpa writes the n-gram model of CausalLM, and the task is Class"),
        (CausalLM(), ["--arpa"], "--arpa has no value"),
        (CausalLM(), ["--arpa", "--steps", "3"], "--arpa has no value"),
        (CausalLM(), ["--arpa", "gs://x/m.arpa"], "choose a local path"),
        (CausalLM(), ["--arpa", "gone/m.arpa"], "gone/m.arpa cannot be written: No such file or directory"),
        (CausalLM(), ["--workdir", "gs://x/y"], "choose a local path"),
        (CausalLM(), ["--arpa", "m.arpa", "--baseline.tokens", "0"], "raise --baseline.tokens"),
        (CausalLM(), ["--baseline.tokens", "0"], "CausalLM has no baseline with these fields"),
        (CausalLM(), ["--baseline.order", "0"], "baseline.order is 0"),
        (CausalLM(), ["--baseline.order", "11"], "at most 10"),
        (MaskedLM(), [], "MaskedLM has no baseline with these fields; baselines exist for"),
        (Classification(label="gone"), [], "there is no column 'gone'"),
        (Classification(), ["--data.path", "gone.jsonl"], "gone.jsonl"),
    ],
)
def test_mistakes_have_one_clear_error(config, capsys, task, flags, message):
    file = config(task, rows_of(0, 20), TEXT if isinstance(task, (CausalLM, MaskedLM)) else "")
    assert main(["baseline", str(file), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("labels", [["x"] * 20, [None] * 20])
def test_data_without_several_labels_are_refused(config, capsys, labels):
    rows = [row | {"label": label} for row, label in zip(rows_of(0, 20), labels)]
    assert main(["baseline", str(config(Classification(), rows))]) == 2
    assert "label" in capsys.readouterr().err


def test_the_report_shows_the_baselines(tmp_path, config, capsys):
    run = jaxlm.config.python_files.read(config(Classification(), rows_of(0, 100)))
    jaxlm.fit(dataclasses.replace(run, workdir=str(tmp_path / "run")))
    page, summary = ((tmp_path / "run" / file).read_text() for file in ("report.html", "summary.txt"))
    sentence = "The model is not better than the baseline TF-IDF + logistic regression: accuracy"
    assert "Baselines" in page and "this run" in page and "majority" in page and sentence in page
    assert "baseline  TF-IDF + logistic regression, accuracy" in summary
    assert f"baseline  {sentence}" in capsys.readouterr().err


def test_the_summary_of_a_language_model_has_the_5_gram(tmp_path, config, capsys, no_plots):
    run = jaxlm.config.python_files.read(config(CausalLM(), text=TEXT))
    jaxlm.fit(dataclasses.replace(run, workdir=str(tmp_path / "run")))
    [stored] = json.loads((tmp_path / "run" / "baseline.json").read_text())
    bits = f"{stored['scores']['bits_per_byte']:.4f}"
    assert f"baseline  5-gram, bits per byte {bits}" in (tmp_path / "run" / "summary.txt").read_text()
    assert "The model is not better than the baseline 5-gram: bits per byte" in capsys.readouterr().err


def test_a_run_may_start_in_the_folder_of_its_baselines_and_change_their_limits(tmp_path, config, no_plots):
    file = config(Classification(), rows_of(0, 60))
    flags = ["--workdir", str(tmp_path / "run")]
    assert main(["baseline", str(file), *flags]) == 0
    assert main(["train", str(file), *flags]) == 0
    assert main(["train", str(file), *flags, "--baseline.examples", "0"]) == 0


# Real data


@pytest.mark.long
@pytest.mark.skipif(not (DATA / "trec").is_dir(), reason="needs ../shared/data/trec")
def test_trec_equals_scikit_learns_pipeline(tmp_path):
    (tmp_path / "train").write_bytes(gzip.decompress((DATA / "trec" / "TREC.train.gz").read_bytes()))
    run = jaxlm.config.python_files.read(Path("trec"))
    data = dataclasses.replace(run.data, path=str(tmp_path / "train"), eval_path=str(DATA / "trec" / "TREC.test"))
    task, found = verb._read(dataclasses.replace(run, data=data), print)
    majority, logistic = comparison.run_baselines(task, found, run.baseline)
    read = lambda file: [line.split(" ", 1) for line in file.read_text("iso-8859-1").splitlines()]
    train, held_out = read(tmp_path / "train"), read(DATA / "trec" / "TREC.test")
    split = lambda rows: ([text for _, text in rows], [label.split(":")[0] for label, _ in rows])
    model = make_pipeline(TfidfVectorizer(**TFIDF), LogisticRegression(C=10, max_iter=1000))
    assert logistic.scores["accuracy"] == model.fit(*split(train)).score(*split(held_out)) == 0.892
    assert majority.scores["accuracy"] == 0.188


def test_a_model_that_equals_the_best_baseline_is_as_good():
    baselines = [Baseline("majority", {"accuracy": 0.5}), Baseline("TF-IDF", {"accuracy": 1.0})]
    expected = ["The model is as good as the baseline TF-IDF: accuracy 100.00 %."]
    assert comparison.find_better({"accuracy": 1.0}, baselines, ["accuracy"]) == expected
    assert "is not better" in comparison.find_better({"accuracy": 0.9}, baselines, ["accuracy"])[0]

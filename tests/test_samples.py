"""Sample data is the same for the same seed, has the file formats of the tasks, and is as difficult as documented."""

from __future__ import annotations

import json

import pytest

import jaxlm
from jaxlm import samples
from jaxlm.errors import UserError


def test_the_same_seed_gives_the_same_files(tmp_path):
    for make in (samples.reviews, samples.articles):
        one, two, other = (make(tmp_path / f"{make.__name__}{n}", seed=n // 2).read_bytes() for n in range(3))
        assert one == two != other
    files = [sorted(samples.captions(tmp_path / name).iterdir()) for name in "ab"]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_reviews_have_both_classes_and_some_wrong_labels(tmp_path):
    rows = samples.rows(samples.reviews(tmp_path / "reviews.csv", count=1000))
    assert len(rows) == 1000 and {row["label"] for row in rows} == {"negative", "positive"}
    assert abs(sum(row["label"] == "positive" for row in rows) - 500) < 60
    mislabelled = [
        row for row in rows if row["text"].endswith("One of the best of the year.") and row["label"] == "negative"
    ]
    assert mislabelled  # these rows have the wrong label


GERMAN = {"A young woman has bought a red ball.": "Eine junge Frau hat einen roten Ball gekauft."}


def test_captions_are_parallel_correct_and_distinct(tmp_path):
    folder = samples.captions(tmp_path, train=4000, held_out=50)
    parts = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "val", "test")
    }
    assert [len(rows) for rows in parts.values()] == [4000, 50, 50]
    german_of = {row["en"]: row["de"] for rows in parts.values() for row in rows}
    assert len(german_of) == 4100
    for english, german in german_of.items():
        assert english.endswith(".") and german.endswith(".") and german[0].isupper() and "  " not in german
        assert ("has " in english) == (" hat " in german)  # the verb is second, also after a place
        if english.startswith(("In ", "On ", "At ")):
            place = german.split(" ein")[0].split()  # the place and the verb come before the subject
            assert place[-1] in {*samples._VERBS["does"].values(), *samples._VERBS["is"].values(), "hat"}


def test_more_captions_than_possible_raise_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(
        samples, "_caption", lambda draw: draw.choice([("A dog.", "Ein Hund."), ("A cat.", "Eine Katze.")])
    )
    with pytest.raises(UserError, match="3 captions are more than can be generated; request fewer"):
        samples.captions(tmp_path, train=1, held_out=1)


@pytest.mark.parametrize(
    ("noun", "case", "adjective", "expected"),
    [
        (samples._PEOPLE[0], 0, {"old": "alt"}, ("an old man", "ein alter Mann")),
        (samples._PEOPLE[1], 0, {"tired": "müde"}, ("a tired woman", "eine müde Frau")),
        (samples._PEOPLE[2], 0, {"small": "klein"}, ("a small child", "ein kleines Kind")),
        (samples._THINGS[0], 2, {"red": "rot"}, ("a red ball", "einen roten Ball")),
        (samples._THINGS[1], 2, {"new": "neu"}, ("a new book", "ein neues Buch")),
        (samples._THINGS[2], 2, {"blue": "blau"}, ("a blue bag", "eine blaue Tasche")),
    ],
)
def test_german_phrases_are_declined(noun, case, adjective, expected):
    class Always:
        random = staticmethod(lambda: 0.0)
        choice = staticmethod(lambda some: some[0])

    assert samples._phrase(Always, noun, adjective, case) == expected


def test_the_test_topics_are_about_other_things_than_the_training_topics(tmp_path):
    text = samples.articles(tmp_path / "articles.txt", documents=300).read_text()
    folder = samples.topics(tmp_path)
    parts = [samples.rows(folder / f"{name}.csv") for name in ("train", "test")]
    assert [len(rows) for rows in parts] == [144, 96]
    words = [{word for row in rows for word in row["text"].strip(".").split()} for rows in parts]
    things = {thing for kind in samples._TOPICS.values() for thing in kind}
    assert len(things) == 40 and not (words[0] & words[1] & things) and things <= words[0] | words[1]
    assert all(f"the {thing}" in text.lower() for thing in things)  # the articles contain all of them


def test_documentation_is_that_of_python(tmp_path):
    text = samples.documentation(tmp_path / "python.txt").read_text()
    assert len(text) > 400_000 and "comprehension" in text


def test_a_sample_bert_loads_and_is_not_overwritten(tmp_path):
    texts = [row["text"] for row in samples.rows(samples.reviews(tmp_path / "reviews.csv"))]
    folder = samples.bert(tmp_path / "bert", texts, vocabulary=200, layers=1, width=64, heads=1)
    before = (folder / "model.safetensors").read_bytes()
    assert samples.bert(folder, [], seed=1) == folder and (folder / "model.safetensors").read_bytes() == before
    lm = jaxlm.load(folder)
    assert lm.tokenizer.size == 200 and lm.config.width == 64 and lm.config.heads_on_top == ("masked_lm",)


def test_the_error_without_a_network_names_the_remedies(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for fetch in (samples.imdb, samples.multi30k, samples.wikitext):
        with pytest.raises(UserError, match=r"check the network.*your own file.*JAXLM_TINY=1"):
            fetch(tmp_path / "data")


def test_a_table_is_split_by_class(tmp_path):
    path = samples.reviews(tmp_path / "reviews.csv", count=200)
    train, test = (samples.rows(part) for part in samples.split(path, share=0.25))
    assert sorted(map(str, train + test)) == sorted(map(str, samples.rows(path)))
    count = lambda rows: sum(row["label"] == "positive" for row in rows)
    assert len(test) == 50 and abs(count(test) - count(train) / 3) <= 1

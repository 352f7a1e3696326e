"""The choice of held-out text, of tokenizer text and of evaluation text, and the filling of rows with text."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm import config
from jaxlm.data import holdout
from jaxlm.data.corpus import Corpus, sample_documents
from jaxlm.nn.losses import bits_per_byte
from jaxlm.tasks.pretraining import MaskedLMTask

DOCUMENTS = [f"document {n} about {'rain' if n < 500 else 'sun'}" for n in range(1000)]


def parts(documents, fraction=0.1, seed=0, sampled=True, divide=False):
    choice = holdout.choose(documents, fraction, seed, sampled=sampled, divide=divide)
    return list(choice.train(documents)), list(choice.held_out(documents))


def test_documents_of_all_kinds_are_held_out_if_they_are_sorted():
    train, held_out = parts(DOCUMENTS)
    assert Counter(train) + Counter(held_out) == Counter(DOCUMENTS)
    size = lambda texts: sum(map(len, texts))
    assert 0.09 < size(held_out) / size(DOCUMENTS) < 0.11
    rain = sum("rain" in text for text in held_out)
    assert 30 < rain < 70  # of about 100; the last tenth of the text has none
    assert parts(DOCUMENTS, seed=1)[1] != held_out


def test_the_held_out_part_depends_on_the_content_alone():
    held_out = parts(DOCUMENTS)[1]
    assert set(parts(DOCUMENTS[::-1])[1]) == set(held_out)


def test_equal_documents_are_in_the_same_part():
    train, held_out = parts(DOCUMENTS + DOCUMENTS)
    assert not set(train) & set(held_out)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_end_of_few_documents_is_held_out(count):
    train, held_out = parts(["x" * 100] * count, divide=True)
    assert "".join(train + held_out) == "x" * 100 * count
    assert len("".join(held_out)) == 10 * count


def test_the_smallest_of_few_whole_documents_is_held_out():
    assert parts(["x" * 100, "y" * 50, "z" * 60]) == (["x" * 100, "z" * 60], ["y" * 50])


def test_the_last_documents_are_held_out_if_the_order_matters():
    train, held_out = parts(DOCUMENTS, sampled=False)
    assert train + held_out == DOCUMENTS


def test_a_document_that_is_much_larger_than_the_part_is_not_held_out():
    documents = ["x" * 10_000, *DOCUMENTS[:200]]
    for seed in range(5):
        assert len(parts(documents, 0.05, seed)[1][0]) < 100


@pytest.mark.parametrize("documents", [DOCUMENTS, ["".join(DOCUMENTS)]], ids=["many", "one"])
def test_a_tokenizer_is_trained_on_a_sample_of_all_text(documents):
    whole = sum(map(len, documents))
    assert list(holdout.sample(lambda: iter(documents), whole)) == documents
    some = "".join(holdout.sample(lambda: iter(documents), 10_000))
    assert 7_000 < len(some) <= 10_000
    assert "rain" in some and "sun" in some


def corpus(*documents) -> Corpus:
    """Return a corpus of documents, each a list of sentence lengths. Ids count up from 10. Each token has two bytes."""
    sentences = np.cumsum([0, *(n for document in documents for n in document)])
    counts = np.cumsum([0, *map(len, documents)])
    sizes = np.array([2 * sum(document) for document in documents])
    return Corpus(np.arange(10, 10 + sentences[-1]), sentences, counts, int(sizes.sum()), sizes)


def test_evaluation_samples_documents_of_the_whole_text():
    found = corpus(*[[3, 4]] * 100)
    assert sample_documents(found, 0, None) is found and sample_documents(found, 700, None) is found
    some = sample_documents(found, 100, None)
    assert len(some.tokens) == 98 and some.bytes == 196
    assert some.documents.tolist() == list(range(0, 29, 2)) and np.diff(some.sentences).tolist() == [3, 4] * 14
    assert some.tokens.min() < 200 and some.tokens.max() > 500
    np.testing.assert_array_equal(np.diff(some.tokens.reshape(14, 7)), 1)  # documents stay whole


def test_the_beginning_of_one_long_document_is_evaluated():
    tokenizer = SimpleNamespace(decode=lambda ids: "é" * len(ids))
    some = sample_documents(corpus([30, 40, 50]), 50, tokenizer)
    assert some.tokens.tolist() == list(range(10, 60)) and some.bytes == 100
    assert some.sentences.tolist() == [0, 30, 50] and some.bounds.tolist() == [0, 50]


def rows(found: Corpus, length: int, **fields) -> list[list[int]]:
    tokenizer = SimpleNamespace(cls=1, sep=2, mask=3, size=1000, continues=np.zeros(1000, bool))
    task = MaskedLMTask(config.MaskedLM(**fields), length, 0, tokenizer)
    epoch = task.examples(found, False).epoch(None)
    features = epoch.features(np.arange(len(epoch.lengths))).split()
    assert [len(row["labels_BT"]) for row in features] == epoch.lengths.tolist()
    for row in features:
        assert not row["weights_BT"][row["labels_BT"] < 10].any()  # no special token is predicted
    return [row["labels_BT"].tolist() for row in features]


def test_a_row_is_filled_with_the_next_sentences():
    """Rows have whole sentences, and [SEP] (2) after each document (Liu et al. 2019). The id of [CLS] is 1."""
    assert rows(corpus([2, 2], [3], [3]), 11) == [[1, 10, 11, 12, 13, 2, 14, 15, 16, 2], [1, 17, 18, 19, 2]]
    assert rows(corpus([2, 2], [3], [3]), 11, full_sentences=False)[0] == [1, 10, 11, 12, 13, 2]


def test_a_sentence_longer_than_a_row_is_cut_and_no_token_is_lost():
    found = corpus([20, 3], [1], [0, 9])
    token_rows = rows(found, 8)
    assert all(len(row) <= 8 for row in token_rows)
    assert [i for row in token_rows for i in row if i >= 10] == found.tokens.tolist()


def test_bits_per_byte_are_the_loss_over_the_bytes():
    assert bits_per_byte(np.log(2) * 12, 4) == 3

"""The examples of the language-modelling tasks, and the losses compared with their definitions."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_params import random_params

from jaxlm.config import CausalLM, MaskedLM, ModelConfig
from jaxlm.data.batches import Batches
from jaxlm.data.corpus import Corpus
from jaxlm.data.corrupt import Draws, mask_tokens, shuffle, word_groups
from jaxlm.errors import UserError
from jaxlm.nn.losses import accuracy, cross_entropy
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.run.evaluate import run_eval
from jaxlm.run.step import make_eval_step
from jaxlm.tasks.pretraining import CausalLMTask, MaskedLMTask, _pairs, _spans

V = 40
CONTINUES = np.arange(V) % 3 == 0  # which tokens continue a word
TOKENIZER = SimpleNamespace(bos=None, eos=None, cls=1, sep=2, mask=3, size=V, continues=CONTINUES & (np.arange(V) > 4))


def corpus_of(documents: list[list[int]]) -> Corpus:
    """Returns a corpus from the lengths of the sentences of each document. Token i is 5 + i mod (V - 5)."""
    sizes = [n for document in documents for n in document]
    total = sum(sizes)
    return Corpus(
        (5 + np.arange(total) % (V - 5)).astype(np.uint16),
        np.cumsum([0, *sizes]),
        np.cumsum([0, *(len(d) for d in documents)]),
        bytes=3 * total,
    )


# Causal language modelling.


@settings(deadline=None)
@given(st.data())
def test_every_prediction_is_counted_once(data):
    T = data.draw(st.integers(1, 12))
    stride = data.draw(st.integers(1, T))
    start = data.draw(st.integers(0, 30))
    end = start + data.draw(st.integers(1, 60))
    offset = data.draw(st.integers(0, T - 1)) if stride == T else 0
    counted = []
    for a, first, b in _spans(np.array([start]), np.array([end]), T, stride, offset):
        assert start <= a <= first < b <= end
        assert b - a <= T
        if stride < T:  # after the first window, each prediction has at least T - stride tokens
            assert a == start or first - a >= T - stride or b == end
        counted += range(first, b)
    assert counted == list(range(start, end))


def causal_task(length: int = 8, **settings) -> CausalLMTask:
    return CausalLMTask(CausalLM(**settings), length, 5, TOKENIZER)


def predictions(examples, n: int | None) -> list[tuple[int, int]]:
    """Returns (token, label) of every counted prediction of an epoch."""
    epoch = examples.epoch(n)
    found = []
    for length, features in zip(epoch.lengths, epoch.features(np.arange(len(epoch.lengths))).split()):
        assert {len(features[f]) for f in ("tokens_BT", "labels_BT", "weights_BT")} == {length}
        counted = features["weights_BT"] > 0
        found += zip(features["tokens_BT"][counted].tolist(), features["labels_BT"][counted].tolist())
    return found


def test_a_stream_predicts_each_token_once_per_epoch_and_each_epoch_has_other_cuts():
    corpus = corpus_of([[7], [30], [1], [19]])
    pairs = list(zip(corpus.tokens.tolist(), corpus.tokens[1:].tolist()))
    examples = causal_task().examples(corpus, training=True)
    for n in range(4):
        assert predictions(examples, n) == pairs
    assert len({tuple(examples.epoch(n).lengths.tolist()) for n in range(12)}) > 2
    np.testing.assert_array_equal(examples.epoch(2).lengths, causal_task().examples(corpus, True).epoch(2).lengths)
    for stride in (0, 1, 3, 8):
        assert predictions(causal_task(stride=stride).examples(corpus, training=False), None) == pairs


def test_no_prediction_crosses_the_end_of_a_document():
    corpus = corpus_of([[7], [30], [1], [19]])  # the document of one token has no prediction
    bounds = corpus.bounds
    documents = [list(corpus.tokens[a:b].tolist()) for a, b in zip(bounds, bounds[1:])]
    pairs = [pair for document in documents for pair in zip(document, document[1:])]
    for task, n in (
        (causal_task(stream=False), 0),
        (causal_task(stream=False), 3),
        (causal_task(stream=False, stride=3), None),
    ):
        assert predictions(task.examples(corpus, n is not None), n) == pairs
    task = causal_task(16, stream=False)
    batches = Batches(task.examples(corpus, True), 4, 16, task.max_examples, seed=0)
    assert sum(int(batches.batch_at(s)["weights_BT"].sum()) for s in range(len(batches))) >= len(pairs)


def test_whole_documents_end_with_the_token_that_is_bos_and_eos():
    """GPT-2 has one token, <|endoftext|>: it precedes each document, and it is the label of the last token."""
    corpus = corpus_of([[7], [30], [2]])._replace(tokens=np.arange(39) % 5 + 3)
    corpus.tokens[corpus.bounds[:-1]] = 1
    tokenizer = SimpleNamespace(bos=1, eos=1)
    bounds = corpus.bounds.tolist()
    documents = [[*corpus.tokens[a:b].tolist(), 1] for a, b in zip(bounds, bounds[1:])]
    pairs = [pair for document in documents for pair in zip(document, document[1:])]
    for training in (True, False):
        task = CausalLMTask(CausalLM(stream=False), 8, 5, tokenizer)
        assert predictions(task.examples(corpus, training), 0 if training else None) == pairs
    stream = CausalLMTask(CausalLM(), 8, 5, tokenizer)
    assert len(predictions(stream.examples(corpus, False), None)) == 38  # bos of the next document


@pytest.mark.parametrize("tokens", [[], [[1]]], ids=["none", "one"])
def test_a_corpus_without_predictions_has_no_examples(tokens):
    for stream in (True, False):
        task = causal_task(stream=stream)
        assert len(task.examples(corpus_of(tokens), False).epoch(None).lengths) == 0


TINY = {"vocabulary": V, "max_length": 32, "width": 16, "layers": 2, "heads": 2, "norm_place": "pre"}
DECODER = ModelConfig(**TINY)
ENCODER = ModelConfig(**TINY, structure="encoder", heads_on_top=("masked_lm", "next_sentence"), types=2)


@lru_cache
def compiled_eval_step(length: int, stride: int, stream: bool):
    task = causal_task(length, stride=stride, stream=stream)
    return task, jax.jit(make_eval_step(task, Transformer(DECODER)))


def evaluate(task, eval_step, params, corpus, length: int, rows: int = 3):
    batches = Batches(task.examples(corpus, False), rows, length, task.max_examples, None)
    stack = lambda batch, k: {name: x[None] for name, x in batch.items()}
    return task.measure(None, lambda batches: run_eval(eval_step, params, batches, stack), batches, corpus)[0]


def test_evaluation_equals_a_forward_pass_on_the_whole_text():
    params, module = random_params(DECODER), Transformer(DECODER)
    corpus = corpus_of([[26]])
    tokens = corpus.tokens.astype(np.int32)
    hidden = lambda params, x: apply(module, params, apply(module, params, x), method="lm")
    forward = jax.jit(hidden)
    log_p = np.asarray(jax.device_get(forward(params, tokens[None, :-1])), np.float64)[0]
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    nats = -log_p[np.arange(25), tokens[1:]]

    task, step = compiled_eval_step(32, 4, True)
    found = evaluate(task, step, params, corpus, 32)
    assert found["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / corpus.bytes, rel=1e-5)
    assert found["accuracy"] == pytest.approx((log_p.argmax(-1) == tokens[1:]).mean())
    # A window has 8 tokens and moves by 4. Each counted prediction depends on the 4 to 8 tokens before it.
    windows = [(0, 0, 8), *((e - 8, e - 4, e) for e in range(12, 25, 4)), (17, 24, 25)]
    total = 0.0
    for a, first, b in windows:
        padded = np.zeros((1, 25), np.int32)
        padded[0, : b - a] = tokens[a:b]
        logits = np.asarray(jax.device_get(forward(params, padded)), np.float64)[0]
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= sum(logits[t - a, tokens[t + 1]] for t in range(first, b))
    task, step = compiled_eval_step(8, 4, True)
    assert evaluate(task, step, params, corpus, 8)["loss"] == pytest.approx(total / 25, rel=1e-5)


def test_evaluation_does_not_depend_on_the_number_of_rows():
    params = random_params(DECODER)
    corpus = corpus_of([[9], [26], [14], [3]])
    task, step = compiled_eval_step(16, 0, False)
    few, many = (evaluate(task, step, params, corpus, 16, rows) for rows in (2, 5))
    assert few == pytest.approx(many, rel=1e-5)


# Masked language modelling.


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_masking_respects_its_rate_and_its_excluded_tokens(data):
    n = data.draw(st.integers(1, 60))
    choosable = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    continues = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    rate = data.draw(st.floats(0.01, 0.99))
    groups = word_groups(continues, choosable)
    assert ((groups >= 0) == choosable).all()
    tokens = np.arange(100, 100 + n)
    draws = Draws((data.draw(st.integers(0, 1 << 30)),), np.array([0]))
    corrupted, predicted = mask_tokens(tokens, groups, np.array([n]), draws, rate=rate, mask=3, vocabulary=V)
    assert predicted.sum() <= max(1, round(rate * choosable.sum()))
    if not continues.any():
        assert predicted.sum() == min(choosable.sum(), max(1, round(rate * choosable.sum())))
    assert not predicted[~choosable].any()
    assert (corrupted[~predicted] == tokens[~predicted]).all()
    for group in range(groups.max(initial=-1) + 1):
        assert len(set(predicted[groups == group].tolist())) == 1  # all tokens of a word are chosen, or none


def test_80_percent_of_the_chosen_tokens_are_masked_10_are_random_and_10_are_unchanged():
    n, draws = 200_000, Draws((0,), np.array([0]))
    tokens = np.full(n, 1000)
    corrupted, predicted = mask_tokens(tokens, np.arange(n), np.array([n]), draws, rate=0.15, mask=3, vocabulary=500)
    chosen = corrupted[predicted]
    assert len(chosen) == 30_000
    for fraction, count in ((0.8, (chosen == 3).sum()), (0.1, (chosen == 1000).sum())):
        tolerance = 5 * math.sqrt(fraction * (1 - fraction) * len(chosen)) + len(chosen) / 5000
        assert abs(count - fraction * len(chosen)) < tolerance
    noise = chosen[(chosen != 3) & (chosen != 1000)]
    counts = np.bincount(noise, minlength=500)
    assert counts[3] == 0  # by the filter above
    assert counts[[i for i in range(500) if i != 3]].min() >= 0
    expected = len(noise) / 499
    chi_square = ((np.delete(counts, 3) - expected) ** 2 / expected).sum()
    assert abs(chi_square - 498) < 6 * math.sqrt(2 * 498)
    # The chosen positions are uniform too.
    assert abs(np.flatnonzero(predicted).mean() / n - 0.5) < 0.01


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), max_size=20), min_size=1, max_size=8), st.floats(0.01, 0.99))
def test_words_are_selected_in_order_while_they_fit(words_of_texts, rate):
    """The reference selects one word after another in each text alone."""
    lengths = np.array([1 + sum(words) for words in words_of_texts])
    first = np.cumsum(lengths) - lengths
    sizes = [size for words in words_of_texts for size in words]
    groups = np.insert(np.repeat(np.arange(len(sizes)), sizes), first - np.arange(len(first)), -1)
    draws = Draws((1,), np.arange(len(lengths)))
    _, predicted = mask_tokens(np.zeros(len(groups), int), groups, lengths, draws, rate=rate, mask=1, vocabulary=V)
    for n, sizes in enumerate(words_of_texts):
        starts = np.cumsum([1, *sizes])[:-1]
        keys = draws.words(np.full(len(sizes), n), 2 * starts)
        left, expected = max(1, round(rate * sum(sizes))), []
        for word in np.argsort(keys):
            if sizes[word] <= left:
                expected.append(word)
                left -= sizes[word]
        found = np.flatnonzero(predicted[first[n] : first[n] + lengths[n]])
        assert sorted(found) == sorted(starts[word] + i for word in expected for i in range(sizes[word]))


def test_the_order_of_items_does_not_depend_on_other_examples():
    """Few or many examples, and examples with too many items for one word of a sort."""
    words = np.random.default_rng(0).integers(0, 2**64, 60, np.uint64)
    alone = shuffle(words, np.array([60])).items
    assert sorted(alone) == list(range(60))
    for before, after in ((0, 5), (7, 1), (1 << 14, 0)):
        others = np.random.default_rng(1).integers(0, 2**64, before + after, np.uint64)
        counts = np.concatenate([np.ones(before, int), [60], np.ones(after, int)])
        order = shuffle(np.concatenate([others[:before], words, others[before:]]), counts)
        assert (order.items[before : before + 60] - before).tolist() == alone.tolist()
    many = np.random.default_rng(2).integers(0, 2**64, 1 << 20, np.uint64)
    counts = np.concatenate([[60], [1 << 20], np.ones(1 << 12, int)])
    order = shuffle(np.concatenate([words, many, many[: 1 << 12]]), counts)
    assert order.items[:60].tolist() == alone.tolist()
    assert sorted(order.items.tolist()) == list(range(counts.sum()))


def test_texts_are_masked_independently_of_each_other():
    """Each position of each text is selected equally often, and two texts have different masks."""
    lengths, rounds = np.full(64, 20), 200
    counts = np.zeros((64, 20))
    same = 0
    for n in range(rounds):
        draws = Draws((n,), np.arange(64))
        tokens = np.zeros(lengths.sum(), int)
        _, predicted = mask_tokens(tokens, np.arange(len(tokens)), lengths, draws, rate=0.2, mask=1, vocabulary=V)
        predicted = predicted.reshape(64, 20)
        assert (predicted.sum(1) == 4).all()
        counts += predicted
        same += (predicted[1:] == predicted[:-1]).all(1).sum()
    expected = rounds * 0.2
    chi_square = ((counts - expected) ** 2 / (expected * 0.8)).sum()
    assert abs(chi_square - counts.size * 0.95) < 6 * math.sqrt(2 * counts.size)  # 4 of 20 without replacement
    assert same < 63 * rounds / 4845 + 12  # there are 4,845 choices


def masked_task(length: int = 32, seed: int = 5, **settings) -> MaskedLMTask:
    return MaskedLMTask(MaskedLM(**settings), length, seed, TOKENIZER)


DOCUMENTS = [[5, 9, 3], [40], [12, 12], [1], [7, 3, 8, 20], [2, 2, 2]]


def all_features(examples, n: int | None):
    epoch = examples.epoch(n)
    return epoch.features(np.arange(len(epoch.lengths))).split()


@pytest.mark.parametrize("options", [{}, {"whole_words": True}, {"next_sentence": True, "short_rate": 0.5}], ids=str)
def test_masked_examples_depend_only_on_seed_epoch_and_number(options):
    corpus = corpus_of(DOCUMENTS)
    make = lambda seed=5, training=True: masked_task(seed=seed, **options).examples(corpus, training)
    first = all_features(make(), 2)
    epoch = make().epoch(2)
    random = np.random.default_rng(0)
    for units in np.array_split(random.permutation(len(first)), 4):  # in any order and number, from a new object
        for i, found in zip(units, epoch.features(units).split(), strict=True):
            assert found.keys() == first[i].keys()
            assert all(np.array_equal(found[f], first[i][f]) for f in found)
    weights = lambda features: np.concatenate([f["weights_BT"] for f in features])
    for features in (all_features(make(), 3), all_features(make(seed=6), 2), all_features(make(training=False), None)):
        a, b = weights(first), weights(features)
        assert a.shape != b.shape or (a != b).any()
    a, b = (all_features(make(training=False), None) for _ in range(2))
    assert all(np.array_equal(x[f], y[f]) for x, y in zip(a, b) for f in x)


@pytest.mark.parametrize(
    "options", [{"full_sentences": False}, {"whole_words": True}, {"next_sentence": True}], ids=str
)
def test_masked_examples_keep_special_tokens_labels_and_types(options):
    corpus = corpus_of(DOCUMENTS)
    examples = masked_task(**options).examples(corpus, training=True)
    for n in range(5):
        epoch = examples.epoch(n)
        for length, features in zip(epoch.lengths, all_features(examples, n)):
            labels, predicted = features["labels_BT"], features["weights_BT"] > 0
            assert len(labels) == len(features["tokens_BT"]) == length <= 32
            special = np.isin(labels, [1, 2])
            assert labels[0] == 1
            if not options.get("whole_words"):  # whole_words has a separator between any two documents
                assert special.sum() == 2 + bool(options.get("next_sentence"))
            assert not predicted[special].any()
            assert (features["tokens_BT"][~predicted] == labels[~predicted]).all()
            assert 1 <= predicted.sum() <= max(1, round(0.15 * (~special).sum())) or options.get("whole_words")
            assert predicted.sum() <= max(1, round(0.15 * (~special).sum()))
            ends = np.flatnonzero(labels == 2)
            if options.get("next_sentence"):
                np.testing.assert_array_equal(features["types_BT"], np.arange(length) > ends[0])
            else:
                assert not features["types_BT"].any()
            if options.get("whole_words"):
                for t in range(2, length):
                    if TOKENIZER.continues[labels[t]] and not special[t - 1]:
                        assert predicted[t] == predicted[t - 1]


def test_the_rate_of_predictions_is_the_mask_rate_and_no_text_is_lost():
    corpus = corpus_of([[int(n)] for n in np.random.default_rng(0).integers(20, 90, 100)])
    for whole_words in (False, True):
        examples = masked_task(whole_words=whole_words).examples(corpus, training=True)
        found = all_features(examples, 0)
        chosen = sum(f["weights_BT"].sum() for f in found)
        text = sum((f["labels_BT"] > 2).sum() for f in found)
        assert text == len(corpus.tokens)
        assert chosen / text == pytest.approx(0.15, abs=0.02)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=30),
    st.floats(0.01, 0.9),
    st.booleans(),
    st.booleans(),
    st.integers(8, 40),
)
def test_no_row_has_more_predictions_than_the_gather_accepts(documents, rate, whole_words, next_sentence, length):
    task = masked_task(length, mask_rate=rate, whole_words=whole_words, next_sentence=next_sentence)
    batches = Batches(task.examples(corpus_of(documents), False), 2, length, task.max_examples, None)
    for step in range(len(batches)):
        batch = batches.batch_at(step)
        assert (batch["weights_BT"] > 0).sum(1).max() <= task.predictions <= length


def test_gathered_predictions_have_the_loss_of_all_positions():
    task = masked_task(next_sentence=True)
    params, module = random_params(ENCODER), Transformer(ENCODER)
    batch = Batches(task.examples(corpus_of(DOCUMENTS), True), 3, 32, task.max_examples, 0).batch_at(1)
    assert task.predictions < 32

    def dense(params, batch):
        x = apply(module, params, *(batch[f] for f in ("tokens_BT", "segments_BT", "positions_BT", "types_BT")))
        logits = apply(module, params, x, method="masked_lm")
        starts = x[np.arange(3)[:, None], batch["starts_BE"]]
        pair_logits = apply(module, params, starts, method="next_sentence")
        return logits, pair_logits

    logits, pair_logits = jax.device_get(jax.jit(dense)(params, batch))
    found = jax.device_get(jax.jit(lambda p, b: task.losses(module, p, b, None)[0])(params, batch))
    losses = optax.softmax_cross_entropy_with_integer_labels
    cross = lambda logits, labels, weights: float((jax.jit(losses)(logits, labels) * weights).sum())
    expected = {
        "masked_lm_loss": cross(logits, batch["labels_BT"], batch["weights_BT"]),
        "masked_lm_accuracy": ((logits.argmax(-1) == batch["labels_BT"]) * batch["weights_BT"]).sum(),
        "next_sentence_loss": cross(pair_logits, batch["labels_BE"], batch["weights_BE"]),
        "next_sentence_accuracy": ((pair_logits.argmax(-1) == batch["labels_BE"]) * batch["weights_BE"]).sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name][0], value, rtol=1e-5, err_msg=name)
        weights = batch["weights_BT" if name.startswith("masked") else "weights_BE"]
        assert found[name][1] == weights.sum() > 0
    assert task.weights(batch)["masked_lm_loss"] == batch["weights_BT"].sum()


def test_a_tokenizer_without_mask_is_refused():
    tokenizer = SimpleNamespace(cls=None, sep=2, mask=None)
    with pytest.raises(UserError, match=r"no cls, mask token.*wordpiece"):
        MaskedLMTask(MaskedLM(), 32, 0, tokenizer)


# Next-sentence pairs.


def document_at(corpus: Corpus, position: int) -> int:
    return int(np.searchsorted(corpus.bounds, position, side="right")) - 1


def draw_pairs(documents, length: int = 24, short_rate: float = 0.1, epochs: int = 40) -> tuple[Corpus, np.ndarray]:
    corpus = corpus_of(documents)
    return corpus, np.concatenate(
        [_pairs(corpus, length, short_rate, np.random.default_rng((0, n))) for n in range(epochs)]
    )


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=12),
    st.integers(2, 40),
    st.floats(0, 1),
)
def test_pairs_match_their_labels(documents, length, short_rate):
    corpus, pairs = draw_pairs(documents, length, short_rate, epochs=3)
    for a, a_end, b, b_end, label in pairs.tolist():
        assert a < a_end
        assert b < b_end
        assert a_end - a + b_end - b <= length
        first, second = document_at(corpus, a), document_at(corpus, b)
        assert first == document_at(corpus, a_end - 1)
        assert second == document_at(corpus, b_end - 1)
        assert (first != second) == label
        if label == 0:  # consecutive, except for the tokens that were trimmed at both ends
            assert a_end <= b
            if b > a_end:
                assert a_end - a + b_end - b == length  # only the trimmed tokens are missing between them
    if len(documents) == 1:
        assert not pairs[:, 4].any()


def test_pairs_that_need_no_trimming_are_consecutive():
    _, pairs = draw_pairs([[3, 4, 2, 5, 3, 3, 4], [4] * 9, [2] * 12], length=100)
    true = pairs[pairs[:, 4] == 0]
    assert len(true) > 20
    np.testing.assert_array_equal(true[:, 1], true[:, 2])


def test_about_half_of_the_pairs_are_consecutive():
    random = np.random.default_rng(0)
    _, pairs = draw_pairs([random.integers(2, 9, 40).tolist() for _ in range(20)])
    assert len(pairs) > 2000
    assert pairs[:, 4].mean() == pytest.approx(0.5, abs=0.05)


def test_pairs_cover_the_whole_corpus():
    corpus, pairs = draw_pairs([[5, 9, 3], [20], [12, 12], [7, 3, 8, 20]], length=60, epochs=60)
    is_covered = np.zeros(len(corpus.tokens), bool)
    for a, a_end, b, b_end, _ in pairs:
        is_covered[a:a_end] = is_covered[b:b_end] = True
    assert is_covered.all()


def test_documents_of_one_sentence_have_pairs():
    """Without longer documents all pairs are random. With longer documents both kinds occur."""
    _, pairs = draw_pairs([[5], [6], [7]])
    assert len(pairs) >= 3
    assert pairs[:, 4].all()
    _, pairs = draw_pairs([[5], [6], [7], [4, 4, 4, 4, 4, 4]])
    assert set(pairs[:, 4].tolist()) == {0, 1}


@pytest.mark.parametrize("document", [[9], [5, 5], [5, 6, 7, 8, 9, 10]], ids=str)
def test_drawing_pairs_of_a_single_document_terminates(document):
    _, pairs = draw_pairs([document])
    assert not pairs[:, 4].any()
    assert (len(pairs) > 0) == (len(document) > 1)
    task = masked_task(next_sentence=True)
    Batches(task.examples(corpus_of([document]), False), 2, 32, task.max_examples, None).batch_at(0)


# Losses.


def random_logits(seed: int = 0):
    random = np.random.default_rng(seed)
    logits = (5 * random.standard_normal((3, 7, V))).astype(np.float32)
    return logits, random.integers(0, V, (3, 7)), random.random((3, 7)).astype(np.float32)


def test_cross_entropy_equals_optax_and_its_definition():
    logits, labels, weights = random_logits()
    loss, weight = jax.jit(cross_entropy)(logits, labels, weights)
    log_p = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, (expected * weights).sum(), rtol=1e-5)
    by_optax = jax.jit(optax.softmax_cross_entropy_with_integer_labels)(logits, labels)
    np.testing.assert_allclose(loss, (np.asarray(by_optax) * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.1, 0.5, 0.9])
def test_label_smoothing_follows_the_definition_of_torch(smoothing):
    """torch.nn.CrossEntropyLoss has the target e / V for every class, and 1 - e in addition for the label."""
    logits, labels, weights = random_logits()
    log_p = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    target = np.full(log_p.shape, smoothing / V)
    np.put_along_axis(target, labels[..., None], 1 - smoothing + smoothing / V, -1)
    expected = (-(target * log_p).sum(-1) * weights).sum()
    loss, _ = jax.jit(partial(cross_entropy, label_smoothing=smoothing))(logits, labels, weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_zero_weights_cause_no_loss_and_no_nan():
    logits, labels, weights = random_logits()
    function = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, labels, weights * 0, 0.1)[0]))
    loss, gradient = function(logits)
    assert loss == 0
    assert not np.any(gradient)
    value, weight = jax.jit(accuracy)(logits, labels, weights * 0)
    assert (value, weight) == (0, 0)
    huge, _ = jax.jit(cross_entropy)(logits * 1e4, labels, weights)
    assert np.isfinite(huge)


def test_bfloat16_logits_are_summed_in_float32():
    logits, labels, weights = random_logits()
    rounded = logits.astype(jax.numpy.bfloat16)
    loss, _ = jax.jit(cross_entropy)(rounded, labels, weights)
    exact, _ = jax.jit(cross_entropy)(rounded.astype(np.float32), labels, weights)
    assert loss.dtype == np.float32
    np.testing.assert_allclose(loss, exact, rtol=1e-6)


def test_accuracy_counts_the_most_likely_tokens():
    logits, labels, weights = random_logits()
    value, weight = jax.jit(accuracy)(logits, labels, weights)
    np.testing.assert_allclose(value, ((logits.argmax(-1) == labels) * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)
    assert jax.jit(accuracy)(logits, logits.argmax(-1), np.ones_like(weights))[0] == weights.size

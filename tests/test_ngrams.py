"""N-gram models: distributions sum to 1, texts are independent, and all values equal those of KenLM's lmplz."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from jaxlm.baselines import arpa, ngrams
from jaxlm.errors import UserError

GOLDEN = Path(__file__).parent / "goldens"
WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext2_valid_test"


def sentences(seed: int, count: int, words: int) -> list[str]:
    """Return texts in which some words often follow others; a few texts are empty."""
    random = np.random.RandomState(seed)  # its numbers never change
    texts = []
    for _ in range(count):
        word, text = 0, []
        for _ in range(random.randint(0, 12)):
            repeats = random.random_sample() < 0.6
            word = (5 * word + 1) % 12 if repeats else int(words * random.random_sample() ** 3)
            text.append(f"w{word}")
        texts.append(" ".join(text))
    return texts


TEXTS, SMALL = sentences(0, 300, 600), sentences(1, 40, 12)
GOLDENS = (
    ("ngrams.arpa.gz", TEXTS, ["-o", "4"]),
    ("ngrams_fallback.arpa.gz", SMALL, ["-o", "3", "--discount_fallback", "--vocab_pad", "50"]),
)


def fit_words(texts, order, **options):
    encoded = arpa.encode(texts)
    options = {"vocabulary": len(encoded.words), **options}
    return ngrams.fit(
        encoded.tokens_N, encoded.bounds, order, start=encoded.words.index("<s>"), **options
    ), encoded.words


def total_probability(model, context):
    """Return the sum of the probabilities of all tokens after a context."""
    texts = [[*context, token] for token in range(model.vocabulary)]
    tokens, bounds = np.concatenate(texts), np.arange(len(texts) + 1) * len(texts[0])
    return np.exp(ngrams.log_probs(model, tokens, bounds)[bounds[1:] - 1]).sum()


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_after_any_context_sum_to_one(order):
    model, words = fit_words(TEXTS, order, fallback=ngrams.FALLBACK)
    known = arpa.encode(TEXTS[:5], words).tokens_N.tolist()
    contexts = [[1], known[:1], known[:2], known[:6], known[3:7], [0, 0, 0], [5, 0, 7], [7, 7, 7, 7, 7]]
    for context in contexts:
        # Token 1, <s>, is never predicted.
        assert total_probability(model, context) == pytest.approx(1, abs=1e-5), context


def test_every_token_of_the_vocabulary_has_a_probability():
    tokens = np.array([3, 1, 3, 1, 2, 1, 1, 2, 3, 3, 1])
    model = ngrams.fit(tokens, [0, len(tokens)], 3, vocabulary=10, fallback=ngrams.FALLBACK)
    assert total_probability(model, [3, 1]) == pytest.approx(1, abs=1e-5)
    unseen = np.exp(ngrams.log_probs(model, np.arange(4, 10), [0, 6]))[1:]
    assert (unseen > 0).all() and np.ptp(unseen) == 0


def test_texts_are_independent():
    model, words = fit_words(TEXTS, 4)
    encoded = arpa.encode(TEXTS[:20], words)
    together = ngrams.log_probs(model, encoded.tokens_N, encoded.bounds)
    alone = [ngrams.log_probs(model, *arpa.encode([text], words)[:2]) for text in TEXTS[:20]]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert (together[encoded.bounds[:-1]] == 0).all()


def test_a_corpus_is_the_same_in_any_order_of_its_texts():
    encoded = arpa.encode(TEXTS)
    model, words = fit_words(TEXTS, 3)
    parts = np.split(encoded.tokens_N, encoded.bounds[1:-1])[::-1]
    bounds = np.cumsum([0, *map(len, parts)])
    other = ngrams.fit(np.concatenate(parts), bounds, 3, vocabulary=len(words), start=1)
    for a, b in zip((*model.keys, *model.log10_probs), (*other.keys, *other.log10_probs)):
        np.testing.assert_array_equal(a, b)


def test_a_higher_order_predicts_its_own_training_text_better():
    encoded = arpa.encode(TEXTS)
    sums = [ngrams.log_probs(fit_words(TEXTS, order)[0], *encoded[:2]).sum() for order in range(1, 5)]
    assert sums == sorted(sums)


def by_words(model, words):
    """Return the values of each n-gram by its words."""
    values = {}
    for k in range(1, model.order + 1):
        backoffs = model.log10_backoffs[k - 1] if k < model.order else np.zeros(len(model.log10_probs[k - 1]))
        for ngram, prob, backoff in zip(model.tokens(k), model.log10_probs[k - 1], backoffs):
            values[" ".join(words[token] for token in ngram)] = prob, backoff
    return values


@pytest.mark.parametrize("file, texts, flags", GOLDENS, ids=lambda value: value if isinstance(value, str) else "")
def test_all_values_equal_those_of_lmplz(file, texts, flags):
    fallback = ngrams.FALLBACK if "--discount_fallback" in flags else None
    encoded = arpa.encode(texts)
    # lmplz pads to this number of words in addition to <s>.
    size = int(flags[-1]) + 1 if "--vocab_pad" in flags else len(encoded.words)
    model, words = fit_words(texts, int(flags[1]), fallback=fallback, vocabulary=size)
    ours = by_words(model, [*words, *(f"unused{n}" for n in range(size - len(words)))])
    theirs = by_words(*arpa.read(GOLDEN / file))
    assert {word for word in ours if "unused" not in word} == theirs.keys()
    for ngram, values in theirs.items():
        if ngram == "<s>":  # lmplz writes 0, the probability 1
            assert values[0] == 0 and ours[ngram][0] == ngrams.NEVER
            values = ngrams.NEVER, values[1]
        assert ours[ngram] == pytest.approx(values, abs=2e-6), ngram


def test_the_model_reports_the_orders_with_fallback_discounts():
    model, _ = fit_words(SMALL, 3, fallback=ngrams.FALLBACK)
    assert 1 in model.fallbacks and fit_words(TEXTS, 4)[0].fallbacks == ()


@pytest.mark.parametrize(
    "tokens, bounds, options, message",
    [
        ([], [0], {}, "no token to predict"),
        ([4, 5], [0, 1, 2], {}, "no token to predict"),
        ([1, 2, 3], [0, 3], {}, "no 1-gram has the adjusted count 2.*give more text.*fallback="),
        ([1, 2] * 50, [0, 100], {}, "no 1-gram has the adjusted count"),
        ([1, 2, 3], [0, 3], {"order": 0}, "order is 0; it must be .*at least 1"),
        ([1, 2, 3], [0, 3], {"order": -2}, "at least 1"),
        ([1, 2, 3], [0, 3], {"order": 11}, "at most 10"),
        ([1, 2, 3], [0, 3], {"order": 2.5}, "an integer"),
        ([1, 2, 3], [0, 2], {}, "do not divide 3 tokens"),
        ([1, 2, 3], [0, 2, 1, 3], {}, "do not divide"),
        ([1, 2, 3], [], {}, "do not divide"),
        ([1, 2, 3], [1, 3], {}, "do not divide"),
        ([1, 2, 3], [0, 3], {"vocabulary": 3}, "is 3, and the vocabulary has the ids 0 to 2"),
        ([1, -2, 3], [0, 3], {}, "token 1 of the corpus is -2"),
        ([1.5, 2, 3], [0, 3], {}, "dtype float64; give integers"),
        (["a", "b"], [0, 2], {}, "give integers"),
        ([1, 2, 1, 3], [0, 4], {"start": 1}, "token 2 of the corpus is the start token 1"),
        ([1, 2, 3], [0, 3], {"fallback": (0.5, 1.0)}, "fallback is"),
        ([1, 2, 3], [0, 3], {"fallback": (0.5, 1.0, 4.0)}, "at most 1, 2 and 3"),
        ([1, 2, 3], [0, 3], {"fallback": (0.0, 1.0, 2.0)}, "above 0"),
    ],
)
def test_invalid_corpora_and_options_are_refused(tokens, bounds, options, message):
    with pytest.raises(UserError, match=message):
        ngrams.fit(tokens, bounds, **{"order": 2, **options})


def test_scoring_refuses_unknown_ids():
    model, _ = fit_words(TEXTS, 2)
    with pytest.raises(UserError, match="is 9999, and the vocabulary has the ids"):
        ngrams.log_probs(model, [1, 9999], [0, 2])


def test_a_discount_out_of_range_is_refused():
    times = [*[1] * 20, *[2] * 2, *[3] * 10, 4]  # many more tokens occur three times than twice
    tokens = np.repeat(np.arange(len(times) + 1), [1, *times])
    with pytest.raises(UserError, match=r"the discount of 1-grams with the adjusted count 2 is -10\.5, and it must be"):
        ngrams.fit(tokens, [0, len(tokens)], 1)
    model = ngrams.fit(tokens, [0, len(tokens)], 1, fallback=ngrams.FALLBACK)
    assert model.fallbacks == (1,) and total_probability(model, [0]) == pytest.approx(1)


# ARPA files


@pytest.mark.parametrize("name", ["model.arpa", "model.arpa.gz"])
def test_an_arpa_file_contains_the_whole_model(tmp_path, name):
    model, words = fit_words(TEXTS, 4)
    arpa.write(tmp_path / name, model, words)
    read, read_words = arpa.read(tmp_path / name)
    assert read_words == words and read.vocabulary == model.vocabulary
    for a, b in zip(
        (*model.keys, *model.log10_probs, *model.log10_backoffs), (*read.keys, *read.log10_probs, *read.log10_backoffs)
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    arpa.write(tmp_path / f"2{name}", model, words)
    assert (tmp_path / name).read_bytes() == (tmp_path / f"2{name}").read_bytes()


def test_a_file_has_the_words_that_kenlm_requires(tmp_path):
    model = ngrams.fit([3, 1, 3, 1, 2, 1], [0, 6], 2, fallback=ngrams.FALLBACK)
    arpa.write(tmp_path / "ids.arpa", model, list("0123"))
    read, words = arpa.read(tmp_path / "ids.arpa")
    assert {"<s>", "</s>", "<unk>"} < set(words)
    ids = np.array([words.index(word) for word in "313121"])
    before = ngrams.log_probs(model, [3, 1, 3, 1, 2, 1], [0, 6])
    np.testing.assert_array_equal(ngrams.log_probs(read, ids, [0, 6]), before)


def test_words_may_contain_any_character_but_spaces(tmp_path):
    texts = [f"{text} \u3000x \x0bb \\end\\ é😀" for text in TEXTS]
    model, words = fit_words(texts, 2, fallback=ngrams.FALLBACK)
    arpa.write(tmp_path / "m.arpa", model, words)
    assert arpa.read(tmp_path / "m.arpa")[1] == words


@pytest.mark.parametrize(
    "words, message",
    [
        (["a", "b"], "2 words, and the model has 3 ids"),
        (["a", "b c", "d"], "'b c' is empty or contains white space"),
        (["a", "", "d"], "'' is empty"),
        (["a", "b", "a"], "a word occurs twice"),
    ],
)
def test_words_that_a_file_cannot_contain_are_refused(tmp_path, words, message):
    model = ngrams.fit([0, 1, 2], [0, 3], 1, fallback=ngrams.FALLBACK)
    with pytest.raises(UserError, match=message):
        arpa.write(tmp_path / "m.arpa", model, words)
    assert not list(tmp_path.iterdir())


VALID = r"""some comment

\data\
ngram 1=4
ngram 2=2

\1-grams:
-1.5	<unk>
-99	<s>	-0.25
-0.5	</s>	0
-0.3	a	-0.5

\2-grams:
-0.2	<s> a
-0.4	a </s>

\end\
"""


def test_a_file_of_another_program_is_read(tmp_path):
    (tmp_path / "m.arpa").write_text(VALID.replace("\t", " ").replace("\n", "\r\n"))
    model, words = arpa.read(tmp_path / "m.arpa")
    encoded = arpa.encode(["a", "a b a"], words)
    expected = np.log(10) * np.array([0, -0.2, -0.4, 0, -0.2, -0.5 - 1.5, -0.3, -0.4])
    np.testing.assert_allclose(ngrams.log_probs(model, *encoded[:2]), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("\n\\end\\\n", "\n", "the file ends here"),
        (VALID[40:], "", "the file ends here"),
        ("\\data\\", "data", "no line .data."),
        (VALID, "", "the file ends here|no line .data."),
        ("ngram 1=4\nngram 2=2\n", "", "declares no unigrams"),
        ("ngram 1=4", "ngram 1=0", "declares no unigrams"),
        ("ngram 1=4\n", "", "the header has 'ngram 2=2', and 'ngram 1=COUNT' is due"),
        ("ngram 2=2", "ngram 3=2", "'ngram 2=COUNT' is due"),
        ("ngram 2=2", "ngram 2=x", "'ngram 2=COUNT' is due"),
        ("ngram 2=2", f"ngram 2={9 * 10**30}", "'ngram 2=COUNT' is due"),
        ("ngram 1=4", "ngram 1=5", "there are 4 1-grams, and the header declares 5"),
        ("ngram 2=2", "ngram 2=1", "there are more 2-grams than the 1 of the header"),
        ("ngram 2=2", "ngram 2=3", "line 17: there are 2 2-grams, and the header declares 3"),
        ("ngram 2=2\n", "ngram 2=2\nngram 3=1\n", "3-grams: is due"),
        ("ngram 2=2\n", "", "line 8: the line has 3 fields; it must have .*1-gram, without a backoff weight"),
        ("\\2-grams:", "\\3-grams:", "2-grams: is due"),
        ("\\1-grams:\n", "", "the header has"),
        ("-0.3\ta", "zero\ta", "line 11: the log probability is 'zero', not a number"),
        ("-0.3\ta", "nan\ta", "not finite"),
        ("-0.3\ta", "0.3\ta", "the log probability is 0.3; a logarithm of a probability is at most 0"),
        ("a\t-0.5", "a\tb", "the backoff weight is 'b', not a number"),
        ("a\t-0.5", "a\tinf", "not finite"),
        ("a\t-0.5", "a b\t-0.5", "has 4 fields"),
        ("-0.2\t<s> a", "-0.2\t<s>", "has 2 fields"),
        ("-0.2\t<s> a", "-0.2\t<s> a\t-0.1", "has 4 fields; .*without a backoff"),
        ("-0.3\ta", "-0.3\t</s>", "the 1-gram '</s>' is there twice"),
        ("-0.4\ta </s>", "-0.4\t<s> a", "the 2-gram '<s> a' is there twice"),
        ("-0.4\ta </s>", "-0.4\tc </s>", "the 2-gram 'c </s>' is in the file, and its first words 'c' are not"),
        ("-0.4\ta </s>", "-0.4\ta c", "'c' of 'a c' is not among the unigrams"),
        ("-0.3\ta", "-0.3\t\udcff", "is not UTF-8"),
    ],
)
def test_damaged_files_are_refused(tmp_path, old, new, message):
    assert old in VALID
    (tmp_path / "m.arpa").write_text(VALID.replace(old, new, 1), errors="surrogateescape")
    with pytest.raises(UserError, match=message) as error:
        arpa.read(tmp_path / "m.arpa")
    assert "m.arpa, line " in str(error.value)


def test_files_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no ARPA file"):
        arpa.read(tmp_path / "missing.arpa")
    with pytest.raises(UserError, match="there is no ARPA file"):
        arpa.read(tmp_path)
    (tmp_path / "m.arpa.gz").write_bytes(gzip.compress(VALID.encode())[:-20])
    with pytest.raises(UserError, match="not a whole gzip file"):
        arpa.read(tmp_path / "m.arpa.gz")


def test_words_that_a_model_cannot_score_are_refused(tmp_path):
    for text in ("a <s> b", "a </s>", "<unk>"):
        with pytest.raises(UserError, match="text 1 contains <"):
            arpa.encode([text])
    (tmp_path / "m.arpa").write_text(VALID.replace("ngram 1=4", "ngram 1=3").replace("-1.5\t<unk>\n", ""))
    words = arpa.read(tmp_path / "m.arpa")[1]
    arpa.encode(["a a"], words)
    with pytest.raises(UserError, match=r"text 2 contains 'b', .* the model has no <unk>; add <unk>"):
        arpa.encode(["a", "a b"], words)
    with pytest.raises(UserError, match="have no <s> and no </s>"):
        arpa.encode(["a"], ("<unk>", "a"))


# KenLM itself


@pytest.mark.parity
def test_kenlm_reads_our_files_and_gives_the_same_scores(tmp_path):
    kenlm = pytest.importorskip("kenlm")
    model, words = fit_words(TEXTS, 5, fallback=ngrams.FALLBACK)
    arpa.write(tmp_path / "m.arpa", model, words)
    theirs, held_out = kenlm.Model(str(tmp_path / "m.arpa")), [*sentences(2, 50, 600), "w1 unheard w2"]
    encoded = arpa.encode(held_out, words)
    ours = np.add.reduceat(ngrams.log_probs(model, *encoded[:2]), encoded.bounds[:-1]) / np.log(10)
    np.testing.assert_allclose(ours, [theirs.score(text) for text in held_out], rtol=1e-5)


@pytest.mark.parity
@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="needs ../shared/data/wikitext2_valid_test")
def test_the_perplexity_on_wikitext_equals_that_of_lmplz(tmp_path):
    lmplz = shutil.which("lmplz")
    if lmplz is None:
        pytest.skip("needs KenLM's program lmplz on the PATH")
    read = lambda name: (
        gzip.decompress((WIKITEXT / name).read_bytes()).decode().replace("<unk>", "unk_").split("\n")[:-1]
    )
    train, held_out = read("valid.txt.gz"), read("test.txt.gz")
    result = subprocess.run([lmplz, "-o", "5", "-S", "500M"], input="\n".join(train).encode(), capture_output=True)
    (tmp_path / "theirs.arpa").write_bytes(result.stdout)
    perplexities = []
    for model, words in (fit_words(train, 5), arpa.read(tmp_path / "theirs.arpa")):
        encoded = arpa.encode(held_out, words)
        log_probs_N = ngrams.log_probs(model, *encoded[:2])
        perplexities.append(np.exp(-log_probs_N.sum() / (len(log_probs_N) - len(held_out))))
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-6)

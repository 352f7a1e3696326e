"""Word vectors: files, neighbours, skip-gram, GloVe, and initial embeddings of models."""

from __future__ import annotations

import gzip
import struct
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import (
    Classification,
    DataConfig,
    GloVeConfig,
    OptimizerConfig,
    RunConfig,
    SkipGramConfig,
    Stopped,
    TokenizerConfig,
    UserError,
    VectorsConfig,
    WordVectors,
    load_vectors,
    save_vectors,
)
from jaxlm.__main__ import main
from jaxlm.families import PRESETS
from jaxlm.vectors import cooccurrence, glove, skipgram
from jaxlm.vectors.embeddings import vectors_of_tokens
from jaxlm.vectors.words import number_words

FORMATS = ("word2vec", "word2vec_binary", "glove")
WORDS = ("the", "of", "été", "東京", "can't", "12", "\u00a0x")
VECTORS = WordVectors(WORDS, np.random.default_rng(0).normal(size=(len(WORDS), 5)).astype(np.float32) ** 9)


def binary(vectors: WordVectors = VECTORS) -> bytes:
    """Returns the binary format as word2vec.c writes it."""
    parts = [f"{len(vectors)} {vectors.width}\n".encode()]
    for word, vector in zip(vectors.words, vectors.vectors):
        parts.append(word.encode() + b" " + struct.pack(f"<{vectors.width}f", *vector) + b"\n")
    return b"".join(parts)


# Files


@pytest.mark.parametrize("format", FORMATS)
def test_files_restore_every_bit(format, tmp_path):
    file = save_vectors(VECTORS, tmp_path / "folder" / "vectors", format)
    (tmp_path / "v.gz").write_bytes(gzip.compress(file.read_bytes()))
    for path in (file, tmp_path / "v.gz"):
        found = load_vectors(path)
        assert found.words == WORDS
        np.testing.assert_array_equal(found.vectors, VECTORS.vectors)
    with pytest.raises(UserError, match="exists; choose another path"):
        save_vectors(VECTORS, file, format)
    assert save_vectors(VECTORS, file, format, overwrite=True) == file


def test_the_binary_format_is_that_of_word2vec(tmp_path):
    assert save_vectors(VECTORS, tmp_path / "v", "word2vec_binary").read_bytes() == binary()
    without_ends = binary().replace(b"\n", b"").replace(b"7 5", b"7 5\n")  # as some programs write it
    (tmp_path / "w").write_bytes(without_ends)
    np.testing.assert_array_equal(load_vectors(tmp_path / "w").vectors, VECTORS.vectors)


def test_text_may_have_crlf_blank_lines_and_words_with_spaces(tmp_path):
    (tmp_path / "v").write_bytes(b"a 1 2\r\n\r\n. . . 3 4 \r\nb 5 -6e-1\n\n")
    found = load_vectors(tmp_path / "v")
    assert found.words == ("a", ". . .", "b")
    np.testing.assert_array_equal(found.vectors, np.array([[1, 2], [3, 4], [5, -0.6]], np.float32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no word vectors"),
        (b"\n \n", "contains no word vectors"),
        (b"2 2\n", "0 bytes follow, which is too little"),
        (b"3 2\na 1.5 2\nb 3 4\n\n\n", "states 3 words, but 2 follow"),
        (b"1 2\na 1 2\nb 3 4\n", "states 1 words, but 2 follow"),
        (b"2 3\na 1 2\nb 3 4\n", "line 2: there are 2 numbers, but the width is 3"),
        (b"2 1\na 1 2\nb 3 4\n", "line 2: there are more than 1 numbers"),
        (b"999999999999 999999999999\na 1\n", "which is too little"),
        (b"0 2\n1 2 3", "too little"),
        (b"2 0\n1 2 3", "too little"),
        (b"a 1 2\nb 3\n", "line 2: there are 1 numbers, but the width is 2"),
        (b"a 1 2\nb 3 4 5\n", "line 2: there are more than 2 numbers"),
        (b"a 1 2\n\na 3 4\n", "the word 'a' has two vectors, number 1 and number 2"),
        (b"a 1 2\nb 3 x\n", "line 2: b'b 3 x' is not a word and 2 numbers"),
        (b"a 1 2\nb 3 nan\n", "the vector of 'b' has a number that is not a finite float32"),
        (b"a 1 2\nb 3 inf\n", "not a finite float32"),
        (b"a 1 2\nb 3 1e39\n", "not a finite float32"),
        ("é 1 2\n".encode("latin-1"), "is not utf-8; give its encoding"),
        (b"word\n", "there are 0 numbers"),
        (b"a 1 2\n 3 4\n", "line 2: the word is empty"),
        (b"\x80\x04\x95 a pickle", "is not utf-8"),
        (gzip.compress(b"a 1 2\n", mtime=0)[:-9], "is not a complete gzip file"),
        (binary(replace(VECTORS, words=WORDS[:-1], vectors=VECTORS.vectors[:-1])) + b"more", "bytes follow the last"),
        (b"2 1\na " + struct.pack("<f", 1) + b"\na " + struct.pack("<f", 2) + b"\n", "the word 'a' has two vectors"),
        (b"1 1\na " + struct.pack("<f", np.nan) + b"\n", "not a finite float32"),
        (b"1 1\n\xe9 " + struct.pack("<f", 1.1) + b"\n", "word 1: the word .* is not utf-8"),
    ],
)
def test_damaged_files_are_refused(content, message, tmp_path):
    file = tmp_path / ("v.gz" if content[:2] == b"\x1f\x8b" else "v")
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_vectors(file)
    assert str(file) in str(error.value)


def test_every_cut_off_binary_file_is_refused(tmp_path):
    for size in range(len(binary()) - 1):
        (tmp_path / "v").write_bytes(binary()[:size])
        with pytest.raises(UserError):
            load_vectors(tmp_path / "v")


def test_another_encoding_is_read(tmp_path):
    (tmp_path / "v").write_bytes("é 1 2\n".encode("latin-1"))
    assert load_vectors(tmp_path / "v", "latin-1").words == ("é",)
    with pytest.raises(UserError, match="encoding is 'latin-x'"):
        load_vectors(tmp_path / "v", "latin-x")


def test_paths_and_arguments_are_checked(tmp_path):
    for path, message in ((tmp_path, "contains no export/vectors"), (tmp_path / "v", "there is no file")):
        with pytest.raises(UserError, match=message):
            load_vectors(path)
    for word in ("a b", "a\n", "", "\ud800"):
        with pytest.raises(UserError, match=r"white space|not valid Unicode"):
            save_vectors(WordVectors([word], np.ones((1, 2))), tmp_path / "v")
    assert not (tmp_path / "v").exists()
    with pytest.raises(UserError, match="format is 'fasttext'; it must be one of word2vec"):
        save_vectors(VECTORS, tmp_path / "v", "fasttext")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="an address"):
        save_vectors(VECTORS, "gs://bucket/v")


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", FORMATS)
def test_gensim_reads_and_writes_the_same_files(format, tmp_path):
    gensim = pytest.importorskip("gensim")
    vectors = replace(VECTORS, words=[word.strip() for word in WORDS])
    options = {"binary": format == "word2vec_binary", "no_header": format == "glove"}
    read = gensim.models.KeyedVectors.load_word2vec_format
    theirs = read(str(save_vectors(vectors, tmp_path / "ours", format)), **options)
    assert tuple(theirs.index_to_key) == vectors.words
    np.testing.assert_array_equal(theirs.vectors, vectors.vectors)
    options["write_header"] = not options.pop("no_header")
    theirs.save_word2vec_format(str(tmp_path / "theirs"), **options)
    ours = load_vectors(tmp_path / "theirs")
    assert ours.words == vectors.words
    np.testing.assert_array_equal(ours.vectors, vectors.vectors)
    assert [word for word, _ in ours.most_similar("the", 3)] == [word for word, _ in theirs.most_similar("the", topn=3)]
    query = {"positive": ["of", "12"], "negative": ["the"], "topn": 3}
    for (word, cosine), (their_word, their_cosine) in zip(
        ours.analogy("the", "of", "12", 3), theirs.most_similar(**query)
    ):
        assert word == their_word and cosine == pytest.approx(their_cosine, abs=1e-5)


# Words and vectors


def test_neighbours_and_analogies_are_those_of_cosines():
    found = VECTORS.most_similar("of", 100)
    cosines = {word: VECTORS.similarity("of", word) for word in WORDS if word != "of"}
    assert [word for word, _ in found] == sorted(cosines, key=lambda word: -cosines[word])
    assert [cosine for _, cosine in found] == pytest.approx(sorted(cosines.values(), reverse=True), abs=1e-6)
    square = WordVectors("abcd", np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1]]))
    assert square.analogy("a", "b", "c", 1)[0][0] == "d"
    assert "of" in VECTORS and "in" not in VECTORS and len(VECTORS) == len(WORDS) and VECTORS.width == 5
    np.testing.assert_array_equal(VECTORS["of"], VECTORS.vectors[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WordVectors(["a"], np.ones((2, 3))), "1 words, and vectors of the shape \\(2, 3\\)"),
        (lambda: WordVectors(["a"], np.ones(3)), "one vector per word"),
        (lambda: WordVectors([], np.ones((0, 3))), "at least one word"),
        (lambda: WordVectors(["a", "a"], np.ones((2, 3))), "'a' has two vectors, 0 and 1"),
        (lambda: WordVectors(["a", 1], np.ones((2, 3))), "word 1 is 1; it must be a string"),
        (lambda: WordVectors(["a"], np.array([[np.nan]])), "the vector of 'a' is not finite"),
        (lambda: VECTORS.most_similar("th"), "'th' is not one of the 7 words with a vector; perhaps you meant 'the'"),
        (lambda: VECTORS.analogy("the", "of", None), "None is not one of the 7 words"),
        (lambda: VECTORS.most_similar("the", 0), "count is 0; it must be an integer, at least 1"),
        (lambda: VECTORS.most_similar("the", True), "count is True"),
    ],
)
def test_mistakes_in_words_and_vectors_are_reported(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_words_are_numbered_by_frequency():
    corpus = number_words([["b", "a", "b", ""], [], ["c", "b", "a"]], min_count=2)
    assert corpus.words == ("b", "a") and corpus.counts_V.tolist() == [3, 2] and corpus.read == 6
    assert corpus.tokens_N.tolist() == [0, 1, 0, 0, 1] and corpus.documents_N.tolist() == [0, 0, 0, 2, 2]
    assert number_words([["b", "a", "b"]], min_count=1, max_words=2).words == ("b", "a")
    with pytest.raises(UserError, match=r"1 of 3 words occur 3 times or more .the most frequent one: 3."):
        number_words([["b", "a", "b"], ["c", "b"]], min_count=3)


# Skip-gram

CONFIG = SkipGramConfig(shared=6, negatives=3, block=64)


def tables(V: int, D: int, seed: int = 0) -> dict[str, jax.Array]:
    words, contexts = np.random.default_rng(seed).normal(size=(2, V, D)).astype(np.float32) * 0.5
    return {"words": jnp.asarray(words), "contexts": jnp.asarray(contexts)}


def block_of(W: int, N: int = 64, V: int = 11, seed: int = 0) -> skipgram.Block:
    random = np.random.default_rng(seed)
    documents = np.sort(random.integers(0, 5, N + 2 * W))
    documents[-W - 3 :] = -1  # padding
    tokens, windows = random.integers(0, V, N + 2 * W), random.integers(1, W + 1, N)
    return skipgram.Block(*map(jnp.asarray, (tokens, documents, windows, random.integers(0, V, 6))))


def pairs_of(block: skipgram.Block) -> list[tuple[int, int]]:
    """Returns the places of the tokens of each pair, by the definition."""
    W = (len(block.tokens) - len(block.windows_N)) // 2
    documents, pairs = np.asarray(block.documents), []
    for i, window in enumerate(np.asarray(block.windows_N), W):
        near = [j for j in range(i - window, i + window + 1) if j != i]
        pairs += [(i, j) for j in near if documents[i] == documents[j] >= 0]
    return pairs


@pytest.mark.parametrize("W", [1, 5, 40])
def test_an_update_is_the_sum_over_pairs_of_the_gradients_of_the_definition(W):
    block, params = block_of(W), tables(11, 4)
    rate, weight = 0.1, CONFIG.negatives / CONFIG.shared
    tokens, x, y = (np.asarray(a, np.float64) for a in (block.tokens, params["words"], params["contexts"]))
    tokens = np.asarray(block.tokens)
    dx, dy, loss = np.zeros_like(x), np.zeros_like(y), 0.0
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    for i, j in pairs_of(block):
        a, targets = tokens[i], [(tokens[j], 1.0, 1.0)]
        targets += [(z, -1.0, weight) for z in np.asarray(block.negatives_S)]
        for b, sign, w in targets:
            slope = w * sign * sigmoid(-sign * x[a] @ y[b])
            dx[a], dy[b] = dx[a] + slope * y[b], dy[b] + slope * x[a]
            loss -= w * np.log(sigmoid(sign * x[a] @ y[b]))
    new = jax.jit(skipgram.update_block, static_argnums=(0, 4))(CONFIG, params, block, rate, np.inf)
    np.testing.assert_allclose(new["words"], x + rate * dx, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(new["contexts"], y + rate * dy, rtol=1e-4, atol=1e-4)
    found, count = jax.jit(skipgram.block_loss, static_argnums=0)(CONFIG, params, block)
    assert count == len(pairs_of(block)) and found == pytest.approx(loss, rel=1e-4)
    gradient = jax.jit(jax.grad(lambda p: skipgram.block_loss(CONFIG, p, block)[0]))(params)
    np.testing.assert_allclose(new["words"], params["words"] - rate * gradient["words"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(new["contexts"], params["contexts"] - rate * gradient["contexts"], rtol=1e-4, atol=1e-4)


def test_a_word_that_fills_an_update_does_not_move_far():
    """Sequential updates would stop when the loss is small. The sum of their gradients would not."""
    block = skipgram.Block(jnp.zeros(74, int), jnp.zeros(74, int), jnp.full(64, 5), jnp.ones(6, int))
    params, norms = tables(2, 4), []
    update = jax.jit(skipgram.update_block, static_argnums=0)
    for _ in range(200):
        params = update(CONFIG, params, block, 0.5)
        norms.append(float(max(jnp.abs(table).max() for table in params.values())))
    assert max(norms) < 20 and np.isfinite(norms[-1])


def test_subsampling_and_negative_words_have_the_rates_of_word2vec():
    counts = np.array([1000, 100, 10, 1])
    rates = skipgram.keep_rates(counts, 0.1)
    fraction = 1000 / 1111
    assert rates[0] == pytest.approx((np.sqrt(fraction / 0.1) + 1) * 0.1 / fraction) and (rates[2:] == 1).all()
    assert (skipgram.keep_rates(counts, 0) == 1).all()
    table = skipgram.negative_table(counts, 0.75)
    expected = counts**0.75 / (counts**0.75).sum()
    np.testing.assert_allclose(np.bincount(table, minlength=4) / len(table), expected, atol=1e-5)
    assert len(table) & (len(table) - 1) == 0


def text_of_topics(folder: Path, lines: int = 400) -> Path:
    """Writes lines with words of one of four topics, three words each, and common words."""
    random = np.random.default_rng(0)
    topics = [[f"{name}{i}" for i in range(3)] for name in ("sea", "sky", "city", "farm")]
    rows = []
    for _ in range(lines):
        topic = topics[random.integers(4)]
        rows.append(" ".join(random.choice([*topic, *topic, "the", "of"], 12)))
    (folder / "text.txt").write_text("\n".join(rows))
    return folder / "text.txt"


def run_of(tmp_path: Path, method: str = "skip_gram", **changes) -> VectorsConfig:
    path = tmp_path / "text.txt"
    data = DataConfig(path=str(path if path.exists() else text_of_topics(tmp_path)))
    fields = {
        "epochs": 60 if method == "glove" else 30,
        "data": data,
        "width": 8,
        "min_count": 1,
        "workdir": str(tmp_path / "run"),
    }
    glove_config = GloVeConfig(block=16) if method == "glove" else GloVeConfig()
    run = VectorsConfig(method=method, glove=glove_config, **fields)  # type: ignore[arg-type]
    if method == "skip_gram":
        run = replace(run, skip_gram=SkipGramConfig(rate=0.1, block=32, shared=16, subsample=0.1))
    return replace(run, **changes)


@pytest.mark.parametrize("method", ["skip_gram", "glove"])
def test_words_of_one_topic_are_neighbours_and_a_stopped_run_gives_the_same(method, tmp_path, capsys):
    run = run_of(tmp_path, method)
    vectors = jaxlm.fit_vectors(run)
    assert len(vectors) == 14 and vectors.width == 8
    for word in vectors.words:
        if word not in ("the", "of"):
            near = {near[:-1] for near, _ in vectors.most_similar(word, 2)}
            assert near == {word[:-1]}, (word, vectors.most_similar(word, 3))
    assert "The nearest words" in (tmp_path / "run" / "report.html").read_text()
    again = jaxlm.fit_vectors(run)  # finished
    np.testing.assert_array_equal(again.vectors, vectors.vectors)
    other = replace(run, workdir=str(tmp_path / "stopped"))
    calls: list[int] = []
    with pytest.raises(Stopped, match="the same command resumes from here"):
        jaxlm.fit_vectors(other, stop=lambda: calls.append(0) or len(calls) == 7)
    np.testing.assert_array_equal(jaxlm.fit_vectors(other).vectors, vectors.vectors)
    assert "resuming  at step 7" in capsys.readouterr().err
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "stopped")]
    losses = [[line.split(",")[1] for line in log.splitlines()] for log in logs]
    assert losses[0] == losses[1]
    with pytest.raises(UserError, match="contains another run"):
        jaxlm.fit_vectors(replace(run, width=9))
    with pytest.raises(UserError, match="contains word vectors, not a model; load them"):
        jaxlm.load(run.workdir)


def test_batches_are_pure_and_an_epoch_contains_every_token(tmp_path, monkeypatch):
    monkeypatch.setattr(skipgram, "MAX_BATCH", 100)
    run = run_of(tmp_path, skip_gram=SkipGramConfig(block=32, subsample=0.0))
    trainer, other = (skipgram.SkipGram(run, jaxlm.vectors.words.read_corpus(run)) for _ in range(2))
    epoch = trainer.steps // run.epochs
    counts = Counter[int]()
    for step in range(epoch):
        batch, W = trainer.batch(step), run.window
        counts.update(batch["tokens"][W : W + int(batch["count"])].tolist())
    assert [counts[i] for i in range(len(counts))] == trainer.corpus.counts_V.tolist()
    for step in (5, 3):
        first, second = trainer.batch(step), other.batch(step)
        assert all((first[name] == second[name]).all() for name in first)


# GloVe


def test_cooccurrences_are_those_of_the_definition(monkeypatch):
    monkeypatch.setattr(cooccurrence, "CHUNK", 7)
    random = np.random.default_rng(0)
    texts = [[f"w{i}" for i in random.integers(0, 6, size)] for size in (9, 1, 0, 12, 30)]
    corpus = number_words(texts, 1)
    expected = Counter[tuple[int, int]]()
    numbers = {word: i for i, word in enumerate(corpus.words)}
    for text in texts:
        for i, first in enumerate(text):
            for j in range(max(0, i - 4), min(len(text), i + 5)):
                if i != j:
                    expected[numbers[first], numbers[text[j]]] += 1 / abs(i - j)
    found = cooccurrence.count_pairs(corpus, 4)
    assert {(int(a), int(b)) for a, b in zip(found.rows_E, found.columns_E)} == expected.keys()
    for a, b, count in zip(*found):
        assert count == pytest.approx(expected[int(a), int(b)], rel=1e-6)


def test_a_glove_update_follows_the_gradient_and_the_reference_implementation():
    random, V, D = np.random.default_rng(0), 6, 3
    shapes = {"words": (V, D), "contexts": (V, D), "word_biases": (V,), "context_biases": (V,)}
    params = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    squares = {f"{name}_squares": 1 + jnp.abs(table) for name, table in params.items()}
    block = {"rows_E": jnp.array([0, 1, 2]), "columns_E": jnp.array([2, 3, 1]), "logs_E": jnp.array([0.0, 2.0, 5.0])}
    block["weights_E"] = jnp.asarray(glove.pair_weights(GloVeConfig(), np.exp(np.asarray(block["logs_E"]))))
    assert block["weights_E"][2] == 1 and block["weights_E"][0] == pytest.approx(100**-0.75)
    new, loss = jax.jit(glove.update_block, static_argnums=0)(GloVeConfig(), params | squares, block)
    assert loss == pytest.approx(float(glove.block_loss(params, block)), rel=1e-5)
    gradient = jax.grad(partial(glove.block_loss, block=block))(params)
    for name, table in params.items():
        step = 0.05 * gradient[name]
        total = squares[f"{name}_squares"] + step**2
        np.testing.assert_allclose(new[f"{name}_squares"], total, rtol=1e-5)
        np.testing.assert_allclose(new[name], table - step / np.sqrt(total), rtol=1e-4, atol=1e-6)


# Configs and the command line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig()}, "data.path is empty"),
        ({"data": DataConfig(path="missing.txt")}, "missing.txt"),
        ({"skip_gram": SkipGramConfig(block=33)}, "skip_gram.block is 33; it must be a multiple of 32, such as 32"),
        ({"skip_gram": SkipGramConfig(rate=1e-5)}, "skip_gram.final_rate is 0.0001, above skip_gram.rate 1e-05"),
        ({"glove": GloVeConfig(rate=1.0)}, "fields of glove are set, which have no effect if method is skip_gram"),
        ({"width": 0}, "width is 0"),
        ({"method": "cbow"}, "method is 'cbow'"),
        ({"pattern": "("}, "pattern is"),
        ({"min_count": 10**6}, "lower --min-count"),
        ({"pattern": "x+y"}, "0 of 0 words"),
    ],
)
def test_mistakes_in_a_config_are_reported(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        jaxlm.fit_vectors(run_of(tmp_path, **changes))


def test_glove_requires_pairs(tmp_path):
    (tmp_path / "text.txt").write_text("a\nb\na\nb\n")
    with pytest.raises(UserError, match="no two words of the data occur in one document"):
        jaxlm.fit_vectors(run_of(tmp_path, "glove"))


def test_the_command_line_trains_vectors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text_of_topics(tmp_path)
    command = ["train", "word2vec", "--data.path", "text.txt", "--width", "4", "--epochs", "1"]
    assert main(command) == 0
    assert load_vectors("runs/word2vec").width == 4
    for more, message in (
        (["--data.length", "8"], "has no effect on word vectors"),
        (["--sweep", "width=2,3"], "--sweep is not available for word vectors"),
        (["--window", "0"], "window is 0"),
    ):
        assert main(command + more) == 2 and message in capsys.readouterr().err
    assert main(["plan", "word2vec"]) == 2 and "trains word vectors" in capsys.readouterr().err


# Embeddings of models


def embedding_run(tmp_path: Path, **changes) -> RunConfig:
    rows = [f"{'pos' if i % 2 else 'neg'}\tsea sky {'good' if i % 2 else 'bad'} city" for i in range(40)]
    (tmp_path / "rows.tsv").write_text("\n".join(["label\ttext", *rows]))
    words = ["Sea", "sky", "good", "bad", "the"]
    vectors = WordVectors([word.lower() for word in words], np.arange(20, dtype=np.float32).reshape(5, 4) / 10)
    if not (tmp_path / "v").exists():
        save_vectors(vectors, tmp_path / "v", "glove")
    run = RunConfig(
        model=replace(PRESETS["lstm-classifier"], vocabulary=37, width=4, embedding_width=None, layers=1),
        task=Classification(),
        tokenizer=TokenizerConfig(train="wordpiece", lowercase=True),
        data=DataConfig(path=str(tmp_path / "rows.tsv"), length=16, cache=str(tmp_path / "cache")),
        optimizer=OptimizerConfig(freeze="embeddings"),
        steps=2,
        batch=8,
        embeddings=str(tmp_path / "v"),
        workdir=str(tmp_path / "run"),
    )
    return replace(run, **changes)


@pytest.mark.long
def test_a_model_starts_from_word_vectors(tmp_path, capsys):
    run = embedding_run(tmp_path)
    lm = jaxlm.fit(run)
    assert "vectors   4 of" in capsys.readouterr().err
    table, vectors = np.asarray(lm.params["embeddings"]["tokens"]), load_vectors(tmp_path / "v")
    plain = jaxlm.fit(replace(run, embeddings="", workdir=str(tmp_path / "plain")))
    random = np.asarray(plain.params["embeddings"]["tokens"])
    for token, word in enumerate(lm.tokenizer.pieces(range(lm.config.vocabulary))):
        expected = vectors[word] if word in vectors else random[token]
        np.testing.assert_array_equal(table[token], expected)
    resumed = replace(run, optimizer=OptimizerConfig(freeze="embeddings"), steps=2)
    np.testing.assert_array_equal(np.asarray(jaxlm.fit(resumed).params["embeddings"]["tokens"]), table)


def test_vectors_that_do_not_fit_a_model_are_refused(tmp_path):
    run = embedding_run(tmp_path)
    save_vectors(WordVectors(["sea"], np.ones((1, 3))), tmp_path / "narrow")
    save_vectors(WordVectors(["zug"], np.ones((1, 4))), tmp_path / "german")
    for name, message in (
        (
            "narrow",
            "narrow have the width 3, but the embeddings of the model have 4; set --model.width 3",
        ),
        ("german", "none of the .* tokens that are whole words has a vector in .*german, whose first words are 'zug'"),
        ("missing", "there is no file"),
    ):
        with pytest.raises(UserError, match=message):
            jaxlm.fit(replace(run, embeddings=str(tmp_path / name)))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe", "byte_bpe"])
def test_every_kind_of_tokenizer_finds_its_whole_words(kind):
    from jaxlm.data.tokenizers import tokenizer as tokenizers

    texts = ["the sea and the sky, the city by the sea", "a sea of sky; seaside"] * 20
    size = {"wordpiece": 36, "byte_bpe": 280}.get(kind, 280)
    tokenizer = tokenizers.train(texts, TokenizerConfig(train=kind), size, add_bos=True, add_eos=True)
    words = ["the", "sea", "sky", ",", "e", "a"]
    vectors = WordVectors(words, np.arange(12, dtype=np.float32).reshape(6, 2))
    model = replace(PRESETS["lstm-classifier"], vocabulary=size, width=2, embedding_width=None)
    found = vectors_of_tokens(vectors, tokenizer, model, "v")
    pieces = tokenizer.pieces(found.ids_N)
    assert {"sea", "the", ","} & {piece.lstrip(" ▁Ġ") for piece in pieces}
    assert all(piece.lstrip(" ▁Ġ") in words or piece == "<0x2C>" for piece in pieces)
    for piece, vector in zip(pieces, found.vectors_ND):
        assert not piece.startswith("##")
        np.testing.assert_array_equal(vector, vectors["," if piece == "<0x2C>" else piece.lstrip(" ▁Ġ")])
    whole = {word: i for i, word in tokenizer.whole_words.items()}
    if kind in ("wordpiece", "byte_bpe"):  # the token of the word in a text, not one that continues a word
        assert whole["sea"] == tokenizer.encode("a sea")[-1]

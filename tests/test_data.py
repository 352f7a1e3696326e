"""Rows contain every example once, batches are a function of the step, and text is tokenized once."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.config import CausalLM, CleaningConfig, DataConfig, MaskedLM, ModelConfig, RunConfig, TokenizerConfig
from jaxlm.data import source, tokenizing
from jaxlm.data.ahead import prefetch
from jaxlm.data.batches import Batches, Epoch
from jaxlm.data.corpus import Corpus, prepare
from jaxlm.data.joined import join
from jaxlm.data.pack import pack
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.storage import disk

# Packing.


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 20), max_size=200),
    st.integers(20, 40),
    st.integers(1, 6),
    st.sampled_from([1, 7, 64, 1 << 16]),
)
def test_each_example_is_in_one_row_that_it_fits(lengths, length, max_examples, window):
    rows = pack(np.array(lengths, np.int64), length, max_examples, window)
    assert sorted(rows.examples.tolist()) == list(range(len(lengths)))
    assert rows.starts[0] == 0
    assert rows.starts[-1] == len(lengths)
    for a, b in zip(rows.starts, rows.starts[1:]):
        inside = rows.examples[a:b]
        assert 1 <= len(inside) <= max_examples
        assert sum(lengths[i] for i in inside) <= length
        assert len(set(inside // window)) == 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=100), st.integers(20, 40), st.integers(1, 6), st.integers(1, 3))
@example([1, 1, 3, 13, 13, 13, 16], 31, 4, 1)
def test_packing_is_best_fit_decreasing(lengths, length, max_examples, count):
    """The reference places one unit after another into the row with the least space that suffices.

    Of rows with the same space, it takes the one with the fewest examples.
    """
    max_examples += count - 1
    rows: list[list[int]] = []
    for size in sorted(lengths, reverse=True):
        suitable = [row for row in rows if length - sum(row) >= size and (len(row) + 1) * count <= max_examples]
        if suitable:
            min(suitable, key=lambda row: (length - sum(row), len(row))).append(size)
        else:
            rows.append([size])
    found = pack(np.array(lengths, np.int64), length, max_examples, counts=np.full(len(lengths), count))
    sums = [sum(lengths[i] for i in found.examples[a:b]) for a, b in zip(found.starts, found.starts[1:])]
    assert sorted(sums) == sorted(map(sum, rows))


@pytest.mark.parametrize("seed", range(3))
def test_rows_contain_little_padding(seed):
    random = np.random.default_rng(seed)
    for lengths in (random.integers(1, 129, 5000), 1 + random.geometric(1 / 14, 5000).clip(max=127)):
        rows = len(pack(lengths, 128, 128).starts) - 1
        assert lengths.sum() / (rows * 128) > 0.97
        # Best fit decreasing requires at most 11/9 of the minimum number of rows, plus a constant (Johnson 1973).
        assert rows <= 11 / 9 * -(-lengths.sum() // 128) + 4


def test_many_examples_are_packed_fast():
    lengths = np.random.default_rng(0).integers(1, 60, 100_000)
    start = time.process_time()
    pack(lengths, 512, 64)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("lengths", [[3, 0], [9], [-1]], ids=str)
def test_examples_that_fit_no_row_raise_an_error(lengths):
    with pytest.raises(ValueError, match="do not fit rows of 8"):
        pack(np.array(lengths), 8, 4)


def test_no_examples_make_no_rows():
    assert pack(np.zeros(0, np.int64), 8, 4).starts.tolist() == [0]


# Batches.


class Numbered:
    """Examples of random lengths. Each token of an example is 1000 x epoch + number of the example."""

    fields = {"labels_BE": np.int32}
    labels = 0

    def __init__(self, count: int = 37):
        self.lengths = np.random.default_rng(count).integers(1, 9, count)

    def epoch(self, n: int | None) -> Epoch:
        lengths = self.lengths if n is None else np.roll(self.lengths, n)  # some tasks draw new lengths in each epoch
        example = lambda i: {"tokens_BT": np.full(lengths[i], 1000 * (n or 0) + i), "labels_BE": i}
        return Epoch(lengths, lambda units: join([example(i) for i in units]))


def training_batches(seed: int = 3) -> Batches:
    return Batches(Numbered(), rows=4, length=16, max_examples=5, seed=seed)


def assert_same(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_batch_is_a_function_of_the_step():
    batches = training_batches()
    forward = [batches.batch_at(step) for step in range(40)]
    for step in np.random.default_rng(0).permutation(40):
        assert_same(batches.batch_at(int(step)), forward[step])
    assert_same(training_batches().batch_at(39), forward[39])  # without the batches before it
    assert_same(training_batches().batch_at(17), forward[17])
    assert any(np.any(forward[0][f] != training_batches(seed=4).batch_at(0)[f]) for f in forward[0])


def test_full_rows_are_filled_in_any_order():
    class Full(Numbered):
        def __init__(self):
            self.lengths = np.full(12, 8)

    batches = Batches(Full(), rows=3, length=16, max_examples=2, seed=0)
    rows = [batches.fill([(index, 0)]) for index in range(3)]
    found = batches.fill([(0, 2), (1, 0), (2, 1)])
    for index, place in enumerate((2, 0, 1)):
        assert_same({name: x[place] for name, x in found.items()}, {name: x[0] for name, x in rows[index].items()})


def test_a_resumed_run_builds_no_earlier_epoch():
    batches = training_batches()
    expected = [batches.batch_at(step) for step in range(100)]
    resumed, built = training_batches(), []
    resumed.resume(json.loads(json.dumps(batches.progress())))
    make = resumed._make_epoch
    resumed._make_epoch = lambda n: built.append(n) or make(n)
    for step in (90, 91, 99):
        assert_same(resumed.batch_at(step), expected[step])
    assert min(built) > 10


def test_the_next_epoch_is_built_ahead_by_another_thread():
    batches, threads = training_batches(), {}
    make = batches._make_epoch
    batches._make_epoch = lambda n: threads.setdefault(n, threading.current_thread()) and make(n)
    rows = batches.rows_in_epoch
    batches.fill([(0, 0)])
    assert list(threads) == [0]
    batches.fill([(rows - 1, 0)])
    while 1 not in batches._epochs:
        time.sleep(0.001)
    batches._epochs[1].result()
    assert threads[0] is threading.main_thread() is not threads[1]
    evaluation = Batches(Numbered(), rows=4, length=16, max_examples=5, seed=None)
    for step in range(len(evaluation)):
        evaluation.batch_at(step)
    assert list(evaluation._epochs) == [0]


def test_an_error_in_an_epoch_built_ahead_is_raised_where_the_epoch_begins():
    batches = training_batches()
    make = batches._make_epoch

    def broken(n: int):
        if n == 1:
            raise UserError("epoch 1 is bad")
        return make(n)

    batches._make_epoch = broken
    rows = batches.rows_in_epoch
    batches.fill([(rows - 1, 0)])
    with pytest.raises(UserError, match="epoch 1 is bad"):
        batches.fill([(rows, 0)])


@pytest.mark.parametrize("seed", [None, 3])
def test_threads_share_batches(seed):
    make = lambda: Batches(Numbered(), rows=4, length=16, max_examples=5, seed=seed)
    alone = make()
    expected = [alone.batch_at(step) for step in range(30)]
    for _ in range(5):
        shared = make()
        with ThreadPoolExecutor(8) as pool:
            for step, batch in enumerate(pool.map(shared.batch_at, range(30))):
                assert_same(batch, expected[step])


def test_training_epochs_are_consecutive_and_contain_every_example_once():
    batches = training_batches()
    rows = [len(batches._make_epoch(n)[1].starts) - 1 for n in range(5)]
    assert sum(rows[:3]) % 4  # the batches do not divide the epochs
    seen = []
    for step in range(sum(rows) // 4):
        batch = batches.batch_at(step)
        for b in range(4):
            filled = batch["segments_BT"][b] > 0
            assert filled.any()  # no row is padding
            seen.append(set(batch["tokens_BT"][b][filled].tolist()))
    orders = []
    for n, start in enumerate(np.cumsum([0, *rows[:-1]])):
        found = [token for row in seen[start : start + rows[n]] for token in row]
        if len(seen) >= start + rows[n]:
            assert sorted(found) == [1000 * n + i for i in range(37)]
            orders.append([token - 1000 * n for token in found])
    assert len(orders) >= 4
    assert orders[0] != orders[1] != orders[2]


def test_evaluation_contains_every_example_once_and_padding_at_the_end():
    batches = Batches(Numbered(), rows=4, length=16, max_examples=5, seed=None)
    seen, padding = [], []
    for step in range(len(batches)):
        batch = batches.batch_at(step)
        seen += batch["labels_BE"][batch["weights_BE"] > 0].tolist()
        padding += (~(batch["segments_BT"] > 0).any(1)).tolist()
    assert sorted(seen) == list(range(37))
    assert padding == sorted(padding)
    assert sum(padding) < 4
    for value in batches.batch_at(len(batches)).values():
        assert not value.any()


def test_a_batch_contains_the_positions_of_its_examples():
    batch = training_batches().batch_at(2)
    assert {n: x.dtype for n, x in batch.items()} == {
        **dict.fromkeys(("tokens_BT", "segments_BT", "positions_BT", "labels_BE", "starts_BE"), np.dtype("int32")),
        "weights_BE": np.dtype("float32"),
    }
    for b in range(4):
        for e in range(int(batch["weights_BE"][b].sum())):
            positions = np.flatnonzero(batch["segments_BT"][b] == e + 1)
            assert positions[0] == batch["starts_BE"][b, e]
            assert positions.tolist() == list(range(positions[0], positions[0] + len(positions)))
            assert batch["positions_BT"][b, positions].tolist() == list(range(len(positions)))
            assert set(batch["tokens_BT"][b, positions] % 1000) == {batch["labels_BE"][b, e]}


def test_prefetch_yields_the_same_batches_in_order_and_leaves_no_thread():
    batches = training_batches()
    for step, batch in enumerate(prefetch(batches.batch_at, range(5, 12)), start=5):
        assert_same(batch, training_batches().batch_at(step))
    assert step == 11
    before = threading.active_count()
    calls: list[int] = []

    def slow(step: int):
        calls.append(step)
        time.sleep(0.01)
        return {}

    abandoned = prefetch(slow, range(10_000))
    next(abandoned)
    assert threading.active_count() == before + 1
    abandoned.close()
    assert threading.active_count() == before
    assert len(calls) < 10


def test_prefetch_raises_an_error_of_the_data():
    def broken(step: int):
        if step == 2:
            raise UserError("row 2 is bad")
        return {}

    batches = []
    with pytest.raises(UserError, match="row 2 is bad"):
        batches.extend(prefetch(broken, range(10)))
    assert threading.active_count() < 20


# Corpora.

TEXT = "".join(f"line {i} of a text, naïve or 😀\n" for i in range(200))
QUIET = lambda message: None


def make_run(folder: Path, text: str | None = TEXT, **data) -> RunConfig:
    if text is not None:
        (folder / "text.txt").write_bytes(text.encode())
    return RunConfig(
        model=ModelConfig(vocabulary=80),
        data=DataConfig(path=str(folder / "text.txt"), cache=str(folder / "cache"), **data),
        tokenizer=TokenizerConfig(train="characters"),
    )


def text_of(prepared, corpus: Corpus) -> str:
    return prepared.tokenizer.decode(np.asarray(corpus.tokens))


def documents_of(prepared, corpus: Corpus) -> list[str]:
    bounds = corpus.bounds
    return [prepared.tokenizer.decode(corpus.tokens[a:b]) for a, b in zip(bounds, bounds[1:])]


def assert_equal(a: Corpus, b: Corpus) -> None:
    for x, y in zip(a, b):
        np.testing.assert_array_equal(x, y)


def test_tokenized_text_is_read_from_the_cache(tmp_path):
    run, messages = make_run(tmp_path), []
    first = prepare(run, messages.append)
    assert messages == [
        "training a characters tokenizer of 80 tokens",
        "tokenizing the train text",
        "tokenizing the held-out text",
    ]
    again = prepare(run, messages.append)
    assert len(messages) == 3
    assert_equal(first.train, again.train)
    assert_equal(first.held_out, again.held_out)
    assert again.rows == first.rows == {"rows": 200, "documents": 200}
    assert again.fingerprint == first.fingerprint
    assert again.tokenizer.size == first.tokenizer.size
    # The key of the entry contains neither the path of the data nor the length of a row.
    (tmp_path / "elsewhere").mkdir()
    moved = make_run(tmp_path / "elsewhere", length=7)
    moved = dataclasses.replace(moved, data=dataclasses.replace(moved.data, cache=run.data.cache))
    prepare(moved, messages.append)
    assert len(messages) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


def count_reads(monkeypatch) -> list[str]:
    """Returns a list that grows with each read of the data."""
    reads: list[str] = []
    documents = source.documents
    monkeypatch.setattr(source, "documents", lambda path, *rest: reads.append(path) or documents(path, *rest))
    return reads


class CrashError(Exception):
    """Ends a call like a killed process: nothing is saved or removed."""


@pytest.mark.parametrize("crash", [0, 1, 5, 30])
@pytest.mark.parametrize("task", [CausalLM(), MaskedLM(next_sentence=True)], ids=["whole", "sentences"])
def test_tokenizing_continues_after_a_crash(tmp_path, monkeypatch, task, crash):
    run = dataclasses.replace(make_run(tmp_path, TEXT * 4), task=task, tokenizer=TokenizerConfig(train="wordpiece"))
    run = dataclasses.replace(run, model=ModelConfig(vocabulary=200))
    expected = prepare(run, QUIET)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, cache=str(tmp_path / "other")))
    monkeypatch.setattr(tokenizing, "CHUNK", 500)
    monkeypatch.setattr(tokenizing, "SECONDS_BETWEEN_SAVES", 0)
    reads, encoded = count_reads(monkeypatch), []
    encode = Tokenizer.encode_batch

    def interrupted(self, texts, *rest):
        if len(encoded) == crash:
            raise CrashError
        encoded.append(texts)
        return encode(self, texts, *rest)

    monkeypatch.setattr(tokenizing, "THREADS", 1)
    monkeypatch.setattr(Tokenizer, "encode_batch", interrupted)
    with pytest.raises(CrashError):
        prepare(run, QUIET)
    (left,) = (tmp_path / "other").iterdir()
    assert left.name.endswith(".partial") and reads == [run.data.path]
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, *rest: encoded.append(rest[0]) or encode(self, *rest))
    messages: list[str] = []
    again = prepare(run, messages.append)
    assert_equal(again.train, expected.train)
    assert_equal(again.held_out, expected.held_out)
    assert again.rows == expected.rows and again.tokenizer.size == expected.tokenizer.size
    assert reads == [run.data.path] and not any("training" in line for line in messages)
    # At most the chunks in flight are tokenized twice.
    text = sum(len(text) for chunk in encoded for text in chunk)
    assert text <= sum(corpus.bytes for corpus in (again.train, again.held_out)) + 3 * 1000
    assert [path.name for path in (tmp_path / "other").iterdir()] == [left.name.removesuffix(".partial")]


@pytest.mark.parametrize("damage", ["longer", "missing", "shorter"])
def test_unfinished_files_that_differ_from_their_record_are_not_used(tmp_path, monkeypatch, damage):
    run = make_run(tmp_path)
    expected = prepare(run, QUIET)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, cache=str(tmp_path / "other")))
    finish = tokenizing.finish
    monkeypatch.setattr(tokenizing, "finish", lambda *_: (_ for _ in ()).throw(CrashError))
    with pytest.raises(CrashError):
        prepare(run, QUIET)
    (tokens,) = (tmp_path / "other").glob("*.partial/train/tokens.bin")
    {
        "longer": lambda: tokens.write_bytes(tokens.read_bytes() + b"123"),
        "missing": tokens.unlink,
        "shorter": lambda: tokens.write_bytes(tokens.read_bytes()[:-4]),
    }[damage]()
    monkeypatch.setattr(tokenizing, "finish", finish)
    again = prepare(run, QUIET)
    assert_equal(again.train, expected.train)
    assert_equal(again.held_out, expected.held_out)


def test_a_mistake_in_the_data_leaves_no_unfinished_files(tmp_path):
    run = dataclasses.replace(make_run(tmp_path), model=ModelConfig(vocabulary=5))
    with pytest.raises(UserError):
        prepare(run, QUIET)
    assert not [*(tmp_path / "cache").iterdir()]


def test_an_entry_that_another_process_writes_is_written_apart(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    expected = prepare(run, QUIET)
    (entry,) = (tmp_path / "cache").iterdir()
    shutil.rmtree(entry)
    locked = lambda *_: (_ for _ in ()).throw(UserError("another process holds the lock"))
    monkeypatch.setattr(disk, "lock", locked)
    assert_equal(prepare(run, QUIET).train, expected.train)
    assert [*(tmp_path / "cache").iterdir()] == [entry]


def test_the_progress_of_a_long_text_is_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "CHUNK", 1000)
    monkeypatch.setattr(tokenizing, "SECONDS_BETWEEN_LINES", 0)
    messages: list[str] = []
    prepare(make_run(tmp_path), messages.append)
    lines = [line for line in messages if line.startswith("tokenizing the train text: ")]
    assert len(lines) >= 5
    assert all(re.search(r": 0 of 0 MB, [0-9,]+ tokens, [0-9.]+ MB/s(, 0:00 left)?$", line) for line in lines), lines


CHANGES = {
    "data": lambda run: Path(run.data.path).write_text(TEXT + "more\n") and run,
    "documents": lambda run: dataclasses.replace(run, data=dataclasses.replace(run.data, documents="file")),
    "cleaning": lambda run: dataclasses.replace(
        run, data=dataclasses.replace(run.data, cleaning=CleaningConfig(whitespace=True))
    ),
    "tokenizer": lambda run: dataclasses.replace(run, tokenizer=TokenizerConfig(train="wordpiece")),
    "vocabulary": lambda run: dataclasses.replace(run, model=ModelConfig(vocabulary=81)),
    "held out": lambda run: dataclasses.replace(run, data=dataclasses.replace(run.data, eval_fraction=0.2)),
    "sentences": lambda run: dataclasses.replace(run, task=MaskedLM(next_sentence=True)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_text_is_tokenized_again_if_an_input_changes(tmp_path, name):
    run, messages = make_run(tmp_path), []
    prepare(run, QUIET)
    prepare(CHANGES[name](run), messages.append)
    assert messages


def _replace(file: Path, make: Callable[[Path], None]) -> None:
    file.unlink()
    make(file)


def _swap(file: Path) -> None:
    """Exchange the contents of a file and of another file of the entry."""
    other = next(f for f in sorted(file.parent.iterdir(), reverse=True) if f.is_file() and f != file)
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "emptied": lambda file: file.write_bytes(b""),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 1),
    "halved": lambda file: os.truncate(file, file.stat().st_size // 2),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "one bit": lambda file: file.write_bytes(bytes([(content := file.read_bytes())[0] ^ 1]) + content[1:]),
    "swapped": _swap,
    "missing": Path.unlink,
    "wrong JSON type": lambda file: file.write_text("[1, 2]" if file.suffix == ".json" else "{}"),
    "null": lambda file: file.write_text("null"),
    "deep": lambda file: file.write_text("[" * 100_000),
    "a folder": lambda file: _replace(file, Path.mkdir),
    "a pipe": lambda file: _replace(file, os.mkfifo),
    "a broken link": lambda file: _replace(file, lambda path: path.symlink_to("gone")),
    "a link to itself": lambda file: _replace(file, lambda path: path.symlink_to(path.name)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_rebuilt_with_a_message(tmp_path, damage):
    """Each damage is applied to each file of an entry. The times of the file and of the data stay the same."""
    run = make_run(tmp_path, TEXT[:1500])
    first = prepare(run, QUIET)
    (entry,) = (tmp_path / "cache").iterdir()
    names = [file.relative_to(entry) for file in sorted(entry.rglob("*")) if file.is_file()]
    assert len(names) >= 12
    for name in names:
        times, messages = os.stat(entry / name), list[str]()
        DAMAGE[damage](entry / name)
        if (entry / name).is_file():
            os.utime(entry / name, ns=(times.st_atime_ns, times.st_mtime_ns))
        again = prepare(run, messages.append)
        assert str(entry) in messages[0] and "damaged" in messages[0] and messages[0].endswith("tokenizing again"), name
        assert_equal(first.train, again.train)
        assert_equal(first.held_out, again.held_out)
        assert again.rows == first.rows and again.tokenizer.size == first.tokenizer.size
        prepare(run, messages.append)
        assert "tokenizing the held-out text" in messages[-1]  # the second call adds no message
    assert [*(tmp_path / "cache").iterdir()] == [entry]


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.symlink_to("gone"), Path.mkdir])
def test_an_invalid_entry_is_rebuilt(tmp_path, make):
    run, messages = make_run(tmp_path), []
    first = prepare(run, QUIET)
    (entry,) = (tmp_path / "cache").iterdir()
    shutil.rmtree(entry)
    make(entry)
    assert_equal(first.train, prepare(run, messages.append).train)
    assert "damaged" in messages[0]


@settings(deadline=None, max_examples=25)
@given(
    st.text(st.sampled_from("ab \n\u00e9\u20ac\U0001f600"), min_size=30, max_size=60),
    st.floats(0.1, 0.9),
)
def test_a_file_is_split_at_the_byte_and_no_byte_is_lost(tmp_path_factory, text, fraction):
    folder = tmp_path_factory.mktemp("cut")
    run = make_run(folder, text, documents="file", eval_fraction=fraction)
    size = len(text.encode())
    prepared = prepare(run, QUIET)
    assert prepared.train.bytes + prepared.held_out.bytes == size
    cut = round(size * (1 - fraction))
    assert cut - 3 <= prepared.train.bytes <= cut  # a character of up to four bytes is not divided
    vocabulary = set(text.encode()[:cut].decode(errors="ignore"))
    # The tokenizer is trained on the training part alone.
    expected = "".join(c if c in vocabulary else "" for c in text)
    assert text_of(prepared, prepared.train) + text_of(prepared, prepared.held_out) == expected


def test_documents_stay_whole_at_the_split(tmp_path):
    lines = [f"{'x' * (i % 7)} line {i}" for i in range(50)]
    for fraction in (0.1, 0.33, 0.5):
        run = make_run(tmp_path, "\n".join(lines) + "\n", eval_choice="last", eval_fraction=fraction)
        prepared = prepare(run, QUIET)
        train, held_out = (documents_of(prepared, c) for c in (prepared.train, prepared.held_out))
        assert train + held_out == lines
        total = sum(map(len, lines))
        assert prepared.train.bytes + prepared.held_out.bytes == total
        assert prepared.held_out.bytes <= fraction * total < prepared.held_out.bytes + 20


def test_documents_have_special_tokens_and_sentences_have_none(tmp_path):
    prepared = prepare(make_run(tmp_path), QUIET)
    tokenizer = prepared.tokenizer
    first = prepared.train.tokens[slice(*prepared.train.bounds[:2])]
    assert first[0] == tokenizer.bos
    assert first[-1] == tokenizer.eos
    text = "One here. Two there! Three?\nOne more. And on.\n" * 20
    task = MaskedLM(next_sentence=True, sentences="punctuation")
    run = dataclasses.replace(make_run(tmp_path, text, eval_choice="last"), task=task)
    prepared = prepare(run, QUIET)
    corpus = prepared.train
    sentences = [prepared.tokenizer.decode(corpus.tokens[a:b]) for a, b in zip(corpus.sentences, corpus.sentences[1:])]
    # No text is lost between sentences.
    assert sentences[:5] == ["One here.", " Two there!", " Three?", "One more.", " And on."]
    assert corpus.documents[:3].tolist() == [0, 3, 5]


@pytest.mark.parametrize("split", [None, True, False])
def test_special_tokens_in_documents_are_text_unless_splitting_is_disabled(tmp_path, split):
    run = make_run(tmp_path, "a line with </s> in it\n" * 90)
    tokenizer = dataclasses.replace(run.tokenizer, split_special_tokens=split)
    run = dataclasses.replace(run, tokenizer=tokenizer)
    prepared = prepare(run, QUIET)
    tokens, bounds = prepared.train.tokens, prepared.train.bounds
    inside = np.setdiff1d(np.flatnonzero(tokens == prepared.tokenizer.eos), bounds[1:] - 1)
    assert bool(len(inside)) == (split is False)
    assert prepared.tokenizer.split_special_tokens == bool(split)  # for prompts and tables


def test_held_out_data_may_have_its_own_path(tmp_path):
    (tmp_path / "other.txt").write_text("a line of text\n")
    prepared = prepare(make_run(tmp_path, eval_path=str(tmp_path / "other.txt")), QUIET)
    assert documents_of(prepared, prepared.held_out) == ["a line of text"]
    assert text_of(prepared, prepared.train) == TEXT.replace("\n", "")


def test_too_little_text_and_too_small_a_vocabulary_raise_an_error(tmp_path):
    with pytest.raises(UserError, match=r"there is no held-out text in .*give more text"):
        prepare(make_run(tmp_path, "one line only\n"), QUIET)
    small = dataclasses.replace(make_run(tmp_path), model=ModelConfig(vocabulary=8))
    with pytest.raises(UserError, match=r"vocabulary is 8; .* --model.vocabulary \d+"):
        prepare(small, QUIET)
    assert not list((tmp_path / "cache").iterdir())  # no incomplete entry is left


def _prepare_in_process(run: RunConfig, start, results) -> None:
    start.wait()
    prepared = prepare(run, QUIET)
    results.put((np.asarray(prepared.train.tokens).tolist(), prepared.rows))


def test_two_processes_may_tokenize_at_once(tmp_path):
    run = make_run(tmp_path)
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=_prepare_in_process, args=(run, start, results)) for _ in range(2)]
    for process in processes:
        process.start()
    a, b = (results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert a == b
    assert len(list((tmp_path / "cache").iterdir())) == 1  # no incomplete entry is left


def test_a_slower_process_uses_the_entry_of_a_faster_one(tmp_path, monkeypatch):
    """This is the same race in a fixed order. Another process finishes just before the rename of this one."""
    run, rename = make_run(tmp_path), Path.rename

    def rename_after_another_process(path: Path, target: Path):
        monkeypatch.setattr(Path, "rename", rename)
        aside = rename(path, path.with_suffix(".aside"))
        prepare(run, QUIET)
        return rename(rename(aside, path), target)

    monkeypatch.setattr(Path, "rename", rename_after_another_process)
    prepared = prepare(run, QUIET)
    assert text_of(prepared, prepared.train)
    assert len(list((tmp_path / "cache").iterdir())) == 1


# Token ids that another program wrote.

IDS = np.random.default_rng(0).integers(10, 50, 1000).astype(np.uint16)


def write_ids(folder: Path, kind: str, ids: np.ndarray = IDS) -> Path:
    if kind == "npy":
        np.save(folder / "ids.npy", ids.astype(np.int64))
        return folder / "ids.npy"
    header = np.zeros(256 if kind == "llm.c" else 0, np.int32)
    if len(header):
        header[:3] = 20240520, 1, len(ids)
    (folder / "ids.bin").write_bytes(header.tobytes() + ids.astype(np.uint16).tobytes())
    return folder / "ids.bin"


def run_of_ids(folder: Path, path: Path, **data) -> RunConfig:
    """Returns a run with a tokenizer of 64 tokens, whose first ids are special tokens."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        text = "".join(chr(97 + n % 26) + chr(65 + n % 24) + " \n.,!?" for n in range(200))
        (folder / "letters.txt").write_text(text)
        letters = DataConfig(path=str(folder / "letters.txt"), cache=str(folder / "letters"))
        run = RunConfig(model=ModelConfig(vocabulary=64), data=letters, tokenizer=TokenizerConfig(train="characters"))
        prepare(run, QUIET).tokenizer.save(str(tokenizer))
    return RunConfig(
        model=ModelConfig(vocabulary=64),
        data=DataConfig(path=str(path), cache=str(folder / "cache"), format="tokens", **data),
        tokenizer=TokenizerConfig(path=str(tokenizer)),
    )


@pytest.mark.parametrize("kind", ["npy", "nanoGPT", "llm.c"])
def test_token_ids_are_read(tmp_path, kind):
    run = run_of_ids(tmp_path, write_ids(tmp_path, kind))
    prepared = prepare(run, QUIET)
    train, held_out = prepared.train, prepared.held_out
    np.testing.assert_array_equal(np.concatenate([train.tokens, held_out.tokens]), IDS)
    assert len(held_out.tokens) == 100 and train.tokens.dtype == np.uint16
    assert held_out.bytes == len(prepared.tokenizer.decode(IDS[900:]).encode())
    messages: list[str] = []
    assert_equal(prepare(run, messages.append).train, train)
    assert messages == []


@pytest.mark.parametrize("choice", ["sampled", "last"])
def test_documents_of_token_ids_are_held_out_as_a_whole(tmp_path, choice):
    run = run_of_ids(tmp_path, tmp_path / "ids", eval_choice=choice)
    tokenizer = tokenizers.load(run.tokenizer.path)
    mark = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    ids = IDS.copy()
    ids[np.random.default_rng(1).choice(1000, 40, replace=False)] = mark
    (tmp_path / "ids").mkdir()
    for n, part in enumerate(np.split(ids, [300, 301, 700])):
        write_ids(tmp_path / "ids", "npy", part).rename(tmp_path / "ids" / f"{n}.npy")
    prepared = prepare(run, QUIET)
    documents = [
        tuple(corpus.tokens[a:b].tolist())
        for corpus in (prepared.train, prepared.held_out)
        for a, b in zip(corpus.bounds, corpus.bounds[1:])
    ]
    assert sorted(token for document in documents for token in document) == sorted(ids.tolist())
    at = 0 if tokenizer.bos is not None else -1
    assert all(
        document.count(mark) <= 1 and mark not in document[1 + at : len(document) + at] for document in documents
    )
    assert 0.03 < len(prepared.held_out.tokens) / 1000 < 0.25
    if choice == "last":
        np.testing.assert_array_equal(np.concatenate([prepared.train.tokens, prepared.held_out.tokens]), ids)


def test_held_out_token_ids_may_have_their_own_path(tmp_path):
    run = run_of_ids(tmp_path, write_ids(tmp_path, "nanoGPT"), eval_path=str(write_ids(tmp_path, "npy", IDS[:77])))
    prepared = prepare(run, QUIET)
    assert (len(prepared.train.tokens), len(prepared.held_out.tokens)) == (1000, 77)


WRONG_IDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "odd": (lambda path: path.write_bytes(b"123"), "3 bytes, and each id has two"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-2]), "announces version 1 and 1,000 ids"),
    "large": (lambda path: path.write_bytes(np.array([1, 64], np.uint16).tobytes()), "holds the token id 64"),
    "empty": (lambda path: path.write_bytes(b""), "no train tokens|no held-out tokens"),
}


@pytest.mark.parametrize("name", WRONG_IDS)
def test_files_that_are_not_token_ids_raise_an_error(tmp_path, name):
    damage, message = WRONG_IDS[name]
    path = write_ids(tmp_path, "llm.c")
    damage(path)
    with pytest.raises(UserError, match=message):
        prepare(run_of_ids(tmp_path, path), QUIET)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(5, np.float32), "holds float32"),
        (np.ones((5, 2), np.int32), r"holds int32 \(5 x 2\)"),
        (np.array([3, -1]), "holds the token id -1"),
    ],
    ids=["floats", "a table", "negative"],
)
def test_arrays_that_are_not_token_ids_raise_an_error(tmp_path, array, message):
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(UserError, match=message):
        prepare(run_of_ids(tmp_path, tmp_path / "ids.npy"), QUIET)


def test_token_ids_need_their_tokenizer_and_a_task_that_reads_them(tmp_path):
    run = run_of_ids(tmp_path, write_ids(tmp_path, "npy"))
    with pytest.raises(UserError, match="requires the tokenizer that wrote the ids"):
        prepare(dataclasses.replace(run, tokenizer=TokenizerConfig()), QUIET)
    with pytest.raises(UserError, match="MaskedLM splits text into sentences; give text"):
        prepare(dataclasses.replace(run, task=MaskedLM()), QUIET)
    with pytest.raises(UserError, match="this task reads text"):
        next(source.rows(run.data.path, run.data, ""))

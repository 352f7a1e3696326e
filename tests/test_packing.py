"""Batches for inference: each example occurs once, and the results keep the order of the batches."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.inference.packing import MIN_LENGTH, THREADS, chunks, pack_batches, row_length, run_ahead


def model(parts: int):
    """Returns the attributes that `pack_batches` reads of a model whose mesh splits rows into this number of parts."""
    return SimpleNamespace(module=SimpleNamespace(constrain=SimpleNamespace(ways=lambda axis: parts)))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rows_contain_each_example_once(data):
    lengths = np.array(data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=40)))
    batch_tokens, parts = data.draw(st.integers(1, 1000)), data.draw(st.sampled_from([1, 2, 3]))
    max_examples = data.draw(st.integers(1, 9))
    columns = [np.arange(1, n + 1) * 1000 + i for i, n in enumerate(lengths)]
    seen = []
    for batch in pack_batches(model(parts), lengths, batch_tokens, lambda T: max_examples):
        B, T = batch.shape
        segments_BT, positions_BT, values_BT = batch.to_rows([columns[i] for i in batch.examples])
        assert values_BT.shape == (B, T) and B % parts == 0 and segments_BT.max() <= max_examples
        assert T == MIN_LENGTH or all(lengths[batch.examples[batch.rows == b]].max() > T // 2 for b in batch.rows)
        for i, b, slot, start in zip(batch.examples, batch.rows, batch.slots, batch.starts):
            (indices,) = np.nonzero(segments_BT[b] == slot + 1)
            assert indices.tolist() == list(range(start, start + lengths[i]))
            assert (values_BT[b, indices] == columns[i]).all()
            assert (positions_BT[b, indices] == np.arange(lengths[i])).all()
            seen.append(int(i))
        assert (segments_BT > 0).sum() == lengths[batch.examples].sum() and not values_BT[segments_BT == 0].any()
    assert sorted(seen) == np.flatnonzero(lengths).tolist()


def test_rows_and_chunks_have_the_expected_lengths():
    assert [row_length(n) for n in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 256]
    assert list(chunks(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]] and list(chunks([], 2)) == []


@pytest.mark.parametrize("devices", [1, 2])
def test_results_keep_the_order_of_the_batches(devices):
    """On one CPU device several batches run at the same time. On several devices they run sequentially."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    put = lambda n: jax.device_put(np.full(devices, n, np.float32), NamedSharding(mesh, PartitionSpec("data")))
    barrier = threading.Barrier(THREADS)

    def program(x):
        if devices == 1:
            barrier.wait(60)
        return x * 2

    count = 4 * THREADS
    results = list(run_ahead(program, ((n, put(n)) for n in range(count))))
    assert [n for n, _ in results] == list(range(count))
    assert all(isinstance(x, np.ndarray) and (x == 2 * n).all() for n, x in results)


@pytest.mark.parametrize("devices", [1, 2])
def test_errors_of_programs_and_batches_are_raised(devices):
    inputs = jax.device_put(
        np.zeros(2), NamedSharding(jax.sharding.Mesh(np.array(jax.devices()[:devices]), "d"), PartitionSpec("d"))
    )

    def fail(_):
        raise ValueError("program")

    def batches():
        yield 0, inputs
        raise ValueError("batches")

    with pytest.raises(ValueError, match="program"):
        list(run_ahead(fail, [(0, inputs)]))
    with pytest.raises(ValueError, match="batches"):
        list(run_ahead(lambda x: x, batches()))

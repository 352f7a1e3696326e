"""Batches for inference: examples packed into rows of few lengths, and several batches in flight."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxlm.config import ModelConfig
from jaxlm.config.ranges import Positive, check_argument
from jaxlm.data.pack import pack
from jaxlm.devices import hosts
from jaxlm.devices.sharding import spec
from jaxlm.lm import LM
from jaxlm.nn.transformer import unstack_layers

MIN_LENGTH = 64  # tokens in the shortest rows; shorter rows would save little attention and leave more padding
THREADS = 2  # batches that one CPU device computes at the same time
MAX_IN_FLIGHT = 8  # batches queued on an accelerator; more would fill its memory
MAX_COPIED = 1 << 32  # bytes of parameters that may be in memory twice

Item = TypeVar("Item")


class PackedBatch(NamedTuple):
    """Rows of shape [B, T] with N examples.

    Example `examples[n]` is segment `slots[n] + 1` of row `rows[n]` and begins at token `starts[n]` of the row.
    """

    examples: np.ndarray
    rows: np.ndarray
    slots: np.ndarray
    starts: np.ndarray
    shape: tuple[int, int]

    def to_rows(self, *columns: Sequence[Any]) -> np.ndarray:
        """Returns int32 arrays [2 + len(columns), B, T]: segments, positions and the columns; 0 is padding.

        Args:
          columns: each has the values of the N examples' tokens, in the order of `examples`.
        """
        n, position = _number(np.array([len(values) for values in columns[0]]))
        filled = np.zeros((2 + len(columns), *self.shape), np.int32)
        values = [self.slots[n] + 1, position, *map(np.concatenate, columns)]
        filled[:, self.rows[n], self.starts[n] + position] = values
        return filled


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of `size` consecutive items; the last one may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def row_length(tokens: int) -> int:
    """Returns the length of the row for an example with this number of tokens: a power of two."""
    return max(MIN_LENGTH, 1 << (tokens - 1).bit_length())


def check_batch_tokens(batch_tokens: int | None) -> int:
    """Returns the number of tokens in a batch. Raises UserError for a number below 1.

    None becomes 512 for each core on CPU, so that activations stay in the caches, and 16,384 on accelerators.
    """
    batch_tokens = check_argument("batch_tokens", batch_tokens, Positive | None)
    if batch_tokens is None:
        return 512 * (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1 << 14
    return batch_tokens


def pack_batches(
    lm: LM,
    lengths: np.ndarray,
    batch_tokens: int,
    max_examples: Callable[[int], int],
    source_length: int = 0,
) -> Iterator[PackedBatch]:
    """Packs examples into rows of few lengths and the rows into batches of few sizes, so that few programs compile.

    A row of T tokens has an example longer than T / 2, and shorter ones in the space left. Empty examples are skipped.

    Args:
      lm: the model; its mesh divides the number of rows.
      lengths: tokens of each example, [N].
      batch_tokens: tokens in a batch, padding included; at least one row.
      max_examples: the maximum number of examples in a row of T tokens, as a function of T.
      source_length: tokens in a row of the encoder, if its rows are longer.
    """
    left = np.flatnonzero(lengths)
    while len(left):
        T = row_length(int(lengths[left].max()))
        packed = pack(lengths[left], T, max_examples(T))
        examples, sizes = left[packed.examples], np.diff(packed.starts)
        if T > MIN_LENGTH:
            full = np.maximum.reduceat(lengths[examples], packed.starts[:-1]) > T // 2
            examples, sizes = examples[np.repeat(full, sizes)], sizes[full]
        left = np.setdiff1d(left, examples)
        max_rows = max(1, batch_tokens // max(T, source_length))
        for batch_sizes in chunks(sizes, max_rows):
            B = divisible_rows(lm, min(max_rows, 1 << (len(batch_sizes) - 1).bit_length()))
            batch, examples = np.split(examples, [sum(batch_sizes)])
            rows, slots = _number(np.array(batch_sizes))
            before = np.cumsum(lengths[batch]) - lengths[batch]
            yield PackedBatch(batch, rows, slots, before - before[slots == 0][rows], (B, T))


def _number(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[2, 1] -> [0, 0, 1], [0, 1, 0]: the group of each member of groups of these sizes, and its index in the group."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return group, np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group]


def divisible_rows(lm: LM, rows: int) -> int:
    """Returns the number of rows, rounded up to what the model's mesh divides."""
    parts = lm.module.constrain.ways("batch")
    return -(-rows // parts) * parts


def shard_rows(lm: LM, arrays: Any) -> Any:
    """Returns a tree of arrays [B, ...], with the rows sharded over the model's mesh if it has several devices."""
    mesh = lm.module.constrain.mesh
    if mesh is None or mesh.size == 1:
        return arrays
    return jax.device_put(arrays, NamedSharding(mesh, spec(("batch",), mesh.axis_names)))


def run_ahead(program: Callable[[Any], Any], batches: Iterable[tuple[Item, Any]]) -> Iterator[tuple[Item, Any]]:
    """Runs a compiled program over batches, several of them in flight, and yields the results in order.

    An accelerator has up to MAX_IN_FLIGHT batches, so that it does not wait while results are copied and batches are
    made. One CPU device computes THREADS batches at the same time, 1.14 times as fast on two cores; XLA runs the
    programs of one thread one after the other. Several CPU devices compute one batch at a time, since queued programs
    can deadlock, each waiting for the threads of another.

    Args:
      program: called with the inputs of a batch.
      batches: (tag, inputs); the tag is returned with the results.

    Yields:
      (tag, results), the results as NumPy arrays.
    """
    waiting: deque[tuple[Item, Callable[[], Any]]] = deque()
    fetch: Callable[[], Any]
    cpu = jax.default_backend() == "cpu"
    with ThreadPoolExecutor(THREADS) as pool:
        for tag, inputs in batches:
            arrays = [x for x in jax.tree.leaves(inputs) if isinstance(x, jax.Array)]
            if cpu and all(len(x.sharding.device_set) == 1 for x in arrays):
                fetch = pool.submit(lambda inputs: hosts.to_numpy(program(inputs)), inputs).result
                max_waiting = 2 * THREADS
            else:
                fetch = partial(hosts.to_numpy, program(inputs))
                max_waiting = 0 if cpu else MAX_IN_FLIGHT - 1
            waiting.append((tag, fetch))
            if len(waiting) > max_waiting:
                tag, fetch = waiting.popleft()
                yield tag, fetch()
        for tag, fetch in waiting:
            yield tag, fetch()


_UNSTACKED: WeakKeyDictionary[LM, Any] = WeakKeyDictionary()


def inference_params(lm: LM) -> Any:
    """Returns the model's parameters, with one tree for each layer instead of a stack where that is faster: on CPU.

    Parameters on a mesh, and those that are too large to be in memory twice, stay stacked.
    """
    leaves = jax.tree.leaves(lm.params)
    on_mesh = isinstance(getattr(leaves[0], "sharding", None), NamedSharding)
    if jax.default_backend() != "cpu" or on_mesh or sum(leaf.nbytes for leaf in leaves) > MAX_COPIED:
        return lm.params
    if lm not in _UNSTACKED:
        _UNSTACKED[lm] = lm.programs.get(_compiled_unstack, lm.config)(lm.params)
    return _UNSTACKED[lm]


def _compiled_unstack(config: ModelConfig) -> Any:
    # JAX drops compiled programs along with their function.
    return jax.jit(lambda params: unstack_layers(config, params))

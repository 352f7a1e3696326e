"""Embeddings of texts: packed into rows, run through the stack and pooled in one jit, as the checkpoint declares.

`jaxlm.hub.pooling` reads the declaration.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlm.config.arguments import check_model, listed
from jaxlm.config.ranges import Positive, argument
from jaxlm.data.pack import pack
from jaxlm.data.tokenizers.tokenizer import check_text
from jaxlm.devices import hosts
from jaxlm.devices.sharding import spec, ways
from jaxlm.errors import UserError
from jaxlm.hub.pooling import Pooling
from jaxlm.lm import LM
from jaxlm.nn.layers import ACTIVATIONS
from jaxlm.nn.transformer import Transformer, apply, layers_apart

SHORTEST = 64  # tokens in the shortest rows; in shorter ones attention would save little, and more places stay empty
IN_ROW = 64  # texts in a row, at the most
WINDOW = 1 << 13  # texts that are tokenized and packed together
AT_ONCE = 2  # batches that are computed at once
TWICE = 1 << 32  # bytes of parameters that may be in memory twice


def encode(
    lm: LM, texts: Iterable[str], *, batch_tokens: int | None = None, normalize: bool | None = None
) -> np.ndarray:
    """Embeddings [N, D] of N texts, float32, in the order of the texts.

    They are pooled as the checkpoint declares; an encoder that declares nothing gives the mean over a text's tokens,
    special ones included, not normalised, as sentence-transformers does.  Of an encoder-decoder the encoder is read.
    A text longer than the declared limit, else the model's, loses its end; one without any token gives zeros.

    texts: any iterable, read as a stream.  batch_tokens: places in a batch, at the least those of one row; None: 512
    for each core on CPU, so that they stay in the caches, else 16,384.  normalize: divide by the Euclidean norm; None:
    as declared.  Neither the batches nor the other texts change an embedding by more than rounding.

    Raises UserError for texts that are no strings, a model without tokenizer, and a decoder that declares no pooling.
    """
    check_model("lm", lm)
    texts = listed("texts", texts, "strings")
    batch_tokens = argument("batch_tokens", batch_tokens, Positive | None)
    normalize = argument("normalize", normalize, bool | None)
    if batch_tokens is None:
        batch_tokens = 512 * (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1 << 14
    pooling = _declared(lm)
    embed, params = lm.programs.get(_embed, lm.module, pooling, normalize), params_of(lm)

    def compute(batch: TextBatch, of_window_ND: np.ndarray) -> None:
        of_window_ND[batch.texts] = hosts.fetched(embed(params, *batch.inputs))[batch.rows, batch.slots]

    done = [np.zeros((0, _width(lm, pooling)), np.float32)]
    waiting: deque[Future[None]] = deque()
    # The device never waits for the host, and on CPU a second batch fills the pauses of the first: 1.14 times the speed
    # on two cores.  (What one thread alone hands to XLA there runs one after the other.)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for window in _windows(texts):
            done.append(np.zeros((len(window), done[0].shape[1]), np.float32))
            for batch in _batches(lm, pooling, window, batch_tokens):
                waiting.append(pool.submit(compute, batch, done[-1]))
                if len(waiting) > 2 * AT_ONCE:
                    waiting.popleft().result()
        while waiting:
            waiting.popleft().result()
    return np.concatenate(done)


def _declared(lm: LM) -> Pooling:
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer; load it from a folder with one, or give it one, to encode texts")
    if lm.pooling is not None:
        return lm.pooling
    if lm.config.structure == "decoder":
        raise UserError(
            "a decoder that declares no pooling has no embeddings of its own; declare one: "
            'dataclasses.replace(lm, pooling=jaxlm.Pooling(("lasttoken",)))'
        )
    return Pooling()


_APART: WeakKeyDictionary[LM, Any] = WeakKeyDictionary()


def params_of(lm: LM) -> Any:
    """The model's parameters, on CPU with the layers apart, unless they are too large to be in memory twice."""
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params)) <= TWICE
    if jax.default_backend() != "cpu" or mesh_of(lm) is not None or not small:
        return lm.params
    if lm not in _APART:
        _APART[lm] = lm.programs.get(_compiled_layers_apart)(lm.params)
    return _APART[lm]


def _compiled_layers_apart() -> Any:
    return jax.jit(lambda params: layers_apart(params))  # JAX keeps what is compiled as long as the function lives


def mesh_of(lm: LM) -> Mesh | None:
    """The mesh that the parameters lie on."""
    leaf = jax.tree.leaves(lm.params)[0]
    return leaf.sharding.mesh if isinstance(getattr(leaf, "sharding", None), NamedSharding) else None


def _width(lm: LM, pooling: Pooling) -> int:
    width = pooling.dense[-1].kernel_DO.shape[1] if pooling.dense else lm.config.width * len(pooling.modes)
    return min(width, pooling.truncate or width)


def _windows(texts: Iterable[str]) -> Iterator[list[str]]:
    def checked() -> Iterator[str]:
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"text {i} is a {type(text).__name__}, {str(text)[:40]!r}; give strings")
            yield text

    # What is in memory is checked whole, before anything is compiled.
    stream = iter(list(checked()) if isinstance(texts, Sized) else checked())
    while window := list(islice(stream, WINDOW)):
        yield window


class TextBatch(NamedTuple):
    """Rows of texts, and where text `texts[n]` of the window is: in row `rows[n]`, segment `slots[n] + 1`."""

    texts: np.ndarray
    rows: np.ndarray
    slots: np.ndarray
    inputs: tuple[Any, ...]  # tokens, segments, positions, types [B, T] int32


def _batches(lm: LM, pooling: Pooling, window: list[str], batch_tokens: int) -> Iterator[TextBatch]:
    """The window's texts in rows of few lengths, so that few programs are compiled: powers of two, from SHORTEST.

    Rows of T hold a text longer than T / 2, and shorter ones where it leaves room.
    """
    from tokenizers.normalizers import Lowercase

    assert lm.tokenizer is not None
    if pooling.lowercase:
        for text in window:
            check_text(text)
    lower = Lowercase().normalize_str if pooling.lowercase else str
    framed = lm.tokenizer.frame([lower(pooling.prompt + text) for text in window], max_length=_limit(lm, pooling))
    lengths = np.array([len(ids) for ids, _ in framed])
    mesh = mesh_of(lm)
    parts = 1 if mesh is None else ways(mesh, "batch")

    left = np.flatnonzero(lengths)
    while len(left):
        T = max(SHORTEST, 1 << int(lengths[left].max() - 1).bit_length())
        packed = pack(lengths[left], T, _most(T))
        examples, sizes = left[packed.examples], np.diff(packed.starts)
        here = (np.maximum.reduceat(lengths[examples], packed.starts[:-1]) > T // 2) | (T == SHORTEST)
        left = np.setdiff1d(left, examples[np.repeat(here, sizes)])
        examples, sizes = examples[np.repeat(here, sizes)], sizes[here]
        ends = np.cumsum(sizes)
        B = max(1, batch_tokens // T)
        for first in range(0, len(sizes), B):
            some = sizes[first : first + B]
            rows = min(B, 1 << (len(some) - 1).bit_length())
            rows = -(-rows // parts) * parts
            batch = _lay_out(framed, examples[ends[first] - some[0] : ends[first + len(some) - 1]], some, rows, T)
            if mesh is not None:
                rows_split = NamedSharding(mesh, spec(("batch",), mesh.axis_names))
                batch = batch._replace(inputs=jax.device_put(batch.inputs, rows_split))
            yield batch


def _most(T: int) -> int:
    """Texts in a row of T tokens, at the most; a word of one piece with [CLS] and [SEP] has three."""
    return min(T // 3, IN_ROW)


def _limit(lm: LM, pooling: Pooling) -> int:
    if pooling.max_length is None:
        return lm.config.max_length
    return min(pooling.max_length, lm.config.position_limit or pooling.max_length)


def _lay_out(framed: list[Any], texts: np.ndarray, sizes: np.ndarray, rows: int, T: int) -> TextBatch:
    """`texts`, `sizes[b]` of them in row b, one after the other, in rows of T; rows past the last are padding."""
    lengths = np.array([len(framed[i][0]) for i in texts])
    row, slot = _counted(sizes)
    before = np.cumsum(lengths) - lengths
    start = row * T + before - before[np.cumsum(sizes) - sizes][row]
    text, position = _counted(lengths)
    where = start[text] + position
    columns = [np.concatenate([framed[i][kind] for i in texts]) for kind in (0, 1)]
    inputs = np.zeros((4, rows * T), np.int32)
    inputs[:, where] = columns[0], slot[text] + 1, position, columns[1]
    return TextBatch(texts, row, slot, tuple(inputs.reshape(4, rows, T)))


def _counted(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[2, 1] -> [0, 0, 1], [0, 1, 0]: of each member of groups of these sizes its group, and its place in the group."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return group, np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group]


def _embed(module: Transformer, pooling: Pooling, normalize: bool | None) -> Any:
    """Returns the compiled program, which `LM.programs` keeps:
    rows [B, T] to the embeddings [B, E, D] of the texts in them."""
    method = "encode" if module.config.structure == "encoder_decoder" else "__call__"

    @jax.jit
    def embed(params, tokens_BT, segments_BT, positions_BT, types_BT):
        x_BTD = apply(module, params, tokens_BT, segments_BT, positions_BT, types_BT, method=method)
        x_BTD = x_BTD.astype(jnp.float32)
        E = _most(tokens_BT.shape[1])
        joined = [pool(mode, x_BTD, segments_BT, positions_BT, E) for mode in pooling.modes]
        x_BED = jnp.concatenate(joined, -1)
        for dense in pooling.dense:
            x_BED = jnp.dot(x_BED, dense.kernel_DO, precision="highest")
            if dense.bias_O is not None:
                x_BED += dense.bias_O
            if dense.activation is not None:
                x_BED = ACTIVATIONS[dense.activation](x_BED)
        if pooling.normalize if normalize is None else normalize:
            x_BED = _unit(x_BED)
        if pooling.truncate:
            x_BED = x_BED[..., : pooling.truncate]
            if normalize:
                x_BED = _unit(x_BED)
        return x_BED

    return embed


def pool(mode: str, x_BTD: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array, E: int) -> jax.Array:
    """One vector [B, E, D] for each text: but for the maximum, a weighted sum of its tokens' states."""
    if mode == "max":
        B, _, D = x_BTD.shape
        segment_BT = jnp.arange(B)[:, None] * (E + 1) + segments_BT
        max_SD = jax.ops.segment_max(x_BTD.reshape(-1, D), segment_BT.reshape(-1), B * (E + 1))
        return max_SD.reshape(B, E + 1, D)[:, 1:]
    here_BET = segments_BT[:, None] == jnp.arange(1, E + 1)[:, None]
    n_BE1 = jnp.maximum(here_BET.sum(-1, keepdims=True), 1)
    place_B1T = positions_BT[:, None] + 1
    weights = {
        "cls": lambda: place_B1T == 1,
        "lasttoken": lambda: place_B1T == n_BE1,
        "mean": lambda: 1 / n_BE1,
        "mean_sqrt_len_tokens": lambda: jax.lax.rsqrt(n_BE1.astype(jnp.float32)),
        "weightedmean": lambda: place_B1T / (n_BE1 * (n_BE1 + 1) / 2),
    }
    weights_BET = here_BET * weights[mode]().astype(jnp.float32)
    return jnp.einsum("BET,BTD->BED", weights_BET, x_BTD, precision="highest")


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

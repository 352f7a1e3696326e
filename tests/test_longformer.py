"""Local attention with global tokens: in blocks as in whole rows, packed as unpacked, and only where it should be."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from jaxlm.config import ModelConfig
from jaxlm.families import PRESETS
from jaxlm.nn import windows
from jaxlm.nn.attention import Scores, WeightDropout, dot_product_attention, self_mask, windowed_attention
from jaxlm.nn.global_tokens import global_tokens
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.nn.windows import Heads

B, T, WINDOW = 2, 300, 5  # five blocks of 64 queries, of which the last one is not full


def segments(random: np.random.Generator) -> np.ndarray:
    """Returns rows of several examples with padding between and after them."""
    lengths = random.integers(1, 90, (B, 12))
    numbers = np.concatenate([np.repeat(np.arange(1, 13), row)[:T] for row in lengths]).reshape(B, T)
    numbers[:, -7:] = 0
    return numbers.astype(np.int32)


def heads(random: np.random.Generator, K: int = 2) -> Heads:
    draw = lambda H: jnp.asarray(random.standard_normal((B, T, H, 4)), jnp.float32)
    return Heads(draw(4), draw(K), draw(K))


def whole_rows(rows: Heads, of_global: Heads | None, segments_BT: Any, global_BT: Any, scores: Scores) -> jax.Array:
    mask_BTS = self_mask(segments_BT, False, WINDOW, None, global_BT)
    out_BTHC = dot_product_attention(*rows, mask_BTS, scores)
    if of_global is None:
        return out_BTHC
    of_global_BTHC = dot_product_attention(*of_global, mask_BTS, scores)
    return jnp.where(global_BT[..., None, None], of_global_BTHC, out_BTHC)


@pytest.mark.parametrize(
    ("share", "slots"),
    [(None, 0), (0.0, 16), (0.03, 16), (0.03, 3), (1.0, 16)],
    ids=["local", "none", "few", "many", "all"],
)
def test_attention_in_blocks_equals_that_of_whole_rows(share, slots):
    """Values and gradients, for packed rows, grouped queries, a soft cap, and any number of global tokens."""
    random = np.random.default_rng(0)
    segments_BT = jnp.asarray(segments(random))
    rows, of_global, direction = heads(random), heads(random), heads(random).q_BTHC
    global_BT = None if share is None else jnp.asarray(random.random((B, T)) < share) & (segments_BT > 0)
    of_global = None if share is None else of_global
    scores = Scores(0.5, 3.0)
    # The outputs of padding have no meaning.
    direction = jnp.where(segments_BT[..., None, None] > 0, direction, 0)

    def in_blocks(rows: Heads, of_global: Heads | None) -> jax.Array:
        return windowed_attention(rows, of_global, segments_BT, WINDOW, global_BT, scores, WeightDropout(), slots)

    def product(attend: Any, *some: Any) -> jax.Array:
        return (attend(*some) * direction).sum()

    expected = partial(whole_rows, segments_BT=segments_BT, global_BT=global_BT, scores=scores)
    real = np.asarray(segments_BT) > 0
    values = [np.asarray(jax.jit(attend)(rows, of_global))[real] for attend in (in_blocks, expected)]
    np.testing.assert_allclose(*values, atol=2e-6)
    gradients = [
        jax.jit(jax.grad(partial(product, attend), (0, 1)))(rows, of_global) for attend in (in_blocks, expected)
    ]
    jax.tree.map(partial(np.testing.assert_allclose, atol=5e-6, rtol=1e-5), *gradients)


SMALL: dict[str, Any] = {"vocabulary": 40, "max_length": T, "width": 16, "layers": 2, "heads": 2, "mlp_width": 24}
SMALL |= {"dropout": 0.0, "attention_dropout": 0.0, "window": WINDOW, "padding_token": None}
LONGFORMER = replace(PRESETS["longformer-base-4096"], **SMALL)
LOCAL = replace(PRESETS["modernbert-base"], **SMALL, layer_kinds=("local",))


def test_the_rules_define_the_global_tokens_of_each_example():
    tokens_BT = np.array([[7, 8, 2, 9, 7, 2, 2, 8, 9, 9, 1, 1], [7, 8, 9, 9, 2, 7, 7, 2, 9, 2, 2, 8]])
    segments_BT = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0, 0], [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]])
    of_rule = lambda rule: global_tokens(tokens_BT, segments_BT, replace(LONGFORMER, global_tokens=rule))
    found = {rule: of_rule(rule) for rule in ("first", "question", "none")}
    assert found["none"] is None
    places = lambda mask_BT: [np.flatnonzero(row).tolist() for row in np.asarray(mask_BT)]
    assert places(found["first"]) == [[0, 4, 8], [1, 5]]
    assert places(found["question"]) == [[0, 1, 4], [1, 2, 3, 5, 6]]  # the third example has no separator
    by_head = lambda *heads: replace(LONGFORMER, heads_on_top=heads).global_rule
    assert [by_head(head) for head in ("classes", "span", "tokens", "masked_lm")] == [
        "first",
        "question",
        "none",
        "none",
    ]


def examples_of(config: ModelConfig, random: np.random.Generator) -> list[np.ndarray]:
    """Returns the tokens of examples whose rows are long enough for blocks; token 2 is a separator."""
    return [random.integers(0, config.vocabulary, n).astype(np.int32) for n in (T, 150, 90, 40, 7, 1)]


@pytest.mark.parametrize("rule", ["none", "first", pytest.param("question", marks=pytest.mark.long)])
@pytest.mark.parametrize("slots", [pytest.param(2, marks=pytest.mark.long), 64])
def test_packed_rows_equal_single_rows(monkeypatch, rule, slots):
    """Global attention is confined to the example, whatever the number of global tokens of the row."""
    monkeypatch.setattr(windows, "slots_of", lambda config: slots)
    config = replace(LONGFORMER, global_tokens=rule)
    examples = examples_of(config, np.random.default_rng(0))
    module, params = Transformer(config), random_params(config)
    rows = [[0], [1, 2, 3, 4, 5]]
    batch = np.zeros((3, 2, T), np.int32)
    for row, numbers in enumerate(rows):
        tokens = np.concatenate([examples[n] for n in numbers])
        batch[0, row, : len(tokens)] = tokens
        batch[1, row, : len(tokens)] = np.repeat(np.arange(len(numbers)) + 1, [len(examples[n]) for n in numbers])
        batch[2, row, : len(tokens)] = np.concatenate([np.arange(len(examples[n])) for n in numbers])
    packed_BTD = np.asarray(jax.jit(partial(apply, module))(params, *batch))
    for row, numbers in enumerate(rows):
        for slot, n in enumerate(numbers, start=1):
            alone_1TD = apply(module, params, examples[n][None])
            np.testing.assert_allclose(packed_BTD[row][batch[1, row] == slot], alone_1TD[0], atol=2e-5)


def test_a_token_outside_of_the_windows_has_no_gradient():
    """Without global tokens, the reach of a token grows by its window in each layer; a global token reaches all."""
    module, params = Transformer(LONGFORMER), random_params(LONGFORMER)
    x_1TD = jnp.asarray(np.random.default_rng(0).standard_normal((1, T, 16)), jnp.float32)
    _, inputs = apply(module, params, jnp.zeros((1, T), jnp.int32), method="embed")
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(16), jnp.float32)

    def read_by(place: int, global_places: list[int]) -> list[int]:
        is_global_1T = jnp.zeros((1, T), bool).at[0, jnp.array(global_places, int)].set(True)
        given = inputs._replace(global_BT=is_global_1T if global_places else None)
        state = lambda x_1TD: apply(module, params, x_1TD, given, method="stack")[0, place] @ direction
        return np.flatnonzero(np.asarray(jax.jit(jax.grad(state))(x_1TD))[0].any(-1)).tolist()

    reach = LONGFORMER.layers * (WINDOW - 1)
    assert read_by(100, []) == list(range(100 - reach, 100 + reach + 1))
    # The state of a token depends on the global token, which in the layer before attends to all tokens.
    assert read_by(100, [290]) == list(range(T))
    one = replace(LONGFORMER, layers=1)
    module, params = Transformer(one), random_params(one)
    near = list(range(100 - WINDOW + 1, 100 + WINDOW))
    assert read_by(100, [290]) == [*near, 290]


@pytest.mark.parametrize(
    "config", [replace(LONGFORMER, global_tokens="first"), LOCAL], ids=["longformer", "modernbert"]
)
def test_memory_grows_in_proportion_to_the_length(config):
    """The gradient needs no array with a size for each pair of positions, whatever the number of global tokens."""
    config = replace(config, max_length=2048, heads_on_top=())
    module, params = Transformer(config), random_params(config)
    program = jax.jit(jax.grad(lambda params, tokens, segments: apply(module, params, tokens, segments).sum()))

    def temporary(length: int) -> int:
        rows = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return program.lower(params, rows, rows).compile().memory_analysis().temp_size_in_bytes

    assert temporary(2048) < 2.3 * temporary(1024)

"""Calibration: the second moments of the inputs of projections equal those of the inputs themselves."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from random_params import random_params

from jaxlm import ModelConfig, TokenizerConfig, UserError
from jaxlm.config import AdapterConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.lm import LM
from jaxlm.nn import nodes
from jaxlm.nn.transformer import Transformer
from jaxlm.transforms import adapters
from jaxlm.transforms.calibration import input_moments, projection_inputs
from jaxlm.transforms.calibration_rows import calibration_rows

TINY = {"vocabulary": 48, "width": 16, "layers": 2, "heads": 2, "max_length": 64, "mlp_width": 24}
MODELS = {
    "decoder": ModelConfig(**TINY, positions="rotary", feed_forward="gated", kv_heads=1),
    "encoder": ModelConfig(**TINY, structure="encoder", heads_on_top=("masked_lm",), norm_place="post"),
    "encoder-decoder": ModelConfig(
        **TINY, structure="encoder_decoder", relative="buckets", positions="none", start_token=0, decoder_layers=3
    ),
    "disentangled": ModelConfig(
        **TINY, structure="encoder", heads_on_top=(), positions="none", relative="disentangled", relative_shared=False
    ),
    "one distinct layer": ModelConfig(**TINY, structure="encoder", heads_on_top=(), distinct_layers=1),
}
LAST = ("disentangled", "one distinct layer")


def model(name: str) -> LM:
    config = MODELS[name]
    return LM(config, Transformer(config), random_params(config))


def draw(lm: LM, lengths, seed=0):
    random = np.random.default_rng(seed)
    ids = lambda length: random.integers(1, 48, length).tolist()
    pair = lambda length: (ids(length), ids(max(1, length // 2)))
    return [(pair if lm.config.structure == "encoder_decoder" else ids)(length) for length in lengths]


LENGTHS = [40, 17, 33, 5, 21, 64, 9, 30, 28, 60, 44, 36]


@pytest.mark.parametrize(
    "name",
    ["decoder", "encoder-decoder", *(pytest.param(name, marks=pytest.mark.long) for name in ("encoder", *LAST))],
)
def test_moments_have_the_shapes_of_the_inputs_and_add_up(name):
    lm = model(name)
    texts = draw(lm, LENGTHS * 2)
    whole = input_moments(lm, texts, length=64)
    halves = [input_moments(lm, part, length=64) for part in (texts[:12], texts[12:])]
    assert whole.keys() == projection_inputs(lm.params).keys()
    for path, (sums, tokens_L) in whole.items():
        inputs = int(np.prod(projection_inputs(lm.params)[path]))
        assert sums.shape == (len(tokens_L), inputs, inputs) and sums.dtype == np.float32
        if name != "decoder":  # whose texts are cut at the ends of rows
            np.testing.assert_allclose(sums, halves[0][path].sums + halves[1][path].sums, rtol=1e-3, atol=1e-2)
        np.testing.assert_array_equal(tokens_L, halves[0][path].tokens_L + halves[1][path].tokens_L)
        np.testing.assert_allclose(sums, np.swapaxes(sums, 1, 2), rtol=1e-5)
        assert np.linalg.eigvalsh(np.asarray(sums, np.float64)).min() > -1e-2


def test_the_tokens_of_each_side_are_counted():
    lm = model("encoder-decoder")
    texts = draw(lm, LENGTHS * 2)
    found = input_moments(lm, texts, length=64)
    sources, targets = (sum(len(pair[side]) for pair in texts) for side in range(2))
    of = lambda path: set(np.asarray(found[path].tokens_L).tolist())
    assert of("encoder/layers/mlp/up/kernel") == of("decoder/layers/cross_attention/key/kernel") == {sources}
    assert of("decoder/layers/mlp/up/kernel") == of("decoder/layers/cross_attention/query/kernel") == {targets}
    shared = input_moments(model("one distinct layer"), draw(model("encoder"), LENGTHS), length=64)
    np.testing.assert_array_equal(shared["encoder/layers/mlp/up/kernel"].tokens_L, [2 * sum(LENGTHS)])


def test_neither_padding_nor_batches_have_an_effect():
    lm = model("encoder")
    texts = draw(lm, LENGTHS)
    few, many = (input_moments(lm, texts, length=64, batch_tokens=n) for n in (64, 1024))
    alone = [input_moments(lm, [text] * 30, length=64) for text in texts[:2]]
    both = input_moments(lm, texts[:2] * 30, length=64)
    for path in few:
        np.testing.assert_allclose(few[path].sums, many[path].sums, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(both[path].sums, alone[0][path].sums + alone[1][path].sums, rtol=1e-3, atol=1e-2)


def test_moments_equal_those_of_the_hidden_states():
    """The input of the MLP of a post-norm encoder's layer is not a state, but that of its attention is."""
    lm = model("encoder")
    rows = calibration_rows(lm, draw(lm, LENGTHS), length=64)
    states = lm(rows.tokens_BT, None, segments_BT=rows.segments_BT, positions_BT=rows.positions_BT, states=True)
    x_LND = np.asarray(states.encoder.states_LBTD, np.float64)[:2, rows.segments_BT > 0]
    found = input_moments(lm, draw(lm, LENGTHS), length=64)
    for name in ("query", "key", "value"):
        sums, tokens_L = found[f"encoder/layers/attention/{name}/kernel"]
        np.testing.assert_allclose(sums, np.einsum("LNI,LNJ->LIJ", x_LND, x_LND), rtol=1e-4, atol=1e-3)
        np.testing.assert_array_equal(tokens_L, 2 * [sum(LENGTHS)])


@pytest.mark.parametrize("name", ["decoder", "disentangled"])
def test_moments_equal_those_of_the_recorded_inputs(name, monkeypatch):
    lm = model(name)
    seen = []
    plain = nodes.dot

    def record(x, kernel, contract, dtype, dropped):
        if not nodes.is_node(kernel):
            jax.debug.callback(lambda x, kernel: seen.append((np.array(x), np.array(kernel))), x, kernel)
        return plain(x, kernel, contract, dtype, dropped)

    monkeypatch.setattr("jaxlm.nn.layers.dot", record)
    rows = calibration_rows(lm, draw(lm, LENGTHS), length=64)
    lm(rows.tokens_BT, None, segments_BT=rows.segments_BT, positions_BT=rows.positions_BT)
    jax.effects_barrier()
    monkeypatch.undo()
    found = input_moments(lm, draw(lm, LENGTHS), length=64)
    diagonal = input_moments(lm, draw(lm, LENGTHS), length=64, diagonal=True)
    stack, is_token = ("decoder" if name == "decoder" else "encoder"), rows.segments_BT > 0
    for path in found:
        part, projection = path.split("/")[2:4]
        kernel_L = lm.params[stack]["layers"][part][projection]["kernel"]
        for n, kernel in enumerate(kernel_L):
            inputs = [x for x, k in seen if k.shape == kernel.shape and np.array_equal(k, kernel)]
            (x,) = inputs
            if x.ndim > 2:
                x_NI = x[is_token].reshape(is_token.sum(), -1).astype(np.float64)
            else:  # the table of relative positions
                x_NI = x * np.sqrt(is_token.sum() / len(x))
            np.testing.assert_allclose(found[path].sums[n], x_NI.T @ x_NI, rtol=1e-3, atol=1e-2)
            np.testing.assert_allclose(diagonal[path].sums[n], np.square(x_NI).sum(0), rtol=1e-3, atol=1e-2)


def test_projections_with_the_same_input_share_their_moments():
    found = input_moments(lm := model("decoder"), draw(lm, LENGTHS), length=64)
    of = lambda name: found[f"decoder/layers/{name}/kernel"].sums
    assert of("attention/query") is of("attention/value") and of("mlp/up") is of("mlp/gate")
    assert of("attention/query") is not of("mlp/up")
    only = input_moments(lm, draw(lm, LENGTHS), length=64, paths=["decoder/layers/mlp/down/kernel"])
    assert list(only) == ["decoder/layers/mlp/down/kernel"]
    np.testing.assert_allclose(only["decoder/layers/mlp/down/kernel"].sums, of("mlp/down"), rtol=1e-5)


def test_nodes_have_the_moments_of_their_dense_arrays():
    lm = model("decoder")
    params = adapters.add(lm.params, AdapterConfig(2), jax.random.key(0))
    found, dense = (
        input_moments(one, draw(lm, LENGTHS), length=64) for one in (dataclasses.replace(lm, params=params), lm)
    )
    for path in dense:
        np.testing.assert_allclose(found[path].sums, dense[path].sums, rtol=1e-3, atol=1e-3)


def test_rows_of_a_decoder_are_full_and_keep_examples_apart():
    rows = calibration_rows(model("decoder"), [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]], length=4)
    assert rows.tokens_BT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]
    assert rows.segments_BT.tolist() == [[1, 1, 1, 2], [1, 1, 1, 1], [1, 2, 0, 0]]
    assert rows.positions_BT.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 0]]
    cut = calibration_rows(model("decoder"), [[1, 2, 3], [4, 5, 6, 7, 8, 9]], length=4, max_tokens=5)
    assert cut.tokens_BT.tolist() == [[1, 2, 3, 4], [5, 0, 0, 0]]


def test_texts_are_tokenized_with_special_tokens():
    tokenizer = tokenizers.train(["abcdefghijklmnopqrstuvwxyz "] * 4, TokenizerConfig(train="characters"), 48)
    for name in ("decoder", "encoder", "encoder-decoder"):
        lm = dataclasses.replace(model(name), tokenizer=tokenizer)
        rows = calibration_rows(lm, ["abc", "de"], length=32)
        expected = [tokenizer.with_prefix(tokenizer.encode(text)) for text in ("abc", "de")]
        if name != "decoder":
            expected = [ids for ids, _ in tokenizer.encode_with_special_tokens(["abc", "de"])]
        flat = rows.tokens_BT[rows.segments_BT > 0].tolist()
        assert flat == [i for ids in expected for i in ids]
        if name == "encoder-decoder":
            flat = rows.target_tokens_BT[rows.target_segments_BT > 0].tolist()
            assert flat == [i for ids in expected for i in (0, *ids[:-1])]


@pytest.mark.parametrize(
    ("texts", "named", "match"),
    [
        ([], {}, "has no tokens"),
        ([[]], {}, "has no tokens"),
        ([[1, 2, 3]], {}, "has 3 tokens, but .* requires at least 128"),
        ([[1] * 200], {"max_tokens": 100}, "has 100 tokens"),
        (["a"], {}, "no tokenizer"),
        ([[1, 99]], {}, "has token 99; ids go from 0 to 47"),
        ([[-1]], {}, "has token -1"),
        ([1.5], {}, "calibration text 0 is 1.5"),
        (5, {}, "calibration is 5"),
        ([[1] * 200], {"length": 0}, "length is 0"),
        ([[1] * 200], {"batch_tokens": 0}, "batch_tokens is 0"),
    ],
)
def test_calibration_data_is_checked(texts, named, match):
    with pytest.raises(UserError, match=match):
        input_moments(model("decoder"), texts, **named)

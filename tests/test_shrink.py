"""Structured pruning: a smaller model computes what the old one computes without the removed parts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import ModelConfig, UserError
from jaxlm.config import AdapterConfig
from jaxlm.families import FAMILIES
from jaxlm.lm import LM
from jaxlm.nn import parameters
from jaxlm.nn.transformer import Transformer
from jaxlm.transforms import adapters
from jaxlm.transforms.influence import layer_influence

TINY = {"vocabulary": 48, "width": 16, "layers": 4, "heads": 4, "max_length": 64, "mlp_width": 24}
MODELS = {
    "decoder": ModelConfig(**TINY, positions="rotary", feed_forward="gated", kv_heads=2),
    "encoder": ModelConfig(**TINY, structure="encoder", heads_on_top=("masked_lm",), norm_place="post"),
    "encoder-decoder": ModelConfig(
        **TINY, structure="encoder_decoder", relative="buckets", positions="none", start_token=0, decoder_layers=3
    ),
    "disentangled": ModelConfig(
        **TINY, structure="encoder", heads_on_top=(), positions="none", relative="disentangled", relative_shared=False
    ),
    "one distinct layer": ModelConfig(**TINY, structure="encoder", heads_on_top=(), distinct_layers=1),
}
TEXTS = [np.random.default_rng(n).integers(1, 48, 64).tolist() for n in range(4)]
TOKENS = np.array(TEXTS[:2])[:, :12]


def model(name: str) -> LM:
    config = MODELS[name]
    return LM(config, Transformer(config), random_params(config))


def hidden(lm: LM) -> np.ndarray:
    return np.asarray(lm(TOKENS, target_tokens_BT=TOKENS[:, ::-1]).hidden_BTD) if two(lm) else np.asarray(lm(TOKENS)[1])


def two(lm: LM) -> bool:
    return lm.config.structure == "encoder_decoder"


def zeroed(lm: LM, small: LM) -> LM:
    """Returns the old model with zeros for the units whose outgoing weights the smaller model lacks."""

    def leaf_of(path, old):
        if not path.endswith(("attention/out/kernel", "mlp/down/kernel")):
            return old
        new, old = np.asarray(parameters.by_path(small.params)[path]), np.array(old)
        for layer in range(len(old)):
            for unit, rows in enumerate(old[layer]):
                if not any(np.array_equal(rows, kept) for kept in new[layer]):
                    old[layer, unit] = 0
        return old

    params = jax.tree_util.tree_map_with_path(lambda p, x: leaf_of(parameters.path_of(p), x), lm.params)
    return dataclasses.replace(lm, params=params)


CALIBRATED = ("decoder", "encoder-decoder")
LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("name", "calibrated"),
    [
        *((name, name in CALIBRATED) for name in MODELS),
        *(pytest.param(name, name not in CALIBRATED, marks=LONG) for name in MODELS),
    ],
)
def test_fewer_heads_and_columns_equal_zeros_in_their_place(name, calibrated):
    lm = model(name)
    small = jaxlm.shrink(lm, heads=2, mlp=10, calibration=TEXTS if calibrated else None)
    assert (small.config.heads, small.config.F, small.config.C) == (2, 10, 4)
    assert (1 if name == "decoder" else 2) == small.config.K
    np.testing.assert_allclose(hidden(small), hidden(zeroed(lm, small)), atol=1e-4)
    assert np.abs(hidden(small) - hidden(lm)).max() > 1e-3
    assert lm.config is MODELS[name]


def test_the_units_with_the_largest_contribution_remain():
    lm = model("decoder")
    up, down = (np.array(lm.params["decoder"]["layers"]["mlp"][name]["kernel"]) for name in ("up", "down"))
    large = np.random.default_rng(0).permuted(np.tile(np.arange(24), (4, 1)), axis=1)[:, :8]
    for layer in range(4):
        down[layer, large[layer]] *= 100
    params = jax.tree.map(lambda x: x, lm.params)
    params["decoder"]["layers"]["mlp"]["down"]["kernel"] = down
    for calibration in (None, TEXTS):
        small = jaxlm.shrink(dataclasses.replace(lm, params=params), mlp=8, calibration=calibration)
        found = small.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
        for layer in range(4):
            np.testing.assert_array_equal(found[layer], up[layer][:, np.sort(large[layer])])


def test_kept_layers_are_those_of_the_old_model():
    lm = model("decoder")
    for given, kept in (
        ([0, 2], [0, 2]),
        ((3, 1), [1, 3]),
        (3, [0, 2, 3]),
        (2, [0, 3]),
        (np.int64(1), [0]),
        (4, range(4)),
    ):
        small = jaxlm.shrink(lm, layers=given)
        assert small.config.layers == len(kept)
        expected = jax.tree.map(lambda x: x[list(kept)], lm.params["decoder"]["layers"])  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, small.params["decoder"]["layers"], expected)
        assert small.params["embeddings"]["tokens"] is lm.params["embeddings"]["tokens"]
    # A layer without effect can be dropped.
    params = jax.tree.map(np.array, lm.params)
    for name in ("attention/out", "mlp/down"):
        part, matrix = name.split("/")
        for leaf in jax.tree.leaves(params["decoder"]["layers"][part][matrix]):
            leaf[2] = 0
    idle = dataclasses.replace(lm, params=params)
    np.testing.assert_allclose(hidden(jaxlm.shrink(idle, layers=[0, 1, 3])), hidden(idle), atol=1e-5)
    influence = layer_influence(idle, TEXTS)["decoder"]
    assert influence.argmin() == 2 and influence[2] == pytest.approx(0, abs=1e-5)
    chosen = jaxlm.shrink(idle, layers=3, layer_choice="influence", calibration=TEXTS)
    np.testing.assert_allclose(hidden(chosen), hidden(idle), atol=1e-5)


def test_influence_is_one_minus_the_cosine_of_the_states():
    lm = model("encoder")  # its norms are after the layers, so all states are outputs of layers
    states = np.asarray(lm(np.array(TEXTS), states=True).encoder.states_LBTD, np.float64)
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    expected = 1 - (unit[1:] * unit[:-1]).sum(-1).mean((1, 2))
    np.testing.assert_allclose(layer_influence(lm, TEXTS, length=64)["encoder"], expected, atol=1e-5)


def test_the_layers_of_both_stacks_and_of_shared_parameters():
    lm = model("encoder-decoder")
    small = jaxlm.shrink(lm, layers=2, decoder_layers=[1])
    assert (small.config.layers, small.config.decoder_layers) == (2, 1)
    assert jaxlm.shrink(lm, layers=3).config.decoder_layers is None  # as many as the decoder has
    assert jaxlm.shrink(lm, decoder_layers=2).config.layers == 4
    assert hidden(small).shape == hidden(lm).shape
    shared = jaxlm.shrink(model("one distinct layer"), layers=2)
    assert shared.config.layers == 2 and hidden(shared).shape == (2, 12, 16)


def test_kinds_of_layers_are_kept():
    config = dataclasses.replace(MODELS["decoder"], layer_kinds=("local", "global"), window=4)
    lm = LM(config, Transformer(config), random_params(config))
    assert jaxlm.shrink(lm, layers=[0, 2]).config.layer_kinds == ("local",)
    assert jaxlm.shrink(lm, layers=[0, 1, 3]).config.layer_kinds == ("local", "global", "global")


@pytest.mark.parametrize(
    ("name", "named", "match"),
    [
        ("decoder", {}, "nothing to remove"),
        ("decoder", {"layers": 0}, "layers is 0; the decoder has 4 layers: give from 1 to 4"),
        ("decoder", {"layers": 5}, "layers is 5"),
        ("decoder", {"layers": []}, "give indices from 0 to 3, each once, at least one"),
        ("decoder", {"layers": [0, 4]}, "indices from 0 to 3"),
        ("decoder", {"layers": [-1]}, "indices from 0 to 3"),
        ("decoder", {"layers": [1, 1]}, "each once"),
        ("decoder", {"layers": "all"}, "layers is 'all'"),
        ("decoder", {"layers": 1.5}, "layers is 1.5"),
        ("decoder", {"layers": True}, "layers is True"),
        ("decoder", {"decoder_layers": 2}, "the model is a.n. decoder; give layers"),
        ("decoder", {"heads": 0}, "heads is 0"),
        ("decoder", {"heads": 3}, "a multiple of 2"),
        ("decoder", {"heads": 6}, "at most 4"),
        ("decoder", {"mlp": 0}, "mlp is 0"),
        ("decoder", {"mlp": 25}, "at most 24"),
        ("decoder", {"layers": 2, "layer_choice": "best"}, "layer_choice is 'best'"),
        ("decoder", {"layers": 2, "layer_choice": "influence"}, "requires calibration data"),
        ("decoder", {"layers": 2, "layer_choice": "influence", "calibration": [[1]]}, "has 1 tokens"),
        ("decoder", {"mlp": 2, "calibration": []}, "has no tokens"),
    ],
)
def test_arguments_are_checked(name, named, match):
    with pytest.raises(UserError, match=match):
        jaxlm.shrink(model(name), **named)


def test_models_that_cannot_lose_parts():
    lm = model("decoder")
    adapted = dataclasses.replace(lm, params=adapters.add(lm.params, AdapterConfig(2), jax.random.key(0)))
    with pytest.raises(UserError, match="of the kind LowRank"):
        jaxlm.shrink(adapted, layers=2)
    change = lambda **fields: dataclasses.replace(lm, config=dataclasses.replace(lm.config, **fields))
    with pytest.raises(UserError, match="keep layer 0"):
        jaxlm.shrink(change(first_norm=False), layers=[1])
    with pytest.raises(UserError, match="depend on the number of the layer"):
        jaxlm.shrink(change(scale_by_layer=True), layers=2)
    with pytest.raises(UserError, match="share 2 sets"):
        jaxlm.shrink(change(distinct_layers=2), layers=2)
    with pytest.raises(UserError, match="depends on the number of heads"):
        jaxlm.shrink(change(relative="alibi"), heads=2)
    with pytest.raises(UserError, match="has the mixer 'own'"):
        jaxlm.shrink(change(mixer="own"), heads=2)
    with pytest.raises(UserError, match="feed-forward layer 'experts'"):
        jaxlm.shrink(change(feed_forward="experts"), mlp=2)


def family_model(family: str, **fields) -> LM:
    preset = next(iter(FAMILIES[family].presets.values()))
    small = {"vocabulary": 64, "width": 16, "heads": 4, "mlp_width": 24, "layers": 4, "max_length": 64}
    config = dataclasses.replace(preset, **small, **fields)
    return LM(config, Transformer(config), random_params(config))


@pytest.mark.long
def test_the_format_is_kept_where_it_has_the_sizes(tmp_path):
    cases = [
        ("bert", {}, {"layers": 2, "mlp": 10}, "bert"),
        ("bert", {}, {"heads": 2}, "jaxlm"),
        ("llama", {"kv_heads": 2}, {"layers": 2, "heads": 2, "mlp": 10}, "llama"),
    ]
    for n, (family, fields, named, kind) in enumerate(cases):
        jaxlm.save(family_model(family, **fields), tmp_path / f"{n}")  # so that the model has an origin
        small = jaxlm.shrink(jaxlm.load(tmp_path / f"{n}"), **named)
        assert jaxlm.save(small, tmp_path / f"{n}small") == kind
        again = jaxlm.load(tmp_path / f"{n}small")
        np.testing.assert_allclose(hidden(again), hidden(small), atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("bert", {"heads_on_top": ("masked_lm",)}, {"layers": 2, "mlp": 10}),
        ("llama", {"kv_heads": 2}, {"layers": [0, 3], "heads": 2, "mlp": 10}),
        ("t5", {"head_width": 4}, {"layers": 2, "decoder_layers": 1, "heads": 2, "mlp": 10}),
        ("gpt2", {}, {"layers": 2, "mlp": 10}),
    ],
)
def test_transformers_loads_a_smaller_model(family, fields, named, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    small = jaxlm.shrink(family_model(family, **fields), calibration=TEXTS, **named)
    jaxlm.save(small, tmp_path / "model")
    kind = {"bert": "MaskedLM", "t5": "Seq2SeqLM"}.get(family, "CausalLM")
    theirs = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "model").eval()
    inputs = {"input_ids": torch.tensor(TOKENS)}
    more = {"target_tokens_BT": jnp.asarray(TOKENS[:, ::-1])} if family == "t5" else {}
    inputs |= {"decoder_input_ids": torch.tensor(TOKENS[:, ::-1].copy())} if family == "t5" else {}
    with torch.no_grad():
        np.testing.assert_allclose(small(TOKENS, **more).logits, theirs(**inputs).logits.numpy(), atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_loads_a_model_with_a_pattern(family, tmp_path):
    """The groups of a pattern are along the inputs of a projection, as kernels for sparse matrices require."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    lm = family_model(family, **({"kv_heads": 2} if family == "llama" else {}))
    pruned = jaxlm.prune(lm, pattern="2:4", method="sparsegpt", calibration=TEXTS)
    jaxlm.save(pruned, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        np.testing.assert_allclose(pruned(TOKENS).logits, theirs(torch.tensor(TOKENS)).logits.numpy(), atol=1e-4)
    count = 0
    for name, module in theirs.named_modules():
        if family == "gpt2" and type(module).__name__ == "Conv1D":
            weight = module.weight.T
        elif family == "llama" and isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            weight = module.weight
        else:
            continue
        assert set((weight.reshape(len(weight), -1, 4) != 0).sum(-1).unique().tolist()) == {2}, name
        count += 1
    assert count == 4 * (7 if family == "llama" else 4)

"""Qwen3-Next and Qwen3.5: layers of linear attention between layers of attention, and the parts of their files."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from random_params import random_params
from test_blocks import packed_batch

import jaxlm
from jaxlm import LM, ModelConfig, UserError
from jaxlm.families import PRESETS, save
from jaxlm.hub import safetensors
from jaxlm.nn import flops, parameters
from jaxlm.nn.stack import CacheSpec
from jaxlm.nn.transformer import Transformer, apply

SIZES: dict[str, Any] = {"linear_key_heads": 2, "linear_value_heads": 4, "linear_key_width": 6, "linear_value_width": 5}
SIZES |= {"vocabulary": 32, "width": 16, "layers": 3, "heads": 2, "kv_heads": 1, "head_width": 8, "rotary_width": 2}
SIZES |= {"mlp_width": 12, "max_length": 64, "tied_embeddings": True}
DENSE = replace(PRESETS["qwen3.5-9b"], **SIZES, mixers=("gated_delta", "attention", "gated_delta"))
SPARSE: ModelConfig = replace(
    PRESETS["qwen3-next-80b-a3b"], **SIZES, mixers=DENSE.mixers, experts=4, experts_per_token=2, shared_expert_width=8
)


@pytest.mark.parametrize("model", [DENSE, pytest.param(SPARSE, marks=pytest.mark.long)], ids=["dense", "sparse"])
def test_examples_of_a_packed_row_do_not_affect_each_other(model):
    params, batch = random_params(model), packed_batch()
    assert all(row.path != path for path, row in parameters.rows_by_path(params).items())  # no row is a user's
    run = jax.jit(partial(apply, Transformer(model)))
    whole = run(params, batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"])
    for start, end in ((0, 5), (5, 9)):
        np.testing.assert_allclose(whole[:, start:end], run(params, batch["tokens_BT"][:, start:end]), atol=1e-4)
    later = batch["tokens_BT"].copy()
    later[:, 7] = 31 - later[:, 7]
    changed = run(params, later, batch["segments_BT"], batch["positions_BT"])
    np.testing.assert_array_equal(changed[:, :7], whole[:, :7])  # causal


@pytest.mark.parametrize(
    "how", ["beams", pytest.param("greedy", marks=pytest.mark.long), pytest.param("draft", marks=pytest.mark.long)]
)
def test_generated_texts_have_the_log_probabilities_of_whole_rows(how):
    """The states of beams are reordered; those of a draft are read again after rejected tokens."""
    lm = LM(DENSE, Transformer(DENSE), random_params(DENSE, 0.4))
    prompts = [[3, 4, 5, 6, 7], [8]]
    choices: dict[str, Any] = {"beams": {"beams": 3}, "greedy": {}, "draft": {"draft": lm}}[how]
    found = jaxlm.generate(lm, prompts, max_new_tokens=9, temperature=0, stop_tokens=(), details=True, **choices)
    for prompt, generation in zip(prompts, found):
        row = np.array([prompt + generation.tokens])
        log_TV = jax.nn.log_softmax(lm(row).logits[0])
        places = np.arange(len(prompt) - 1, row.shape[1] - 1)
        np.testing.assert_allclose(log_TV[places, row[0, places + 1]], generation.log_probs, atol=1e-3)


def test_the_format_int8_rounds_keys_and_values_but_no_states():
    params, module = random_params(DENSE), Transformer(DENSE)
    keep = CacheSpec(np.array([2, 5]), 16, format="int8")
    tokens_BT = packed_batch()["tokens_BT"][:, :6]
    caches = jax.eval_shape(lambda: apply(module, params, tokens_BT, keep, method="prefill")[1])
    assert [cache.format for cache in caches.own] == ["compute", "int8", "compute"]
    assert [cache.slots for cache in caches.own] == [1, 16, 1]


def test_the_formula_counts_the_products_of_both_mixers_and_the_gate():
    gated = replace(PRESETS["t5-small"], vocabulary=32, width=16, layers=1, heads=2, mlp_width=8, attention_gate=True)
    tokens_BT = np.zeros((2, 8), np.int32)
    for model, more in ((DENSE, {}), (gated, {"target_tokens_BT": tokens_BT})):
        run = partial(apply, Transformer(model), **more)
        counted = flops.count(jax.make_jaxpr(run)(random_params(model), tokens_BT))
        assert counted == flops.model_flops(model, 2, 8, 8, heads={}).total


def test_sharded_rows_equal_unsharded_ones(devices):
    from jaxlm import MeshConfig
    from jaxlm.devices.sharding import Placement, make_mesh

    model, batch = replace(DENSE, kv_heads=2), packed_batch()
    inputs = random_params(model), batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"]
    mesh = make_mesh(MeshConfig(data=1, context=2, tensor=2), jax.devices()[:4])
    sharded = jax.jit(partial(apply, Transformer(model, Placement(mesh))))(*inputs)
    np.testing.assert_allclose(sharded, jax.jit(partial(apply, Transformer(model)))(*inputs), atol=1e-4)


def test_a_model_of_images_is_refused_with_the_name_of_its_text_model(tmp_path):
    text = {"model_type": "qwen3_5_text", "hidden_size": 16}
    values = {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 2}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    message = r"model_type 'qwen3_5' with text_config and vision_config; only its text model, 'qwen3_5_text', .* save"
    with pytest.raises(UserError, match=message):
        jaxlm.load(tmp_path)


def test_weights_of_multi_token_prediction_are_kept_and_reported(tmp_path):
    save(DENSE, random_params(DENSE), tmp_path / "model")
    tensors = {name: np.asarray(tensor) for name, tensor in safetensors.read(tmp_path / "model").items()}
    tensors |= {"mtp.fc.weight": np.ones((16, 32), np.float32), "mtp.norm.weight": np.ones(16, np.float32)}
    safetensors.write(tensors, tmp_path / "model" / safetensors.WEIGHTS)
    messages: list[str] = []
    lm = jaxlm.load(tmp_path / "model", log=messages.append)
    assert messages == ["not used by the model, but kept for saving: 2 tensors of multi-token prediction (mtp.*)"]
    jaxlm.save(lm, tmp_path / "again")
    read = lambda name: {key: np.asarray(x).tobytes() for key, x in safetensors.read(tmp_path / name).items()}
    assert read("again") == read("model")

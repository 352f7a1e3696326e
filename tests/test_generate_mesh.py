"""A model on a mesh generates, predicts and encodes like one on a single device, and all programs lower for TPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import Decoding, MeshConfig, ModelConfig
from jaxlm.config import TokenizerConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.devices import sharding
from jaxlm.devices.programs import Programs
from jaxlm.inference import generate as generation
from jaxlm.inference.generate import generate_in_order
from jaxlm.lm import LM, with_params
from jaxlm.nn import parameters
from jaxlm.nn.kernels import Backend, backend_of, choose, why_not
from jaxlm.nn.transformer import Transformer

TEXT = "the quick brown fox jumps over a lazy dog\n"
TINY = {"vocabulary": 48, "width": 16, "layers": 1, "heads": 2, "max_length": 64}
MODELS = {
    "decoder": ModelConfig(**TINY),
    "encoder-decoder": ModelConfig(**TINY, structure="encoder_decoder", start_token=0),
    "latent": ModelConfig(**TINY, mixer="latent", key_value_rank=8, head_width=8, rotary_width=4, positions="rotary"),
}
MESHES = {  # the first mesh has 8 devices, and the second one has 3, which is not a power of two
    "fsdp, tensor and context": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
    "three devices": MeshConfig(data=3),
}
PROMPTS = [[5, 6, 7], [9] * 11, [8, 3, 2, 30, 31]]
STRATEGIES = {
    "greedy": {"temperature": 0.0},
    "sampling": {"seed": 3, "top_k": 20, "top_p": 0.9},
    "several draws": {"seed": 3, "n_best": 2},
    "beams": {"temperature": 0.0, "beams": 3, "n_best": 2},
    "rules": {"temperature": 0.0, "repetition_penalty": 1.4, "min_new_tokens": 3},
}


@lru_cache
def lm_of(name: str) -> LM:
    tokenizer = tokenizers.train([TEXT], TokenizerConfig(train="characters"), 48)
    return LM(MODELS[name], Transformer(MODELS[name]), random_params(MODELS[name], std=0.5), tokenizer)


@lru_cache
def on_mesh(name: str, mesh: str) -> LM:
    """Returns the same model with its parameters on a mesh, which `LM` passes to the module."""
    config = MESHES[mesh]
    devices = jax.devices()[: 3 if config.data == 3 else 8]
    device_mesh = sharding.make_mesh(config, devices)

    def put(key_path, leaf):
        path = parameters.path_of(key_path)
        row = parameters.find(path)
        return jax.device_put(leaf, sharding.sharding(device_mesh, row.axes, leaf.shape, path))

    lm = lm_of(name)
    return replace(lm, params=jax.tree_util.tree_map_with_path(put, lm.params), programs=Programs())


ALL = {(name, strategy, mesh) for name in MODELS for strategy in STRATEGIES for mesh in MESHES}
QUICK = {("decoder", "greedy", "fsdp, tensor and context"), ("encoder-decoder", "beams", "fsdp, tensor and context")}
QUICK |= {("decoder", "sampling", "three devices")}
CASES = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.long) for case in sorted(ALL)]


@pytest.mark.parametrize(("name", "strategy", "mesh"), CASES)
def test_a_mesh_changes_no_text(name, strategy, mesh):
    choices = {"max_new_tokens": 8, "return_tokens": True, **STRATEGIES[strategy]}
    expected = jaxlm.generate(lm_of(name), PROMPTS, **choices)
    assert jaxlm.generate(on_mesh(name, mesh), PROMPTS, **choices) == expected
    if strategy == "greedy":
        assert jaxlm.generate(on_mesh(name, mesh), PROMPTS[1:2], **choices) == expected[1:2]


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["three devices", "fsdp, tensor and context"])
@pytest.mark.parametrize("strategy", ["greedy", "sampling"])
def test_a_mesh_changes_no_text_with_a_draft(strategy, mesh):
    lm, split = lm_of("decoder"), on_mesh("decoder", mesh)
    choices = {"max_new_tokens": 8, "return_tokens": True, **STRATEGIES[strategy]}
    assert jaxlm.generate(split, PROMPTS, draft=split, **choices) == jaxlm.generate(lm, PROMPTS, draft=lm, **choices)


def test_a_mesh_changes_no_stream_and_no_continuous_batch(monkeypatch):
    lm, split = lm_of("decoder"), on_mesh("decoder", "three devices")
    choices = {"max_new_tokens": 12, "seed": 1}
    assert "".join(jaxlm.stream(split, "the", **choices)) == jaxlm.generate(lm, ["the"], **choices)[0]
    monkeypatch.setattr(generation, "MAX_ROWS", 4)  # 6 on three devices
    many, decoding = PROMPTS * 5, Decoding(max_new_tokens=6, seed=1, stop=("a", "e"))
    tokens = lambda lm: [one.tokens for (one,) in generate_in_order(lm, many, decoding)]
    assert tokens(split) == tokens(lm)


def test_a_model_has_the_mesh_of_its_parameters():
    split = on_mesh("decoder", "three devices")
    assert split.module.constrain.mesh.size == 3
    alone = with_params(split, jax.device_put(lm_of("decoder").params, jax.devices()[2]))
    assert [*alone.module.constrain.mesh.devices.flat] == [jax.devices()[2]]
    assert lm_of("decoder").module.constrain.mesh is None  # NumPy arrays have no mesh
    tokens_BT = np.array([PROMPTS[0]])  # one row, which three devices do not divide
    ours, theirs = split(tokens_BT).logits, lm_of("decoder")(tokens_BT).logits
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_splash_is_refused_if_the_mesh_is_unknown(monkeypatch, capsys):
    shape = jax.ShapeDtypeStruct((4, 256, 4, 64), "bfloat16")
    assert "load it with mesh=" in why_not("splash", Backend("tpu", 5.0, devices=4), None, shape, shape)
    assert why_not("splash", Backend("tpu", 5.0), None, shape, shape) is None
    device = type("Device", (), {"platform": "tpu", "device_kind": "TPU v5 lite"})()
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    assert backend_of(None) == Backend("tpu", 5.0, devices=4)
    assert choose(backend_of(None), None, shape, shape) == "xla"
    one = jax.sharding.Mesh(np.array([device], object).reshape([1] * len(sharding.AXES)), sharding.AXES)
    assert choose(backend_of(one), one, shape, shape) == "splash"
    assert "has no mesh for the 4 devices" in capsys.readouterr().err


LOWERS = """
    import sys
    from functools import partial
    import jax, numpy as np
    from jax.experimental import topologies
    from jax.sharding import NamedSharding
    import jaxlm
    from jaxlm import config
    from jaxlm.devices import sharding
    from jaxlm.inference import decode, encode, likelihood
    from jaxlm.inference.beam import search_of
    from jaxlm.inference.speculative import speculative
    from jaxlm.lm import LM
    from jaxlm.nn import parameters
    from jaxlm.nn.transformer import Transformer, init
    from jaxlm.run import evaluate

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    B, T, NEW = 4, 256, 512

    def model(sizes, **fields):
        mesh = sharding.make_mesh(config.MeshConfig(*sizes), devices)
        made = config.ModelConfig(vocabulary=512, width=256, layers=2, heads=4, max_length=1024, **fields)
        shapes = jax.eval_shape(partial(init, Transformer(made)), jax.random.key(0))

        def at(key_path, leaf):
            path = parameters.path_of(key_path)
            layout = sharding.sharding(mesh, parameters.find(path).axes, leaf.shape, path)
            return jax.ShapeDtypeStruct(leaf.shape, "bfloat16", sharding=layout)

        module = Transformer(made, dtype="bfloat16")
        return LM(made, module, jax.tree_util.tree_map_with_path(at, shapes))  # finds the mesh of its parameters

    def like(lm, *shape, dtype="int32"):
        layout = sharding.spec(("batch",), lm.module.constrain.mesh.axis_names)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(lm.module.constrain.mesh, layout))

    def lowers(name, program, *inputs, kernels=True, **static):
        text = program.lower(*inputs, **static).as_text()
        count = text.count("tpu_custom_call")
        assert bool(count) == kernels, (name, count)
        print(name, count, flush=True)

    def generates(name, lm):
        source = (like(lm, B, T), like(lm, B, T)) if lm.config.structure == "encoder_decoder" else ()
        row = lambda *shape: like(lm, B, *shape)
        prompts = decode.Prompts(row(T), row(), row(), np.uint32(0), row(2), *source)
        rules = decode.Rules(np.int32(512), np.array([2], np.int32))
        some = {"top_k": np.int32(5), "top_p": np.float32(0.9), "min_p": np.float32(0)}
        sampled = rules._replace(temperature=np.float32(1), **some)
        listed, one = np.array([7, 8], np.int32), np.int32(2)
        fields = {"penalty": np.float32(1.2), "forbidden_NF": np.array([[-1, 5], [6, 7]], np.int32), "ngram": one}
        fields |= {"begin_N": listed, "min_new": one, "min_length": one, "first": one, "last_N": listed}
        all_rules = sampled._replace(**fields)
        run = lm.programs.get(decode.programs, lm.module)
        lowers(f"{name} prefill", run.prefill, lm.params, prompts, length=NEW)
        state = jax.eval_shape(partial(decode.prefill, lm.module, length=NEW), lm.params, prompts)
        for rule in (rules, sampled, all_rules):
            lowers(f"{name} advance", run.advance, lm.params, state, rule, np.int32(4), kernels=False)
        search = lm.programs.get(search_of, lm.module)
        beams = lm.params, state, rules, np.float32(1), np.int32(0)
        lowers(f"{name} beams", search, *beams, beams=3, candidates=6, kernels=False)
        both, pair = lm.programs.get(speculative, lm.module, lm.module), (lm.params, lm.params)
        lowers(f"{name} speculative prefill", both.prefill, pair, prompts, length=NEW)
        drafted = jax.eval_shape(partial(both.prefill, length=NEW), pair, prompts)
        lowers(f"{name} speculative advance", both.advance, pair, drafted, sampled, np.int32(4), kernels=False)
        fields = [row(T) for _ in range(4)] + [like(lm, B, T, dtype="bool"), *source]
        lowers(f"{name} likelihood", lm.programs.get(likelihood._program, lm.module), lm.params, *fields)

    def evaluates(name, lm, task, **more):
        step = evaluate._eval_step(lm.module, jaxlm.tasks.TASKS[type(task)], task, T, lm.config.labels, ("mean",))
        names = ("tokens_BT", "segments_BT", "positions_BT", "types_BT")
        one = lambda *shape, dtype="int32": jax.ShapeDtypeStruct((1, *shape), dtype)
        batch = {field: one(B, T) for field in names}
        batch |= {field: one(B, *shape, dtype=dtype) for field, (shape, dtype) in more.items()}
        lowers(f"{name} evaluation", step, lm.params, batch)

    for sizes in ((4, 1, 1, 1), (1, 2, 2, 1), (1, 2, 1, 2)):  # data, fsdp, tensor, context
        bare = lambda lm: lm.programs.get(encode._embed, lm.module, encode.Pooling(), None)
        of = lambda lm: (lm.params, *[like(lm, B, T) for _ in range(4)])
        encoder = model(sizes, structure="encoder", heads_on_top=("classes",), types=2, norm_place="post")
        decoder = model(sizes, positions="rotary", norm="rmsnorm", kv_heads=2)
        local = model(sizes, positions="rotary", layer_kinds=("local", "global"), window=128)
        both = model(sizes, structure="encoder_decoder", start_token=0)
        for name, lm in (("encoder", encoder), ("decoder", decoder), ("encoder-decoder", both)):
            lowers(f"{name} encode", bare(lm), *of(lm))
        lowers("encoder call", jax.jit(encoder.apply), encoder.params, like(encoder, B, T))
        lowers("decoder call", jax.jit(decoder.apply), decoder.params, like(decoder, B, T))
        lowers("encoder-decoder call", jax.jit(both.apply), both.params, like(both, B, T))
        generates("decoder", decoder)
        generates("local decoder", local)
        generates("encoder-decoder", both)
        labels = {"labels_BE": ((64,), "int32"), "weights_BE": ((64,), "float32")}
        evaluates("encoder", encoder, config.Classification(), **labels)
        texts = {"labels_BT": ((T,), "int32"), "weights_BT": ((T,), "float32")}
        sources = {f"source_{field}_BS": ((T,), "int32") for field in ("tokens", "segments", "positions")}
        evaluates("decoder", decoder, config.Seq2Seq(), **texts)
        evaluates("encoder-decoder", both, config.Seq2Seq(), **texts, **sources)
    print("all lower")
"""


@pytest.mark.long
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
def test_inference_lowers_for_four_tpu_chips():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", textwrap.dedent(LOWERS)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("all lower\n"), process.stdout

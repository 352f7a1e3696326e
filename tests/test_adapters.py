"""Adapters: only their arrays change and are stored, runs resume exactly, and files in the format of PEFT are equal."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params
from test_runs import CONFIG, assert_same, run_config, start, stop_after, wait_for, write_text

import jaxlm
from jaxlm import AdapterConfig, DataConfig, MeshConfig, ModelConfig, QuantizeConfig, RunConfig, UserError
from jaxlm.families import FAMILIES as FAMILY_TABLE
from jaxlm.families import PRESETS
from jaxlm.hub import peft, safetensors, updates
from jaxlm.hub.convert import Layout, to_hf
from jaxlm.lm import LM
from jaxlm.nn import nodes, parameters
from jaxlm.nn.low_rank import LowRank
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.run.fit import fit
from jaxlm.transforms import adapters

SIZES = {"vocabulary": 48, "width": 16, "layers": 3, "heads": 2, "mlp_width": 32, "max_length": 32}
FAMILIES = {  # one of each kind of layout: separate projections, grouped queries, fused ones, two stacks
    "bert": dataclasses.replace(PRESETS["bert-tiny"], **SIZES, heads_on_top=("classes",), labels=("a", "b", "c")),
    "llama": dataclasses.replace(PRESETS["llama-3.2-1b"], **SIZES, kv_heads=1, head_width=None),
    "gpt2": dataclasses.replace(PRESETS["gpt2"], **SIZES),
    "modernbert": dataclasses.replace(PRESETS["modernbert-base"], **SIZES),
    "t5": dataclasses.replace(PRESETS["t5-small"], **SIZES, head_width=8, decoder_layers=2),
    "own": ModelConfig(**SIZES, positions="none", norm_place="sandwich"),
}
TOKENS_BT = np.random.default_rng(0).integers(3, 48, (2, 9)).astype(np.int32)


def write_base(name: str, folder: Path) -> LM:
    model = FAMILIES[name]
    params = jax.tree.map(jnp.asarray, random_params(model))
    jaxlm.save(LM(model, Transformer(model), params), folder)
    return jaxlm.load(folder)


def with_adapter(lm: LM, config: AdapterConfig, seed: int = 1) -> LM:
    """Returns the model with an adapter and a head that have been trained, with random values."""
    params = adapters.add(lm.params, config, jax.random.key(seed))
    draw = np.random.default_rng(seed)
    is_trained = adapters.trained(config, params)
    noise = lambda leaf, trained: leaf + 0.3 * draw.standard_normal(leaf.shape).astype(np.float32) if trained else leaf
    part, _ = parameters.split(params, is_trained)
    return dataclasses.replace(
        lm, params=jax.tree.map(noise, params, is_trained), adapted=parameters.outside_nodes(part)
    )


def outputs(lm: LM) -> np.ndarray:
    more = {"target_tokens_BT": TOKENS_BT[:, ::-1]} if lm.config.structure == "encoder_decoder" else {}
    return np.asarray(lm(TOKENS_BT, **more).logits)


CONFIGS = {
    "all": AdapterConfig(4),
    "query and value": AdapterConfig(2, targets="query,value", kind="rslora"),
    "dora": AdapterConfig(4, targets="query,mlp", kind="dora"),
    "biases": AdapterConfig(2, targets="out", biases="adapted"),
    "all biases": AdapterConfig(2, targets="value", biases="all"),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((name, "all") for name in FAMILIES),
        *(("bert", case) for case in list(CONFIGS)[1:]),
        *(pytest.param("gpt2", case, marks=pytest.mark.long) for case in list(CONFIGS)[1:]),
    ],
)
def test_a_stored_adapter_is_the_same_function(name, case, tmp_path):
    base = write_base(name, tmp_path / "base")
    lm = with_adapter(base, CONFIGS[case])
    expected = outputs(lm)
    assert np.abs(expected - outputs(base)).max() > 1e-2
    jaxlm.save(lm, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = jaxlm.load(tmp_path / "adapter")
    np.testing.assert_allclose(outputs(loaded), expected, atol=1e-5)
    assert set(loaded.adapted) == set(lm.adapted)
    np.testing.assert_allclose(
        outputs(jaxlm.load(tmp_path / "base", adapter=tmp_path / "adapter")), expected, atol=1e-5
    )
    np.testing.assert_allclose(outputs(jaxlm.merge(loaded)), expected, atol=1e-4)
    jaxlm.save(loaded, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


def test_a_new_head_is_stored_with_the_adapter_of_a_base_with_another_head(tmp_path):
    model = dataclasses.replace(FAMILIES["bert"], heads_on_top=("masked_lm",))
    jaxlm.save(LM(model, Transformer(model), random_params(model)), tmp_path / "base")
    base = jaxlm.load(tmp_path / "base", head="classes", labels=("a", "b"), log=lambda message: None)
    lm = with_adapter(base, CONFIGS["query and value"])
    jaxlm.save(lm, tmp_path / "adapter")
    for loaded in (
        jaxlm.load(tmp_path / "adapter"),
        jaxlm.load(tmp_path / "base", adapter=tmp_path / "adapter"),
        jaxlm.load(tmp_path / "adapter", head="classes"),
    ):
        assert loaded.config.labels == ("a", "b") and not loaded.fresh
        np.testing.assert_allclose(outputs(loaded), outputs(lm), atol=1e-5)
    with pytest.raises(UserError, match=r"also replaces .*; load it with jaxlm.load\(base, adapter=...\)"):
        jaxlm.add_adapter(jaxlm.load(tmp_path / "base"), tmp_path / "adapter")
    (tmp_path / "adapter" / "config.json").unlink()  # as PEFT writes adapters
    np.testing.assert_allclose(outputs(jaxlm.load(tmp_path / "adapter")), outputs(lm), atol=1e-5)


def test_a_stored_head_is_stored_again_over_a_base_without_a_head(tmp_path):
    model = dataclasses.replace(FAMILIES["bert"], heads_on_top=("pooled",))  # its files have no prefix
    jaxlm.save(LM(model, Transformer(model), random_params(model)), tmp_path / "base")
    base = jaxlm.load(tmp_path / "base", head="classes", labels=2, log=lambda message: None)
    lm = with_adapter(base, CONFIGS["all"])
    jaxlm.save(lm, tmp_path / "adapter")
    loaded = jaxlm.load(tmp_path / "adapter")
    assert set(loaded.adapted) == set(lm.adapted) and "classes_head/dense/kernel" in loaded.adapted
    jaxlm.save(loaded, tmp_path / "again")
    np.testing.assert_allclose(outputs(jaxlm.load(tmp_path / "again")), outputs(lm), atol=1e-5)


def test_a_merged_model_is_a_whole_model(tmp_path):
    lm = with_adapter(write_base("llama", tmp_path / "base"), CONFIGS["dora"])
    jaxlm.save(jaxlm.merge(lm), tmp_path / "merged")
    shutil.rmtree(tmp_path / "base")
    np.testing.assert_allclose(outputs(jaxlm.load(tmp_path / "merged")), outputs(lm), atol=1e-5)


def test_adapters_are_added_switched_and_removed(tmp_path):
    base = write_base("llama", tmp_path / "base")
    lms = [with_adapter(base, AdapterConfig(2 + n, targets="query,mlp"), seed=n) for n in range(2)]
    for n, lm in enumerate(lms):
        jaxlm.save(lm, tmp_path / f"{n}")
    first = jaxlm.add_adapter(base, tmp_path / "0")
    np.testing.assert_allclose(outputs(first), outputs(lms[0]), atol=1e-5)
    both = jaxlm.add_adapter(first, tmp_path / "1")
    np.testing.assert_allclose(
        outputs(jaxlm.load(tmp_path / "base", adapter=[tmp_path / "0", tmp_path / "1"])), outputs(both), atol=1e-6
    )
    update = lambda lm: jax.tree.map(lambda a, b: a - b, jaxlm.merge(lm).params, base.params)
    summed = jax.tree.map(jnp.add, *map(update, lms))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), update(both), summed)
    jaxlm.save(both, tmp_path / "both")  # as one adapter of rank 5
    np.testing.assert_allclose(outputs(jaxlm.load(tmp_path / "both")), outputs(both), atol=1e-5)
    half = jaxlm.add_adapter(base, tmp_path / "0", weight=0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 2, atol=1e-6), update(half), update(first))
    alone = jaxlm.remove_adapters(both)
    assert all(a is b for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(base.params), strict=True))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_new_adapter_changes_no_output_and_has_the_scale_of_its_kind(kind):
    model = FAMILIES["llama"]
    params = random_params(model)
    new = adapters.add(params, AdapterConfig(4, alpha=6.0, kind=kind, dropout=0.25), jax.random.key(0))
    run = lambda params: apply(Transformer(model), params, TOKENS_BT)
    np.testing.assert_allclose(run(new), run(params), atol=1e-5)
    for node in adapters.select_nodes(new).values():
        assert node.scale == (3.0 if kind == "rslora" else 1.5) and node.dropout == 0.25
        assert (node.magnitude is not None) == (kind == "dora")


def trained_paths(name: str, **fields) -> set[str]:
    config = AdapterConfig(2, targets="query", **fields)
    params = adapters.add(random_params(FAMILIES[name]), config, jax.random.key(0))
    return {path for path, x in parameters.by_path(adapters.trained(config, params)).items() if x}


def test_an_adapter_trains_its_arrays_the_head_for_labels_and_the_chosen_biases():
    arrays = {f"encoder/layers/attention/query/kernel/{name}" for name in "ab"}
    head = {f"classes_head/{part}/{name}" for part in ("dense", "out") for name in ("kernel", "bias")}
    assert trained_paths("bert") == arrays | head
    assert trained_paths("bert", biases="adapted") == arrays | head | {"encoder/layers/attention/query/bias"}
    biases = trained_paths("bert", biases="all") - arrays - head
    assert "encoder/layers/mlp/up/bias" in biases and all(path.endswith("/bias") for path in biases)
    assert trained_paths("modernbert") == arrays  # its head is over tokens
    assert trained_paths("gpt2", kind="dora") == {
        f"decoder/layers/attention/query/kernel/{name}" for name in ("a", "b", "magnitude")
    }


def test_the_norm_of_a_magnitude_is_a_constant_for_the_gradient():
    """Liu et al. 2024, section 4.3: the gradient of the update is that of the matrix times magnitude / norm."""
    draw = lambda n, *shape: jnp.asarray(np.random.default_rng(n).standard_normal(shape), jnp.float32)
    w, a, b, m, x, y = draw(0, 5, 4), draw(1, 5, 2), draw(2, 2, 4), draw(3, 4), draw(4, 3, 5), draw(5, 3, 4)
    norm = np.linalg.norm(w + 1.5 * a @ b, axis=0)
    loss = lambda b: (LowRank(w, a, b, m, 1.5).dot(x, 1, jnp.float32) * y).sum()
    np.testing.assert_allclose(jax.grad(loss)(b), 1.5 * (x @ a).T @ (y * m / norm), rtol=1e-5)


def test_updates_follow_the_order_of_entries_of_a_layout():
    """No published family permutes entries; a table with such a layout has correct files too."""
    model = FAMILIES["llama"]
    family = FAMILY_TABLE["llama"]
    flip = Layout(lambda config, x: x.T[::-1, ::-1], lambda config, x: x[::-1, ::-1].T)
    rules = tuple(rule._replace(layout=flip) if rule.hf.endswith("up_proj.weight") else rule for rule in family.rules)
    flipped = family._replace(rules=rules)
    draw = np.random.default_rng(0)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = to_hf(flipped, model, random_params(model))[name].make()
    factors = peft.Factors(*(draw.standard_normal(shape).astype(np.float32) for shape in ((2, 16), (32, 2))), scale=0.5)
    params = updates.add_updates(flipped, model, random_params(model), {name: factors})
    merged = to_hf(flipped, model, params)[name].make()
    np.testing.assert_allclose(merged, weight + 0.5 * factors.b_OR @ factors.a_RI, atol=1e-5)


def test_dropout_applies_to_the_inputs_of_updates_in_training_alone():
    model = ModelConfig(**SIZES)
    params = adapters.add(random_params(model), AdapterConfig(4, dropout=0.5), jax.random.key(0))
    run = lambda params, key=None: apply(Transformer(model), params, TOKENS_BT, key=key)
    np.testing.assert_array_equal(run(params, jax.random.key(1)), run(params))  # B is zero
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.1 if parameters.path_of(path).endswith("/b") else leaf, params
    )
    assert np.abs(run(params, jax.random.key(1)) - run(params)).max() > 1e-3


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_text(folder)
    return folder


@pytest.fixture
def base_run(data_dir, tmp_path, monkeypatch, no_plots) -> dict:
    monkeypatch.setenv("JAXLM_CACHE", str(data_dir / "cache"))
    base = fit(run_config(data_dir, tmp_path / "base", steps=3, checkpoint_every=3, eval_every=3), summary=False)
    assert base.tokenizer is not None
    return {
        "model": None,
        "init": str(tmp_path / "base"),
        "adapter": AdapterConfig(2, targets="query,mlp", dropout=0.1),
    }


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        pytest.param("lora", "float32", marks=pytest.mark.long),
        ("dora", "nf4"),
        pytest.param("lora", "int4", marks=pytest.mark.long),
        pytest.param("rslora", "bfloat16", marks=pytest.mark.long),
    ],
)
@pytest.mark.long
def test_a_resumed_run_has_the_same_adapter(data_dir, base_run, tmp_path, devices, kind, base):
    more = base_run | {"adapter": dataclasses.replace(base_run["adapter"], kind=kind, base=base, group=16)}
    whole = fit(run_config(data_dir, tmp_path / "whole", **more), summary=False)
    run = run_config(data_dir, tmp_path / "run", **more)
    for steps in (5, 2):
        with pytest.raises(jaxlm.Stopped):
            fit(run, stop=stop_after(steps), summary=False)
    lm = fit(run, summary=False)
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert outputs(lm).tobytes() == outputs(whole).tobytes()
    loaded = jaxlm.load(tmp_path / "run")
    np.testing.assert_allclose(outputs(loaded), outputs(lm), atol=1e-5)
    loaded_base = jaxlm.load(tmp_path / "base")
    bases = [leaf.base if isinstance(leaf, LowRank) else leaf for leaf in parameters.by_path(lm.params, True).values()]
    for leaf, expected in zip(bases, jax.tree.leaves(loaded_base.params), strict=True):
        if not nodes.is_node(leaf):
            np.testing.assert_array_equal(leaf, expected.astype(leaf.dtype))  # nothing else was trained
    size = lambda folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size(tmp_path / "run" / "export") < size(tmp_path / "base" / "export")
    assert np.abs(outputs(lm) - outputs(loaded_base)).max() > 1e-3


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [
        ("--adapter.rank", "2", "--adapter.base", "int4", "--adapter.group", "16", "--adapter.kind", "dora"),
        ("--quantize.weights", "int8"),
        ("--prune.sparsity", "0.5", "--prune.method", "movement", "--prune.every", "3"),
        ("--distill.teacher", "BASE", "--distill.hidden", "1"),
    ],
    ids=lambda flags: flags[0],
)
def test_a_run_that_is_killed_has_the_same_result(data_dir, base_run, tmp_path, flags):
    """SIGKILL after different numbers of lines, for each way to make a model smaller."""
    (data_dir / "tiny.py").write_text(CONFIG)
    steps = ("--steps", "40", "--checkpoint-every", "5", "--eval-every", "20", "--log-every", "4")
    arguments = (
        *steps,
        "--init",
        str(tmp_path / "base"),
        *(str(tmp_path / "base") if x == "BASE" else x for x in flags),
    )
    process = start(data_dir / "tiny.py", tmp_path / "whole", *arguments)
    output = process.communicate(timeout=300)[1]
    assert process.returncode == 0, output
    for line in ("step 8/", "step 16/", "scores    step 20/", "step 40/"):
        process = start(data_dir / "tiny.py", tmp_path / "run", *arguments)
        wait_for(process, line)
        process.kill()
        process.communicate()
    process = start(data_dir / "tiny.py", tmp_path / "run", *arguments)
    output = process.communicate(timeout=300)[1]
    assert process.returncode == 0, output
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.long
def test_an_adapter_is_trained_on_a_mesh_as_on_one_device(data_dir, base_run, tmp_path, devices):
    more = base_run | {"adapter": dataclasses.replace(base_run["adapter"], dropout=0.0), "dropout": 0.0}
    one = fit(run_config(data_dir, tmp_path / "one", **more), summary=False)
    devices(4)
    mesh = MeshConfig(data=1, fsdp=2, tensor=2)
    many = fit(run_config(data_dir, tmp_path / "many", mesh=mesh, **more), summary=False)
    np.testing.assert_allclose(outputs(jaxlm.load(tmp_path / "many")), outputs(one), atol=2e-3)
    query = many.params["decoder"]["layers"]["attention"]["query"]["kernel"]
    assert query.a.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", None)


@pytest.mark.long
def test_a_run_starts_from_the_merged_weights_of_an_adapter(data_dir, base_run, tmp_path, devices):
    lm = fit(run_config(data_dir, tmp_path / "first", **base_run), summary=False)
    more = base_run | {"init": str(tmp_path / "first"), "optimizer": jaxlm.OptimizerConfig(rate=0.0)}
    second = fit(run_config(data_dir, tmp_path / "second", **more), summary=False)
    np.testing.assert_allclose(outputs(second), outputs(lm), atol=1e-5)
    np.testing.assert_allclose(outputs(jaxlm.load(tmp_path / "second")), outputs(lm), atol=1e-5)


def test_an_adapter_requires_initial_weights(data_dir, tmp_path, devices, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(data_dir / "cache"))
    with pytest.raises(UserError, match=r"adapter.rank is 2, but the run has no initial weights to adapt; .* --init"):
        fit(run_config(data_dir, tmp_path / "run", adapter=AdapterConfig(2)))


def test_adapters_of_other_bases_are_refused(tmp_path):
    base = write_base("llama", tmp_path / "base")
    jaxlm.save(with_adapter(base, CONFIGS["all"]), tmp_path / "adapter")
    other = dataclasses.replace(FAMILIES["llama"], width=32)
    jaxlm.save(LM(other, Transformer(other), random_params(other)), tmp_path / "other")
    message = r"(?s)does not fit the base; it updates .*down_proj \[16, 32\], where the base has \[32, 32\].*: .*base"
    with pytest.raises(UserError, match=message):
        jaxlm.load(tmp_path / "other", adapter=tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        jaxlm.add_adapter(jaxlm.load(tmp_path / "other"), tmp_path / "adapter")
    write_base("bert", tmp_path / "bert")
    with pytest.raises(UserError, match=r"down_proj .*, which the base does not have and .* more; give the model"):
        jaxlm.load(tmp_path / "bert", adapter=tmp_path / "adapter")


def test_an_adapter_that_names_another_base_of_the_same_sizes_is_reported(tmp_path):
    jaxlm.save(with_adapter(write_base("llama", tmp_path / "base"), CONFIGS["all"]), tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    shutil.copytree(tmp_path / "base", tmp_path / "moved" / "base")
    for name, count in (("base", 0), ("moved/base", 0), ("other", 1)):
        messages: list[str] = []
        jaxlm.load(tmp_path / name, adapter=tmp_path / "adapter", log=messages.append)
        assert len(messages) == count and all("names" in one and "as its base" in one for one in messages), messages


def edit(folder: Path, **values) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGE = {
    "another method": (lambda f: edit(f, peft_type="IA3"), "peft_type IA3; only LORA is supported"),
    "an unknown option": (lambda f: edit(f, trainable_token_indices=[1]), "sets trainable_token_indices"),
    "another rank": (lambda f: edit(f, r=3), r"its rank is 3 in adapter_config.json"),
    "a rank of another type": (lambda f: edit(f, r="4"), "r is '4'; it must be an integer"),
    "an invalid pattern": (lambda f: edit(f, rank_pattern={"(": 3}), r"rank_pattern has the invalid pattern '\('"),
    "no magnitudes": (lambda f: edit(f, use_dora=True), "use_dora in adapter_config.json contradicts"),
    "no base": (lambda f: edit(f, base_model_name_or_path=None), r"names no base; load it with jaxlm.load\(base, "),
    "a missing base": (lambda f: edit(f, base_model_name_or_path="away"), "base of the adapter in .* cannot be found"),
    "itself as base": (lambda f: edit(f, base_model_name_or_path=str(f)), "names itself as the base"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "a truncated file": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "truncated|corrupt",
    ),
    "half an update": (lambda f: drop(f, "lora_B"), "has no lora_B for"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
}


def drop(folder: Path, part: str) -> None:
    tensors = {name: np.asarray(x) for name, x in safetensors.read_file(folder / peft.WEIGHTS).items()}
    del tensors[next(name for name in tensors if part in name)]
    (folder / peft.WEIGHTS).unlink()
    safetensors.write(tensors, folder / peft.WEIGHTS)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapters_are_refused(damage, tmp_path):
    jaxlm.save(with_adapter(write_base("gpt2", tmp_path / "base"), CONFIGS["all"]), tmp_path / "adapter")
    change, message = DAMAGE[damage]
    change(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        jaxlm.load(tmp_path / "adapter")


def test_several_magnitudes_are_not_one_adapter(tmp_path):
    base = write_base("llama", tmp_path / "base")
    jaxlm.save(with_adapter(base, CONFIGS["dora"]), tmp_path / "0")
    both = jaxlm.add_adapter(jaxlm.add_adapter(base, tmp_path / "0"), tmp_path / "0")
    with pytest.raises(UserError, match=r"save jaxlm.merge\(lm\) instead"):
        jaxlm.save(both, tmp_path / "both")
    with pytest.raises(UserError, match=r"weight is 0.5, but .* has magnitudes"):
        jaxlm.add_adapter(base, tmp_path / "0", weight=0.5)
    assert nodes.is_node(both.params["decoder"]["layers"]["mlp"]["up"]["kernel"])


@pytest.mark.parametrize("inputs", [pytest.param("float", marks=pytest.mark.long), "int8"])
@pytest.mark.long
def test_training_with_rounded_weights_exports_them_quantised_and_resumes_exactly(
    data_dir, base_run, tmp_path, devices, inputs
):
    quantize = QuantizeConfig("int4", group=16, inputs=inputs, targets="mlp")
    more = base_run | {"adapter": AdapterConfig(), "quantize": quantize}
    whole = fit(run_config(data_dir, tmp_path / "whole", **more), summary=False)
    run = run_config(data_dir, tmp_path / "run", **more)
    with pytest.raises(jaxlm.Stopped):
        fit(run, stop=stop_after(5), summary=False)
    lm = fit(run, summary=False)
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert outputs(lm).tobytes() == outputs(whole).tobytes()
    up = lm.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert up.weights == "int4" and up.values.dtype == jnp.int4
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert scores["loss"] == next(row["eval/loss"] for row in reversed(log) if "eval/loss" in row)
    start = jaxlm.load(tmp_path / "base").params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert np.abs(nodes.dense_layers(up) - start).max() > 0.01


def test_rounded_weights_and_adapters_are_two_runs():
    run = RunConfig(adapter=AdapterConfig(2), quantize=QuantizeConfig("int8"), data=DataConfig(path="x"), init="y")
    with pytest.raises(UserError, match=r"quantize.weights is int8, and adapter.rank is set; set one of them"):
        run.check()
    with pytest.raises(UserError, match=r"quantize.inputs is int8, which requires integer weights, not nf4"):
        dataclasses.replace(run, adapter=AdapterConfig(), quantize=QuantizeConfig("nf4", inputs="int8")).check()

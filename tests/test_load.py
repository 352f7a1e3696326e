"""Loading, calling and saving models, and the memory that this requires."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import LM, UserError, families
from jaxlm.config import MeshConfig, ModelConfig, TokenizerConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.devices import sharding
from jaxlm.families import PRESETS
from jaxlm.hub import convert, safetensors
from jaxlm.nn.transformer import Transformer
from jaxlm.storage import disk

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "your_model.md").read_text()
STORIES = ROOT.parent / "shared" / "models" / "stories260k"
SMALL = {"vocabulary": 48, "max_length": 16, "width": 16, "layers": 2, "heads": 2, "mlp_width": 24}
BERT = dataclasses.replace(PRESETS["bert-base"], **SMALL)
LLAMA = dataclasses.replace(PRESETS["llama-3.2-1b"], **SMALL, kv_heads=1)
BART = dataclasses.replace(PRESETS["bart-base"], **SMALL)
T5 = dataclasses.replace(PRESETS["t5-small"], **SMALL, head_width=8)
TOKENS = np.array([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def save_random_model(folder: Path, config: ModelConfig) -> Path:
    jaxlm.save(LM(config, Transformer(config), random_params(config)), folder)
    return folder


@pytest.fixture
def bert(tmp_path) -> Path:
    return save_random_model(tmp_path / "bert", BERT)


def test_a_mask_is_segments_of_0_and_1(bert):
    lm = jaxlm.load(bert, head="masked_lm")
    masked, packed = lm(TOKENS, MASK), lm(TOKENS, segments_BT=MASK)
    np.testing.assert_array_equal(masked.logits, packed.logits)
    alone = lm(TOKENS[1:, :3])
    np.testing.assert_allclose(masked.logits[1, :3], alone.logits[0], atol=1e-5)
    with pytest.raises(UserError, match="mask_BT and segments_BT are both given"):
        lm(TOKENS, MASK, segments_BT=MASK)


def test_a_call_equals_the_pure_function(bert):
    lm = jaxlm.load(bert, head="none")
    out = jax.jit(lm.apply)(lm.params, TOKENS, MASK)
    np.testing.assert_allclose(lm(TOKENS, MASK).hidden_BTD, out.hidden_BTD, atol=1e-5)
    assert out.logits is None and out.encoder is None
    grads = jax.jit(jax.grad(lambda params: lm.apply(params, TOKENS).hidden_BTD.sum()))(lm.params)
    assert jax.tree.structure(grads) == jax.tree.structure(lm.params)


def test_states_and_attentions_are_returned_on_request(bert):
    lm = jaxlm.load(bert, head="none")
    out = lm(TOKENS, MASK, states=True, attentions=True)
    assert out.encoder.states_LBTD.shape == (3, 2, 5, 16)
    np.testing.assert_array_equal(out.encoder.states_LBTD[-1], out.hidden_BTD)
    weights = np.asarray(out.encoder.attention_LBHTS)
    assert weights.shape == (2, 2, 2, 5, 5)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert not weights[:, 1, :, :, 3:].any()
    assert out.decoder is None and lm(TOKENS, states=True).encoder.attention_LBHTS is None


def test_an_encoder_decoder_returns_both_stacks(tmp_path):
    lm = jaxlm.load(save_random_model(tmp_path / "bart", BART))
    out = lm(TOKENS, MASK, target_tokens_BT=TOKENS[:, :4], states=True, attentions=True)
    assert out.logits.shape == (2, 4, 48) and out.hidden_BTD.shape == (2, 4, 16)
    assert out.encoder.states_LBTD.shape == (3, 2, 5, 16)
    assert out.decoder.cross_attention_LBHTS.shape == (2, 2, 2, 4, 5)
    # By default, the decoder reads the input of the encoder after its start token.
    shifted = np.concatenate([np.full((2, 1), 2), TOKENS[:, :-1]], 1)
    np.testing.assert_allclose(lm(TOKENS, MASK).logits, lm(TOKENS, MASK, target_tokens_BT=shifted).logits, atol=1e-5)


def test_the_encoder_of_an_encoder_decoder_is_loaded_alone(tmp_path):
    folder = save_random_model(tmp_path / "t5", T5)
    whole, alone = jaxlm.load(folder), jaxlm.load(folder, head="encoder")
    assert alone.config.structure == "encoder" and "decoder" not in alone.params
    states = whole(TOKENS, target_tokens_BT=TOKENS, states=True).encoder.states_LBTD[-1]
    np.testing.assert_allclose(alone(TOKENS).hidden_BTD, states, atol=1e-5)
    jaxlm.save(alone, tmp_path / "encoder")
    assert json.loads((tmp_path / "encoder" / "config.json").read_text())["architectures"] == ["T5EncoderModel"]
    again = jaxlm.load(tmp_path / "encoder")
    np.testing.assert_array_equal(again(TOKENS).hidden_BTD, alone(TOKENS).hidden_BTD)


def test_a_new_head_is_initialized_and_reported(bert):
    messages: list[str] = []
    lm = jaxlm.load(bert, head="classes", labels=["no", "yes", "perhaps"], log=messages.append)
    assert lm(TOKENS, MASK).logits.shape == (2, 3)
    assert lm.config.labels == ("no", "yes", "perhaps")
    [line] = messages
    assert "classes_head/out/kernel" in line and "classes_head/dense" not in line  # the file contains BERT's pooler
    assert np.asarray(lm.params["classes_head"]["out"]["kernel"]).std() == pytest.approx(0.02, rel=0.5)
    assert "masked_lm_head" not in lm.params


def test_files_of_sentence_transformers_are_not_saved_with_a_new_head(bert, tmp_path):
    """Files of sentence-transformers are saved with the body, but not with a new head."""
    pooling = {"modules.json": b"[]", "1_Pooling/config.json": b"{}"}
    for head, kept in (("none", True), ("pooled", True), ("masked_lm", True), ("classes", False), ("tokens", False)):
        lm = jaxlm.load(bert, head=head, log=lambda _: None)
        jaxlm.save(dataclasses.replace(lm, files={**lm.files, **pooling}), tmp_path / head)
        assert [(tmp_path / head / name).exists() for name in pooling] == [kept, kept]


def test_labels_are_saved_and_loaded(bert, tmp_path):
    lm = jaxlm.load(bert, head="tokens", labels=["O", "B-PER"], log=lambda _: None)
    jaxlm.save(lm, tmp_path / "tagger")
    values = json.loads((tmp_path / "tagger" / "config.json").read_text())
    assert values["architectures"] == ["BertForTokenClassification"]
    assert (values["id2label"], values["label2id"]) == ({"0": "O", "1": "B-PER"}, {"O": 0, "B-PER": 1})
    assert jaxlm.load(tmp_path / "tagger").config.labels == ("O", "B-PER")


def test_parameters_computation_and_file_have_separate_dtypes(bert, tmp_path):
    half = jaxlm.load(bert, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    assert half(TOKENS).hidden_BTD.dtype == jnp.bfloat16
    mixed = jaxlm.load(bert, compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(mixed.params)} == {jnp.dtype("float32")}
    assert mixed(TOKENS).hidden_BTD.dtype == jnp.bfloat16
    # Each tensor keeps the dtype of its file, unless another dtype is requested.
    jaxlm.save(mixed, tmp_path / "halved", dtype="bfloat16")
    stored = safetensors.read(tmp_path / "halved")
    assert {tensor.dtype.name for tensor in stored.values()} == {"bfloat16"}
    jaxlm.save(jaxlm.load(tmp_path / "halved"), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "halved" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(UserError, match="dtype is 'bf16'; perhaps you meant 'bfloat16'"):
        jaxlm.load(bert, dtype="bf16")


def test_unknown_keys_and_files_are_kept(bert, tmp_path):
    values = json.loads((bert / "config.json").read_text())
    values |= {"gradient_checkpointing": False, "_name_or_path": "x"}
    (bert / "config.json").write_text(json.dumps(values))
    (bert / "generation_config.json").write_text('{"max_length": 7}')
    jaxlm.save(jaxlm.load(bert), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == values
    assert (tmp_path / "again" / "generation_config.json").read_text() == '{"max_length": 7}'


def test_names_of_the_file_are_kept(bert, tmp_path):
    """Old names, a missing prefix, a copy of a tied tensor, and a buffer are written as they were read."""
    tensors = {name: np.asarray(tensor) for name, tensor in safetensors.read(bert).items()}
    old = {name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma"): x for name, x in tensors.items()}
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    old["embeddings.position_ids"] = np.arange(16)[None]
    safetensors.write(old, bert / safetensors.WEIGHTS)
    lm = jaxlm.load(bert)
    jaxlm.save(lm, tmp_path / "again")
    assert (tmp_path / "again" / safetensors.WEIGHTS).read_bytes() == (bert / safetensors.WEIGHTS).read_bytes()
    # A change applies to the copy as well.
    doubled = dataclasses.replace(lm, params=jax.tree.map(lambda leaf: 2 * leaf, lm.params))
    jaxlm.save(doubled, tmp_path / "doubled")
    new = safetensors.read(tmp_path / "doubled")
    np.testing.assert_array_equal(new["cls.predictions.decoder.weight"], new["embeddings.word_embeddings.weight"])


def test_each_device_of_a_mesh_has_its_slices(tmp_path):
    folder = save_random_model(tmp_path / "llama", LLAMA)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    whole, split = jaxlm.load(folder), jaxlm.load(folder, mesh=mesh)
    kernel = split.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 2, 24)}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(split.params), jax.device_get(whole.params))
    jaxlm.save(split, tmp_path / "again")
    assert (tmp_path / "again" / safetensors.WEIGHTS).read_bytes() == (folder / safetensors.WEIGHTS).read_bytes()


def test_large_leaves_are_transferred_in_parts(bert, monkeypatch):
    from jaxlm.hub import place

    whole = jaxlm.load(bert)
    starts, put = [], place._put
    monkeypatch.setattr(place, "_put", lambda shard, part, start: starts.append(start) or put(shard, part, start))
    monkeypatch.setattr(place, "CHUNK", 600)
    jax.tree.map(np.testing.assert_array_equal, jaxlm.load(bert).params, whole.params)
    assert starts.count(0) > 5 and max(starts) > 0 and len(starts) > 2 * starts.count(0)


def test_large_models_are_written_in_shards(bert, tmp_path):
    lm = jaxlm.load(bert)
    jaxlm.save(lm, tmp_path / "shards", max_shard_bytes=5000)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, jaxlm.load(tmp_path / "shards").params, lm.params)


def test_a_folder_is_kept_without_overwrite(bert, tmp_path):
    lm = jaxlm.load(bert)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="full exists and is not empty"):
        jaxlm.save(lm, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").exists()
    jaxlm.save(lm, tmp_path / "full", overwrite=True)
    assert not (tmp_path / "full" / "thesis.txt").exists() and jaxlm.load(tmp_path / "full").config == lm.config
    with pytest.raises(UserError, match="is a file"):
        jaxlm.save(lm, bert / "config.json")
    with pytest.raises(UserError, match=r"cannot be created, because .*config.json is a file"):
        jaxlm.save(lm, bert / "config.json" / "new")


def test_only_folders_of_a_save_are_removed(bert, tmp_path):
    """Folders with names that other programs and earlier versions use for temporary and old folders are kept."""
    lm = jaxlm.load(bert)
    theirs = [tmp_path / name for name in ("model.old", "model.part", "model.tmp")]
    for folder in theirs:
        folder.mkdir()
        (folder / "thesis.txt").write_text("x")
    for _ in range(2):
        jaxlm.save(lm, tmp_path / "model", overwrite=True)
    assert all((folder / "thesis.txt").exists() for folder in theirs)
    assert set(tmp_path.iterdir()) == {bert, tmp_path / "model", *theirs}


def test_a_run_and_the_current_folder_are_not_overwritten(bert, tmp_path, monkeypatch):
    lm = jaxlm.load(bert)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="contains a run, which would be lost"):
        jaxlm.save(lm, tmp_path / "run", overwrite=True)
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for name in (".", "..", tmp_path / "here"):
        with pytest.raises(UserError, match="is the current folder, or contains it"):
            jaxlm.save(lm, name, overwrite=True)


def test_one_process_at_a_time_writes_a_model(bert, tmp_path):
    lm = jaxlm.load(bert)
    with disk.lock(disk.lock_path(tmp_path / "model"), "x", "y"), pytest.raises(UserError, match="is held by"):
        jaxlm.save(lm, tmp_path / "model")
    jaxlm.save(lm, tmp_path / "model")
    assert set(tmp_path.iterdir()) == {bert, tmp_path / "model"}


def test_an_interrupted_save_leaves_no_incomplete_model(bert, tmp_path, monkeypatch):
    lm = jaxlm.load(bert)
    jaxlm.save(lm, tmp_path / "there")
    before = (tmp_path / "there" / safetensors.WEIGHTS).read_bytes()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "write_sharded", fail)
    for folder in ("new", "there"):
        with pytest.raises(OSError, match="No space"):
            jaxlm.save(lm, tmp_path / folder, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "there"]
    assert (tmp_path / "there" / safetensors.WEIGHTS).read_bytes() == before


MISTAKES = {
    "no such head": (lambda lm, folder: jaxlm.load(folder, head="spam"), "head is 'spam', which this model does not"),
    "a near head": (lambda lm, folder: jaxlm.load(folder, head="token"), "perhaps you meant 'tokens'"),
    "encoder": (lambda lm, folder: jaxlm.load(folder, head="encoder"), "head is 'encoder', but the model is a"),
    "targets": (lambda lm, folder: lm(TOKENS, target_tokens_BT=TOKENS), "target_tokens_BT is given"),
    "one row": (lambda lm, folder: lm(TOKENS[0]), r"shape \(5,\); give \[rows, positions\]"),
    "too long": (lambda lm, folder: lm(np.zeros((1, 17), int)), "17 tokens, more than the 16 positions"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused(bert, name):
    call, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        call(jaxlm.load(bert), bert)


def test_a_long_list_of_tensor_mismatches_is_truncated():
    with pytest.raises(UserError) as error:
        convert.check_shapes({f"layer.{n:03}.weight": (2, 3) for n in range(100)}, {}, "weights")
    lines = str(error.value).splitlines()
    assert len(lines) == convert.MAX_LINES + 3
    assert "100 lines" in lines[0] and "layer.000.weight" in lines[1] and lines[-2].strip() == "... and 60 more"


def test_quantised_tensors_are_refused(bert):
    tensors = {name: np.asarray(tensor) for name, tensor in safetensors.read(bert).items()}
    name = "bert.pooler.dense.weight"
    safetensors.write(tensors | {name: tensors[name].astype(np.int8)}, bert / safetensors.WEIGHTS)
    refusal = "is quantised with int8: bert.pooler.dense.weight is in int8.*use the original checkpoint"
    with pytest.raises(UserError, match=refusal):
        jaxlm.load(bert)


MEASURE = """
import sys, jax, jaxlm
from jaxlm.devices import sharding
from jaxlm.config import MeshConfig
status = lambda key: int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8)) if len(jax.devices()) == 8 else None
jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.ones(8)))
if sys.argv[2] == "load":
    before = status("VmRSS")
    params = jaxlm.load(sys.argv[1], mesh=mesh).params
else:  # --init of a run
    from jaxlm.nn.transformer import Transformer
    from jaxlm.run.assembly import assemble
    from jaxlm.run.resolve import ResolvedModel
    from jaxlm.run.weights import start_from, weights_of
    from jaxlm.tasks import make_task
    data = jaxlm.DataConfig(path="text", length=32)
    run = jaxlm.RunConfig(None, jaxlm.CausalLM(), data, init=sys.argv[1], batch=8, mesh=MeshConfig(data=1, fsdp=8))
    task = make_task(run, None)
    weights = weights_of(run, None, task, (), False)
    like = assemble(ResolvedModel(run, mesh, task, weights.config, Transformer)).dense
    before = status("VmRSS")
    params = start_from(weights, like, lambda paths: {}, lambda path, leaf: leaf, print)
jax.block_until_ready(params)
own = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
print(status("VmHWM") - before - own, own)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "devices, dtype, way",
    [*((n, dtype, "load") for n in (1, 8) for dtype in ("float32", "bfloat16")), (8, "bfloat16", "init")],
)
def test_loading_requires_little_memory_above_the_shards(tmp_path, devices, dtype, way):
    """Loading a model of about 1 GB requires memory for its shards, the largest tensor and at most 200 MB.

    The parameters of a run that starts from it are float32, and twice as large as a file in bfloat16.
    """
    config = ModelConfig(**{**dataclasses.asdict(LLAMA), "width": 1024, "heads": 16, "kv_heads": 8, "mlp_width": 4096})
    config = dataclasses.replace(config, layers=14 if dtype == "float32" else 28, vocabulary=32768)
    random = np.random.default_rng(0)
    family = families.FAMILIES["llama"]
    shapes = convert.hf_shapes(family, config)
    chunk = random.standard_normal(1 << 20, np.float32).astype(jnp.dtype(dtype))
    tensors = {
        name: safetensors.Pending(shape, chunk.dtype, lambda shape=shape: np.resize(chunk, shape))
        for name, shape in shapes.items()
    }
    safetensors.write_sharded(tensors, tmp_path)
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **family.config_to_hf(config)}
    (tmp_path / "config.json").write_text(json.dumps(values))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size > 0.9e9
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), way],
        cwd=ROOT,
        env={"PATH": "/usr/bin", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
        | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    above, own = map(int, process.stdout.split())
    largest = max(int(np.prod(shape)) * chunk.dtype.itemsize for shape in shapes.values())
    print(f"{way}, {devices} devices, {size / 1e9:.2f} GB of {dtype}: {above / 1e6:.0f} MB above {own / 1e6:.0f} MB")
    assert above < largest + 200e6


@pytest.mark.long
def test_the_documentation_adds_a_custom_head_to_a_body(tmp_path, monkeypatch, no_plots):
    [code] = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class WithOwnHead" in block]
    assert len(code.strip().splitlines()) < 30
    text = "the quick brown fox jumps over a lazy dog\n" * 50
    tokenizer = tokenizers.train([text], TokenizerConfig(train="wordpiece"), 50)
    config = dataclasses.replace(BERT, vocabulary=tokenizer.size)
    lm = LM(config, Transformer(config), random_params(config), tokenizer)
    monkeypatch.chdir(tmp_path)
    jaxlm.save(lm, "bert-base-uncased")
    Path("text.txt").write_text(text)
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    names: dict = {}
    exec(code, names)
    again, run = names["again"], names["run"]
    assert set(again.params) == {"embeddings", "encoder", "own_head"}
    assert again(TOKENS).logits.shape == (2, 5, tokenizer.size)
    change = jnp.abs(again.params["embeddings"]["tokens"] - lm.params["embeddings"]["tokens"]).max()
    assert 0 < change < 3 * 3 * run.optimizer.rate  # three steps from the loaded weights
    with pytest.raises(UserError, match="belongs to the module WithOwnHead, not None"):
        jaxlm.load("runs/own")


@pytest.mark.long
@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models/stories260k")
def test_a_trained_llama_generates_its_story():
    lm = jaxlm.load(STORIES)
    [text] = jaxlm.generate(lm, [""], max_new_tokens=256, temperature=0)
    assert text == STORIES.with_suffix(".txt").read_text().removesuffix("\n")

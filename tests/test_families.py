"""Families: published sizes, exact round trips through their file formats, and errors."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.families import FAMILIES, OWN, PRESETS, Origin, load, open_folder, save
from jaxlm.hub import convert, safetensors
from jaxlm.nn import transformer

PUBLISHED = {
    ("gpt2", ("lm",)): 124_439_808,
    ("gpt2-medium", ("lm",)): 354_823_168,
    ("gpt2-large", ("lm",)): 774_030_080,
    ("gpt2-xl", ("lm",)): 1_557_611_200,
    ("bert-base", ("pooled",)): 109_482_240,
    ("bert-large", ("pooled",)): 335_141_888,
    ("longformer-base-4096", ("masked_lm",)): 148_711_257,
    ("led-base-16384", ("lm",)): 161_894_745,
    ("phi-3-mini", ("lm",)): 3_821_079_552,
    ("phi-4", ("lm",)): 14_659_507_200,
    ("smollm3-3b", ("lm",)): 3_075_098_624,
    ("pythia-70m", ("lm",)): 70_426_624,
    ("pythia-1b", ("lm",)): 1_011_781_632,
    ("pythia-6.9b", ("lm",)): 6_857_302_016,
    ("pythia-12b", ("lm",)): 11_846_072_320,
    ("gpt-j-6b", ("lm",)): 6_050_882_784,
    ("gpt-neo-125m", ("lm",)): 125_198_592,
    ("opt-125m", ("lm",)): 125_239_296,
    ("opt-350m", ("lm",)): 331_196_416,
    ("bloom-560m", ("lm",)): 559_214_592,
    ("bloom-7b1", ("lm",)): 7_069_016_064,
    ("falcon-7b", ("lm",)): 6_921_720_704,
    ("falcon-40b", ("lm",)): 41_303_293_952,
}
ROUNDED = {"gpt3-175b": (175e9, 0.01), "transformer-base": (65e6, 0.04), "transformer-big": (213e6, 0.04)}
ROUNDED |= {"gpt-oss-20b": (20.9e9, 0.01), "gpt-oss-120b": (116.8e9, 0.01)}
ROUNDED |= {"deepseek-v2-lite": (15.7e9, 0.01), "deepseek-v3": (671e9, 0.01)}

ODD = {"vocabulary": 17, "max_length": 9, "width": 12, "layers": 2, "heads": 3}
SHAPES = {
    "odd": ODD,
    "one layer": ODD | {"layers": 1, "heads": 1},
    "eleven layers": ODD | {"layers": 11, "width": 6},  # layer 10 sorts before layer 2
    "wide": ODD | {"mlp_width": 7, "activation": "relu"},
    "untied": ODD | {"tied_embeddings": False},
}
IN_EVERY_SHAPE = ("bert", "t5")  # the default run tests the other families with one head in the odd shape
MEMBERS = [
    pytest.param(
        name,
        heads,
        shape,
        id=f"{name}-{'+'.join(heads) or 'body'}-{label.replace(' ', '_')}",
        marks=()
        if name in IN_EVERY_SHAPE or (label == "odd" and heads == next(iter(family.heads)))
        else pytest.mark.long,
    )
    for name, family in FAMILIES.items()
    for heads in family.heads
    for label, shape in SHAPES.items()
    if label == "odd" or heads == next(iter(family.heads))  # all shapes for one head, one shape for all heads
]


def member(name: str, heads: tuple, shape: dict) -> ModelConfig:
    """Returns the config of a small model of the family, from its first preset."""
    preset = next(iter(FAMILIES[name].presets.values()))
    small: dict = {"decoder_layers": None, "position_offset": preset.position_offset}
    if preset.kv_heads:
        small |= {"kv_heads": 1}
    if preset.head_width:
        small |= {"head_width": 4}
    if preset.rotary_width:
        small |= {"rotary_width": 2}
    if preset.embedding_width:
        small |= {"embedding_width": 5}
    if preset.mlp_width:
        small |= {"mlp_width": 10}
    if preset.experts > 16:
        small |= {"experts": 16}
    if preset.linear_key_heads:
        sizes = {"linear_key_heads": 2, "linear_value_heads": 4, "linear_key_width": 3, "linear_value_width": 5}
        small |= sizes | {"mixers": ("gated_delta", "attention")}
    if preset.positions == "sinusoidal":
        shape = {"vocabulary": 17} | {key: value for key, value in shape.items() if key != "vocabulary"}
    if preset.mixer == "latent":
        small |= {"kv_heads": None, "value_width": 3, "key_value_rank": 5, "attention_scale": None}
    if name in ("bloom", "gpt_oss"):  # their MLPs have one activation, and that of BLOOM one width
        shape = {key: value for key, value in shape.items() if key not in ("mlp_width", "activation")}
    return dataclasses.replace(preset, heads_on_top=heads, **small | shape)


def random_params(config: ModelConfig, dtype: type = np.float32) -> dict:
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape).astype(dtype)
    params = convert.nested({path: draw(shape) for path, shape in convert.tree_shapes(config).items()})
    if not config.first_norm:  # the first layer's norm has no effect, and is not in the file
        params["encoder"]["layers"]["attention_norm"]["scale"][0] = 1
    return params


def same_tree(a: dict, b: dict) -> bool:
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return all(jax.tree.leaves(equal))


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder: Path, change) -> None:
    """Rewrites the tensors of a folder with `change(tensors)`."""
    tensors = {name: np.asarray(tensor) for name, tensor in safetensors.read(folder).items()}
    change(tensors)
    safetensors.write(tensors, folder / safetensors.WEIGHTS)


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    config = member("gpt2", ("lm",), ODD)
    assert save(config, random_params(config), tmp_path) == "gpt2"
    return tmp_path


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    config = member("bert", ("masked_lm", "next_sentence"), ODD)
    assert save(config, random_params(config), tmp_path) == "bert"
    return tmp_path


@pytest.mark.parametrize(("name", "heads"), PUBLISHED)
def test_presets_have_the_published_numbers_of_parameters(name, heads):
    config = dataclasses.replace(PRESETS[name], heads_on_top=heads)
    assert transformer.count_parameters(config) == PUBLISHED[name, heads]


@pytest.mark.parametrize("name", ROUNDED)
def test_presets_are_close_to_the_rounded_numbers_of_parameters(name):
    count, tolerance = ROUNDED[name]
    assert transformer.count_parameters(PRESETS[name]) == pytest.approx(count, rel=tolerance)


@pytest.mark.parametrize("name", ["bart", "t5", "albert", "modernbert", "gpt2"])
def test_shapes_are_those_of_the_initial_parameters(name):
    """Shapes do not depend on fields that affect only training, and configs that differ otherwise share none."""
    config = member(name, next(iter(FAMILIES[name].heads)), ODD | {"layers": 3})
    more = {"decoder_layers": 2} if config.structure == "encoder_decoder" else {}
    unequal = {"decoder_heads": 4, "decoder_mlp_width": 14} if name == "bart" else {}
    for changes in (more, unequal, {"dropout": 0.3, "mlp_width": None}, {"mlp_width": 14}):
        changed = dataclasses.replace(config, **changes)
        params = jax.eval_shape(
            lambda config=changed: transformer.init(transformer.Transformer(config), jax.random.key(0))
        )
        expected = {path: leaf.shape for path, leaf in convert.flat(params).items()}
        assert convert.tree_shapes(changed) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    PRESETS[name].check()


@pytest.mark.parametrize(("name", "heads", "shape"), MEMBERS)
def test_round_trip_is_exact(tmp_path, name, heads, shape):
    """Saving and loading preserves every parameter, and loading and saving preserves every byte."""
    config = member(name, heads, shape)
    params = random_params(config)
    extra = {"pad_token_id": 1}
    # If two formats support the model, the format of its origin is used.
    assert save(config, params, tmp_path / "first", extra=extra, origin=Origin({"model_type": name})) == name
    loaded, leaves, origin, fresh, *_ = load(tmp_path / "first")
    assert (
        convert.inference_config(loaded) == convert.inference_config(config)
        and loaded.heads_on_top == heads
        and not fresh
    )
    assert same_tree(leaves, params)
    save(loaded, leaves, tmp_path / "second", origin=origin)
    assert file_bytes(tmp_path / "second") == file_bytes(tmp_path / "first")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_random_file_is_converted_exactly(name):
    """Conversion from the HF format and back is exact for random tensors in every supported dtype."""
    config = member(name, next(iter(FAMILIES[name].heads)), ODD)
    family, rng = FAMILIES[name], np.random.default_rng(0)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        file = {n: rng.normal(size=shape).astype(dtype) for n, shape in convert.hf_shapes(family, config).items()}
        back = convert.to_hf(family, config, convert.to_ours(family, config, file))
        assert back.keys() == file.keys()
        assert all(back[n].dtype == dtype and back[n].make().tobytes() == file[n].tobytes() for n in file)


def test_layouts_match_the_file():
    """Head h of query is the h-th block of outputs. Conv1D is [in, out], and Linear is [out, in]."""
    config = ModelConfig(width=4, heads=2)
    x_4_12 = np.arange(48).reshape(4, 12)
    query, key, value = convert.conv_query_key_value.to_ours(config, x_4_12)
    assert query.shape == key.shape == value.shape == (4, 2, 2)
    assert (query[1].tolist(), value[0].tolist()) == ([[12, 13], [14, 15]], [[8, 9], [10, 11]])
    w_44 = np.arange(16).reshape(4, 4)
    assert convert.linear_heads_out.to_ours(config, w_44)[:, 1, 0].tolist() == w_44[2].tolist()
    assert convert.linear_heads_in.to_ours(config, w_44)[1, 0].tolist() == w_44[:, 2].tolist()
    assert convert.conv_heads_in.to_ours(config, w_44)[1, 0].tolist() == w_44[2].tolist()


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(dataclasses.replace(PRESETS["gpt3-xl"], vocabulary=17, max_length=4, layers=1), id="head_width"),
        pytest.param(dataclasses.replace(PRESETS["transformer-base"], **ODD), id="encoder_decoder"),
        pytest.param(ModelConfig(**ODD, feed_forward="gated"), id="gated"),
        pytest.param(ModelConfig(**ODD, biases=()), id="without biases"),
        pytest.param(ModelConfig(**(ODD | {"heads": 4}), kv_heads=2), id="grouped"),
        pytest.param(dataclasses.replace(PRESETS["bert-tiny"], **ODD, types=0), id="without types"),
        pytest.param(dataclasses.replace(PRESETS["bert-tiny"], **ODD, heads_on_top=("lm",)), id="heads"),
    ],
)
def test_models_without_a_family_are_saved_in_our_own_format(tmp_path, config):
    if config.head_width:
        config = dataclasses.replace(config, width=12, heads=3, head_width=5)
    params = random_params(config)
    assert save(config, params, tmp_path) == OWN
    loaded, leaves, *_ = load(tmp_path)
    assert loaded == config
    assert same_tree(leaves, params)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.long
def test_each_preset_has_the_format_of_its_family(name):
    """The computation determines the family: gpt3-small is a gpt2, but gpt3-xl with its wider heads is not."""
    supported = {kind for kind, family in FAMILIES.items() if convert.can_represent(family, PRESETS[name])}
    families = {kind for kind, family in FAMILIES.items() if name in family.presets}
    without_family = name in ("gpt3-xl", "gpt3-13b", "transformer-base", "transformer-big")
    assert families <= supported if not without_family else not supported


def test_training_fields_do_not_determine_the_format(tmp_path):
    config = dataclasses.replace(member("gpt2", ("lm",), ODD), scale_residual_init=False, dropout=0.3, initial_std=0.5)
    assert save(config, random_params(config), tmp_path) == "gpt2"
    loaded = load(tmp_path)[0]
    assert (loaded.dropout, loaded.initial_std, loaded.scale_residual_init) == (
        0.3,
        0.5,
        True,
    )  # the format does not support the last field


def test_config_contains_the_keys_of_transformers(gpt2_folder):
    values = json.loads((gpt2_folder / "config.json").read_text())
    assert (values["architectures"], values["model_type"]) == (["GPT2LMHeadModel"], "gpt2")
    assert (values["torch_dtype"], values["bos_token_id"]) == ("float32", None)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_dtype_of_the_file_is_kept(tmp_path, dtype):
    config = member("bert", ("pooled",), ODD)
    params = random_params(config, dtype)
    save(config, params, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == np.dtype(dtype).name
    assert same_tree(load(tmp_path)[1], params)


def test_jax_arrays_are_saved(tmp_path):
    config = member("gpt2", ("lm",), ODD)
    params = random_params(config)
    save(config, jax.tree.map(jax.numpy.asarray, params), tmp_path)
    assert same_tree(load(tmp_path)[1], params)


def test_names_without_prefix_and_buffers_are_read(gpt2_folder):
    """The published gpt2 file has no prefix and contains the causal mask."""
    params = load(gpt2_folder)[1]

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 9, 9), np.float32)
        tensors["h.1.attn.masked_bias"] = np.float32(-1e4).reshape(())
        tensors["lm_head.weight"] = tensors["wte.weight"]

    edit(gpt2_folder, strip)
    assert same_tree(load(gpt2_folder)[1], params)


def test_old_names_and_heads_missing_from_architectures_are_read(bert_folder):
    """bert-base-uncased has gamma and beta, and more heads than in its `architectures`."""
    config, params, *_ = load(bert_folder)

    def use_old_names(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = np.arange(9)[None]
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]

    edit(bert_folder, use_old_names)
    values = json.loads((bert_folder / "config.json").read_text())
    for architectures in (["BertForMaskedLM"], None):
        (bert_folder / "config.json").write_text(json.dumps(values | {"architectures": architectures}))
        loaded, leaves, *_ = load(bert_folder)
        assert loaded == config
        assert same_tree(leaves, params)


@pytest.mark.parametrize("architectures", [["GPT2Model"], ["GPT2ForTokenClassification"], []])
def test_tensors_determine_an_untied_head(tmp_path, architectures):
    config = member("gpt2", ("lm",), SHAPES["untied"])
    params = random_params(config)
    save(config, params, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"architectures": architectures}))
    loaded, leaves, *_ = load(tmp_path)
    assert loaded.heads_on_top == ("lm",)
    assert same_tree(leaves, params)


def test_a_copy_of_a_tied_tensor_may_replace_it(gpt2_folder):
    params = load(gpt2_folder)[1]
    edit(gpt2_folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("transformer.wte.weight")}))
    assert same_tree(load(gpt2_folder)[1], params)


def test_a_copy_that_differs_is_refused(gpt2_folder):
    edit(gpt2_folder, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1}))
    with pytest.raises(UserError, match=r"lm_head.weight differs from transformer.wte.weight.*tie_word_embeddings"):
        load(gpt2_folder)


def test_the_unused_bias_of_an_untied_bert_is_kept(tmp_path):
    """transformers computes with the decoder's bias, and also stores another bias."""
    config = member("bert", ("masked_lm",), SHAPES["untied"])
    save(config, random_params(config), tmp_path / "first")
    edit(tmp_path / "first", lambda tensors: tensors.update({"cls.predictions.bias": np.ones(17, np.float32)}))
    loaded, leaves, origin, *_ = load(tmp_path / "first")
    assert not np.array_equal(leaves["masked_lm_head"]["vocabulary"]["bias"], np.ones(17))
    save(loaded, leaves, tmp_path / "second", origin=origin)
    assert file_bytes(tmp_path / "second") == file_bytes(tmp_path / "first")


def test_two_names_of_one_tensor_are_refused(bert_folder):
    weight = "bert.pooler.dense.weight"
    edit(bert_folder, lambda tensors: tensors.update({"pooler.dense.weight": tensors[weight]}))
    with pytest.raises(UserError, match=f"the file contains {weight} twice"):
        load(bert_folder)


def test_missing_and_unexpected_tensors_are_listed_in_order(gpt2_folder):
    def damage(tensors):
        del tensors["transformer.h.1.ln_1.bias"]
        tensors["transformer.h.0.mlp.c_fc.weight"] = tensors["transformer.h.0.mlp.c_fc.weight"].T
        tensors["spam.weight"] = np.zeros((2, 12), np.float32)

    edit(gpt2_folder, damage)
    with pytest.raises(UserError) as error:
        load(gpt2_folder)
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "+ spam.weight [2, 12]",
        "- transformer.h.0.mlp.c_fc.weight [12, 48]",
        "+ transformer.h.0.mlp.c_fc.weight [48, 12]",
        "- transformer.h.1.ln_1.bias [12]",
    ]


def test_parameters_of_another_config_are_refused(tmp_path):
    config = member("gpt2", ("lm",), ODD)
    padded = dataclasses.replace(config, vocabulary=24)
    with pytest.raises(UserError, match=r"- embeddings/tokens \[17, 12\]\n.*\+ embeddings/tokens \[24, 12\]"):
        save(config, random_params(padded), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_error_for_a_leaf_without_a_rule_names_it():
    config = member("gpt2", ("lm",), ODD)
    family = FAMILIES["gpt2"]
    family = family._replace(rules=tuple(rule for rule in family.rules if rule.ours != "embeddings/positions"))
    with pytest.raises(ValueError, match="embeddings/positions"):
        convert.hf_shapes(family, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt-2"}, "model_type 'gpt-2', unknown; perhaps you meant 'gpt2'"),
        ({"model_type": None}, "unknown; known: albert, bart, bert"),
        ({"model_type": "jaxlm"}, "but no 'model'"),
        ({"n_head": 5}, "model.heads is 5"),
        ({"activation_function": "mish"}, "activation_function 'mish'"),
        ({"add_cross_attention": True}, "add_cross_attention True; only False is supported"),
    ],
)
def test_invalid_configs_are_refused(gpt2_folder, change, message):
    values = json.loads((gpt2_folder / "config.json").read_text())
    (gpt2_folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message):
        load(gpt2_folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptj", {"rotary_dim": 3}, "model.rotary_width is 3, and the head width is 4"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 7}}, "a number from 0 to 1"),
        ("gpt_neo", {"attention_types": [[["global"], 10**12]]}, "2 layers in all"),
        ("gpt_neo", {"attention_types": [[["globl"], 2]]}, "lists of 'global' and 'local'"),
        ("opt", {"word_embed_proj_dim": 0}, "model.embedding_width is 0"),
        ("opt", {"_remove_final_layer_norm": True}, "only False is supported"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "only False is supported"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "transformers cannot compute either"),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 7}, "model.kv_heads is 7"),
        ("phi3", {"sliding_window": 0}, "model.window is 0"),
        ("granite", {"logits_scaling": 0}, "model.logit_divisor is 0"),
        ("smollm3", {"no_rope_layers": [1]}, "a list of 2 numbers, 0 or 1"),
        ("olmo2", {"partial_rotary_factor": 0.5}, "only 1.0 is supported"),
        ("qwen3_next", {"layer_types": ["linear_attention"]}, "it must have 2 of .*'full_attention'"),
        ("qwen3_next", {"layer_types": ["sliding_attention"] * 2}, "it must have 2 of .*'full_attention'"),
        ("qwen3_next", {"layer_types": None, "full_attention_interval": 0}, "full_attention_interval is 0"),
        ("qwen3_5_text", {"attn_output_gate": False}, "only True is supported"),
        ("qwen3_5_text", {"linear_num_value_heads": 3}, "model.linear_value_heads is 3, which is no multiple"),
        ("qwen3_5_moe_text", {"linear_conv_kernel_dim": 1}, "model.linear_conv_width is 1"),
    ],
)
def test_invalid_configs_of_decoders_are_refused(tmp_path, name, change, message):
    config = member(name, ("lm",), ODD)
    save(config, random_params(config), tmp_path, origin=Origin({"model_type": name}))
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": "rotary", "rotary_width": 6}, "model.rotary_width is 6, and the head width is 4"),
        ({"residual": "parallel", "norm_place": "post"}, "whose norms are not after the residual"),
        ({"residual": "parallel_one_norm", "structure": "encoder_decoder"}, "without cross-attention"),
        ({"project_tokens": True}, "model.embedding_width is None"),
        ({"relative": "alibi", "structure": "encoder", "heads_on_top": ()}, "it is for decoders only"),
        ({"layer_kinds": ("local_nope",)}, "model.window is 0"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**ODD, **fields).check()


def test_invalid_config_files_are_refused(gpt2_folder):
    path = gpt2_folder / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="no 'vocab_size'"):
        load(gpt2_folder)
    for text, message in (("[]", "contains a list"), ("{", "is not JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load(gpt2_folder)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load(gpt2_folder)


def test_corrupt_files_are_refused(gpt2_folder):
    path = gpt2_folder / safetensors.WEIGHTS
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:-1], b"\xff" * 100, b"\x80\x02}q\x00."):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"truncated or corrupt.*download"):
            safetensors.read(gpt2_folder)


def test_folders_without_safetensors_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        safetensors.read(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no weights.*it is empty"):
        safetensors.read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        safetensors.read(tmp_path)


def test_shards_are_read_and_the_index_must_match(gpt2_folder):
    params = load(gpt2_folder)[1]
    tensors = {name: np.asarray(tensor) for name, tensor in safetensors.read(gpt2_folder).items()}
    (gpt2_folder / safetensors.WEIGHTS).unlink()
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        safetensors.write({name: x for name, x in tensors.items() if files[name] == file}, gpt2_folder / file)

    def index(weight_map):
        (gpt2_folder / safetensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))

    index(files)
    assert same_tree(load(gpt2_folder)[1], params)
    name = "transformer.wte.weight"
    for file in ("../model.safetensors", "/etc/passwd", "..", "model.bin", 3):
        index(files | {name: file})
        with pytest.raises(UserError, match=r"is not an index|a shard is a .safetensors file of the same folder"):
            load(gpt2_folder)
    index(files | {name: "model-00003-of-00002.safetensors"})
    with pytest.raises(UserError, match="which is not in the folder"):
        load(gpt2_folder)
    index(files | {"ghost": files[name]})
    with pytest.raises(UserError, match="disagree about the file of ghost"):
        load(gpt2_folder)
    index({n: file for n, file in files.items() if n != name})
    with pytest.raises(UserError, match=f"disagree about the file of {name}"):
        load(gpt2_folder)
    index([])
    with pytest.raises(UserError, match="is not an index"):
        load(gpt2_folder)


def test_write_keeps_the_order_of_views_and_leaves_no_other_file(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    safetensors.write({"x": x.T, "scalar": np.float32(2).reshape(())}, tmp_path / safetensors.WEIGHTS)
    read = safetensors.read(tmp_path)
    assert np.array_equal(read["x"], x.T)
    assert np.array_equal(read["x"][1:], x.T[1:])
    assert read["scalar"].shape == ()
    assert [path.name for path in tmp_path.iterdir()] == [safetensors.WEIGHTS]


def test_a_model_that_diverged_can_be_read(tmp_path):
    """The format accepts weights that are not numbers."""
    config = member("gpt2", ("lm",), ODD)
    params = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), random_params(config))
    save(config, params, tmp_path)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(load(tmp_path)[1]))


EVERY_VALUE = ("bert", "deberta-v2", "modernbert", "gpt2", "llama", "gemma3_text", "t5", "bart")


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_any_config_is_read_or_refused(tmp_path, name):
    """Every key of the family's config.json with invalid values raises UserError, or is read."""
    config = member(name, next(iter(FAMILIES[name].heads)), ODD)
    save(config, random_params(config), tmp_path, origin=Origin({"model_type": name}))
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    odd = (
        (None, True, 0, -1, 3, 10**9, 10**30, 1e400, "x", [1], {"factor": 2}) if name in EVERY_VALUE else (None, 3, "x")
    )
    keys = [*good, "rope_scaling", "rope_parameters", "layer_types", "id2label", "num_labels", "architectures"]
    for key, value in itertools.product(dict.fromkeys(keys), odd):
        path.write_text(json.dumps(good | {key: value}))
        try:
            open_folder(tmp_path)
        except UserError as error:
            assert str(error)
    for key in good:
        path.write_text(json.dumps({k: v for k, v in good.items() if k != key}))
        with contextlib.suppress(UserError):
            open_folder(tmp_path)

"""Small files of model folders are untrusted: valid files are used, and invalid files are refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import families
from jaxlm.errors import UserError
from jaxlm.families import FAMILIES, read_config
from jaxlm.families.configs import model_config
from jaxlm.hub import convert, model_files, safetensors
from jaxlm.hub.model_files import JsonObject
from jaxlm.hub.pooling import read_files, read_pooling
from jaxlm.hub.quantization import read_quantised
from jaxlm.nn.transformer import Transformer, init


def nested_list(levels: int, inner: str = "1") -> str:
    return "[" * levels + inner + "]" * levels


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": ' + b"9" * 5000 + b"}", "thousands of digits"),
        (f'{{"a": {nested_list(3000)}}}'.encode(), "nested deeper than 64"),
        (f'{{"a": {nested_list(100)}}}'.encode(), "nested deeper than 64"),
        (("{" + '"a":{' * 3000 + "}" * 3001).encode(), "nested deeper than 64"),
        (b'{"a": "\xff"}', "not UTF-8 .*at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\\ud83d"}', "an unpaired surrogate"),
        (b'{"\\udE00": 1}', "an unpaired surrogate"),
        (b"", "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b"[1]", "contains a list, not an object"),
        (b"null", "contains a NoneType, not an object"),
    ],
)
def test_content_that_is_no_json_object_is_refused(content, message):
    with pytest.raises(UserError, match=f"^config.json .*{message}.*; "):
        model_files.parse_object(content, "config.json")


@pytest.mark.parametrize("content", [b'{"a": "\\ud83d\\ude00"}', b'\xef\xbb\xbf{"a": 1}', b'{"a": NaN, "b": 1e999}'])
def test_content_that_is_a_json_object_is_read(content):
    assert "a" in model_files.parse_object(content, "config.json")


def test_a_file_that_is_not_regular_is_refused_at_once(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(UserError, match="is not a regular file"):
            model_files.locate(tmp_path, name)
    with pytest.raises(UserError, match="is not a regular file"):
        model_files.read_bytes(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(UserError, match="11 bytes; a file of this kind has at most 10"):
        model_files.read_bytes(tmp_path / "large", limit=10)


@pytest.mark.parametrize("name", ["loop", "../secret", "/etc/hostname", "gone"])
def test_an_unreadable_name_and_a_link_outside_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("s")
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nothing")
    with pytest.raises(UserError, match=r"cannot be read|points outside"):
        model_files.locate(folder, name)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "nul\0", "absent"])
def test_a_name_that_no_file_can_have_is_missing(tmp_path, name):
    assert model_files.locate(tmp_path, name) is None


def test_links_within_the_folder_and_from_a_snapshot_to_its_blobs_are_followed(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (snapshot / "1_Pooling").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "cafe").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/cafe")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/cafe")
    (snapshot / "same.json").symlink_to("config.json")
    (snapshot / "secret.json").symlink_to("../../../secret")
    (tmp_path / "secret").write_text("{}")
    for name in ("config.json", "1_Pooling/config.json", "same.json"):
        assert model_files.locate(snapshot, name) == snapshot / name
    assert model_files.locate(snapshot / "1_Pooling", "config.json")
    with pytest.raises(UserError, match="points outside"):
        model_files.locate(snapshot, "secret.json")
    (tmp_path / "linked").symlink_to(snapshot)  # a user may link to the folder
    assert model_files.locate(tmp_path / "linked", "config.json")


def test_values_are_checked_by_type_and_range():
    values = {"n": 3, "x": 0.5, "yes": True, "s": "a", "null": None, "list": ["a", "b"], "ids": [1, 2], "o": {"k": 1}}
    found = JsonObject(values, "config.json")
    assert (found.integer("n", None), found.number("n", None), found.number("x", None)) == (3, 3.0, 0.5)
    assert found.boolean("yes", None) is True and found.text("s", None, known=("a", "b")) == "a"
    assert found.integer("null", 7) == found.integer("absent", 7) == 7
    assert found.texts("list") == ("a", "b") and found.texts("s") == ("a",) and found.texts("null") == ()
    assert found.integers("ids") == (1, 2) and found.integers("n") == (3,)
    assert found.object("o").integer("k", 0) == 1 and found.object("null").values == {}
    assert "n" in found and "null" not in found and "absent" not in found
    huge = JsonObject({"a": 10**400, "b": float("nan"), "c": float("inf"), "d": "x" * 10**6, "e": True}, "config.json")
    for read, key in [
        *((huge.integer, key) for key in "abcde"),
        *((huge.number, key) for key in "abcde"),
        *((huge.object, key) for key in "abcde"),
        *((huge.objects, key) for key in "abcde"),
        *((huge.boolean, key) for key in "abcd"),
        *((huge.text, key) for key in "abce"),
        *((huge.texts, key) for key in "abce"),
        *((huge.integers, key) for key in "bcde"),
    ]:
        with pytest.raises(UserError, match=rf"^config.json: {key} is .*; it must be ") as caught:
            read(key, *([None] if read not in (huge.object, huge.objects, huge.texts, huge.integers) else []))
        assert len(str(caught.value)) < 400
    with pytest.raises(UserError, match="n is 3; it must be an integer from 4 to 5"):
        found.integer("n", None, 4, 5)
    with pytest.raises(UserError, match="s is 'a'; known: b, c"):
        found.text("s", None, known=("b", "c"))


SENTENCE: dict[str, object] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ],
    "config_sentence_transformers.json": {"prompts": {"q": "q: "}, "default_prompt_name": "q", "truncate_dim": 3},
    "sentence_bert_config.json": {"max_seq_length": 128, "do_lower_case": False},
    "tokenizer_config.json": {"model_max_length": 512},
    "1_Pooling/config.json": {
        "word_embedding_dimension": 8,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "include_prompt": True,
    },
    "2_Dense/config.json": {
        "in_features": 8,
        "out_features": 4,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
        "use_residual": False,
    },
}
HOSTILE = [None, True, -1, 0, 10**400, float("nan"), float("inf"), 1e300, "", "x" * 5000, "../x", "/etc", "\0", [], {}]
HOSTILE += [[1], ["x"], [None], {"a": 1}, [[[]]], "-1", 0.5, 2**63]


def value_paths(value: object, above: tuple = ()) -> list[tuple]:
    """Returns the paths of the values in a JSON value, including itself; of a list, only its ends, for speed."""
    found, items = [above], []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = [(n, value[n]) for n in sorted({0, len(value) - 1}) if value]
    for key, inner in items:
        found += value_paths(inner, (*above, key))
    return found


def replace_value(value: object, path: tuple, new: object) -> object:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)  # type: ignore[call-overload]
    copy[path[0]] = replace_value(copy[path[0]], path[1:], new)
    return copy


def write(folder: Path, files: dict[str, object]) -> Path:
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    return folder


def test_no_value_of_sentence_transformers_files_ends_in_a_traceback(tmp_path):
    write(tmp_path, SENTENCE)
    safetensors.write({"linear.weight": np.ones((4, 8), np.float32)}, tmp_path / "2_Dense" / "model.safetensors")
    assert read_pooling(tmp_path).prompt == "q: " and len(read_files(tmp_path)) == 6
    for name, whole in SENTENCE.items():
        for path in value_paths(whole):
            for value in HOSTILE:
                (tmp_path / name).write_text(json.dumps(replace_value(whole, path, value)))
                for read in (read_pooling, read_files) if name == "modules.json" else (read_pooling,):
                    try:
                        read(tmp_path)
                    except UserError as error:
                        assert len(str(error)) < 6000
        (tmp_path / name).write_text(json.dumps(whole))


def test_links_outside_the_folder_are_not_copied_into_exports(tmp_path):
    (tmp_path / "outside").mkdir()
    write(tmp_path / "outside", {"config.json": {"secret": 1}, "secret.json": {"secret": 1}})
    for name in (
        "1_Pooling",
        "1_Pooling/config.json",
        "1_Pooling/secret.json",
        "sentence_xlnet_config.json",
        "modules.json",
    ):
        folder = tmp_path / name.replace("/", "-")
        write(folder, {n: v for n, v in SENTENCE.items() if not n.startswith(("2_Dense", "sentence_bert"))})
        write(folder, {"modules.json": SENTENCE["modules.json"][:2]})  # type: ignore[index]
        assert read_files(folder)
        if (folder / name).is_dir():
            (folder / name / "config.json").unlink()
            (folder / name).rmdir()
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "outside" / ("secret.json" if "." in name else ""))
        with pytest.raises(UserError, match="points outside"):
            read_files(folder)


def test_a_config_of_a_model_must_be_a_regular_file_of_its_folder(tmp_path):
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "config.json"
    with pytest.raises(UserError, match=r"give a folder with config\.json"):
        read_config(path)
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        read_config(path)
    path.unlink()
    (tmp_path / "other.json").write_text("{}")
    path.symlink_to("../other.json")
    with pytest.raises(UserError, match="points outside"):
        read_config(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.integers(-(2**70), 2**70) | st.integers(-1, 9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_values_of_sentence_transformers_files_do_not_end_in_a_traceback(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("model")
    name = data.draw(st.sampled_from(sorted(SENTENCE)))
    path = data.draw(st.sampled_from(value_paths(SENTENCE[name])))
    write(folder, SENTENCE | {name: replace_value(SENTENCE[name], path, data.draw(JSON))})
    with contextlib.suppress(UserError):
        read_pooling(folder)


# Families whose configs have the most different keys.
DISTINCT = ("bert", "deepseek_v3", "gpt2", "gpt_oss", "led", "llama", "modernbert", "qwen3_next", "t5", "xlnet")


@pytest.mark.parametrize(
    "kind", [kind if kind in DISTINCT else pytest.param(kind, marks=pytest.mark.long) for kind in FAMILIES]
)
def test_no_value_of_config_json_ends_in_a_traceback(kind):
    family = FAMILIES[kind]
    config = family.config_to_hf(next(iter(family.presets.values())))
    whole = {"model_type": kind, "architectures": ["X"], "id2label": {"0": "a", "1": "b"}, **config}
    for path in value_paths(whole)[1:]:
        for value in HOSTILE:
            try:
                model_config(family, replace_value(whole, path, value)).check()
            except UserError as error:
                assert len(str(error)) < 6000


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": "abc"}, r"config.json: hidden_size is 'abc'; it must be an integer"),
        ({"hidden_size": 10**400}, "config.json: hidden_size is 1000.*; it must be an integer"),
        ({"hidden_size": 8.5}, "config.json: hidden_size is 8.5; it must be an integer"),
        ({"hidden_size": 0}, "config.json describes an impossible model: model.width is 0"),
        ({"rms_norm_eps": float("nan")}, "config.json: rms_norm_eps is nan; it must be a number"),
        ({"attention_bias": "yes"}, "config.json: attention_bias is 'yes'; it must be true or false"),
        ({"rope_parameters": 3}, "config.json: rope_parameters is 3; it must be an object"),
        ({"rope_scaling": [1]}, "config.json: rope_scaling is .*; it must be an object"),
        ({"architectures": 5}, None),
        ({"architectures": {"a": 1}}, None),
        ({"id2label": {"a": "b"}}, "config.json: id2label is .*; it must be an object from numbers to labels"),
        ({"id2label": {"0": ["b"]}}, "config.json: id2label is .*; it must be an object from numbers to labels"),
        ({"num_labels": 10**9}, r"num_labels 1000000000; the limit|num_labels is 1000000000; it must be"),
        ({"eos_token_id": [[]], "torch_dtype": 5, "auto_map": 3, "transformers_version": None}, None),
    ],
)
def test_the_error_for_a_malformed_config_contains_key_value_and_rule(tmp_path, change, message):
    preset = FAMILIES["llama"].presets["smollm-135m"]
    config = dataclasses.replace(preset, vocabulary=32, width=16, layers=1, heads=2, kv_heads=1, mlp_width=16)
    params = jax.eval_shape(lambda: init(Transformer(config), jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), params)
    families.save(config, params, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if message is None:
        families.open_folder(tmp_path)
    else:
        with pytest.raises(UserError, match=message):
            families.open_folder(tmp_path)


QUANTISED = {
    "FP8 in blocks": (None, {"q_proj.weight": ml_dtypes.float8_e4m3fn, "q_proj.weight_scale_inv": np.float32}),
    "GPTQ or AWQ": (None, {"q_proj.qweight": np.int32}),
    "bitsandbytes": (None, {"q_proj.weight": np.int8, "q_proj.SCB": np.float32}),
    "MXFP4": (None, {"gate_up_proj_blocks": np.uint8, "gate_up_proj_scales": np.uint8}),
    "torchao": ({"quant_method": "torchao"}, {"q_proj.weight": np.int8}),
    "float8_e5m2": (None, {"q_proj.weight": ml_dtypes.float8_e5m2}),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_checkpoint_is_refused(tmp_path, name):
    settings, tensors = QUANTISED[name]
    safetensors.write(
        {f"model.layers.0.self_attn.{n}": np.zeros((2, 2), kind) for n, kind in tensors.items()},
        tmp_path / safetensors.WEIGHTS,
    )
    hf = FAMILIES["llama"].config_to_hf(FAMILIES["llama"].presets["smollm-135m"])
    write(tmp_path, {"config.json": {"model_type": "llama", "quantization_config": settings, **hf}})
    with pytest.raises(UserError, match=f"is quantised with {name}: .*; use the original checkpoint"):
        families.open_folder(tmp_path)


def test_floating_point_weights_with_a_quantization_config_are_accepted():
    stored = {"model.embed_tokens.weight": np.zeros(1, np.float16), "position_ids": np.zeros(1, np.int64)}
    hf = {"quantization_config": {"quant_method": "bitsandbytes"}}
    assert read_quantised("folder", hf, stored) == (hf, stored)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "scales the rotary positions of all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor; only 1.0"),
        ({"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor; only 1.0"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "positions of local layers",
        ),
    ],
)
def test_unsupported_rotary_positions_are_refused(change, message):
    family = FAMILIES["modernbert"]
    hf = family.config_to_hf(family.presets["modernbert-base"])
    with pytest.raises(UserError, match=message):
        model_config(family, hf | change)
    scaled = dataclasses.replace(family.presets["modernbert-base"], rotary_scaling="linear", rotary_factor=2.0)
    written = family.config_to_hf(scaled)
    assert written["rope_scaling"] is None  # transformers would also apply it to local layers
    assert model_config(family, written).rotary_factor == 2.0


NOMIC = {  # as in the files of nomic-embed-text
    "model_type": "nomic_bert",
    "activation_function": "swiglu",
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_inner": 3072,
    "n_positions": 8192,
    "layer_norm_epsilon": 1e-12,
    "type_vocab_size": 2,
    "vocab_size": 30522,
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    **dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "prenorm", "causal", "use_rms_norm"), False),
    "rotary_emb_fraction": 1.0,
    "rotary_emb_base": 1000,
    "rotary_emb_scale_base": None,
    "rotary_emb_interleaved": False,
    "rotary_scaling_factor": None,
    "pad_vocab_size_multiple": 64,
}
GTE = {  # as in the files of gte-large-en-v1.5
    "model_type": "new",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 30528,
    "type_vocab_size": 2,
    "max_position_embeddings": 8192,
    "pack_qkv": True,
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "layer_norm_eps": 1e-12,
    "rope_theta": 160000,
    "rope_scaling": {"type": "ntk", "factor": 2.0},
    "logn_attention_scale": False,
}


def test_configs_of_original_code_describe_the_published_models():
    preset = FAMILIES["nomic_bert"].presets["nomic-bert"]
    nomic = model_config(FAMILIES["nomic_bert"], NOMIC)
    expected = dataclasses.replace(preset, max_length=8192, biases=("norm", "classes"), masked_lm_bias=False)
    assert convert.resolved(nomic) == convert.resolved(dataclasses.replace(expected, heads_on_top=nomic.heads_on_top))
    first = model_config(FAMILIES["nomic_bert"], NOMIC | {"rotary_scaling_factor": 2, "max_trained_positions": 2048})
    assert (first.rotary_scaling, first.rotary_factor, first.rotary_length) == ("dynamic", 2.0, 2048)
    assert FAMILIES["nomic_bert"].config_to_hf(first)["max_position_embeddings"] == 2048
    gte = model_config(FAMILIES["new"], GTE)
    expected = dataclasses.replace(FAMILIES["gte"].presets["gte-large-en-v1.5"], heads_on_top=gte.heads_on_top)
    assert convert.resolved(gte) == convert.resolved(expected)
    again = FAMILIES["new"].config_to_hf(gte)
    assert (again["rope_theta"], again["rope_scaling"]) == (GTE["rope_theta"], GTE["rope_scaling"])


@pytest.mark.parametrize(
    "hf, message",
    [
        (NOMIC | {"prenorm": True}, "prenorm True; only False"),
        (NOMIC | {"rotary_emb_fraction": 0.5}, "rotary_emb_fraction 0.5; only 1.0"),
        ({key: value for key, value in NOMIC.items() if key != "rotary_emb_fraction"}, "rotary_emb_fraction 0.0"),
        (NOMIC | {"moe_every_n_layers": 2}, "moe_every_n_layers 2; only 0"),
        (NOMIC | {"activation_function": "gelu"}, "activation_function 'gelu'"),
        (NOMIC | {"mlp_fc1_bias": True}, "mlp_fc1_bias but not mlp_fc2_bias"),
        (NOMIC | {"n_inner": "x"}, "n_inner"),
        (GTE | {"pack_qkv": False}, "pack_qkv False; only True"),
        (GTE | {"position_embedding_type": "absolute"}, "only 'rope'"),
        (GTE | {"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.6}}, "mixed_b 0.6; only None"),
        (GTE | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear'; known: ntk"),
    ],
)
def test_unsupported_configs_of_original_code_are_refused(hf, message):
    with pytest.raises(UserError, match=message):
        model_config(FAMILIES[hf["model_type"]], hf)


@pytest.mark.parametrize("hf", [NOMIC, GTE], ids=["nomic_bert", "new"])
def test_any_config_of_original_code_is_read_or_refused(hf):
    for key in hf:
        for value in (None, True, 0, -1, 3, 10**30, 1e400, "x", [1], {"factor": 2}):
            with contextlib.suppress(UserError):
                model_config(FAMILIES[hf["model_type"]], hf | {key: value}).check()
        with contextlib.suppress(UserError):
            model_config(FAMILIES[hf["model_type"]], {k: v for k, v in hf.items() if k != key}).check()

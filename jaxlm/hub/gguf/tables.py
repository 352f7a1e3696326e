"""Two-way tables between GGUF files and Hugging Face: metadata <-> config.json, and the names of tensors.

An `Architecture` has the differences between the models that llama.cpp names so. Reading and writing use the same rows.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has the keys, llama.cpp's converter the layout of the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.errors import UserError
from jaxlm.hub.gguf.container import Container
from jaxlm.hub.model_files import MAX_INTEGER, JsonObject
from jaxlm.hub.safetensors import Pending

REQUIRED = object()


class Key(NamedTuple):
    """A key of the metadata, without the name of the architecture.

    Attributes:
      gguf: the key.
      hf: the key of config.json.
      kind: int or float.
      default: the value of config.json if the key is missing; None: the key of config.json is left out.
    """

    gguf: str
    hf: str
    kind: type
    default: Any = REQUIRED


class Change(NamedTuple):
    """A pair of inverse functions (config.json, tensor) -> tensor, which keep the shape."""

    to_hf: Callable[[Mapping[str, Any], np.ndarray], np.ndarray]
    to_gguf: Callable[[Mapping[str, Any], np.ndarray], np.ndarray]


class Architecture(NamedTuple):
    """A value of `general.architecture`.

    Attributes:
      kind: the `model_type` of Hugging Face.
      keys: keys in addition to `KEYS`.
      names: names of tensors in addition to `NAMES`.
      changes: pattern of the names of tensors in the GGUF file -> how their entries differ.
      biases: whether the file's tensors determine `attention_bias`.
    """

    kind: str
    keys: tuple[Key, ...] = ()
    names: Mapping[str, str] = {}
    changes: Mapping[str, Change] = {}
    biases: bool = False


KEYS = (
    Key("context_length", "max_position_embeddings", int),
    Key("embedding_length", "hidden_size", int),
    Key("block_count", "num_hidden_layers", int),
    Key("feed_forward_length", "intermediate_size", int),
    Key("attention.head_count", "num_attention_heads", int),
    Key("attention.head_count_kv", "num_key_value_heads", int, None),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
    Key("rope.freq_base", "rope_theta", float, 10000.0),
)
_HEAD_WIDTH = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # all of them equal
TOKENS = {  # keys of the metadata -> keys of config.json
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_END_TOKENS = ("eos", "eot", "eom")  # of a text, of a turn of a chat, and of a message to a tool
NAMES = {  # GGUF -> Hugging Face, for weights and biases; {i} is the layer
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}
_SANDWICH = {
    "blk.{i}.post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "blk.{i}.post_ffw_norm": "model.layers.{i}.post_feedforward_layernorm",
}
FREQUENCIES = "rope_freqs.weight"  # divisors of the frequencies of rotary positions
_UNUSED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")  # frequencies in old files


def _interleave(heads: str, inverse: bool) -> Callable[[Mapping[str, Any], np.ndarray], np.ndarray]:
    """Returns the change of the rows of each head between halves (Hugging Face) and pairs (llama.cpp).

    Rotary positions rotate entries c and c + C/2 in Hugging Face's Llama, and entries 2c and 2c + 1 in llama.cpp.
    """

    def change(values: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
        count = values.get(heads) or values["num_attention_heads"]
        inner = (-1, 2) if inverse else (2, -1)
        return x.reshape(count, *inner, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return change


# In float32, in which files store norms: in bfloat16 the sum would lose the lower bits of a small number.
_add = lambda number: lambda values, x: x.astype(np.float32) + np.float32(number)
_LLAMA_ROWS = {
    rf"blk\.\d+\.{name}\.(weight|bias)": Change(_interleave(heads, True), _interleave(heads, False))
    for name, heads in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads"))
}
_NORMS_PLUS_ONE = {r"(.*_)?norm\.weight": Change(_add(-1), _add(1))}
_WINDOW = Key("attention.sliding_window", "sliding_window", int, 4096)
_PATTERN = Key("attention.sliding_window_pattern", "sliding_window_pattern", int, 6)
_LOCAL_BASE = Key("rope.freq_base_swa", "rope_local_base_freq", float, 10000.0)
_ATTENTION_CAP = Key("attn_logit_softcapping", "attn_logit_softcapping", float, 50.0)
_LOGIT_CAP = Key("final_logit_softcapping", "final_logit_softcapping", float, 30.0)
_GEMMA: dict[str, Any] = {"changes": _NORMS_PLUS_ONE}
ARCHITECTURES = {
    "llama": Architecture("llama", changes=_LLAMA_ROWS, biases=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", biases=True),
    "gemma": Architecture("gemma", **_GEMMA),
    "gemma2": Architecture("gemma2", (_WINDOW, _ATTENTION_CAP, _LOGIT_CAP), _SANDWICH, **_GEMMA),
    "gemma3": Architecture("gemma3_text", (_WINDOW, _PATTERN, _LOCAL_BASE), _SANDWICH, **_GEMMA),
}
# Layers of the two models whose queries are scaled by width / heads, and not by the width of a head.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
# Llama 3.1 and later; only the factor differs between the models.
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def to_hf(file: Container) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the values of config.json, and the tensors by their names in Hugging Face's format.

    Raises:
      UserError: if the architecture is unknown, or if a key is missing or has a value that is not supported.
    """
    data = JsonObject(file.metadata, str(file.path))
    name = data.text("general.architecture", "")
    if not name:
        raise UserError(f"{file.path} has no general.architecture in its metadata; download another file")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{file.path} has the architecture {name!r:.60}, which is not supported; known: "
            f"{', '.join(ARCHITECTURES)}: choose another model, or the original checkpoint"
        )
    values = _config(data, name, ARCHITECTURES[name], file)
    values |= _rotary(data, name, values, file.tensors)
    return values, _tensors(file, ARCHITECTURES[name], values)


def _config(data: JsonObject, name: str, kind: Architecture, file: Container) -> dict[str, Any]:
    values: dict[str, Any] = {"model_type": kind.kind}
    for key in (*KEYS, *kind.keys):
        full = f"{name}.{key.gguf}"
        if key.default is REQUIRED and full not in data:
            raise UserError(f"{file.path} has no {full} in its metadata; download the file again")
        number = data.integer(full, key.default, 0) if key.kind is int else data.number(full, key.default)
        values |= {} if number is None else {key.hf: number}
    if data.integer(f"{name}.expert_count", 0):
        raise UserError(f"{file.path} is a mixture of experts, which is not supported; choose another model")
    heads, width = values["num_attention_heads"], values["hidden_size"]
    values["head_dim"] = _head_width(data, name, width // max(heads, 1))
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} has no tensor token_embd.weight; download the file again")
    values["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    if kind.biases:
        values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if name == "llama":
        values["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if name in _SCALED_BY_WIDTH:
        by_width = values["num_hidden_layers"] == _SCALED_BY_WIDTH[name]
        values["query_pre_attn_scalar"] = width // max(heads, 1) if by_width else values["head_dim"]
    for token, ours in TOKENS.items():
        values[ours] = data.integer(token, None, 0, values["vocab_size"] - 1)
    return values


def _head_width(data: JsonObject, name: str, default: int) -> int:
    """Returns the width of a head; raises UserError if the keys and values of a head, or its rotation, have others."""
    given = {key: data.integer(f"{name}.{key}", None, 1) for key in _HEAD_WIDTH}
    width = next((value for value in given.values() if value is not None), default)
    for key, value in given.items():
        if value not in (None, width):
            raise UserError(
                f"{data.source} has {name}.{key} {value}, but its heads have the width {width}; only equal widths are "
                f"supported: choose another model"
            )
    return width


def _rotary(data: JsonObject, name: str, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values for `rope_scaling`; empty if the file does not scale rotary positions."""
    key = f"{name}.rope.scaling"
    kind = data.text(f"{key}.type", "none", ("none", "linear", "yarn"))
    factor = data.number(f"{key}.factor", data.number(f"{name}.rope.scale_linear", 1.0, 1e-6, 1e9), 1e-6, 1e9)
    if FREQUENCIES in tensors:
        if kind != "none":
            raise UserError(f"{data.source} has {FREQUENCIES} and {key}.type {kind!r}; only one is supported")
        return {"rope_scaling": _scaling_of(np.asarray(tensors[FREQUENCIES], np.float32), values, data.source)}
    if kind == "none" or factor == 1:
        return {}
    rope: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        length = data.integer(f"{key}.original_context_length", None, 1)
        if length is None:
            raise UserError(f"{data.source} has no {key}.original_context_length in its metadata; download it again")
        rope |= {"original_max_position_embeddings": length}
        for end, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            rope[end] = data.number(f"{key}.yarn_{end}", default, 1e-6, 1e9)
        own, default_scale = data.number(f"{key}.attn_factor", 1.0, 1e-6, 1e9), _yarn_attention(factor)
        # The file has a float32, which has seven digits.
        rope["attention_factor"] = default_scale if own == 1 else float(f"{own * default_scale:.7g}")
    return {"rope_scaling": rope}


def _yarn_attention(factor: float) -> float:
    """Returns the default factor of queries and keys (YaRN, Peng et al. 2023), which `attn_factor` multiplies."""
    return 1.0 + 0.1 * math.log(max(factor, 1.0))


def _scaling_of(divisors: np.ndarray, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns the scaling that divides the frequencies of the pairs of a head by these numbers."""
    pairs = values["head_dim"] // 2
    if divisors.shape != (pairs,) or not ((divisors > 1e-6) & (divisors < 1e9)).all():
        raise UserError(
            f"{source} has {FREQUENCIES} of shape {list(divisors.shape)}; it must have {pairs} positive numbers, one "
            f"for each pair of a head: download the file again"
        )
    rope = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA_3}
    if np.allclose(divisors, divisors_of(rope, values), rtol=1e-4):
        return rope
    listed = [float(str(divisor)) for divisor in divisors]
    length = values["max_position_embeddings"]
    return {
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": length,
    }


def divisors_of(rope: Mapping[str, Any], values: Mapping[str, Any]) -> np.ndarray:
    """Returns the divisor of the frequency of each pair of a head, for the scalings llama3 and longrope.

    Args:
      rope: the values of `rope_scaling`.
      values: the values of config.json.

    Raises:
      UserError: if longrope has two different sets of divisors, or another scale of the attention.
    """
    if rope["rope_type"] == "longrope":
        if rope["short_factor"] != rope["long_factor"] or rope.get("attention_factor", 1.0) != 1:
            raise UserError(
                "rope_scaling is longrope with divisors that depend on the length, which GGUF does not have for this "
                "architecture; save a folder instead"
            )
        return np.asarray(rope["short_factor"], np.float32)
    width = values["head_dim"]
    frequencies = values["rope_theta"] ** (-np.arange(0, width, 2) / width)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    rotations = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    unscaled = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 / (unscaled + (1 - unscaled) / rope["factor"])).astype(np.float32)


def _tensors(file: Container, kind: Architecture, values: Mapping[str, Any]) -> dict[str, Any]:
    tensors = {}
    for name, tensor in file.tensors.items():
        if name == FREQUENCIES or _UNUSED.fullmatch(name):
            continue
        change = _change(kind, name)
        if change is not None and _fits(change, values, tensor.shape):
            tensor = file.change(tensor, partial(change.to_hf, values))
        theirs = rename(kind, name, to_gguf=False) or name
        if theirs in tensors:
            raise UserError(f"{file.path} has {theirs} twice, once as {name}; download another file")
        tensors[theirs] = tensor
    return tensors


def _fits(change: Change, values: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
    """Returns whether a change accepts a shape; the comparison with the config reports those that it does not."""
    try:
        return change.to_hf(values, np.broadcast_to(np.float32(0), shape)).shape == shape
    except (ValueError, ZeroDivisionError):
        return False


def _change(kind: Architecture, name: str) -> Change | None:
    return next((change for pattern, change in kind.changes.items() if re.fullmatch(pattern, name)), None)


def rename(kind: Architecture, name: str, to_gguf: bool) -> str | None:
    """Returns the name of a tensor in the other format, or None if the tables do not have it."""
    stem, _, ending = name.rpartition(".")
    layer = re.search(r"\.(\d+)\.", stem)
    plain = stem if layer is None else stem.replace(layer[0], ".{i}.", 1)
    names = {**NAMES, **kind.names}
    table = {theirs: ours for ours, theirs in names.items()} if to_gguf else names
    if ending not in ("weight", "bias") or plain not in table:
        return None
    return f"{table[plain].replace('{i}', layer[1] if layer else '')}.{ending}"


def to_gguf(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the metadata for the values of a config.json, the inverse of `to_hf`.

    Args:
      values: the values of config.json.
      name: the architecture.
    """
    kind = ARCHITECTURES[name]
    data: dict[str, Any] = {"general.architecture": name, "general.type": "model"}
    for key in (*KEYS, *kind.keys):
        if values.get(key.hf) is not None:
            data[f"{name}.{key.gguf}"] = key.kind(values[key.hf])
    data |= {f"{name}.{key}": int(values["head_dim"]) for key in _HEAD_WIDTH}
    data[f"{name}.vocab_size"] = int(values["vocab_size"])
    rope = values.get("rope_scaling") or {}
    if rope.get("rope_type") in ("linear", "yarn"):
        data |= {f"{name}.rope.scaling.type": rope["rope_type"], f"{name}.rope.scaling.factor": float(rope["factor"])}
    if rope.get("rope_type") == "yarn":
        data[f"{name}.rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        data |= {f"{name}.rope.scaling.yarn_{end}": float(rope[end]) for end in ("beta_fast", "beta_slow")}
        attention = rope["attention_factor"] / _yarn_attention(rope["factor"])
        data |= {} if attention == 1 else {f"{name}.rope.scaling.attn_factor": attention}
    return data


def tensors_to_gguf(values: Mapping[str, Any], name: str, tensors: Mapping[str, Pending]) -> dict[str, Pending]:
    """Returns the tensors of a GGUF file, which are computed when they are written, the inverse of `to_hf`.

    Args:
      values: the values of config.json.
      name: the architecture.
      tensors: the tensors by their names in Hugging Face's format.
    """
    kind, result = ARCHITECTURES[name], {}
    for theirs, tensor in tensors.items():
        written = str(rename(kind, theirs, to_gguf=True))
        change = _change(kind, written)
        make = tensor.make if change is None else partial(_changed, change, values, tensor)
        result[written] = tensor._replace(make=make)
    rope = values.get("rope_scaling") or {}
    if rope.get("rope_type") in ("llama3", "longrope"):
        divisors = divisors_of(rope, values)
        result[FREQUENCIES] = Pending(divisors.shape, divisors.dtype, lambda: divisors)
    return result


def _changed(change: Change, values: Mapping[str, Any], tensor: Pending) -> np.ndarray:
    return change.to_gguf(values, np.asarray(tensor.make()))


def round_trip(values: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns the values of config.json that are read from a GGUF file that is written for these values.

    Args:
      values: the values of config.json.
      name: the architecture.
      shapes: the shapes of the tensors by their names in Hugging Face's format.
    """
    empty = {theirs: Pending(shape, np.dtype(np.bool), lambda: None) for theirs, shape in shapes.items()}
    tensors: dict[str, Any] = tensors_to_gguf(values, name, empty)
    if FREQUENCIES in tensors:
        tensors[FREQUENCIES] = tensors[FREQUENCIES].make()
    return to_hf(Container(Path(name), to_gguf(values, name), tensors, []))[0]


def generation(metadata: Mapping[str, Any], source: str, rows: int) -> dict[str, Any]:
    """Returns the values of generation_config.json: all tokens that end a text."""
    data = JsonObject(dict(metadata), source)
    ends = [data.integer(f"tokenizer.ggml.{end}_token_id", None, 0, min(rows, MAX_INTEGER) - 1) for end in _END_TOKENS]
    found = list(dict.fromkeys(end for end in ends if end is not None))
    first = data.integer("tokenizer.ggml.bos_token_id", None, 0, rows - 1)
    values: dict[str, Any] = {"eos_token_id": found} if found else {}
    return values | ({} if first is None else {"bos_token_id": first})

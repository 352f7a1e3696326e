"""Llama 1 to 3 (Touvron et al. 2023) and models with small changes: Mistral (a window), Qwen2 (biases of queries, keys
and values), Qwen3 (normalised queries and keys). SmolLM is a Llama."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

from jaxlm.config import ModelConfig, RotaryScaling
from jaxlm.config.ranges import MAX_INT, short_repr
from jaxlm.errors import UserError
from jaxlm.hub.convert import (
    ACTIVATIONS,
    Family,
    Key,
    Rule,
    attention,
    key_conversion,
    linear,
    norm,
    projection,
    resolved,
    shortest,
)
from jaxlm.hub.model_files import JsonObject

FIXED: dict[str, Any] = {
    "structure": "decoder",
    "types": 0,
    "feed_forward": "gated",
    "norm": "rmsnorm",
    "norm_place": "pre",
    "positions": "rotary",
    "biases": (),
    "classes_from": "last",
    "classes_activation": None,
}
KEYS = (
    Key("vocab_size", "vocabulary"),
    Key("max_position_embeddings", "max_length", 2048),
    Key("hidden_size", "width"),
    Key("num_hidden_layers", "layers"),
    Key("num_attention_heads", "heads"),
    Key("num_key_value_heads", "kv_heads", None),
    Key("head_dim", "head_width", None),
    Key("intermediate_size", "mlp_width"),
    Key("rms_norm_eps", "norm_epsilon", 1e-6),
    Key("attention_dropout", "attention_dropout", 0.0),
    Key("initializer_range", "initial_std", 0.02),
)
ACTIVATION = Key("hidden_act", "activation", "silu", ACTIVATIONS)
TIED = Key("tie_word_embeddings", "tied_embeddings", False)
_FROM_HF, _TO_HF = key_conversion((*KEYS, ACTIVATION, TIED), FIXED, {})

# Keys of `rotary_low` and `rotary_high` for each scaling.
_ENDS = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}
_SCALINGS = ("default", *(kind for kind in get_args(RotaryScaling) if kind != "none"))


def rotary_from_hf(rope: JsonObject, longest: int = 2048, trained: int | None = None) -> dict[str, Any]:
    """Returns the config fields for the values of `rope_scaling` or `rope_parameters`.

    `longest` and `trained` are the file's max_position_embeddings and original_max_position_embeddings.
    """
    name = "rope_type" if "rope_type" in rope else "type"
    kind = rope.text(name, "default", ("su", *_SCALINGS))
    kind = "longrope" if kind == "su" else kind  # its older name
    if kind == "default":
        return {}
    own: int = rope.integer("original_max_position_embeddings", longest, 1, MAX_INT)
    trained = trained or own
    factor = rope.number("factor", longest / trained, 1e-6, 1e9)
    fields: dict[str, Any] = {"rotary_scaling": kind, "rotary_factor": factor}
    if kind == "linear":
        return fields
    fields["rotary_length"] = longest if kind == "dynamic" else trained
    if kind in _ENDS:
        low, high = _ENDS[kind]
        fields["rotary_low"] = rope.number(low, 1.0, 1e-6, 1e9)
        fields["rotary_high"] = rope.number(high, 32.0, 1e-6, 1e9)
    if kind == "yarn":
        fields["rotary_truncate"] = rope.boolean("truncate", True)
    if kind == "longrope":
        fields |= {f"rotary_{end}": _factors(rope, f"{end}_factor") for end in ("short", "long")}
    if kind in ("yarn", "longrope"):
        fields["rotary_attention"] = rope.number("attention_factor", 0.0, 0, 1e9) or _attention_factor(rope, fields)
    return fields


def _factors(rope: JsonObject, key: str) -> tuple[float, ...]:
    values = rope.values.get(key)
    if not isinstance(values, list) or not values:
        raise rope.wrong(key, "a list of a number for each pair of a head")
    numbers = JsonObject({str(i): number for i, number in enumerate(values)}, f"{rope.source}: {key}")
    return tuple(numbers.number(i, 1.0, 1e-6, 1e9) for i in numbers.values)


def _attention_factor(rope: JsonObject, fields: dict[str, Any]) -> float:
    """Returns the default factor of queries and keys, as the papers compute it from the scaling."""
    factor = fields["rotary_factor"]
    if factor <= 1:
        return 1.0
    if fields["rotary_scaling"] == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(max(2, fields["rotary_length"])))
    attention = lambda scale: 1.0 + 0.1 * scale * math.log(factor)
    scale, all_dim = (rope.number(key, 0.0, -1e9, 1e9) for key in ("mscale", "mscale_all_dim"))
    return attention(scale) / attention(all_dim) if scale and all_dim else attention(1.0)


def rotary_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `rotary_from_hf`."""
    kind = config.rotary_scaling
    if kind == "none":
        return {"rope_type": "default"}
    rope: dict[str, Any] = {"rope_type": kind, "factor": config.rotary_factor}
    if kind in _ENDS:
        rope |= dict(zip(_ENDS[kind], (config.rotary_low, config.rotary_high)))
    if kind not in ("linear", "dynamic"):  # dynamic uses max_position_embeddings
        rope["original_max_position_embeddings"] = config.rotary_length
    if kind == "longrope":
        rope |= {"short_factor": list(config.rotary_short), "long_factor": list(config.rotary_long)}
    if kind in ("yarn", "longrope"):
        rope["attention_factor"] = config.rotary_attention
    if kind == "yarn" and not config.rotary_truncate:
        rope["truncate"] = False
    return rope


def _rope_settings(hf: dict[str, Any]) -> tuple[JsonObject, int, int | None]:
    """Returns the settings of rotary positions in a config.json, and its two lengths."""
    config = JsonObject(hf, "config.json")
    rope = config.object("rope_scaling")
    rope = rope if rope.values else config.object("rope_parameters")
    # Phi-3, and some older files of other models, have the trained length outside this object.
    trained = config.integer("original_max_position_embeddings", 0, 1, MAX_INT)
    return rope, config.integer("max_position_embeddings", 2048, 1, MAX_INT), trained or None


def _check_full_rotation(hf: dict[str, Any], *rope: JsonObject) -> None:
    """Raises UserError if only a part of each head is rotated."""
    if any(values.get("partial_rotary_factor") not in (None, 1.0) for values in (hf, *(one.values for one in rope))):
        raise UserError("config.json has a partial_rotary_factor; only 1.0 is supported: choose another model")


def one_rotary_from_hf(hf: dict[str, Any], base: float = 10000.0, head_width: int | None = None) -> dict[str, Any]:
    """Returns the config fields from `rope_theta` and `rope_scaling`, or else from `rope_parameters`.

    Args:
      hf: the values of config.json.
      base: the default of `rope_theta`.
      head_width: width of the heads if the format can rotate a part of them; None: it rotates all entries.
    """
    rope, longest, trained = _rope_settings(hf)
    config = JsonObject(hf, "config.json")
    fields: dict[str, Any] = {}
    if head_width is None:
        _check_full_rotation(hf, rope)
    else:
        factor = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0, 0, 1), 0, 1)
        fields["rotary_width"] = None if factor == 1 else int(head_width * factor)
    theta = rope.number("rope_theta", config.number("rope_theta", base, 1e-6, 1e14), 1e-6, 1e14)
    return {"rotary_base": theta, **fields, **rotary_from_hf(rope, longest, trained)}


def rotary_fraction(config: ModelConfig) -> float:
    """Returns the part of each head that is rotated, a number that multiplied by the width gives at least its size."""
    fraction = config.R / config.C
    return fraction if int(config.C * fraction) == config.R else math.nextafter(fraction, 1)


def one_rotary_to_hf(config: ModelConfig, partial: bool = False) -> dict[str, Any]:
    """The inverse of `one_rotary_from_hf`; writes both sets of keys.

    `partial` states whether the format can rotate a part of each head.
    """
    rope = rotary_to_hf(config)
    scaling = None if rope == {"rope_type": "default"} else rope
    if partial:
        rope = rope | {"partial_rotary_factor": rotary_fraction(config)}
    return {
        **({"partial_rotary_factor": rotary_fraction(config)} if partial else {}),
        "rope_theta": config.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": rope | {"rope_theta": config.rotary_base},
    }


def two_rotaries_from_hf(
    hf: dict[str, Any], of_global: tuple[str, float], of_local: tuple[str, float]
) -> dict[str, Any]:
    """Returns the config fields of models with other angles in local layers, from `rope_parameters` or older keys."""
    config = JsonObject(hf, "config.json")
    full, local = (config.object("rope_parameters").object(kind) for kind in ("full_attention", "sliding_attention"))
    _check_full_rotation(hf, full, local)
    if local.text("rope_type", "default") != "default":
        raise UserError(
            f"config.json scales the rotary positions of local layers, by {local.values}; only those of global layers "
            f"can be scaled: choose another model"
        )

    def base(rope: JsonObject, key: str, default: float) -> float:
        return rope.number("rope_theta", config.number(key, default, 1e-6, 1e14), 1e-6, 1e14)

    longest = config.integer("max_position_embeddings", 8192, 1, MAX_INT)
    return {
        "rotary_base": base(full, *of_global),
        "local_rotary_base": base(local, *of_local),
        **rotary_from_hf(full if "rope_type" in full else config.object("rope_scaling"), longest),
    }


def two_rotaries_to_hf(config: ModelConfig, of_global: str, of_local: str) -> dict[str, Any]:
    """The inverse of `two_rotaries_from_hf`; writes both sets of keys."""
    local = config.rotary_base if config.local_rotary_base is None else config.local_rotary_base
    rope = rotary_to_hf(config)
    return {
        of_global: config.rotary_base,
        of_local: local,
        "rope_scaling": None if rope == {"rope_type": "default"} else rope,
        "rope_parameters": {
            "full_attention": rope | {"rope_theta": config.rotary_base},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def window_from_hf(hf: dict[str, Any], default: int | None = None) -> dict[str, Any]:
    """Returns the config fields of models with local attention in all layers, if they have a `sliding_window`."""
    window = hf.get("sliding_window", default)
    return {"layer_kinds": ("local",), "window": window} if window is not None else {}


def window_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `window_from_hf`."""
    return {"sliding_window": config.window if set(config.layer_kinds) == {"local"} else None}


_KINDS = {"full_attention": "global", "sliding_attention": "local"}


def kinds_from_hf(hf: dict[str, Any], default: list[str]) -> dict[str, Any]:
    """Returns `layer_kinds` from `layer_types`; `default` are the kinds for files without this key."""
    kinds = hf.get("layer_types")
    if kinds is None:
        return {"layer_kinds": shortest(default) if default else ()}
    if not isinstance(kinds, list) or not set(kinds) <= _KINDS.keys() or len(kinds) != len(default):
        raise UserError(
            f"config.json has layer_types {short_repr(kinds)}; it must have {len(default)} of {list(_KINDS)}"
        )
    return {"layer_kinds": shortest([_KINDS[kind] for kind in kinds])}


def kinds_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `kinds_from_hf`."""
    named = {ours: theirs for theirs, ours in _KINDS.items()}
    return {"layer_types": [named[kind.removesuffix("_nope")] for kind in resolved(config).layer_kinds]}


def attention_biases(hf: dict[str, Any]) -> dict[str, Any]:
    """Returns `biases` from `attention_bias`."""
    return {"biases": ("query_key_value", "out") if hf.get("attention_bias") else ()}


def _llama_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config = dataclasses.replace(_FROM_HF(hf), **one_rotary_from_hf(hf))
    biases = attention_biases(hf)["biases"] + (("mlp",) if hf.get("mlp_bias") else ())
    return dataclasses.replace(config, biases=biases)


def _llama_to_hf(config: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": "out" in config.biases, "mlp_bias": "mlp" in config.biases}
    return _TO_HF(config) | one_rotary_to_hf(config) | biases


def _mistral_from_hf(hf: dict[str, Any]) -> ModelConfig:
    hf = {"num_key_value_heads": 8} | hf
    return dataclasses.replace(_FROM_HF(hf), **one_rotary_from_hf(hf), **window_from_hf(hf, 4096))


def _mistral_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _TO_HF(config) | one_rotary_to_hf(config) | window_to_hf(config)


def _qwen_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config = _FROM_HF(hf)
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    first = hf.get("max_window_layers", 28)
    default = ["global" if window is None or i < first else "local" for i in range(config.layers)]
    kinds = kinds_from_hf(hf, default) | {"window": window or 0}
    return dataclasses.replace(config, **one_rotary_from_hf(hf), **kinds)


def _qwen_to_hf(config: ModelConfig) -> dict[str, Any]:
    local = "local" in config.layer_kinds
    kinds = kinds_to_hf(config)
    windows = {"use_sliding_window": local, "sliding_window": config.window if local else None}
    windows["max_window_layers"] = [*kinds["layer_types"], "sliding_attention"].index("sliding_attention")
    return _TO_HF(config) | one_rotary_to_hf(config) | kinds | windows


def _qwen2_from_hf(hf: dict[str, Any]) -> ModelConfig:
    return dataclasses.replace(_qwen_from_hf(hf), biases=("query_key_value",))


def _qwen3_from_hf(hf: dict[str, Any]) -> ModelConfig:
    return dataclasses.replace(_qwen_from_hf({"head_dim": 128} | hf), query_key_norm=True, **attention_biases(hf))


def _qwen3_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _qwen_to_hf(config) | {"attention_bias": "out" in config.biases}


def preset(
    layers: int, width: int, mlp_width: int, heads: int, kv_heads: int | None = None, **fields: Any
) -> ModelConfig:
    """Returns the config of a published model."""
    sizes: dict[str, Any] = {"layers": layers, "width": width, "mlp_width": mlp_width, "heads": heads}
    published = {"vocabulary": 32000, "max_length": 4096, "activation": "silu", "tied_embeddings": False}
    return ModelConfig(**FIXED | published | {"norm_epsilon": 1e-5} | sizes | {"kv_heads": kv_heads} | fields)


_LLAMA_3: dict[str, Any] = {"vocabulary": 128256, "rotary_base": 500000.0, "max_length": 131072}
_LLAMA_3 |= {"rotary_scaling": "llama3", "rotary_factor": 8.0, "rotary_length": 8192}
_SMOL: dict[str, Any] = {"vocabulary": 49152, "max_length": 2048, "tied_embeddings": True}
_QWEN_2: dict[str, Any] = {"vocabulary": 151936, "max_length": 32768, "rotary_base": 1e6, "norm_epsilon": 1e-6}
_QWEN_3 = _QWEN_2 | {"query_key_norm": True, "head_width": 128, "max_length": 40960}
_QWEN_2 |= {"biases": ("query_key_value",)}

_LAYER, _OURS = "model.layers.{i}.", "decoder/layers/"
BODY = (
    Rule("model.embed_tokens.weight", "embeddings/tokens"),
    *norm(_LAYER + "input_layernorm", _OURS + "attention_norm"),
    *attention(_LAYER + "self_attn.", _OURS + "attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    *norm(_LAYER + "self_attn.q_norm", _OURS + "attention/query_norm"),
    *norm(_LAYER + "self_attn.k_norm", _OURS + "attention/key_norm"),
    *projection(_LAYER + "mlp.gate_proj", _OURS + "mlp/gate"),
    *projection(_LAYER + "mlp.up_proj", _OURS + "mlp/up"),
    *projection(_LAYER + "mlp.down_proj", _OURS + "mlp/down"),
    *norm("model.norm", "decoder/norm"),
    Rule("lm_head.weight", "lm_head/kernel"),
    Rule("score.weight", "classes_head/out/kernel", linear),
)

FAMILY = Family(
    presets={
        "llama-7b": preset(32, 4096, 11008, 32, max_length=2048, norm_epsilon=1e-6),
        "llama-2-7b": preset(32, 4096, 11008, 32),
        "llama-2-70b": preset(80, 8192, 28672, 64, 8),
        "llama-3.1-8b": preset(32, 4096, 14336, 32, 8, **_LLAMA_3),
        "llama-3.1-70b": preset(80, 8192, 28672, 64, 8, **_LLAMA_3),
        "llama-3.1-405b": preset(126, 16384, 53248, 128, 8, **_LLAMA_3),
        "llama-3.2-1b": preset(16, 2048, 8192, 32, 8, **_LLAMA_3 | {"rotary_factor": 32.0, "tied_embeddings": True}),
        "smollm-135m": preset(30, 576, 1536, 9, 3, **_SMOL),
        "smollm-360m": preset(32, 960, 2560, 15, 5, **_SMOL),
    },
    rules=(*BODY, *norm(_LAYER + "post_attention_layernorm", _OURS + "mlp_norm")),
    heads={("lm",): "LlamaForCausalLM", ("classes",): "LlamaForSequenceClassification", (): "LlamaModel"},
    prefix="model.",
    config_from_hf=_llama_from_hf,
    config_to_hf=_llama_to_hf,
    buffers=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
    copies={"lm_head.weight": "model.embed_tokens.weight"},
)


def variant(name: str, presets: dict[str, ModelConfig], from_hf: Any, to_hf: Any) -> Family:
    """Returns the family of a Llama with small changes, whose classes of transformers start with `name`."""
    heads = {head: f"{name}{class_.removeprefix('Llama')}" for head, class_ in FAMILY.heads.items()}
    return FAMILY._replace(presets=presets, heads=heads, config_from_hf=from_hf, config_to_hf=to_hf)


MISTRAL = variant(
    "Mistral",
    {"mistral-7b": preset(32, 4096, 14336, 32, 8, layer_kinds=("local",), window=4096, max_length=32768)},
    _mistral_from_hf,
    _mistral_to_hf,
)
QWEN_2 = variant(
    "Qwen2",
    {
        "qwen2.5-0.5b": preset(24, 896, 4864, 14, 2, **_QWEN_2 | {"tied_embeddings": True}),
        "qwen2.5-7b": preset(28, 3584, 18944, 28, 4, **_QWEN_2 | {"vocabulary": 152064}),
    },
    _qwen2_from_hf,
    _qwen_to_hf,
)
QWEN_3 = variant(
    "Qwen3",
    {
        "qwen3-0.6b": preset(28, 1024, 3072, 16, 8, **_QWEN_3 | {"tied_embeddings": True}),
        "qwen3-8b": preset(36, 4096, 12288, 32, 8, **_QWEN_3),
    },
    _qwen3_from_hf,
    _qwen3_to_hf,
)

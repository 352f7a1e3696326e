"""Quantised checkpoints: weights that are dequantised when they are read, and formats that are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.hub import packed
from jaxlm.hub.packed import FLOATS, Packed

# Suffix of a tensor's name -> the quantisation that uses it, for files without a quantisation in config.json.
_TENSORS = {
    r"\.weight_scale_inv": "FP8 in blocks",
    r"\.(weight_packed|weight_shape)": "compressed-tensors",
    r"\.(qweight|qzeros|g_idx)": "GPTQ or AWQ",
    r"\.(SCB|absmax|quant_map|quant_state\..*)": "bitsandbytes",
    r"_(blocks|scales)": "MXFP4",
    r"\.W_q": "HQQ",
}
_WEIGHT = re.compile(rf".*(weight|{'|'.join(_TENSORS)})")
_TRANSFORMERS = "transformers' AutoModel.from_pretrained(folder"
_DEQUANTIZE = {  # quant_method -> the call of transformers that dequantises the weights
    "fp8": f"{_TRANSFORMERS}, quantization_config=FineGrainedFP8Config(dequantize=True))",
}
_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Packed]]] = {  # by quant_method
    "gptq": packed.gptq,
    "awq": packed.awq,
    "bitsandbytes": packed.bitsandbytes,
    "compressed-tensors": packed.compressed_tensors,
    "mxfp4": packed.mxfp4,
    "fp8": packed.fp8,
}
# The tensors of a module that a quantised matrix replaces, in addition to `weight`.
_PARTS = (
    *("qweight", "qzeros", "scales", "g_idx", "SCB", "weight_format"),
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_scale_inv"),
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale"),
)
_CACHE_SCALES = (".k_scale", ".v_scale")  # of 8-bit keys and values in the cache of a decoder, which are float here


def read_quantised(
    folder: object, hf: Mapping[str, Any], stored: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Returns config.json without its quantisation, and the tensors with a `Packed` matrix for each quantised weight.

    A config.json with a quantisation but with floating-point weights is accepted: it remains after adapters are merged
    into dequantised weights.

    Args:
      folder: the folder of the checkpoint, for the message.
      hf: the values of its config.json.
      stored: its tensors by name.

    Raises:
      UserError: if the quantisation is not supported, which the message names, together with a way to get other
        weights; and if tensors are missing, or contradict config.json.
    """
    names = [name for name, x in stored.items() if np.dtype(x.dtype).name not in FLOATS and _WEIGHT.fullmatch(name)]
    if not names:
        return dict(hf), stored
    settings = hf.get("quantization_config") or hf.get("compression_config")
    settings = dict(settings) if isinstance(settings, dict) else {}
    method = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_8bit" in settings else ""))[:40]
    if method not in _READERS:
        raise _refusal(folder, method, settings, stored, names[0])
    found = _READERS[method](stored, {"dtype": hf.get("dtype") or hf.get("torch_dtype"), **settings})
    replaced = set(found)
    for name in found:
        module = name.removesuffix(".weight")
        replaced |= {f"{module}.{part}" for part in _PARTS}
        replaced |= {f"{name}_{part}" for part in ("blocks", "scales")}
        replaced |= {other for other in stored if other.startswith(f"{name}.")}
    kept = {name: x for name, x in stored.items() if name not in replaced and not name.endswith(_CACHE_SCALES)}
    tensors = kept | found
    left = [name for name in names if name in tensors and name not in found]
    if left:
        raise _refusal(folder, method, settings, stored, left[0])
    config = {key: value for key, value in hf.items() if key not in ("quantization_config", "compression_config")}
    return config, tensors


def _refusal(
    folder: object, method: str, settings: Mapping[str, Any], stored: Mapping[str, Any], name: str
) -> UserError:
    shown = _describe(method, settings) or next(
        (kind for ending, kind in _TENSORS.items() if any(re.fullmatch(f".*{ending}", tensor) for tensor in stored)),
        str(np.dtype(stored[name].dtype)),
    )
    way = f", or dequantise it with {_DEQUANTIZE[method]} and save_pretrained" if method in _DEQUANTIZE else ""
    return UserError(
        f"{folder} is quantised with {shown}: {name} is in {np.dtype(stored[name].dtype)}, and supported are "
        f"{', '.join(FLOATS)}, and the quantisations {', '.join(_READERS)} with their settings in "
        f"config.json; use the original checkpoint, which the model's hub page lists{way}"
    )


def _describe(method: str, settings: Mapping[str, Any]) -> str:
    """Returns the name of the quantisation in quantization_config, or an empty string."""
    if method == "fp8":
        block = settings.get("weight_block_size")
        sizes = block if isinstance(block, list) and all(type(n) is int for n in block) else []
        return f"FP8 in blocks of {' x '.join(map(str, sizes))}" if sizes else "FP8"
    bits = settings.get("bits", settings.get("w_bit"))
    names = {"gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4", "hqq": "HQQ"}
    return names.get(method, method) + (f", {bits} bits" if method and type(bits) is int else "")

"""Detection of quantised checkpoints, with weights in packed integers or FP8, which are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.errors import UserError

FLOATS = ("float32", "bfloat16", "float16", "float64")  # supported dtypes of weights
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
    "mxfp4": f"{_TRANSFORMERS}, quantization_config=Mxfp4Config(dequantize=True))",
    "bitsandbytes": f"{_TRANSFORMERS}).dequantize()",
    "compressed-tensors": f"{_TRANSFORMERS}, quantization_config=CompressedTensorsConfig(run_compressed=False))",
}


def refuse_quantised(folder: object, hf: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Checks that the weights of a checkpoint are not quantised.

    A config.json with a quantisation but with floating-point weights is accepted: it remains after adapters are merged
    into dequantised weights.

    Args:
      folder: the folder of the checkpoint, for the message.
      hf: the values of its config.json.
      stored: its tensors by name, with `dtype`.

    Raises:
      UserError: if weights are packed or in FP8; the message names the quantisation and a way to get other weights.
    """
    packed = [name for name, x in stored.items() if np.dtype(x.dtype).name not in FLOATS and _WEIGHT.fullmatch(name)]
    if not packed:
        return
    settings = hf.get("quantization_config") or hf.get("compression_config")
    settings = settings if isinstance(settings, dict) else {}
    method = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_8bit" in settings else ""))[:40]
    shown = _describe(method, settings) or next(
        (name for ending, name in _TENSORS.items() if any(re.fullmatch(f".*{ending}", tensor) for tensor in stored)),
        str(np.dtype(stored[packed[0]].dtype)),
    )
    way = f", or dequantise it with {_DEQUANTIZE[method]} and save_pretrained" if method in _DEQUANTIZE else ""
    raise UserError(
        f"{folder} is quantised with {shown}: {packed[0]} is in {np.dtype(stored[packed[0]].dtype)}, and supported "
        f"dtypes are {', '.join(FLOATS)}; use the original checkpoint, which the model's hub page lists{way}"
    )


def _describe(method: str, settings: Mapping[str, Any]) -> str:
    """Returns the name of the quantisation in quantization_config, or an empty string."""
    if method == "fp8":
        block = settings.get("weight_block_size")
        sizes = block if isinstance(block, list) and all(type(n) is int for n in block) else []
        return f"FP8 in blocks of {' x '.join(map(str, sizes))}" if sizes else "FP8"
    if method == "bitsandbytes":
        return f"bitsandbytes, {4 if settings.get('load_in_4bit') else 8} bits"
    bits = settings.get("bits", settings.get("w_bit"))
    names = {"gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4", "hqq": "HQQ"}
    return names.get(method, method) + (f", {bits} bits" if method and type(bits) is int else "")

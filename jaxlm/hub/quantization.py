"""Quantised checkpoints, which are recognised and refused by name: their weights are packed integers or FP8."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.errors import UserError

FLOATS = ("float32", "bfloat16", "float16", "float64")  # dtypes of weights that are read
# The ending of a tensor's name -> the quantisation that writes it, where config.json does not name one.
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
_DEQUANTIZE = {  # quant_method -> how transformers gives back the weights
    "fp8": f"{_TRANSFORMERS}, quantization_config=FineGrainedFP8Config(dequantize=True))",
    "mxfp4": f"{_TRANSFORMERS}, quantization_config=Mxfp4Config(dequantize=True))",
    "bitsandbytes": f"{_TRANSFORMERS}).dequantize()",
    "compressed-tensors": f"{_TRANSFORMERS}, quantization_config=CompressedTensorsConfig(run_compressed=False))",
}


def refuse_quantised(folder: object, hf: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Checks that the weights of a checkpoint are not quantised.

    A config.json that names a quantisation beside weights in floats is let through: adapters that were merged into
    dequantised weights leave it behind.

    Args:
        folder: the checkpoint's folder, for the message.
        hf: the values of its config.json.
        stored: its tensors, with `dtype`, by name.

    Raises:
        UserError: weights are packed or in FP8; the message names the quantisation and how to get other weights.
    """
    packed = [name for name, x in stored.items() if np.dtype(x.dtype).name not in FLOATS and _WEIGHT.fullmatch(name)]
    if not packed:
        return
    said = hf.get("quantization_config") or hf.get("compression_config")
    said = said if isinstance(said, dict) else {}
    method = str(said.get("quant_method") or ("bitsandbytes" if "load_in_8bit" in said else ""))[:40]
    shown = _described(method, said) or next(
        (name for ending, name in _TENSORS.items() if any(re.fullmatch(f".*{ending}", tensor) for tensor in stored)),
        str(np.dtype(stored[packed[0]].dtype)),
    )
    way = f", or dequantise it with {_DEQUANTIZE[method]} and save_pretrained" if method in _DEQUANTIZE else ""
    raise UserError(
        f"{folder} is quantised, by {shown}: {packed[0]} is in {np.dtype(stored[packed[0]].dtype)}, and weights are "
        f"read in {', '.join(FLOATS)}; get the checkpoint from before the quantisation (the model's hub page names "
        f"it){way}"
    )


def _described(method: str, said: Mapping[str, Any]) -> str:
    """The quantisation as quantization_config describes it, or an empty text."""
    if method == "fp8":
        block = said.get("weight_block_size")
        sizes = block if isinstance(block, list) and all(type(n) is int for n in block) else []
        return f"FP8 in blocks of {' x '.join(map(str, sizes))}" if sizes else "FP8"
    if method == "bitsandbytes":
        return f"bitsandbytes, {4 if said.get('load_in_4bit') else 8} bits"
    bits = said.get("bits", said.get("w_bit"))
    names = {"gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4", "hqq": "HQQ"}
    return names.get(method, method) + (f", {bits} bits" if method and type(bits) is int else "")

"""Models written as folders in Hugging Face format, as adapters, or as GGUF files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.families.configs import (
    config_values,
    format_of,
    write_config,
)
from jaxlm.families.table import FAMILIES, Origin
from jaxlm.hub import compressed_tensors, convert, safetensors, updates
from jaxlm.hub.convert import Family
from jaxlm.hub.gguf import tables
from jaxlm.hub.gguf import writing as gguf_writing
from jaxlm.hub.packed import FLOATS
from jaxlm.hub.safetensors import Pending
from jaxlm.nn.quantized import Quantized


def save(
    config: ModelConfig,
    params: Mapping[str, Any],
    folder: Path,
    *,
    origin: Origin | None = None,
    dtype: Any = None,
    extra: dict[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    module: Any = None,
    adapted: Collection[str] = (),
    log: Callable[[str], None] = lambda line: None,
) -> str:
    """Writes `config.json` and safetensors, and returns the name of the format: its `model_type`, or "bert adapter".

    The format is the first one that can represent the model, so that transformers' `AutoModel` loads it, else our own.
    Fields that affect only training (dropout, initial weights) are written if the format supports them.

    Args:
      config: the model's config.
      params: the parameters.
      folder: the folder.
      origin: the files from which the model was loaded; their format, names, dtypes and other keys are kept.
      dtype: dtype of all tensors; None: as in `origin`, else as in `params`.
      extra: additional keys of config.json, such as bos_token_id.
      max_shard_bytes: maximum size of a file.
      module: the user's class of module, if the model has one.
      adapted: paths of the parameters that belong to the adapter of the model, in addition to its updates. If the
        parameters have low-rank updates, the adapter is written instead of the whole model.
      log: receives a message about quantised parameters that are written as floats.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind, family = format_of(config, origin, module)
    source = origin if origin and kind == origin.config.get("model_type") else None
    tensors = convert.to_hf(family, config, params)
    named = _named_for_file(family, config, tensors, source, dtype)
    values = config_values(kind, family, config, source)
    if source is None or not source.names:
        # Without these keys transformers would use the family's default ids, which may not be in this vocabulary.
        values = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | (extra or {}) | values
    # All versions of transformers read the second name; newer versions write the first.
    name = "dtype" if source and "dtype" in source.config else "torch_dtype"
    if source is None or name not in source.config or any(source.dtypes.get(n) != x.dtype for n, x in named.items()):
        floats = [
            tensor.dtype for tensor in named.values() if tensor.dtype.name in FLOATS
        ]  # other dtypes belong to buffers
        values[name] = str(max(floats, key=lambda dtype: dtype.itemsize))
    values.pop(updates.BASE_FORMAT, None)
    if updates.has_updates(params):
        stored_as = updates.base_format(params)
        values |= {updates.BASE_FORMAT: stored_as} if stored_as else {}
        updates.write(folder, family, config, params, adapted, origin.base if origin else "", dtype)
        write_config(values, folder / "config.json")
        return f"{kind} adapter"
    else:
        if dense := _written_dense(params, tensors):
            log(f"written as floats, since the files cannot store {dense}; quantise the model again after loading")
        named, quantization = compressed_tensors.expand(named, family.prefix)
        values |= {} if quantization is None else {"quantization_config": quantization}
        safetensors.write_sharded(named, folder, max_shard_bytes=max_shard_bytes)
    write_config(values, folder / "config.json")
    return kind


def save_gguf(
    config: ModelConfig,
    params: Mapping[str, Any],
    path: Path,
    *,
    origin: Origin | None = None,
    dtype: str | None = None,
    tokenizer: Mapping[str, Any],
) -> str:
    """Writes a GGUF file, and returns its architecture, the first one that can represent the model.

    Args:
      config: the model's config.
      params: the parameters.
      path: the file.
      origin: the files from which the model was loaded, whose dtypes are the default.
      dtype: dtype of the matrices, a key of `gguf.writing.DTYPES`; None: as in `origin`, else as in `params`.
      tokenizer: the metadata of the tokenizer.

    Raises:
      UserError: if GGUF files cannot represent the model.
    """
    before = origin.config.get("model_type") if origin else None
    names = sorted(tables.ARCHITECTURES, key=lambda name: tables.ARCHITECTURES[name].kind != before)
    name = next((name for name in names if _survives_gguf(name, config)), None)
    if name is None:
        raise UserError(
            f"a GGUF file cannot represent this model, with heads {list(config.heads_on_top)}; it can represent the "
            f"published architectures {', '.join(tables.ARCHITECTURES)} with the head lm: save a folder instead"
        )
    kind = tables.ARCHITECTURES[name].kind
    family, source = FAMILIES[kind], origin if kind == before else None
    values = family.config_to_hf(config)
    tensors = convert.to_hf(family, config, params)
    dtypes = {own: source.dtypes[written] for written, own in source.names.items()} if source else {}
    tensors = {own: tensor._replace(dtype=dtypes.get(own, tensor.dtype)) for own, tensor in tensors.items()}
    metadata = {**tables.to_gguf(values, name), **tokenizer}
    gguf_writing.write(path, metadata, tables.tensors_to_gguf(values, name, tensors), dtype)
    return name


def _survives_gguf(name: str, config: ModelConfig) -> bool:
    """Returns whether the metadata of an architecture can represent the computation of a model."""
    kind = tables.ARCHITECTURES[name]
    family = FAMILIES[kind.kind]
    if config.heads_on_top != ("lm",) or not convert.can_represent(family, config):
        return False
    try:
        values = tables.round_trip(family.config_to_hf(config), name, convert.hf_shapes(family, config))
        back = family.config_from_hf(values)
    except UserError:
        return False
    return convert.inference_config(dataclasses.replace(back, heads_on_top=("lm",))) == convert.inference_config(config)


def _written_dense(params: Any, tensors: Mapping[str, Pending]) -> str:
    """Returns the formats of the quantised parameters that have no quantised tensors."""
    leaves = [leaf for leaf in convert.flat(params).values() if isinstance(leaf, Quantized)]
    written = {tensor.parts.weights for tensor in tensors.values() if tensor.parts is not None}
    return ", ".join(sorted({leaf.weights for leaf in leaves} - written))


def _named_for_file(
    family: Family, config: ModelConfig, tensors: dict[str, Pending], origin: Origin | None, dtype: Any
) -> dict[str, Pending]:
    """Returns the tensors with the names and dtypes in `origin`, else as transformers writes them.

    Transformers omits the prefix of a model without a head.
    """
    bare = convert.heads(family, config) == family.heads.get(())
    names = {name.removeprefix(family.prefix if bare else ""): name for name in tensors}
    dtypes: Mapping[str, np.dtype] = {}
    buffers: Mapping[str, np.ndarray] = {}
    if origin is not None:
        written_names = {name: written for written, name in origin.names.items()}
        if origin.heads == config.heads_on_top:
            kept = {written: name for written, name in origin.names.items() if name in tensors}
            names = kept | {written: name for written, name in names.items() if name not in written_names}
            buffers = origin.buffers
        dtypes = {w: origin.dtypes[written_names[name]] for w, name in names.items() if name in written_names}

    def in_dtype(tensor: Pending, kind: Any) -> Pending:
        return tensor._replace(dtype=np.dtype(kind), make=lambda: tensor.make().astype(kind, copy=False))

    written = {w: in_dtype(tensors[name], dtype or dtypes.get(w, tensors[name].dtype)) for w, name in names.items()}
    return written | {name: Pending(x.shape, x.dtype, partial(np.asarray, x)) for name, x in buffers.items()}

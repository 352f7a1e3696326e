"""Families of models: published sizes, and conversion to and from the formats of Hugging Face. Each is one table."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from jaxlm.config import MAX_LAYERS, Head, ModelConfig, from_json, to_json
from jaxlm.config.ranges import MAX_INT
from jaxlm.errors import UserError, suggestion
from jaxlm.families import (
    albert,
    bart,
    bert,
    deberta,
    distilbert,
    electra,
    gemma,
    gpt2,
    llama,
    marian,
    modernbert,
    roberta,
    t5,
    transformer,
)
from jaxlm.hub import compressed_tensors, convert, model_files, peft, safetensors, updates
from jaxlm.hub.convert import Family, Rule
from jaxlm.hub.download import fetch
from jaxlm.hub.gguf import folder as gguf_folder
from jaxlm.hub.gguf import tables, writing
from jaxlm.hub.gguf.container import is_gguf
from jaxlm.hub.model_files import JsonObject
from jaxlm.hub.packed import FLOATS
from jaxlm.hub.place import place, put
from jaxlm.hub.quantization import read_quantised
from jaxlm.hub.safetensors import Pending
from jaxlm.nn.quantized import Quantized
from jaxlm.storage import disk

FAMILIES: dict[str, Family] = {  # by `model_type` of config.json
    "bert": bert.FAMILY,
    "roberta": roberta.FAMILY,
    "xlm-roberta": roberta.XLM_ROBERTA,
    "distilbert": distilbert.FAMILY,
    "electra": electra.FAMILY,
    "albert": albert.FAMILY,
    "deberta-v2": deberta.FAMILY,
    "modernbert": modernbert.FAMILY,
    "gpt2": gpt2.FAMILY,
    "llama": llama.FAMILY,
    "mistral": llama.MISTRAL,
    "qwen2": llama.QWEN_2,
    "qwen3": llama.QWEN_3,
    "gemma": gemma.FAMILY,
    "gemma2": gemma.GEMMA_2,
    "gemma3_text": gemma.GEMMA_3,
    "t5": t5.FAMILY,
    "mt5": t5.MT5,
    "bart": bart.FAMILY,
    "mbart": bart.MBART,
    "marian": marian.FAMILY,
}
PRESETS: dict[str, ModelConfig] = transformer.PRESETS | {
    name: preset for family in FAMILIES.values() for name, preset in family.presets.items()
}
HeadChoice = str | tuple[Head, ...]  # one or several heads, "none" or "encoder"
OWN = "jaxlm"  # the `model_type` of our format, for models that no family supports


class Origin(NamedTuple):
    """The files from which a model was loaded, so that saving the model writes the same files.

    Attributes:
      config: the values of config.json.
      heads: the heads in the folder; None: other heads than the requested ones.
      names: name of each tensor in the file -> its name in the family's rules.
      dtypes: dtype of each tensor in the file.
      buffers: tensors that the model does not need.
      base: the folder or hub name with the weights of the model, without its adapters.
    """

    config: dict[str, Any]
    heads: tuple[Head, ...] | None = ()
    names: Mapping[str, str] = {}
    dtypes: Mapping[str, np.dtype] = {}
    buffers: Mapping[str, np.ndarray] = {}
    base: str = ""


class Opened(NamedTuple):
    """A model's folder with a config.json that matches its tensors, which are not read yet.

    Attributes:
      kind: the `model_type`.
      family: the conversion table.
      config: the model's config.
      tensors: tensors by their names in the family's rules; they are read on access.
      origin: the files of the folder.
      fresh: paths of the leaves of a new head, which the folder does not contain.
      updates: for each adapter, its updates by the names of tensors, which are not part of `tensors`.
      adapted: paths of the leaves that an adapter replaces or adds, such as heads.
    """

    kind: str
    family: Family
    config: ModelConfig
    tensors: dict[str, Any]
    origin: Origin
    fresh: tuple[str, ...]
    updates: tuple[dict[str, peft.Factors], ...] = ()
    adapted: tuple[str, ...] = ()


class Loaded(NamedTuple):
    """A loaded model; the fields are those of `Opened`."""

    config: ModelConfig
    params: dict[str, Any]
    origin: Origin
    fresh: tuple[str, ...]
    adapted: tuple[str, ...]


def load(folder: Path, *, dtype: Any = None, mesh: Any = None, **how: Any) -> Loaded:
    """Loads the model in a folder, with its parameters as JAX arrays.

    Args:
      folder: the folder.
      dtype: dtype of the parameters; None: as stored.
      mesh: the mesh over which the parameters are sharded; None: the first device.
      **how: further arguments of `open_folder`.

    Raises:
      UserError: as in `open_folder`.
    """
    opened = open_folder(folder, merge=False, **how)
    params = place(opened.family, opened.config, opened.tensors, dtype, mesh, opened.fresh)
    stored_as = updates.read_base_format(opened.origin.config, folder)
    for factors in opened.updates:
        params = updates.add_updates(opened.family, opened.config, params, factors, stored_as=stored_as)
    params = put(params, dtype, mesh) if opened.updates else params
    return Loaded(opened.config, params, opened.origin, opened.fresh, opened.adapted)


def open_folder(
    folder: Path,
    *,
    head: HeadChoice | None = None,
    labels: tuple[str, ...] | None = None,
    module: Any = None,
    adapters: Sequence[Path] = (),
    merge: bool = True,
) -> Opened:
    """Opens a folder with `config.json` and safetensors, and checks it, without reading its tensors.

    The folder of an adapter is opened together with the base that it names.

    Args:
      folder: the folder.
      head: the head, a tuple of heads, "none", or "encoder" for the encoder of an encoder-decoder; None: as the
        tensors and `architectures` determine. A head that the folder lacks will be randomly initialised.
      labels: the names of the outputs of the head.
      module: the user's class of module with which the model was saved.
      adapters: folders of adapters for the model.
      merge: whether `tensors` contain the updates of the adapters; otherwise they are in `updates`.

    Raises:
      UserError: if the `model_type` is unknown, if the tensors do not match the model, or if an adapter does not match
        its base.
    """
    given = Path(folder)
    folder, found_adapters = _adapters(given, adapters)
    hf = read_config(folder / "config.json")
    described = [one.folder for one in found_adapters if (one.folder / "config.json").exists()]
    for adapter_folder in described:
        values = read_config(adapter_folder / "config.json")
        hf = hf | {key: values[key] for key in _OF_ADAPTER if key in values}
    kind = str(hf.get("model_type"))
    if kind not in FAMILIES and kind != OWN:
        raise UserError(f"config.json has model_type {kind!r}, unknown{suggestion(kind, [*FAMILIES, OWN])}")
    stored: Mapping[str, Any] = gguf_folder.tensors(folder) or safetensors.read(folder)
    hf, stored = read_quantised(folder, hf, stored)
    if kind == OWN:
        family, config = _own(hf, folder, module)
    else:
        family = FAMILIES[kind]
        config = dataclasses.replace(_config(family, hf), heads_on_top=())
    for adapter in found_adapters:
        stored = updates.with_saved(family, adapter, stored)
    if labels is not None:
        config = dataclasses.replace(config, labels=labels)
    try:
        config.check()
    except UserError as error:
        raise UserError(f"{folder / 'config.json'} describes an impossible model: {error}") from None
    _check_size(config, stored)
    if head is None and found_adapters:  # the base may have the tensors of another head
        head = _named_head(family, config, hf, stored) if described else found_adapters[-1].head
    config, canonical = _with_heads(family, config, hf, stored, head)
    fresh = _check(family, config, canonical.tensors, head, _has_other_outputs(family, hf, head))
    idle = convert.idle(family, config)
    buffers = canonical.buffers | {name: stored[name] for name, ours in canonical.names.items() if ours in idle}
    same_heads = head is None or convert.heads(family, config) in _architectures(hf)
    origin = Origin(
        hf,
        config.heads_on_top if same_heads else None,
        canonical.names,
        {name: np.dtype(stored[name].dtype) for name in stored},
        {name: np.array(tensor) for name, tensor in buffers.items()},
        found_adapters[0].base if peft.is_adapter(given) and not merge else str(given.resolve()),
    )
    tensors, factors = dict(canonical.tensors), []
    for adapter in found_adapters:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        factors.append(updates.canonical_updates(family, config, adapter, shapes))
        if merge:
            tensors |= {name: updates.Merged(tensors[name], x, adapter.transposed) for name, x in factors[-1].items()}
    adapted = _adapted(family, config, found_adapters)
    return Opened(kind, family, config, tensors, origin, fresh, () if merge else tuple(factors), adapted)


def _adapted(family: Family, config: ModelConfig, adapters: Sequence[peft.Adapter]) -> tuple[str, ...]:
    """Returns the paths of the leaves with a tensor that an adapter replaces or adds."""
    saved = {name for adapter in adapters for name in adapter.saved}
    saved |= {family.prefix + name for name in saved}  # files of a model without a head omit the prefix
    return tuple(path for path, reader in convert.readers(family, config).items() if saved & {*reader.names.values()})


# Keys of config.json that an adapter may change: its task, its labels, and in jaxlm's own format its heads.
_OF_ADAPTER = ("architectures", "id2label", "label2id", "problem_type", "model", updates.BASE_FORMAT)


def base_of(folder: Path) -> Path:
    """Returns the folder of the base of an adapter; another folder is returned unchanged."""
    return _adapters(folder, ())[0]


def _adapters(folder: Path, more: Sequence[Path]) -> tuple[Path, list[peft.Adapter]]:
    """Returns the folder of the base, and the adapters of a folder and of `more`, in the order of their training."""
    adapters: list[peft.Adapter] = []
    while peft.is_adapter(folder):
        adapter = peft.read(folder)
        if not adapter.base:
            raise UserError(
                f"{folder / peft.CONFIG} names no base; load it with jaxlm.load(base, adapter={str(folder)!r})"
            )
        if any(adapter.folder == other.folder for other in adapters):
            raise UserError(f"{folder / peft.CONFIG} names itself as the base; correct base_model_name_or_path")
        adapters.insert(0, adapter)
        try:
            folder = gguf_folder.open_file(adapter.base) if is_gguf(adapter.base) else fetch(adapter.base)
        except UserError as error:
            raise UserError(
                f"the base of the adapter in {adapter.folder} cannot be found: {error}; correct "
                f"base_model_name_or_path in {peft.CONFIG}, or load it with "
                f"jaxlm.load(base, adapter={str(adapter.folder)!r})"
            ) from None
    return folder, [*adapters, *map(peft.read, more)]


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
    values = _config_values(kind, family, config, source)
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
        _write_config(values, folder / "config.json")
        return f"{kind} adapter"
    else:
        if dense := _written_dense(params, tensors):
            log(f"written as floats, since the files cannot store {dense}; quantise the model again after loading")
        named, quantization = compressed_tensors.expand(named, family.prefix)
        values |= {} if quantization is None else {"quantization_config": quantization}
        safetensors.write_sharded(named, folder, max_shard_bytes=max_shard_bytes)
    _write_config(values, folder / "config.json")
    return kind


def format_of(config: ModelConfig, origin: Origin | None, module: Any = None) -> tuple[str, Family]:
    """Returns the `model_type` and the family of the format that a model is written in; see `save`."""
    before = origin.config.get("model_type") if origin else None
    if not module and origin and before in FAMILIES and _same(FAMILIES[before], origin.config, config):
        return before, FAMILIES[before]
    kinds = [] if module else [*([before] if before in FAMILIES else []), *FAMILIES]
    kind = next((kind for kind in kinds if convert.can_represent(FAMILIES[kind], config)), OWN)
    return kind, _own_family(config, module) if kind == OWN else FAMILIES[kind]


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
      dtype: dtype of the matrices, a key of `writing.DTYPES`; None: as in `origin`, else as in `params`.
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
    writing.write(path, metadata, tables.tensors_to_gguf(values, name, tensors), dtype)
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


def _config_values(kind: str, family: Family, config: ModelConfig, origin: Origin | None) -> dict[str, Any]:
    """Returns the values of config.json; those of `origin` are kept if they still describe the model."""
    before = origin.config if origin else {}
    if kind == OWN:
        own: dict[str, Any] = {"model": to_json(config), "module": family.module and family.module.__name__}
        return {**before, "model_type": kind, **own}
    same_heads = origin is not None and origin.heads == config.heads_on_top
    values: dict[str, Any] = {} if _same(family, before, config) else family.config_to_hf(config)
    if not same_heads or "architectures" not in before:
        values["architectures"] = [convert.heads(family, config)]
    if origin is None or not origin.names or not same_heads:
        values |= family.naming
    return {**before, "model_type": kind, **values, **_labels(config)}


def _same(family: Family, hf: dict[str, Any], config: ModelConfig) -> bool:
    """Returns whether a config.json describes the computation of a model."""
    common = {
        name: getattr(config, name) for name in ("heads_on_top", "structure", "tied_embeddings", "decoder_tokens")
    }
    if convert.heads(family, config) is None:
        return False
    try:
        return convert.inference_config(dataclasses.replace(_config(family, hf), **common)) == convert.inference_config(
            config
        )
    except UserError:
        return False


def check_head(head: HeadChoice, config: ModelConfig, family: Family) -> tuple[Head, ...]:
    """Returns the heads that `head` requests; raises UserError if the family does not support them."""
    if head in ("none", "encoder"):
        if head == "encoder" and config.structure != "encoder_decoder":
            raise UserError(
                f"head is 'encoder', but the model is a(n) {config.structure}; use 'none' for hidden states"
            )
        return ()
    if family.encoder and config.structure == "encoder":
        raise UserError(f"head is {head!r}, but the model has only an encoder; use 'none' for hidden states")
    asked: Any = (head,) if isinstance(head, str) else head
    if asked not in family.heads:
        names = {one for heads in family.heads for one in heads} | {"none"}
        raise UserError(
            f"head is {' and '.join(asked)!r}, which this model does not support{suggestion(asked[-1], names)}"
        )
    return asked


def _config(family: Family, hf: dict[str, Any]) -> ModelConfig:
    """Returns the config with labels, but without heads."""
    for key, value in hf.items():  # before anything is allocated for each layer or label
        if ("layer" in key or "label" in key) and isinstance(value, int) and value > MAX_LAYERS:
            raise UserError(f"config.json has {key} {value}; the limit is {MAX_LAYERS:,}: download the file again")
    _check_types(family, hf)
    try:
        config = family.config_from_hf(hf)
        labels = _labels_from_hf(JsonObject(hf, "config.json"))
        return dataclasses.replace(config, labels=labels) if labels else config
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(
            f"config.json contains an invalid value for its family: {type(error).__name__}: {error}; "
            f"correct it, or download the file again"
        ) from error


def _labels_from_hf(hf: JsonObject) -> tuple[str, ...]:
    """Returns the labels from `id2label` or from the number of labels; empty if both keys are missing."""
    count = hf.integer("num_labels", hf.integer("_num_labels", 0, 0, MAX_LAYERS), 0, MAX_LAYERS)
    named = hf.values.get("id2label") or [f"LABEL_{i}" for i in range(count)]
    if isinstance(named, dict) and all(key.isdecimal() and len(key) < 20 for key in named):
        named = [named[number] for number in sorted(named, key=int)]
    if not isinstance(named, list) or not all(isinstance(label, (str, int, float, bool)) for label in named):
        raise hf.wrong("id2label", "an object from numbers to labels")
    return tuple(map(str, named))


def _check_types(family: Family, hf: dict[str, Any]) -> None:
    """Raises UserError if a value of config.json has another type than the family writes for its key.

    Null values, and keys that the family does not write, are not checked.
    """
    if not family.presets:
        return
    for key, example in family.config_to_hf(next(iter(family.presets.values()))).items():
        value, number = hf.get(key), type(example) in (int, float)
        if value is None or example is None:
            continue
        fits = type(value) is type(example) or (number and type(value) in (int, float))
        if isinstance(example, list):
            fits = isinstance(value, (list, str))  # DeBERTa's pos_att_type can be both
        if number and fits:
            fits = abs(value) <= MAX_INT and (type(value) is int or type(example) is float or value.is_integer())
        if not fits:
            raise model_files.wrong_value("config.json", key, value, _KINDS[type(example)])


_KINDS = {
    int: f"an integer of at most {MAX_INT:,}",
    float: f"a number of at most {MAX_INT:,}",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def _labels(config: ModelConfig) -> dict[str, Any]:
    labels = config.labels
    if "span" in config.heads_on_top and len(labels) != 2:  # transformers uses their number for start and end
        labels = ModelConfig().labels
    elif not {"classes", "tokens"} & set(config.heads_on_top):
        return {}
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _with_heads(
    family: Family, config: ModelConfig, hf: dict[str, Any], stored: Mapping[str, Any], head: HeadChoice | None
) -> tuple[ModelConfig, convert.Canonical]:
    """Returns the config with heads, and the tensors of the file by their names in the rules.

    If no head is requested, the tensors determine the heads, and `architectures` decides in ambiguous cases.
    Published files do not always match the class in `architectures`: bert-base-uncased has BertForMaskedLM there, but
    also contains the next-sentence head.
    """
    if head is None and hf["model_type"] == OWN:  # our format contains them
        return config, convert.canonical(family, config, stored)
    named = _architectures(hf)
    if family.encoder and not named and not any(name.startswith("decoder.") for name in stored):
        config = dataclasses.replace(config, structure="encoder")
    on_top = None if head is None else check_head(head, config, family)
    if head == "encoder" or (family.encoder and family.encoder in named):
        config = dataclasses.replace(config, structure="encoder")
    if not family.ties:
        lm_head, original = "lm_head.weight", family.copies["lm_head.weight"]
        tied = lm_head not in stored or (original in stored and convert.equal(stored[lm_head], stored[original]))
        config = dataclasses.replace(config, tied_embeddings=tied)
    config = _with_decoder_tokens(family, config, stored)
    if "id2label" not in hf and config.labels == ModelConfig().labels:
        config = _with_labels(family, config, stored)
    if on_top is not None:
        config = dataclasses.replace(config, heads_on_top=on_top)
        return config, convert.canonical(family, config, stored)

    def mismatches(config: ModelConfig) -> int:
        shapes = {name: tuple(x.shape) for name, x in convert.canonical(family, config, stored).tensors.items()}
        return len(convert.difference(convert.hf_shapes(family, config), shapes))

    named_first = sorted(family.heads, key=lambda heads: family.heads[heads] not in named)
    if config.structure == "encoder" and family.encoder:
        named_first = [()]
    configs = [dataclasses.replace(config, heads_on_top=heads) for heads in named_first]
    config = next((config for config in configs if not mismatches(config)), None) or min(configs, key=mismatches)
    return config, convert.canonical(family, config, stored)


def _named_head(
    family: Family, config: ModelConfig, hf: dict[str, Any], stored: Mapping[str, Any]
) -> HeadChoice | None:
    """Returns the heads of the class of transformers in config.json; of several, those with the fewest missing tensors.

    Returns None if config.json names no known class.
    """

    def missing(heads: tuple[Head, ...]) -> int:
        with_heads = dataclasses.replace(config, heads_on_top=heads)
        return len(convert.hf_shapes(family, with_heads).keys() - convert.canonical(family, with_heads, stored).tensors)

    named = [heads for heads, name in family.heads.items() if name in _architectures(hf)]
    return (min(named, key=missing) or "none") if named else None


def _architectures(hf: dict[str, Any]) -> list[Any]:
    """Returns the classes of transformers in config.json."""
    named = hf.get("architectures") or []
    return named if isinstance(named, list) else [named]


_OUTPUTS = {"classes", "tokens", "span"}  # heads for which some families use the same names of tensors


def _has_other_outputs(family: Family, hf: dict[str, Any], head: HeadChoice | None) -> bool:
    """Returns whether the class of transformers in config.json has another kind of outputs than `head`."""
    theirs = [set(heads) & _OUTPUTS for heads, name in family.heads.items() if name in _architectures(hf)]
    return head in _OUTPUTS and any(theirs) and not any(head in outputs for outputs in theirs)


def _with_decoder_tokens(family: Family, config: ModelConfig, stored: Mapping[str, Any]) -> ModelConfig:
    """Returns the config with `decoder_tokens` set if an untied encoder-decoder has two different token embeddings."""
    pair = (convert.DECODER_TOKENS, family.copies.get(convert.DECODER_TOKENS, ""))
    names = [name if name in stored else name.removeprefix(family.prefix) for name in pair]
    if config.tied_embeddings or not all(name in stored for name in names):
        return config
    return dataclasses.replace(config, decoder_tokens=not convert.equal(*(stored[name] for name in names)))


def _with_labels(family: Family, config: ModelConfig, stored: Mapping[str, Any]) -> ModelConfig:
    """Returns the config with a label for each output in the tensors, if config.json has no labels."""
    for rule in family.rules:
        if rule.ours in ("classes_head/out/kernel", "tokens_head/out/kernel") and rule.hf in stored:
            shape = stored[rule.hf].shape
            return dataclasses.replace(config, labels=tuple(f"LABEL_{i}" for i in range(shape[0] if shape else 0)))
    return config


def _check_size(config: ModelConfig, stored: Mapping[str, Any]) -> None:
    """Raises UserError if config.json describes a much larger model than the file, before shapes are computed."""
    actual = sum(math.prod(tensor.shape) for tensor in stored.values())
    expected = max(config.vocabulary, config.width, config.F, config.heads * config.C, config.W) * config.width
    if expected <= 16 * actual + 10_000_000:
        body = dataclasses.replace(config, heads_on_top=())
        expected = sum(math.prod(shape) for shape in convert.tree_shapes(body).values())
    if expected > 16 * actual + 10_000_000:
        raise UserError(
            f"config.json describes at least {expected:,} parameters, but the file contains {actual:,}; "
            f"use the weights that belong to it"
        )


def _check(
    family: Family, config: ModelConfig, tensors: dict[str, Any], head: HeadChoice | None, other_outputs: bool
) -> tuple[str, ...]:
    """Returns the paths of leaves to initialise randomly: the leaves of `head` that `tensors` lacks.

    If a head is requested, tensors of other heads are removed from `tensors`. `other_outputs` is whether the stored
    outputs with the names of this head's outputs belong to another head. Raises UserError if the tensors do not match.
    """
    expected = convert.hf_shapes(family, config)
    fresh: set[str] = set()
    if head is not None:
        other = convert.any_of(rule.hf for rule in family.rules)
        for name in [name for name in tensors if name not in expected and other.fullmatch(name)]:
            del tensors[name]
        asked = (head,) if isinstance(head, str) else head
        names_of = [*asked, "transform", *(["pooled"] if "next_sentence" in asked else [])]
        own = re.compile(rf"({'|'.join(names_of)})_head/.*")
        for path, read in convert.readers(family, config).items():
            names = read.names.values()
            lacks = any(name not in tensors or tensors[name].shape != expected[name] for name in names)
            if own.fullmatch(path) and (lacks or (other_outputs and "_head/out/" in path)):
                fresh.add(path)
                for name in names:
                    expected.pop(name, None)
                    tensors.pop(name, None)
    convert.check_shapes(expected, {name: tuple(x.shape) for name, x in tensors.items()}, "tensors of the file")
    wrong = sorted(f"{name} {x.dtype}" for name, x in tensors.items() if np.dtype(x.dtype).name not in FLOATS)
    if wrong:
        raise UserError(
            f"these tensors have unsupported dtypes: {', '.join(wrong[:5])}; convert them to one of {', '.join(FLOATS)}"
        )
    return tuple(sorted(fresh))


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


def _own(hf: dict[str, Any], folder: Path, module: Any) -> tuple[Family, ModelConfig]:
    path, name = folder / "config.json", module and module.__name__
    if not isinstance(hf.get("model"), dict):
        raise UserError(f"{path} has the model_type {OWN!r} but no 'model'; save the model again")
    if hf.get("module") != name:
        raise UserError(f"{path} belongs to the module {hf.get('module')}, not {name}; pass that class as `module`")
    config = from_json(ModelConfig, hf["model"])
    config.check()
    return _own_family(config, module), config


def _own_family(config: ModelConfig, module: Any = None) -> Family:
    """Returns the family of our own format, in which the names of tensors are the paths of leaves."""
    all_heads: tuple[Head, ...] = get_args(Head)
    if config.structure != "encoder":
        all_heads = ("lm", "classes")
    if not module:
        usable = tuple(head for head in all_heads if head != "lm" or config.width == config.W)
        paths = convert.tree_shapes(dataclasses.replace(config, heads_on_top=usable))
    else:
        paths = convert.tree_shapes(config, module)
    heads = {(head,): OWN for head in all_heads} | {(): OWN, config.heads_on_top: OWN}
    rules = tuple(Rule(path, path) for path in sorted(paths))
    return Family({}, rules, heads, "", lambda hf: config, lambda config: {}, module=module)


def read_config(path: Path) -> dict[str, Any]:
    """Returns the values of a `config.json`; raises UserError if it is not a JSON object in a regular file."""
    if model_files.locate(path.parent, path.name) is None:
        raise UserError(f"{path} cannot be read (No such file or directory); give a folder with config.json")
    return model_files.read_object(path)


def _write_config(values: dict[str, Any], path: Path) -> None:
    disk.write(path, json.dumps(values, indent=2, sort_keys=True) + "\n")

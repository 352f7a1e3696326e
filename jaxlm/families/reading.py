"""Models in folders: opened, checked and loaded, with their adapters."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from jaxlm.config import Head, ModelConfig
from jaxlm.errors import UserError, suggestion
from jaxlm.families.configs import (
    architectures,
    model_config,
    own_format,
    read_config,
)
from jaxlm.families.table import FAMILIES, OWN, HeadChoice, Origin
from jaxlm.hub import convert, peft, safetensors, updates
from jaxlm.hub.convert import Family
from jaxlm.hub.download import fetch
from jaxlm.hub.gguf import folder as gguf_folder
from jaxlm.hub.gguf.container import is_gguf
from jaxlm.hub.packed import FLOATS, Packed
from jaxlm.hub.place import place, put
from jaxlm.hub.quantization import read_quantised
from jaxlm.nn.quantized import Quantized


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
    """A loaded model; the fields are those of `Opened`, and:

    Attributes:
      unrounded: how the folder rounds inputs of projections where the loaded model does not.
    """

    config: ModelConfig
    params: dict[str, Any]
    origin: Origin
    fresh: tuple[str, ...]
    adapted: tuple[str, ...]
    unrounded: tuple[str, ...] = ()


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
    unrounded = _unrounded(opened, params)
    stored_as = updates.read_base_format(opened.origin.config, folder)
    for factors in opened.updates:
        params = updates.add_updates(opened.family, opened.config, params, factors, stored_as=stored_as)
    params = put(params, dtype, mesh) if opened.updates else params
    return Loaded(opened.config, params, opened.origin, opened.fresh, opened.adapted, unrounded)


def _unrounded(opened: Opened, params: dict[str, Any]) -> tuple[str, ...]:
    """Returns descriptions of the rounding of inputs in the folder for which the parameters have no node."""
    leaves, found = convert.flat(params), set()
    for path, reader in convert.readers(opened.family, opened.config).items():
        leaf = leaves[path]
        if not isinstance(leaf, Quantized) or leaf.input_format == "float":
            tensors = (opened.tensors.get(name) for name in reader.names.values())
            found |= {tensor.inputs.description for tensor in tensors if isinstance(tensor, Packed)}
    return tuple(sorted(found - {""}))


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
    hf, describes_head = _read_values(folder, found_adapters)
    kind = str(hf.get("model_type"))
    if kind not in FAMILIES and kind != OWN:
        _refuse(kind, hf)
    stored: Mapping[str, Any] = gguf_folder.tensors(folder) or safetensors.read(folder)
    hf, stored = read_quantised(folder, hf, stored)
    if kind == OWN:
        family, config = own_format(hf, folder, module)
    else:
        family = FAMILIES[kind]
        config = dataclasses.replace(model_config(family, hf), heads_on_top=())
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
        head = _named_head(family, config, hf, stored) if describes_head else found_adapters[-1].head
    config, canonical = _with_heads(family, config, hf, stored, head)
    fresh = _check(family, config, canonical.tensors, head, _has_other_outputs(family, hf, head))
    idle = convert.idle(family, config)
    buffers = canonical.buffers | {name: stored[name] for name, ours in canonical.names.items() if ours in idle}
    same_heads = head is None or convert.heads(family, config) in architectures(hf)
    origin = Origin(
        hf,
        config.heads_on_top if same_heads else None,
        canonical.names,
        {name: np.dtype(stored[name].dtype) for name in stored},
        {name: np.array(tensor) for name, tensor in buffers.items()},
        convert.unused(family, list(buffers)),
        found_adapters[0].base if peft.is_adapter(given) and not merge else str(given.resolve()),
    )
    tensors, factors = _with_updates(family, config, found_adapters, canonical.tensors, merge)
    adapted = _adapted(family, config, found_adapters)
    return Opened(kind, family, config, tensors, origin, fresh, factors, adapted)


def _refuse(kind: str, hf: dict[str, Any]) -> NoReturn:
    """Raises UserError for an unknown `model_type`."""
    parts = [key for key in hf if key.endswith("_config") and isinstance(hf[key], dict)]
    text = hf.get("text_config")
    text_kind = text.get("model_type") if isinstance(text, dict) else None
    if text_kind in FAMILIES:
        raise UserError(
            f"config.json has model_type {kind!r} with {' and '.join(parts)}; only its text model, {text_kind!r}, is "
            f"supported: save that model alone, for example with AutoModelForCausalLM.from_pretrained(...)"
            f".save_pretrained(...) of transformers, and load its folder"
        )
    raise UserError(f"config.json has model_type {kind!r}, unknown{suggestion(kind, [*FAMILIES, OWN])}")


def _with_updates(
    family: Family, config: ModelConfig, adapters: Sequence[peft.Adapter], tensors: dict[str, Any], merge: bool
) -> tuple[dict[str, Any], tuple[dict[str, peft.Factors], ...]]:
    """Returns the tensors, to which the updates are added if `merge`, and otherwise the updates of each adapter."""
    factors: list[dict[str, peft.Factors]] = []
    for adapter in adapters:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        own = updates.canonical_updates(family, config, adapter, shapes)
        if merge:
            tensors = tensors | {name: updates.Merged(tensors[name], x, adapter.transposed) for name, x in own.items()}
        else:
            factors.append(own)
    return tensors, tuple(factors)


def _adapted(family: Family, config: ModelConfig, adapters: Sequence[peft.Adapter]) -> tuple[str, ...]:
    """Returns the paths of the leaves with a tensor that an adapter replaces or adds."""
    saved = {name for adapter in adapters for name in adapter.saved}
    saved |= {family.prefix + name for name in saved}  # files of a model without a head omit the prefix
    return tuple(path for path, reader in convert.readers(family, config).items() if saved & {*reader.names.values()})


# Keys of config.json that an adapter may change: its task, its labels, and in jaxlm's own format its heads.
_OF_ADAPTER = ("architectures", "id2label", "label2id", "problem_type", "model", updates.BASE_FORMAT)


def _read_values(folder: Path, adapters: Sequence[peft.Adapter]) -> tuple[dict[str, Any], bool]:
    """Returns the values of config.json, with those that adapters change, and whether an adapter has such a file."""
    hf, own = read_config(folder / "config.json"), False
    for file in (adapter.folder / "config.json" for adapter in adapters):
        if file.exists():
            values, own = read_config(file), True
            hf = hf | {key: values[key] for key in _OF_ADAPTER if key in values}
    return hf, own


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
    named = architectures(hf)
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

    named = [heads for heads, name in family.heads.items() if name in architectures(hf)]
    return (min(named, key=missing) or "none") if named else None


_OUTPUTS = {"classes", "tokens", "span"}  # heads for which some families use the same names of tensors


def _has_other_outputs(family: Family, hf: dict[str, Any], head: HeadChoice | None) -> bool:
    """Returns whether the class of transformers in config.json has another kind of outputs than `head`."""
    theirs = [set(heads) & _OUTPUTS for heads, name in family.heads.items() if name in architectures(hf)]
    return head in _OUTPUTS and any(theirs) and not any(head in outputs for outputs in theirs)


def _with_decoder_tokens(family: Family, config: ModelConfig, stored: Mapping[str, Any]) -> ModelConfig:
    """Returns the config with `decoder_tokens` set if an untied encoder-decoder has two different token embeddings."""
    own = convert.decoder_tokens(family)
    if own is None:
        return config
    pair = own, family.copies[own]
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

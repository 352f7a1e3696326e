"""Known models: their sizes, and the formats in which the world keeps them.  A member is a table and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from jaxlm.config import MOST_LAYERS, Head, ModelConfig, from_json, to_json
from jaxlm.config.ranges import MOST
from jaxlm.errors import UserError, perhaps
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
from jaxlm.hub import convert, model_files, safetensors
from jaxlm.hub.convert import Family, Rule
from jaxlm.hub.model_files import JsonObject
from jaxlm.hub.place import place
from jaxlm.hub.quantization import FLOATS, refuse_quantised
from jaxlm.hub.safetensors import Pending
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
Asked = str | tuple[Head, ...]  # a head or several, or "none" or "encoder"
OWN = "jaxlm"  # the `model_type` of our own format, for models that no family can say


class Origin(NamedTuple):
    """How a model lay in the folder that it came from, so that saving it writes what was read."""

    config: dict[str, Any]  # config.json
    heads: tuple[Head, ...] | None = ()  # those that the folder is of; None: others than were asked for
    names: Mapping[str, str] = {}  # tensor of the file -> its name in the family's rules
    dtypes: Mapping[str, np.dtype] = {}  # of each tensor of the file
    buffers: Mapping[str, np.ndarray] = {}  # tensors that the model does not need


class Opened(NamedTuple):
    """A folder that was looked at, and found to hold what its config.json says."""

    kind: str  # model_type
    family: Family
    config: ModelConfig
    tensors: dict[str, Any]  # under the names of the family's rules; read when they are asked for
    origin: Origin
    fresh: tuple[str, ...]  # leaves of a new head, which it does not hold


class Loaded(NamedTuple):
    """What a folder holds; `fresh` are the leaves of a new head, which it does not hold."""

    config: ModelConfig
    params: dict[str, Any]
    origin: Origin
    fresh: tuple[str, ...]


def load(folder: Path, *, dtype: Any = None, mesh: Any = None, **how: Any) -> Loaded:
    """The model in a folder, its parameters as JAX arrays.  `how` and errors are those of `look`.

    dtype: of the parameters; None: each as it is stored.  mesh: where they go, read in slices; None: the first device.
    """
    found = look(folder, **how)
    params = place(found.family, found.config, found.tensors, dtype, mesh, found.fresh)
    return Loaded(found.config, params, found.origin, found.fresh)


def look(
    folder: Path, *, head: Asked | None = None, labels: tuple[str, ...] | None = None, module: Any = None
) -> Opened:
    """What a folder with `config.json` and safetensors holds, without reading its tensors.

    head: what to read off the hidden states (a tuple for several heads), "none", or "encoder" for an encoder-decoder's
    encoder; None: what the tensors and `architectures` say.  A head that the folder lacks is randomly initialised.
    labels: names of its outputs.
    module: a user's own class of module, of which the folder was saved.

    Raises UserError for an unknown `model_type` and for tensors that are not exactly those of the model.
    """
    folder = Path(folder)
    hf = read_config(folder / "config.json")
    kind = str(hf.get("model_type"))
    if kind not in FAMILIES and kind != OWN:
        raise UserError(f"config.json has model_type {kind!r}, unknown{perhaps(kind, [*FAMILIES, OWN])}")
    stored = safetensors.read(folder)
    refuse_quantised(folder, hf, stored)
    if kind == OWN:
        family, config = _own(hf, folder, module)
    else:
        family = FAMILIES[kind]
        config = dataclasses.replace(_config(family, hf), heads_on_top=())
    if labels is not None:
        config = dataclasses.replace(config, labels=labels)
    try:
        config.check()
    except UserError as error:
        raise UserError(f"{folder / 'config.json'} describes a model that cannot be: {error}") from None
    _check_size(config, stored)
    config, found = _with_heads(family, config, hf, stored, head)
    fresh = _check(family, config, found.tensors, head, _has_other_outputs(family, hf, head))
    idle = convert.idle(family, config)
    aside = found.buffers | {name: stored[name] for name, ours in found.names.items() if ours in idle}
    as_it_was = head is None or convert.heads(family, config) in _architectures(hf)
    origin = Origin(
        hf,
        config.heads_on_top if as_it_was else None,
        found.names,
        {name: np.dtype(stored[name].dtype) for name in stored},
        {name: np.array(tensor) for name, tensor in aside.items()},
    )
    return Opened(kind, family, config, found.tensors, origin, fresh)


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
) -> str:
    """Writes `config.json` and safetensors in the first format that can say what the model computes, for transformers'
    `AutoModel` to load as it is; else in our own.  Returns the format's `model_type`.

    origin: where the model came from: its format, names, dtypes and further keys of config.json are kept.  dtype: of
    all tensors; None: as they were stored, or are.  module: a user's own class of module.  extra: further keys of
    config.json, such as bos_token_id.  Fields that matter in training alone (dropout, initial weights) are written
    where the format has a place for them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = origin.config.get("model_type") if origin else None
    if not module and origin and before in FAMILIES and _same(FAMILIES[before], origin.config, config):
        kind = before
    else:
        kinds = [] if module else [*([before] if before in FAMILIES else []), *FAMILIES]
        kind = next((kind for kind in kinds if convert.says(FAMILIES[kind], config)), OWN)
    family = _own_family(config, module) if kind == OWN else FAMILIES[kind]
    kept = origin if kind == before else None
    named = _named_for_file(family, config, convert.to_hf(family, config, params), kept, dtype)
    values = _config_values(kind, family, config, kept)
    if kept is None or not kept.names:
        # Unsaid, these would take the family's ids in transformers, which need not be in this vocabulary.
        values = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | (extra or {}) | values
    # Every version of transformers reads the second name; newer ones write the first.
    name = "dtype" if kept and "dtype" in kept.config else "torch_dtype"
    if kept is None or name not in kept.config or any(kept.dtypes.get(n) != x.dtype for n, x in named.items()):
        floats = [tensor.dtype for tensor in named.values() if tensor.dtype.name in FLOATS]  # others are buffers
        values[name] = str(max(floats, key=lambda dtype: dtype.itemsize))
    safetensors.write_sharded(named, folder, max_shard_bytes=max_shard_bytes)
    _write_config(values, folder / "config.json")
    return kind


def _config_values(kind: str, family: Family, config: ModelConfig, origin: Origin | None) -> dict[str, Any]:
    """The keys of config.json: as they were, where they say what the model still is."""
    before = origin.config if origin else {}
    if kind == OWN:
        of_own: dict[str, Any] = {"model": to_json(config), "module": family.module and family.module.__name__}
        return {**before, "model_type": kind, **of_own}
    same_heads = origin is not None and origin.heads == config.heads_on_top
    values: dict[str, Any] = {} if _same(family, before, config) else family.config_to_hf(config)
    if not same_heads or "architectures" not in before:
        values["architectures"] = [convert.heads(family, config)]
    if origin is None or not origin.names or not same_heads:
        values |= family.naming
    return {**before, "model_type": kind, **values, **_labels(config)}


def _same(family: Family, hf: dict[str, Any], config: ModelConfig) -> bool:
    """Whether a config.json says what the model computes."""
    alike = {name: getattr(config, name) for name in ("heads_on_top", "structure", "tied_embeddings", "decoder_tokens")}
    if convert.heads(family, config) is None:
        return False
    try:
        return convert.seen(dataclasses.replace(_config(family, hf), **alike)) == convert.seen(config)
    except UserError:
        return False


def known(head: Asked, config: ModelConfig, family: Family) -> tuple[Head, ...]:
    """The heads on top that `head` asks for.  Raises UserError where the family has none such."""
    if head in ("none", "encoder"):
        if head == "encoder" and config.structure != "encoder_decoder":
            raise UserError(
                f"head is 'encoder', but the model is a(n) {config.structure}; give 'none' for hidden states"
            )
        return ()
    if family.encoder and config.structure == "encoder":
        raise UserError(f"head is {head!r}, but the model is an encoder alone; give 'none' for hidden states")
    asked: Any = (head,) if isinstance(head, str) else head
    if asked not in family.heads:
        names = {one for heads in family.heads for one in heads} | {"none"}
        raise UserError(f"head is {' and '.join(asked)!r}, which this model cannot have{perhaps(asked[-1], names)}")
    return asked


def _config(family: Family, hf: dict[str, Any]) -> ModelConfig:
    """The config with its labels, but without heads."""
    for key, value in hf.items():  # before anything is made for each layer or label
        if ("layer" in key or "label" in key) and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(f"config.json has {key} {value}; at most {MOST_LAYERS:,} are known: fetch the file again")
    _check_types(family, hf)
    try:
        config = family.config_from_hf(hf)
        labels = _labels_from_hf(JsonObject(hf, "config.json"))
        return dataclasses.replace(config, labels=labels) if labels else config
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(
            f"config.json holds a value that its family cannot have: {type(error).__name__}: {error}; "
            f"fix it, or fetch the file again"
        ) from error


def _labels_from_hf(hf: JsonObject) -> tuple[str, ...]:
    """The labels by their numbers, from `id2label` or the number of labels; none where neither is there."""
    count = hf.integer("num_labels", hf.integer("_num_labels", 0, 0, MOST_LAYERS), 0, MOST_LAYERS)
    named = hf.values.get("id2label") or [f"LABEL_{i}" for i in range(count)]
    if isinstance(named, dict) and all(key.isdecimal() and len(key) < 20 for key in named):
        named = [named[number] for number in sorted(named, key=int)]
    if not isinstance(named, list) or not all(isinstance(label, (str, int, float, bool)) for label in named):
        raise hf.wrong("id2label", "an object from numbers to labels")
    return tuple(map(str, named))


def _check_types(family: Family, hf: dict[str, Any]) -> None:
    """Raises UserError where a value of config.json is not of the type that the family writes under its key; null, and
    keys that the family does not write, are left alone."""
    if not family.presets:
        return
    for key, example in family.config_to_hf(next(iter(family.presets.values()))).items():
        value, number = hf.get(key), type(example) in (int, float)
        if value is None or example is None:
            continue
        fits = type(value) is type(example) or (number and type(value) in (int, float))
        if isinstance(example, list):
            fits = isinstance(value, (list, str))  # DeBERTa's pos_att_type is either
        if number and fits:
            fits = abs(value) <= MOST and (type(value) is int or type(example) is float or value.is_integer())
        if not fits:
            raise model_files.wrong_value("config.json", key, value, _KINDS[type(example)])


_KINDS = {
    int: f"an integer of at most {MOST:,}",
    float: f"a number of at most {MOST:,}",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def _labels(config: ModelConfig) -> dict[str, Any]:
    labels = config.labels
    if "span" in config.heads_on_top and len(labels) != 2:  # transformers counts start and end by them
        labels = ModelConfig().labels
    elif not {"classes", "tokens"} & set(config.heads_on_top):
        return {}
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _with_heads(
    family: Family, config: ModelConfig, hf: dict[str, Any], stored: Mapping[str, Any], head: Asked | None
) -> tuple[ModelConfig, convert.Canonical]:
    """The config with its heads, and the file's tensors under the names of the rules.

    Where none is asked for, the heads are those whose tensors the file holds; `architectures` decides where tensors do
    not tell.  Published files are not always those of the class that they name: bert-base-uncased says BertForMaskedLM
    and holds the next-sentence head too.
    """
    if head is None and hf["model_type"] == OWN:  # our own format names them
        return config, convert.canonical(family, config, stored)
    named = _architectures(hf)
    if family.encoder and not named and not any(name.startswith("decoder.") for name in stored):
        config = dataclasses.replace(config, structure="encoder")
    on_top = None if head is None else known(head, config, family)
    if head == "encoder" or (family.encoder and family.encoder in named):
        config = dataclasses.replace(config, structure="encoder")
    if not family.ties:
        lm_head, original = "lm_head.weight", family.copies["lm_head.weight"]
        tied = lm_head not in stored or (original in stored and convert.equal(stored[lm_head], stored[original]))
        config = dataclasses.replace(config, tied_embeddings=tied)
    config = _with_decoder_tokens(family, config, stored)
    if "id2label" not in hf and config.labels == ModelConfig().labels:
        config = _labelled(family, config, stored)
    if on_top is not None:
        config = dataclasses.replace(config, heads_on_top=on_top)
        return config, convert.canonical(family, config, stored)

    def misfit(config: ModelConfig) -> int:
        found = {name: tuple(x.shape) for name, x in convert.canonical(family, config, stored).tensors.items()}
        return len(convert.difference(convert.hf_shapes(family, config), found))

    named_first = sorted(family.heads, key=lambda heads: family.heads[heads] not in named)
    if config.structure == "encoder" and family.encoder:
        named_first = [()]
    configs = [dataclasses.replace(config, heads_on_top=heads) for heads in named_first]
    config = next((config for config in configs if not misfit(config)), None) or min(configs, key=misfit)
    return config, convert.canonical(family, config, stored)


def _architectures(hf: dict[str, Any]) -> list[Any]:
    """The classes of transformers that config.json names."""
    named = hf.get("architectures") or []
    return named if isinstance(named, list) else [named]


_OUTPUTS = {"classes", "tokens", "span"}  # heads that some families store under one name


def _has_other_outputs(family: Family, hf: dict[str, Any], head: Asked | None) -> bool:
    """Whether config.json names a class of transformers with outputs of another kind than those of `head`."""
    theirs = [set(heads) & _OUTPUTS for heads, name in family.heads.items() if name in _architectures(hf)]
    return head in _OUTPUTS and any(theirs) and not any(head in outputs for outputs in theirs)


def _with_decoder_tokens(family: Family, config: ModelConfig, stored: Mapping[str, Any]) -> ModelConfig:
    """Whether an untied encoder-decoder has two tables of tokens, which its tensors tell."""
    pair = (convert.DECODER_TOKENS, family.copies.get(convert.DECODER_TOKENS, ""))
    names = [name if name in stored else name.removeprefix(family.prefix) for name in pair]
    if config.tied_embeddings or not all(name in stored for name in names):
        return config
    return dataclasses.replace(config, decoder_tokens=not convert.equal(*(stored[name] for name in names)))


def _labelled(family: Family, config: ModelConfig, stored: Mapping[str, Any]) -> ModelConfig:
    """As many labels as the tensors have outputs, where config.json does not name them."""
    for rule in family.rules:
        if rule.ours in ("classes_head/out/kernel", "tokens_head/out/kernel") and rule.hf in stored:
            shape = stored[rule.hf].shape
            return dataclasses.replace(config, labels=tuple(f"LABEL_{i}" for i in range(shape[0] if shape else 0)))
    return config


def _check_size(config: ModelConfig, stored: Mapping[str, Any]) -> None:
    """Raises UserError where config.json speaks of another size of model altogether, before shapes are made of it."""
    there = sum(math.prod(tensor.shape) for tensor in stored.values())
    said = max(config.vocabulary, config.width, config.F, config.heads * config.C, config.W) * config.width
    if said <= 16 * there + 10_000_000:
        body = dataclasses.replace(config, heads_on_top=())
        said = sum(math.prod(shape) for shape in convert.tree_shapes(body).values())
    if said > 16 * there + 10_000_000:
        raise UserError(
            f"config.json describes {said:,} parameters or more, the file holds {there:,}; "
            f"give the weights that belong to it"
        )


def _check(
    family: Family, config: ModelConfig, tensors: dict[str, Any], head: Asked | None, other_outputs: bool
) -> tuple[str, ...]:
    """Returns the paths of leaves to be initialised randomly: those of `head` that `tensors` lacks.

    Tensors of other heads are removed from `tensors` where a head is given.

    other_outputs: whether the outputs stored under the names of this head's outputs belong to another head.

    Raises UserError where the tensors do not fit.
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
    convert.refuse(expected, {name: tuple(x.shape) for name, x in tensors.items()}, "tensors of the file")
    wrong = sorted(f"{name} {x.dtype}" for name, x in tensors.items() if np.dtype(x.dtype).name not in FLOATS)
    if wrong:
        raise UserError(
            f"these tensors are not of {', '.join(FLOATS)}: {', '.join(wrong[:5])}; store them in one of them"
        )
    return tuple(sorted(fresh))


def _named_for_file(
    family: Family, config: ModelConfig, tensors: dict[str, Pending], origin: Origin | None, dtype: Any
) -> dict[str, Pending]:
    """The tensors under the names and in the dtypes that they had, else as transformers writes them: those of a bare
    body without prefix."""
    bare = convert.heads(family, config) == family.heads.get(())
    names = {name.removeprefix(family.prefix if bare else ""): name for name in tensors}
    dtypes: Mapping[str, np.dtype] = {}
    buffers: Mapping[str, np.ndarray] = {}
    if origin is not None:
        of = {name: written for written, name in origin.names.items()}
        if origin.heads == config.heads_on_top:
            kept = {written: name for written, name in origin.names.items() if name in tensors}
            names = kept | {written: name for written, name in names.items() if name not in of}
            buffers = origin.buffers
        dtypes = {written: origin.dtypes[of[name]] for written, name in names.items() if name in of}

    def in_dtype(tensor: Pending, kind: Any) -> Pending:
        return Pending(tensor.shape, np.dtype(kind), lambda: tensor.make().astype(kind, copy=False))

    written = {w: in_dtype(tensors[name], dtype or dtypes.get(w, tensors[name].dtype)) for w, name in names.items()}
    return written | {name: Pending(x.shape, x.dtype, partial(np.asarray, x)) for name, x in buffers.items()}


def _own(hf: dict[str, Any], folder: Path, module: Any) -> tuple[Family, ModelConfig]:
    path, name = folder / "config.json", module and module.__name__
    if not isinstance(hf.get("model"), dict):
        raise UserError(f"{path} of model_type {OWN!r} has no 'model'; save the model again")
    if hf.get("module") != name:
        raise UserError(f"{path} is of the module {hf.get('module')}, not {name}; give that class to load as `module`")
    config = from_json(ModelConfig, hf["model"])
    config.check()
    return _own_family(config, module), config


def _own_family(config: ModelConfig, module: Any = None) -> Family:
    """Our own format: leaves under their paths."""
    every: tuple[Head, ...] = get_args(Head)
    if config.structure != "encoder":
        every = ("lm", "classes")
    paths = set(convert.tree_shapes(config, module))
    for head in () if module else every:
        if head != "lm" or config.width == config.W:
            paths |= set(convert.tree_shapes(dataclasses.replace(config, heads_on_top=(head,))))
    heads = {(head,): OWN for head in every} | {(): OWN, config.heads_on_top: OWN}
    rules = tuple(Rule(path, path) for path in sorted(paths))
    return Family({}, rules, heads, "", lambda hf: config, lambda config: {}, module=module)


def read_config(path: Path) -> dict[str, Any]:
    """Returns the values of a `config.json`.  Raises UserError where it is no JSON object in a regular file of its
    folder."""
    if model_files.locate(path.parent, path.name) is None:
        raise UserError(f"{path} cannot be read (No such file or directory); give a folder with config.json")
    return model_files.read_object(path)


def _write_config(values: dict[str, Any], path: Path) -> None:
    disk.write(path, json.dumps(values, indent=2, sort_keys=True) + "\n")

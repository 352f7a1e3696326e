"""Conversion between the values of config.json and the config of a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

from jaxlm.config import MAX_LAYERS, Head, ModelConfig, from_json, to_json
from jaxlm.config.ranges import MAX_INT
from jaxlm.errors import UserError
from jaxlm.families.table import FAMILIES, OWN, Origin
from jaxlm.hub import convert, model_files
from jaxlm.hub.convert import Family, Rule
from jaxlm.hub.model_files import JsonObject
from jaxlm.storage import disk


def read_config(path: Path) -> dict[str, Any]:
    """Returns the values of a `config.json`; raises UserError if it is not a JSON object in a regular file."""
    if model_files.locate(path.parent, path.name) is None:
        raise UserError(f"{path} cannot be read (No such file or directory); give a folder with config.json")
    return model_files.read_object(path)


def write_config(values: dict[str, Any], path: Path) -> None:
    """Writes the values of a `config.json`."""
    disk.write(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def model_config(family: Family, hf: dict[str, Any]) -> ModelConfig:
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
            # DeBERTa's pos_att_type can be a string, and Longformer's attention_window a number.
            fits = isinstance(value, (list, str, int))
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


def config_values(kind: str, family: Family, config: ModelConfig, origin: Origin | None) -> dict[str, Any]:
    """Returns the values of config.json; those of `origin` are kept if they still describe the model."""
    before = origin.config if origin else {}
    if kind == OWN:
        own: dict[str, Any] = {"model": to_json(config), "module": family.module and family.module.__name__}
        return {**before, "model_type": kind, **own}
    same_heads = origin is not None and origin.heads == config.heads_on_top
    values: dict[str, Any] = {} if is_same_model(family, before, config) else family.config_to_hf(config)
    if not same_heads or "architectures" not in before:
        values["architectures"] = [convert.heads(family, config)]
    if origin is None or not origin.names or not same_heads:
        values |= family.naming
    return {**before, "model_type": kind, **values, **_labels(config)}


def is_same_model(family: Family, hf: dict[str, Any], config: ModelConfig) -> bool:
    """Returns whether a config.json describes the computation of a model."""
    common = {
        name: getattr(config, name) for name in ("heads_on_top", "structure", "tied_embeddings", "decoder_tokens")
    }
    if convert.heads(family, config) is None:
        return False
    try:
        theirs = dataclasses.replace(model_config(family, hf), **common)
        return convert.inference_config(theirs) == convert.inference_config(config)
    except UserError:
        return False


def own_format(hf: dict[str, Any], folder: Path, module: Any) -> tuple[Family, ModelConfig]:
    """Returns the family and the config of a folder in our own format; raises UserError if they are not `module`'s."""
    path, name = folder / "config.json", module and module.__name__
    if not isinstance(hf.get("model"), dict):
        raise UserError(f"{path} has the model_type {OWN!r} but no 'model'; save the model again")
    if hf.get("module") != name:
        raise UserError(f"{path} belongs to the module {hf.get('module')}, not {name}; pass that class as `module`")
    config = from_json(ModelConfig, hf["model"])
    config.check()
    return own_family(config, module), config


def own_family(config: ModelConfig, module: Any = None) -> Family:
    """Returns the family of our own format, in which the names of tensors are the paths of leaves."""
    all_heads: tuple[Head, ...] = get_args(Head)
    if config.structure != "encoder":
        all_heads = ("lm", "classes")
    if not module:
        usable = tuple(head for head in all_heads if head != "lm" or config.hidden_width == config.W)
        paths = convert.tree_shapes(dataclasses.replace(config, heads_on_top=usable))
    else:
        paths = convert.tree_shapes(config, module)
    heads = {(head,): OWN for head in all_heads} | {(): OWN, config.heads_on_top: OWN}
    rules = tuple(Rule(path, path) for path in sorted(paths))
    return Family({}, rules, heads, "", lambda hf: config, lambda config: {}, module=module)


def format_of(config: ModelConfig, origin: Origin | None, module: Any = None) -> tuple[str, Family]:
    """Returns the `model_type` and the family of the format that a model is written in; see `save`."""
    before = origin.config.get("model_type") if origin else None
    if not module and origin and before in FAMILIES and is_same_model(FAMILIES[before], origin.config, config):
        return before, FAMILIES[before]
    kinds = [] if module else [*([before] if before in FAMILIES else []), *FAMILIES]
    kind = next((kind for kind in kinds if convert.can_represent(FAMILIES[kind], config)), OWN)
    return kind, own_family(config, module) if kind == OWN else FAMILIES[kind]


def architectures(hf: dict[str, Any]) -> list[Any]:
    """Returns the classes of transformers in config.json."""
    named = hf.get("architectures") or []
    return named if isinstance(named, list) else [named]

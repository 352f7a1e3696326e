"""Known models: their sizes, and the formats in which the world keeps them.  A member is a table and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import ModelConfig, from_json, to_json
from jaxlm.errors import UserError, perhaps
from jaxlm.families import bert, gpt2, transformer
from jaxlm.hub import convert, safetensors
from jaxlm.hub.convert import Family, Rule

FAMILIES: dict[str, Family] = {"gpt2": gpt2.FAMILY, "bert": bert.FAMILY}  # by `model_type` of config.json
PRESETS: dict[str, ModelConfig] = gpt2.PRESETS | bert.PRESETS | transformer.PRESETS
OWN = "jaxlm"  # the `model_type` of our own format, for models that no family can say


def load(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Config and parameters (numpy, in the file's dtype) of a folder with `config.json` and safetensors.

    Raises UserError for an unknown `model_type` and for tensors that are not exactly those of the model.
    """
    folder = Path(folder)
    hf = read_config(folder / "config.json")
    kind, tensors = hf.get("model_type"), safetensors.read(folder)
    if kind == OWN:
        if not isinstance(hf.get("model"), dict):
            raise UserError(f"{folder / 'config.json'} of model_type {OWN!r} has no 'model'; save the model again")
        config = from_json(ModelConfig, hf["model"])
        config.check()
        return config, convert.to_ours(_own_rules(config), config, tensors)
    if kind not in FAMILIES:
        raise UserError(f"config.json has model_type {kind!r}, unknown{perhaps(str(kind), [*FAMILIES, OWN])}")
    family = FAMILIES[kind]
    config = family.config_from_hf(hf)
    config.check()
    config, tensors = _with_heads(family, config, hf.get("architectures") or [], tensors)
    return config, convert.to_ours(family.rules, config, tensors)


def save(config: ModelConfig, params: Mapping[str, Any], folder: Path, *, extra: dict[str, Any] | None = None) -> str:
    """Writes `config.json` and `model.safetensors` in the first format that can say what the model computes, for
    transformers' `AutoModel` to load as it is; else in our own.  Returns the format's `model_type`.

    `extra` are further keys of `config.json`, such as bos_token_id.  Fields that matter in training alone (dropout,
    initial weights) are written where the format has a place for them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = next((kind for kind, family in FAMILIES.items() if convert.says(family, config)), OWN)
    if kind == OWN:
        tensors = convert.to_hf(_own_rules(config), config, params)
        values: dict[str, Any] = {"model": to_json(config)}
    else:
        family = FAMILIES[kind]
        tensors = _named_for_file(family, config, convert.to_hf(family.rules, config, params))
        values = {"architectures": [convert.heads(family, config)], **family.config_to_hf(config)}
    # Unsaid, these two would take the family's ids in transformers, which need not be in this vocabulary.
    values = {"bos_token_id": None, "eos_token_id": None} | (extra or {}) | {"model_type": kind} | values
    values["torch_dtype"] = str(next(iter(tensors.values())).dtype)  # every version of transformers reads this name
    safetensors.write(tensors, folder / safetensors.WEIGHTS)
    _write_config(values, folder / "config.json")
    return kind


def _with_heads(
    family: Family, config: ModelConfig, architectures: list[str], tensors: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config with the heads whose tensors the file holds; `architectures` decides where tensors do not tell.

    Published files are not always those of the class that they name: bert-base-uncased says BertForMaskedLM and holds
    the next-sentence head too.
    """

    def misfit(config: ModelConfig) -> int:
        found = {name: tuple(x.shape) for name, x in convert.canonical(family, config, tensors).items()}
        return len(convert.difference(convert.hf_shapes(family.rules, config), found))

    named_first = sorted(family.heads, key=lambda heads: family.heads[heads] not in architectures)
    configs = [dataclasses.replace(config, heads_on_top=heads) for heads in named_first]
    config = next((config for config in configs if not misfit(config)), None) or min(configs, key=misfit)
    return config, convert.canonical(family, config, tensors)


def _named_for_file(family: Family, config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names as transformers writes them: those of a bare body without prefix."""
    bare = convert.heads(family, config) == family.heads[()]
    return {name.removeprefix(family.prefix if bare else ""): tensor for name, tensor in tensors.items()}


def _own_rules(config: ModelConfig) -> tuple[Rule, ...]:
    return tuple(Rule(path, path) for path in convert.tree_shapes(config))


def read_config(path: Path) -> dict[str, Any]:
    """The values of a `config.json`.  Raises UserError where it is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a folder with config.json") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch the file again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not an object; fetch the file again")
    return values


def _write_config(values: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)

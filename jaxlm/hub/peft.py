"""The files of an adapter in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, read and written.

The second file has two tensors for each updated matrix of a model, A [r, I] and B [O, r], further tensors that replace
those of the base, such as heads, and with DoRA a magnitude [O]. Their names are those of the modules of transformers
after `base_model.model.`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.hub import safetensors
from jaxlm.hub.model_files import JsonObject, locate
from jaxlm.storage import disk

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UPDATE = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.\w+)?(\.weight)?")
# Keys of the config that change the computation in a way that is not supported, and their values without effect.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
}
# Head of a model -> the task type of PEFT.
_TASK_TYPES = {"classes": "SEQ_CLS", "tokens": "TOKEN_CLS", "span": "QUESTION_ANS"}


class Factors(NamedTuple):
    """The update of the matrix of one module: W + scale B A, with W stored as [O, I], or transposed.

    Attributes:
      a_RI: A.
      b_OR: B.
      scale: factor of the update.
      magnitude_O: norms of the outputs (DoRA); None: those of the sum.
    """

    a_RI: np.ndarray
    b_OR: np.ndarray
    scale: float
    magnitude_O: np.ndarray | None = None

    def astype(self, dtype: Any) -> Factors:
        """Returns the update with its arrays in another dtype."""
        magnitude_O = None if self.magnitude_O is None else self.magnitude_O.astype(dtype)
        return Factors(self.a_RI.astype(dtype), self.b_OR.astype(dtype), self.scale, magnitude_O)


class Adapter(NamedTuple):
    """The content of an adapter's folder.

    Attributes:
      folder: the folder, for messages.
      base: the folder or hub name of the model that it was trained on.
      head: the head of a model for its task type; None: unknown, or none.
      updates: updates by module, without a prefix.
      saved: tensors that replace those of the base, or are missing in it, by name.
      transposed: whether the updated matrices of the base are stored as [I, O].
    """

    folder: Path
    base: str
    head: str | None
    updates: dict[str, Factors]
    saved: dict[str, Any]
    transposed: bool


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder contains an adapter and no weights of a whole model."""
    has = lambda name: (folder / name).exists()
    return has(CONFIG) and not has(safetensors.WEIGHTS) and not has(safetensors.INDEX)


def base_of(folder: Path) -> str:
    """Returns the name of the base in the folder of an adapter, or "" if it names none."""
    return JsonObject.read(folder / CONFIG).text("base_model_name_or_path", "") or ""


def read(folder: Path) -> Adapter:
    """Returns the adapter in a folder.

    Raises:
      UserError: if the folder contains no LoRA adapter, or its files contradict each other.
    """
    folder = Path(folder)
    if locate(folder, CONFIG) is None:
        raise UserError(f"{folder} has no {CONFIG}; give the folder of an adapter in the format of PEFT")
    config = JsonObject.read(folder / CONFIG)
    kind = config.text("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{folder / CONFIG} has peft_type {kind}; only LORA is supported: merge it with PEFT first")
    for key, plain in _PLAIN.items():
        if config.values.get(key) not in plain:
            raise UserError(
                f"{folder / CONFIG} sets {key}, which is not supported; merge the adapter with PEFT "
                f"(merge_and_unload), and give the merged model"
            )
    if locate(folder, WEIGHTS) is None:
        raise UserError(f"{folder} has no {WEIGHTS}; download it, or save the adapter as safetensors with PEFT")
    parts: dict[str, dict[str, Any]] = {}
    saved: dict[str, Any] = {}
    for name, tensor in safetensors.read_file(folder / WEIGHTS).items():
        plain_name = name.removeprefix(_PREFIX)
        if "lora_embedding_" in plain_name:
            raise UserError(f"{folder} updates embeddings ({name}), which is not supported; merge it with PEFT first")
        if match := _UPDATE.fullmatch(plain_name):
            parts.setdefault(match[1], {})[match[2]] = np.asarray(tensor)
        elif ".original_module." not in plain_name:
            saved[re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", plain_name)] = tensor
    updates = {module: _factors(config, module, tensors) for module, tensors in parts.items()}
    if not updates and not saved:
        raise UserError(f"{folder / WEIGHTS} has no tensors; save the adapter again")
    base = base_of(folder)
    task = config.text("task_type", None)
    head = next((head for head, name in _TASK_TYPES.items() if name == task), None)
    return Adapter(folder, base, head, updates, saved, bool(config.boolean("fan_in_fan_out", False)))


def _factors(config: JsonObject, module: str, tensors: Mapping[str, Any]) -> Factors:
    """Returns the update of a module; raises UserError for tensors that are missing or have other shapes."""
    where = f"{config.source.removesuffix(CONFIG)}{WEIGHTS}"
    if not {"lora_A", "lora_B"} <= tensors.keys():
        missing = "lora_A" if "lora_A" not in tensors else "lora_B"
        raise UserError(f"{where} has no {missing} for {module}; download it again")
    a_RI, b_OR = tensors["lora_A"], tensors["lora_B"]
    rank = int(_pattern_value(config, "rank_pattern", module, config.integer("r", 8, 1)))
    if a_RI.ndim != 2 or b_OR.ndim != 2 or len(a_RI) != rank or b_OR.shape[1] != rank:
        raise UserError(
            f"{where}: the update of {module} has the shapes {list(a_RI.shape)} and {list(b_OR.shape)}, but its rank "
            f"is {rank} in {CONFIG}; expected [{rank}, inputs] and [outputs, {rank}]: download both files again"
        )
    alpha = _pattern_value(config, "alpha_pattern", module, config.number("lora_alpha", 8.0))
    scale = alpha / (math.sqrt(rank) if config.boolean("use_rslora", False) else rank)
    magnitude_O = tensors.get("lora_magnitude_vector")
    if bool(config.boolean("use_dora", False)) != (magnitude_O is not None):
        raise UserError(f"{where}: use_dora in {CONFIG} contradicts the magnitudes of {module}; download both again")
    return Factors(a_RI, b_OR, scale, None if magnitude_O is None else magnitude_O.reshape(-1))


def _pattern_value(config: JsonObject, key: str, module: str, default: Any) -> float:
    """Returns the value for a module of a pattern such as `rank_pattern`, as PEFT matches it."""
    patterns = config.object(key)
    for pattern in patterns.values:
        try:
            matches = re.fullmatch(rf"(.*\.)?{pattern.removeprefix('^')}", module)
        except re.error:
            raise UserError(f"{config.source}: {key} has the invalid pattern {pattern!r}; correct it") from None
        if matches:
            return patterns.number(pattern, default, 1e-30)
    return default


def write(
    folder: Path,
    config: ModelConfig,
    updates: Mapping[str, Factors],
    saved: Mapping[str, np.ndarray],
    known: list[str],
    base: str,
    transposed: bool = False,
) -> None:
    """Writes an adapter.

    Args:
      folder: the folder.
      config: the config of the model.
      updates: updates by module; at least one.
      saved: tensors that replace those of the base, by name.
      known: the names of all modules of the model.
      base: the folder or hub name of the base.
      transposed: whether the updated matrices of the base are stored as [I, O].
    """
    tensors: dict[str, np.ndarray] = {}
    for module, factors in updates.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = factors.a_RI
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = factors.b_OR
        if factors.magnitude_O is not None:
            tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = factors.magnitude_O
    for name, tensor in saved.items():
        module, _, last = name.rpartition(".")
        tensors[f"{_PREFIX}{module}{'.base_layer' if module in updates else ''}.{last}"] = tensor
    safetensors.write(tensors, folder / WEIGHTS, {"format": "pt"})
    values = _config_values(config, updates, [*saved], known)
    values |= {"base_model_name_or_path": base, "fan_in_fan_out": transposed}
    disk.write(folder / CONFIG, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _config_values(
    config: ModelConfig, updates: Mapping[str, Factors], saved: list[str], known: list[str]
) -> dict[str, Any]:
    """Returns the values of `adapter_config.json`; `known` are the names of the base's modules."""
    ranks = {module: len(factors.a_RI) for module, factors in updates.items()}
    alphas = {module: factors.scale * len(factors.a_RI) for module, factors in updates.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    head = next(iter(config.heads_on_top), None)
    lm_type = "SEQ_2_SEQ_LM" if config.structure == "encoder_decoder" else "CAUSAL_LM"
    task = {"lm": lm_type, None: "FEATURE_EXTRACTION"}.get(head, _TASK_TYPES.get(str(head)))
    biases = {name for name in saved if name.endswith(".bias") and f"{name[:-5]}.weight" not in saved}
    heads = _outermost({name.rpartition(".")[0] for name in saved if name not in biases}, known)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: x for module, x in alphas.items() if x != alpha},
        "target_modules": _suffixes(set(updates), known),
        "modules_to_save": heads or None,
        "bias": "all" if biases else "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": any(factors.magnitude_O is not None for factors in updates.values()),
        "inference_mode": True,
    }


def _outermost(chosen: set[str], known: list[str]) -> list[str]:
    """Returns the outermost modules that contain only chosen modules of the known ones.

    PEFT saves the whole head of a classifier, and fails for two nested modules, such as those of RoBERTa.
    """
    modules = {name.removesuffix(".bias") for name in known}
    outermost: set[str] = set()
    for module in chosen:
        parts = module.split(".")
        parents = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        contains = lambda parent: {name for name in modules if f"{name}.".startswith(f"{parent}.")}
        outermost.add(next(parent for parent in parents if contains(parent) <= chosen))
    return sorted(outermost)


def _suffixes(chosen: set[str], known: list[str]) -> list[str]:
    """Returns the shortest endings of names that select the chosen modules and no other known module."""
    suffixes: set[str] = set()
    for module in sorted(chosen):
        parts = module.split(".")
        endings = (".".join(parts[n:]) for n in range(len(parts) - 1, -1, -1))
        selects = lambda ending: {name for name in known if f".{name}".endswith(f".{ending}")} <= chosen
        suffixes.add(next((ending for ending in endings if selects(ending)), module))
    return sorted(suffixes)

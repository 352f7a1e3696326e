"""The embedding settings of sentence-transformers (Reimers and Gurevych 2019).

They are in `modules.json`, `1_Pooling/config.json`, `sentence_bert_config.json`, `config_sentence_transformers.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlm.errors import UserError, suggestion
from jaxlm.hub import model_files, safetensors
from jaxlm.hub.model_files import JsonObject

MODES = {  # mode -> its key in older files, in the order in which several vectors are concatenated
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
_DENSE_ACTIVATIONS = {"Identity": None, "Tanh": "tanh", "ReLU": "relu", "SiLU": "silu", "GELU": "gelu"}
_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json")


@dataclass(frozen=True, eq=False)
class Dense:
    """A projection of the pooled vector: `activation(x @ kernel_DO + bias_O)`."""

    kernel_DO: np.ndarray
    bias_O: np.ndarray | None = None
    activation: str | None = "tanh"  # a key of `jaxlm.nn.layers.ACTIVATIONS`; None: no activation


@dataclass(frozen=True)
class Pooling:
    """The computation of a text's embedding from its hidden states.

    The modes are: cls and lasttoken, the state of the first or last token, including special tokens; mean and max, over
    all tokens; mean_sqrt_len_tokens, the sum divided by the square root of the number of tokens; weightedmean, a mean
    in which token n, from 1, has the weight n (Muennighoff 2022).
    """

    modes: tuple[str, ...] = ("mean",)  # keys of MODES; several vectors are concatenated
    dense: tuple[Dense, ...] = ()  # projections, applied one after the other
    normalize: bool = False  # whether to divide by the Euclidean norm
    truncate: int | None = None  # number of dimensions to keep, as the last step; None: all
    max_length: int | None = None  # maximum number of tokens, including special tokens; None: the model's limit
    lowercase: bool = False  # whether to lower-case texts before tokenization
    prompt: str = ""  # prefix of each text


def read_pooling(folder: str | Path) -> Pooling | None:
    """Returns the embedding settings of a model's folder, or None if it has no `modules.json`.

    Raises:
      UserError: if a file is invalid, or if the modules are not Transformer, Pooling, Dense and Normalize, in this
        order.
    """
    folder = Path(folder)
    modules = _modules(folder)
    return _pooling(folder, modules) if modules else None


def read_files(folder: str | Path) -> dict[str, bytes]:
    """Returns relative path -> content of the files of sentence-transformers, for saving a model with them."""
    folder = Path(folder)
    modules = {path for _, path in _modules(folder)}
    files = set(model_files.locate_all(folder, *_FILES)) if modules else set[Path]()
    for module in modules - {folder}:
        files |= set(model_files.locate_all(module, "*.json", "*.safetensors"))
    limit = 1 << 40  # the files include the weights of Dense modules
    return {f.relative_to(folder).as_posix(): model_files.read_bytes(f, limit=limit) for f in sorted(files)}


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Returns the kind and folder of each module except Dropout; empty if there is no `modules.json`."""
    file = model_files.locate(folder, "modules.json")
    values = [] if file is None else model_files.read_json(file)
    modules = []
    for module in values if isinstance(values, list) else [None]:
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("path", "type")):
            raise UserError(f"{file} is not a list of modules with path and type; download it again")
        package, kind = module["type"].split(".")[0], module["type"].split(".")[-1]
        if package != "sentence_transformers" or kind not in (*_ORDER, "Dropout"):
            raise _unsupported(folder, module["type"])
        path = Path(module["path"])
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{file} has the path {module['path']!r}, which is outside its folder; download it again")
        model_files.check_inside(folder / path, folder)
        if kind != "Dropout":
            modules.append((kind, folder / path))
    return modules


def _unsupported(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder / 'modules.json'} requires {what:.200}; jaxlm supports {', '.join(_ORDER)}, in this order; "
        f"use another checkpoint, or remove the file to load the model without it"
    )


def _object(folder: Path, *patterns: str) -> JsonObject:
    """Returns the JSON object in the first matching file of a folder; an empty object if no file matches."""
    files = model_files.locate_all(folder, *patterns)
    return JsonObject.read(files[0]) if files else JsonObject({}, str(folder / patterns[0]))


def _module_object(path: Path) -> JsonObject:
    """Returns the JSON object in the `config.json` of a module, which must exist."""
    file = model_files.locate(path, "config.json")
    if file is None:
        raise UserError(f"{path / 'config.json'} is missing, and modules.json lists its folder; download it again")
    return JsonObject.read(file)


def _pooling(folder: Path, modules: list[tuple[str, Path]]) -> Pooling:
    overall, transformer, tokenizer = (_object(folder, name) for name in (*_FILES[1:], "tokenizer_config.json"))
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds != sorted(kinds, key=_ORDER.index) or "Pooling" in kinds[2:]:
        raise _unsupported(folder, ", ".join(kinds))
    if modules[0][1] != folder:
        raise UserError(
            f"{folder / 'modules.json'} has its Transformer in {modules[0][1].name}; move the files there to "
            f'{folder}, and set the path to ""'
        )
    task = transformer.text("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise _unsupported(folder, f"a Transformer for {task}")
    settings, prompts = _module_object(modules[1][1]), overall.object("prompts")
    name = overall.text("default_prompt_name", None)
    if name is not None and name not in prompts:
        raise UserError(f"{overall.source} has default_prompt_name {name!r}{suggestion(name, prompts.values)}")
    prompt = prompts.text(name, "") if name is not None else ""
    if prompt and not settings.boolean("include_prompt", True):
        raise _unsupported(folder, "a default prompt that is not pooled")
    flags = tuple(mode for mode, key in MODES.items() if settings.boolean(key, False))
    modes = settings.texts("pooling_mode") or flags or ("mean",)
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"{settings.source} has the pooling mode {mode!r:.200}{suggestion(mode, MODES)}")
    # In newer files the tokenizer has the limit; it writes 1e30 if there is none.
    limit = tokenizer.number("model_max_length", 1e30, 1, 1e40)
    if "max_seq_length" in transformer:
        limit = transformer.number("max_seq_length", 1e30, 1)
    return Pooling(
        modes,
        dense=tuple(_dense(folder, path) for kind, path in modules if kind == "Dense"),
        normalize="Normalize" in kinds,
        truncate=overall.integer("truncate_dim", None, 1),
        max_length=int(limit) if limit < 1e9 else None,
        lowercase=transformer.boolean("do_lower_case", False),
        prompt=prompt,
    )


def _dense(folder: Path, path: Path) -> Dense:
    config, tensors = _module_object(path), safetensors.read(path)
    activation = config.text("activation_function", "torch.nn.modules.activation.Tanh").split(".")
    values = {config.text(f"module_{end}_name", "") or "sentence_embedding" for end in ("input", "output")}
    if activation[0] != "torch" or activation[-1] not in _DENSE_ACTIVATIONS:
        raise _unsupported(folder, f"a Dense with {'.'.join(activation)}")
    if config.boolean("use_residual", False) or values != {"sentence_embedding"}:
        raise _unsupported(folder, "a Dense with a residual connection, or with another input than sentence embeddings")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    kernel = shapes.get("linear.weight", ())
    if len(kernel) != 2 or shapes.get("linear.bias", kernel[:1]) != kernel[:1]:
        raise UserError(
            f"{path} contains {shapes}; it must contain a matrix linear.weight and a vector linear.bias with the same "
            f"number of rows; download it again"
        )
    kernel_DO = np.asarray(tensors["linear.weight"]).astype(np.float32).T
    bias_O = np.asarray(tensors["linear.bias"]).astype(np.float32) if "linear.bias" in tensors else None
    return Dense(kernel_DO, bias_O, _DENSE_ACTIVATIONS[activation[-1]])

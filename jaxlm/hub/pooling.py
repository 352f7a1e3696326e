"""How a checkpoint's hidden states become embeddings: sentence-transformers' files, read and kept (Reimers and Gurevych
2019): `modules.json`, `1_Pooling/config.json`, `sentence_bert_config.json`, `config_sentence_transformers.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlm.errors import UserError, perhaps
from jaxlm.hub import model_files, safetensors
from jaxlm.hub.model_files import JsonObject

MODES = {  # -> the key of older files, in the order in which these join several
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
    """A projection of the pooled vector, `activation(x @ kernel_DO + bias_O)`."""

    kernel_DO: np.ndarray
    bias_O: np.ndarray | None = None
    activation: str | None = "tanh"  # a key of `jaxlm.nn.layers.ACTIVATIONS`; None: no activation


@dataclass(frozen=True)
class Pooling:
    """How the hidden states of a text become its embedding.

    cls, lasttoken: the state of the first or last token, special ones included; mean, max: over all tokens;
    mean_sqrt_len_tokens: the sum over the square root of their number; weightedmean: token n, from 1, weighs n
    (Muennighoff 2022).
    """

    modes: tuple[str, ...] = ("mean",)  # keys of MODES; the vectors of several are joined
    dense: tuple[Dense, ...] = ()  # projections, one after the other
    normalize: bool = False  # divide by the Euclidean norm
    truncate: int | None = None  # dimensions that are kept, at last; None: all
    max_length: int | None = None  # tokens of a text that are read, special ones included; None: the model's
    lowercase: bool = False  # lower-case texts before they are tokenized
    prompt: str = ""  # put in front of each text


def read_pooling(folder: str | Path) -> Pooling | None:
    """What the sentence-transformers files of a model's folder declare; None where there is no `modules.json`.

    Raises UserError for broken files, and for what is not Transformer, Pooling, Dense and Normalize in this order.
    """
    folder = Path(folder)
    modules = _modules(folder)
    return _pooling(folder, modules) if modules else None


def carried(folder: str | Path) -> dict[str, bytes]:
    """The sentence-transformers files of a model's folder, path in it -> content, to be saved beside a model again."""
    folder = Path(folder)
    places = {path for _, path in _modules(folder)}
    found = set(model_files.locate_all(folder, *_FILES)) if places else set[Path]()
    for place in places - {folder}:
        found |= set(model_files.locate_all(place, "*.json", "*.safetensors"))
    limit = 1 << 40  # weights of a Dense are among them
    return {f.relative_to(folder).as_posix(): model_files.read_bytes(f, limit=limit) for f in sorted(found)}


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Kind and folder of each module, without Dropout; none where there is no `modules.json`."""
    file = model_files.locate(folder, "modules.json")
    listed = [] if file is None else model_files.read_json(file)
    modules = []
    for module in listed if isinstance(listed, list) else [None]:
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("path", "type")):
            raise UserError(f"{file} is not a list of modules with path and type; fetch it again")
        package, kind = module["type"].split(".")[0], module["type"].split(".")[-1]
        if package != "sentence_transformers" or kind not in (*_ORDER, "Dropout"):
            raise _not_ours(folder, module["type"])
        path = Path(module["path"])
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{file} has the path {module['path']!r}, which leads out of its folder; fetch it again")
        model_files.check_inside(folder / path, folder)
        if kind != "Dropout":
            modules.append((kind, folder / path))
    return modules


def _not_ours(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder / 'modules.json'} asks for {what:.200}; jaxlm computes {', '.join(_ORDER)}, in this order; "
        f"use another checkpoint, or remove the file to load the model without it"
    )


def _object(folder: Path, *patterns: str) -> JsonObject:
    """The object in the first file of a folder that matches; an empty one where there is none."""
    found = model_files.locate_all(folder, *patterns)
    return JsonObject.read(found[0]) if found else JsonObject({}, str(folder / patterns[0]))


def _module_object(path: Path) -> JsonObject:
    """The object in a module's `config.json`, which must be there."""
    file = model_files.locate(path, "config.json")
    if file is None:
        raise UserError(f"{path / 'config.json'} is missing, and modules.json names its folder; fetch it again")
    return JsonObject.read(file)


def _pooling(folder: Path, modules: list[tuple[str, Path]]) -> Pooling:
    overall, transformer, tokenizer = (_object(folder, name) for name in (*_FILES[1:], "tokenizer_config.json"))
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds != sorted(kinds, key=_ORDER.index) or "Pooling" in kinds[2:]:
        raise _not_ours(folder, ", ".join(kinds))
    if modules[0][1] != folder:
        raise UserError(
            f"{folder / 'modules.json'} has its Transformer in {modules[0][1].name}; move what is in there up to "
            f'{folder}, and make the path ""'
        )
    task = transformer.text("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise _not_ours(folder, f"a Transformer for {task}")
    how, prompts, name = (
        _module_object(modules[1][1]),
        overall.object("prompts"),
        overall.text("default_prompt_name", None),
    )
    if name is not None and name not in prompts:
        raise UserError(f"{overall.source} has default_prompt_name {name!r}{perhaps(name, prompts.values)}")
    prompt = prompts.text(name, "") if name is not None else ""
    if prompt and not how.boolean("include_prompt", True):
        raise _not_ours(folder, "a default prompt that is not pooled")
    flags = tuple(mode for mode, key in MODES.items() if how.boolean(key, False))
    modes = how.texts("pooling_mode") or flags or ("mean",)
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"{how.source} has the pooling mode {mode!r:.200}{perhaps(mode, MODES)}")
    # Newer files leave the limit to the tokenizer, which writes 1e30 for none.
    longest = tokenizer.number("model_max_length", 1e30, 1, 1e40)
    if "max_seq_length" in transformer:
        longest = transformer.number("max_seq_length", 1e30, 1)
    return Pooling(
        modes,
        dense=tuple(_dense(folder, path) for kind, path in modules if kind == "Dense"),
        normalize="Normalize" in kinds,
        truncate=overall.integer("truncate_dim", None, 1),
        max_length=int(longest) if longest < 1e9 else None,
        lowercase=transformer.boolean("do_lower_case", False),
        prompt=prompt,
    )


def _dense(folder: Path, path: Path) -> Dense:
    config, tensors = _module_object(path), safetensors.read(path)
    activation = config.text("activation_function", "torch.nn.modules.activation.Tanh").split(".")
    between = {config.text(f"module_{end}_name", "") or "sentence_embedding" for end in ("input", "output")}
    if activation[0] != "torch" or activation[-1] not in _DENSE_ACTIVATIONS:
        raise _not_ours(folder, f"a Dense with {'.'.join(activation)}")
    if config.boolean("use_residual", False) or between != {"sentence_embedding"}:
        raise _not_ours(folder, "a Dense with a residual or between other values than sentence embeddings")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    kernel = shapes.get("linear.weight", ())
    if len(kernel) != 2 or shapes.get("linear.bias", kernel[:1]) != kernel[:1]:
        raise UserError(
            f"{path} holds {shapes}; it must hold a matrix linear.weight and a vector linear.bias of as many rows; "
            f"fetch it again"
        )
    kernel_DO = np.asarray(tensors["linear.weight"]).astype(np.float32).T
    bias_O = np.asarray(tensors["linear.bias"]).astype(np.float32) if "linear.bias" in tensors else None
    return Dense(kernel_DO, bias_O, _DENSE_ACTIVATIONS[activation[-1]])

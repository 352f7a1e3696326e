"""A language model: configuration, module, parameters, tokenizer.  Loaded from a folder, saved to one."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm import families
from jaxlm.config import ModelConfig
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.nn.transformer import Transformer, apply


class Output(NamedTuple):
    """What a model says of a batch: logits of its first head, and the last hidden states."""

    logits: jax.Array | None
    hidden_BTD: jax.Array


@dataclass(frozen=True, eq=False)
class LM:
    """A model as data: `lm(tokens_BT)` applies `lm.module` to `lm.params`, jitted."""

    config: ModelConfig
    module: Transformer
    params: Any
    tokenizer: Tokenizer | None = None

    @property
    def vocabulary(self) -> int:
        """Number of tokens that there are: the tokenizer's, where the stored vocabulary is padded beyond it."""
        return self.config.vocabulary if self.tokenizer is None else min(self.tokenizer.size, self.config.vocabulary)

    def apply(
        self,
        params: Any,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        target_tokens_BT: jax.Array | None = None,
    ) -> Output:
        """The pure function behind a call; inputs default as in `Transformer`."""
        inputs = tokens_BT, segments_BT, positions_BT, types_BT, target_tokens_BT
        x_BTD = apply(self.module, params, *inputs)
        head = next(iter(self.config.heads_on_top), None)
        if head is None:
            return Output(None, x_BTD)
        read = x_BTD if head in ("lm", "masked_lm") else x_BTD[:, :1]
        return Output(apply(self.module, params, read, method=head), x_BTD)

    @cached_property
    def _jitted(self) -> Any:
        return jax.jit(self.apply)

    def __call__(self, tokens_BT: jax.Array, **inputs: jax.Array) -> Output:
        """`apply` with the model's own parameters, compiled."""
        return self._jitted(self.params, tokens_BT, **inputs)


def load(folder: str | os.PathLike[str], *, compute_dtype: str = "float32") -> LM:
    """The model in a folder: an exported model (Hugging Face's format), or a run (its export, else its checkpoint).

    Raises UserError where the folder is missing, is no model, or its files contradict each other.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give an exported model or a run folder")
    if (folder / "export" / "config.json").exists():
        folder = folder / "export"
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json; give an exported model or a run folder")
    if "run" in families.read_config(folder / "config.json"):
        raise UserError(
            f"the run in {folder} has no export yet; let it end (give its command again), or stop it with SIGTERM, "
            f"which exports what there is"
        )
    config, params = families.load(folder)
    module = Transformer(config, dtype=jax.numpy.dtype(compute_dtype))
    tokenizer = tokenizers.load(str(folder)) if _has_tokenizer(folder) else None
    return LM(config, module, jax.tree.map(jax.numpy.asarray, params), tokenizer)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json"))


def save(lm: LM, folder: str | os.PathLike[str]) -> str:
    """Writes the model where transformers can load it; returns the name of the format.

    The folder appears whole or not at all.  An architecture that Hugging Face has no format for is written in jaxlm's
    own.  Raises UserError where the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty; choose another folder")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    extra = {}
    if lm.tokenizer is not None:
        lm.tokenizer.save(str(part))
        ids = {"bos": lm.tokenizer.bos, "eos": lm.tokenizer.eos, "pad": lm.tokenizer.pad}
        extra = {f"{name}_token_id": i for name, i in ids.items()}
    name = families.save(lm.config, jax.device_get(lm.params), part, extra=extra)
    if folder.exists():
        folder.rmdir()
    part.rename(folder)
    return name


def with_params(lm: LM, params: Any) -> LM:
    """The same model with other parameters."""
    return dataclasses.replace(lm, params=params)

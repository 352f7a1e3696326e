"""The configs of tasks over running text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from jaxlm.config.choices import Head
from jaxlm.config.model import ModelConfig
from jaxlm.config.ranges import (
    MAX_INT,
    Count,
    Range,
    Share,
    ShareBelowOne,
)
from jaxlm.config.task import TaskConfig, Used
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.config.run import RunConfig

__all__ = [
    "CausalLM",
    "Infilling",
    "MaskedLM",
    "PermutedLM",
    "SpanCorruption",
]
AtLeastOne = Annotated[float, Range(1, MAX_INT)]
OpenShare = Annotated[float, Range(1e-6, 1, below=True)]


@dataclass(frozen=True)
class CausalLM(TaskConfig):
    """Predict each token from the tokens before it."""

    heads: ClassVar[tuple[Head, ...]] = ("lm",)
    structure: ClassVar[str] = "decoder"
    has_label_head: ClassVar[bool] = False

    label_smoothing: ShareBelowOne = 0.0  # probability spread evenly over the vocabulary
    stream: bool = True  # cut rows from the concatenated documents (GPT-2); false: pack whole documents
    stride: Count = 0  # step of the evaluation windows in tokens; each token is counted once; 0: the row length

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Raises UserError if the model is not a decoder, or the stride exceeds the row length."""
        _check_architecture(self, model)
        if not 0 <= self.stride <= run.data.length:
            raise UserError(f"task.stride is {self.stride}; it must be between 0 and {run.data.length}")


@dataclass(frozen=True)
class MaskedLM(TaskConfig):
    """Predict masked tokens; each epoch masks different tokens (Devlin et al. 2019)."""

    structure: ClassVar[str] = "encoder"
    has_label_head: ClassVar[bool] = False
    used: ClassVar[tuple[Used, ...]] = (
        ("sentences", "next_sentence", (True,)),
        ("full_sentences", "next_sentence", (False,)),
        ("short_rate", "next_sentence", (True,)),
    )

    label_smoothing: ShareBelowOne = 0.0  # probability spread evenly over the vocabulary
    mask_rate: OpenShare = 0.15  # fraction of the tokens to predict: 80% masked, 10% random, 10% unchanged
    whole_words: bool = False  # mask whole words instead of single tokens
    full_sentences: bool = True  # fill rows across documents (Liu et al. 2019); false: one document per example
    next_sentence: bool = False  # also predict whether the second text of a pair continues the first; half do
    sentences: Literal["line", "punctuation"] = "line"  # what ends a sentence, for next_sentence
    short_rate: Share = 0.1  # fraction of the pairs with a shorter target length, chosen at random

    @property
    def heads(self) -> tuple[Head, ...]:  # type: ignore[override]
        """Output heads that the task requires."""
        return ("masked_lm", "next_sentence") if self.next_sentence else ("masked_lm",)

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Raises UserError if the model is not an encoder with the required heads, or lacks token types."""
        _check_architecture(self, model)
        if self.next_sentence and model.types < 2:
            raise UserError(
                f"model.types is {model.types}; next_sentence needs at least 2, one for each text of a pair"
            )


@dataclass(frozen=True)
class PermutedLM(TaskConfig):
    """Predict some tokens in a random order, each from the other tokens and from the targets before it (XLNet, Yang et
    al. 2019)."""

    heads: ClassVar[tuple[Head, ...]] = ("lm",)
    structure: ClassVar[str] = "encoder"
    has_label_head: ClassVar[bool] = False
    sentences: ClassVar[str] = "whole"  # documents are not split

    label_smoothing: ShareBelowOne = 0.0  # probability spread evenly over the vocabulary
    rate: OpenShare = 1 / 6  # fraction of the tokens to predict
    max_span: Annotated[int, Range(1, 1000)] = 5  # maximum length of a span of targets; all are equally likely
    memory: Count = 0  # preceding tokens of the document that a text also attends to, within the row length

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Raises UserError if the model is not an encoder with the head lm and a query stream."""
        _check_architecture(self, model)
        if not model.query_stream:
            raise UserError(
                f"model.query_stream is {model.query_stream} and model.relative {model.relative!r}; PermutedLM reads a "
                f"query stream: set --model.query-stream and --model.relative transformer_xl, or use MaskedLM"
            )


@dataclass(frozen=True)
class SpanCorruption(TaskConfig):
    """Generate the spans that were removed from a text, as in T5's pre-training (Raffel et al. 2020, section 3.1.4).

    `data.length` is the row length of the sources; the row length of the targets follows from it.
    """

    heads: ClassVar[tuple[Head, ...]] = ("lm",)
    structure: ClassVar[str] = "encoder_decoder"
    has_label_head: ClassVar[bool] = False
    sentences: ClassVar[str] = "whole"  # documents are not split

    rate: OpenShare = 0.15  # fraction of the tokens to remove
    span: AtLeastOne = 3.0  # mean span length in tokens

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Raises UserError if the model is not an encoder-decoder with the head lm and a start token."""
        _check_denoiser(self, model)


@dataclass(frozen=True)
class Infilling(TaskConfig):
    """Restore a text with removed spans and shuffled sentences, as in BART's pre-training (Lewis et al. 2020, section
    2.2)."""

    heads: ClassVar[tuple[Head, ...]] = ("lm",)
    structure: ClassVar[str] = "encoder_decoder"
    has_label_head: ClassVar[bool] = False

    rate: OpenShare = 0.3  # fraction of the tokens to remove
    span: AtLeastOne = 3.0  # mean of the Poisson distribution of span lengths; each span becomes one mask token
    sentences: Literal["line", "punctuation"] = "punctuation"  # what ends a sentence
    permute: bool = True  # shuffle the sentences

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Raises UserError if the model is not an encoder-decoder with the head lm and a start token."""
        _check_denoiser(self, model)


def _check_architecture(task: TaskConfig, model: ModelConfig) -> None:
    if model.structure != task.structure or not set(task.heads or ()) <= set(model.heads_on_top):
        remedy = "change model.structure and model.heads_on_top"
        if model.query_stream:
            remedy = "a model with a query stream is trained with PermutedLM: change the task, or use another model"
        raise UserError(
            f"{type(task).__name__} needs a(n) {task.structure} with the heads {task.heads}, not a(n) "
            f"{model.structure} with {model.heads_on_top}; {remedy}"
        )


def _check_denoiser(task: TaskConfig, model: ModelConfig) -> None:
    if model.structure != task.structure or model.heads_on_top != ("lm",) or model.start_token is None:
        raise UserError(
            f"{type(task).__name__} needs an encoder-decoder with the head lm and a start token, not a(n) "
            f"{model.structure} with {model.heads_on_top} and start_token {model.start_token}; use another model"
        )

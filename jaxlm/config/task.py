"""What a run learns: the config of each task.

A config class has two checks: `check` of its own fields, and `check_model` of the model that a run gives it.  The
dataclass of a user's own task may derive from `TaskConfig` too, and need not.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from jaxlm.config.data import DataConfig
from jaxlm.config.decoding import Decoding
from jaxlm.config.model import Head, ModelConfig
from jaxlm.config.ranges import (
    MOST,
    Config,
    Count,
    Name,
    NotEmpty,
    NotNegative,
    Number,
    Pattern,
    Positive,
    Range,
    Share,
    ShareBelowOne,
    check_fields,
    shown,
)
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.config.run import RunConfig

__all__ = [
    "CausalLM",
    "Chat",
    "Classification",
    "Infilling",
    "MaskedLM",
    "MultiTask",
    "MultipleChoice",
    "Part",
    "QuestionAnswering",
    "Seq2Seq",
    "Similarity",
    "SpanCorruption",
    "Tagging",
]
TagScheme = Literal["auto", "IOB1", "IOB2", "IOBES", "BILOU", "IO", "none"]
Integer = Annotated[int, Range(-MOST, MOST)]
AtLeastOne = Annotated[float, Range(1, MOST)]
OpenShare = Annotated[float, Range(1e-6, 1, below=True)]
Names = Annotated[tuple[Name, ...], NotEmpty()]
Used = tuple[str, str, tuple[Any, ...]]  # a field, the field that decides about it, its values that use the field


class TaskConfig(Config):
    """Base of the configs of tasks."""

    heads: ClassVar[tuple[Head, ...] | None] = None  # that the model must have; None: one that depends on the labels
    structure: ClassVar[str] = ""  # that the model must have, of a task with `heads`; empty: any
    has_label_head: ClassVar[bool] = True  # whether the outputs of the task's head have names of the data
    used: ClassVar[tuple[Used, ...]] = ()  # fields that mean something only beside others

    def check(self) -> None:
        """Raises UserError where fields are out of their range or contradict each other."""
        check_fields(self, "task.")
        for name, other, values in self.used:
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default  # type: ignore[attr-defined]
            if getattr(self, other) not in values and value != default:
                raise UserError(
                    f"task.{name} is {value!r}, which means nothing where task.{other} is {getattr(self, other)}; "
                    f"leave it out, or set task.{other} to {' or '.join(map(str, values))}"
                )

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Raises UserError where a model cannot do the task."""
        check_reader(self, model)


def check_reader(task: Any, model: ModelConfig) -> None:
    """Raises UserError where a task that reads the states of an encoder or a decoder is given an encoder-decoder."""
    if model.structure == "encoder_decoder":
        raise UserError(
            f"{type(task).__name__} reads the states of an encoder or a decoder; the model is an "
            f"encoder-decoder: start from another"
        )


@dataclass(frozen=True)
class CausalLM(TaskConfig):
    """Predict each token from those before it."""

    heads: ClassVar[tuple[Head, ...]] = ("lm",)
    structure: ClassVar[str] = "decoder"
    has_label_head: ClassVar[bool] = False

    label_smoothing: ShareBelowOne = 0.0  # share of the target spread evenly over the vocabulary
    stream: bool = True  # rows are cut from all documents concatenated (GPT-2); else documents are packed whole
    stride: Count = 0  # evaluation windows advance by this many tokens, each counted once; 0: by the whole length

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Raises UserError where the model is no decoder, or evaluation windows advance by more than their length."""
        if model.structure != self.structure or "lm" not in model.heads_on_top:
            raise UserError(
                f"CausalLM needs a decoder with the 'lm' head, not a(n) {model.structure} with "
                f"{model.heads_on_top}; change model.structure and model.heads_on_top"
            )
        if not 0 <= self.stride <= run.data.length:
            raise UserError(f"task.stride is {self.stride}; it must be between 0 and {run.data.length}")


@dataclass(frozen=True)
class MaskedLM(TaskConfig):
    """Predict tokens that are masked, other ones in every epoch (Devlin et al. 2019)."""

    structure: ClassVar[str] = "encoder"
    has_label_head: ClassVar[bool] = False
    used: ClassVar[tuple[Used, ...]] = (
        ("sentences", "next_sentence", (True,)),
        ("full_sentences", "next_sentence", (False,)),
        ("short_rate", "next_sentence", (True,)),
    )

    label_smoothing: ShareBelowOne = 0.0  # share of the target spread evenly over the vocabulary
    mask_rate: OpenShare = 0.15  # share of the tokens that are predicted: 80% masked, 10% random, 10% kept
    whole_words: bool = False  # choose whole words, not single tokens
    full_sentences: bool = True  # fill a row with the sentences that follow (Liu et al. 2019); False: of one document
    next_sentence: bool = False  # pair each text with its continuation or, half of the time, another; predict which
    sentences: Literal["line", "punctuation"] = "line"  # what a sentence is, for pairs
    short_rate: Share = 0.1  # share of the pairs aimed at a random shorter length

    @property
    def heads(self) -> tuple[Head, ...]:  # type: ignore[override]
        """The heads that the model must have."""
        return ("masked_lm", "next_sentence") if self.next_sentence else ("masked_lm",)

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Raises UserError where the model is no encoder with the heads of the task."""
        if model.structure != self.structure or not set(self.heads) <= set(model.heads_on_top):
            raise UserError(
                f"MaskedLM needs an encoder with the heads {self.heads}, not a(n) {model.structure} with "
                f"{model.heads_on_top}; change model.structure and model.heads_on_top"
            )
        if self.next_sentence and model.types < 2:
            raise UserError(f"model.types is {model.types}; next_sentence needs 2, one for each text of a pair")


@dataclass(frozen=True)
class SpanCorruption(TaskConfig):
    """Write what was taken out of a text, span by span, as T5 was pre-trained (Raffel et al. 2020, section 3.1.4).

    `data.length` is of the source; a row of targets is as long as such a source needs.
    """

    heads: ClassVar[tuple[Head, ...]] = ("lm",)
    structure: ClassVar[str] = "encoder_decoder"
    has_label_head: ClassVar[bool] = False
    sentences: ClassVar[str] = "whole"  # a document is not divided

    rate: OpenShare = 0.15  # share of the tokens that is taken out
    span: AtLeastOne = 3.0  # mean length of what is taken out at a place

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Raises UserError where the model is no encoder-decoder that can write."""
        _check_denoiser(self, model)


@dataclass(frozen=True)
class Infilling(TaskConfig):
    """Restore a text from one with gaps, and with its sentences in another order, as BART was pre-trained (Lewis et al.
    2020, section 2.2)."""

    heads: ClassVar[tuple[Head, ...]] = ("lm",)
    structure: ClassVar[str] = "encoder_decoder"
    has_label_head: ClassVar[bool] = False

    rate: OpenShare = 0.3  # share of the tokens that is taken out
    span: AtLeastOne = 3.0  # mean of the gaps' lengths, Poisson's; a gap of any length, also of none, is one mask token
    sentences: Literal["line", "punctuation"] = "punctuation"  # what a sentence is
    permute: bool = True  # shuffle the sentences

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Raises UserError where the model is no encoder-decoder that can write."""
        _check_denoiser(self, model)


@dataclass(frozen=True)
class Classification(TaskConfig):
    """Tell what a text, or a pair of texts, is: one class, any number of them, or a number."""

    used: ClassVar[tuple[Used, ...]] = (
        ("class_weights", "problem", ("single_label", "multi_label")),
        ("label_smoothing", "problem", ("single_label",)),
        ("names", "problem", ("single_label", "multi_label")),
        ("separator", "problem", ("multi_label",)),
        ("stride", "windows", ("mean", "max")),
    )

    problem: Literal["single_label", "multi_label", "regression"] = "single_label"  # one class, any of them, a number
    text: Names = ("text",)  # column of the text, or the two columns of a pair
    label: Name = "label"  # column of what is to be predicted; several classes in a list, or divided by separator
    separator: Name = ","  # between several classes in a column of text
    names: tuple[Name, ...] = ()  # of the classes, in the order of the outputs; empty: those found in the training part
    most_classes: Annotated[int, Range(2, MOST)] = 1000  # more are taken for a column of numbers or texts, and refused
    class_weights: Literal["none", "balanced"] = "none"  # balanced: a rare class weighs as much as a frequent one
    label_smoothing: ShareBelowOne = 0.0  # share of the target spread evenly over the classes
    windows: Literal["none", "mean", "max"] = "none"  # cut long texts, or read them by windows: mean or max of logits
    stride: Count = 0  # tokens that two windows have in common; 0: a quarter of what a window holds

    def check(self) -> None:
        """Raises UserError where fields are out of their range or contradict each other."""
        super().check()
        if len(self.text) not in (1, 2):
            raise UserError(f"task.text names {len(self.text)} columns; give one, or the two of a pair")
        if self.windows != "none" and len(self.text) == 2:
            raise UserError(f"task.windows is {self.windows!r}, which is for one text and not for pairs; leave it out")


@dataclass(frozen=True)
class Tagging(TaskConfig):
    """Tell what each word is a part of, such as a name (Tjong Kim Sang & De Meulder 2003)."""

    tokens: Name = "tokens"  # column of the words, a list
    tags: Name = "tags"  # column of their tags, a list
    scheme: TagScheme = "auto"  # how tags mark spans; auto: as they show; IO: by the type alone; none: tags are classes
    names: tuple[Name, ...] = ()  # of the tags, in the order of the outputs; for tags that are numbers, from 0


@dataclass(frozen=True)
class QuestionAnswering(TaskConfig):
    """Find the answer to a question in a text, or that there is none (Rajpurkar et al. 2016, 2018)."""

    stride: Count = 128  # tokens that two windows over a long text have in common
    most_question: Positive = 64  # tokens of a question that are kept
    longest_answer: Positive = 30  # tokens of an answer that is given
    unanswerable: bool = True  # whether a question may have no answer (SQuAD 2.0)
    wrong_offsets: Literal["refuse", "drop"] = "refuse"  # questions whose answer is not at its offset


@dataclass(frozen=True)
class Similarity(TaskConfig):
    """Vectors of texts, the nearer the more alike the texts are (Reimers & Gurevych 2019)."""

    used: ClassVar[tuple[Used, ...]] = (
        ("lowest", "objective", ("cosine",)),
        ("highest", "objective", ("cosine",)),
        ("temperature", "objective", ("contrastive",)),
    )

    objective: Literal["cosine", "contrastive"] = "cosine"  # match scores of pairs, or find a pair among other texts
    text: tuple[Name, Name] = ("text_a", "text_b")  # columns of a pair
    label: Name = "label"  # column of its score, for objective=cosine
    lowest: Number = 0.0  # score that means a cosine of 0
    highest: Number = 1.0  # score that means a cosine of 1
    temperature: Annotated[float, Range(1e-6, MOST)] = 0.05  # divides the cosines, for objective=contrastive

    def check(self) -> None:
        """Raises UserError where fields are out of their range or contradict each other."""
        super().check()
        if not self.lowest < self.highest:
            raise UserError(f"task.lowest is {self.lowest}, task.highest {self.highest}; the second must be larger")


@dataclass(frozen=True)
class MultipleChoice(TaskConfig):
    """Choose the answer to a question among several (Zellers et al. 2018)."""

    question: Name = "question"  # column of the question
    options: Names = ("options",)  # columns of the options, or one with a list of them
    label: Name = "label"  # column of the right one: its number, counted from `first`, its letter A, B ..., or its text
    first: Integer = 0  # number of the first option


@dataclass(frozen=True)
class Seq2Seq(TaskConfig):
    """Write a text for a text (Sutskever et al. 2014): a translation, a summary, an answer.

    An encoder-decoder reads the source in its encoder.  A decoder reads it first and learns what comes after it alone.
    """

    has_label_head: ClassVar[bool] = False

    source: Name = "source"  # column of the text that is read, or an entry of one, such as "translation.en"
    target: Name = "target"  # column of the text, or a list of texts as good as each other, that is to be written
    references: tuple[str, ...] = ()  # columns of further texts as good as the target, which count in the scores
    prefix: str = ""  # put before each source, such as "translate English to German: "
    suffix: str = ""  # put after each source, such as " TL;DR:"
    source_length: Count = 0  # tokens of the sources in a row of an encoder-decoder; 0: as many as data.length
    scored_as: Literal["translation", "summary", "answer"] = "translation"  # BLEU and chrF, ROUGE, or exact match
    empty: Literal["refuse", "drop"] = "refuse"  # rows with an empty source or target
    label_smoothing: ShareBelowOne = 0.0  # share of the target spread evenly over the vocabulary
    generated: Count = 0  # held-out texts that are generated for scores, the first of them; 0: all
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.0))  # how texts are generated

    def check(self) -> None:
        """Raises UserError where fields are out of their range or contradict each other."""
        super().check()
        _check_decoding(self.decoding)

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Every structure can be trained on pairs of texts."""


@dataclass(frozen=True)
class Chat(TaskConfig):
    """Answer in a conversation: the assistant's messages alone are learned (instruction tuning; Ouyang et al. 2022,
    section 3.5)."""

    has_label_head: ClassVar[bool] = False

    messages: str = "messages"  # column of lists of {"role": ..., "content": ...} or {"from": ..., "value": ...}
    question: str = ""  # in place of messages, the column of the user's message
    answer: str = ""  # and that of what the assistant answers
    system: str = ""  # the system message of each conversation
    template: str = ""  # Jinja source of the chat template; empty: the tokenizer's own
    last_alone: bool = False  # of several answers only the last one is learned
    compared: Pattern = ""  # regular expression of the part of an answer that scores compare; empty: the whole
    label_smoothing: ShareBelowOne = 0.0  # share of the target spread evenly over the vocabulary
    generated: Count = 100  # held-out answers that are generated for scores, the first of them; 0: all
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.0))  # how answers are generated

    def check(self) -> None:
        """Raises UserError where fields are out of their range or contradict each other."""
        super().check()
        _check_decoding(self.decoding)
        if self.answer and not self.question:
            raise UserError(
                f"task.answer is {self.answer!r} without task.question; give both columns, or task.messages"
            )


@dataclass(frozen=True)
class Part(Config):
    """One of several tasks, with data of its own."""

    task: Any  # Classification, Tagging, QuestionAnswering, Similarity or MultipleChoice
    data: DataConfig  # its length is that of the run
    weight: NotNegative = 0.0  # its share of the rows is this by the sum of all; 0 for all: by how many rows each has

    def check(self, name: str) -> None:
        """Raises UserError where the name or the task cannot be that of a part, or its data are missing."""
        if (
            not re.fullmatch(r"[a-z][a-z0-9_]*", name)
            or isinstance(self.task, MultiTask)
            or not getattr(self.task, "has_label_head", True)
        ):
            raise UserError(
                f"task.parts has {name!r}, a {type(self.task).__name__}; a name is of small letters, and a part is a "
                f"task over records such as Classification"
            )
        if not self.data.path:
            raise UserError(f"the data.path of the part {name!r} is empty; give a file, a folder, a glob or tfds:NAME")
        check_task(self.task)


@dataclass(frozen=True)
class MultiTask(TaskConfig):
    """Several tasks at once, on one body with a head for each (Liu et al. 2019)."""

    parts: dict[str, Part]  # by name, which scores and exports bear

    def check(self) -> None:
        """Raises UserError where the parts are no tasks with a head each, or their weights contradict each other."""
        super().check()
        for name, part in self.parts.items():
            part.check(name)
        if not self.parts or len({part.weight > 0 for part in self.parts.values()}) > 1:
            raise UserError("task.parts is empty, or some parts have a weight and some none; give all one, or none")


def _check_decoding(decoding: Decoding) -> None:
    decoding.check("task.decoding.")
    if decoding.n_best > 1:
        raise UserError(f"task.decoding.n_best is {decoding.n_best}; a task writes one text for each: set 1")


def _check_denoiser(task: TaskConfig, model: ModelConfig) -> None:
    if model.structure != task.structure or model.heads_on_top != ("lm",) or model.start_token is None:
        raise UserError(
            f"{type(task).__name__} needs an encoder-decoder with the head lm and a start token, not a(n) "
            f"{model.structure} with {model.heads_on_top} and start_token {model.start_token}"
        )


def check_task(task: Any) -> None:
    """Raises UserError where a task is no task's config, or its fields are out of range or contradict each other."""
    if not dataclasses.is_dataclass(task) or isinstance(task, type):
        known = ", ".join(sorted(TASK_CONFIGS))
        raise UserError(
            f"task is {shown(task)}; it must be the config of a task, such as CausalLM(): {known}, or your own"
        )
    if isinstance(task, TaskConfig):
        task.check()
    elif isinstance(task, Config):  # the class of a user's own task may be any dataclass
        check_fields(task, "task.")


TASK_CONFIGS: dict[str, type] = {}  # name in config.json -> its dataclass; `jaxlm.tasks.register` adds to it

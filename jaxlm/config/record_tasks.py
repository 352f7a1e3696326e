"""The configs of tasks over the rows of a table."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from jaxlm.config.data import DataConfig
from jaxlm.config.decoding import Decoding
from jaxlm.config.model import ModelConfig
from jaxlm.config.ranges import (
    MAX_INT,
    AboveZero,
    Config,
    Count,
    Name,
    NotEmpty,
    NotNegative,
    Number,
    Pattern,
    Positive,
    Range,
    ShareBelowOne,
)
from jaxlm.config.task import TaskConfig, Used, check_task
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.config.run import RunConfig

__all__ = [
    "Chat",
    "Classification",
    "MultiTask",
    "MultipleChoice",
    "Part",
    "Preference",
    "QuestionAnswering",
    "Reward",
    "Seq2Seq",
    "Similarity",
    "Tagging",
]
TagScheme = Literal["auto", "IOB1", "IOB2", "IOBES", "BILOU", "IO", "none"]
Integer = Annotated[int, Range(-MAX_INT, MAX_INT)]
Names = Annotated[tuple[Name, ...], NotEmpty()]


@dataclass(frozen=True)
class Classification(TaskConfig):
    """Classify a text or a pair of texts: one class, any number of classes, or a number (regression)."""

    used: ClassVar[tuple[Used, ...]] = (
        ("class_weights", "problem", ("single_label", "multi_label")),
        ("label_smoothing", "problem", ("single_label",)),
        ("names", "problem", ("single_label", "multi_label")),
        ("separator", "problem", ("multi_label",)),
        ("stride", "windows", ("mean", "max")),
    )

    problem: Literal["single_label", "multi_label", "regression"] = "single_label"  # one class, several, a number
    text: Names = ("text",)  # column of the text, or two columns for a pair
    label: Name = "label"  # column of the label; several classes as a list or joined by separator
    separator: Name = ","  # separator between several classes in a string
    names: tuple[Name, ...] = ()  # class names in output order; empty: the classes in the training data
    max_classes: Annotated[int, Range(2, MAX_INT)] = 1000  # maximum number of classes; more indicate a wrong column
    class_weights: Literal["none", "balanced"] = "none"  # balanced: every class has the same total weight
    label_smoothing: ShareBelowOne = 0.0  # probability spread evenly over the classes
    windows: Literal["none", "mean", "max"] = "none"  # long texts: truncate, or pool the logits of windows
    stride: Count = 0  # overlap of two windows in tokens; 0: a quarter of a window

    def check(self) -> None:
        """Raises UserError if fields are out of range or contradict each other."""
        super().check()
        if len(self.text) not in (1, 2):
            raise UserError(f"task.text has {len(self.text)} columns; give one, or two for a pair")
        if self.windows != "none" and len(self.text) == 2:
            raise UserError(f"task.windows is {self.windows!r}, but pairs of texts have no windows; leave it out")


@dataclass(frozen=True)
class Tagging(TaskConfig):
    """Tag each word, as in named-entity recognition (Tjong Kim Sang & De Meulder 2003)."""

    tokens: Name = "tokens"  # column with a list of words
    tags: Name = "tags"  # column with a list of tags, one per word
    scheme: TagScheme = "auto"  # tagging scheme; auto: inferred from the tags; IO: types only; none: no spans
    names: tuple[Name, ...] = ()  # tag names in output order, for tags given as numbers from 0
    crf: bool = False  # learn scores of neighbouring tags, and predict the best sequence (Lafferty et al. 2001)


@dataclass(frozen=True)
class QuestionAnswering(TaskConfig):
    """Find the answer to a question in a text, or detect that there is none (Rajpurkar et al. 2016, 2018)."""

    stride: Count = 128  # overlap of two windows over a long text, in tokens
    max_question_tokens: Positive = 64  # maximum length of a question in tokens; longer ones are truncated
    max_answer_tokens: Positive = 30  # maximum length of a predicted answer in tokens
    unanswerable: bool = True  # whether a question may have no answer (SQuAD 2.0)
    wrong_offsets: Literal["refuse", "drop"] = "refuse"  # how to handle answers that are not at their offset


@dataclass(frozen=True)
class Similarity(TaskConfig):
    """Embed texts so that similar texts have similar vectors (Reimers & Gurevych 2019)."""

    used: ClassVar[tuple[Used, ...]] = (
        ("lowest", "objective", ("cosine",)),
        ("highest", "objective", ("cosine",)),
        ("temperature", "objective", ("contrastive",)),
    )

    objective: Literal["cosine", "contrastive"] = "cosine"  # regress scores of pairs, or identify pairs in a batch
    text: tuple[Name, Name] = ("text_a", "text_b")  # the two columns of a pair
    label: Name = "label"  # column of the score, for objective=cosine
    lowest: Number = 0.0  # score that corresponds to a cosine of 0
    highest: Number = 1.0  # score that corresponds to a cosine of 1
    temperature: Annotated[float, Range(1e-6, MAX_INT)] = 0.05  # divisor of the cosines, for objective=contrastive

    def check(self) -> None:
        """Raises UserError if fields are out of range or contradict each other."""
        super().check()
        if not self.lowest < self.highest:
            raise UserError(f"task.lowest is {self.lowest} and task.highest {self.highest}; highest must be larger")


@dataclass(frozen=True)
class MultipleChoice(TaskConfig):
    """Choose the answer to a question from several options (Zellers et al. 2018)."""

    question: Name = "question"  # column of the question
    options: Names = ("options",)  # columns of the options, or one column with a list of options
    label: Name = "label"  # column of the answer: a number counted from `first`, a letter A, B ..., or a text
    first: Integer = 0  # number of the first option


@dataclass(frozen=True)
class Seq2Seq(TaskConfig):
    """Generate a target text from a source text (Sutskever et al. 2014): translation, summarisation, answering.

    An encoder-decoder encodes the source.  A decoder reads it as a prefix and is trained on the target only.
    """

    has_label_head: ClassVar[bool] = False

    source: Name = "source"  # column of the source text, or a nested entry such as "translation.en"
    target: Name = "target"  # column of the target text, or of a list of equivalent target texts
    references: tuple[str, ...] = ()  # columns of additional reference texts for scoring
    prefix: str = ""  # prepended to each source, such as "translate English to German: "
    suffix: str = ""  # appended to each source, such as " TL;DR:"
    source_length: Count = 0  # row length of an encoder-decoder's sources in tokens; 0: data.length
    scored_as: Literal["translation", "summary", "answer"] = "translation"  # BLEU and chrF; ROUGE; or exact match
    empty: Literal["refuse", "drop"] = "refuse"  # how to handle rows with an empty source or target
    label_smoothing: ShareBelowOne = 0.0  # probability spread evenly over the vocabulary
    generated: Count = 0  # number of held-out texts to generate for scoring; 0: all
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.0))  # options of text generation

    def check(self) -> None:
        """Raises UserError if fields are out of range or contradict each other."""
        super().check()
        _check_decoding(self.decoding)

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Raises UserError if the sources are longer than the encoder's positions; any structure can be trained."""
        if model.structure == "encoder_decoder":
            remedy = "lower it, or use a model with more positions (--model.max-length)"
            model.check_length(self.source_length or run.data.length, "task.source_length", remedy)


@dataclass(frozen=True)
class Chat(TaskConfig):
    """Instruction tuning: generate the assistant's messages of a conversation; only these are trained on (Ouyang et al.
    2022, section 3.5)."""

    has_label_head: ClassVar[bool] = False

    messages: str = "messages"  # column with lists of {"role": ..., "content": ...} or {"from": ..., "value": ...}
    question: str = ""  # column of the user's message, instead of messages
    answer: str = ""  # column of the assistant's answer, used with question
    system: str = ""  # system message of every conversation
    template: str = ""  # Jinja source of the chat template; empty: the tokenizer's own
    last_answer_only: bool = False  # train on the last answer of each conversation only
    compared: Pattern = ""  # regular expression for the part of an answer to compare in scores; empty: all
    label_smoothing: ShareBelowOne = 0.0  # probability spread evenly over the vocabulary
    generated: Count = 100  # number of held-out answers to generate for scoring; 0: all
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.0))  # options of text generation

    def check(self) -> None:
        """Raises UserError if fields are out of range or contradict each other."""
        super().check()
        _check_decoding(self.decoding)
        if self.answer and not self.question:
            raise UserError(
                f"task.answer is {self.answer!r} without task.question; give both columns, or task.messages"
            )


@dataclass(frozen=True)
class AnswerPairs(TaskConfig):
    """Base of tasks over pairs of a chosen and a rejected answer to the same prompt."""

    prompt: str = "prompt"  # column of the prompt, a text or messages; without it, what both answers begin with
    chosen: Name = "chosen"  # column of the better answer, a text or messages, or of the whole conversation
    rejected: Name = "rejected"  # column of the worse answer
    system: str = ""  # system message of every conversation
    template: str = ""  # Jinja source of the chat template; empty: the tokenizer's own
    equal: Literal["refuse", "drop"] = "refuse"  # how to handle pairs of equal or empty answers


@dataclass(frozen=True)
class Preference(AnswerPairs):
    """Prefer the chosen to the rejected answer of each prompt (DPO, Rafailov et al. 2023, and its relatives).

    dpo and ipo compare with the reference, the model that the run starts from; orpo and simpo have no reference.
    """

    has_label_head: ClassVar[bool] = False
    used: ClassVar[tuple[Used, ...]] = (
        ("label_smoothing", "objective", ("dpo", "simpo")),
        ("margin", "objective", ("simpo",)),
    )

    objective: Literal["dpo", "ipo", "orpo", "simpo"] = "dpo"  # the loss of a pair
    beta: AboveZero = 0.1  # factor of the rewards; for orpo, of the odds ratio
    margin: NotNegative = 0.5  # how much larger the reward of the chosen answer should be, for objective=simpo
    label_smoothing: Annotated[float, Range(0, 0.5, below=True)] = 0.0  # fraction of the pairs with a wrong order

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with the model that the run starts from."""
        return self.objective in ("dpo", "ipo")

    def check_model_structure(self, model: ModelConfig) -> None:
        """Raises UserError if the model is not a decoder."""
        if model.structure != "decoder":
            raise UserError(f"Preference needs a decoder, but the model is a(n) {model.structure}; use another model")

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Raises UserError if the model is not a decoder, or if its reference would change."""
        self.check_model_structure(model)
        if self.has_reference and run.adapter.rank and run.adapter.biases != "none":
            raise UserError(
                f"adapter.biases is {run.adapter.biases!r}, so that the model without its adapter is not the one that "
                f"the run starts from, which {self.objective} needs; set it to none, or use orpo or simpo"
            )


@dataclass(frozen=True)
class Reward(AnswerPairs):
    """Give each answer a number that is larger for the chosen answers (Ouyang et al. 2022): a reward model."""

    margin: NotNegative = 0.0  # how much larger the reward of the chosen answer should be
    center: NotNegative = 0.0  # weight of the squared sum of the rewards of a pair, which centres them at 0


@dataclass(frozen=True)
class Part(Config):
    """One of several tasks, with its own data."""

    task: Any  # Classification, Tagging, QuestionAnswering, Similarity or MultipleChoice
    data: DataConfig  # `length` is ignored: that of the run applies
    weight: NotNegative = 0.0  # relative share of the rows; 0 for every part: in proportion to the sizes

    def check(self, name: str) -> None:
        """Raises UserError if the name or the task is not valid for a part, or data.path is empty."""
        if (
            not re.fullmatch(r"[a-z][a-z0-9_]*", name)
            or isinstance(self.task, MultiTask)
            or not getattr(self.task, "has_label_head", True)
        ):
            raise UserError(
                f"task.parts has {name!r}, a {type(self.task).__name__}; names consist of lower-case letters, "
                f"digits and underscores, and parts are tasks with labels such as Classification"
            )
        if not self.data.path:
            raise UserError(f"the data.path of the part {name!r} is empty; give a file, a folder, a glob or tfds:NAME")
        check_task(self.task)


@dataclass(frozen=True)
class MultiTask(TaskConfig):
    """Several tasks with a shared body and one head per task (Liu et al. 2019)."""

    parts: dict[str, Part]  # tasks by name; scores and exports use the names

    def check(self) -> None:
        """Raises UserError if a part is invalid, or only some of the parts have a weight."""
        super().check()
        for name, part in self.parts.items():
            part.check(name)
        if not self.parts or len({part.weight > 0 for part in self.parts.values()}) > 1:
            raise UserError("task.parts is empty, or only some parts have a weight; give every part a weight, or none")


def _check_decoding(decoding: Decoding) -> None:
    decoding.check("task.decoding.")
    if decoding.n_best > 1:
        raise UserError(f"task.decoding.n_best is {decoding.n_best}; a task generates one text per example: set 1")

"""The config of distillation: a model learns from the outputs of a larger one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any

from jaxlm.config.ranges import AboveZero, Config, Count, NotNegative, Positive
from jaxlm.errors import UserError


@dataclass(frozen=True)
class LayerNumbers:
    """Numbers of layers separated by commas, or an empty string."""

    names: tuple[str, ...] = ()  # words that stand for a choice of layers

    def allows(self, value: Any) -> bool:
        """Returns whether a string contains such numbers."""
        return not value or value in self.names or bool(re.fullmatch(r"\d{1,5}(,\d{1,5})*", value))

    def __str__(self) -> str:
        return " or ".join(['numbers separated by commas, such as "0,2,4"', *map(repr, self.names)])


Layers = Annotated[str, LayerNumbers(("even",))]
TeacherLayers = Annotated[str, LayerNumbers()]


@dataclass(frozen=True)
class DistillConfig(Config):
    """Distillation: the model of the run, the student, learns to predict as a larger model, its teacher, does.

    The run minimises the sum of the losses below, each times its weight.
    """

    teacher: str = ""  # a run, a folder in Hugging Face format, or a hub name; empty: no distillation
    # "even" keeps layers 0, 2, 4 and so on, as DistilBERT does.
    layers: Layers = ""  # layers of the model of init that the student keeps, from 0
    decoder_layers: Layers = ""  # those of the decoder of an encoder-decoder
    labels: NotNegative = 1.0  # weight of the loss of the task
    logits: NotNegative = 1.0  # weight of the divergence of the predictions (Hinton et al. 2015)
    temperature: AboveZero = 2.0  # divisor of the logits of both models in that divergence
    hidden: NotNegative = 0.0  # weight of the squared error of hidden states (TinyBERT, Jiao et al. 2020)
    attention: NotNegative = 0.0  # weight of the squared error of attention weights (TinyBERT)
    # Empty: of N layers of the teacher, layer n of M of the student is compared with layer n N / M, rounded up.
    compared: TeacherLayers = ""  # teacher layer, from 1, for each student layer, for hidden and attention
    relations: NotNegative = 0.0  # weight of the divergence of relations of queries, keys and values (MiniLM v2)
    relation_layer: Count = 0  # teacher layer of these relations, from 1; 0: the last
    relation_heads: Count = 0  # number of heads of these relations; 0: the heads of the teacher
    # All epochs, and further runs with the same teacher, read them, so that the teacher is in no memory in training.
    cache: str = ""  # folder of the predictions of the teacher, which is filled before training; empty: none
    top: Positive = 64  # with a cache: number of most likely tokens to store for each prediction of a token

    def check(self) -> None:
        """Raises UserError if options contradict each other, without reading the teacher."""
        changed = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        if not self.teacher:
            if changed:
                raise UserError(
                    f"distill.{changed[0]} is {getattr(self, changed[0])!r}, but there is no teacher; give one with "
                    f"--distill.teacher RUN_FOLDER_OR_HUB_NAME"
                )
            return
        if not (self.logits or self.hidden or self.attention or self.relations):
            raise UserError(
                "distill.logits, hidden, attention and relations are all 0, so that the teacher has no effect; set "
                "one of them above 0, or leave out --distill.teacher"
            )
        self._check_cache(changed)
        for name, losses in _USED_BY.items():
            if name in changed and not any(getattr(self, loss) for loss in losses):
                raise UserError(
                    f"distill.{name} is {getattr(self, name)!r}, which has no effect if distill."
                    f"{' and distill.'.join(losses)} are 0; leave it out, or set --distill.{losses[0]}"
                )

    def _check_cache(self, changed: Collection[str]) -> None:
        """Raises UserError for losses that a cache cannot serve."""
        if not self.cache:
            if "top" in changed:
                raise UserError(
                    f"distill.top is {self.top}, which has no effect without a cache; leave it out, or set "
                    f"--distill.cache FOLDER"
                )
            return
        for name in ("hidden", "attention", "relations"):
            if getattr(self, name):
                raise UserError(
                    f"distill.{name} is {getattr(self, name)}, which needs the layers of the teacher in each step, but "
                    f"distill.cache stores only its predictions; set --distill.{name} 0, or leave out --distill.cache"
                )

    def kept_layers(self, layers: int, decoder_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the layers that the student keeps of both stacks of a model; () if it keeps all.

        Args:
          layers: number of layers of the model; of an encoder-decoder, of its encoder.
          decoder_layers: number of layers of the decoder of an encoder-decoder.
        """
        every_other = lambda text, count: tuple(range(0, count, 2)) if text == "even" else _numbers(text)
        return every_other(self.layers, layers), every_other(self.decoder_layers, decoder_layers)

    def compared_layers(self, layers: int, teacher_layers: int) -> tuple[int, ...]:
        """Returns the layer of the teacher that each layer of the student is compared with; all count from 1.

        Args:
          layers: number of layers of the student.
          teacher_layers: number of layers of the teacher.

        Raises:
          UserError: where `compared` does not name one layer of the teacher for each layer of the student.
        """
        compared = _numbers(self.compared) or tuple(-(-n * teacher_layers // layers) for n in range(1, layers + 1))
        if len(compared) != layers or not all(1 <= layer <= teacher_layers for layer in compared):
            raise UserError(
                f"distill.compared is {self.compared!r}; the student has {layers} layers and the teacher "
                f"{teacher_layers}: give {layers} numbers from 1 to {teacher_layers}"
            )
        return compared


# The losses that read an option.
_USED_BY = {
    "temperature": ("logits",),
    "compared": ("hidden", "attention"),
    "relation_layer": ("relations",),
    "relation_heads": ("relations",),
}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()

"""Distillation: a task whose model, the student, also learns to compute what a larger model, its teacher, computes.

The parameters of the teacher are those of a run below `teacher/`; they are frozen. The losses are divided by the same
weights as the losses of the task, so that micro-batches and devices add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import DistillConfig, ModelConfig
from jaxlm.data.batches import Batch
from jaxlm.errors import UserError
from jaxlm.hub.pooling import Pooling
from jaxlm.nn import parameters
from jaxlm.nn.losses import (
    Losses,
    Sum,
    attention_error,
    binary_divergence,
    divergence,
    squared_error,
    state_error,
)
from jaxlm.nn.transformer import Transformer, init
from jaxlm.tasks.states import HeadLogits, VocabularyStates, run_stacks, vocabulary_divergence
from jaxlm.tasks.task import Task

Stacks = Mapping[str, Any]  # collections that the stacks of a model store, such as "states"


def with_teacher(
    task: Task, distill: DistillConfig, student: ModelConfig, teacher: ModelConfig, pooling: Pooling | None = None
) -> Task:
    """Returns a task that trains its model to compute what a teacher computes; evaluation does not change.

    Args:
      task: the task, bound to the student.
      distill: the losses and their weights.
      student: the model of the run.
      teacher: the model of the teacher, with the head of the task.
      pooling: how the teacher computes vectors, if it declares that.

    Raises:
      UserError: for a task without logits, and for models whose layers or heads cannot be compared.
    """
    kind = type(task)
    if kind.predicted is Task.predicted:
        raise UserError(
            f"distill.teacher is given, but {kind.__name__} defines no logits to compare; define `predicted` of the "
            f"task, or leave out --distill.teacher"
        )
    layers = {stack: _compared(distill, student, teacher, stack) for stack in stacks_of(student)}
    if distill.attention:
        for stack in layers:
            _check_heads(*(_stack_config(model, stack).heads for model in (student, teacher)))
    of_teacher = task if pooling is None else task.replace_fields(pooling=pooling)

    distilled: Any = object.__new__(type(kind.__name__, (_Distilled, kind), {}))
    distilled.__dict__.update(task.__dict__)
    distilled.__dict__.update(distill=distill, teacher=teacher, task_of_teacher=of_teacher, layers=layers)
    return distilled


def stacks_of(model: ModelConfig) -> tuple[str, ...]:
    """Returns the names of the stacks of a model."""
    return ("encoder", "decoder") if model.structure == "encoder_decoder" else (model.structure,)


def _stack_config(model: ModelConfig, stack: str) -> ModelConfig:
    return model.decoder_config if stack == "decoder" else model


def count_layers(model: ModelConfig, stack: str) -> int:
    """Returns the number of layers of a stack of a model."""
    second = model.structure == "encoder_decoder" and stack == "decoder"
    return (second and model.decoder_layers) or model.layers


def _compared(distill: DistillConfig, student: ModelConfig, teacher: ModelConfig, stack: str) -> np.ndarray:
    """Returns the layer of the teacher for each layer of a stack; 0 are the embeddings, which are compared too."""
    counts = (count_layers(model, stack) for model in (student, teacher))
    return np.array([0, *distill.compared_layers(*counts)])


def _check_heads(heads: int, teacher_heads: int) -> None:
    if heads != teacher_heads:
        raise UserError(
            f"distill.attention compares attention weights by head, but the student has {heads} heads and the teacher "
            f"{teacher_heads}; set --distill.attention 0, and for example --distill.hidden 1"
        )


if TYPE_CHECKING:
    _Base = Task
else:
    _Base = object


class _Distilled(_Base):
    """The part of a task with a teacher that differs from the task itself.

    Attributes:
      distill: the losses and their weights.
      teacher: the model of the teacher.
      task_of_teacher: the task that computes the logits of the teacher.
      layers: for each stack, the states of the teacher that the states of the student are compared with.
    """

    distill: DistillConfig
    teacher: ModelConfig
    task_of_teacher: Task
    layers: dict[str, np.ndarray]

    def teacher_module(self, module: Transformer) -> Transformer:
        """Returns the module of the teacher, with the mesh, the dtype and the kernels of the student."""
        how = {name: getattr(module, name) for name in ("constrain", "dtype", "unroll", "kernel", "precision")}
        return Transformer(self.teacher, **how)

    def more_params(self, module: Transformer, key: jax.Array) -> dict[str, Any]:
        params: dict[str, Any] = {parameters.TEACHER: init(self.teacher_module(module), key)}
        widths = module.config.width, self.teacher.width
        if self.distill.hidden and widths[0] != widths[1]:
            keys = jax.random.split(jax.random.fold_in(key, 1), len(self.layers))
            draw = lambda key: jax.random.normal(key, widths, jnp.float32) * widths[0] ** -0.5
            params[parameters.DISTILLATION] = {stack: draw(key) for stack, key in zip(self.layers, keys)}
        return params

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        of_task = super().weights(batch)
        tokens: Any = sum(tokens_BT.sum() for tokens_BT in self._tokens(batch).values())
        return {
            **{
                _name(part, name): of_task[name] for part in ("labels", "logits") if self._has(part) for name in of_task
            },
            **{_name(part): tokens for part in ("hidden", "attention") if self._has(part)},
        }

    def _has(self, part: str) -> bool:
        return getattr(self.distill, part) > 0

    def _tokens(self, batch: Batch) -> dict[str, jax.Array]:
        """Returns for each stack whether each position holds a token."""
        fields = dict.fromkeys(self.layers, "segments_BT")
        fields |= {"encoder": "source_segments_BS"} if len(fields) > 1 else {}
        return {stack: batch[field] > 0 for stack, field in fields.items()}

    def losses(self, module: Transformer, params: Any, batch: Batch, key: jax.Array | None) -> Losses:
        """Returns the losses of the task in evaluation; in training all losses, each times its weight."""
        own = parameters.of_model(params)
        if key is None:
            return super().losses(module, own, batch, None)
        how = self.one_example, ("states",) * self._has("hidden") + ("weights",) * self._has("attention")
        x_BTD, auxiliary, stacks = run_stacks(module, own, batch, key, *how)
        teacher, of_teacher = self.teacher_module(module), jax.lax.stop_gradient(params[parameters.TEACHER])
        teacher_x_BTD, _, teacher_stacks = run_stacks(teacher, of_teacher, batch, None, *how)
        losses: dict[str, Sum] = {}
        if self._has("labels"):
            of_task, _ = self.losses_from_states(module, own, x_BTD, batch, key)
            losses |= {_name("labels", name): of_task[name] for name in super().weights(batch)}
        if self._has("logits"):
            ours = self.predicted(module, own, x_BTD, batch, key)
            theirs = self.task_of_teacher.predicted(teacher, of_teacher, teacher_x_BTD, batch, None)
            for name in ours:
                heads = (module, own, ours[name]), (teacher, of_teacher, theirs[name])
                losses[_name("logits", name)] = _compare(*heads, self.distill.temperature)
        losses |= self._state_losses(stacks, teacher_stacks, params.get(parameters.DISTILLATION, {}), batch)
        weighted = {name: (total * self._weight(name), weight) for name, (total, weight) in losses.items()}
        return weighted | auxiliary, {}

    def _weight(self, name: str) -> float:
        weight: float = getattr(self.distill, name.split("/")[1])
        return weight

    def _state_losses(self, ours: Stacks, theirs: Stacks, projections: Any, batch: Batch) -> dict[str, Sum]:
        """Returns the losses that compare the layers of the stacks.

        Args:
          ours: the hidden states and attention weights of the student.
          theirs: those of the teacher.
          projections: the kernel [D, width of the teacher] for each stack, if the widths differ.
          batch: the batch.
        """
        losses: dict[str, list[Sum]] = {"hidden": [], "attention": []}
        for stack, tokens_BT in self._tokens(batch).items():
            layers = self.layers[stack]
            if self._has("hidden"):
                x_LBTD, y_LBTD = (stacks["states"][stack]["states"][0] for stacks in (ours, theirs))
                if stack in projections:
                    x_LBTD = jnp.einsum("LBTD,DW->LBTW", x_LBTD, projections[stack].astype(x_LBTD.dtype))
                losses["hidden"].append(state_error(x_LBTD, y_LBTD[layers], tokens_BT))
            if self._has("attention"):
                x_LBHTS, y_LBHTS = (stacks["weights"][stack]["weights"][0].attention_BHTS for stacks in (ours, theirs))
                losses["attention"].append(attention_error(x_LBHTS, y_LBHTS[layers[1:] - 1], tokens_BT))
        add = lambda sums: tuple(sum(part) for part in zip(*sums))
        return {_name(part): add(sums) for part, sums in losses.items() if sums}


def _name(part: str, loss: str = "loss") -> str:
    """Returns the name of a part of the distillation, for one of several losses of the task."""
    return f"distillation/{part}" + (f"/{loss}" if loss != "loss" else "")


Head = tuple[Transformer, Any, HeadLogits | VocabularyStates]  # a model, its parameters and what its head predicts


def _compare(student: Head, teacher: Head, temperature: float) -> Sum:
    """Returns the divergence of the predictions of a student from those of its teacher."""
    ours, theirs = student[2], teacher[2]
    if isinstance(ours, VocabularyStates) and isinstance(theirs, VocabularyStates):
        return vocabulary_divergence(*student[:2], ours, *teacher[:2], theirs, temperature)
    assert isinstance(ours, HeadLogits) and isinstance(theirs, HeadLogits)
    if ours.kind == "numbers":
        return squared_error(ours.logits[..., 0], theirs.logits[..., 0], ours.weights)
    kind = {"one": divergence, "any": binary_divergence}[ours.kind]
    return kind(ours.logits, theirs.logits, ours.weights, temperature)

"""Distillation: a task whose model, the student, also learns to compute what a larger model, its teacher, computes.

The parameters of the teacher are those of a run below `teacher/`; they are frozen. With a cache, there are none, and
batches contain the predictions of the teacher. The losses are divided by the same weights as the losses of the task, so
that micro-batches and devices add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import DistillConfig, ModelConfig
from jaxlm.data.batches import Batch, Batches
from jaxlm.data.example_cache import FIELD, ExampleArray, ExampleCache, ExtendedExamples
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
from jaxlm.nn.relations import query_key_value, relation_divergence
from jaxlm.nn.transformer import Transformer, init
from jaxlm.tasks.states import (
    HeadLogits,
    TopTokens,
    VocabularyStates,
    run_stacks,
    top_vocabulary_divergence,
    vocabulary_divergence,
    vocabulary_top,
)
from jaxlm.tasks.task import Task


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
    if kind.predicted is Task.predicted or kind.losses_from_states is Task.losses_from_states:
        raise UserError(
            f"distill.teacher is given, but {kind.__name__} defines no logits to compare; define `predicted` and "
            f"`losses_from_states` of the task, or leave out --distill.teacher"
        )
    layers = {stack: _compared(distill, student, teacher, stack) for stack in stacks_of(student)}
    for stack in layers:
        _check_stack(distill, *(_stack_config(model, stack) for model in (student, teacher)))
    of_teacher = task if pooling is None else task.replace_fields(pooling=pooling)

    cache = ExampleCache(distill.cache) if distill.cache else None
    distilled: Any = object.__new__(type(kind.__name__, (_Distilled, kind), {}))
    distilled.__dict__.update(task.__dict__)
    distilled.__dict__.update(distill=distill, teacher_model=teacher, task_of_teacher=of_teacher, layers=layers)
    distilled.__dict__.update(cache=cache, teacher=teacher if cache is None else None)
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
    counts = [count_layers(model, stack) for model in (student, teacher)]
    if distill.relation_layer > counts[1]:
        raise UserError(
            f"distill.relation_layer is {distill.relation_layer}; the teacher has {counts[1]} layers: give one "
            f"of them, or 0 for the last"
        )
    return np.array([0, *distill.compared_layers(*counts)])


def _check_stack(distill: DistillConfig, student: ModelConfig, teacher: ModelConfig) -> None:
    """Raises UserError for stacks whose attention weights or relations cannot be compared."""
    if distill.attention and student.heads != teacher.heads:
        raise UserError(
            f"distill.attention compares attention weights by head, but the student has {student.heads} heads and the "
            f"teacher {teacher.heads}; set --distill.attention 0, and for example --distill.relations 1"
        )
    mixers = [", ".join(sorted(set(model.mixer_pattern))) for model in (student, teacher)]
    if (distill.attention or distill.relations) and mixers != ["attention"] * 2:
        raise UserError(
            f"distill.attention and distill.relations compare layers of attention, but the student has layers of "
            f"{mixers[0]} and the teacher of {mixers[1]}; set both to 0"
        )
    heads = distill.relation_heads or teacher.heads
    widths = [n * model.C for model in (student, teacher) for n in (model.heads, model.K)]
    if distill.relations and any(width % heads for width in widths):
        raise UserError(
            f"distill.relation_heads is {heads}; it must divide the widths of the queries and of the keys of student "
            f"and teacher, {', '.join(map(str, widths))}"
        )


if TYPE_CHECKING:
    _Base = Task
else:
    _Base = object


class _Distilled(_Base):
    """The part of a task with a teacher that differs from the task itself.

    Attributes:
      distill: the losses and their weights.
      teacher_model: the model of the teacher.
      teacher: the same, if the losses run it; None with a cache.
      task_of_teacher: the task that computes the logits of the teacher.
      layers: for each stack, the states of the teacher that the states of the student are compared with.
      cache: the predictions of the teacher, if the losses read them.
    """

    distill: DistillConfig
    teacher_model: ModelConfig
    teacher: ModelConfig | None
    task_of_teacher: Task
    layers: dict[str, np.ndarray]
    cache: ExampleCache | None

    def teacher_module(self, module: Transformer) -> Transformer:
        """Returns the module of the teacher, with the mesh, the dtype and the kernels of the student."""
        how = {name: getattr(module, name) for name in ("constrain", "dtype", "unroll", "kernel", "precision")}
        return Transformer(self.teacher_model, **how)

    def batches(self, part: Any, rows: int, length: int, seed: int | None) -> Any:
        """Returns the batches of the task, for training with the predictions that a cache contains."""
        batches = super().batches(part, rows, length, seed)
        if self.cache is None or seed is None:
            return batches
        if not isinstance(batches, Batches):
            raise UserError(
                f"distill.cache is given, but the batches of {type(self).__name__} do not consist of examples in a "
                f"fixed order; leave out --distill.cache"
            )
        arrays = {f"{FIELD}{name}": array for name, array in self.cached_arrays(batches.empty_batch()).items()}
        batches.examples = ExtendedExamples(batches.examples, arrays, self.cache.features)
        return batches

    def cached_arrays(self, batch: Batch) -> dict[str, ExampleArray]:
        """Returns the arrays that a cache stores, by name, for batches like this one.

        Raises:
          UserError: for a task with predictions that cannot be stored by example.
        """
        module = Transformer(self.teacher_model)
        params = jax.eval_shape(lambda: init(module, jax.random.key(0)))
        names: set[str] = set()

        def run(params: Any, batch: Batch) -> dict[str, jax.Array]:
            x_BTD, _, _ = run_stacks(module, params, batch, None, self.one_example, more=self.more_inputs(batch))
            predicted = self.task_of_teacher.predicted(module, params, x_BTD, batch, None)
            logits = self.task_of_teacher.example_logits(module, params, x_BTD, batch)
            stored = self.task_of_teacher.predicted_from(logits, batch).keys()
            names.update(name for name, x in predicted.items() if isinstance(x, HeadLogits) and name not in stored)
            return self.teacher_predictions(module, params, batch)

        found = jax.eval_shape(run, params, batch)
        if names:
            raise UserError(
                f"distill.cache is given, but {type(self).__name__} does not define `example_logits` and "
                f"`predicted_from` for {', '.join(sorted(names))}; define them, or leave out --distill.cache"
            )
        return {name: ExampleArray(array.shape[2:], np.dtype(array.dtype)) for name, array in found.items()}

    def teacher_predictions(self, module: Transformer, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns the predictions of the teacher for a micro-batch, under names that end in their axes.

        Args:
          module: the teacher.
          params: its parameters.
          batch: the micro-batch.
        """
        x_BTD, _, _ = run_stacks(module, params, batch, None, self.one_example, more=self.more_inputs(batch))
        logits = self.task_of_teacher.example_logits(module, params, x_BTD, batch)
        arrays = {name: x.astype(jnp.float32) for name, x in logits.items()}
        for states in self.task_of_teacher.predicted(module, params, x_BTD, batch, None).values():
            if isinstance(states, VocabularyStates):
                length = batch["segments_BT"].shape[1]
                found = vocabulary_top(module, params, states, length, self.distill.top, self.distill.temperature)
                arrays |= found._asdict()
        return arrays

    def more_params(self, module: Transformer, key: jax.Array) -> dict[str, Any]:
        if self.cache is not None:
            return {}
        params: dict[str, Any] = {parameters.TEACHER: init(self.teacher_module(module), key)}
        widths = module.config.width, self.teacher_model.width
        if self.distill.hidden and widths[0] != widths[1]:
            keys = jax.random.split(jax.random.fold_in(key, 1), len(self.layers))
            draw = lambda key: jax.random.normal(key, widths, jnp.float32) * widths[0] ** -0.5
            params[parameters.DISTILLATION] = {stack: draw(key) for stack, key in zip(self.layers, keys)}
        return params

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        of_task = super().weights(batch)
        tokens: Any = sum((segments_BT > 0).sum() for segments_BT in self._segments(batch).values())
        of_logits = filter(self._has, ("labels", "logits"))
        of_states = filter(self._has, ("hidden", "attention", "relations"))
        weights = {_name(part, name): total for part in of_logits for name, total in of_task.items()}
        return weights | {_name(part): tokens for part in of_states}

    def _has(self, part: str) -> bool:
        return getattr(self.distill, part) > 0

    def _segments(self, batch: Batch) -> dict[str, jax.Array]:
        """Returns the segments of each stack."""
        fields = dict.fromkeys(self.layers, "segments_BT")
        fields |= {"encoder": "source_segments_BS"} if len(fields) > 1 else {}
        return {stack: batch[field] for stack, field in fields.items()}

    def losses(self, module: Transformer, params: Any, batch: Batch, key: jax.Array | None) -> Losses:
        """Returns the losses of the task in evaluation; in training all losses, each times its weight."""
        own = parameters.of_model(params)
        if key is None:
            return super().losses(module, own, batch, None)
        student, auxiliary = self._run(module, own, batch, key)
        teacher = None
        if self.cache is None:
            of_teacher = jax.lax.stop_gradient(params[parameters.TEACHER])
            teacher, _ = self._run(self.teacher_module(module), of_teacher, batch, None)
        losses = self._logit_losses(student, teacher, batch, key)
        if self._has("labels"):
            of_task, _ = self.losses_from_states(module, own, student.x_BTD, batch, key)
            losses |= {_name("labels", name): of_task[name] for name in super().weights(batch)}
        projections = params.get(parameters.DISTILLATION, {})
        for stack, segments_BT in self._segments(batch).items():
            if teacher is not None:
                found = self._stack_losses(stack, student, teacher, projections.get(stack), segments_BT)
                losses |= {name: _add(losses[name], loss) if name in losses else loss for name, loss in found.items()}
        weight = lambda name: getattr(self.distill, name.split("/")[1])
        weighted = {name: (total * weight(name), divisor) for name, (total, divisor) in losses.items()}
        return weighted | auxiliary, {}

    def _run(
        self, module: Transformer, params: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[_Outputs, dict[str, Sum]]:
        """Returns the outputs of a model, and its auxiliary losses."""
        with_states = self._has("hidden") or self._has("relations")
        collections = ("states",) * with_states + ("weights",) * self._has("attention")
        inputs = module, params, batch, key, self.one_example, collections, self.more_inputs(batch)
        x_BTD, auxiliary, stacks = run_stacks(*inputs)
        return _Outputs(module, params, x_BTD, stacks), auxiliary

    def _logit_losses(
        self, student: _Outputs, teacher: _Outputs | None, batch: Batch, key: jax.Array
    ) -> dict[str, Sum]:
        """Returns the losses that compare what the heads predict; without a teacher, the batch has its predictions."""
        if not self._has("logits"):
            return {}
        ours = self.predicted(*student[:3], batch, key)
        theirs: Mapping[str, Any]
        if teacher is None:
            theirs = self._cached(ours, batch)
        else:
            theirs = self.task_of_teacher.predicted(*teacher[:3], batch, None)
        temperature = self.distill.temperature
        return {
            _name("logits", name): _compare((student, ours[name]), (teacher, theirs[name]), temperature)
            for name in ours
        }

    def _cached(self, ours: Mapping[str, Any], batch: Batch) -> dict[str, HeadLogits | TopTokens]:
        """Returns what the teacher predicts for a batch from a cache, for each of the predictions of the student."""
        stored = {name.removeprefix(FIELD): x for name, x in batch.items() if name.startswith(FIELD)}
        top = {name: stored.pop(name) for name in TopTokens._fields if name in stored}
        heads = self.task_of_teacher.predicted_from(stored, batch)
        return {name: heads[name] if name in heads else TopTokens(**top) for name in ours}

    def _stack_losses(
        self, stack: str, student: _Outputs, teacher: _Outputs, projection: jax.Array | None, segments_BT: jax.Array
    ) -> dict[str, Sum]:
        """Returns the losses that compare the layers of a stack.

        Args:
          stack: the name of the stack.
          student: the outputs of the student.
          teacher: those of the teacher.
          projection: a kernel from the width of the student to that of the teacher; None if they are equal.
          segments_BT: segments of the stack.
        """
        layers, losses, tokens_BT = self.layers[stack], {}, segments_BT > 0
        if self._has("hidden"):
            x_LBTD, y_LBTD = student.states(stack), teacher.states(stack)
            if projection is not None:
                x_LBTD = jnp.einsum("LBTD,DW->LBTW", x_LBTD, projection.astype(x_LBTD.dtype))
            losses[_name("hidden")] = state_error(x_LBTD, y_LBTD[layers], tokens_BT)
        if self._has("attention"):
            weights = student.attention(stack), teacher.attention(stack)[layers[1:] - 1]
            losses[_name("attention")] = attention_error(*weights, tokens_BT)
        if self._has("relations"):
            heads = self.distill.relation_heads or _stack_config(self.teacher_model, stack).heads
            vectors = student.vectors(stack, 0), teacher.vectors(stack, self.distill.relation_layer)
            losses[_name("relations")] = relation_divergence(*vectors, segments_BT, heads)
        return losses


class _Outputs(NamedTuple):
    """The outputs of a model for a batch.

    stacks: the collections that `run_stacks` returns.
    """

    module: Transformer
    params: Any
    x_BTD: jax.Array
    stacks: dict[str, Any]

    def states(self, stack: str) -> jax.Array:
        """Returns the embeddings and the hidden states of each layer, [L + 1, B, T, D]."""
        states_LBTD: jax.Array = self.stacks["states"][stack]["states"][0]
        return states_LBTD

    def attention(self, stack: str) -> jax.Array:
        """Returns the attention weights of each layer, [L, B, H, T, S]."""
        weights_LBHTS: jax.Array = self.stacks["weights"][stack]["weights"][0].attention_BHTS
        return weights_LBHTS

    def vectors(self, stack: str, layer: int) -> tuple[jax.Array, ...]:
        """Returns the queries, keys and values of a layer, which counts from 1; 0 is the last."""
        config, count = self.module.config, count_layers(self.module.config, stack)
        index = (layer or count) - 1
        how = self.params[stack], self.states(stack)[index], index, count, self.module.dtype
        return query_key_value(_stack_config(config, stack), *how)


def _add(a: Sum, b: Sum) -> Sum:
    return a[0] + b[0], a[1] + b[1]


def _name(part: str, loss: str = "loss") -> str:
    """Returns the name of a part of the distillation, for one of several losses of the task."""
    return f"distillation/{part}" + (f"/{loss}" if loss != "loss" else "")


# The outputs of a model, None with a cache, and what one of its heads predicts.
Head = tuple[_Outputs | None, HeadLogits | VocabularyStates | TopTokens]


def _compare(student: Head, teacher: Head, temperature: float) -> Sum:
    """Returns the divergence of the predictions of a student from those of its teacher."""
    (outputs, ours), (of_teacher, theirs) = student, teacher
    assert outputs is not None
    if isinstance(ours, VocabularyStates) and isinstance(theirs, TopTokens):
        return top_vocabulary_divergence(*outputs[:2], ours, theirs, temperature)
    if isinstance(ours, VocabularyStates) and isinstance(theirs, VocabularyStates) and of_teacher is not None:
        return vocabulary_divergence(*outputs[:2], ours, *of_teacher[:2], theirs, temperature)
    assert isinstance(ours, HeadLogits) and isinstance(theirs, HeadLogits)
    if ours.kind == "numbers":
        return squared_error(ours.logits[..., 0], theirs.logits[..., 0], ours.weights)
    kind = {"one": divergence, "any": binary_divergence}[ours.kind]
    return kind(ours.logits, theirs.logits, ours.weights, temperature)

"""Config of differentially private training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from jaxlm.config.ranges import Config, NotNegative, Range
from jaxlm.config.record_tasks import Classification, MultiTask, Similarity
from jaxlm.config.text_tasks import CausalLM, MaskedLM, PermutedLM
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.config.run import RunConfig

MAX_EPSILON = 100.0
Epsilon = Annotated[float, Range(0, MAX_EPSILON)]
Norm = Annotated[float, Range(0, 1e9, above=True)]
Probability = Annotated[float, Range(0, 1, below=True)]


@dataclass(frozen=True)
class PrivacyConfig(Config):
    """Differentially private training, DP-SGD (Abadi et al. 2016): clipped gradients of examples, and noise.

    The unit of privacy is one row of a table, or one span of a document that fits a row of a batch.
    """

    epsilon: Epsilon = 0.0  # privacy loss of the whole run, which decides the noise; 0: not private, or `noise` is set
    delta: Probability = 0.0  # probability of a larger privacy loss; 0: 1 / examples, rounded down to one digit
    clip: Norm = 1.0  # maximum norm of the gradient of an example
    noise: NotNegative = 0.0  # standard deviation of the noise as a multiple of `clip`; 0: computed from `epsilon`

    @property
    def is_on(self) -> bool:
        """Whether the run is private."""
        return self.epsilon > 0 or self.noise > 0

    def check(self, run: RunConfig) -> None:
        """Raises UserError if the fields contradict each other, or other fields of the run."""
        if self.epsilon and self.noise:
            raise UserError(
                f"privacy.epsilon is {self.epsilon:g} and privacy.noise {self.noise:g}; give one of them: each follows "
                f"from the other"
            )
        if not self.is_on:
            for name in ("delta", "clip"):
                if getattr(self, name) != getattr(PrivacyConfig, name):
                    raise UserError(
                        f"privacy.{name} is {getattr(self, name):g}, but the run is not private; set --privacy.epsilon "
                        f"or --privacy.noise too"
                    )
            return
        for applies, problem, remedy in _conflicts(run):
            if applies:
                raise UserError(f"{problem}, which a private run cannot have; {remedy}")


def _conflicts(run: RunConfig) -> list[tuple[Any, str, str]]:
    """Returns conditions that a private run must not meet, each with its reason and the remedy."""
    task, data, model = run.task, run.data, run.model
    is_split = not data.eval_path and not data.eval_split
    return [
        (
            isinstance(task, Similarity) and task.objective == "contrastive",
            "task.objective is 'contrastive', where the other pairs of a batch are part of the loss of each pair",
            "use --task.objective cosine",
        ),
        (
            isinstance(task, MultiTask),
            "the run has several tasks, whose examples are mixed by a fixed pattern instead of at random",
            "train one task",
        ),
        (
            isinstance(task, Classification) and task.class_weights != "none",
            "task.class_weights is 'balanced', weights that are computed from the labels of all examples",
            "use --task.class-weights none",
        ),
        (
            isinstance(task, CausalLM) and task.stream,
            "task.stream is True, where each epoch cuts all documents into other rows, so that a text is in many rows",
            "use --task.stream false, where each row is a fixed span of one document",
        ),
        (
            isinstance(task, MaskedLM) and task.next_sentence,
            "task.next_sentence is True, where an example contains sentences of two documents",
            "leave it out",
        ),
        (
            isinstance(task, MaskedLM) and task.full_sentences and not task.next_sentence,
            "task.full_sentences is True, where an example continues in the next document",
            "use --task.full-sentences false",
        ),
        (
            isinstance(task, PermutedLM) and task.memory,
            f"task.memory is {getattr(task, 'memory', 0)}, where an example also contains tokens of other examples",
            "use --task.memory 0",
        ),
        (
            model is not None and model.experts and model.balance_loss > 0,
            "model.balance_loss is above 0, a loss that depends on all tokens of a batch",
            "use --model.balance-loss 0",
        ),
        (
            run.patience and is_split,
            f"patience is {run.patience}, and the held-out rows that would end the run are a part of the private data",
            "use --patience 0, or give public held-out data with --data.eval-path",
        ),
        (
            run.distill.cache,
            "distill.cache is set, a file with the predictions for each private example",
            "leave it out",
        ),
        (
            run.attention not in ("auto", "xla"),
            f"attention is {run.attention!r}, whose kernel computes no gradients of single rows",
            "use --attention xla",
        ),
    ]

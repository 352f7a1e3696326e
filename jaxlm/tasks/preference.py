"""Preferences: the model learns to give the chosen answer to a prompt a higher probability than the rejected one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
from jaxlm.config import ModelConfig
from jaxlm.data.batches import Batch
from jaxlm.data.joined import Features
from jaxlm.hub.pooling import Pooling
from jaxlm.nn import parameters
from jaxlm.nn.losses import Losses, Sum
from jaxlm.nn.low_rank import without_updates
from jaxlm.nn.preferences import OBJECTIVES, PairLosses, Pairs
from jaxlm.nn.transformer import Transformer, init
from jaxlm.tasks.answer_pairs import AnswerPairTask, pairs_of
from jaxlm.tasks.states import hidden_states, token_scores
from jaxlm.tasks.task import register


class PreferenceTask(AnswerPairTask):
    """`config.Preference`, for a decoder."""

    head = "lm"
    fields: Mapping[str, type] = {"labels_BT": np.int32, "weights_BT": np.float32, "weights_BE": np.float32}
    task: config.Preference

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.has_reference = self.task.has_reference

    def bind(self, model: ModelConfig, pooling: Pooling | None = None, part: Any = None) -> Self:
        self.task.check_model_structure(model)
        return super().bind(model, pooling, part)

    def conversation(self, ids: Sequence[int], by_assistant: Sequence[bool]) -> Features:
        tokens, mask = (np.array(values[-(self.length // 2) - 1 :]) for values in (ids, by_assistant))
        return {
            "tokens_BT": tokens[:-1].astype(np.int32),
            "labels_BT": tokens[1:].astype(np.int32),
            "weights_BT": mask[1:].astype(np.float32),
            "cut": len(ids) - len(tokens),
        }

    def more_params(self, module: Transformer, key: jax.Array) -> dict[str, Any]:
        """Returns the reference, unless the model without its adapter is the reference."""
        return {parameters.TEACHER: init(module, key)} if self.teacher is not None else {}

    def losses(self, module: Transformer, params: Any, batch: Batch, key: jax.Array | None) -> Losses:
        """Returns the loss of the pairs, and in evaluation the rewards of the answers."""
        own = parameters.of_model(params)
        policy_BE, auxiliary = self._log_probs(module, own, batch, key)
        reference = self._reference(params) if self.has_reference else None
        reference_BE = None if reference is None else self._log_probs(module, reference, batch, None)[0]
        lengths_BE = _sum_by_example(jnp.ones_like(batch["weights_BT"]), batch)
        reference_BP2 = None if reference_BE is None else pairs_of(reference_BE)
        pairs = Pairs(pairs_of(policy_BE), reference_BP2, pairs_of(lengths_BE))
        smoothing = 0.0 if key is None else self.task.label_smoothing
        found: PairLosses = OBJECTIVES[self.task.objective](pairs, self.task.beta, self.task.margin, smoothing)
        weights_BP = pairs_of(batch["weights_BE"])[..., 0]
        losses = {"loss": (jnp.where(weights_BP > 0, found.loss_P, 0).sum(), weights_BP.sum())} | auxiliary
        if key is not None:
            return losses, {}
        rewards_BE = found.rewards_P2.reshape(len(policy_BE), -1)
        odd = policy_BE.shape[1] - rewards_BE.shape[1]
        return losses, {"reward_BE": jnp.pad(rewards_BE, ((0, 0), (0, odd))), "log_prob_BE": policy_BE}

    @staticmethod
    def _log_probs(
        module: Transformer, params: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Sum]]:
        """Returns the log-probabilities of the answers, [B, E], and the auxiliary losses."""
        x_BTD, auxiliary = hidden_states(module, params, batch, key)
        log_probs_BT, _ = token_scores(module, params, x_BTD, batch["labels_BT"])
        return _sum_by_example(log_probs_BT, batch), auxiliary

    @staticmethod
    def _reference(params: Any) -> Any:
        """Returns the parameters of the reference, without a gradient; None for a merged model, which has none."""
        reference = params.get(parameters.TEACHER)
        if reference is None:
            reference = without_updates(params)
            if len(jax.tree.leaves(reference)) == len(jax.tree.leaves(params)):
                return None
        return jax.lax.stop_gradient(reference)


def _sum_by_example(values_BT: jax.Array, batch: Batch) -> jax.Array:
    """Returns the sums of values over the tokens of the answer of each example, float32 [B, E]."""
    B, E = batch["weights_BE"].shape
    rows_B1 = jnp.arange(B)[:, None]
    sums = jnp.zeros((B, E + 1), jnp.float32).at[rows_B1, batch["segments_BT"]].add(values_BT * batch["weights_BT"])
    return sums[:, 1:]


register(config.Preference, PreferenceTask)

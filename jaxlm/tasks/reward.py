"""Reward models: a head gives each conversation a number, larger for the chosen answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
from jaxlm.data.batches import Batch
from jaxlm.nn.losses import Losses
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.tasks.answer_pairs import AnswerPairTask, pairs_of
from jaxlm.tasks.cells import Records
from jaxlm.tasks.states import example_states
from jaxlm.tasks.task import register


class RewardTask(AnswerPairTask):
    """`config.Reward`: the head "classes" with one output.

    The loss is the negative log-likelihood of the order of a pair by the model of Bradley and Terry (Ouyang et al.
    2022, equation 1).
    """

    head = "classes"
    fields: Mapping[str, type] = {"weights_BE": np.float32}
    task: config.Reward

    @classmethod
    def names(cls, task: Any, part: Records) -> tuple[str, ...]:
        return ("reward",)

    def losses_from_states(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> Losses:
        x_BED = example_states(x_BTD, batch, module.config.classes_from)
        logits_BE1 = apply(module, params, x_BED, method="classes", key=key)
        rewards_BE = logits_BE1[..., 0].astype(jnp.float32)
        rewards_BP2, weights_BP = pairs_of(rewards_BE), pairs_of(batch["weights_BE"])[..., 0]
        loss_BP = -jax.nn.log_sigmoid(rewards_BP2[..., 0] - rewards_BP2[..., 1] - self.task.margin)
        loss_BP += self.task.center * jnp.square(rewards_BP2.sum(-1))
        loss = jnp.where(weights_BP > 0, loss_BP, 0).sum(), weights_BP.sum()
        return {"loss": loss}, {} if key is not None else {"reward_BE": rewards_BE}


register(config.Reward, RewardTask)

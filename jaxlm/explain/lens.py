"""The logit lens: what the head of a model reads in the hidden states after each layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.config.arguments import check_model
from jaxlm.errors import UserError
from jaxlm.explain.examples import Example, head_of, read_example, readable_pieces, target_ids, with_target
from jaxlm.explain.outputs import Rows
from jaxlm.explain.patching import rows_of, run_stacks
from jaxlm.lm import LM
from jaxlm.nn.layers import Linear, Norm
from jaxlm.nn.sites import stacks_of
from jaxlm.nn.transformer import Transformer

LENS_HEADS = ("lm", "masked_lm")


class LogitLens(NamedTuple):
    """What the head reads after each layer; the first of L + 1 rows belongs to the embeddings, the last to the output.

    Attributes:
      pieces: the T tokens that the model reads.
      tokens_LT: the most likely token.
      words_LT: its text.
      probability_LT: its probability.
      kl_LT: the Kullback-Leibler divergence of the distribution from that of the last row, in nats.
      rank_LT: the rank of the token that the model predicts, from 1.
    """

    pieces: tuple[str, ...]
    tokens_LT: np.ndarray
    words_LT: list[tuple[str, ...]]
    probability_LT: np.ndarray
    kl_LT: np.ndarray
    rank_LT: np.ndarray


def logit_lens(lm: LM, text: Any, target: str | None = None) -> LogitLens:
    """Returns what the head of the model reads in the hidden states of a text after each layer.

    The final norm of the stack, where it has one, is applied to every hidden state. A masked language model reads the
    states through the transform of its head. The lens is an approximation: earlier layers may write in another basis.

    Args:
      lm: a model with the head lm or masked_lm; of an encoder-decoder, the decoder is read.
      text: the text.
      target: for the head lm, a text after the prompt, whose tokens are read too; an encoder-decoder writes it.

    Raises:
      UserError: for a model without such a head, and as `read_example` does.

    Source: nostalgebraist 2020, interpreting GPT: the logit lens.
    """
    check_model("lm", lm)
    example = _lens_example(lm, text, target)
    program = lm.programs.get(_lens, lm.config, lm.module)
    count = lm.vocabulary
    tokens_LT, probability_LT, kl_LT, rank_LT = map(np.asarray, program(lm.params, rows_of(example), np.int32(count)))
    assert lm.tokenizer is not None
    words = [readable_pieces(lm.tokenizer.target, tokens_T) for tokens_T in tokens_LT]
    return LogitLens(example.pieces[example.source or 0 :], tokens_LT, words, probability_LT, kl_LT, rank_LT)


def check_lens_head(lm: LM) -> None:
    """Raises UserError for a model without a head over the vocabulary."""
    head = head_of(lm)
    if head not in LENS_HEADS:
        raise UserError(
            f"the model has the head {head or 'none'}; the logit lens requires a head over the vocabulary, lm or "
            f"masked_lm"
        )


def _lens_example(lm: LM, text: Any, target: str | None) -> Example:
    check_lens_head(lm)
    head = head_of(lm)
    example = read_example(lm, text)
    if head != "lm":
        if target is not None:
            raise UserError(f"target is {target!r}, but the model has the head {head}; leave it out")
        return example
    ids = [0] if target is None else [*target_ids(lm, example, text, target), 0]
    return with_target(lm, example, ids)[0]


def _lens(config: ModelConfig, module: Transformer) -> Any:
    """Returns the compiled program: rows of one row -> tokens, probabilities, divergences and ranks [L + 1, T]."""
    lm, stack = LM(config, module, None), stacks_of(config)[-1]

    @jax.jit
    def read(params: Any, rows: Rows, count: jax.Array) -> Any:
        x_BTD, sown = run_stacks(module, params, rows, ["states", "activations"])
        first_1BTD = sown["states"][stack]["states"][0][:1]
        after_LBTD = sown["activations"][stack]["activations"][0]["residual"][:-1]
        states_LTD = jnp.concatenate([first_1BTD, after_LBTD])[:, 0]

        def log_probabilities(x_1TD: jax.Array) -> jax.Array:
            logits_1TV = lm.head_logits(params, x_1TD, None)
            assert logits_1TV is not None
            logits_TV = logits_1TV[0].astype(jnp.float32)
            known_V = jnp.arange(logits_TV.shape[-1]) < count
            return jax.nn.log_softmax(jnp.where(known_V, logits_TV, -1e30))

        final_TV = log_probabilities(x_BTD)
        predicted_T = final_TV.argmax(-1)

        def compare(own_TV: jax.Array) -> Any:
            kl_T = (jnp.exp(final_TV) * (final_TV - own_TV)).sum(-1)
            of_predicted_T1 = jnp.take_along_axis(own_TV, predicted_T[:, None], 1)
            rank_T = (own_TV > of_predicted_T1).sum(-1) + 1
            return own_TV.argmax(-1), jnp.exp(own_TV.max(-1)), kl_T, rank_T

        def read_layer(x_TD: jax.Array) -> Any:
            return compare(log_probabilities(finish(module, params[stack], stack, x_TD[None])))

        earlier, last = jax.lax.map(read_layer, states_LTD), compare(final_TV)
        return jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), earlier, last)

    return read


def finish(module: Transformer, params: Any, stack: str, x_BTD: jax.Array) -> jax.Array:
    """Returns hidden states after the final norm and projection of a stack, as far as it has them.

    Args:
      module: the model.
      params: the parameters of the stack.
      stack: "encoder" or "decoder".
      x_BTD: hidden states after a layer.
    """
    config = module.config.decoder_config if stack == "decoder" else module.config
    if config.norm_place not in ("post", "none"):
        x_BTD = Norm(config, module.dtype).apply({"params": params["norm"]}, x_BTD)  # type: ignore[assignment]
    if config.project_tokens:
        project = Linear((config.W,), config.matrix_std, False, dtype=module.dtype)
        x_BTD = project.apply({"params": params["project"]}, x_BTD)  # type: ignore[assignment]
    return x_BTD

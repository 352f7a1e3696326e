"""Memorisation of training texts: the exposure of canaries, and verbatim continuations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxlm.config.ranges import Name, Positive, Seed, check_argument
from jaxlm.errors import UserError
from jaxlm.inference.likelihood import Likelihood, log_likelihoods

if TYPE_CHECKING:
    from jaxlm.lm import LM


class Exposure(NamedTuple):
    """The exposure of canaries in bits; for a canary that the model has not memorised, the mean is about 1.44.

    canaries: the secrets, one per row.
    by_rank: [N], from the rank among the candidates; at most log2(candidates + 1).
    extrapolated: [N], from a skew normal distribution of the log-probabilities of the candidates.
    log_probabilities: [N], of the secrets.
    candidates: number of random secrets that they are compared with.
    """

    canaries: tuple[str, ...]
    by_rank: np.ndarray
    extrapolated: np.ndarray
    log_probabilities: np.ndarray
    candidates: int


def random_canaries(count: int, digits: int = 8, seed: int = 0) -> list[str]:
    """Returns different strings of random digits, to be inserted into training texts after a fixed prefix.

    Args:
      count: number of strings.
      digits: length of a string.
      seed: seed of the choice.

    Raises:
      UserError: if there are not enough strings of this length.
    """
    check_argument("count", count, Positive)
    check_argument("digits", digits, Positive)
    if count > 10**digits:
        raise UserError(f"count is {count:,}, and there are {10**digits:,} strings of {digits} digits; raise digits")
    random = np.random.default_rng(check_argument("seed", seed, Seed))
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(map(str, random.integers(0, 10, digits)))] = None
    return list(found)


def exposure(lm: LM, prefix: str, canaries: Sequence[str], candidates: int = 1000, seed: int = 0) -> Exposure:
    """Returns the exposure of canaries of digits that were inserted into the training texts of a language model.

    Args:
      lm: a language model.
      prefix: the text before each canary.
      canaries: strings of digits with the same length.
      candidates: number of random strings with which each canary is compared.
      seed: seed of their choice.

    Raises:
      UserError: if a canary does not consist of digits, if lengths differ, or if the tokenizer does not represent them.

    Source: Carlini et al. 2019, "The Secret Sharer", sections 4.2 and 4.3.
    """
    check_argument("prefix", prefix, Name)
    check_argument("candidates", candidates, Positive)
    if not canaries or len({len(canary) for canary in canaries}) > 1 or not all(map(str.isdecimal, canaries)):
        raise UserError(f"canaries are {list(canaries)[:3]!r}; give strings of digits with the same length")
    for canary in canaries:
        check_representable(lm, prefix + canary)
    others = random_canaries(min(candidates, 10 ** len(canaries[0])), len(canaries[0]), seed)
    others = [other for other in others if other not in set(canaries)]
    if not others:
        raise UserError(f"candidates is {candidates}, and all of them are canaries; give longer canaries")
    found = log_likelihoods(lm, [(prefix, secret) for secret in (*canaries, *others)])
    scores = np.array([likelihood.log_probability for likelihood in found])
    own_N, other_M = scores[: len(canaries)], scores[len(canaries) :]
    return Exposure(tuple(canaries), *exposure_bits(own_N, other_M), own_N, len(others))


def exposure_bits(own_N: np.ndarray, other_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the exposure by rank and by extrapolation [N], in bits, from log-probabilities.

    Args:
      own_N: log-probabilities of the canaries.
      other_M: log-probabilities of the candidates.
    """
    from scipy.stats import skewnorm

    rank_N = 1 + (other_M > own_N[:, None]).sum(1)
    by_rank_N = math.log2(len(other_M) + 1) - np.log2(rank_N)
    fitted = skewnorm(*skewnorm.fit(other_M)) if np.ptp(other_M) > 0 else None
    extrapolated_N = by_rank_N if fitted is None else -fitted.logsf(own_N) / math.log(2)
    return by_rank_N, extrapolated_N


def check_representable(lm: LM, text: str) -> None:
    """Raises UserError if the tokenizer replaces a part of a text by its unknown token or changes it."""
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise UserError("the model has no tokenizer; load it from a folder with one")
    ids, unknown = tokenizer.encode(text), getattr(tokenizer, "unk", None)
    if unknown is not None and unknown in ids:
        raise UserError(
            f"the tokenizer has no tokens for a part of the canary {text!r}, which it encodes as unknown; use other "
            f"characters, or train the tokenizer on texts with them"
        )


def continuations(lm: LM, texts: Sequence[str], prompt: int = 32, tokens: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether greedy decoding reproduces the continuation of each training text, and which texts were used.

    Texts with fewer than `prompt` + `tokens` tokens are not used.

    Args:
      lm: a language model.
      texts: training texts.
      prompt: number of tokens of the prompt, the beginning of the text.
      tokens: number of tokens after it that are compared.

    Returns:
      Bools [K], and the indices of these texts [K].

    Raises:
      UserError: if no text is long enough.

    Source: Carlini et al. 2023, "Quantifying Memorization Across Neural Language Models", section 3.
    """
    check_argument("prompt", prompt, Positive)
    check_argument("tokens", tokens, Positive)
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer; load it from a folder with one")
    ids = [lm.tokenizer.encode(text) for text in texts]
    used = [n for n, tokens_of in enumerate(ids) if len(tokens_of) >= prompt + tokens]
    if not used:
        longest = max(map(len, ids), default=0)
        raise UserError(
            f"prompt + tokens is {prompt + tokens}, and the longest text has {longest} tokens; lower prompt or tokens"
        )
    pairs = [(ids[n][:prompt], ids[n][prompt : prompt + tokens]) for n in used]
    found: list[Likelihood] = log_likelihoods(lm, pairs)
    return np.array([likelihood.is_greedy for likelihood in found]), np.array(used)

"""Config of text generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxlm.config.ranges import (
    MAX_INT,
    AboveZero,
    Config,
    Count,
    Name,
    NotNegative,
    Number,
    Range,
    Seed,
    ShareAboveZero,
    ShareBelowOne,
    check_fields,
)
from jaxlm.errors import UserError

MAX_TEXTS = 10_000  # upper limit of the texts per prompt, and of the beams
Texts = Annotated[int, Range(1, MAX_TEXTS)]
TopK = Annotated[int, Range(1, MAX_INT, special=(0, "all"))]


@dataclass(frozen=True)
class Decoding(Config):
    """Generates text by sampling, greedy search (temperature 0) or beam search.

    A beam search ends when no open beam can score higher than the worst finished hypothesis.  The best score that a
    beam can reach is estimated from its current length (early_stopping False) or its most favourable length ("never").
    """

    max_new_tokens: Count = 128  # maximum number of generated tokens
    min_new_tokens: Count = 0  # minimum number of generated tokens before a stop token
    max_length: Count = 0  # maximum length of prompt and text in tokens; replaces max_new_tokens; 0: not used
    min_length: Count = 0  # minimum length of prompt and text in tokens before a stop token
    temperature: NotNegative = 1.0  # divisor of the logits; 0: always the most likely token
    top_k: TopK = 0  # sample from the k most likely tokens; 0: from all
    top_p: ShareAboveZero = 1.0  # sample from the smallest set of tokens with probability p (Holtzman et al. 2020)
    min_p: ShareBelowOne = 0.0  # minimum probability relative to the most likely token's (Nguyen et al. 2024)
    repetition_penalty: AboveZero = 1.0  # penalty for tokens that occurred before (Keskar et al. 2019); 1: none
    no_repeat_ngram_size: Count = 0  # length of n-grams that may not be repeated (Paulus et al. 2018); 0: no limit
    beams: Texts = 1  # number of beams; 1: no beam search
    length_penalty: Number = 1.0  # exponent of the length by which a hypothesis's log-probability is divided
    early_stopping: Literal[True, False, "never"] = False  # True: stop as soon as there are as many hypotheses as beams
    n_best: Texts = 1  # texts per prompt: the best hypotheses of a beam search, otherwise independent samples
    stop: tuple[Name, ...] = ()  # strings that end a text; they are not part of it
    forbidden: tuple[Name, ...] = ()  # words or strings that are never generated
    too_long: Literal["refuse", "truncate"] = "refuse"  # how to handle too long prompts; truncate: cut the beginning
    seed: Seed = 0  # sampling seed; text n of prompt i uses a key derived from (seed, i, n)
    cache: Literal["compute", "int8"] = "compute"  # dtype of stored keys and values; int8: half the memory of bfloat16

    def check(self, prefix: str = "") -> None:
        """Checks every field, and combinations of fields.

        Args:
          prefix: prepended to the field names in a message.

        Raises:
          UserError: if a value is of the wrong type or out of range, or two fields contradict each other.
        """
        check_fields(self, prefix)
        if self.max_length and self.min_length > self.max_length:
            raise UserError(
                f"{prefix}min_length is {self.min_length}; it must be from 0 to max_length, {self.max_length}"
            )
        if self.min_new_tokens > self.max_new_tokens and not self.max_length:
            raise UserError(
                f"{prefix}min_new_tokens is {self.min_new_tokens}; it must be from 0 to max_new_tokens, "
                f"{self.max_new_tokens}"
            )
        if self.beams > 1:
            for name, unused in {"temperature": (0.0, 1.0), "top_k": (0,), "top_p": (1.0,), "min_p": (0.0,)}.items():
                if getattr(self, name) not in unused:
                    raise UserError(
                        f"{name} is {getattr(self, name)}, but beam search does not sample; leave it out, or set "
                        f"beams to 1"
                    )
            if self.n_best > self.beams:
                raise UserError(f"n_best is {self.n_best}, but there are {self.beams} beams; raise beams")
        elif self.n_best > 1 and self.temperature == 0:
            raise UserError(
                f"n_best is {self.n_best}, but greedy search has only one result; raise temperature, or set beams"
            )

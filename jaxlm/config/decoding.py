"""How texts are generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxlm.config.ranges import (
    MOST,
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

MOST_TEXTS = 10_000  # texts of one prompt, and beams
Texts = Annotated[int, Range(1, MOST_TEXTS)]
TopK = Annotated[int, Range(1, MOST, special=(0, "all"))]


@dataclass(frozen=True)
class Decoding(Config):
    """How texts are generated, token by token: by sampling, greedily (temperature 0), or by beam search.

    A beam search ends when no open beam can beat the worst of its hypotheses.  What a beam can become is judged by its
    length so far (early_stopping False) or by the length that suits it best ("never").
    """

    max_new_tokens: Count = 128  # most tokens of a text
    min_new_tokens: Count = 0  # tokens before which no stop token comes
    max_length: Count = 0  # most tokens of a text and its prompt together, in place of max_new_tokens; 0: not used
    min_length: Count = 0  # tokens of a text and its prompt together before which no stop token comes
    temperature: NotNegative = 1.0  # divides the logits; 0: always the likeliest token
    top_k: TopK = 0  # sample among the k likeliest tokens; 0: among all
    top_p: ShareAboveZero = 1.0  # sample among the fewest tokens whose probabilities reach p (Holtzman et al. 2020)
    min_p: ShareBelowOne = 0.0  # sample among tokens at least p times as likely as the likeliest (Nguyen et al. 2024)
    repetition_penalty: AboveZero = 1.0  # makes tokens that were there before less likely (Keskar et al. 2019); 1: not
    no_repeat_ngram_size: Count = 0  # no sequence of so many tokens comes twice (Paulus et al. 2018); 0: any may
    beams: Texts = 1  # hypotheses that a beam search keeps; 1: no beam search
    length_penalty: Number = 1.0  # a hypothesis is worth its log-probability divided by its length to this power
    early_stopping: Literal[True, False, "never"] = False  # end a beam search with the first hypotheses, one per beam
    n_best: Texts = 1  # texts of each prompt; of a beam search the best hypotheses, else draws
    stop: tuple[Name, ...] = ()  # texts before which a generated text ends
    forbidden: tuple[Name, ...] = ()  # words or texts that are never generated
    too_long: Literal["refuse", "truncate"] = "refuse"  # a prompt that leaves too few positions; or its beginning goes
    seed: Seed = 0  # of the sampling; text n of prompt i draws from a key of (seed, i, n)

    def check(self, prefix: str = "") -> None:
        """Raises UserError where a choice is of the wrong kind or out of its range, or two contradict each other.

        Args:
          prefix: of the names of the fields in a message.
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
            drawn = ("temperature", "top_k", "top_p", "min_p")
            plain = Decoding(temperature=0.0)
            for name in drawn:
                # A temperature of 1, which is the default, is no wish.
                if getattr(self, name) not in (getattr(plain, name), *((1.0,) * (name == "temperature"))):
                    raise UserError(
                        f"{name} is {getattr(self, name)}, but a beam search draws nothing; leave it out, or set "
                        f"beams to 1"
                    )
            if self.n_best > self.beams:
                raise UserError(f"n_best is {self.n_best}, of {self.beams} beams; ask for more beams, or fewer texts")
        elif self.n_best > 1 and self.temperature == 0:
            raise UserError(f"n_best is {self.n_best}, but greedy texts are all the same; give a temperature, or beams")

"""Generation with filters: of several candidates the least harmful one that all filters allow is returned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from jaxlm.config import Decoding
from jaxlm.config.safety import SafetyConfig
from jaxlm.data import personal_data
from jaxlm.errors import UserError
from jaxlm.inference.generate import decoding_for, generate
from jaxlm.lm import LM
from jaxlm.storage import disk
from jaxlm.trust.filters import Filter, Verdict, filters_of, judge


class Candidate(NamedTuple):
    """A generated text and the verdicts of the filters."""

    text: str
    verdicts: list[Verdict]

    @property
    def allowed(self) -> bool:
        """Whether all filters allow it."""
        return all(verdict.allowed for verdict in self.verdicts)

    @property
    def score(self) -> float:
        """How harmful it is: the largest score of the filters."""
        return max((verdict.score for verdict in self.verdicts), default=0.0)


class Answer(NamedTuple):
    """The answer to a prompt.

    Attributes:
      text: the best candidate, or the refusal.
      refused: whether it is the refusal.
      reasons: why candidates or the prompt were rejected, each reason once.
      candidates: all candidates; none if the prompt was rejected.
    """

    text: str
    refused: bool
    reasons: list[str]
    candidates: list[Candidate]


class SafeGenerator:
    """Generates texts that pass filters; for commands, scripts and servers.

    Attributes:
      lm: the model.
      safety: the config.
      filters: the filters.
    """

    def __init__(self, lm: LM, safety: SafetyConfig, filters: Sequence[Filter] | None = None, system: str = ""):
        """Loads the filters.

        Args:
          lm: the model.
          safety: the config.
          filters: filters in place of those of the config; None: those of the config.
          system: a system prompt that answers may not repeat.

        Raises:
          UserError: as `filters_of`, and for a log that cannot be written.
        """
        safety.check()
        self.lm, self.safety = lm, safety
        self.filters = list(filters_of(safety, system) if filters is None else filters)
        self._log([])  # a log that cannot be written is an error before anything is generated

    def answer(
        self, prompts: Sequence[Any], decoding: Decoding | None = None, *, draft: LM | None = None, **choices: Any
    ) -> list[Answer]:
        """Returns the answer to each prompt.

        Args:
          prompts: texts, or lists of token ids.
          decoding: the settings of generation, as for `jaxlm.generate`; with several candidates they must sample.
          draft: a smaller model for speculative decoding, as for `jaxlm.generate`.
          **choices: fields of `Decoding` by name.

        Raises:
          UserError: as `jaxlm.generate`.
        """
        decoding = decoding_for(self.lm, decoding, choices)
        if decoding.n_best > 1:
            raise UserError(f"n_best is {decoding.n_best}; filters return one answer: set safety.candidates instead")
        if self.safety.candidates > 1:
            decoding = replace(decoding, n_best=self.safety.candidates)
            decoding.check()
        rejected = self._rejected_prompts(prompts)
        asked = [prompt for prompt, verdicts in zip(prompts, rejected) if not verdicts]
        generated = iter(generate(self.lm, asked, decoding, draft=draft) if asked else [])
        answers = []
        for verdicts in rejected:
            if verdicts:
                answers.append(self._refuse([], verdicts))
            else:
                texts = next(generated)
                answers.append(self._choose([texts] if isinstance(texts, str) else texts))
        self._log(list(zip(prompts, answers)))
        return answers

    def _rejected_prompts(self, prompts: Sequence[Any]) -> list[list[Verdict]]:
        """Returns the verdicts that reject each prompt."""
        if not self.safety.check_prompt or self.lm.tokenizer is None:
            return [[] for _ in prompts]
        decode = self.lm.tokenizer.decode
        texts = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in prompts]
        return [[verdict for verdict in verdicts if not verdict.allowed] for verdicts in judge(texts, self.filters)]

    def _choose(self, texts: Sequence[str]) -> Answer:
        if self.safety.personal_data == "mask":
            texts = [personal_data.mask(text) for text in texts]
        candidates = [Candidate(text, verdicts) for text, verdicts in zip(texts, judge(texts, self.filters))]
        allowed = [candidate for candidate in candidates if candidate.allowed]
        rejecting = [verdict for candidate in candidates for verdict in candidate.verdicts if not verdict.allowed]
        if not allowed:
            return self._refuse(candidates, rejecting)
        return Answer(min(allowed, key=lambda one: one.score).text, False, _reasons(rejecting), candidates)

    def _refuse(self, candidates: list[Candidate], verdicts: list[Verdict]) -> Answer:
        return Answer(self.safety.refusal, True, _reasons(verdicts), candidates)

    def _log(self, answers: Sequence[tuple[Any, Answer]]) -> None:
        """Appends the refusals to the log. It identifies prompts by a hash, because they may be personal."""
        if not self.safety.log:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        lines = [
            {
                "time": now,
                "prompt": hashlib.sha256(str(prompt).encode()).hexdigest()[:16],
                "reasons": answer.reasons,
                "candidates": len(answer.candidates),
                "scores": [round(candidate.score, 4) for candidate in answer.candidates],
            }
            for prompt, answer in answers
            if answer.refused
        ]
        path = disk.local(self.safety.log, "safety.log")
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in lines)
        except OSError as error:
            raise UserError(f"safety.log {path} cannot be written: {error.strerror}; choose another file") from None


def _reasons(verdicts: Sequence[Verdict]) -> list[str]:
    return list(dict.fromkeys(f"{verdict.filter}: {verdict.reason}" for verdict in verdicts))

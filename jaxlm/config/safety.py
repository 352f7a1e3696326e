"""Config of the filters of generated texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxlm.config.ranges import Config, Name, Range, Share, check_fields
from jaxlm.errors import UserError


@dataclass(frozen=True)
class SafetyConfig(Config):
    """Filters of generated texts: a text that a filter rejects is not returned."""

    classifier: str = ""  # folder of a classifier of harmful texts, such as a run of configs/davidson.py
    labels: tuple[Name, ...] = ()  # the harmful labels of the classifier
    threshold: Share = 0.5  # a text is rejected if the sum of their probabilities is above this
    words: str = ""  # file with a rejected word or phrase per line; lines that start with # are comments
    patterns: str = ""  # file with a rejected regular expression per line
    personal_data: Literal["allow", "mask", "refuse"] = "allow"  # addresses, phone, card and identity numbers
    candidates: Annotated[int, Range(1, 1000)] = 1  # texts to sample for each prompt; the least harmful one is returned
    check_prompt: bool = False  # also refuse prompts that a filter rejects
    refusal: str = "I cannot help with that."  # text in place of an answer that is refused
    log: str = ""  # .jsonl file to which each refusal is appended, with its reason and without texts

    @property
    def is_on(self) -> bool:
        """Whether there is any filter."""
        return bool(self.classifier or self.words or self.patterns or self.personal_data != "allow")

    def check(self) -> None:
        """Raises UserError if fields are out of range or contradict each other."""
        check_fields(self, "safety.")
        if bool(self.classifier) != bool(self.labels):
            raise UserError(
                f"safety.classifier is {self.classifier!r} and safety.labels {self.labels}; give both, or neither"
            )
        if not self.is_on and (self.candidates > 1 or self.check_prompt or self.log):
            raise UserError(
                "safety.candidates, safety.check_prompt and safety.log have no effect without a filter; give "
                "safety.classifier, safety.words, safety.patterns or safety.personal_data"
            )

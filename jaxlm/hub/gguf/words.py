"""How byte-level tokenizers split texts into words, by the names in `tokenizer.ggml.pre`.

The expressions are those of the published tokenizer.json files.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
QWEN_2 = rf"{_HEAD}|\p{{N}}|{_TAIL}"
_LLAMA_3 = rf"{_HEAD}|\p{{N}}{{1,3}}|{_TAIL}"
_UPPER, _LOWER = (rf"[{one}\p{{Lm}}\p{{Lo}}\p{{M}}]" for one in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Words(NamedTuple):
    """The splitting of a text into words.

    Attributes:
      pattern: regular expression that matches words; empty: GPT-2's, which is part of the byte-level step.
      digits: whether each digit is a word, before the pattern applies.
      compose: whether the text is normalised to NFC.
      whole: whether a word of the vocabulary is a token, whatever the merges are.
      bos: whether BOS begins a text if the file does not specify it.
    """

    pattern: str = ""
    digits: bool = False
    compose: bool = False
    whole: bool = False
    bos: bool = False

    @property
    def normalizer(self) -> dict[str, Any] | None:
        """The normalizer of a tokenizer.json."""
        return {"type": "NFC"} if self.compose else None

    @property
    def pre_tokenizer(self) -> dict[str, Any]:
        """The pre-tokenizer of a tokenizer.json."""
        spell = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not self.pattern}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        digits = {"type": "Digits", "individual_digits": True}
        steps = [digits] * self.digits + [split] * bool(self.pattern) + [spell]
        return spell if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


# The first name of equal entries is written.
WORDS = {
    **dict.fromkeys(("gpt-2", "default", "phi-2", "olmo"), Words()),
    **dict.fromkeys(("smollm", "starcoder", "refact"), Words(digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Words(_LLAMA_3, whole=True, bos=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Words(_LLAMA_3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), Words(QWEN_2, compose=True)),
    "tekken": Words(_TEKKEN, whole=True),
}

"""A jaxlm model in lm-evaluation-harness (Gao et al.), the extra `eval`: hundreds of benchmarks of language models.

    python -m jaxlm.inference.lm_eval run --model jaxlm --model_args path=RUN_OR_FOLDER --tasks hellaswag,wikitext

takes what `lm_eval` takes, and knows the model "jaxlm" beside its own; `lm_eval` itself finds no models outside itself.
In Python: `lm_eval.simple_evaluate(model=jaxlm.inference.lm_eval.Harness("FOLDER"), tasks=[...])`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from typing import Any

from jaxlm import lm as models
from jaxlm.data.chat import rendering
from jaxlm.errors import UserError
from jaxlm.inference.generate import generate
from jaxlm.inference.likelihood import log_likelihoods

try:
    from lm_eval import utils
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    missing = f"lm-evaluation-harness is not there ({error}); install it: pip install 'jaxlm[eval]'"
    if __name__ == "__main__":
        sys.exit(f"error: {missing}")
    raise UserError(missing) from None

# What a task may say of sampling, by the names of `Decoding`; the harness hands on what it does not know.
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "length_penalty", "seed")


@register_model("jaxlm")
class Harness(LM):
    """What the harness asks of a model, by `log_likelihoods` and `generate`.

    path: a run, a folder in Hugging Face's format, or a hub name.  add_bos_token: whether texts begin with the
    tokenizer's BOS; None: as the tokenizer's own frame has it, as with the harness' own models.  max_length: tokens of
    a row; None: the model's positions.  batch_tokens: places in a batch; the harness' batch_size, max_batch_size and
    device say nothing here.

    Longer contexts lose their beginning, as with the harness' own models.
    """

    def __init__(
        self,
        path: str | models.LM,
        dtype: str = "float32",
        add_bos_token: bool | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_tokens: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        loaded = path if isinstance(path, models.LM) else models.load(path, dtype=dtype)
        if loaded.tokenizer is None:
            raise UserError("the model has no tokenizer; load it from a folder with one")
        first = loaded.tokenizer.eos if loaded.tokenizer.bos is None else loaded.tokenizer.bos
        self.begin = [] if first is None else [first]  # what an empty context is
        if add_bos_token is not None:
            loaded = dataclasses.replace(loaded, tokenizer=loaded.tokenizer.framed_with(bos=add_bos_token))
        self.lm, self.max_gen_toks = loaded, max_gen_toks
        self.rows: dict[str, Any] = {"length": max_length, "batch_tokens": batch_tokens}
        self.chats: dict[str, list[int]] = {}  # text of a chat -> its ids, which the text does not tell

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation behind its context, and whether it is the greedy one."""
        pairs = [(self._context(context), continuation) for context, continuation in (r.args for r in requests)]
        found = log_likelihoods(self.lm, pairs, too_long="truncate", **self.rows)
        return [(one.log_probability, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-probability in nats of each text behind BOS, else EOS, by the harness' windows.

        Its own models also predict a BOS behind the BOS where transformers' tokenizer writes one, as Llama's does.
        """
        tokenizer = self.lm.tokenizer
        assert tokenizer is not None
        if self.lm.config.structure == "encoder_decoder":
            raise UserError("an encoder-decoder gives no likelihood of a text alone; choose other tasks")
        if not self.begin:
            raise UserError("the tokenizer has neither BOS nor EOS, one of which begins a text; choose other tasks")
        length = self.rows["length"] or self.lm.config.max_length
        windows, bounds = [], [0]
        for ids in tokenizer.encode_batch([request.args[0] for request in requests]):
            rolling = utils.get_rolling_token_windows(ids, self.begin[0], length, context_len=1)
            windows += [utils.make_disjoint_window(window) for window in rolling]
            bounds.append(len(windows))
        each = [one.log_probability for one in log_likelihoods(self.lm, windows, **self.rows)]
        return [sum(each[a:b]) for a, b in zip(bounds, bounds[1:])]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The text that follows each context, up to the first of the task's stop texts; greedy unless it says else."""
        alike: dict[str, list[int]] = {}  # requests with the same choices
        for n, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(n)
        texts = [""] * len(requests)
        for said, places in alike.items():
            choices = normalize_gen_kwargs(json.loads(said), self.max_gen_toks)
            prompts: list[Any] = [self._context(requests[n].args[0]) for n in places]
            # What the harness calls a greedy task has temperature 0 by now.
            found = generate(
                self.lm,
                prompts,
                max_new_tokens=choices["max_gen_toks"],
                temperature=choices.get("temperature", 0.0),
                stop=tuple(stop for stop in choices["until"] if stop),
                too_long="truncate",
                **{name: choices[name] for name in SAMPLING if name in choices},
            )
            for n, text in zip(places, found, strict=True):
                texts[n] = text
        return texts

    def _context(self, text: str) -> str | list[int]:
        """A context as jaxlm takes it: ids of a chat, and of an empty context."""
        both = self.lm.config.structure == "encoder_decoder"
        return self.chats.get(text) or (text if text or both else self.begin)

    # Chats, which --apply_chat_template asks for.

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat; whoever asks for its likelihood, or an answer, gets that of the ids behind it."""
        if not add_generation_prompt:
            raise UserError("a task begins the assistant's answer (gen_prefix), which jaxlm has no templates for")
        assert self.lm.tokenizer is not None
        text = rendering.render(self.lm.tokenizer, chat_history, add_generation_prompt=True)
        self.chats[text] = rendering.prompt(self.lm.tokenizer, chat_history)
        return text

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The Jinja source of the template that is in use."""
        assert self.lm.tokenizer is not None
        return rendering.templates(self.lm.tokenizer).get("default", "")

    @property
    def tokenizer_name(self) -> str:
        """What tells tokenizers and templates apart, where requests are cached."""
        assert self.lm.tokenizer is not None
        files = sorted(self.lm.tokenizer.files.items())
        return hashlib.sha256(b"".join(name.encode() + content for name, content in files)).hexdigest()[:16]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

"""jaxlm models in lm-evaluation-harness (Gao et al.), the extra `eval`: hundreds of benchmarks of language models.

    python -m jaxlm.inference.lm_eval run --model jaxlm --model_args path=RUN_OR_FOLDER --tasks hellaswag,wikitext

accepts the arguments of `lm_eval` and adds the model "jaxlm", which `lm_eval` itself does not find.
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
    missing = f"lm-evaluation-harness is not installed ({error}); install it: pip install 'jaxlm[eval]'"
    if __name__ == "__main__":
        sys.exit(f"error: {missing}")
    raise UserError(missing) from None

# Sampling settings of a task with the names of `Decoding`; the harness passes on settings that it does not handle.
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "length_penalty", "seed")


@register_model("jaxlm")
class Harness(LM):
    """The model interface of the harness, by `log_likelihoods` and `generate`.

    Longer contexts are truncated at their beginning, as by the harness' own models.

    Args:
      path: a run, a folder in Hugging Face's format, or a hub name.
      dtype: dtype of the parameters.
      add_bos_token: whether texts begin with the tokenizer's BOS; None: as the tokenizer adds special tokens, like
        the harness' own models.
      max_length: tokens in a row; None: the model's positions.
      max_gen_toks: maximum number of new tokens where a task does not set it.
      batch_tokens: tokens in a batch, padding included.
      batch_size: ignored, like max_batch_size and device.
      max_batch_size: ignored.
      device: ignored.
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
        self.begin = [] if first is None else [first]  # replaces an empty context
        if add_bos_token is not None:
            loaded = dataclasses.replace(loaded, tokenizer=loaded.tokenizer.with_bos(bos=add_bos_token))
        self.lm, self.max_gen_toks = loaded, max_gen_toks
        self.rows: dict[str, Any] = {"length": max_length, "batch_tokens": batch_tokens}
        self.chats: dict[str, list[int]] = {}  # text of a chat -> its ids, which the text does not determine

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Returns the log-probability in nats of each continuation, and whether greedy decoding generates it."""
        pairs = [(self._context(context), continuation) for context, continuation in (r.args for r in requests)]
        likelihoods = log_likelihoods(self.lm, pairs, too_long="truncate", **self.rows)
        return [(one.log_probability, one.is_greedy) for one in likelihoods]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Returns the log-probability in nats of each text after BOS, else EOS, over the harness' windows.

        The harness' own models also predict a second BOS where the tokenizer of transformers adds one, such as Llama's.
        """
        tokenizer = self.lm.tokenizer
        assert tokenizer is not None
        if self.lm.config.structure == "encoder_decoder":
            raise UserError("an encoder-decoder has no likelihood of a text without a source; choose other tasks")
        if not self.begin:
            raise UserError("the tokenizer has neither BOS nor EOS to begin a text; choose other tasks")
        length = self.rows["length"] or self.lm.config.max_length
        windows, bounds = [], [0]
        for ids in tokenizer.encode_batch([request.args[0] for request in requests]):
            rolling = utils.get_rolling_token_windows(ids, self.begin[0], length, context_len=1)
            windows += [utils.make_disjoint_window(window) for window in rolling]
            bounds.append(len(windows))
        each = [one.log_probability for one in log_likelihoods(self.lm, windows, **self.rows)]
        return [sum(each[a:b]) for a, b in zip(bounds, bounds[1:])]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Returns the continuation of each context up to the first stop text; greedy unless the task sets sampling."""
        groups: dict[str, list[int]] = {}  # settings -> requests
        for n, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(n)
        texts = [""] * len(requests)
        for settings, numbers in groups.items():
            choices = normalize_gen_kwargs(json.loads(settings), self.max_gen_toks)
            prompts: list[Any] = [self._context(requests[n].args[0]) for n in numbers]
            # `normalize_gen_kwargs` has set temperature 0 for greedy tasks.
            continuations = generate(
                self.lm,
                prompts,
                max_new_tokens=choices["max_gen_toks"],
                temperature=choices.get("temperature", 0.0),
                stop=tuple(stop for stop in choices["until"] if stop),
                too_long="truncate",
                **{name: choices[name] for name in SAMPLING if name in choices},
            )
            for n, text in zip(numbers, continuations, strict=True):
                texts[n] = text
        return texts

    def _context(self, text: str) -> str | list[int]:
        """Returns a context for jaxlm: token ids for a chat and for an empty context, else the text."""
        both = self.lm.config.structure == "encoder_decoder"
        return self.chats.get(text) or (text if text or both else self.begin)

    # Chats, for --apply_chat_template.

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the text of a chat; later requests with this text use the token ids of the chat."""
        if not add_generation_prompt:
            raise UserError(
                "a task has a gen_prefix, the beginning of an answer, which is not supported; choose other tasks"
            )
        assert self.lm.tokenizer is not None
        text = rendering.render(self.lm.tokenizer, chat_history, add_generation_prompt=True)
        self.chats[text] = rendering.prompt(self.lm.tokenizer, chat_history)
        return text

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Returns the Jinja source of the template."""
        assert self.lm.tokenizer is not None
        return rendering.templates(self.lm.tokenizer).get("default", "")

    @property
    def tokenizer_name(self) -> str:
        """A hash of the tokenizer's files, which distinguishes tokenizers and templates in the harness' cache."""
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

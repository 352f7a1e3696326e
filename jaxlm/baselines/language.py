"""The n-gram model of the tokens that a causal language model is trained on."""

from __future__ import annotations

import numpy as np

from jaxlm.baselines import ngrams
from jaxlm.baselines.ngrams import NGrams
from jaxlm.baselines.result import Baseline
from jaxlm.config import BaselineConfig
from jaxlm.data.corpus import Corpus, Prepared
from jaxlm.nn.losses import bits_per_byte
from jaxlm.tasks.pretraining import CausalLMTask
from jaxlm.tasks.task import perplexity


def fit_ngrams(task: CausalLMTask, data: Prepared, options: BaselineConfig) -> NGrams:
    """Returns the n-gram model of the first training tokens.

    Each token of the tokenizer has a probability.  Orders whose counts define no discounts, such as the unigrams of
    characters, have those of `ngrams.FALLBACK`.

    Args:
      task: the task, which decides whether documents are one text, and what is predicted.
      data: the data of a run.
      options: the order, and the maximum number of tokens.
    """
    tokens_N, bounds = _texts(task, data.train, options.tokens)
    largest = max(int(np.max(tokens, initial=0)) for tokens in (tokens_N, data.held_out.tokens))
    size = max(largest + 1, data.tokenizer.size if data.tokenizer else 0)
    return ngrams.fit(tokens_N, bounds, options.order, vocabulary=size, fallback=ngrams.FALLBACK)


def ngram_baseline(task: CausalLMTask, data: Prepared, options: BaselineConfig, model: NGrams) -> Baseline:
    """Returns the scores of an n-gram model on the held-out tokens that the language model predicts too.

    The model predicts within whole documents, or within the whole stream, and not within rows.

    Args:
      task: the task.
      data: the data of a run.
      options: the config of `fit_ngrams`.
      model: its result.
    """
    held_out: Corpus = data.held_out
    tokens_N, bounds = _texts(task, held_out, 0)
    log_probs_N = ngrams.log_probs(model, tokens_N, bounds)
    is_predicted_N = np.ones(len(tokens_N), bool)
    is_predicted_N[bounds[:-1][np.diff(bounds) > 0]] = False
    loss = -log_probs_N[is_predicted_N].mean()
    text = -log_probs_N[~np.isin(tokens_N, task.frame)].sum()  # the tokens around documents have no bytes
    scores = {
        "loss": float(loss),
        "perplexity": perplexity(float(loss)),
        "bits_per_byte": float(bits_per_byte(text, held_out.bytes)),
    }
    counted = min(len(data.train.tokens), options.tokens)
    note = f"The {model.order}-gram model counts {counted:,} of {len(data.train.tokens):,} training tokens."
    if model.fallbacks:
        orders = ", ".join(map(str, model.fallbacks))
        note += f" Its discounts are fixed for the order{'s' * (len(model.fallbacks) > 1)} {orders}."
    return Baseline(f"{model.order}-gram", scores, note)


def _texts(task: CausalLMTask, corpus: Corpus, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first tokens of a corpus, all if `limit` is 0, and the bounds of its texts."""
    count = min(len(corpus.tokens), limit or len(corpus.tokens))
    tokens_N = np.asarray(corpus.tokens[:count], np.int64)
    if task.task.stream:
        return tokens_N, np.array([0, count])
    bounds = corpus.bounds
    bounds = np.append(bounds[: np.searchsorted(bounds, count)], count)
    if task.end is None:
        return tokens_N, bounds
    # The corpus has the token before each document only, and the model predicts it after each document too.
    return np.insert(tokens_N, bounds[1:], task.end), bounds + np.arange(len(bounds))

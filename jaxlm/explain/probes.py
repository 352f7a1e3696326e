"""Probes: what a linear classifier reads in the hidden states of each layer, compared with a control task."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.config.arguments import check_list, check_model
from jaxlm.config.ranges import Count, Positive, check_argument, short_repr
from jaxlm.errors import UserError
from jaxlm.inference.packing import check_batch_tokens, pack_batches
from jaxlm.lm import LM
from jaxlm.nn.sites import stacks_of
from jaxlm.nn.transformer import Transformer, apply

Sentence = tuple[Sequence[str], Sequence[str]]  # words and their tags


class Probes(NamedTuple):
    """The accuracy of a probe on the hidden states of each layer; row 0 belongs to the embeddings.

    Attributes:
      accuracy: of the tags of the test words [L + 1].
      macro_f1: mean F1 of the tags that occur in the test words [L + 1].
      control: accuracy of the control task [L + 1].
      majority: accuracy of the most frequent tag.
      labels: the tags.
      words: numbers of words for training and test.
    """

    accuracy: np.ndarray
    macro_f1: np.ndarray
    control: np.ndarray
    majority: float
    labels: tuple[str, ...]
    words: tuple[int, int]

    @property
    def selectivity(self) -> np.ndarray:
        """The accuracy minus that of the control task [L + 1]."""
        return self.accuracy - self.control


def probe(
    lm: LM,
    training: Sequence[Sentence],
    test: Sequence[Sentence],
    *,
    max_words: int = 20_000,
    inverse_penalty: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Probes:
    """Returns how well a linear probe predicts the tags of words from the hidden states of each layer.

    A probe is a logistic regression on the standardised hidden state of the first token of each word. In the control
    task each word type has one random tag, drawn from the distribution of the tags. A probe can learn it only by
    memorising words, so a large selectivity means that the layer represents the tags, and not only the words.

    Args:
      lm: the model; of an encoder-decoder the encoder is read.
      training: sentences, each (words, tags).
      test: further sentences.
      max_words: number of words of each part; the rest is not read.
      inverse_penalty: the inverse weight of the L2 penalty, C of scikit-learn.
      seed: for the control task.
      batch_tokens: tokens in a batch; None: automatic.

    Raises:
      UserError: for parts without words, a single tag, and different numbers of words and tags.

    Source: Hewitt and Liang 2019, Designing and Interpreting Probes with Control Tasks, sections 2 and 3.
    """
    check_model("lm", lm)
    max_words, seed = check_argument("max_words", max_words, Positive), check_argument("seed", seed, Count)
    if not inverse_penalty > 0:
        raise UserError(f"inverse_penalty is {inverse_penalty}; give a number above 0")
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer; load it from a folder with one")
    parts = [_checked(name, part, max_words) for name, part in (("training", training), ("test", test))]
    tags, control = _labels([part[1] for part in parts]), _control_tags(parts, seed)
    states, kept = zip(*[word_states(lm, sentences, batch_tokens) for sentences, _, _ in parts])
    y_train, y_test = (tags_N[kept_N] for tags_N, kept_N in zip(tags, kept))
    c_train, c_test = (tags_N[kept_N] for tags_N, kept_N in zip(control, kept))
    results = []
    for x_train, x_test in zip(*states):
        mean_D, std_D = x_train.mean(0), x_train.std(0) + 1e-6
        x_train, x_test = (x_train - mean_D) / std_D, (x_test - mean_D) / std_D
        predicted = _fit(x_train, y_train, inverse_penalty).predict(x_test)
        guessed = _fit(x_train, c_train, inverse_penalty).predict(x_test)
        results.append(((predicted == y_test).mean(), _macro_f1(y_test, predicted), (guessed == c_test).mean()))
    counts = np.unique(y_train, return_counts=True)
    majority = float((y_test == counts[0][counts[1].argmax()]).mean())
    labels = tuple(sorted({tag for part in parts for tag in part[1]}))
    accuracy, macro_f1, of_control = np.array(results).T
    return Probes(accuracy, macro_f1, of_control, majority, labels, (len(y_train), len(y_test)))


def _checked(name: str, part: Any, max_words: int) -> tuple[list[list[str]], list[str], list[str]]:
    """Returns the sentences, and the tags and the words of all sentences, up to a number of words."""
    sentences, tags = list[list[str]](), list[str]()
    for n, sentence in enumerate(check_list(name, part, "sentences")):
        if not isinstance(sentence, (tuple, list)) or len(sentence) != 2:
            raise UserError(f"sentence {n} of {name} is {short_repr(sentence)}; give (words, tags)")
        words, own = map(list, sentence)
        if len(words) != len(own):
            raise UserError(f"sentence {n} of {name} has {len(words)} words and {len(own)} tags; give one tag per word")
        if not all(isinstance(value, str) for value in words + own):
            raise UserError(f"sentence {n} of {name} is {short_repr(sentence)}; words and tags are strings")
        left = max_words - len(tags)
        sentences.append(words[:left])
        tags += own[:left]
        if left <= len(words):
            break
    if not tags:
        raise UserError(f"{name} has no words; give sentences with tags")
    if name == "training" and len(set(tags)) < 2:
        raise UserError(f"all {len(tags)} words of {name} have the tag {tags[0]!r}; a probe requires at least two tags")
    return sentences, tags, [word for words in sentences for word in words]


def _labels(parts: Sequence[Sequence[str]]) -> list[np.ndarray]:
    names = sorted({tag for part in parts for tag in part})
    index = {name: n for n, name in enumerate(names)}
    return [np.array([index[tag] for tag in part]) for part in parts]


def _control_tags(parts: Sequence[Any], seed: int) -> list[np.ndarray]:
    """Returns one random tag for each word type, drawn from the distribution of the tags of the training words."""
    random = np.random.default_rng(seed)
    tags = _labels([part[1] for part in parts])
    types = sorted({word for part in parts for word in part[2]})
    tag_of = dict(zip(types, random.choice(tags[0], len(types))))
    return [np.array([tag_of[word] for word in part[2]]) for part in parts]


def _fit(x_ND: np.ndarray, y_N: np.ndarray, inverse_penalty: float) -> Any:
    from sklearn.dummy import DummyClassifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(y_N)) < 2:  # of the control task, if there are few word types
        return DummyClassifier().fit(x_ND, y_N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # random tags of many words converge slowly
        return LogisticRegression(C=inverse_penalty, max_iter=200).fit(x_ND, y_N)


def _macro_f1(y_N: np.ndarray, predicted_N: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(y_N, predicted_N, labels=np.unique(y_N), average="macro", zero_division=0))


def word_states(
    lm: LM, sentences: Sequence[Sequence[str]], batch_tokens: int | None = None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the hidden states of the first token of each word, for each layer, and the numbers of these words.

    Words without tokens, and those beyond the positions of the model, are left out. A list has L + 1 arrays [N, D].

    Args:
      lm: the model, with its tokenizer.
      sentences: words.
      batch_tokens: tokens in a batch; None: automatic.
    """
    assert lm.tokenizer is not None
    rows, firsts, numbers, before = list[list[int]](), list[np.ndarray](), list[np.ndarray](), 0
    for words in sentences:
        ids, places, own = _tokens_of(lm, words)
        rows.append(ids)
        firsts.append(places)
        numbers.append(own + before)
        before += len(words)
    lengths = np.array([len(ids) for ids in rows])
    program = lm.programs.get(_states, lm.config, lm.module)
    found: list[Any] = [None] * len(rows)
    for batch in pack_batches(lm, lengths, check_batch_tokens(batch_tokens), lambda T: T):
        segments_BT, positions_BT, tokens_BT = batch.to_rows([rows[n] for n in batch.examples])
        states_LBTD = np.asarray(program(lm.params, tokens_BT, segments_BT, positions_BT))
        for n, row, start in zip(batch.examples, batch.rows, batch.starts):
            found[n] = states_LBTD[:, row, start + firsts[n]]
    return list(np.concatenate([states for states in found if states is not None], 1)), np.concatenate(numbers)


def _tokens_of(lm: LM, words: Sequence[str]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Returns the tokens of a sentence with special tokens, the places of words' first tokens, and their numbers."""
    assert lm.tokenizer is not None
    tokenizer = lm.tokenizer
    ids, places, numbers = list(tokenizer.prefix), list[int](), list[int]()
    limit = lm.config.max_length - len(tokenizer.suffix)
    for n, word in enumerate(words):
        pieces = tokenizer.encode(word if n == 0 else f" {word}")
        if len(ids) + len(pieces) > limit:
            break
        if pieces:
            places.append(len(ids))
            numbers.append(n)
        ids += pieces
    return [*ids, *tokenizer.suffix], np.array(places, int), np.array(numbers, int)


def _states(config: ModelConfig, module: Transformer) -> Any:
    """Returns the compiled program: packed rows -> hidden states of all layers [L + 1, B, T, D]."""
    stack = stacks_of(config)[0]
    method = "encode" if config.structure == "encoder_decoder" else "__call__"

    @jax.jit
    def read(params: Any, tokens_BT: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        inputs = tokens_BT, segments_BT, positions_BT
        _, sown = apply(module, params, *inputs, mutable=["states"], method=method)
        return sown["states"][stack]["states"][0].astype(jax.numpy.float32)

    return read

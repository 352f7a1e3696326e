"""What is explained: a number that is computed from the outputs of a model, such as the logit of a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import Decoding
from jaxlm.config.ranges import Count, Positive, check_argument
from jaxlm.errors import UserError, suggestion
from jaxlm.explain.examples import Example, head_of, readable_pieces, target_ids, with_target
from jaxlm.inference.generate import generate
from jaxlm.lm import LM, Output
from jaxlm.tasks import tags as schemes


class Target(NamedTuple):
    """A number for each row of a batch, as a pure function of the outputs of the model.

    Attributes:
      name: for readers, such as the name of the class.
      score: (outputs, *indices) -> [B]; attributions explain this number. For classes, tags and spans it is a logit,
        for tokens of a vocabulary a log-probability.
      probability: (outputs, *indices) -> [B]; the measures of faithfulness compare it. None: the score (for
        regression).
      indices: integers for both functions; a program is compiled once for all of them.
      place: the token whose own output the target reads, which therefore cannot be removed; None: no such token.
    """

    name: str
    score: Callable[..., jax.Array]
    probability: Callable[..., jax.Array] | None = None
    indices: tuple[int, ...] = ()
    place: int | None = None


def logits_in(output: Output) -> jax.Array:
    """Returns the logits of outputs in float32."""
    assert output.logits is not None
    return output.logits.astype(jnp.float32)


def class_logit(output: Output, label: Any) -> jax.Array:
    """Returns the logit of a class, or the prediction of a regression, [B]."""
    return logits_in(output)[:, label]


def class_probability(output: Output, label: Any) -> jax.Array:
    """Returns the probability of a class among all classes, [B]."""
    return jax.nn.softmax(logits_in(output))[:, label]


def class_applies(output: Output, label: Any) -> jax.Array:
    """Returns the probability that one of several classes applies, [B]."""
    return jax.nn.sigmoid(logits_in(output)[:, label])


def tag_logit(output: Output, place: Any, label: Any) -> jax.Array:
    """Returns the logit of a tag at a token, [B]."""
    return logits_in(output)[:, place, label]


def tag_probability(output: Output, place: Any, label: Any) -> jax.Array:
    """Returns the probability of a tag at a token, [B]."""
    return jax.nn.softmax(logits_in(output)[:, place])[:, label]


def span_logit(output: Output, start: Any, end: Any) -> jax.Array:
    """Returns the sum of the logits of the start and the end of an answer, [B]."""
    logits_BT2 = logits_in(output)
    return logits_BT2[:, start, 0] + logits_BT2[:, end, 1]


def span_probability(output: Output, start: Any, end: Any) -> jax.Array:
    """Returns the product of the probabilities of the start and the end among all tokens, [B]."""
    p_BT2 = jax.nn.softmax(logits_in(output), 1)
    return p_BT2[:, start, 0] * p_BT2[:, end, 1]


def token_log_probability(output: Output, place: Any, token: Any) -> jax.Array:
    """Returns the log-probability of a token of the vocabulary at a place, [B]."""
    return jax.nn.log_softmax(logits_in(output)[:, place])[:, token]


def token_probability(output: Output, place: Any, token: Any) -> jax.Array:
    """Returns the probability of a token of the vocabulary at a place, [B]."""
    return jnp.exp(token_log_probability(output, place, token))


class Choice(NamedTuple):
    """How a user names the target.

    Attributes:
      target: the name of a class or tag, the text of an answer, a token, or a text to be predicted; None: what the
        model predicts.
      word: for tags, the number of the word from 0; None: the first word whose tag marks a span.
      new_tokens: for the head lm without a target, the number of tokens to generate.
    """

    target: str | None = None
    word: int | None = None
    new_tokens: int = 1


def choose_targets(lm: LM, example: Example, text: Any, choice: Choice) -> tuple[Example, tuple[Target, ...]]:
    """Returns the targets of an example, and the example with the tokens that precede them.

    Args:
      lm: the model.
      example: the tokens of the text.
      text: the text.
      choice: the names of the targets.

    Raises:
      UserError: for a model that predicts nothing for a text, and for an unknown label, word, answer or token.
    """
    check_argument("target", choice.target, str | None)
    check_argument("word", choice.word, Count | None)
    check_argument("new_tokens", choice.new_tokens, Positive)
    if choice.target is not None and not choice.target.strip():
        raise UserError("target is empty; name a label or a text, or leave it out to explain the prediction")
    head = head_of(lm)
    if choice.word is not None and head != "tokens":
        raise UserError(
            f"word is {choice.word}, but the model has the head {head or 'none'}; only tags belong to words"
        )
    if choice.new_tokens != 1 and head != "lm":
        raise UserError(
            f"new_tokens is {choice.new_tokens}, but the model has the head {head or 'none'}; only lm generates tokens"
        )
    if head not in _CHOOSE:
        raise UserError(
            f"the model has the head {head or 'none'}, whose outputs are no prediction for a text; attributions "
            f"require one of the heads {', '.join(_CHOOSE)}; --analyses attention works without them"
        )
    return _CHOOSE[head](lm, example, text, choice)


def _class_targets(lm: LM, example: Example, text: Any, choice: Choice) -> tuple[Example, tuple[Target, ...]]:
    labels = example.task.labels
    problem = getattr(example.task.task, "problem", "regression")
    if choice.target is not None and choice.target not in labels:
        raise UserError(
            f"target is {choice.target!r}, which is not a label of the model{suggestion(choice.target, labels)}"
        )
    label = labels.index(choice.target) if choice.target is not None else None
    if label is None:
        label = int(np.argmax(_first_logits(lm, example)))
    probability = {"single_label": class_probability, "multi_label": class_applies}.get(problem)
    return example, (Target(labels[label], class_logit, probability, (label,)),)


def _tag_targets(lm: LM, example: Example, text: Any, choice: Choice) -> tuple[Example, tuple[Target, ...]]:
    labels, words = example.task.labels, example.record["tokens"]
    words_T = np.asarray(example.features["words_BT"])
    if choice.word is not None and choice.word >= len(words):
        raise UserError(f"word is {choice.word}; the text has the words 0 to {len(words) - 1}")
    if choice.target is not None and choice.target not in labels:
        raise UserError(
            f"target is {choice.target!r}, which is not a tag of the model{suggestion(choice.target, labels)}"
        )
    if choice.word is not None and choice.word not in words_T:
        raise UserError(f"word {choice.word}, {words[choice.word]!r}, has no tokens; choose another word")
    logits_TN = _first_logits(lm, example) if None in (choice.word, choice.target) else None
    places = np.flatnonzero(words_T >= 0)
    place = places[0] if choice.word is None else int(np.flatnonzero(words_T == choice.word)[0])
    if choice.word is None:
        assert logits_TN is not None
        marked = [t for t in places if not schemes.is_outside(labels[int(logits_TN[t].argmax())])]
        place = marked[0] if marked else place
    if choice.target is not None:
        label = labels.index(choice.target)
    else:
        assert logits_TN is not None
        label = int(logits_TN[place].argmax())
    word = int(words_T[place])
    name = f"{labels[label]} at word {word}, {words[word]!r}"
    return example, (Target(name, tag_logit, tag_probability, (int(place), label), int(place)),)


def _span_targets(lm: LM, example: Example, text: Any, choice: Choice) -> tuple[Example, tuple[Target, ...]]:
    context = example.record["context"]
    offsets_T2 = np.asarray(example.features["offsets_BT"])
    if choice.target is not None:
        first = context.find(choice.target)
        if first < 0:
            raise UserError(f"target is {choice.target!r}, which is not in the text; copy an answer from the text")
        last = first + len(choice.target)
    else:
        logits_T2 = _first_logits(lm, example)
        [arrays] = [{"start_BT": logits_T2[:, 0], "end_BT": logits_T2[:, 1], "offsets_BT": offsets_T2}]
        predicted = example.task.predict(example.record, [[arrays]])
        first, last = predicted["start"], predicted["end"]
    if first is None:  # no answer: the first token is the start and the end
        return example, (Target("no answer", span_logit, span_probability, (0, 0)),)
    inside = np.flatnonzero((offsets_T2[:, 0] < last) & (offsets_T2[:, 1] > first) & (offsets_T2[:, 0] >= 0))
    start, end = int(inside[0]), int(inside[-1])
    return example, (Target(f"answer {context[first:last]!r}", span_logit, span_probability, (start, end), start),)


def _masked_targets(lm: LM, example: Example, text: Any, choice: Choice) -> tuple[Example, tuple[Target, ...]]:
    assert lm.tokenizer is not None
    mask = -1 if lm.tokenizer.mask is None else lm.tokenizer.mask
    blanks = np.flatnonzero(example.tokens_T == mask)
    if not len(blanks):
        name = lm.tokenizer.special.get("mask", "mask token")
        raise UserError(f"the text has no {name}; put one where a word is missing")
    place = int(blanks[0])
    if choice.target is not None:
        token = _single_token(lm, choice.target)
    else:
        token = int(_first_logits(lm, example)[place, : lm.vocabulary].argmax())
    name = lm.tokenizer.pieces([token])[0]
    return example, (Target(name, token_log_probability, token_probability, (place, token), place),)


def _single_token(lm: LM, word: str) -> int:
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode(word)
    spaced = lm.tokenizer.encode(f" {word}")
    ids = spaced if len(spaced) < len(ids) else ids
    if lm.tokenizer.unk in ids:
        raise UserError(f"target is {word!r}, which the tokenizer has no tokens for; choose a word of the vocabulary")
    if len(ids) != 1:
        raise UserError(
            f"target is {word!r}, which has {len(ids)} tokens ({' '.join(lm.tokenizer.pieces(ids))}); "
            f"a mask stands for one token of the vocabulary"
        )
    return ids[0]


def _lm_targets(lm: LM, example: Example, text: Any, choice: Choice) -> tuple[Example, tuple[Target, ...]]:
    assert lm.tokenizer is not None
    if choice.target is not None:
        ids = target_ids(lm, example, text, choice.target)
    else:
        settings = Decoding(max_new_tokens=choice.new_tokens, temperature=0.0)
        prompt = example.tokens_T.tolist()
        [ids] = generate(lm, [prompt], settings, return_tokens=True, stop_tokens=())
        if not ids:
            raise UserError("the model generates no token for this text; name the text to explain with target")
    example, places = with_target(lm, example, ids)
    names = readable_pieces(lm.tokenizer.target, ids)
    shift = example.source or 0
    make = lambda name, place, token: Target(
        name, token_log_probability, token_probability, (place, token), place + shift
    )
    return example, tuple(map(make, names, places, ids))


def _first_logits(lm: LM, example: Example) -> np.ndarray:
    """Returns the logits of the first head for an example, without the axis of rows."""
    tokens_1T, types_1T = (jnp.asarray(x_T[None]) for x_T in (example.tokens_T, example.types_T))
    logits = lm(tokens_1T, jnp.ones_like(tokens_1T), types_1T).logits
    assert logits is not None
    return np.asarray(logits[0], np.float32)


_CHOOSE: dict[str, Callable[..., tuple[Example, tuple[Target, ...]]]] = {
    "classes": _class_targets,
    "tokens": _tag_targets,
    "span": _span_targets,
    "masked_lm": _masked_targets,
    "lm": _lm_targets,
}

EXPLAINED_HEADS = tuple(_CHOOSE)


def names_of(targets: Sequence[Target]) -> tuple[str, ...]:
    """Returns the names of targets."""
    return tuple(target.name for target in targets)

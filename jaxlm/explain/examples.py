"""A text as the model reads it: the tokens that an explanation attributes a prediction to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config.arguments import check_model
from jaxlm.config.ranges import short_repr
from jaxlm.data.tokenizers.tokenizer import check_text
from jaxlm.errors import UserError
from jaxlm.inference.generate import start_of
from jaxlm.lm import LM
from jaxlm.run.trained_model import resolve_model, task_for
from jaxlm.tasks import input_rows

TASK_HEADS = ("classes", "tokens", "span")  # heads whose inputs are the features of a task


class Example(NamedTuple):
    """The tokens that a model reads for one text.

    Attributes:
      tokens_T: token ids; in an encoder-decoder those of the encoder, then those of the decoder.
      types_T: the type of each token.
      pieces: the piece of the vocabulary of each token.
      is_text_T: True for tokens of the text, False for special tokens.
      source: number of tokens of the encoder of an encoder-decoder; None for other models.
      task: the bound task, whose labels the head has; None for heads over the vocabulary.
      record: the record of the task.
      features: further features of the task by token, such as `words_BT`.
    """

    tokens_T: np.ndarray
    types_T: np.ndarray
    pieces: tuple[str, ...]
    is_text_T: np.ndarray
    source: int | None = None
    task: Any = None
    record: Any = None
    features: Mapping[str, Any] = MappingProxyType({})


def read_example(lm: LM, text: Any, task: Any = None) -> Example:
    """Returns a text as the model reads it.

    For the heads classes, tokens and span these are the tokens that `jaxlm.predict` reads. A decoder reads the tokens
    of a prompt, as in `jaxlm.generate`. The decoder of an encoder-decoder has no tokens yet; see `with_target`.

    Args:
      lm: the model.
      text: a text, or what `jaxlm.predict` accepts as an example: a tuple of texts, a list of words, or a dict.
      task: the config of a task; None: that of the model.

    Raises:
      UserError: for a model without a tokenizer, an empty text, and a text that the model cannot read as a whole.
    """
    check_model("the model", lm)
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer; load it from a folder with one: explanations show its tokens")
    if lm.config.front_end != "tokens":
        raise UserError(
            f"model.front_end is {lm.config.front_end!r}; explanations require tokens, so choose a text model"
        )
    _check_not_empty(text)
    head = head_of(lm)
    if head in TASK_HEADS:
        if lm.config.structure == "encoder_decoder":
            raise UserError(
                f"the model is an encoder-decoder with the head {head}; explanations of it require the head lm"
            )
        return _task_example(lm, text, task)
    if not isinstance(text, str):
        raise UserError(f"the text is {short_repr(text)}; a model with the head {head or 'none'} reads one string")
    tokenizer = lm.tokenizer
    if lm.config.structure == "decoder":
        ids = tokenizer.with_prefix(tokenizer.encode(text))
        types = [0] * len(ids)
    else:
        # The mask token of a masked language model is written in the text.
        split = False if head == "masked_lm" else None
        ((ids, types),) = tokenizer.encode_with_special_tokens([text], split_special_tokens=split)
    source = len(ids) if lm.config.structure == "encoder_decoder" else None
    example = _example(tokenizer, ids, types)._replace(source=source)
    check_size(lm, example)
    return example


def _check_not_empty(text: Any) -> None:
    parts = list(text.values()) if isinstance(text, dict) else text if isinstance(text, (list, tuple)) else [text]
    for part in parts:
        if isinstance(part, str):
            check_text(part)
    if not any(part.strip() if isinstance(part, str) else part is not None for part in parts):
        raise UserError(f"the text is {short_repr(text)}, which is empty; give at least one word")


def head_of(lm: LM) -> str | None:
    """Returns the name of the head that is explained, the first one; None for a model without a head."""
    return next(iter(lm.config.heads_on_top), None)


def _task_example(lm: LM, text: Any, task: Any) -> Example:
    """Returns the example of a task over records, which must fit into one row."""
    task = task_for(lm, task)
    bound: Any = resolve_model(lm, task).task
    ((place, row),) = input_rows.example_rows([text], task)
    record = bound.read(bound.task, row, place)
    if record is None:
        raise UserError(f"{place}: the task leaves this example out; correct it")
    (units,) = bound.features([record], False)
    examples = [features for unit in units for features in unit]
    cut = sum(features.get("cut", 0) for features in examples)
    if len(examples) > 1 or cut:
        raise UserError(
            f"the text has more than the {bound.length} tokens of a row, so that the model reads it in "
            f"{'parts' if len(examples) > 1 else f'a row without its last {cut} tokens'}; shorten the text"
        )
    [features] = examples
    example = _example(bound.tokenizer, features["tokens_BT"], features["types_BT"])
    if not example.is_text_T.any():
        raise UserError(f"the text {short_repr(text)} has no tokens; give at least one word")
    return example._replace(task=bound, record=record, features=features)


def _example(tokenizer: Any, ids: Sequence[int], types: Sequence[int]) -> Example:
    roles = tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.cls, tokenizer.sep
    special = {token for token in (*tokenizer.prefix, *tokenizer.suffix, *roles) if token is not None}
    tokens_T = np.asarray(ids, np.int32)
    is_text_T = ~np.isin(tokens_T, list(special))
    return Example(tokens_T, np.asarray(types, np.int32), readable_pieces(tokenizer, ids), is_text_T)


def readable_pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Returns the piece of each token with a space where the vocabulary marks one, and its text where it is bytes."""
    pieces = []
    for token, piece in zip(ids, tokenizer.pieces(ids)):
        text = tokenizer.backend.decode([int(token)], skip_special_tokens=False)
        if piece.startswith("##") or piece in tokenizer.special.values():
            pieces.append(piece)
        elif piece.startswith(("\u2581", "\u0120")):
            pieces.append(" " + (text.strip() or piece[1:]))
        else:
            pieces.append(text if text.strip() and "\ufffd" not in text else piece)
    return tuple(pieces)


def check_size(lm: LM, example: Example) -> None:
    """Raises UserError for an example without tokens of a text, or longer than the rows of the model."""
    if not example.is_text_T[: example.source].any():
        raise UserError("the text has no tokens except special tokens; give at least one word")
    count = len(example.tokens_T) if example.source is None else example.source
    limits = [lm.config.position_limit if example.source is not None else _limit(lm)]
    if example.source is not None:
        lm.config.decoder_config.check_length(
            max(1, len(example.tokens_T) - count), "the number of tokens of the target", "shorten it"
        )
    for limit in limits:
        if limit is not None and count > limit:
            raise UserError(f"the text has {count} tokens, more than the {limit} of the model; shorten it")


def _limit(lm: LM) -> int | None:
    return lm.config.text_limit if lm.config.structure == "decoder" else lm.config.position_limit


def target_ids(lm: LM, example: Example, text: Any, target: str) -> list[int]:
    """Returns the tokens of a text that follows the prompt, or that the decoder of an encoder-decoder writes.

    Args:
      lm: the model, with the head lm.
      example: the prompt or the source.
      text: the prompt as a string.
      target: the text.

    Raises:
      UserError: for a target without tokens.
    """
    assert lm.tokenizer is not None
    check_text(target)
    if lm.config.structure == "encoder_decoder":
        ids = lm.tokenizer.target.encode(target)
    else:  # both are tokenized together, as in a whole text
        whole, before = lm.tokenizer.encode(text + target), lm.tokenizer.encode(text)
        ids = whole[len(before) :] if whole[: len(before)] == before else lm.tokenizer.encode(target)
    if not ids:
        raise UserError(f"the target {target!r:.40} has no tokens; give at least one word")
    return ids


def with_target(lm: LM, example: Example, ids: Sequence[int]) -> tuple[Example, list[int]]:
    """Returns the example with the tokens before each predicted token, and the places of the predictions.

    Args:
      lm: the model, with the head lm.
      example: the prompt or the source.
      ids: the predicted tokens.

    Returns:
      The example, whose last token predicts the last id; the place at which each id is predicted, counted from the
      first token of the decoder.

    Raises:
      UserError: if the tokens exceed the positions of the model.
    """
    assert lm.tokenizer is not None
    first: list[int] = []
    tokenizer = lm.tokenizer.target
    if example.source is not None:
        first = [start_of(lm), *tokenizer.prefix]
    more = [*first, *ids[:-1]]
    of_text = np.arange(len(more)) >= len(first)
    extended = example._replace(
        tokens_T=np.concatenate([example.tokens_T, np.asarray(more, np.int32)]),
        types_T=np.concatenate([example.types_T, np.zeros(len(more), np.int32)]),
        pieces=(*example.pieces, *readable_pieces(tokenizer, more)),
        is_text_T=np.concatenate([example.is_text_T, of_text]),
    )
    check_size(lm, extended)
    begin = len(extended.tokens_T) - len(ids) - (example.source or 0)
    return extended, [begin + n for n in range(len(ids))]

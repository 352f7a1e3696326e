"""Rows of calibration data: texts, or token ids, that a model reads so that its activations can be measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config.arguments import check_list, token_ids
from jaxlm.config.ranges import Positive, check_argument
from jaxlm.data.joined import offsets
from jaxlm.data.pack import Rows, pack
from jaxlm.data.tokenizers.tokenizer import Tokenizer, check_text
from jaxlm.errors import UserError
from jaxlm.lm import LM

MAX_LENGTH = 2048  # tokens in a row, unless the caller sets more
MAX_TOKENS = 1 << 18  # as 128 rows of 2,048 tokens, the calibration data of SparseGPT, Wanda and GPTQ
_TEXTS = 256  # texts that are tokenized together

Example = tuple[np.ndarray, ...]  # the ids of each side: one for a decoder or an encoder, else source and target


class CalibrationRows(NamedTuple):
    """Packed rows, int32: segments number the examples of a row from 1, 0 is padding.

    Attributes:
      tokens_BT: token ids; of the encoder, where there is one.
      segments_BT: the example of each token.
      positions_BT: the position of each token in its example.
      target_tokens_BT: token ids of the decoder of an encoder-decoder, else None; likewise the next two.
      target_segments_BT: the example of each of them.
      target_positions_BT: the position of each of them.
    """

    tokens_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray
    target_tokens_BT: np.ndarray | None = None
    target_segments_BT: np.ndarray | None = None
    target_positions_BT: np.ndarray | None = None

    @property
    def segments(self) -> dict[str, np.ndarray]:
        """The segments of the tokens that the encoder and the decoder read."""
        decoder_BT = self.segments_BT if self.target_segments_BT is None else self.target_segments_BT
        return {"encoder": self.segments_BT, "decoder": decoder_BT}


def calibration_rows(
    lm: LM, texts: Any, *, length: int | None = None, max_tokens: int | None = None
) -> CalibrationRows:
    """Returns the rows in which a model reads texts.

    A decoder reads the texts in full rows: a text that exceeds its row continues in the next one, as an example of its
    own. An encoder reads each text with its special tokens, truncated to a row. An encoder-decoder reads pairs
    (source, target); a single text is both.

    Args:
      lm: the model.
      texts: strings, lists of token ids, or pairs of either; one string is one text. Rows are returned unchanged.
      length: tokens in a row; None: the model's positions, 2,048 at most.
      max_tokens: number of tokens after which no further text is read; None: 262,144.

    Raises:
      UserError: for texts of another type or without tokens, ids that the model has no row for, a model without a
        tokenizer whose texts are strings, and a length beyond the model's positions.
    """
    if isinstance(texts, CalibrationRows):
        return texts
    length = check_argument("length", length, Positive | None) or min(
        MAX_LENGTH, lm.config.max_length, lm.config.decoder_config.max_length
    )
    lm.config.decoder_config.check_length(length)
    max_tokens = check_argument("max_tokens", max_tokens, Positive | None) or MAX_TOKENS
    examples, tokens = [], 0
    for example in _examples(lm, [texts] if isinstance(texts, str) else check_list("calibration", texts, "texts")):
        cut = tuple(ids[:length] for ids in example) if lm.config.structure != "decoder" else example
        examples.append(tuple(ids[: max_tokens - tokens] for ids in cut))
        tokens += len(examples[-1][0])
        if tokens >= max_tokens:
            break
    examples = [example for example in examples if all(len(ids) for ids in example)]
    if not examples:
        raise UserError("the calibration data has no tokens; give texts that resemble the model's later inputs")
    if lm.config.structure == "decoder":
        return CalibrationRows(*_full_rows([ids for (ids,) in examples], length))
    sides = list(zip(*examples))
    lengths = [np.array([len(ids) for ids in side]) for side in sides]
    if len(sides) == 1:
        rows = pack(lengths[0], length, length)
    else:
        rows = pack(lengths[1], length, length, sources=(lengths[0], length))
    return CalibrationRows(*(array for side in sides for array in _packed_rows(side, rows, length)))


def _examples(lm: LM, texts: Iterable[Any]) -> Iterator[Example]:
    """Yields the ids of each text, in order."""
    iterator, n = iter(texts), 0
    while some := list(islice(iterator, _TEXTS)):
        if lm.config.structure != "encoder_decoder":
            yield from zip(_ids(lm, some, n, lm.config.vocabulary, lm.tokenizer))
        else:
            pairs = [one if isinstance(one, tuple) and len(one) == 2 else (one, one) for one in some]
            sources, targets = ([pair[side] for pair in pairs] for side in range(2))
            encoded = _ids(lm, sources, n, lm.config.vocabulary, lm.tokenizer)
            target = None if lm.tokenizer is None else lm.tokenizer.target
            decoded = _ids(lm, targets, n, lm.config.V, target)
            yield from zip(encoded, (_after_start(lm, ids) for ids in decoded))
        n += len(some)


def _ids(lm: LM, texts: list[Any], first: int, vocabulary: int, tokenizer: Tokenizer | None) -> list[np.ndarray]:
    """Returns the ids of texts for one side of the model, with special tokens; `first` is the number of the first."""
    strings = [text for text in texts if isinstance(text, str)]
    if strings and tokenizer is None:
        raise UserError("the model has no tokenizer; load it from a folder with one, or give token ids")
    for text in strings:
        check_text(text)
    encoded: Iterator[list[int]] = iter(())
    if tokenizer is not None and lm.config.structure == "decoder":
        encoded = (tokenizer.with_prefix(ids) for ids in tokenizer.encode_batch(strings))
    elif tokenizer is not None:
        encoded = (ids for ids, _ in tokenizer.encode_with_special_tokens(strings))
    found = []
    for n, text in enumerate(texts):
        ids = next(encoded) if isinstance(text, str) else token_ids(f"calibration text {first + n}", text)
        invalid = [i for i in (min(ids, default=0), max(ids, default=0)) if not 0 <= i < vocabulary]
        if invalid:
            raise UserError(f"calibration text {first + n} has token {invalid[0]}; ids go from 0 to {vocabulary - 1}")
        found.append(np.array(ids, np.int32))
    return found


def _after_start(lm: LM, ids: np.ndarray) -> np.ndarray:
    """Returns the input of a decoder that predicts these ids: the start token, and all ids but the last."""
    suffix = lm.tokenizer.target.suffix if lm.tokenizer is not None else []
    start = lm.config.start_token if lm.config.start_token is not None else (*suffix, None)[-2 if suffix else -1]
    if start is None:
        raise UserError("the model names no start token of its decoder; set config.start_token")
    return np.array([start, *ids[:-1]], np.int32)


def _full_rows(examples: list[np.ndarray], length: int) -> tuple[np.ndarray, ...]:
    """Returns tokens, segments and positions of examples that follow each other through full rows, [B, T]."""
    lengths = np.array([len(ids) for ids in examples])
    total = int(lengths.sum())
    place = np.arange(total)
    begins = place % length == 0
    begins[np.cumsum(lengths)[:-1]] = True
    start = np.maximum.accumulate(np.where(begins, place, 0))
    piece = np.cumsum(begins)
    first_piece = piece[place - place % length]
    rows = np.zeros((3, -(-total // length) * length), np.int32)
    rows[:, :total] = np.concatenate(examples), piece - first_piece + 1, place - start
    return tuple(rows.reshape(3, -1, length))


def _packed_rows(examples: tuple[np.ndarray, ...], rows: Rows, length: int) -> tuple[np.ndarray, ...]:
    """Returns tokens, segments and positions of examples that `rows` places, [B, T]."""
    filled = np.zeros((3, len(rows.starts) - 1, length), np.int32)
    for r, (begin, end) in enumerate(zip(rows.starts, rows.starts[1:])):
        some = [examples[n] for n in rows.examples[begin:end]]
        lengths = np.array([len(ids) for ids in some])
        segment = np.repeat(np.arange(len(some)), lengths)
        position = np.arange(lengths.sum()) - offsets(lengths)[segment]
        filled[:, r, : len(segment)] = np.concatenate(some), segment + 1, position
    return tuple(filled)

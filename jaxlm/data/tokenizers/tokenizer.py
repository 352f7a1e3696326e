"""Conversion of text to token ids and back: loads all common tokenizer files, and trains five types of tokenizers.

The `tokenizers` library does all encoding, and its tokenizer.json is exported with a model.  Therefore a run, its
export and every program that loads the export agree on all ids.  `sentencepiece` trains "unigram" and "bpe".  Other
file formats are converted when they are read (`vocabularies`), and saved unchanged for transformers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.config import TokenizerConfig
from jaxlm.data.tokenizers import pieces, vocabularies
from jaxlm.errors import UserError
from jaxlm.storage import buckets

if TYPE_CHECKING:
    import tokenizers

_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]

# Lossless: no normalisation, no added or removed spaces, and bytes for rare characters.  Passages keep their line ends,
# so "\n\n", ".\n" and runs of spaces can become pieces.  A piece covers at most one word: pieces of several words would
# save up to 3% (unigram) or 7% (bpe) of the tokens, but training would be 16 or 5 times slower and need several times
# the memory.
_SENTENCEPIECE: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.9995,
    "max_sentence_length": 1 << 16,
    "num_threads": 8,  # fixed, so that sums over threads round alike on every machine
    "minloglevel": 3,
    **{f"{name}_id": i for i, name in enumerate(("pad", "unk", "bos", "eos"))},
    **{f"{name}_piece": piece for name, piece in zip(("pad", "unk", "bos", "eos"), _SPECIAL, strict=True)},
}
# Pieces that mix letters, punctuation and digits save bpe up to 4% of the tokens, but cost unigram 1% (measured).
_SENTENCEPIECE_BY_TYPE: dict[str, dict[str, Any]] = {
    "unigram": {},
    "bpe": {"split_by_unicode_script": False, "split_by_number": False},
}
_CLEAN_UPS = [(f" {sign}", sign) for sign in (*".?!,", "n't", "'m", "'s", "'ve", "'re")]
_CLEAN_UPS.insert(4, (" ' ", "'"))
TARGET = "target"  # subfolder with the tokenizer of target texts, if it is a separate one
_PASSAGE = 4096  # characters per training sentence of sentencepiece
# sentencepiece would treat U+2581 as a space and skip passages with U+2585 or U+0000.  These characters are removed
# from the training text, which loses nothing, because they are encoded as bytes.
_UNTRAINABLE = str.maketrans("", "", "\u2581\u2585\0")


class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids of its special tokens and the files that it was loaded from.

    The *frame* of a tokenizer is the special tokens that it puts around a text or a pair of texts.

    Attributes:
      size: the largest id + 1.
      bos, eos, pad, unk, cls, sep, mask: ids of the special tokens; None if there is no such token.
      target: the tokenizer of target texts.  It is this object itself, except for models with a separate tokenizer
        (Marian) or a different frame (mBART) for the target.
      split_special_tokens: whether a special token written in a text, such as "[SEP]", is split like other text (True)
        or encoded as that token (False, the default of transformers).  Methods that encode accept it as an argument.
      rows: number of rows in the token embedding of the model, if it is smaller than `size`; ids beyond it raise
        UserError.

    With split_special_tokens=True, the types "unigram", "bpe" and "byte_bpe" from `train` are lossless:
    decode(encode(text)) == text for all Unicode text, including U+2581.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: Mapping[str, str | None],
        files: dict[str, bytes],
        config: Mapping[str, Any] = MappingProxyType({}),
        segmenter: tokenizers.Tokenizer | None = None,
        split_special_tokens: bool = False,
        clean_up: bool = False,
    ):
        """Completes and checks a tokenizer.

        Args:
          backend: the tokenizer; special tokens that it lacks are added.
          special: "bos" ... "mask" -> the token.
          files: name -> content; `save` writes them unchanged.
          config: as in `vocabularies.ParsedTokenizer`, as are `segmenter` and `clean_up`.
          segmenter: segments texts, if `backend` only maps pieces to ids; None: `backend`.
          split_special_tokens: whether special tokens written in a text are split like other text.
          clean_up: whether decoding removes the space before punctuation.

        Raises:
          UserError: if the ids are too sparse for a vocabulary.
        """
        from tokenizers import AddedToken, models

        names = {role: token for role, token in special.items() if token and backend.token_to_id(token) is not None}
        # Adding a token again would reset its flags, such as lstrip of RoBERTa's <mask>.
        existing = {token.content for token in backend.get_added_tokens_decoder().values()}
        new = [token for token in names.values() if token not in existing]
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])
        exclude = lambda one: pieces.exclude_special_pieces(one) if isinstance(one.model, models.Unigram) else one
        backend = exclude(backend)
        pieces.check_normalizer(backend)
        self._segmenter = backend if segmenter is None else exclude(segmenter)
        for one in (backend, self._segmenter):
            one.no_truncation()
            one.no_padding()
        self.split_special_tokens, self._clean_up = split_special_tokens, clean_up
        self.rows: int | None = None
        self.backend, self.special, self.files, self.config = backend, names, files, config
        self._ids = None if segmenter is None else backend.get_vocab()
        self.separate_target = False  # whether `target` is a separate tokenizer with its own files
        self.size: int = vocabularies.vocabulary_size(backend.get_vocab(with_added_tokens=True))
        self._frames = _frames(backend.post_processor)
        self.target = self
        ids = {role: backend.token_to_id(names[role]) if role in names else None for role in vocabularies.ROLES}
        self.bos, self.eos, self.pad, self.unk = ids["bos"], ids["eos"], ids["pad"], ids["unk"]
        self.cls, self.sep, self.mask = ids["cls"], ids["sep"], ids["mask"]

    def encode(self, text: str, split_special_tokens: bool | None = None) -> list[int]:
        """Returns the ids of a text without special tokens around it; `encode_with_special_tokens` adds these.

        Args:
          text: the text.
          split_special_tokens: overrides the attribute of this name; None: its value.

        Raises:
          UserError: if the text contains a lone surrogate, or a token that the model has no embedding for.
        """
        return self.encode_batch([text], split_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], split_special_tokens: bool | None = None) -> list[list[int]]:
        """Returns `encode` of each text, in parallel on all cores."""
        encodings = self._encode(texts, split_special_tokens, self._ids is not None)
        return [self._ids_of(encoding) for encoding in encodings]

    def encode_offsets(
        self, texts: Sequence[str], split_special_tokens: bool | None = None
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Returns `encode` of each text, and the character span [start, end) of each token."""
        encodings = self._encode(texts, split_special_tokens, True)
        return [(self._ids_of(encoding), encoding.offsets) for encoding in encodings]

    def first_token_ends(self, texts: Sequence[str]) -> list[int]:
        """Returns the end of the first token of each text, in characters."""
        spans = [encoding.token_to_chars(0) for encoding in self._encode(texts, None, True)]
        return [0 if span is None else span[1] for span in spans]

    def _encode(self, texts: Sequence[str], split: bool | None, details: bool) -> list[tokenizers.Encoding]:
        """Returns the encodings of texts; without `details` they only have ids, which is faster."""
        split = self.split_special_tokens if split is None else split
        backend = self._splitting_segmenter if split else self._segmenter
        batch = backend.encode_batch if details else backend.encode_batch_fast
        texts = list(texts)
        try:
            return batch(texts, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            for text in texts:
                check_text(text)
            raise

    @cached_property
    def _splitting_segmenter(self) -> tokenizers.Tokenizer:
        """The segmenter that splits special tokens; a separate object, because threads may share the other one."""
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self._segmenter.to_str())
        backend.encode_special_tokens = True  # tokenizer.json does not contain this option
        return backend

    def _ids_of(self, encoding: tokenizers.Encoding) -> list[int]:
        vocabulary, unk = self._ids, self.unk
        if vocabulary is None or unk is None:
            return self.check_ids(encoding.ids)
        return self.check_ids([vocabulary.get(piece, unk) for piece in encoding.tokens])

    def check_ids(self, ids: list[int]) -> list[int]:
        """Returns the ids.  Raises UserError if the model has no embedding for one of them."""
        if self.rows is not None and ids and (last := max(ids)) >= self.rows:
            raise UserError(
                f"the text has the token {self.pieces([last])[0]!r} with the id {last}, but the model has {self.rows} "
                f"token embeddings for the {self.size} tokens of the tokenizer; resize the model in Python with "
                f"jaxlm.save(jaxlm.resize(lm, {self.size}), FOLDER) and use the result (--init FOLDER), or use the "
                f"tokenizer that the model was trained with"
            )
        return ids

    def for_model(self, rows: int, target_rows: int) -> Tokenizer:
        """Returns a tokenizer that rejects ids without an embedding.

        Args:
          rows: number of rows in the model's token embedding.
          target_rows: the same for target tokens.
        """
        limit = lambda side, count: count if side.size > count else None
        if (self.rows, self.target.rows) == (limit(self, rows), limit(self.target, target_rows)):
            return self
        fitted = copy.copy(self)
        fitted.rows = limit(self, rows)
        if self.target is self:
            fitted.target = fitted
        else:
            fitted.target = copy.copy(self.target)
            fitted.target.rows = limit(self.target, target_rows)
            fitted.target.target = (
                fitted.target if self.separate_target or self.target.target is self.target else fitted
            )
        return fitted

    def with_bos(self, bos: bool) -> Tokenizer:
        """Returns a tokenizer whose frame begins with BOS, or does not, and is otherwise unchanged."""
        if self.bos is None or (self.prefix == [self.bos]) == bos:
            return self
        changed = copy.copy(self)
        changed._frames = tuple([(self.bos, 0), *frame] if bos else frame[1:] for frame in self._frames)
        changed.target = changed if self.target is self else self.target
        return changed

    @property
    def prefix(self) -> list[int]:
        """The ids that the frame puts before a text, such as [BOS] or [CLS]."""
        ids = [i for i, _ in self._frames[0]]
        return ids[: ids.index(-1)]

    @property
    def suffix(self) -> list[int]:
        """The ids that the frame puts after a text, such as [EOS], [SEP] or [EOS, language]."""
        ids = [i for i, _ in self._frames[0]]
        return ids[ids.index(-1) + 1 :]

    def with_prefix(self, ids: list[int]) -> list[int]:
        """Returns the ids of a text after the frame's prefix; if both are empty, BOS, since a model needs input."""
        return self.prefix + ids or ([] if self.bos is None else [self.bos])

    def max_text_tokens(self, length: int, pair: bool) -> int:
        """Returns how many tokens of a text, or of a pair together, fit in `length` with the frame.

        Raises:
          UserError: if there is no room for a token.
        """
        special = sum(i >= 0 for i, _ in self._frames[pair])
        if length <= special:
            raise UserError(
                f"max_length is {length}; with special tokens a text has at least {special + 1} tokens; "
                f"set it to that or more"
            )
        return length - special

    def add_special_tokens(self, *parts: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Puts the frame around the ids of one text or a pair.

        Returns:
          The ids, the token type of each, and the index of the first token of each text.
        """
        ids: list[int] = []
        types: list[int] = []
        starts = [0] * len(parts)
        for i, kind in self._frames[len(parts) == 2]:
            if i < 0:
                starts[-1 - i] = len(ids)
            part = [i] if i >= 0 else parts[-1 - i]
            ids += part
            types += [kind] * len(part)
        return ids, types, starts

    def encode_with_special_tokens(
        self,
        texts: list[str],
        pairs: list[str] | None = None,
        max_length: int | None = None,
        split_special_tokens: bool | None = None,
    ) -> list[tuple[list[int], list[int]]]:
        """Encodes texts, or pairs of texts, with the special tokens that the model expects.

        BERT: `[CLS] text [SEP] pair [SEP]` with types 0 0 0 1 1; T5: `text </s>`; GPT-2: `text`.

        Args:
          texts: the texts.
          pairs: the second text of each pair; None: the texts are not pairs.
          max_length: maximum number of tokens including special ones; the longer text of a pair is truncated first.
          split_special_tokens: as in `encode`.

        Returns:
          For each text or pair, the ids and the token type of each.

        Raises:
          UserError: if `max_length` has no room for text, or the numbers of texts and pairs differ.
        """
        room = None if max_length is None else self.max_text_tokens(max_length, pairs is not None)
        if pairs is None:
            encoded = self.encode_batch(texts, split_special_tokens)
            return [self.add_special_tokens(ids if room is None else ids[:room])[:2] for ids in encoded]
        if len(pairs) != len(texts):
            raise UserError(f"there are {len(texts)} texts and {len(pairs)} pairs; give a pair for each text")
        both = zip(self.encode_batch(texts, split_special_tokens), self.encode_batch(pairs, split_special_tokens))
        return [
            self.add_special_tokens(*(parts if room is None else _truncate_pair(*parts, room)))[:2] for parts in both
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of the ids; special tokens and ids beyond the vocabulary are skipped."""
        text = self.backend.decode([int(i) for i in ids if i < self.size], skip_special_tokens=True)
        if self._clean_up:  # `clean_up_tokenization` of transformers
            for spaced, joined in _CLEAN_UPS:
                text = text.replace(spaced, joined)
        return text

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Returns the piece of each id in the vocabulary; "" for an unknown id."""
        return [self.backend.id_to_token(int(i)) or "" for i in ids]

    @cached_property
    def continues(self) -> np.ndarray:
        """Whether each id continues the word of the preceding token, for whole-word masking: bool [size].

        WordPiece marks such pieces by "##".  In other tokenizers they begin with a letter, a digit or part of a
        character, and not with a space; punctuation marks and line ends are separate words.
        """
        state = json.loads(self.backend.to_str())
        if state["model"]["type"] == "WordPiece":
            mark = state["model"]["continuing_subword_prefix"]
            return np.array([piece.startswith(mark) for piece in self.pieces(range(self.size))])
        inside, special = re.compile(r"[^\W_]|\ufffd"), self._special_ids
        return np.array([i not in special and bool(inside.match(text)) for i, text in enumerate(self._texts)])

    @cached_property
    def whole_words(self) -> dict[int, str]:
        """The word of each id that is a whole word or a punctuation mark, without the mark of the start of a word."""
        names = set(self.special.values())
        texts = {i: text.removeprefix(" ") for i, text in enumerate(self._texts) if i not in self._special_ids}
        is_word = lambda i, text: text.strip() == text != "" and text not in names and not self.continues[i]
        return {i: text for i, text in texts.items() if is_word(i, text)}

    @cached_property
    def _special_ids(self) -> set[int]:
        return {token["id"] for token in json.loads(self.backend.to_str())["added_tokens"] if token["special"]}

    @cached_property
    def _texts(self) -> list[str]:
        """The text of each id, which begins with a space if the id starts a word."""
        is_bytes = '"ByteLevel"' in json.dumps(json.loads(self.backend.to_str())["decoder"])
        return [(_decode_bytes if is_bytes else _decode_piece)(piece) for piece in self.pieces(range(self.size))]

    def save(self, folder: str | Path, max_length: int | None = None) -> None:
        """Writes the tokenizer files, which AutoTokenizer of transformers can load; loaded files are saved unchanged.

        Args:
          folder: the folder, which is created if necessary.
          max_length: maximum sequence length of the model in tokens, for a generated tokenizer_config.json.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        tokens = {f"{role}_token": token for role, token in self.special.items()}
        if "offset" in self.config:  # transformers 5 exchanges the two masks of Pegasus if a file names one of them
            del tokens["mask_token"]
        state = json.loads(self.backend.to_str())
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **self.config}
        normalizer = state["normalizer"] or {}
        if state["model"]["type"] == "WordPiece" and normalizer.get("type") == "BertNormalizer":
            config["tokenizer_class"] = self.config.get("tokenizer_class", "BertTokenizerFast")
            config["do_lower_case"] = normalizer["lowercase"]
            config["strip_accents"] = normalizer["strip_accents"]
            config["tokenize_chinese_chars"] = normalizer["handle_chinese_chars"]
        config["clean_up_tokenization_spaces"] = False
        config["model_max_length"] = max_length or int(1e30)  # 1e30 stands for "unknown" in transformers
        dump = lambda value: json.dumps(value, indent=2, ensure_ascii=False).encode()
        files = {"tokenizer_config.json": dump(config), "special_tokens_map.json": dump(tokens)}
        if not self.config:
            files["tokenizer.json"] = self.backend.to_str(pretty=True).encode()
        files |= self.files
        saved_config = json.loads(files["tokenizer_config.json"])
        if bool(saved_config.get("split_special_tokens")) != self.split_special_tokens:
            files["tokenizer_config.json"] = dump(saved_config | {"split_special_tokens": self.split_special_tokens})
        for name, content in files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(content)
        if self.separate_target:
            self.target.save(Path(folder) / TARGET, max_length)


def fingerprint(tokenizer: Tokenizer) -> str:
    """Returns a hash of a tokenizer's behaviour and files, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for side in (tokenizer, tokenizer.target) if tokenizer.separate_target else (tokenizer,):
        options = json.dumps([side.special, side.config, side.split_special_tokens], sort_keys=True, default=str)
        files = (part for name in sorted(side.files) for part in (name.encode(), side.files[name]))
        for part in (options.encode(), side.backend.to_str().encode(), *files):
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def check_text(text: Any) -> None:
    """Raises UserError if a value is not a string, or contains a lone surrogate, which cannot be encoded as UTF-8."""
    if not isinstance(text, str):
        raise UserError(f"a text is of type {type(text).__name__}, {text!r:.60}; give strings")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text {text[max(0, error.start - 20) : error.start + 20]!r} has a lone surrogate, "
            f"{text[error.start]!r}, at character {error.start}; give well-formed Unicode: "
            f"text.encode('utf-8', 'replace').decode() replaces it"
        ) from None


def _frames(processor: tokenizers.processors.PostProcessor | None) -> tuple[list[tuple[int, int]], ...]:
    """Returns the frames of a text and of a pair as (id, token type); the texts have the ids -1 and -2."""
    from tokenizers import Tokenizer, models

    probe = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    if processor is not None:
        probe.post_processor = processor
    rows = (probe.encode("a"), probe.encode("a", "b"))
    return tuple(
        [(i if text is None else -1 - text, kind) for i, text, kind in zip(row.ids, row.sequence_ids, row.type_ids)]
        for row in rows
    )


def _truncate_pair(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Truncates a pair to `room` tokens like `tokenizers`: first the longer text, then both to equal lengths."""
    if len(first) + len(second) <= room:
        return first, second
    short = min(len(first), len(second))
    long = max(short, room - short)
    if short + long > room:
        short, long = room // 2, room - room // 2
    a, b = (long, short) if len(first) > len(second) else (short, long)
    return first[:a], second[:b]


def _decode_piece(piece: str) -> str:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]).decode(errors="replace") if byte else piece.replace("\u2581", " ")


def _decode_bytes(piece: str) -> str:
    from tokenizers import decoders

    return decoders.ByteLevel().decode([piece])


def load(path: str | Path, split_special_tokens: bool | None = None) -> Tokenizer:
    """Loads a tokenizer.

    A folder may have a tokenizer.json, or the vocabulary files of any family in `vocabularies`.  The special tokens and
    the frame come from the files, else from the tokenizer_class or model_type that they name, else from common names.

    Args:
      path: a folder, or one tokenizer file, whose companion files are in the same folder.
      split_special_tokens: whether special tokens written in a text are split like other text; None: the value in
        tokenizer_config.json, by default False.

    Raises:
      UserError: for missing, damaged or inconsistent files.
    """
    file = vocabularies.find(Path(buckets.download(str(path))))
    with vocabularies.wrap_errors(file):
        parsed = vocabularies.read(file)
        split = parsed.split_special_tokens if split_special_tokens is None else split_special_tokens
        make = lambda side: Tokenizer(
            side.backend, parsed.special, parsed.files, parsed.config, side.segmenter, split, parsed.clean_up
        )
        tokenizer = make(parsed)
        if isinstance(parsed.target, vocabularies.ParsedTokenizer):
            tokenizer.target = make(parsed.target)
        elif parsed.target is not None:
            tokenizer.target = copy.copy(tokenizer)
            tokenizer.target.target, tokenizer.target._frames = tokenizer.target, _frames(parsed.target)
        if file.parent.joinpath(TARGET).is_dir():
            tokenizer.target, tokenizer.separate_target = load(file.parent / TARGET, split), True
        for side in (tokenizer, tokenizer.target):  # files that can be parsed may still fail in use
            side.decode(side.encode_with_special_tokens([f"Aa 1\t\u20ac\U0001f600{chr(0x10FFFD)}"])[0][0])
    return tokenizer


def train(
    texts: Iterable[str], config: TokenizerConfig, vocabulary: int, *, add_bos: bool = False, add_eos: bool = False
) -> Tokenizer:
    """Trains a tokenizer; the same texts in the same order give the same tokenizer.

    The first ids are special tokens: [PAD] [UNK] [CLS] [SEP] [MASK] for wordpiece, <pad> <unk> <s> </s> for the others.

    Args:
      texts: the training texts.
      config: options; `config.train` is the type.  "unigram" (Kudo 2018) and "bpe" (Sennrich et al. 2016) consist of
        characters, with bytes for rare ones; "byte_bpe" consists of bytes, as in GPT-2; "wordpiece" is BERT's and not
        lossless; "characters" has one id per character.
      vocabulary: number of ids; "characters" uses only as many as it needs.
      add_bos: whether the frame puts `<s>` before each text, as for decoders.
      add_eos: whether the frame puts `</s>` after each text, as for encoder-decoders.

    Raises:
      UserError: if there is no text, or `vocabulary` is too small or too large for the text; the message has the
        nearest possible size.
    """
    split = bool(config.split_special_tokens)
    kind, sentinels = config.train, [f"<extra_id_{i}>" for i in range(config.sentinels)]
    if not 0 <= config.sentinels < vocabulary:
        raise UserError(f"tokenizer.sentinels is {config.sentinels}; it must be from 0 to {vocabulary - 1}")
    vocabulary -= len(sentinels)
    texts = iter(texts)
    first = next((text for text in texts if text.strip()), None)
    if first is None:
        raise UserError("there is no text to train a tokenizer on; give data with text in --data.path")
    texts = (text for part in ((first,), texts) for text in part)
    if kind in _SENTENCEPIECE_BY_TYPE:
        model = _train_sentencepiece(texts, kind, vocabulary)
        backend = pieces.convert(pieces.parse_model(model), lossless=True)
        parts = _add_special(backend, add_bos, add_eos, sentinels)
        return Tokenizer(*parts, files={"tokenizer.model": model}, split_special_tokens=split)
    make = {"byte_bpe": _train_byte_bpe, "wordpiece": _train_wordpiece, "characters": _train_characters}[kind]
    parts = _add_special(make(texts, config, vocabulary), add_bos, add_eos, sentinels)
    tokenizer = Tokenizer(*parts, files={}, split_special_tokens=split)
    vocabulary += len(sentinels)
    if tokenizer.size > vocabulary or (tokenizer.size < vocabulary and kind != "characters"):
        raise _size_error(kind, vocabulary, tokenizer.size)
    return tokenizer


def train_both(
    sources: Iterable[str], targets: Iterable[str], config: TokenizerConfig, sizes: tuple[int, int]
) -> Tokenizer:
    """Trains separate tokenizers for sources and targets; the latter becomes `target` of the former.

    Args:
      sources: the source texts.
      targets: the target texts.
      config: as in `train`.
      sizes: number of ids for sources and for targets.
    """
    tokenizer, target = (
        train(texts, config, size, add_eos=True) for texts, size in zip((sources, targets), sizes, strict=True)
    )
    tokenizer.target, tokenizer.separate_target = target, True
    return tokenizer


def _add_special(
    backend: tokenizers.Tokenizer, add_bos: bool, add_eos: bool, sentinels: list[str]
) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
    backend.add_special_tokens(sentinels)  # they get the next ids
    special = vocabularies.special_tokens(backend)
    if add_bos or add_eos:
        frame = vocabularies.bos_eos_frame(
            add_bos and special["bos"] is not None, add_eos and special["eos"] is not None
        )
        vocabularies.set_frame(backend, frame, special)
    return backend, special


def _size_error(kind: str, vocabulary: int, possible: int) -> UserError:
    limit = "needs at least" if possible > vocabulary else "gets from this text at most"
    return UserError(
        f"the vocabulary is {vocabulary}; a {kind} tokenizer {limit} {possible} ids; "
        f"set --model.vocabulary {possible} or another --tokenizer.train"
    )


def _train_sentencepiece(texts: Iterable[str], kind: str, vocabulary: int) -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_passages(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocabulary,
            **_SENTENCEPIECE,
            **_SENTENCEPIECE_BY_TYPE[kind],
        )
    except RuntimeError as error:
        possible = re.search(r"required_chars\. \d+ vs (\d+)|value <= (\d+)", str(error))
        if possible:
            raise _size_error(kind, vocabulary, int(possible[1] or possible[2])) from None
        raise UserError(f"sentencepiece cannot train on this text: {error}; set another --tokenizer.train") from None
    return model.getvalue()


def _passages(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        text = text.translate(_UNTRAINABLE)
        yield from (text[i : i + _PASSAGE] for i in range(0, len(text), _PASSAGE))


def _train_byte_bpe(texts: Iterable[str], config: TokenizerConfig, vocabulary: int) -> tokenizers.Tokenizer:
    from tokenizers import models, pre_tokenizers, trainers

    backend = vocabularies.byte_level(models.BPE())
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=_SPECIAL, initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _train_wordpiece(texts: Iterable[str], config: TokenizerConfig, vocabulary: int) -> tokenizers.Tokenizer:
    from tokenizers import models, trainers

    texts = list(texts)

    def learn(size: int, first: list[str]) -> list[str]:
        backend = vocabularies.wordpiece(models.WordPiece(unk_token="[UNK]"), config.lowercase)
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
        backend.train_from_iterator(texts, trainer)
        ids = backend.get_vocab()
        return sorted(ids, key=lambda piece: ids[piece])

    # The trainer numbers "##a", "##b" ... in the order of a hash table, which differs between processes, and breaks
    # ties between merges by these numbers.  Therefore a first round finds the letters, and a second gets them in order.
    letters = sorted(set(learn(0, _BERT)) - set(_BERT))
    ids = {piece: i for i, piece in enumerate(learn(vocabulary, _BERT + letters))}
    backend = vocabularies.wordpiece(models.WordPiece(ids, unk_token="[UNK]"), config.lowercase)
    bert = vocabularies.TOKENIZER_SPECS["bert"]
    if bert.frame:
        vocabularies.set_frame(backend, bert.frame, bert.special)
    return backend


def _train_characters(texts: Iterable[str], config: TokenizerConfig, vocabulary: int) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = set[str]().union(*texts)
    ids = {piece: i for i, piece in enumerate([*_SPECIAL, *sorted(characters)])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend

"""Text to ids and back: load every common tokenizer file, train five kinds, save what transformers loads as it is.

One implementation encodes: the `tokenizers` library, whose tokenizer.json is the file that goes out with a model.  So a
run, its export and whoever loads the export agree on every id by construction.  `sentencepiece` trains "unigram" and
"bpe".  What other files hold is translated when it is read (`vocabularies`); the files themselves are kept beside.
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

# Lossless: no normalization, no added or removed space, bytes for what is rare.  Passages keep their line ends, so that
# "\n\n" and ".\n" become pieces, as does a run of spaces.  A piece begins at most one word: pieces of several words
# would save up to 3% (unigram) or 7% (bpe) of the tokens, but train 16 or 5 times slower and need several times the
# memory.
_SENTENCEPIECE: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.9995,
    "max_sentence_length": 1 << 16,
    "num_threads": 8,  # fixed: sums over threads round alike on every machine
    "minloglevel": 3,
    **{f"{name}_id": i for i, name in enumerate(("pad", "unk", "bos", "eos"))},
    **{f"{name}_piece": piece for name, piece in zip(("pad", "unk", "bos", "eos"), _SPECIAL, strict=True)},
}
# Letters beside signs and digits in one piece save bpe up to 4% of its tokens, and cost unigram 1% (measured).
_OF_KIND: dict[str, dict[str, Any]] = {
    "unigram": {},
    "bpe": {"split_by_unicode_script": False, "split_by_number": False},
}
_CLEANED = [(f" {sign}", sign) for sign in (*".?!,", "n't", "'m", "'s", "'ve", "'re")]
_CLEANED.insert(4, (" ' ", "'"))
TARGET = "target"  # folder below a tokenizer with the one of target texts, where it is another
_PASSAGE = 4096  # characters that sentencepiece sees at once
# sentencepiece would take U+2581 for a space and skip a passage with U+2585 or U+0000; to leave them out of training
# loses nothing, since they are spelled in bytes.
_RESERVED = str.maketrans("", "", "\u2581\u2585\0")


class Tokenizer:
    """A `tokenizers.Tokenizer`, the ids of its special tokens, and the files that it came from.

    size: the largest id + 1.
    bos, eos, pad, unk, cls, sep, mask: ids of the special tokens, None where there is none.
    target: what encodes the target text of a translation: itself but for models that have another tokenizer (Marian)
    or another frame (mBART) for it.
    split_special_tokens: whether a special token that is written in a text, such as "[SEP]", is spelled like other text
    (True) or is that token (False, the default of transformers).  Each method that encodes takes it as an argument too.
    rows: number of rows in the token table of the model that reads the ids, where it is smaller than `size`; then an
    id beyond it raises UserError.

    With split_special_tokens=True the kinds "unigram", "bpe" and "byte_bpe" that `train` makes are lossless:
    decode(encode(text)) == text for all Unicode, U+2581 included.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: Mapping[str, str | None],
        files: dict[str, bytes],
        config: Mapping[str, Any] = MappingProxyType({}),
        divide: tokenizers.Tokenizer | None = None,
        split_special_tokens: bool = False,
        clean_up: bool = False,
    ):
        """`special`: "bos" ... "mask" -> its token; `files`: name -> content, written by `save` unchanged.

        `config`, `divide`, `clean_up`: as in `vocabularies.Read`.

        Raises UserError for ids too far apart to be a vocabulary's.
        """
        from tokenizers import AddedToken, models

        names = {role: token for role, token in special.items() if token and backend.token_to_id(token) is not None}
        # To add a token again would replace its flags, such as that RoBERTa's <mask> takes the space before it.
        there = {token.content for token in backend.get_added_tokens_decoder().values()}
        new = [token for token in names.values() if token not in there]
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])
        spell = lambda made: pieces.spelled(made) if isinstance(made.model, models.Unigram) else made
        backend = spell(backend)
        pieces.check_normalizer(backend)
        self._divide = backend if divide is None else spell(divide)
        for made in (backend, self._divide):
            made.no_truncation()
            made.no_padding()
        self.split_special_tokens, self._clean_up = split_special_tokens, clean_up
        self.rows: int | None = None
        self.backend, self.special, self.files, self.config = backend, names, files, config
        self._ids = None if divide is None else backend.get_vocab()
        self.apart = False  # whether `target` is another tokenizer, with files of its own
        self.size: int = vocabularies.size_of(backend.get_vocab(with_added_tokens=True))
        self._frames = _frames(backend.post_processor)
        self.target = self
        ids = {role: backend.token_to_id(names[role]) if role in names else None for role in vocabularies.ROLES}
        self.bos, self.eos, self.pad, self.unk = ids["bos"], ids["eos"], ids["pad"], ids["unk"]
        self.cls, self.sep, self.mask = ids["cls"], ids["sep"], ids["mask"]

    def encode(self, text: str, split_special_tokens: bool | None = None) -> list[int]:
        """Returns the ids of the text, without the special tokens around it: see `frame` for these.

        Args:
            text: the text.
            split_special_tokens: as the attribute of this name; None: its value.

        Raises:
            UserError: for a text with half a surrogate pair, and for an id that the model has no row for.
        """
        return self.encode_batch([text], split_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], split_special_tokens: bool | None = None) -> list[list[int]]:
        """Returns `encode` of each text, on all cores."""
        return [self._numbers(divided) for divided in self._divided(texts, split_special_tokens, self._ids is not None)]

    def encode_offsets(
        self, texts: Sequence[str], split_special_tokens: bool | None = None
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Returns `encode` of each text, and the characters [start, end) of the text that each token stands for."""
        divided = self._divided(texts, split_special_tokens, True)
        return [(self._numbers(one), one.offsets) for one in divided]

    def first_ends(self, texts: Sequence[str]) -> list[int]:
        """Returns the place in each text, in characters, where its first token ends."""
        spans = [one.token_to_chars(0) for one in self._divided(texts, None, True)]
        return [0 if span is None else span[1] for span in spans]

    def _divided(self, texts: Sequence[str], split: bool | None, whole: bool) -> list[tokenizers.Encoding]:
        """The encodings of texts; without `whole` they have ids alone, which is faster."""
        split = self.split_special_tokens if split is None else split
        backend = self._splitting if split else self._divide
        batch = backend.encode_batch if whole else backend.encode_batch_fast
        texts = list(texts)
        try:
            return batch(texts, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            for text in texts:
                check_text(text)
            raise

    @cached_property
    def _splitting(self) -> tokenizers.Tokenizer:
        """The tokenizer that spells special tokens: an object of its own, since threads may share the other."""
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self._divide.to_str())
        backend.encode_special_tokens = True  # not kept in tokenizer.json
        return backend

    def _numbers(self, divided: tokenizers.Encoding) -> list[int]:
        ids, unk = self._ids, self.unk
        found = divided.ids if ids is None or unk is None else [ids.get(piece, unk) for piece in divided.tokens]
        return found if self.rows is None else self.checked(found)

    def checked(self, ids: list[int]) -> list[int]:
        """Returns the ids.  Raises UserError for one that the model has no row for."""
        if self.rows is not None and ids and (last := max(ids)) >= self.rows:
            raise UserError(
                f"the text has the token {self.pieces([last])[0]!r} with the id {last}, but the model has {self.rows} "
                f"rows for tokens and its tokenizer {self.size} tokens; give the model a row for each in Python, "
                f"jaxlm.save(jaxlm.resize(lm, {self.size}), FOLDER), and use that model (--init FOLDER), or use the "
                f"tokenizer that the model was trained with"
            )
        return ids

    def for_model(self, rows: int, target_rows: int) -> Tokenizer:
        """Returns the tokenizer for a model with these numbers of rows for source and target tokens.

        It refuses ids that the model has no row for.
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
            fitted.target.target = fitted.target if self.apart or self.target.target is self.target else fitted
        return fitted

    def framed_with(self, bos: bool) -> Tokenizer:
        """Returns the tokenizer with, or without, BOS before each text and pair, whatever its own frame says."""
        if self.bos is None or (self.prefix == [self.bos]) == bos:
            return self
        framed = copy.copy(self)
        begin = [(self.bos, 0)]
        framed._frames = tuple(begin + frame if bos else frame[1:] for frame in self._frames)
        framed.target = framed if self.target is self else self.target
        return framed

    @property
    def prefix(self) -> list[int]:
        """The ids that the frame puts before a text: [BOS], [CLS] or none."""
        ids = [i for i, _ in self._frames[0]]
        return ids[: ids.index(-1)]

    @property
    def suffix(self) -> list[int]:
        """The ids that the frame puts after a text: [EOS], [SEP], [EOS, language] or none."""
        ids = [i for i, _ in self._frames[0]]
        return ids[ids.index(-1) + 1 :]

    def begun(self, ids: list[int]) -> list[int]:
        """Returns the ids of a text behind the frame's prefix; BOS where that is none, since a model has to read."""
        whole = self.prefix + ids
        return whole or ([] if self.bos is None else [self.bos])

    def room(self, length: int, pair: bool) -> int:
        """Tokens of a text, or of a text and its pair together, that `length` has place for beside the special ones.

        Raises UserError where that is none.
        """
        around = sum(i >= 0 for i, _ in self._frames[pair])
        if length <= around:
            raise UserError(
                f"max_length is {length}; with special tokens a text has at least {around + 1} tokens; "
                f"set it to that or more"
            )
        return length - around

    def wrap(self, *parts: list[int]) -> tuple[list[int], list[int], list[int]]:
        """The ids of one or two texts with the special tokens around them, token types, and where each text begins."""
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

    def frame(
        self,
        texts: list[str],
        pairs: list[str] | None = None,
        max_length: int | None = None,
        split_special_tokens: bool | None = None,
    ) -> list[tuple[list[int], list[int]]]:
        """(ids, token types) of each text, or text and pair, with the special tokens that the model expects.

        max_length: tokens to keep, special ones included; of a text and its pair, the longer loses its end first.
        split_special_tokens: as in `encode`.
        BERT: `[CLS] text [SEP] pair [SEP]` with types 0 0 0 1 1; T5: `text </s>`; GPT-2: `text`.

        Raises UserError where `max_length` has no room for text, or texts and pairs are not as many.
        """
        room = None if max_length is None else self.room(max_length, pairs is not None)
        if pairs is None:
            encoded = self.encode_batch(texts, split_special_tokens)
            return [self.wrap(ids if room is None else ids[:room])[:2] for ids in encoded]
        if len(pairs) != len(texts):
            raise UserError(f"there are {len(texts)} texts and {len(pairs)} pairs; give a pair for each text")
        both = zip(self.encode_batch(texts, split_special_tokens), self.encode_batch(pairs, split_special_tokens))
        return [self.wrap(*(parts if room is None else _cut(*parts, room)))[:2] for parts in both]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; special tokens, and ids past the vocabulary, are skipped."""
        text = self.backend.decode([int(i) for i in ids if i < self.size], skip_special_tokens=True)
        if self._clean_up:  # `clean_up_tokenization` of transformers
            for spaced, joined in _CLEANED:
                text = text.replace(spaced, joined)
        return text

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Each id as the vocabulary spells it; "" for an id that the vocabulary does not have."""
        return [self.backend.id_to_token(int(i)) or "" for i in ids]

    @cached_property
    def continues(self) -> np.ndarray:
        """bool [size]: True for the ids that continue the word of the id before, as whole-word masking needs it.

        WordPiece marks them (##).  Elsewhere they begin with a letter, a digit or a part of a character, and not with
        the mark of a space: signs and line ends are words of their own.
        """
        described = json.loads(self.backend.to_str())
        pieces = self.pieces(range(self.size))
        if described["model"]["type"] == "WordPiece":
            mark = described["model"]["continuing_subword_prefix"]
            return np.array([piece.startswith(mark) for piece in pieces])
        spell = _spell_bytes if '"ByteLevel"' in json.dumps(described["decoder"]) else _spell
        special = {token["id"] for token in described["added_tokens"] if token["special"]}
        inside = re.compile(r"[^\W_]|\ufffd")
        return np.array([i not in special and bool(inside.match(spell(piece))) for i, piece in enumerate(pieces)])

    def save(self, folder: str | Path, max_length: int | None = None) -> None:
        """Writes files that transformers' AutoTokenizer loads as they are, those it was loaded from unchanged.

        max_length: longest sequence of the model, in tokens, for a tokenizer_config.json that has to be made.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        tokens = {f"{role}_token": token for role, token in self.special.items()}
        described = json.loads(self.backend.to_str())
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **self.config}
        normalizer = described["normalizer"] or {}
        if described["model"]["type"] == "WordPiece" and normalizer.get("type") == "BertNormalizer":
            config["tokenizer_class"] = "BertTokenizerFast"
            config["do_lower_case"] = normalizer["lowercase"]
            config["strip_accents"] = normalizer["strip_accents"]
            config["tokenize_chinese_chars"] = normalizer["handle_chinese_chars"]
        config["clean_up_tokenization_spaces"] = False
        config["model_max_length"] = max_length or int(1e30)  # 1e30: transformers' own "not known"
        made = {
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
            "special_tokens_map.json": json.dumps(tokens, indent=2, ensure_ascii=False).encode(),
        }
        if not self.config:
            made["tokenizer.json"] = self.backend.to_str(pretty=True).encode()
        files = made | self.files
        kept = json.loads(files["tokenizer_config.json"])
        if bool(kept.get("split_special_tokens")) != self.split_special_tokens:
            kept["split_special_tokens"] = self.split_special_tokens
            files["tokenizer_config.json"] = json.dumps(kept, indent=2, ensure_ascii=False).encode()
        for name, content in files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(content)
        if self.apart:
            self.target.save(Path(folder) / TARGET, max_length)


def fingerprint(tokenizer: Tokenizer) -> str:
    """Returns 16 hexadecimal digits that change with what a tokenizer does or says of itself."""
    digest = hashlib.sha256()
    for side in (tokenizer, tokenizer.target) if tokenizer.apart else (tokenizer,):
        described = json.dumps([side.special, side.config, side.split_special_tokens], sort_keys=True, default=str)
        files = (part for name in sorted(side.files) for part in (name.encode(), side.files[name]))
        for part in (described.encode(), side.backend.to_str().encode(), *files):
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def check_text(text: Any) -> None:
    """Raises UserError for what is no text, or has half a surrogate pair, which no encoding of Unicode can hold."""
    if not isinstance(text, str):
        raise UserError(f"a text is a {type(text).__name__}, {text!r:.60}; give strings")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text {text[max(0, error.start - 20) : error.start + 20]!r} has half a surrogate pair, "
            f"{text[error.start]!r}, at character {error.start}; give well-formed Unicode: "
            f"text.encode('utf-8', 'replace').decode() replaces it"
        ) from None


def _frames(processor: tokenizers.processors.PostProcessor | None) -> tuple[list[tuple[int, int]], ...]:
    """What stands around a text, and around a pair: (id, token type), the texts as the ids -1 and -2."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    if processor is not None:
        words.post_processor = processor
    rows = (words.encode("a"), words.encode("a", "b"))
    return tuple(
        [(i if text is None else -1 - text, kind) for i, text, kind in zip(row.ids, row.sequence_ids, row.type_ids)]
        for row in rows
    )


def _cut(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Both within `room` tokens, the longer cut to the other's length before both are, as `tokenizers` does."""
    if len(first) + len(second) <= room:
        return first, second
    short = min(len(first), len(second))
    long = max(short, room - short)
    if short + long > room:
        short, long = room // 2, room - room // 2
    a, b = (long, short) if len(first) > len(second) else (short, long)
    return first[:a], second[:b]


def _spell(piece: str) -> str:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]).decode(errors="replace") if byte else piece.replace("\u2581", " ")


def _spell_bytes(piece: str) -> str:
    from tokenizers import decoders

    return decoders.ByteLevel().decode([piece])


def load(path: str | Path, split_special_tokens: bool | None = None) -> Tokenizer:
    """The tokenizer of a folder, or of one file and those that belong to it.

    split_special_tokens: whether special tokens that are written in a text are spelled like other text; None: as
    `tokenizer_config.json` says, else no.

    Of a folder: tokenizer.json, else the vocabulary files of any family that `vocabularies` knows.  Special tokens and
    frame are those that the files name, else those of the tokenizer_class or model_type that they name, else usual
    ones.  Raises UserError for a missing, broken or unfitting file.
    """
    file = vocabularies.find(Path(buckets.brought(str(path))))
    with vocabularies.readable(file):
        read = vocabularies.read(file)
        split = read.split_special_tokens if split_special_tokens is None else split_special_tokens
        make = lambda side: Tokenizer(
            side.backend, read.special, read.files, read.config, side.divide, split, read.clean_up
        )
        tokenizer = make(read)
        if isinstance(read.target, vocabularies.Read):
            tokenizer.target = make(read.target)
        elif read.target is not None:
            tokenizer.target = copy.copy(tokenizer)
            tokenizer.target.target, tokenizer.target._frames = tokenizer.target, _frames(read.target)
        if file.parent.joinpath(TARGET).is_dir():
            tokenizer.target, tokenizer.apart = load(file.parent / TARGET, split), True
        for side in (tokenizer, tokenizer.target):  # what parses may still fail at work
            side.decode(side.frame([f"Aa 1\t\u20ac\U0001f600{chr(0x10FFFD)}"])[0][0])
    return tokenizer


def train(
    texts: Iterable[str], config: TokenizerConfig, vocabulary: int, *, begun: bool = False, ended: bool = False
) -> Tokenizer:
    """A tokenizer of `vocabulary` ids, learnt from texts; the same texts in the same order give the same one.

    begun: `<s>` stands before each text that is framed, as a decoder reads it.
    ended: `</s>` stands after each text that is framed, as an encoder-decoder reads and writes it.

    `config.train` is the kind.  "unigram" (Kudo 2018) and "bpe" (Sennrich et al. 2016) over characters, rare ones in
    bytes; "byte_bpe" over bytes, as in GPT-2; "wordpiece" as in BERT, not lossless; "characters", one id for each seen.
    Special tokens come first: [PAD] [UNK] [CLS] [SEP] [MASK] of wordpiece, <pad> <unk> <s> </s> of the others.

    Raises UserError, with the nearest size that works, when `vocabulary` is too small or more than the text gives
    ("characters" takes as many ids as it needs).
    """
    split = bool(config.split_special_tokens)
    kind, sentinels = config.train, [f"<extra_id_{i}>" for i in range(config.sentinels)]
    if not 0 <= config.sentinels < vocabulary:
        raise UserError(f"tokenizer.sentinels is {config.sentinels}; it must lie in 0 to {vocabulary - 1}")
    vocabulary -= len(sentinels)
    texts = iter(texts)
    first = next((text for text in texts if text.strip()), None)
    if first is None:
        raise UserError("there is no text to train a tokenizer on; give data with text in --data.path")
    texts = (text for part in ((first,), texts) for text in part)
    if kind in _OF_KIND:
        model = _train_sentencepiece(texts, kind, vocabulary)
        proto = pieces.parsed(model)
        backend = pieces.translated(proto, pieces.pieces_of(proto), lossless=True)
        parts = _with_special(backend, begun, ended, sentinels)
        return Tokenizer(*parts, files={"tokenizer.model": model}, split_special_tokens=split)
    make = {"byte_bpe": _train_byte_bpe, "wordpiece": _train_wordpiece, "characters": _train_characters}[kind]
    parts = _with_special(make(texts, config, vocabulary), begun, ended, sentinels)
    tokenizer = Tokenizer(*parts, files={}, split_special_tokens=split)
    vocabulary += len(sentinels)
    if tokenizer.size > vocabulary or (tokenizer.size < vocabulary and kind != "characters"):
        raise _wrong_size(kind, vocabulary, tokenizer.size)
    return tokenizer


def train_both(
    sources: Iterable[str], targets: Iterable[str], config: TokenizerConfig, sizes: tuple[int, int]
) -> Tokenizer:
    """A tokenizer of sources with one of targets as its `target`, of as many ids as `sizes` says."""
    tokenizer, target = (
        train(texts, config, size, ended=True) for texts, size in zip((sources, targets), sizes, strict=True)
    )
    tokenizer.target, tokenizer.apart = target, True
    return tokenizer


def _with_special(
    backend: tokenizers.Tokenizer, begun: bool, ended: bool, sentinels: list[str]
) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
    backend.add_special_tokens(sentinels)  # with the next ids
    special = vocabularies.special(backend)
    frame = vocabularies.frame_of(begun and special["bos"] is not None, ended and special["eos"] is not None)
    if (begun or ended) and (around := vocabularies.processor(backend, frame, special)):
        backend.post_processor = around
    return backend, special


def _wrong_size(kind: str, vocabulary: int, works: int) -> UserError:
    limit = "needs at least" if works > vocabulary else "gets from this text at most"
    return UserError(
        f"the vocabulary is {vocabulary}; a {kind} tokenizer {limit} {works} ids; "
        f"set --model.vocabulary {works} or another --tokenizer.train"
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
            **_OF_KIND[kind],
        )
    except RuntimeError as error:
        works = re.search(r"required_chars\. \d+ vs (\d+)|value <= (\d+)", str(error))
        if works:
            raise _wrong_size(kind, vocabulary, int(works[1] or works[2])) from None
        raise UserError(f"sentencepiece cannot train on this text: {error}; set another --tokenizer.train") from None
    return model.getvalue()


def _passages(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        text = text.translate(_RESERVED)
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

    # The trainer numbers "##a", "##b" ... in the order of a hash table that is new in each process, and breaks ties
    # between merges by these numbers.  So a first round finds the letters and a second is given them in order.
    letters = sorted(set(learn(0, _BERT)) - set(_BERT))
    ids = {piece: i for i, piece in enumerate(learn(vocabulary, _BERT + letters))}
    backend = vocabularies.wordpiece(models.WordPiece(ids, unk_token="[UNK]"), config.lowercase)
    bert = vocabularies.KINDS["bert"]
    if bert.frame and (around := vocabularies.processor(backend, bert.frame, bert.special)):
        backend.post_processor = around
    return backend


def _train_characters(texts: Iterable[str], config: TokenizerConfig, vocabulary: int) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    ids = {piece: i for i, piece in enumerate([*_SPECIAL, *sorted(seen)])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend

"""Text to ids and back: load every common tokenizer file, train five kinds, save what transformers loads as it is.

One implementation encodes: the `tokenizers` library, whose tokenizer.json is the file that goes out with a model.  So a
run, its export and whoever loads the export agree on every id by construction.  `sentencepiece` trains "unigram" and
"bpe", and its .model files are translated when they are read; the file itself is kept beside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.config import TokenizerConfig
from jaxlm.errors import UserError

if TYPE_CHECKING:
    import tokenizers

# What a special token is called where no file beside the vocabulary says so, the likeliest name first.
_KNOWN = {
    "bos": ("<s>", "<bos>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}
_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")
_CARRIED: tuple[str, ...] = ("tokenizer.json", *_BESIDE, "added_tokens.json", "chat_template.jinja")
_CARRIED += ("vocab.txt", "vocab.json")
_CARRIED += ("merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

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
_PASSAGE = 4096  # characters that sentencepiece sees at once
# sentencepiece would take U+2581 for a space and skip a passage with U+2585 or U+0000; to leave them out of training
# loses nothing, since they are spelled in bytes.
_RESERVED = str.maketrans("", "", "\u2581\u2585\0")


class Tokenizer:
    """A `tokenizers.Tokenizer`, the ids of its special tokens, and the files that it came from.

    size: the largest id + 1.
    bos, eos, pad, unk, cls, sep, mask: ids of the special tokens, None where there is none.

    Text never becomes a special token: "</s>" or "[MASK]" in a document is spelled like other text.  The kinds
    "unigram", "bpe" and "byte_bpe" that `train` makes are lossless: decode(encode(text)) == text for all Unicode,
    U+2581 included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, str | None], files: dict[str, bytes]):
        """`special`: "bos" ... "mask" -> its token; `files`: name -> content, written by `save` unchanged."""
        from tokenizers import AddedToken

        names = {role: token for role, token in special.items() if token and backend.token_to_id(token) is not None}
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in names.values()])
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # not kept in tokenizer.json
        self.backend, self.special, self.files = backend, names, files
        self.size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        ids: dict[str, int | None] = {r: backend.token_to_id(names[r]) if r in names else None for r in _KNOWN}
        self.bos, self.eos, self.pad, self.unk = ids["bos"], ids["eos"], ids["pad"], ids["unk"]
        self.cls, self.sep, self.mask = ids["cls"], ids["sep"], ids["mask"]

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens around it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; special tokens, and ids past the vocabulary, are skipped."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

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
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
        if described["model"]["type"] == "WordPiece":
            normalizer = described["normalizer"]
            config["tokenizer_class"] = "BertTokenizerFast"
            config["do_lower_case"] = normalizer["lowercase"]
            config["strip_accents"] = normalizer["strip_accents"]
            config["tokenize_chinese_chars"] = normalizer["handle_chinese_chars"]
        config["clean_up_tokenization_spaces"] = False
        config["model_max_length"] = max_length or int(1e30)  # 1e30: transformers' own "not known"
        made = {
            "tokenizer.json": self.backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
            "special_tokens_map.json": json.dumps(tokens, indent=2, ensure_ascii=False).encode(),
        }
        for name, content in (made | self.files).items():
            (Path(folder) / name).write_bytes(content)


def _spell(piece: str) -> str:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]).decode(errors="replace") if byte else piece.replace("\u2581", " ")


def _spell_bytes(piece: str) -> str:
    from tokenizers import decoders

    return decoders.ByteLevel().decode([piece])


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a file (tokenizer.json, vocab.txt, vocab.json with merges.txt beside it, .model) or a folder.

    Special tokens are those that tokenizer_config.json or special_tokens_map.json beside it name, else well-known ones
    of the vocabulary.  Raises UserError for a missing or broken file.
    """
    file = _find(Path(path))
    beside = _beside(file)
    try:
        if file.suffix == ".model":
            backend, files = _from_sentencepiece(file.read_bytes()), {"tokenizer.model": file.read_bytes()}
        elif file.suffix == ".txt":
            backend, files = _from_vocab_txt(file, beside.get("do_lower_case")), {"vocab.txt": file.read_bytes()}
        elif file.name.endswith("vocab.json"):
            merges = file.with_name(file.name.replace("vocab.json", "merges.txt"))
            if not merges.is_file():
                raise UserError(f"{file} needs its merges, and there is no {merges}; put merges.txt beside it")
            backend = _from_merges(file, merges)
            files = {"vocab.json": file.read_bytes(), "merges.txt": merges.read_bytes()}
        else:
            from tokenizers import Tokenizer as Backend

            backend = Backend.from_str(file.read_text(encoding="utf-8"))
            kept = (file.with_name(name) for name in _CARRIED[1:])
            files = {"tokenizer.json": file.read_bytes()} | {f.name: f.read_bytes() for f in kept if f.is_file()}
    except UserError:
        raise
    except Exception as error:  # (both libraries raise bare exceptions for what they cannot parse)
        raise UserError(f"{file} is no readable tokenizer ({str(error).strip()[:200]}); copy it again") from None
    return Tokenizer(backend, _special(backend, beside), files)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"there is no tokenizer file or folder {str(path)!r}; set --tokenizer.path")
    for pattern in ("tokenizer.json", "tokenizer.model", "*.model", "vocab.txt", "vocab.json"):
        found = sorted(path.glob(pattern))
        if found:
            return found[0]
    raise UserError(
        f"the folder {path} holds no tokenizer.json, .model, vocab.txt or vocab.json; "
        f"set --tokenizer.path to a folder or file with a tokenizer"
    )


def _beside(file: Path) -> dict[str, Any]:
    """What the files of transformers beside a vocabulary say; the first of them wins."""
    said: dict[str, Any] = {}
    for name in reversed(_BESIDE):
        other = file.with_name(name)
        if other.is_file():
            try:
                said |= json.loads(other.read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise UserError(f"{other} is not a JSON object ({error}); correct or remove it") from None
    return said


def _special(backend: tokenizers.Tokenizer, beside: dict[str, Any]) -> dict[str, str | None]:
    special = {}
    for role, names in _KNOWN.items():
        known = next((name for name in names if backend.token_to_id(name) is not None), None)
        token = beside.get(f"{role}_token", known)
        special[role] = token["content"] if isinstance(token, dict) else token
    return special


def train(texts: Iterable[str], config: TokenizerConfig, vocabulary: int) -> Tokenizer:
    """A tokenizer of `vocabulary` ids, learnt from texts; the same texts in the same order give the same one.

    `config.train` is the kind.  "unigram" (Kudo 2018) and "bpe" (Sennrich et al. 2016) over characters, rare ones in
    bytes; "byte_bpe" over bytes, as in GPT-2; "wordpiece" as in BERT, not lossless; "characters", one id for each seen.
    Special tokens come first: [PAD] [UNK] [CLS] [SEP] [MASK] of wordpiece, <pad> <unk> <s> </s> of the others.

    Raises UserError, with the nearest size that works, when `vocabulary` is too small or more than the text gives
    ("characters" takes as many ids as it needs).
    """
    kind = config.train
    texts = iter(texts)
    first = next((text for text in texts if text.strip()), None)
    if first is None:
        raise UserError("there is no text to train a tokenizer on; give data with text in --data.path")
    texts = (text for part in ((first,), texts) for text in part)
    if kind in _OF_KIND:
        model = _train_sentencepiece(texts, kind, vocabulary)
        return Tokenizer(*_with_known(_from_sentencepiece(model)), files={"tokenizer.model": model})
    make = {"byte_bpe": _train_byte_bpe, "wordpiece": _train_wordpiece, "characters": _train_characters}[kind]
    tokenizer = Tokenizer(*_with_known(make(texts, config, vocabulary)), files={})
    if tokenizer.size > vocabulary or (tokenizer.size < vocabulary and kind != "characters"):
        raise _wrong_size(kind, vocabulary, tokenizer.size)
    return tokenizer


def _with_known(backend: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
    return backend, _special(backend, {})


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

    backend = _byte_level(models.BPE())
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
        backend = _bert(models.WordPiece(unk_token="[UNK]"), config.lowercase)
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
        backend.train_from_iterator(texts, trainer)
        ids = backend.get_vocab()
        return sorted(ids, key=lambda piece: ids[piece])

    # The trainer numbers "##a", "##b" ... in the order of a hash table that is new in each process, and breaks ties
    # between merges by these numbers.  So a first round finds the letters and a second is given them in order.
    letters = sorted(set(learn(0, _BERT)) - set(_BERT))
    ids = {piece: i for i, piece in enumerate(learn(vocabulary, _BERT + letters))}
    return _enclosed(_bert(models.WordPiece(ids, unk_token="[UNK]"), config.lowercase))


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


def _byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _bert(model: tokenizers.models.Model, lowercase: bool) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _enclosed(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """With [CLS] and [SEP] around texts, for those who encode with special tokens; `Tokenizer` does not."""
    from tokenizers import processors

    cls, sep = backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")
    if cls is not None and sep is not None:
        backend.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return backend


def _from_vocab_txt(file: Path, lowercase: bool | None) -> tokenizers.Tokenizer:
    from tokenizers import models

    pieces = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if "[UNK]" not in pieces:
        raise UserError(f"{file} has no line [UNK]; a WordPiece vocabulary holds one piece a line, [UNK] among them")
    if lowercase is None:
        lowercase = not any(p != p.lower() for p in pieces if not (p.startswith("[") and p.endswith("]")))
    ids = {piece: i for i, piece in enumerate(pieces)}
    return _enclosed(_bert(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100), lowercase))


def _from_merges(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    from tokenizers import models

    lines = merges.read_text(encoding="utf-8").split("\n")
    halves = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
    pairs = [(left, right) for left, _, right in halves]
    return _byte_level(models.BPE(json.loads(vocab.read_text(encoding="utf-8")), pairs))


def _from_sentencepiece(model: bytes) -> tokenizers.Tokenizer:
    """The same tokenizer as a sentencepiece ModelProto, with the same ids.

    sentencepiece writes a space as U+2581 and so cannot tell the two apart.  Here the pieces hold the space itself: a
    U+2581 in the text is an unknown character, spelled in bytes (models that lose something anyway, as by a space in
    front or a normal form, keep sentencepiece's way).  The one other difference: of several unigram segmentations with
    the same score, such as runs of spaces, sentencepiece's float32 sums may choose another than the float64 sums here.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    rule, kinds = proto.normalizer_spec, sentencepiece_model_pb2.ModelProto.SentencePiece
    pieces = [(piece.piece.replace("\u2581", " "), piece.score, piece.type) for piece in proto.pieces]
    unk = [i for i, (_, _, kind) in enumerate(pieces) if kind == kinds.UNKNOWN]
    byte_fallback = any(kind == kinds.BYTE for _, _, kind in pieces)
    algorithm = proto.trainer_spec.model_type
    if algorithm not in (1, 2) or not unk or proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError("this sentencepiece model is neither unigram nor bpe with a prefix for words; train another")

    if algorithm == 1:
        # Control and byte pieces must not be read in a text that spells "<s>": no path through them ever wins.
        scores = [(p, score if kind in (kinds.NORMAL, kinds.USER_DEFINED) else -1e4) for p, score, kind in pieces]
        backend = Tokenizer(models.Unigram(scores, unk_id=unk[0], byte_fallback=byte_fallback))
    else:
        ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
        # sentencepiece joins whatever makes the best-scored piece: each way to divide a piece in two is a merge.
        merges = [
            (-score, piece[:i], piece[i:])
            for piece, score, kind in pieces
            if kind == kinds.NORMAL
            for i in range(1, len(piece))
            if piece[:i] in ids and piece[i:] in ids
        ]
        merges.sort(key=lambda merge: (merge[0], ids[merge[1]], ids[merge[2]]))
        pairs = [(left, right) for _, left, right in merges]
        backend = Tokenizer(
            models.BPE(ids, pairs, unk_token=pieces[unk[0]][0], fuse_unk=True, byte_fallback=byte_fallback)
        )

    steps: list[Any] = []
    if rule.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rule.precompiled_charsmap))
    if not byte_fallback or rule.add_dummy_prefix or rule.remove_extra_whitespaces:
        steps.append(normalizers.Replace("\u2581", " "))
    if rule.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rule.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    decode = [decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(decode + [decoders.Strip(" ", 1, 0)] * rule.add_dummy_prefix)
    added = [AddedToken(p, normalized=False) for p, _, kind in pieces if kind == kinds.USER_DEFINED]
    control = [AddedToken(p, normalized=False) for p, _, kind in pieces if kind in (kinds.UNKNOWN, kinds.CONTROL)]
    backend.add_tokens(added)
    backend.add_special_tokens(control)
    return backend

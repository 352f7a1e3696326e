"""Conversion of sentencepiece models to `tokenizers.Tokenizer`s with the same segmentation."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlm.errors import UserError

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as in sentencepiece_model.proto
_NEVER = -1e4  # score of a piece that no segmentation uses


class Piece(NamedTuple):
    """An entry of a sentencepiece model: its text, with spaces for U+2581; its score; its type, NORMAL ... BYTE."""

    text: str
    score: float
    type: int


def parse_model(model: bytes) -> Any:
    """Parses the content of a .model file.

    Returns:
      The ModelProto.

    Raises:
      UserError: for a damaged file, or a model type that cannot be converted.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    if not any(piece.type == UNKNOWN for piece in proto.pieces):
        raise UserError(f"the sentencepiece model has {len(proto.pieces)} pieces and no unknown token; copy it again")
    if proto.trainer_spec.model_type not in (1, 2) or proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError("this sentencepiece model is neither unigram nor bpe with word-initial spaces; train another")
    return proto


def list_pieces(proto: Any) -> list[Piece]:
    """Returns the pieces of a model in the order of their ids."""
    return [Piece(piece.piece.replace("\u2581", " "), piece.score, piece.type) for piece in proto.pieces]


def convert(
    proto: Any,
    pieces: list[Piece] | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    lossless: bool = False,
) -> tokenizers.Tokenizer:
    """Converts a sentencepiece model to a tokenizer with the same segmentation.

    Args:
      proto: the ModelProto.
      pieces: the pieces of the tokenizer, whose indices are the ids; None: those of the model.
      settings: options of the tokenizer classes of transformers: do_lower_case, keep_accents, add_prefix_space and
        legacy (False: a space is added only at the beginning of the text, not after each special token).
      lossless: whether U+2581 in a text is spelled in bytes, if the model normalises nothing else.

    Returns:
      The tokenizer.

    sentencepiece represents a space by U+2581 and cannot distinguish the two; here the pieces contain the space.  There
    are two more differences.  If several unigram segmentations have the same score, as for runs of spaces,
    sentencepiece's float32 sums may select a different one than the float64 sums here.  In a bpe model, text after a
    user-defined symbol gets a leading space if the text as a whole does.
    """
    from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

    rule, pieces = proto.normalizer_spec, list_pieces(proto) if pieces is None else pieces
    byte_fallback = any(piece.type == BYTE for piece in pieces)
    backend = _build_model(proto, pieces, settings, byte_fallback)
    prefix = rule.add_dummy_prefix and settings.get("add_prefix_space", True)
    steps: list[Any] = []
    if "keep_accents" in settings:
        steps += [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        steps += [] if settings["keep_accents"] else [normalizers.NFKD(), normalizers.StripAccents()]
    if settings.get("do_lower_case"):
        steps.append(normalizers.Lowercase())
    if rule.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rule.precompiled_charsmap))
    if not (lossless and byte_fallback) or prefix or rule.remove_extra_whitespaces:
        steps.append(normalizers.Replace("\u2581", " "))
    if rule.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix and settings.get("legacy") is False:  # Llama's class adds the space only at the beginning of the text
        backend.pre_tokenizer = pre_tokenizers.Metaspace(" ", "first", split=False)
    elif prefix:
        steps.append(normalizers.Prepend(" "))
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    decode = [decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*decode, decoders.Strip(" ", 1, 0)] if prefix else decode)
    control = [AddedToken(p.text, normalized=False) for p in pieces if p.type in (UNKNOWN, CONTROL)]
    backend.add_special_tokens(control)
    return backend


def _build_model(
    proto: Any, pieces: list[Piece], settings: Mapping[str, Any], byte_fallback: bool
) -> tokenizers.Tokenizer:
    """Returns a tokenizer with the unigram or BPE model of these pieces, without normalizer and decoder."""
    from tokenizers import AddedToken, Tokenizer, models

    unk = next(i for i, piece in enumerate(pieces) if piece.type == UNKNOWN)
    if proto.trainer_spec.model_type == 1:
        best = max((piece.score for piece in pieces if piece.type == NORMAL), default=0.0)
        scores = []
        for text, score, kind in pieces:
            if kind == USER_DEFINED:  # always kept whole, as in sentencepiece's unigram_model.cc
                score = len(text.replace(" ", "\u2581").encode()) * best - 0.1
            elif kind != NORMAL:  # a text may contain "<s>" or "<0x41>" literally
                score = _NEVER
            elif "keep_accents" in settings and re.search(r"\d,$", text):  # ALBERT splits "9," into "9" and ","
                score -= 100
            scores.append((text, score))
        backend = Tokenizer(models.Unigram(scores, unk_id=unk, byte_fallback=byte_fallback))
    else:
        ids = {piece.text: i for i, piece in enumerate(pieces)}
        # sentencepiece joins any two pieces that make a known piece: each way to split a piece in two is a merge.
        merges = [
            (-score, text[:i], text[i:])
            for text, score, kind in pieces
            if kind == NORMAL
            for i in range(1, len(text))
            if text[:i] in ids and text[i:] in ids
        ]
        merges.sort(key=lambda merge: (merge[0], ids[merge[1]], ids[merge[2]]))
        pairs = [(left, right) for _, left, right in merges]
        model = models.BPE(ids, pairs, unk_token=pieces[unk].text, fuse_unk=True, byte_fallback=byte_fallback)
        backend = Tokenizer(model)
        backend.add_tokens([AddedToken(p.text, normalized=False) for p in pieces if p.type == USER_DEFINED])
    return backend


def exclude_special_pieces(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Returns a unigram tokenizer that segments the literal text of a special token or byte piece like other text.

    The model would match "</s>" or "<0x41>" as a piece.  Therefore these pieces get the lowest score.  If one contains
    a character that no other piece has, every alternative scores as low, so a pre-tokenizer cuts it first.
    """
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    state = json.loads(backend.to_str())
    names = {token["content"] for token in state["added_tokens"] if token["special"]}
    names.update(f"<0x{byte:02X}>" for byte in range(256))
    pieces = state["model"]["vocab"]
    excluded = [piece for piece in pieces if piece[0] in names]
    if any(score > _NEVER for _, score in excluded):
        for piece in excluded:
            piece[1] = _NEVER
        backend = Tokenizer.from_str(json.dumps(state))

    letters = set().union(*(text for text, score in pieces if score > _NEVER))
    cuts = []
    for text, _ in excluded:
        if len(text) > 1 and not letters.issuperset(text):
            # A cut between a known and an unknown letter splits neither a piece nor a run of unknown letters.
            known = [letter in letters for letter in text]
            index = next((i for i in range(1, len(text)) if known[i] != known[i - 1]), 1)
            cuts.append(f"{re.escape(text[:index])}(?={re.escape(text[index:])})")
    if cuts:
        before, cut = backend.pre_tokenizer, pre_tokenizers.Split(Regex("|".join(cuts)), "merged_with_previous")
        backend.pre_tokenizer = pre_tokenizers.Sequence([before, cut]) if before else cut
    return backend


def check_normalizer(backend: tokenizers.Tokenizer) -> None:
    """Raises ValueError for a damaged normalizer, with which `tokenizers` would only fail later, on some texts."""
    if backend.normalizer is not None:
        state = backend.normalizer.__getstate__().decode()
        for charsmap in re.findall(r'"precompiled_charsmap":"([^"]*)"', state):
            if not _is_closed(base64.b64decode(charsmap)):
                raise ValueError("its normalisation table, precompiled_charsmap, has references beyond its end")


def _is_closed(charsmap: bytes) -> bool:
    """Returns whether a normalisation table has no references beyond its end.

    The table consists of a trie over UTF-8, which is a double array (Aoe 1989) in the format of darts-clone, and of the
    replacement texts that its leaves point to; see sentencepiece's normalizer.cc.
    """
    size = int.from_bytes(charsmap[:4], "little")
    units = np.frombuffer(charsmap[4 : 4 + size // 4 * 4], "<u4").astype(np.int64)
    texts = np.frombuffer(charsmap[4 + size :] + b"\0", np.uint8)  # the last text may be empty
    below = lambda places: places ^ ((units[places] >> 10) << ((units[places] & 0x200) >> 6))
    inside = lambda bases: bases.size == 0 or (bases | 255).max() < len(units)  # any letter may be looked up there
    letters, visited = np.arange(1, 256), np.zeros(len(units), bool)
    if not len(units) or 4 + size > len(charsmap):
        return False
    bases = below(np.zeros(1, np.int64))
    while bases.size and inside(bases):
        visited[bases] = True
        children = bases[:, None] ^ letters
        places = children[(units[children] & 0x800000FF) == letters]
        bases = below(places)
        if inside(bases):
            starts = units[bases[(units[places] & 0x100) > 0]] & 0x7FFFFFFF
            if starts.size and (starts.max() >= len(texts) or ((texts[starts] & 0xC0) == 0x80).any()):
                return False
            bases = np.unique(bases[~visited[bases]])
    return bases.size == 0

"""sentencepiece models as `tokenizers.Tokenizer`s that divide each text into the same pieces."""

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
_NEVER = -1e4  # the score of a piece that no text is divided into


class Piece(NamedTuple):
    """A row of a model: what it stands for, with spaces for U+2581; its score; its type, NORMAL ... BYTE."""

    text: str
    score: float
    type: int


def parsed(model: bytes) -> Any:
    """The ModelProto in the bytes of a .model file.  Raises UserError for a kind that cannot be translated."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    if not any(piece.type == UNKNOWN for piece in proto.pieces):
        raise UserError(
            f"the sentencepiece model has {len(proto.pieces)} pieces and none for the unknown; copy it again"
        )
    if proto.trainer_spec.model_type not in (1, 2) or proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError("this sentencepiece model is neither unigram nor bpe with a prefix for words; train another")
    return proto


def pieces_of(proto: Any) -> list[Piece]:
    """The pieces in the model's own order."""
    return [Piece(piece.piece.replace("\u2581", " "), piece.score, piece.type) for piece in proto.pieces]


def translated(
    proto: Any, pieces: list[Piece], settings: Mapping[str, Any] = MappingProxyType({}), lossless: bool = False
) -> tokenizers.Tokenizer:
    """A tokenizer with these pieces, each with its place as id, that divides a text as the sentencepiece model does.

    `settings`: of the classes of transformers, do_lower_case, keep_accents, add_prefix_space (False: none) and legacy
    (False: that space is where the text begins, and not behind each special token).

    sentencepiece writes a space as U+2581 and so cannot tell the two apart.  Here the pieces hold the space itself;
    with `lossless` a U+2581 in the text is an unknown character, spelled in bytes, unless the model loses something
    anyway, as by a space in front or a normal form.  The other differences: of several unigram segmentations with the
    same score, such as runs of spaces, sentencepiece's float32 sums may choose another than the float64 sums here; and
    what follows a symbol of the user's in a bpe model gets a space in front where the text does.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = proto.normalizer_spec
    unk = next(i for i, piece in enumerate(pieces) if piece.type == UNKNOWN)
    byte_fallback = any(piece.type == BYTE for piece in pieces)
    if proto.trainer_spec.model_type == 1:
        best = max((piece.score for piece in pieces if piece.type == NORMAL), default=0.0)
        scores = []
        for text, score, kind in pieces:
            if kind == USER_DEFINED:  # taken whole whatever else it costs, as in sentencepiece's unigram_model.cc
                score = len(text.replace(" ", "\u2581").encode()) * best - 0.1
            elif kind != NORMAL:  # a text may spell "<s>" or "<0x41>"
                score = _NEVER
            elif "keep_accents" in settings and re.search(r"\d,$", text):  # ALBERT divides "9," into "9" and ","
                score -= 100
            scores.append((text, score))
        backend = Tokenizer(models.Unigram(scores, unk_id=unk, byte_fallback=byte_fallback))
    else:
        ids = {piece.text: i for i, piece in enumerate(pieces)}
        # sentencepiece joins whatever makes the best-scored piece: each way to divide a piece in two is a merge.
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
    if prefix and settings.get("legacy") is False:  # Llama's class has the space where the text begins, and there alone
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


def spelled(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A unigram tokenizer that divides a text which spells a special token or a byte, "</s>" or "<0x41>", like others.

    The model would find them among its pieces.  So they get the score of a piece that is never taken; and where one
    has a character that no other piece has, so that every way around it is as bad, it is cut before the model sees it.
    """
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    described = json.loads(backend.to_str())
    names = {token["content"] for token in described["added_tokens"] if token["special"]}
    names.update(f"<0x{byte:02X}>" for byte in range(256))
    pieces = described["model"]["vocab"]
    hidden = [piece for piece in pieces if piece[0] in names]
    if any(score > _NEVER for _, score in hidden):
        for piece in hidden:
            piece[1] = _NEVER
        backend = Tokenizer.from_str(json.dumps(described))

    letters = set().union(*(text for text, score in pieces if score > _NEVER))
    cuts = []
    for text, _ in hidden:
        if len(text) > 1 and not letters.issuperset(text):
            # Between a known and an unknown letter the cut divides neither a piece nor a run of unknown ones.
            known = [letter in letters for letter in text]
            place = next((i for i in range(1, len(text)) if known[i] != known[i - 1]), 1)
            cuts.append(f"{re.escape(text[:place])}(?={re.escape(text[place:])})")
    if cuts:
        before, cut = backend.pre_tokenizer, pre_tokenizers.Split(Regex("|".join(cuts)), "merged_with_previous")
        backend.pre_tokenizer = pre_tokenizers.Sequence([before, cut]) if before else cut
    return backend


def check_normalizer(backend: tokenizers.Tokenizer) -> None:
    """Raises ValueError for a normalizer at which `tokenizers` would fail with some text, not now."""
    if backend.normalizer is not None:
        said = backend.normalizer.__getstate__().decode()
        for charsmap in re.findall(r'"precompiled_charsmap":"([^"]*)"', said):
            if not _leads_inside(base64.b64decode(charsmap)):
                raise ValueError("its table of normal forms, precompiled_charsmap, leads past its end")


def _leads_inside(charsmap: bytes) -> bool:
    """Whether no text is led past the end of a table of normal forms.

    The table is a trie over UTF-8, as a double array (Aoe 1989) in the units of darts-clone, and the texts that its
    leaves point into; sentencepiece's normalizer.cc reads it so.
    """
    size = int.from_bytes(charsmap[:4], "little")
    units = np.frombuffer(charsmap[4 : 4 + size // 4 * 4], "<u4").astype(np.int64)
    texts = np.frombuffer(charsmap[4 + size :] + b"\0", np.uint8)  # a text may be empty, at the end
    below = lambda places: places ^ ((units[places] >> 10) << ((units[places] & 0x200) >> 6))
    inside = lambda bases: bases.size == 0 or (bases | 255).max() < len(units)  # every letter is looked up there
    letters, seen = np.arange(1, 256), np.zeros(len(units), bool)
    if not len(units) or 4 + size > len(charsmap):
        return False
    bases = below(np.zeros(1, np.int64))
    while bases.size and inside(bases):
        seen[bases] = True
        children = bases[:, None] ^ letters
        places = children[(units[children] & 0x800000FF) == letters]
        bases = below(places)
        if inside(bases):
            starts = units[bases[(units[places] & 0x100) > 0]] & 0x7FFFFFFF
            if starts.size and (starts.max() >= len(texts) or ((texts[starts] & 0xC0) == 0x80).any()):
                return False
            bases = np.unique(bases[~seen[bases]])
    return bases.size == 0

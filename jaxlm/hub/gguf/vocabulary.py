"""Two-way conversion between the tokenizer in the metadata of a GGUF file and the tokenizer files of Hugging Face.

A file has one of two kinds of tokenizers. "gpt2" is byte-level BPE with merges, which becomes a tokenizer.json. "llama"
is a sentencepiece model, BPE with scores and without merges, which becomes a tokenizer.model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxlm.errors import UserError, suggestion
from jaxlm.hub.gguf.words import WORDS, Words
from jaxlm.hub.model_files import JsonObject

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens, as in sentencepiece
_PREFIX = "tokenizer.ggml."
NONE = ("none", "no_vocab")  # values of tokenizer.ggml.model in files without a tokenizer
KINDS = ("gpt2", "llama")
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_PADDING = re.compile(r"\[PAD\d+\]")  # llama.cpp's names for rows of the embedding without a token
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNREACHED = -1e4  # score of a token that no merge makes
_SPACE = "\u2581"  # sentencepiece's spelling of a space
# Whether a space begins the text after each special token too. GGUF has no key for this, and transformers reads false.
_LEGACY = "jaxlm.tokenizer.legacy"


class Parsed(NamedTuple):
    """The tokens of a file, without those that only pad the vocabulary.

    Attributes:
      data: the metadata.
      tokens: the tokens in the order of their ids.
      types: their types.
      special: role -> token.
    """

    data: JsonObject
    tokens: list[str]
    types: list[int]
    special: dict[str, str | None]


def read(metadata: Mapping[str, Any], source: str, rows: int) -> dict[str, bytes]:
    """Returns the tokenizer files for the metadata of a GGUF file, by name; empty if the file has no tokenizer.

    Args:
      metadata: the metadata.
      source: the name of the file, for messages.
      rows: number of rows of the token embeddings.

    Raises:
      UserError: if the tokenizer is missing, is of an unknown kind, or does not fit the embeddings.
    """
    data = JsonObject(dict(metadata), source)
    kind = data.text(_PREFIX + "model", "")
    if kind in NONE:
        return {}
    if not kind:
        raise UserError(f"{source} has no tokenizer: tokenizer.ggml.model is missing; choose another file of the model")
    if kind not in KINDS:
        raise UserError(f"{source} has a tokenizer of the kind {kind!r}{suggestion(kind, KINDS)}")
    parsed = _parse(data, source, rows)
    config = {f"{role}_token": token for role, token in parsed.special.items()}
    if template := data.text("tokenizer.chat_template", ""):
        config |= {"chat_template": template}
    files = _byte_level(parsed, config) if kind == "gpt2" else _sentencepiece(parsed, config)
    return files


def _parse(data: JsonObject, source: str, rows: int) -> Parsed:
    tokens = list(data.texts(_PREFIX + "tokens"))
    if len(tokens) != rows:
        raise UserError(
            f"{source} has {len(tokens):,} tokens and {rows:,} rows of token embeddings; both must be equal: download "
            f"the file again, or convert the original checkpoint with a current llama.cpp"
        )
    types = list(data.integers(_PREFIX + "token_type", NORMAL, BYTE)) or [NORMAL] * rows
    if len(types) != rows:
        raise UserError(f"{source} has {len(types):,} types of tokens for {rows:,} tokens; download the file again")
    special = {}
    for role, name in _ROLES.items():
        i = data.integer(f"{_PREFIX}{name}_token_id", None, 0, rows - 1)
        special[role] = None if i is None else tokens[i]
    roles = set(special.values())
    while types and types[-1] == UNUSED and _PADDING.fullmatch(tokens[-1]) and tokens[-1] not in roles:
        del tokens[-1], types[-1]
    if len(set(tokens)) != len(tokens):
        first = {token: i for i, token in reversed(list(enumerate(tokens)))}
        i = next(i for i, token in enumerate(tokens) if first[token] != i)
        raise UserError(
            f"{source} has the token {tokens[i]!r:.60} twice, as {first[tokens[i]]} and {i}; download it again"
        )
    return Parsed(data, tokens, types, special)


def _frame(parsed: Parsed, bos_default: bool) -> dict[str, bool]:
    """Returns whether BOS and EOS are added to a text; tokens that the file does not have are never added."""
    flags = {"bos": bos_default, "eos": False}
    return {
        role: bool(parsed.data.boolean(f"{_PREFIX}add_{role}_token", default)) and parsed.special[role] is not None
        for role, default in flags.items()
    }


def _byte_level(parsed: Parsed, config: dict[str, Any]) -> dict[str, bytes]:
    source = parsed.data.source
    name = parsed.data.text(_PREFIX + "pre", "default")
    if name not in WORDS:
        raise UserError(
            f"{source} has tokenizer.ggml.pre {name!r:.60}, unknown; known: {', '.join(WORDS)}; use the original "
            f"checkpoint of the model"
        )
    ids = {token: i for i, token in enumerate(parsed.tokens)}
    merges = [merge.split(" ") for merge in parsed.data.texts(_PREFIX + "merges")]
    wrong = next((m for m in merges if len(m) != 2 or not ids.keys() >= {*m, "".join(m)}), None)
    if not merges or wrong is not None:
        fault = "no tokenizer.ggml.merges" if wrong is None else f"the merge {' '.join(wrong)!r:.60} of unknown tokens"
        raise UserError(f"{source} has {fault}; download the file again")
    state = _tokenizer_json(WORDS[name], ids, merges)
    state["added_tokens"] = [
        _added_token(i, token, kind == CONTROL)
        for i, (token, kind) in enumerate(zip(parsed.tokens, parsed.types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    state["post_processor"] = _post_processor(parsed, _frame(parsed, WORDS[name].bos), ids)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    return {"tokenizer.json": _dump(state), "tokenizer_config.json": _dump(config)}


def _tokenizer_json(words: Words, ids: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    spell = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": False}
    model |= {"ignore_merges": words.whole, "vocab": ids, "merges": merges}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": words.normalizer,
        "pre_tokenizer": words.pre_tokenizer,
        "post_processor": None,
        "decoder": spell,
        "model": model,
    }


def _added_token(i: int, token: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": token, **flags, "special": special}


def _post_processor(parsed: Parsed, frame: dict[str, bool], ids: Mapping[str, int]) -> dict[str, Any] | None:
    """Returns the step of a tokenizer.json that adds BOS and EOS."""
    if not any(frame.values()):
        return None
    tokens = {role: str(parsed.special[role]) for role, used in frame.items() if used}
    special = lambda role, kind: [{"SpecialToken": {"id": tokens[role], "type_id": kind}}] if role in tokens else []
    text = lambda name, kind: [
        *special("bos", kind),
        {"Sequence": {"id": name, "type_id": kind}},
        *special("eos", kind),
    ]
    listed = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in tokens.values()}
    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": listed,
    }


def _sentencepiece(parsed: Parsed, config: dict[str, Any]) -> dict[str, bytes]:
    from sentencepiece import sentencepiece_model_pb2

    data, tokens = parsed.data, parsed.tokens
    scores = data.values.get(_PREFIX + "scores")
    if not isinstance(scores, list) or len(scores) < len(tokens) or not all(type(score) is float for score in scores):
        raise UserError(f"{data.source} has no score for each token in tokenizer.ggml.scores; download the file again")
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.byte_fallback = BYTE in parsed.types
    proto.normalizer_spec.add_dummy_prefix = bool(data.boolean(_PREFIX + "add_space_prefix", True))
    proto.normalizer_spec.remove_extra_whitespaces = bool(data.boolean(_PREFIX + "remove_extra_whitespaces", False))
    proto.normalizer_spec.name = "identity"
    unknown = parsed.special["unk"]
    if UNKNOWN not in parsed.types and unknown is None:
        raise UserError(f"{data.source} has no unknown token, which this kind of tokenizer requires; download it again")
    for token, kind, score in zip(tokens, parsed.types, scores):
        kind = UNKNOWN if UNKNOWN not in parsed.types and token == unknown else kind
        proto.pieces.add(piece=token, score=score, type=kind)
    frame = {f"add_{role}_token": used for role, used in _frame(parsed, True).items()}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": data.boolean(_LEGACY, False), **frame}
    settings["add_prefix_space"] = proto.normalizer_spec.add_dummy_prefix
    return {"tokenizer.model": proto.SerializeToString(), "tokenizer_config.json": _dump(settings | config)}


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write(
    state: dict[str, Any],
    special: Mapping[str, str],
    rows: int,
    *,
    model: bytes | None = None,
    frame: Mapping[str, bool],
    template: str | None = None,
) -> dict[str, Any]:
    """Returns the metadata for a tokenizer, the inverse of `read`.

    Args:
      state: the content of its tokenizer.json.
      special: role -> token.
      rows: number of rows of the token embeddings; ids without a token are padded as llama.cpp's converter does.
      model: the sentencepiece model that the tokenizer was loaded from, if any.
      frame: role -> whether the token is added to each text, for "bos" and "eos".
      template: the chat template.

    Raises:
      UserError: if the format does not have this kind of tokenizer.
    """
    ids = state["model"]["vocab"]
    if state["model"]["type"] != "BPE":
        raise UserError(
            f"the tokenizer is of the kind {state['model']['type']}; a GGUF file can have BPE, byte-level or from "
            f"sentencepiece: train one with --tokenizer.train byte_bpe or bpe, or save a folder instead"
        )
    added = {token["id"]: token for token in state["added_tokens"]}
    pieces = {i: piece for piece, i in ids.items()} | {i: token["content"] for i, token in added.items()}
    if max(pieces) >= rows:
        raise UserError(
            f"the tokenizer has {max(pieces) + 1} tokens and the model {rows} rows of embeddings; resize the model "
            f"with jaxlm.resize(lm, {max(pieces) + 1})"
        )
    tokens = [pieces.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [NORMAL if i in pieces else UNUSED for i in range(rows)]
    for i, token in added.items():
        types[i] = CONTROL if token["special"] else USER_DEFINED
    spelled = '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["decoder"]])
    data = _write_byte_level(state) if spelled else _write_sentencepiece(state, tokens, types, model)
    data |= {_PREFIX + "tokens": tokens, _PREFIX + "token_type": types}
    numbers = {token: i for i, token in enumerate(tokens)}
    data |= {f"{_PREFIX}{_ROLES[role]}_token_id": numbers[token] for role, token in special.items() if role in _ROLES}
    data |= {f"{_PREFIX}add_{role}_token": used for role, used in frame.items()}
    return data | ({} if template is None else {"tokenizer.chat_template": template})


def _write_byte_level(state: dict[str, Any]) -> dict[str, Any]:
    model = state["model"]
    wanted = _comparable(state["normalizer"]), _comparable(state["pre_tokenizer"]), bool(model.get("ignore_merges"))
    known = {
        name: (_comparable(words.normalizer), _comparable(words.pre_tokenizer), words.whole)
        for name, words in WORDS.items()
    }
    name = next((name for name, parts in known.items() if parts == wanted), None)
    if name is None:
        raise UserError(
            f"the tokenizer splits words in a way that has no name in GGUF files; supported are those of "
            f"{', '.join(WORDS)}: save a folder instead"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise UserError("the tokenizer has no merges, which a GGUF file requires; save a folder instead")
    return {_PREFIX + "model": "gpt2", _PREFIX + "pre": name, _PREFIX + "merges": merges}


def _comparable(component: Any) -> str:
    """Returns a component of a tokenizer.json without the settings that do not affect ids."""
    return re.sub(r'"trim_offsets": \w+, ', "", json.dumps(component))


def _write_sentencepiece(
    state: dict[str, Any], tokens: list[str], types: list[int], model: bytes | None
) -> dict[str, Any]:
    scores = _scores(state)
    steps = json.dumps([state["normalizer"], state["pre_tokenizer"]])
    prefix = bool(re.search(r'"Prepend"|"prepend_scheme": "(first|always)"', steps))
    unknown = state["model"]["unk_token"]
    for i, token in enumerate(tokens):
        if token == unknown:
            types[i] = UNKNOWN
        elif types[i] == NORMAL and _BYTE.fullmatch(token):
            types[i] = BYTE
    if model is not None:
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        scores |= {piece.piece: piece.score for piece in proto.pieces}
    tokens[:] = [token.replace(" ", _SPACE) if kind == NORMAL else token for token, kind in zip(tokens, types)]
    return {
        _PREFIX + "model": "llama",
        _PREFIX + "pre": "default",
        _PREFIX + "scores": [float(scores.get(token, _UNREACHED)) for token in tokens],
        _PREFIX + "add_space_prefix": prefix,
        _LEGACY: '"Prepend"' in steps,
    }


def _scores(state: dict[str, Any]) -> dict[str, float]:
    """Returns a score for each token that merges make: the earlier its first merge, the higher."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(state["model"]["merges"]):
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        scores.setdefault(token.replace(" ", _SPACE), -float(rank))
    return scores

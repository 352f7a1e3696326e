"""The files that checkpoints keep their vocabulary in, each read into a `tokenizers.Tokenizer`.

A tokenizer.json says all about itself.  The older files hold pieces and little more.  What the tokenizer class of
transformers knew beside them, such as the ids before the first piece or the special tokens around a text, stands here
in one table, `KINDS`.  sentencepiece itself, which made the data that the models were trained on, says what is right
where classes of transformers differ from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxlm.data.pieces import CONTROL, UNKNOWN, Piece, parsed, pieces_of, translated
from jaxlm.errors import UserError
from jaxlm.hub import model_files

if TYPE_CHECKING:
    import tokenizers

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_BESIDE = (*_SETTINGS, "added_tokens.json", "chat_template.jinja", "chat_template.json")
_SENTENCEPIECE = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "spm.model")
_MARIAN = ("source.spm", "target.spm", "vocab.json", "target_vocab.json")
# Beside a tokenizer.json all are kept: older readers take the vocabulary that it was made of.
_FILES = tuple(dict.fromkeys(("tokenizer.json", *_BESIDE, *_SENTENCEPIECE, *_MARIAN, "merges.txt", "vocab.txt")))
_FIRST = ("tokenizer.json", "*.spm", *_SENTENCEPIECE, "*.model", "vocab.txt", "vocab.json")

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # as transformers numbers those that it adds
# What a special token is called where neither a file nor a class says so, the likeliest name first.
_USUAL = {
    "bos": ("<s>", "<bos>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}


class Kind(NamedTuple):
    """What a tokenizer class of transformers knows that no file beside the vocabulary says."""

    name: str  # the class
    special: Mapping[str, str]  # role -> token
    # Around a text $A and a pair $A $B; ":1" is token type 1.  None: what add_bos_token and add_eos_token say.
    frame: tuple[str, str] | None
    settings: Mapping[str, Any] = MappingProxyType({})  # what tokenizer_config.json may set, as it is otherwise
    # Of sentencepiece: these ids come first, in place of the file's own first `skip` pieces, and those last.
    head: tuple[str, ...] = ()
    skip: int = 0
    tail: tuple[str, ...] = ()
    words: str = ""  # of byte pairs: the expression that finds words, if it is not GPT-2's


_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_T5 = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
_ROBERTA = _T5 | {"bos": "<s>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
_GEMMA = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
_END = "<|endoftext|>"
_TYPED = ("cls $A sep", "cls $A sep $B:1 sep:1")
_DOUBLED = ("cls $A sep", "cls $A sep sep $B sep")
_FLAGS = {"add_bos_token": False, "add_eos_token": False}
_LANGUAGES = {"src_lang": "en_XX", "tgt_lang": None}
_FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
_MBART = (
    *("ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN", "hi_IN", "it_IT", "ja_XX"),
    *("kk_KZ", "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP", "nl_XX", "ro_RO", "ru_RU", "si_LK", "tr_TR", "vi_VN"),
    "zh_CN",
)
_MBART50 = (
    *("af_ZA", "az_AZ", "bn_IN", "fa_IR", "he_IL", "hr_HR", "id_ID", "ka_GE", "km_KH", "mk_MK", "ml_IN", "mn_MN"),
    *("mr_IN", "pl_PL", "ps_AF", "pt_XX", "sv_SE", "sw_KE", "ta_IN", "te_IN", "th_TH", "tl_XX", "uk_UA", "ur_PK"),
    *("xh_ZA", "gl_ES", "sl_SI"),
)
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Under each tokenizer class and model type, in lower-case letters and digits, without "Tokenizer" and "Fast".
KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        ("bert", "distilbert", "electra"),
        Kind(
            "BertTokenizer", _BERT, _TYPED,
            {"do_lower_case": None, "strip_accents": None, "tokenize_chinese_chars": True},
        ),
    ),
    **dict.fromkeys(("roberta", "bart"), Kind("RobertaTokenizer", _ROBERTA, _DOUBLED, {"add_prefix_space": False})),
    "xlmroberta": Kind("XLMRobertaTokenizer", _ROBERTA, _DOUBLED, head=_FAIRSEQ, skip=3, tail=("<mask>",)),
    "camembert": Kind(
        "CamembertTokenizer", _ROBERTA, _DOUBLED,
        head=("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"), skip=1, tail=("<mask>",),
    ),
    "mbart": Kind(
        "MBartTokenizer", _ROBERTA, ("$A eos lang", "$A $B eos lang"), _LANGUAGES,
        head=_FAIRSEQ, skip=3, tail=(*_MBART, "<mask>"),
    ),
    "mbart50": Kind(
        "MBart50Tokenizer", {role: token for role, token in _ROBERTA.items() if role != "bos"},
        ("lang $A eos", "lang $A $B eos"), _LANGUAGES, head=_FAIRSEQ, skip=3, tail=(*_MBART, *_MBART50, "<mask>"),
    ),
    "albert": Kind(
        "AlbertTokenizer", _BERT | {"bos": "[CLS]", "eos": "[SEP]", "unk": "<unk>", "pad": "<pad>"}, _TYPED,
        {"do_lower_case": True, "keep_accents": False},
    ),
    "debertav2": Kind(
        "DebertaV2Tokenizer", _BERT | {"bos": "[CLS]", "eos": "[SEP]"}, _TYPED, {"do_lower_case": False},
        tail=("[MASK]",),
    ),
    **dict.fromkeys(("t5", "mt5", "umt5"), Kind("T5Tokenizer", _T5, ("$A eos", "$A eos $B eos"), {"extra_ids": 100})),
    "marian": Kind("MarianTokenizer", _T5, ("$A eos", "$A $B eos"), {"separate_vocabs": False}),
    **dict.fromkeys(
        ("llama", "mistral", "mixtral"),
        Kind(
            "LlamaTokenizer", {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, None,
            {**_FLAGS, "add_bos_token": True, "add_prefix_space": True},
        ),
    ),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3", "gemma3text"),
        Kind("GemmaTokenizer", _GEMMA, None, {**_FLAGS, "add_bos_token": True}),
    ),
    "gpt2": Kind(
        "GPT2Tokenizer", {"bos": _END, "eos": _END, "unk": _END}, None, {**_FLAGS, "add_prefix_space": False}
    ),
    **dict.fromkeys(
        ("qwen2", "qwen2moe", "qwen3", "qwen3moe"),
        Kind(
            "Qwen2Tokenizer", {"eos": _END, "unk": _END, "pad": _END}, None, {**_FLAGS, "add_prefix_space": False},
            words=_QWEN,
        ),
    ),
}  # fmt: skip
# Where no file names a class: the first of these whose special tokens the vocabulary has, else the last.
_OF_FILE = {
    "sentencepiece.bpe.model": ("xlmroberta",),
    "spiece.model": ("albert", "t5"),
    "spm.model": ("debertav2",),
    "vocab.txt": ("bert",),
    "vocab.json": ("roberta", "gpt2"),
}


class Read(NamedTuple):
    """A tokenizer as its files say it."""

    backend: tokenizers.Tokenizer
    kind: Kind | None
    files: dict[str, bytes]  # name -> content, for `save`
    special: Mapping[str, str | None] = MappingProxyType({})  # role -> token
    # What a tokenizer_config.json says with which transformers needs no tokenizer.json; empty: it needs one.
    config: Mapping[str, Any] = MappingProxyType({})
    divide: tokenizers.Tokenizer | None = None  # makes the pieces whose ids `backend` knows; None: `backend` does both
    # What encodes target texts, where that is not what encodes sources: another tokenizer (Marian), another frame
    # (mBART).
    target: Read | tokenizers.processors.PostProcessor | None = None


@contextmanager
def readable(what: object) -> Iterator[None]:
    """Turns whatever the libraries raise for what they cannot parse into a UserError about the file `what`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # a panic of Rust is a PanicException, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip()[:200] or type(error).__name__
        raise UserError(f"{what} is no readable tokenizer ({reason}); copy it and the files beside it again") from None


def find(path: Path) -> Path:
    """The file to begin with: `path`, or the best one of a folder.  Raises UserError where there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"there is no tokenizer file or folder {str(path)!r}; set --tokenizer.path")
    file = next((file for pattern in _FIRST for file in sorted(path.glob(pattern)) if file.is_file()), None)
    if file is None:
        raise UserError(
            f"the folder {path} holds no tokenizer.json, .model, .spm, vocab.txt or vocab.json; "
            f"set --tokenizer.path to a folder or file with a tokenizer"
        )
    return file


def read(file: Path) -> Read:
    """The tokenizer of a file and of those beside it.  Raises UserError, or what a library raises: see `readable`."""
    said: dict[str, Any] = {}
    for name in reversed(_SETTINGS):  # the first of them wins
        said |= _object(file.with_name(name))
    model = _object(file.with_name("config.json"))
    names = [said.get("tokenizer_class"), model.get("tokenizer_class"), model.get("model_type")]
    reader = _read_merges if file.name.endswith("vocab.json") else _READERS.get(file.suffix, _read_json)
    whole = reader is _read_json
    if whole:  # an unknown class of a tokenizer.json declares nothing; elsewhere the model's type may help
        names = [name for name in names if name][:1]
    found = reader(file, said, next((KINDS[_key(name)] for name in names if _key(name) in KINDS), None))

    kept = _contents(file, _FILES if whole else _BESIDE)
    for template in model_files.locate_all(file.parent, "additional_chat_templates/*.jinja"):
        kept[f"additional_chat_templates/{template.name}"] = model_files.read_bytes(template)
    unnamed = found.config and _key(said.get("tokenizer_class")) not in KINDS
    if unnamed and "tokenizer_config.json" in kept and found.kind is not _likely(file, found.backend.get_vocab()):
        # config.json alone said the class, and it stays with the model.
        kept["tokenizer_config.json"] = json.dumps(
            {**found.config, **said, "tokenizer_class": found.config["tokenizer_class"]}, indent=2
        ).encode()

    tokens = special(found.backend, said, found.kind)
    added = {} if whole else _object(file.with_name("added_tokens.json"))
    target = found.target
    for part in (found, target):
        if isinstance(part, Read):
            declared = _add(part.backend, said, tokens, added)
            around = _frame(part.backend, said, found.kind, tokens)
            if part is found and not whole:
                _check(part.backend, declared, file)
    return found._replace(files=kept | found.files, special=tokens, target=target or around)


def _settings(kind: Kind | None, said: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a class as the files say; null says nothing."""
    known = kind.settings if kind else _FLAGS
    return {name: usual if said.get(name) is None else said[name] for name, usual in known.items()}


def _key(name: str | None) -> str:
    return re.sub("tokenizer|fast|[^a-z0-9]", "", (name or "").lower())


def _likely(file: Path, pieces: Container[str]) -> Kind | None:
    """The kind of a vocabulary that no file names."""
    kinds = [KINDS[name] for name in _OF_FILE.get(file.name, ())]
    fitting = [kind for kind in kinds if all(token in pieces for token in kind.special.values())]
    return next(iter(fitting + kinds[-1:]), None)


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file."""
    found = model_files.locate(file.parent, file.name)
    return {} if found is None else model_files.read_object(found)


def _ids(file: Path) -> dict[str, int]:
    """piece -> id, as a vocab.json holds them."""
    ids = _object(file)
    wrong = next((piece for piece, i in ids.items() if type(i) is not int or i < 0), None)
    if not ids or wrong is not None or len(set(ids.values())) < len(ids):
        what = "no pieces" if not ids else "two pieces of one id" if wrong is None else f"{wrong!r}: {ids[wrong]!r}"
        raise UserError(f"{file} has {what}; it must give each piece an id of its own, from 0 on; copy it again")
    return ids


def size_of(ids: Mapping[str, int]) -> int:
    """The largest id + 1.  Raises UserError where ids are so far apart that tables over them would fill the memory."""
    size = max(ids.values(), default=-1) + 1
    if not 0 < size <= 2 * len(ids) + 1000:
        raise UserError(
            f"the vocabulary has {len(ids)} pieces and ids up to {size - 1}, more than {2 * len(ids) + 999}; "
            f"its file is damaged: copy it again"
        )
    return size


def _contents(file: Path, names: Iterable[str]) -> dict[str, bytes]:
    """What is in those of these files that lie beside a file."""
    found = {name: model_files.locate(file.parent, name) for name in names}
    return {name: model_files.read_bytes(path) for name, path in found.items() if path is not None}


def _partner(file: Path, name: str) -> Path:
    partner = file.with_name(name)
    if not partner.is_file():
        raise UserError(f"{file} needs {name}, and there is no {partner}; put {name} beside it")
    return partner


def _content(token: Any) -> str | None:
    """A token as it stands in a JSON file: a string, or an object with its flags."""
    return token["content"] if isinstance(token, dict) else token


def special(
    backend: tokenizers.Tokenizer, said: Mapping[str, Any] = MappingProxyType({}), kind: Kind | None = None
) -> dict[str, str | None]:
    """role -> token: as a file says, else as the class does, else a usual name that the vocabulary has."""
    tokens = {}
    for role in ROLES:
        usual = next((name for name in _USUAL[role] if backend.token_to_id(name) is not None), None)
        tokens[role] = _content(said.get(f"{role}_token", kind.special.get(role) if kind else usual))
    return tokens


def _add(
    backend: tokenizers.Tokenizer,
    said: Mapping[str, Any],
    tokens: Mapping[str, str | None],
    added: Mapping[str, int],
) -> dict[str, int]:
    """Adds the tokens that files beside the vocabulary declare; gives the ids that they declare.

    New ones get the next ids in the order in which transformers numbers them: by declared id, then those with a role,
    then the others.  `added`: the content of added_tokens.json.
    """
    from tokenizers import AddedToken

    flags = {"single_word", "lstrip", "rstrip", "normalized", "special"}
    declared = {int(i): token for i, token in (said.get("added_tokens_decoder") or {}).items()}
    for token, i in added.items():
        declared.setdefault(i, {"content": token, "special": token in tokens.values()})
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    for _, token in sorted(declared.items()):
        if token["content"] not in there:
            backend.add_tokens([AddedToken(token["content"], **{name: token[name] for name in flags & token.keys()})])
    more: list[Any] = [tokens[role] for role in ROLES if said.get(f"{role}_token")]
    for others in (said.get("additional_special_tokens"), said.get("extra_special_tokens")):
        more += others.values() if isinstance(others, dict) else others or []
    for name in map(_content, more):
        if name and name not in there:
            backend.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    return {token["content"]: i for i, token in declared.items()}


def _check(backend: tokenizers.Tokenizer, declared: Mapping[str, int], file: Path) -> None:
    """Raises UserError where the files beside a vocabulary give a token another id than it has."""
    for token, i in declared.items():
        if backend.token_to_id(token) != i:
            raise UserError(
                f"{token!r} has the id {backend.token_to_id(token)} by {file} and {i} by the files beside it; "
                f"they belong to different tokenizers: copy all files of one"
            )


def _frame(
    backend: tokenizers.Tokenizer, said: Mapping[str, Any], kind: Kind | None, tokens: Mapping[str, str | None]
) -> tokenizers.processors.PostProcessor | None:
    """Sets what stands around a text, unless a tokenizer.json says it; gives what stands around a target text."""
    settings, target = _settings(kind, said), None
    wanted = kind is not None and backend.post_processor is None
    if kind and kind.frame:
        frame = kind.frame
    else:
        wanted = wanted or any(said.get(flag) is not None for flag in _FLAGS)
        bos, eos = (settings[f"add_{role}_token"] and tokens[role] is not None for role in ("bos", "eos"))
        single = f"{'bos ' * bool(bos)}$A{' eos' * bool(eos)}"
        frame = (single, f"{single} {'bos:1 ' * bool(bos)}$B:1{' eos:1' * bool(eos)}")
    if "src_lang" in settings:
        wanted = wanted or said.get("src_lang") is not None
        source, into = settings["src_lang"], settings["tgt_lang"] or settings["src_lang"]
        for language in (source, into):
            if backend.token_to_id(language) is None:
                raise UserError(f"the vocabulary has no language {language!r}; correct src_lang and tgt_lang")
        target = processor(backend, frame, {**tokens, "lang": into})
        tokens = {**tokens, "lang": source}
    if wanted and (around := processor(backend, frame, tokens)):
        backend.post_processor = around
    return target


def processor(
    backend: tokenizers.Tokenizer, frame: tuple[str, str], tokens: Mapping[str, str | None]
) -> tokenizers.processors.PostProcessor | None:
    """A `Kind.frame` with the tokens of a vocabulary; None where it lacks one of them."""
    from tokenizers import processors

    roles = set(re.findall("[a-z]+", " ".join(frame)))
    named = {str(tokens[role]): backend.token_to_id(str(tokens[role])) for role in roles}
    if None in named.values():
        return None
    single, pair = (
        [re.sub("[a-z]+", lambda role: str(tokens[role[0]]), part) for part in template.split()] for template in frame
    )
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(named.items()))


def _read_json(file: Path, said: Mapping[str, Any], kind: Kind | None) -> Read:
    from tokenizers import Tokenizer

    text = file.read_text(encoding="utf-8")
    if re.search(r'"continuing_subword_prefix"\s*:\s*"[^"]', text):
        # tokenizers 0.23 reads beyond its memory, and may end the process, for merges that lack the prefix.
        model = json.loads(text)["model"]
        prefix, merges = model["continuing_subword_prefix"], model.get("merges", [])
        rights = (merge.partition(" ")[2] if isinstance(merge, str) else merge[1] for merge in merges)
        if not all(right.startswith(prefix) for right in rights):
            raise UserError(f"{file} has the continuing_subword_prefix {prefix!r}, its merges do not; copy it again")
    return Read(Tokenizer.from_str(text), kind, {"tokenizer.json": file.read_bytes()})


def _read_wordpiece(file: Path, said: Mapping[str, Any], kind: Kind | None) -> Read:
    from tokenizers import models

    pieces = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    unk = _content(said.get("unk_token")) or "[UNK]"
    if unk not in pieces:
        raise UserError(f"{file} has no line {unk}; a WordPiece vocabulary holds one piece a line, {unk} among them")
    settings = _settings(KINDS["bert"], said)
    lowercase = settings["do_lower_case"]
    if lowercase is None:
        cased = any(p != p.lower() for p in pieces if not (p.startswith("[") and p.endswith("]")))
        lowercase = "tokenizer_class" in said or not cased  # a class of transformers that is not told does it
    ids = {piece: i for i, piece in enumerate(pieces)}
    backend = wordpiece(
        models.WordPiece(ids, unk_token=unk, max_input_chars_per_word=100),
        lowercase,
        settings["strip_accents"],
        settings["tokenize_chinese_chars"],
    )
    return Read(backend, kind or _likely(file, ids), {"vocab.txt": file.read_bytes()})


def wordpiece(
    model: tokenizers.models.Model, lowercase: bool, strip_accents: bool | None = None, chinese: bool = True
) -> tokenizers.Tokenizer:
    """Words as BERT divides them (Devlin et al. 2019); accents go with upper case unless it is said."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(True, chinese, strip_accents, lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _read_merges(file: Path, said: Mapping[str, Any], kind: Kind | None) -> Read:
    from tokenizers import Regex, models, normalizers, pre_tokenizers

    merges = _partner(file, file.name.replace("vocab.json", "merges.txt"))
    lines = merges.read_text(encoding="utf-8").split("\n")
    halves = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
    ids = _ids(file)
    kind = kind or _likely(file, ids)
    prefix = _settings(kind, said).get("add_prefix_space", False)
    backend = byte_level(models.BPE(ids, [(a, b) for a, _, b in halves]), prefix)
    if kind and kind.words:
        cut = pre_tokenizers.Split(Regex(kind.words), "isolated")
        spell = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        backend.normalizer, backend.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Sequence([cut, spell])
    return Read(backend, kind, {"vocab.json": file.read_bytes(), "merges.txt": merges.read_bytes()})


def byte_level(model: tokenizers.models.Model, prefix: bool = False) -> tokenizers.Tokenizer:
    """Words and bytes as GPT-2 divides them (Radford et al. 2019); `prefix`: with a space before the text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_sentencepiece(file: Path, said: Mapping[str, Any], kind: Kind | None) -> Read:
    model = file.read_bytes()
    proto = parsed(model)
    kind = kind or _likely(file, {piece.piece for piece in proto.pieces})
    name = file.name if file.name in _SENTENCEPIECE else "tokenizer.model"
    if kind is None:
        return Read(translated(proto, pieces_of(proto), lossless=True), kind, {name: model})
    settings = _settings(kind, said)
    return Read(
        translated(proto, _arranged(proto, kind, settings), settings), kind, {name: model}, config=_config(kind)
    )


def _config(kind: Kind) -> dict[str, Any]:
    return {"tokenizer_class": kind.name, **kind.settings}


def _read_marian(file: Path, said: Mapping[str, Any], kind: Kind | None) -> Read:
    """sentencepiece divides a text, by a model for each side; vocab.json numbers the pieces of both."""
    from tokenizers import AddedToken, Tokenizer, models

    kind = KINDS["marian"]
    numbers = _partner(file, "vocab.json")
    targets = _partner(file, "target_vocab.json") if _settings(kind, said)["separate_vocabs"] else numbers
    sides = []
    for spm, vocabulary in (("source.spm", numbers), ("target.spm", targets)):
        ids = {piece.replace("\u2581", " "): i for piece, i in _ids(vocabulary).items()}
        if lacks := sorted(set(kind.special.values()) - ids.keys()):
            raise UserError(f"{vocabulary} has no {', '.join(lacks)}; a Marian vocabulary needs them: copy it again")
        proto = parsed(_partner(file, spm).read_bytes())
        divide = translated(proto, pieces_of(proto))
        # The language to translate into, which users write before the text.
        divide.add_tokens([AddedToken(p, normalized=False) for p in ids if re.fullmatch(">>.+<<", p)])
        backend = Tokenizer(models.WordLevel(ids, unk_token=kind.special["unk"]))
        backend.decoder = divide.decoder
        sides.append(Read(backend, kind, {}, divide=divide))
    return sides[0]._replace(files=_contents(file, _MARIAN), config=_config(kind), target=sides[1])


def _arranged(proto: Any, kind: Kind, settings: Mapping[str, Any]) -> list[Piece]:
    """The pieces of a model by the ids that a class of transformers gives them."""
    pieces = pieces_of(proto)
    if kind.head:
        replaced = pieces[: kind.skip]
        if [piece.type for piece in replaced] != [UNKNOWN, CONTROL, CONTROL][: kind.skip]:
            raise UserError(
                f"this sentencepiece model begins with {[piece.text for piece in replaced]}, that of a {kind.name} "
                f"with {['<unk>', '<s>', '</s>'][: kind.skip]}; correct tokenizer_class or model_type"
            )
        first = [Piece(token, 0.0, UNKNOWN if token == kind.special["unk"] else CONTROL) for token in kind.head]
        pieces = first + pieces[kind.skip :]
    extra = settings.get("extra_ids", 0)
    if type(extra) is not int or not 0 <= extra <= 10_000:
        raise UserError(f"extra_ids is {extra!r}; it must be a number from 0 to 10000: correct tokenizer_config.json")
    last = [*kind.tail, *(f"<extra_id_{i}>" for i in reversed(range(extra)))]
    there = {piece.text for piece in pieces}
    return pieces + [Piece(token, 0.0, CONTROL) for token in last if token not in there]


_READERS = {".txt": _read_wordpiece, ".model": _read_sentencepiece, ".spm": _read_marian}

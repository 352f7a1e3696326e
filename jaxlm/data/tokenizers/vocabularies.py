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

from jaxlm.data.tokenizers.pieces import CONTROL, UNKNOWN, Piece, parsed, pieces_of, translated
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
# The types of what these files may say.
_BOOL, _TEXT, _TOKEN = ((bool,), "true or false"), ((str,), "a text"), ((str, dict), "a token")
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("do_lower_case", "strip_accents", "tokenize_chinese_chars", "keep_accents"), _BOOL),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "legacy"), _BOOL),
    **dict.fromkeys(("clean_up_tokenization_spaces", "separate_vocabs", "split_by_punct"), _BOOL),
    **dict.fromkeys(("tokenizer_class", "src_lang", "tgt_lang"), _TEXT),
    "extra_ids": ((int,), "a whole number"),
    "model_max_length": ((int, float), "a number"),
    "added_tokens_decoder": ((dict,), "an object"),
    **dict.fromkeys([f"{role}_token" for role in ROLES], _TOKEN),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), ((list, dict), "a list of tokens")),
}
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
    mask_strips: bool = False  # whether the mask token takes the space before it where no file says its flags


_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_T5 = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
_ROBERTA = _T5 | {"bos": "<s>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
_GEMMA = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
_END = "<|endoftext|>"
_TYPED = ("cls $A sep", "cls $A sep $B:1 sep:1")
_DOUBLED = ("cls $A sep", "cls $A sep sep $B sep")
_FLAGS = {"add_bos_token": False, "add_eos_token": False}
_LLAMA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_LLAMA_SETTINGS = {**_FLAGS, "add_bos_token": True, "add_prefix_space": True, "legacy": False}
_CLASSLESS = ("mistral", "mixtral")  # types of models for which transformers reads the files whatever class they name
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
        mask_strips=True,
    ),
    "mbart": Kind(
        "MBartTokenizer", _ROBERTA, ("$A eos lang", "$A $B eos lang"), _LANGUAGES,
        head=_FAIRSEQ, skip=3, tail=(*_MBART, "<mask>"), mask_strips=True,
    ),
    "mbart50": Kind(
        "MBart50Tokenizer", {role: token for role, token in _ROBERTA.items() if role != "bos"},
        ("lang $A eos", "lang $A $B eos"), _LANGUAGES, head=_FAIRSEQ, skip=3, tail=(*_MBART, *_MBART50, "<mask>"),
        mask_strips=True,
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
        ("mistral", "mixtral"), Kind("LlamaTokenizer", _LLAMA, None, _LLAMA_SETTINGS | {"legacy": True})
    ),
    "llama": Kind("LlamaTokenizer", _LLAMA, None, _LLAMA_SETTINGS),
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
    split_special_tokens: bool = False  # whether special tokens that are written in a text are spelled
    clean_up: bool = False  # whether decoding takes the space before punctuation away
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
    model_files.check_inside(file, path)
    return file


def read(file: Path) -> Read:
    """The tokenizer of a file and of those beside it.  Raises UserError, or what a library raises: see `readable`."""
    said: dict[str, Any] = {}
    for name in reversed(_SETTINGS):  # the first of them wins
        said |= _typed(_object(file.with_name(name)), file.with_name(name))
    model = _object(file.with_name("config.json"))
    reader = _read_merges if file.name.endswith("vocab.json") else _READERS.get(file.suffix, _read_json)
    whole = reader is _read_json
    found = reader(file, said, _kind(said, model, whole))

    kept = _contents(file, _FILES if whole else _BESIDE)
    if _key(model.get("model_type")) in _CLASSLESS:  # needed to read the files again
        kept["config.json"] = json.dumps({"model_type": model["model_type"]}).encode()
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
            if not whole:
                _make_special(part.backend, found.kind, tokens)
            declared = _add(part.backend, said, tokens, added)
            around = _frame(part.backend, said, found.kind, tokens, whole)
            if part is found and not whole:
                _check(part.backend, declared, file)
    return found._replace(
        files=kept | found.files,
        special=tokens,
        target=target or around,
        split_special_tokens=bool(said.get("split_special_tokens")),
        clean_up=_cleans_up(found, said),
    )


def _kind(said: Mapping[str, Any], model: Mapping[str, Any], whole: bool) -> Kind | None:
    """The kind that the files name: by the class, else by the type of the model in config.json.

    `whole`: of a tokenizer.json, where an unknown class declares nothing.
    """
    model_type = model.get("model_type")
    names = [said.get("tokenizer_class"), model.get("tokenizer_class"), model_type]
    if _key(model_type) in _CLASSLESS:
        names = [None if whole else model_type]
    elif whole:
        names = [name for name in names[:2] if name][:1] or [None if _key(model_type) == "llama" else model_type]
    return next((KINDS[_key(name)] for name in names if _key(name) in KINDS), None)


def _cleans_up(found: Read, said: Mapping[str, Any]) -> bool:
    """Whether decoding takes the space before punctuation away, as transformers does, but not for byte pairs."""
    from tokenizers import models

    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    wanted = bool(said.get("clean_up_tokenization_spaces"))
    return wanted and (bool(said.get(forced)) or not isinstance(found.backend.model, models.BPE))


def _typed(said: dict[str, Any], file: Path) -> dict[str, Any]:
    """The settings in a file.  Raises UserError for one of another type than it has to have; null is none."""
    for name, value in said.items():
        wanted = _TYPES.get(name)
        if wanted is None or value is None:
            continue
        kinds, what = wanted
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{file} has {name} {value!r:.60}; it must be {what}: correct it")
    tokens: list[Any] = [said.get(f"{role}_token") for role in ROLES]
    for name in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        tokens += said[name].values() if isinstance(said.get(name), dict) else said.get(name) or []
    for token in tokens:
        content = token.get("content") if isinstance(token, dict) else token
        flags = token.values() if isinstance(token, dict) else ()
        if token is not None and not (isinstance(content, str) and all(isinstance(f, str | bool) for f in flags)):
            raise UserError(
                f"{file} has the token {token!r:.60}; it must be a text, or an object with content and flags"
            )
    for i in said.get("added_tokens_decoder") or {}:
        if not (i.isascii() and i.isdigit() and int(i[:12]) < 1 << 31):
            raise UserError(f"{file} has an added token with the id {i!r:.40}; ids are whole numbers from 0 on")
    return said


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
    then the others.  The flags of a token are those of added_tokens_decoder, else those of the vocabulary's own file,
    else those of its role.  `added`: the content of added_tokens.json.
    """
    roles = {token for token in tokens.values() if token}
    declared = {int(i): token for i, token in (said.get("added_tokens_decoder") or {}).items()}
    flagged = {token["content"] for token in declared.values()}
    for token, i in added.items():
        declared.setdefault(i, {"content": token, "special": token in tokens.values()})
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    for _, token in sorted(declared.items()):
        if token["content"] not in there or token["content"] in flagged:
            special = token["content"] in roles or bool(token.get("special"))
            backend.add_tokens([_added_token(token, special)])
    there |= {token["content"] for token in declared.values()}
    more: list[Any] = [said[f"{role}_token"] for role in ROLES if said.get(f"{role}_token")]
    named = [value for name, value in said.items() if name.endswith("_token") and name[:-6] not in ROLES]
    more += [value for value in named if isinstance(value, str)]  # of one model, such as image_token
    for others in (said.get("additional_special_tokens"), said.get("extra_special_tokens")):
        more += others.values() if isinstance(others, dict) else others or []
    for token in more:
        if (name := _content(token)) and name not in there:
            there.add(name)
            backend.add_tokens([_added_token(token, True)])
    return {token["content"]: i for i, token in declared.items()}


def _make_special(backend: tokenizers.Tokenizer, kind: Kind | None, tokens: Mapping[str, str | None]) -> None:
    """Makes the tokens with a role special tokens, with the flags that the class gives them.

    Some sentencepiece models have them as symbols of the user's, such as Gemma's <mask>.
    """
    for role, token in tokens.items():
        if token and backend.token_to_id(token) is not None:
            strips = role == "mask" and bool(kind and kind.mask_strips)
            backend.add_tokens([_added_token({"content": token, "lstrip": strips}, True)])


def _added_token(token: Any, special: bool) -> tokenizers.AddedToken:
    """A token that a file declares, by its name or by an object with flags."""
    from tokenizers import AddedToken

    if not isinstance(token, dict):
        return AddedToken(token, special=special, normalized=not special)
    flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
    return AddedToken(token["content"], **{"normalized": not special, **flags, "special": special})


def _check(backend: tokenizers.Tokenizer, declared: Mapping[str, int], file: Path) -> None:
    """Raises UserError where the files beside a vocabulary give a token another id than it has."""
    for token, i in declared.items():
        if backend.token_to_id(token) != i:
            raise UserError(
                f"{token!r} has the id {backend.token_to_id(token)} by {file} and {i} by the files beside it; "
                f"they belong to different tokenizers: copy all files of one"
            )


def _frame(
    backend: tokenizers.Tokenizer,
    said: Mapping[str, Any],
    kind: Kind | None,
    tokens: Mapping[str, str | None],
    whole: bool,
) -> tokenizers.processors.PostProcessor | None:
    """Sets what stands around a text; gives what stands around a target text.

    It is the frame of the class, where that has one.  Else a tokenizer.json (`whole`) says it alone, and beside the
    older files add_bos_token and add_eos_token do.
    """
    settings, target = _settings(kind, said), None
    wanted = kind is not None and backend.post_processor is None
    if kind and kind.frame:
        frame, wanted = kind.frame, True
    else:
        wanted = not whole and (wanted or any(said.get(flag) is not None for flag in _FLAGS))
        bos, eos = (settings[f"add_{role}_token"] and tokens[role] is not None for role in ("bos", "eos"))
        frame = frame_of(bool(bos), bool(eos))
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


def frame_of(bos: bool, eos: bool) -> tuple[str, str]:
    """A `Kind.frame` with BOS before each text, EOS after it, both or neither."""
    single = f"{'bos ' * bos}$A{' eos' * eos}"
    return single, f"{single} {'bos:1 ' * bos}$B:1{' eos:1' * eos}"


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
    if kind is not None:
        text = json.dumps(_with_settings(json.loads(text), kind, said))
    return Read(Tokenizer.from_str(text), kind, {"tokenizer.json": file.read_bytes()})


def _with_settings(described: dict[str, Any], kind: Kind, said: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json with the settings of tokenizer_config.json, which win as in transformers.

    BERT's class makes its normalizer from its settings, those over bytes the space before the first word, and both
    have a default where nothing is said.  For the classes over sentencepiece a setting changes something where it is
    said.  Unlike transformers 5, what has no setting stays as in tokenizer.json, such as SmolLM's rule for digits.
    """
    model = described.get("model") or {}
    if kind.name == "BertTokenizer" and model.get("type", "WordPiece") == "WordPiece":
        settings = _settings(kind, said)
        described["normalizer"] = {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": settings["tokenize_chinese_chars"],
            "strip_accents": settings["strip_accents"],
            "lowercase": True if settings["do_lower_case"] is None else settings["do_lower_case"],
        }
        described["pre_tokenizer"] = {"type": "BertPreTokenizer"}
        return described
    if "legacy" in kind.settings and "ByteLevel" not in json.dumps(described.get("pre_tokenizer")):
        return described if said.get("legacy") else _llama(described, said)
    prefix = said.get("add_prefix_space")
    if kind.settings.get("add_prefix_space") is False:
        prefix = bool(prefix)
    if "add_prefix_space" in kind.settings and prefix is not None:
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            described[part] = _with_prefix(described.get(part), prefix)
    dropped = {"Lowercase"} if said.get("do_lower_case") is False else set()
    if "keep_accents" in kind.settings and said.get("keep_accents"):
        dropped |= {"NFKD", "StripAccents"}
    if "do_lower_case" in kind.settings:
        described["normalizer"] = _without(described.get("normalizer"), dropped)
        if said.get("do_lower_case"):
            described["normalizer"] = _sequence("normalizers", {"type": "Lowercase"}, described["normalizer"])
    return described


def _llama(described: dict[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json of Llama's class, which older versions of transformers wrote with other steps."""
    prefix = said.get("add_prefix_space") is not False
    metaspace = {"replacement": "\u2581", "prepend_scheme": "first" if prefix else "never", "split": False}
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix
    return described | {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", **metaspace},
        "decoder": {"type": "Sequence", "decoders": steps},
    }


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """The members of a component of a tokenizer.json, which is a sequence, one member or null."""
    if component is None:
        return []
    return component[name] if component.get("type") == "Sequence" else [component]


def _sequence(name: str, *components: Any) -> dict[str, Any] | None:
    """The component of a tokenizer.json that applies these, one after the other; None for none."""
    members = [member for component in components for member in _parts(component, name)]
    return {"type": "Sequence", name: members} if len(members) > 1 else next(iter(members), None)


def _without(component: Any, kinds: set[str]) -> Any:
    """A normalizer without its members of some types."""
    return _sequence("normalizers", *(m for m in _parts(component, "normalizers") if m.get("type") not in kinds))


def _with_prefix(component: Any, prefix: bool) -> Any:
    """A component of a tokenizer.json that does, or does not, put a space before the first word."""
    if not isinstance(component, dict):
        return component
    for name in ("normalizers", "pretokenizers", "decoders"):
        if isinstance(component.get(name), list):
            return component | {name: [_with_prefix(member, prefix) for member in component[name]]}
    if component.get("type") == "ByteLevel":
        return component | {"add_prefix_space": prefix}
    if component.get("type") == "Metaspace" and (component.get("prepend_scheme", "always") == "never") == prefix:
        return component | {"prepend_scheme": "always" if prefix else "never"}
    return component


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

"""Readers of the tokenizer files of checkpoints: each returns a `tokenizers.Tokenizer`.

A tokenizer.json is complete.  The older files contain little more than the pieces; the rest, such as the ids before the
first piece or the special tokens around a text, is defined by the tokenizer classes of transformers and listed in one
table here, `TOKENIZER_SPECS`.  Where these classes and sentencepiece differ, this module follows sentencepiece, which
the models were trained with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxlm.data.tokenizers.pieces import CONTROL, UNKNOWN, Piece, convert, list_pieces, parse_model
from jaxlm.errors import UserError
from jaxlm.hub import model_files
from jaxlm.hub.gguf.words import QWEN_2

if TYPE_CHECKING:
    import tokenizers

_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_COMPANIONS = (*_CONFIG_FILES, "added_tokens.json", "chat_template.jinja", "chat_template.json")
_SENTENCEPIECE = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "spm.model")
_MARIAN = ("source.spm", "target.spm", "vocab.json", "target_vocab.json")
# All of these are saved with a tokenizer.json: older programs read the vocabulary files that it was made from.
_ALL_FILES = ("tokenizer.json", *_COMPANIONS, *_SENTENCEPIECE, *_MARIAN, "merges.txt", "vocab.txt")
_SEARCH_ORDER = ("tokenizer.json", "*.spm", *_SENTENCEPIECE, "*.model", "vocab.txt", "vocab.json")

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # in the order in which transformers adds them
# Types of the fields of these files.
_BOOL, _TEXT, _TOKEN = ((bool,), "true or false"), ((str,), "a string"), ((str, dict), "a token")
_FIELD_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("do_lower_case", "strip_accents", "tokenize_chinese_chars", "keep_accents"), _BOOL),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "legacy"), _BOOL),
    **dict.fromkeys(("clean_up_tokenization_spaces", "separate_vocabs", "split_by_punct"), _BOOL),
    "legacy_behaviour": _BOOL,
    **dict.fromkeys(("tokenizer_class", "src_lang", "tgt_lang"), _TEXT),
    **dict.fromkeys(("extra_ids", "offset"), ((int,), "an integer")),
    "model_max_length": ((int, float), "a number"),
    "added_tokens_decoder": ((dict,), "an object"),
    **dict.fromkeys([f"{role}_token" for role in ROLES], _TOKEN),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), ((list, dict), "a list of tokens")),
}
# Names of special tokens if neither a file nor a class defines them, the most likely name first.
_COMMON_NAMES = {
    "bos": ("<s>", "<bos>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}


class TokenizerSpec(NamedTuple):
    """Properties of a tokenizer class of transformers that the vocabulary files do not contain."""

    name: str  # name of the class
    special: Mapping[str, str]  # role -> token
    # Templates of the special tokens around a text $A and a pair $A $B; ":1" is token type 1.
    frame: tuple[str, str] | None  # None: determined by add_bos_token and add_eos_token
    settings: Mapping[str, Any] = MappingProxyType({})  # defaults of the settings in tokenizer_config.json
    head: tuple[str, ...] = ()  # sentencepiece: first tokens, which replace the first `skip` pieces of the file
    skip: int = 0
    tail: tuple[str, ...] = ()  # sentencepiece: last tokens
    words: str = ""  # byte-level BPE: regular expression that matches words; empty: GPT-2's
    language: str = "{}"  # format of the token of a language
    mask_strips: bool = False  # whether the mask token absorbs the space before it, if no file declares its flags


_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_BERT_SETTINGS = {"do_lower_case": None, "strip_accents": None, "tokenize_chinese_chars": True}
_T5 = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
_ROBERTA = _T5 | {"bos": "<s>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
_GEMMA = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
_END = "<|endoftext|>"
_TYPED = ("cls $A sep", "cls $A sep $B:1 sep:1")
_DOUBLED = ("cls $A sep", "cls $A sep sep $B sep")
_FLAGS = {"add_bos_token": False, "add_eos_token": False}
_LLAMA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_LLAMA_SETTINGS = {**_FLAGS, "add_bos_token": True, "add_prefix_space": True, "legacy": False}
_CLASS_IGNORED = ("mistral", "mixtral", "phi3")  # model types for which transformers ignores the tokenizer class
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
_NLLB = (
    "ace_Arab ace_Latn acm_Arab acq_Arab aeb_Arab afr_Latn ajp_Arab aka_Latn amh_Ethi apc_Arab arb_Arab "
    "ars_Arab ary_Arab arz_Arab asm_Beng ast_Latn awa_Deva ayr_Latn azb_Arab azj_Latn bak_Cyrl bam_Latn "
    "ban_Latn bel_Cyrl bem_Latn ben_Beng bho_Deva bjn_Arab bjn_Latn bod_Tibt bos_Latn bug_Latn bul_Cyrl "
    "cat_Latn ceb_Latn ces_Latn cjk_Latn ckb_Arab crh_Latn cym_Latn dan_Latn deu_Latn dik_Latn dyu_Latn "
    "dzo_Tibt ell_Grek eng_Latn epo_Latn est_Latn eus_Latn ewe_Latn fao_Latn pes_Arab fij_Latn fin_Latn "
    "fon_Latn fra_Latn fur_Latn fuv_Latn gla_Latn gle_Latn glg_Latn grn_Latn guj_Gujr hat_Latn hau_Latn "
    "heb_Hebr hin_Deva hne_Deva hrv_Latn hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn "
    "jav_Latn jpn_Jpan kab_Latn kac_Latn kam_Latn kan_Knda kas_Arab kas_Deva kat_Geor knc_Arab knc_Latn "
    "kaz_Cyrl kbp_Latn kea_Latn khm_Khmr kik_Latn kin_Latn kir_Cyrl kmb_Latn kon_Latn kor_Hang kmr_Latn "
    "lao_Laoo lvs_Latn lij_Latn lim_Latn lin_Latn lit_Latn lmo_Latn ltg_Latn ltz_Latn lua_Latn lug_Latn "
    "luo_Latn lus_Latn mag_Deva mai_Deva mal_Mlym mar_Deva min_Latn mkd_Cyrl plt_Latn mlt_Latn mni_Beng "
    "khk_Cyrl mos_Latn mri_Latn zsm_Latn mya_Mymr nld_Latn nno_Latn nob_Latn npi_Deva nso_Latn nus_Latn "
    "nya_Latn oci_Latn gaz_Latn ory_Orya pag_Latn pan_Guru pap_Latn pol_Latn por_Latn prs_Arab pbt_Arab "
    "quy_Latn ron_Latn run_Latn rus_Cyrl sag_Latn san_Deva sat_Beng scn_Latn shn_Mymr sin_Sinh slk_Latn "
    "slv_Latn smo_Latn sna_Latn snd_Arab som_Latn sot_Latn spa_Latn als_Latn srd_Latn srp_Cyrl ssw_Latn "
    "sun_Latn swe_Latn swh_Latn szl_Latn tam_Taml tat_Cyrl tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi "
    "taq_Latn taq_Tfng tpi_Latn tsn_Latn tso_Latn tuk_Latn tum_Latn tur_Latn twi_Latn tzm_Tfng uig_Arab "
    "ukr_Cyrl umb_Latn urd_Arab uzn_Latn vec_Latn vie_Latn war_Latn wol_Latn xho_Latn ydd_Hebr yor_Latn "
    "yue_Hant zho_Hans zho_Hant zul_Latn "
)
_M2M_100 = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi "
    "hr ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns "
    "oc or pa pl ps pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh "
    "zu "
)

# Keys: tokenizer classes and model types in lower-case letters and digits, without "Tokenizer" and "Fast".
TOKENIZER_SPECS: dict[str, TokenizerSpec] = {
    **dict.fromkeys(
        ("bert", "distilbert", "electra"), TokenizerSpec("BertTokenizer", _BERT, _TYPED, _BERT_SETTINGS)
    ),
    "mpnet": TokenizerSpec(
        "MPNetTokenizer", _ROBERTA | {"unk": "[UNK]"}, _DOUBLED, _BERT_SETTINGS, mask_strips=True
    ),
    **dict.fromkeys(
        ("roberta", "bart", "longformer", "led"),
        TokenizerSpec("RobertaTokenizer", _ROBERTA, _DOUBLED, {"add_prefix_space": False}),
    ),
    "xlmroberta": TokenizerSpec("XLMRobertaTokenizer", _ROBERTA, _DOUBLED, head=_FAIRSEQ, skip=3, tail=("<mask>",)),
    "camembert": TokenizerSpec(
        "CamembertTokenizer", _ROBERTA, _DOUBLED,
        head=("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"), skip=1, tail=("<mask>",),
        mask_strips=True,
    ),
    "mbart": TokenizerSpec(
        "MBartTokenizer", _ROBERTA, ("$A eos lang", "$A $B eos lang"), _LANGUAGES,
        head=_FAIRSEQ, skip=3, tail=(*_MBART, "<mask>"), mask_strips=True,
    ),
    "mbart50": TokenizerSpec(
        "MBart50Tokenizer", {role: token for role, token in _ROBERTA.items() if role != "bos"},
        ("lang $A eos", "lang $A $B eos"), _LANGUAGES, head=_FAIRSEQ, skip=3, tail=(*_MBART, *_MBART50, "<mask>"),
        mask_strips=True,
    ),
    "nllb": TokenizerSpec(
        "NllbTokenizer", _ROBERTA, ("lang $A eos", "lang $A $B eos"),
        {"src_lang": "eng_Latn", "tgt_lang": None, "legacy_behaviour": False},
        head=_FAIRSEQ, skip=3, tail=(*_NLLB.split(), "<mask>"), mask_strips=True,
    ),
    "m2m100": TokenizerSpec(
        "M2M100Tokenizer", _T5 | {"bos": "<s>", "sep": "</s>"}, ("lang $A eos", "lang $A $B eos"),
        {"src_lang": "en", "tgt_lang": None}, tail=tuple(f"__{code}__" for code in _M2M_100.split()), language="__{}__",
    ),
    "pegasus": TokenizerSpec(
        "PegasusTokenizer", _T5 | {"mask": "<mask_2>"}, ("$A eos", "$A $B eos"), {"offset": 103},
        head=("<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{i}>" for i in range(2, 103))), skip=2,
    ),
    "albert": TokenizerSpec(
        "AlbertTokenizer", _BERT | {"bos": "[CLS]", "eos": "[SEP]", "unk": "<unk>", "pad": "<pad>"}, _TYPED,
        {"do_lower_case": True, "keep_accents": False},
    ),
    "xlnet": TokenizerSpec(
        "XLNetTokenizer", _LLAMA | {"sep": "<sep>", "pad": "<pad>", "cls": "<cls>", "mask": "<mask>"},
        ("$A sep cls:2", "$A sep $B:1 sep:1 cls:2"), {"do_lower_case": False, "keep_accents": False},
    ),
    "debertav2": TokenizerSpec(
        "DebertaV2Tokenizer", _BERT | {"bos": "[CLS]", "eos": "[SEP]"}, _TYPED, {"do_lower_case": False},
        tail=("[MASK]",),
    ),
    **dict.fromkeys(
        ("t5", "mt5", "umt5"), TokenizerSpec("T5Tokenizer", _T5, ("$A eos", "$A eos $B eos"), {"extra_ids": 100})
    ),
    "marian": TokenizerSpec("MarianTokenizer", _T5, ("$A eos", "$A $B eos"), {"separate_vocabs": False}),
    **dict.fromkeys(
        _CLASS_IGNORED,
        TokenizerSpec("LlamaTokenizer", _LLAMA, None, _LLAMA_SETTINGS | {"legacy": True}),
    ),
    "llama": TokenizerSpec("LlamaTokenizer", _LLAMA, None, _LLAMA_SETTINGS),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3", "gemma3text"),
        TokenizerSpec("GemmaTokenizer", _GEMMA, None, {**_FLAGS, "add_bos_token": True}),
    ),
    **dict.fromkeys(
        ("gpt2", "gptneo", "gptj", "opt"),
        TokenizerSpec(
            "GPT2Tokenizer", {"bos": _END, "eos": _END, "unk": _END}, None, {**_FLAGS, "add_prefix_space": False}
        ),
    ),
    **dict.fromkeys(
        ("qwen2", "qwen2moe", "qwen3", "qwen3moe"),
        TokenizerSpec(
            "Qwen2Tokenizer", {"eos": _END, "unk": _END, "pad": _END}, None, {**_FLAGS, "add_prefix_space": False},
            words=QWEN_2,
        ),
    ),
}  # fmt: skip
# Candidates if no file names a class: the first one with special tokens in the vocabulary, else the last.
_DEFAULT_SPECS = {
    "sentencepiece.bpe.model": ("xlmroberta",),
    "spiece.model": ("albert", "xlnet", "t5"),
    "spm.model": ("debertav2",),
    "vocab.txt": ("mpnet", "bert"),
    "vocab.json": ("roberta", "gpt2"),
}


class ParsedTokenizer(NamedTuple):
    """A tokenizer as defined by its files."""

    backend: tokenizers.Tokenizer
    spec: TokenizerSpec | None
    files: dict[str, bytes]  # name -> content, to be saved again
    special: Mapping[str, str | None] = MappingProxyType({})  # role -> token
    # Fields of a tokenizer_config.json that makes a tokenizer.json unnecessary in transformers; empty: it is necessary.
    config: Mapping[str, Any] = MappingProxyType({})
    segmenter: tokenizers.Tokenizer | None = None  # segments texts, if `backend` only maps pieces to ids
    split_special_tokens: bool = False  # whether special tokens written in a text are split like other text
    clean_up: bool = False  # whether decoding removes the space before punctuation
    # For target texts, if they are encoded differently: another tokenizer (Marian) or another frame (mBART).
    target: ParsedTokenizer | tokenizers.processors.PostProcessor | None = None


@contextmanager
def wrap_errors(file: object) -> Iterator[None]:
    """Converts the errors that libraries raise while they parse a file to a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # a Rust panic is a PanicException, which is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip()[:200] or type(error).__name__
        raise UserError(f"{file} is not a valid tokenizer ({reason}); copy it and its companion files again") from None


def find(path: Path) -> Path:
    """Returns the main tokenizer file at a path: the file itself, or the most complete one of a folder.

    Raises:
      UserError: if there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"there is no tokenizer file or folder {str(path)!r}; set --tokenizer.path")
    file = next((file for pattern in _SEARCH_ORDER for file in sorted(path.glob(pattern)) if file.is_file()), None)
    if file is None:
        raise UserError(
            f"the folder {path} contains no tokenizer.json, .model, .spm, vocab.txt or vocab.json; "
            f"set --tokenizer.path to a folder or file with a tokenizer"
        )
    model_files.check_inside(file, path)
    return file


def read(file: Path) -> ParsedTokenizer:
    """Reads a tokenizer from a file and the other tokenizer files in its folder.

    Raises:
      UserError: for invalid files.  Libraries raise other exceptions for some of them: see `wrap_errors`.
    """
    config: dict[str, Any] = {}
    for name in reversed(_CONFIG_FILES):  # the first one takes precedence
        config |= _check_types(_read_object(file.with_name(name)), file.with_name(name))
    model = _read_object(file.with_name("config.json"))
    reader = _read_merges if file.name.endswith("vocab.json") else _READERS.get(file.suffix, _read_json)
    whole = reader is _read_json
    found = reader(file, config, _named_spec(config, model, whole))

    files = _read_files(file, _ALL_FILES if whole else _COMPANIONS)
    if _key(model.get("model_type")) in _CLASS_IGNORED:  # needed to read the files again
        files["config.json"] = json.dumps({"model_type": model["model_type"]}).encode()
    for template in model_files.locate_all(file.parent, "additional_chat_templates/*.jinja"):
        files[f"additional_chat_templates/{template.name}"] = model_files.read_bytes(template)
    unnamed = found.config and _key(config.get("tokenizer_class")) not in TOKENIZER_SPECS
    if unnamed and "tokenizer_config.json" in files and found.spec is not _guess_spec(file, found.backend.get_vocab()):
        # Only config.json, which is not saved with the tokenizer, named the class.
        files["tokenizer_config.json"] = json.dumps(
            {**found.config, **config, "tokenizer_class": found.config["tokenizer_class"]}, indent=2
        ).encode()

    tokens = special_tokens(found.backend, config, found.spec)
    added = {} if whole else _read_object(file.with_name("added_tokens.json"))
    target = found.target
    for part in (found, target):
        if isinstance(part, ParsedTokenizer):
            if not whole:
                _mark_special(part.backend, found.spec, tokens)
            declared = _add_declared(part.backend, config, tokens, added)
            target_frame = _set_frames(part.backend, config, found.spec, tokens, whole)
            if part is found and not whole:
                _check_ids(part.backend, declared, file)
    return found._replace(
        files=files | found.files,
        special=tokens,
        target=target or target_frame,
        split_special_tokens=bool(config.get("split_special_tokens")),
        clean_up=_cleans_up_spaces(found, config),
    )


def _named_spec(config: Mapping[str, Any], model: Mapping[str, Any], whole: bool) -> TokenizerSpec | None:
    """Returns the spec of the class that the files name, else of the model type in config.json.

    `whole`: whether there is a tokenizer.json; then an unknown class has no spec, whatever the model type.
    """
    model_type = model.get("model_type")
    names = [config.get("tokenizer_class"), model.get("tokenizer_class"), model_type]
    if _key(model_type) in _CLASS_IGNORED:
        names = [None if whole else model_type]
    elif whole:
        names = [name for name in names[:2] if name][:1] or [None if _key(model_type) == "llama" else model_type]
    return next((TOKENIZER_SPECS[_key(name)] for name in names if _key(name) in TOKENIZER_SPECS), None)


def _cleans_up_spaces(found: ParsedTokenizer, config: Mapping[str, Any]) -> bool:
    """Returns whether decoding removes the space before punctuation; like transformers, never for BPE by default."""
    from tokenizers import models

    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    enabled = bool(config.get("clean_up_tokenization_spaces"))
    return enabled and (bool(config.get(forced)) or not isinstance(found.backend.model, models.BPE))


def _check_types(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Returns the settings of a file.  Raises UserError if one is of the wrong type; null counts as absent."""
    for name, value in config.items():
        if name not in _FIELD_TYPES or value is None:
            continue
        types, description = _FIELD_TYPES[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise UserError(f"{file} has {name} {value!r:.60}; it must be {description}: correct it")
    tokens: list[Any] = [config.get(f"{role}_token") for role in ROLES]
    for name in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        tokens += config[name].values() if isinstance(config.get(name), dict) else config.get(name) or []
    for token in tokens:
        content = token.get("content") if isinstance(token, dict) else token
        flags = token.values() if isinstance(token, dict) else ()
        if token is not None and not (isinstance(content, str) and all(isinstance(f, str | bool) for f in flags)):
            raise UserError(
                f"{file} has the token {token!r:.60}; it must be a string, or an object with content and flags"
            )
    for i in config.get("added_tokens_decoder") or {}:
        if not (i.isascii() and i.isdigit() and int(i[:12]) < 1 << 31):
            raise UserError(f"{file} has an added token with the id {i!r:.40}; ids must be integers from 0: correct it")
    return config


def _spec_settings(spec: TokenizerSpec | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a class with the values of the files; null stands for the default."""
    defaults = spec.settings if spec else _FLAGS
    return {name: default if config.get(name) is None else config[name] for name, default in defaults.items()}


def _key(name: str | None) -> str:
    return re.sub("tokenizer|fast|[^a-z0-9]", "", (name or "").lower())


def _guess_spec(file: Path, pieces: Container[str]) -> TokenizerSpec | None:
    """Returns the most likely spec of a vocabulary if no file names a class."""
    specs = [TOKENIZER_SPECS[name] for name in _DEFAULT_SPECS.get(file.name, ())]
    matching = [spec for spec in specs if all(token in pieces for token in spec.special.values())]
    return next(iter(matching + specs[-1:]), None)


def _read_object(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; empty if there is no file."""
    found = model_files.locate(file.parent, file.name)
    return {} if found is None else model_files.read_object(found)


def _ids(file: Path) -> dict[str, int]:
    """Returns piece -> id from a vocab.json."""
    ids = _read_object(file)
    wrong = next((piece for piece, i in ids.items() if type(i) is not int or i < 0), None)
    if not ids or wrong is not None or len(set(ids.values())) < len(ids):
        fault = "no pieces" if not ids else "two pieces with one id" if wrong is None else f"{wrong!r}: {ids[wrong]!r}"
        raise UserError(f"{file} has {fault}; each piece must have a different id, from 0; copy the file again")
    return ids


def vocabulary_size(ids: Mapping[str, int]) -> int:
    """Returns the largest id + 1.

    Raises:
      UserError: if the ids are so sparse that tables over them would fill the memory.
    """
    size = max(ids.values(), default=-1) + 1
    if not 0 < size <= 2 * len(ids) + 1000:
        raise UserError(
            f"the vocabulary has {len(ids)} pieces and ids up to {size - 1}, more than {2 * len(ids) + 999}; "
            f"its file is damaged: copy it again"
        )
    return size


def _read_files(file: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Returns the contents of the files of these names in the folder of a file; missing ones are left out."""
    found = {name: model_files.locate(file.parent, name) for name in names}
    return {name: model_files.read_bytes(path) for name, path in found.items() if path is not None}


def _companion(file: Path, name: str) -> Path:
    companion = file.with_name(name)
    if not companion.is_file():
        raise UserError(f"{file} requires {name}, but there is no {companion}; put {name} in the same folder")
    return companion


def _token_text(token: Any) -> str | None:
    """Returns the text of a token in a JSON file: a string, or an object with flags."""
    return token["content"] if isinstance(token, dict) else token


def special_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any] = MappingProxyType({}), spec: TokenizerSpec | None = None
) -> dict[str, str | None]:
    """Returns role -> token: from a file, else from the class, else a common name that the vocabulary has."""
    tokens = {}
    for role in ROLES:
        common = next((name for name in _COMMON_NAMES[role] if backend.token_to_id(name) is not None), None)
        tokens[role] = _token_text(config.get(f"{role}_token", spec.special.get(role) if spec else common))
    return tokens


def _add_declared(
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    tokens: Mapping[str, str | None],
    added: Mapping[str, int],
) -> dict[str, int]:
    """Adds the tokens that companion files declare, and returns token -> declared id.

    New tokens get the next ids in the order that transformers uses: first by declared id, then those with a role, then
    the others.  The flags of a token come from added_tokens_decoder, else from the vocabulary file, else from its role.
    `added` is the content of added_tokens.json.
    """
    roles = {token for token in tokens.values() if token}
    declared = {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()}
    flagged = {token["content"] for token in declared.values()}
    for token, i in added.items():
        declared.setdefault(i, {"content": token, "special": token in tokens.values()})
    existing = {token.content for token in backend.get_added_tokens_decoder().values()}
    for _, token in sorted(declared.items()):
        if token["content"] not in existing or token["content"] in flagged:
            special = token["content"] in roles or bool(token.get("special"))
            backend.add_tokens([_added_token(token, special)])
    existing |= {token["content"] for token in declared.values()}
    more: list[Any] = [config[f"{role}_token"] for role in ROLES if config.get(f"{role}_token")]
    named = [value for name, value in config.items() if name.endswith("_token") and name[:-6] not in ROLES]
    more += [value for value in named if isinstance(value, str)]  # model-specific ones, such as image_token
    for others in (config.get("additional_special_tokens"), config.get("extra_special_tokens")):
        more += others.values() if isinstance(others, dict) else others or []
    for token in more:
        if (name := _token_text(token)) and name not in existing:
            existing.add(name)
            backend.add_tokens([_added_token(token, True)])
    return {token["content"]: i for i, token in declared.items()}


def _mark_special(backend: tokenizers.Tokenizer, spec: TokenizerSpec | None, tokens: Mapping[str, str | None]) -> None:
    """Marks the tokens with a role as special tokens, with the flags of the class.

    In some sentencepiece models they are user-defined symbols, such as Gemma's <mask>.
    """
    for role, token in tokens.items():
        if token and backend.token_to_id(token) is not None:
            strips = role == "mask" and bool(spec and spec.mask_strips)
            backend.add_tokens([_added_token({"content": token, "lstrip": strips}, True)])


def _added_token(token: Any, special: bool) -> tokenizers.AddedToken:
    """Converts a token from a JSON file, a string or an object with flags."""
    from tokenizers import AddedToken

    if not isinstance(token, dict):
        return AddedToken(token, special=special, normalized=not special)
    flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
    return AddedToken(token["content"], **{"normalized": not special, **flags, "special": special})


def _check_ids(backend: tokenizers.Tokenizer, declared: Mapping[str, int], file: Path) -> None:
    """Raises UserError if the companion files declare another id for a token than the vocabulary."""
    for token, i in declared.items():
        if backend.token_to_id(token) != i:
            raise UserError(
                f"{token!r} has the id {backend.token_to_id(token)} in {file} and {i} in its companion files; "
                f"they belong to different tokenizers: copy all files of one"
            )


def _set_frames(
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    spec: TokenizerSpec | None,
    tokens: Mapping[str, str | None],
    whole: bool,
) -> tokenizers.processors.PostProcessor | None:
    """Sets the special tokens around a text, and returns those around a target text.

    They are the frame of the class, if it has one.  Otherwise a tokenizer.json (`whole`) defines them, and for the
    older files add_bos_token and add_eos_token do.
    """
    settings, target = _spec_settings(spec, config), None
    replace = spec is not None and backend.post_processor is None
    if spec and spec.frame:
        frame, replace = spec.frame, True
    else:
        replace = not whole and (replace or any(config.get(flag) is not None for flag in _FLAGS))
        bos, eos = (settings[f"add_{role}_token"] and tokens[role] is not None for role in ("bos", "eos"))
        frame = bos_eos_frame(bool(bos), bool(eos))
    if "src_lang" in settings:
        replace = replace or config.get("src_lang") is not None
        if settings.get("legacy_behaviour"):
            frame = TOKENIZER_SPECS["mbart"].frame or frame
        assert spec is not None
        languages = settings["src_lang"], settings["tgt_lang"] or settings["src_lang"]
        source_language, target_language = (spec.language.format(language) for language in languages)
        for language in (source_language, target_language):
            if backend.token_to_id(language) is None:
                raise UserError(f"the vocabulary has no language {language!r}; correct src_lang and tgt_lang")
        target = _make_processor(backend, frame, {**tokens, "lang": target_language})
        tokens = {**tokens, "lang": source_language}
    if replace:
        set_frame(backend, frame, tokens)
    return target


def bos_eos_frame(bos: bool, eos: bool) -> tuple[str, str]:
    """Returns a `TokenizerSpec.frame` with BOS before each text, EOS after it, both or neither."""
    single = f"{'bos ' * bos}$A{' eos' * eos}"
    return single, f"{single} {'bos:1 ' * bos}$B:1{' eos:1' * eos}"


def set_frame(backend: tokenizers.Tokenizer, frame: tuple[str, str], tokens: Mapping[str, str | None]) -> None:
    """Makes a tokenizer add the special tokens of a `TokenizerSpec.frame`, if its vocabulary has all of them."""
    if processor := _make_processor(backend, frame, tokens):
        backend.post_processor = processor


def _make_processor(
    backend: tokenizers.Tokenizer, frame: tuple[str, str], tokens: Mapping[str, str | None]
) -> tokenizers.processors.PostProcessor | None:
    """Returns a post-processor for a `TokenizerSpec.frame`; None if the vocabulary lacks one of its tokens."""
    from tokenizers import processors

    roles = set(re.findall("[a-z]+", " ".join(frame)))
    named = {str(tokens[role]): backend.token_to_id(str(tokens[role])) for role in roles}
    if None in named.values():
        return None
    single, pair = (
        [re.sub("[a-z]+", lambda role: str(tokens[role[0]]), part) for part in template.split()] for template in frame
    )
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(named.items()))


def _read_json(file: Path, config: Mapping[str, Any], spec: TokenizerSpec | None) -> ParsedTokenizer:
    from tokenizers import Tokenizer

    text = file.read_text(encoding="utf-8")
    if re.search(r'"continuing_subword_prefix"\s*:\s*"[^"]', text):
        # tokenizers 0.23 reads out of bounds, and may crash the process, if merges lack the prefix.
        model = json.loads(text)["model"]
        prefix, merges = model["continuing_subword_prefix"], model.get("merges", [])
        rights = (merge.partition(" ")[2] if isinstance(merge, str) else merge[1] for merge in merges)
        if not all(right.startswith(prefix) for right in rights):
            raise UserError(f"{file} has the continuing_subword_prefix {prefix!r}, its merges do not; copy it again")
    if spec is not None:
        text = json.dumps(_apply_settings(json.loads(text), spec, config))
    return ParsedTokenizer(Tokenizer.from_str(text), spec, {"tokenizer.json": file.read_bytes()})


def _apply_settings(state: dict[str, Any], spec: TokenizerSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tokenizer.json with the settings of tokenizer_config.json, which take precedence as in transformers.

    Classes of word pieces always build their normalizer from their settings, and byte-level classes set the prefix
    space; absent settings have defaults.  For sentencepiece classes, absent settings change nothing.  Unlike
    transformers 5, this keeps all parts of tokenizer.json without a setting, such as SmolLM's rule for digits.
    """
    model = state.get("model") or {}
    if "tokenize_chinese_chars" in spec.settings and model.get("type", "WordPiece") == "WordPiece":
        settings = _spec_settings(spec, config)
        state["normalizer"] = {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": settings["tokenize_chinese_chars"],
            "strip_accents": settings["strip_accents"],
            "lowercase": True if settings["do_lower_case"] is None else settings["do_lower_case"],
        }
        state["pre_tokenizer"] = {"type": "BertPreTokenizer"}
        return state
    if "legacy" in spec.settings and "ByteLevel" not in json.dumps(state.get("pre_tokenizer")):
        return state if config.get("legacy") else _llama_components(state, config)
    prefix = config.get("add_prefix_space")
    if spec.settings.get("add_prefix_space") is False:
        prefix = bool(prefix)
    if "add_prefix_space" in spec.settings and prefix is not None:
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            state[part] = _set_prefix_space(state.get(part), prefix)
    dropped = {"Lowercase"} if config.get("do_lower_case") is False else set()
    if "keep_accents" in spec.settings and config.get("keep_accents"):
        dropped |= {"NFKD", "StripAccents"}
    if "do_lower_case" in spec.settings:
        state["normalizer"] = _remove_members(state.get("normalizer"), dropped)
        if config.get("do_lower_case"):
            state["normalizer"] = _sequence("normalizers", {"type": "Lowercase"}, state["normalizer"])
    return state


def _llama_components(state: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tokenizer.json with the current steps of Llama's class; older versions of transformers wrote others."""
    prefix = config.get("add_prefix_space") is not False
    metaspace = {"replacement": "\u2581", "prepend_scheme": "first" if prefix else "never", "split": False}
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix
    return state | {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", **metaspace},
        "decoder": {"type": "Sequence", "decoders": steps},
    }


def _members(component: Any, name: str) -> list[dict[str, Any]]:
    """Returns the members of a component of a tokenizer.json, which is a sequence, one member or null."""
    if component is None:
        return []
    return component[name] if component.get("type") == "Sequence" else [component]


def _sequence(name: str, *components: Any) -> dict[str, Any] | None:
    """Returns one component of a tokenizer.json that applies these in order; None if there are none."""
    members = [member for component in components for member in _members(component, name)]
    return {"type": "Sequence", name: members} if len(members) > 1 else next(iter(members), None)


def _remove_members(component: Any, types: set[str]) -> Any:
    """Returns a normalizer without its members of the given types."""
    return _sequence("normalizers", *(m for m in _members(component, "normalizers") if m.get("type") not in types))


def _set_prefix_space(component: Any, prefix: bool) -> Any:
    """Returns a component of a tokenizer.json that does, or does not, put a space before the first word."""
    if not isinstance(component, dict):
        return component
    for name in ("normalizers", "pretokenizers", "decoders"):
        if isinstance(component.get(name), list):
            return component | {name: [_set_prefix_space(member, prefix) for member in component[name]]}
    if component.get("type") == "ByteLevel":
        return component | {"add_prefix_space": prefix}
    if component.get("type") == "Metaspace" and (component.get("prepend_scheme", "always") == "never") == prefix:
        return component | {"prepend_scheme": "always" if prefix else "never"}
    return component


def _read_wordpiece(file: Path, config: Mapping[str, Any], spec: TokenizerSpec | None) -> ParsedTokenizer:
    from tokenizers import models

    pieces = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    unk = _token_text(config.get("unk_token")) or "[UNK]"
    if unk not in pieces:
        raise UserError(f"{file} has no line {unk}; a WordPiece vocabulary has one piece per line, including {unk}")
    settings = _spec_settings(TOKENIZER_SPECS["bert"], config)
    lowercase = settings["do_lower_case"]
    if lowercase is None:
        cased = any(p != p.lower() for p in pieces if not (p.startswith("[") and p.endswith("]")))
        lowercase = "tokenizer_class" in config or not cased  # the default of transformers' class
    ids = {piece: i for i, piece in enumerate(pieces)}
    backend = wordpiece(
        models.WordPiece(ids, unk_token=unk, max_input_chars_per_word=100),
        lowercase,
        settings["strip_accents"],
        settings["tokenize_chinese_chars"],
    )
    spec = spec or _guess_spec(file, ids)
    named = {"tokenizer_class": spec.name} if spec and spec is not TOKENIZER_SPECS["bert"] else {}
    return ParsedTokenizer(backend, spec, {"vocab.txt": file.read_bytes()}, config=named)


def wordpiece(
    model: tokenizers.models.Model, lowercase: bool, strip_accents: bool | None = None, chinese: bool = True
) -> tokenizers.Tokenizer:
    """Returns a tokenizer that splits words like BERT (Devlin et al. 2019).

    Args:
      model: the WordPiece model.
      lowercase: whether to convert texts to lower case.
      strip_accents: whether to remove accents; None: as lowercase.
      chinese: whether to split texts around Chinese characters.
    """
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(True, chinese, strip_accents, lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _read_merges(file: Path, config: Mapping[str, Any], spec: TokenizerSpec | None) -> ParsedTokenizer:
    from tokenizers import Regex, models, normalizers, pre_tokenizers

    merges = _companion(file, file.name.replace("vocab.json", "merges.txt"))
    lines = merges.read_text(encoding="utf-8").split("\n")
    halves = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
    ids = _ids(file)
    spec = spec or _guess_spec(file, ids)
    prefix = _spec_settings(spec, config).get("add_prefix_space", False)
    backend = byte_level(models.BPE(ids, [(a, b) for a, _, b in halves]), prefix)
    if spec and spec.words:
        cut = pre_tokenizers.Split(Regex(spec.words), "isolated")
        spell = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        backend.normalizer, backend.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Sequence([cut, spell])
    return ParsedTokenizer(backend, spec, {"vocab.json": file.read_bytes(), "merges.txt": merges.read_bytes()})


def byte_level(model: tokenizers.models.Model, prefix: bool = False) -> tokenizers.Tokenizer:
    """Returns a tokenizer that splits words into bytes like GPT-2 (Radford et al. 2019).

    Args:
      model: the BPE model.
      prefix: whether to add a space before the text.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_sentencepiece(file: Path, config: Mapping[str, Any], spec: TokenizerSpec | None) -> ParsedTokenizer:
    model = file.read_bytes()
    proto = parse_model(model)
    spec = spec or _guess_spec(file, {piece.piece for piece in proto.pieces})
    name = file.name if file.name in _SENTENCEPIECE else "tokenizer.model"
    if spec is None:
        return ParsedTokenizer(convert(proto, lossless=True), spec, {name: model})
    if spec is TOKENIZER_SPECS["m2m100"]:
        return _read_m2m_100(file, proto, spec)
    settings = _spec_settings(spec, config)
    backend = convert(proto, _arrange_pieces(proto, spec, settings), settings)
    return ParsedTokenizer(backend, spec, {name: model}, config=_spec_config(spec))


def _read_m2m_100(file: Path, proto: Any, spec: TokenizerSpec) -> ParsedTokenizer:
    """Reads a tokenizer of M2M-100: vocab.json has the ids of the pieces; those of the languages follow."""
    from tokenizers import AddedToken

    numbers = _companion(file, "vocab.json")
    backend, segmenter = _numbered(numbers, proto, spec)
    for one in (backend, segmenter):
        one.add_tokens([AddedToken(token, normalized=False, special=True) for token in spec.tail])
    files = {"vocab.json": numbers.read_bytes(), "sentencepiece.bpe.model": file.read_bytes()}
    return ParsedTokenizer(backend, spec, files, config=_spec_config(spec), segmenter=segmenter)


def _numbered(vocabulary: Path, proto: Any, spec: TokenizerSpec) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Returns a tokenizer with the ids of a vocab.json, and one that segments texts by a sentencepiece model."""
    from tokenizers import Tokenizer, models

    ids = {piece.replace("\u2581", " "): i for piece, i in _ids(vocabulary).items()}
    if missing := sorted(set(spec.special.values()) - ids.keys()):
        raise UserError(
            f"{vocabulary} has no {', '.join(missing)}; the vocabulary of a {spec.name} needs them: copy it again"
        )
    segmenter = convert(proto)
    backend = Tokenizer(models.WordLevel(ids, unk_token=spec.special["unk"]))
    backend.decoder = segmenter.decoder
    return backend, segmenter


def _spec_config(spec: TokenizerSpec) -> dict[str, Any]:
    return {"tokenizer_class": spec.name, **spec.settings}


def _read_marian(file: Path, config: Mapping[str, Any], spec: TokenizerSpec | None) -> ParsedTokenizer:
    """Reads a Marian tokenizer: one sentencepiece model per side; vocab.json has the ids of the pieces of both."""
    from tokenizers import AddedToken

    spec = TOKENIZER_SPECS["marian"]
    numbers = _companion(file, "vocab.json")
    targets = _companion(file, "target_vocab.json") if _spec_settings(spec, config)["separate_vocabs"] else numbers
    sides = []
    for spm, vocabulary in (("source.spm", numbers), ("target.spm", targets)):
        backend, segmenter = _numbered(vocabulary, parse_model(_companion(file, spm).read_bytes()), spec)
        # The tokens of target languages, which users write before the text.
        languages = [piece for piece in backend.get_vocab() if re.fullmatch(">>.+<<", piece)]
        segmenter.add_tokens([AddedToken(piece, normalized=False) for piece in languages])
        sides.append(ParsedTokenizer(backend, spec, {}, segmenter=segmenter))
    return sides[0]._replace(files=_read_files(file, _MARIAN), config=_spec_config(spec), target=sides[1])


def _arrange_pieces(proto: Any, spec: TokenizerSpec, settings: Mapping[str, Any]) -> list[Piece]:
    """Returns the pieces of a model in the order of their ids in a class of transformers."""
    pieces = list_pieces(proto)
    if spec.head:
        replaced = pieces[: spec.skip]
        first_pieces = ["<unk>", "<s>", "</s>"] if spec.special["unk"] in spec.head else ["<pad>", "</s>"]
        types = [UNKNOWN if piece == "<unk>" else CONTROL for piece in first_pieces]
        if [piece.type for piece in replaced] != types[: spec.skip]:
            raise UserError(
                f"this sentencepiece model begins with {[piece.text for piece in replaced]}, but that of a {spec.name} "
                f"begins with {first_pieces[: spec.skip]}; correct tokenizer_class or model_type"
            )
        first = [Piece(token, 0.0, UNKNOWN if token == spec.special["unk"] else CONTROL) for token in spec.head]
        pieces = first + pieces[spec.skip :]
    if settings.get("offset", len(spec.head) - spec.skip) != len(spec.head) - spec.skip:
        raise UserError(
            f"tokenizer_config.json has offset {settings['offset']}; only {len(spec.head) - spec.skip} is supported: "
            f"choose another tokenizer, or save it with a tokenizer.json"
        )
    extra = settings.get("extra_ids", 0)
    if type(extra) is not int or not 0 <= extra <= 10_000:
        raise UserError(f"extra_ids is {extra!r}; it must be an integer from 0 to 10000: correct tokenizer_config.json")
    last = [*spec.tail, *(f"<extra_id_{i}>" for i in reversed(range(extra)))]
    existing = {piece.text for piece in pieces}
    return pieces + [Piece(token, 0.0, CONTROL) for token in last if token not in existing]


_READERS = {".txt": _read_wordpiece, ".model": _read_sentencepiece, ".spm": _read_marian}

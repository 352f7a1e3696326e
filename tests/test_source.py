"""Every format yields the same documents, cleaning counts its changes, and every mistake has an error message."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.config import CleaningConfig, DataConfig
from jaxlm.data import source
from jaxlm.data.clean import clean
from jaxlm.data.source import documents, fingerprint, rows
from jaxlm.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
TEXTS = ["a plain row", 'two\nlines, one "quoted"', "  spaces  ", "naïve 😀", "'; tab\there", "l" * 200_000]


def read(path: Path | str, report: Counter | None = None, **choices) -> list[str]:
    cleaning = CleaningConfig(**choices.pop("cleaning", {}))
    data = DataConfig(cleaning=cleaning, **choices)
    return list(documents(str(path), data, data.split, Counter() if report is None else report))


def error_message(path: Path | str, **choices) -> str:
    with pytest.raises(UserError) as error:
        read(path, **choices)
    return str(error.value)


def write(path: Path, texts: list[str]) -> Path:
    """Write the texts as a table in the format of the suffix, with a second column."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".csv":
        stream = io.StringIO(newline="")
        csv.writer(stream).writerows([["n", "text"], *enumerate(texts)])
        content = stream.getvalue().encode()
    elif kind == ".jsonl":
        content = "\n".join(json.dumps({"n": n, "text": text}) for n, text in enumerate(texts)).encode()
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        sink = io.BytesIO()
        parquet.write_table(pyarrow.table({"n": list(range(len(texts))), "text": [t.encode() for t in texts]}), sink)
        content = sink.getvalue()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_every_format_yields_the_same_documents(tmp_path, suffix, compression):
    report = Counter()
    assert read(write(tmp_path / f"data{suffix}{compression}", TEXTS), report) == TEXTS
    assert report["rows"] == report["documents"] == len(TEXTS)


def test_quotes_in_tsv_files_are_text(tmp_path):
    (tmp_path / "data.tsv").write_text('text\tlabel\n"a quote that never ends\t0\nb\t1\n')
    assert read(tmp_path / "data.tsv") == ['"a quote that never ends', "b"]


def test_rows_have_line_numbers(tmp_path):
    found = list(rows(str(write(tmp_path / "data.csv", TEXTS[:3])), DataConfig(), "train"))
    assert [place.line for place, _ in found] == [2, 3, 5]  # the second row has two lines
    assert found[0][1] == {"n": "0", "text": TEXTS[0]}


@given(st.text())
def test_a_file_is_one_unchanged_document(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("data") / "x.txt"
    file.write_bytes(text.encode())
    text = text.removeprefix("\ufeff")
    if text and not text.isspace():
        assert read(file, documents="file") == [text]


def test_plain_text_is_divided_by_lines_blank_lines_or_boundaries(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfzero\r\n= A =\n a\n\n\nb\r\nc\n= B =")
    assert read(tmp_path / "x.txt") == ["zero", "= A =", " a", "b", "c", "= B ="]
    assert read(tmp_path / "x.txt", documents="blank_line") == ["zero\r\n= A =\n a", "b\r\nc\n= B ="]
    divided = read(tmp_path / "x.txt", documents="boundary", boundary="= .* =$")
    assert divided == ["zero", "= A =\n a\nb\r\nc", "= B ="]


def test_files_of_folders_and_globs_are_sorted(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]
    assert read(f"{tmp_path}/*.txt") == ["a.txt", "b.txt"]
    assert read(f"{tmp_path}/*.md") == ["README.md"]


def test_cleaning_applies_and_counts_each_choice(tmp_path):
    (tmp_path / "x.txt").write_text("ﬁne\x07\n a  b \na b\nabcdefghijk\nx\n")
    report = Counter()
    choices = {"unicode": "NFKC", "control": True, "whitespace": True, "duplicates": True}
    cleaning = {**choices, "min_characters": 2, "max_characters": 10}
    assert read(tmp_path / "x.txt", report, cleaning=cleaning) == ["fine", "a b"]
    assert {name: n for name, n in report.items() if n} == {
        "rows": 5,
        "documents": 2,
        "changed: unicode": 1,
        "changed: control": 1,
        "changed: whitespace": 1,
        "dropped: duplicates": 1,
        "dropped: max_characters": 1,
        "dropped: min_characters": 1,
    }


@given(st.text())
def test_cleaning_without_choices_changes_nothing(text):
    blank = not text or text.isspace()
    assert clean(text, CleaningConfig(), set(), Counter()) == (None if blank else text)


def test_rows_that_are_not_utf8_raise_an_error_or_are_cleaned(tmp_path):
    for name, content in {
        "x.txt": b"good\nb\xffd\nlast",
        "x.csv": b"text\ngood\nb\xffd\nlast",
        "x.jsonl": b'{"text": "good"}\n{"text": "b\xffd"}\n{"text": "last"}',
    }.items():
        file = tmp_path / name
        file.write_bytes(content)
        line = 3 if name == "x.csv" else 2
        assert f"{name}:{line}: column 'text' is not UTF-8" in error_message(file)
        report = Counter()
        assert read(file, report, cleaning={"encoding": "drop"}) == ["good", "last"]
        assert report["dropped: encoding"] == 1
        assert read(file, report, cleaning={"encoding": "replace"}) == ["good", "b\ufffdd", "last"]
        assert report["changed: encoding"] == 1
    assert "x.txt:2: " in error_message(tmp_path / "x.txt", documents="file")


def test_the_fingerprint_depends_on_content_and_not_on_the_path(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("same")
    a = fingerprint(str(tmp_path / "a"))
    assert a == fingerprint(str(tmp_path / "b")) == fingerprint(str(tmp_path / "a" / "x.txt"))
    (tmp_path / "b" / "x.txt").write_text("else")
    assert a != fingerprint(str(tmp_path / "b"))


def test_missing_and_empty_paths_raise_an_error(tmp_path):
    (tmp_path / "train.csv").write_text("text\n")
    assert "perhaps you meant 'train.csv'" in error_message(tmp_path / "trian.csv")
    assert "nor a folder" in error_message(tmp_path / "nowhere" / "x.txt")
    assert "contains no documents (rows 0)" in error_message(tmp_path / "train.csv")
    (tmp_path / "blank.txt").write_text("\n  \n")
    assert "contains no documents" in error_message(tmp_path / "blank.txt")
    (tmp_path / "folder").mkdir()
    assert "contains no files" in error_message(tmp_path / "folder")


def test_broken_tables_raise_an_error(tmp_path):
    for name, content, message in [
        (
            "x.csv",
            b"a,b\n1,2\n",
            "x.csv:2: there is no column 'text'; the columns are 'a', 'b'; choose one with --data.t",
        ),
        ("x.jsonl", b'{"body": "x"}', "x.jsonl:1: there is no column 'text'; the columns are 'body'"),
        ("x.jsonl", b'{"text": [1]}', "x.jsonl:1: column 'text' holds list [1], not text"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl:2: not a JSON object (Expecting value"),
        ("x.json", b"[1]", "x.json:1: not a JSON object (a int)"),
        ("x.csv", b"text,b\n1,2\n\n1,2,3\n", "x.csv:4: the row has 3 fields, the header has 2 (text, b)"),
        ("x.csv", b'text,b\n"1"x,2\n', "x.csv:2: ',' expected after"),
        ("x.parquet", b"PAR0", "x.parquet is not a readable parquet file"),
        ("x.txt.gz", b"plain", "x.txt.gz is not a whole gzip file"),
        ("x.txt.gz", gzip.compress(b"plain text")[:-4], "x.txt.gz is not a whole gzip file"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert message in error_message(tmp_path / name), name
    assert "the columns are 'n', 'text'" in error_message(write(tmp_path / "y.parquet", ["a"]), text="body")
    (tmp_path / "x.txt").write_text("a")
    assert "data.boundary '(' is not a regular expression" in error_message(
        tmp_path / "x.txt", documents="boundary", boundary="("
    )


STSB = ("genre", "file", "year", "id", "score", "sentence1", "sentence2")
TREC = r"(?P<label>\w+):(?P<fine>\S+) (?P<text>.*)"
QUESTION = {"id": "q", "question": "Who?", "answers": [{"text": "Al", "answer_start": 0}]}


def squad(*questions, **paragraph) -> bytes:
    paragraphs = [{"context": "Al was here", "qas": list(questions), **paragraph}]
    return json.dumps({"version": "2", "data": [{"title": "T", "paragraphs": paragraphs}]}).encode()


def question_row(**members) -> dict:
    """Return the row of QUESTION, with these members replaced."""
    texts = {"id": "q", "title": "T", "context": "Al was here", "question": "Who?"}
    return {**texts, "answers": {"text": ["Al"], "answer_start": [0]}, "is_impossible": False, **members}


def tagged_row(tokens: str, tags: str) -> dict:
    return {"tokens": tokens.split(), "tags": tags.split()}


def table(path: Path | str, **choices) -> list:
    """Return (line, row) of every row."""
    data = DataConfig(cleaning=CleaningConfig(**choices.pop("cleaning", {})), **choices)
    return [(place.line, row) for place, row in rows(str(path), data, data.split)]


def parquet_bytes(content: list) -> bytes:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(content), sink)
    return sink.getvalue()


NESTED = {"tokens": ["a", "ü"], "tags": [0, 1], "answers": {"text": ["ü"], "answer_start": [0]}, "none": None}


@pytest.mark.parametrize(
    ("name", "content", "choices", "expected"),
    [
        # A format applies to every file of the path, whatever its name is.
        ("x.data", b"text\na\n", {"format": "csv"}, [(2, {"text": "a"})]),
        ("x.csv", b'text\n"a\n', {"format": "tsv"}, [(2, {"text": '"a'})]),
        # mtime=0 makes the bytes constant, so that all processes of pytest use the same test id.
        ("x.gz", gzip.compress(b'{"text": "a"}', mtime=0), {"format": "jsonl"}, [(1, {"text": "a"})]),
        ("x.csv", b"a,b\n", {"format": "text"}, [(1, {"text": "a,b"})]),
        ("x", lambda: parquet_bytes([NESTED]), {"format": "parquet"}, [(1, NESTED)]),
        # conll
        ("x.conll", b"a\tO\nb c\tB-x\n\t\n\n d\tO ", {}, [
            (1, {"tokens": ["a", "b c"], "tags": ["O", "B-x"]}), (5, {"tokens": ["d"], "tags": ["O"]}),
        ]),
        ("x.bio", b"\xef\xbb\xbfa  N O\r\nb\xc2\xa0\tN\tB\r\n\r\n", {}, [
            (1, {"tokens": ["a", "b\xa0"], "tags": ["O", "B"]}),
        ]),
        ("x.iob", b"-DOCSTART- -X- O\n\na N O\n\n-DOCSTART- -X- O\n\nb N B\n-DOCSTART- -X- O\nc N O\n", {}, [
            (3, tagged_row("a", "O")), (7, tagged_row("b", "B")), (9, tagged_row("c", "O")),
        ]),
        ("x.txt", b"a\nb\n\nc\n", {"format": "conll"}, [(1, {"tokens": ["a", "b"]}), (4, {"tokens": ["c"]})]),
        ("x.conll", b"\n \n", {}, []),
        # squad
        ("x.json", squad(QUESTION), {"format": "squad"}, [(1, question_row())]),
        ("x.json", b"\xef\xbb\xbf" + squad(QUESTION, {**QUESTION, "id": 7, "is_impossible": True, "answers": []}),
            {"format": "squad"},
            [(1, question_row()), (2, question_row(
                id="7", is_impossible=True, answers={"text": [], "answer_start": []}))]),
        ("x.json", b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "Who?"}]}]}]}',
            {"format": "squad"},
            [(1, {"id": "1", "title": "", "context": "c", "question": "Who?", "is_impossible": False})]),
        # The explicit format disables the detection of squad.
        ("x.jsonl", squad(), {"format": "jsonl"}, [(1, json.loads(squad()))]),
        ("x.json", squad(QUESTION), {}, [(1, question_row())]),
        ("x.json", json.dumps(json.loads(squad(QUESTION)), indent=1).encode(), {}, [(1, question_row())]),
        # columns
        ("x.csv", b'a,"b\nc",d\n\n1,2,3,4\n', {"columns": ("x", "y")}, [
            (1, {"x": "a", "y": "b\nc"}), (4, {"x": "1", "y": "2"}),
        ]),
        ("x.tsv", b'"a\tb\n', {"columns": ("x", "y")}, [(1, {"x": '"a', "y": "b"})]),
        # pattern
        ("x.txt", b"A:b  c d\r\n\nB:x \n", {"pattern": TREC}, [
            (1, {"label": "A", "fine": "b", "text": " c d"}), (3, {"label": "B", "fine": "x", "text": ""}),
        ]),
        ("x.txt", b"a\n", {"pattern": r"(?P<text>\w)(?P<label>\d)?"}, [(1, {"text": "a", "label": None})]),
        # charset
        ("x.txt", "ü\nö".encode("cp1252"), {"encoding": "cp1252"}, [(1, {"text": "ü"}), (2, {"text": "ö"})]),
        ("x.txt", "ü\nö".encode("cp1252"), {"encoding": "cp1252", "documents": "file"}, [(1, {"text": "ü\nö"})]),
        ("x.csv", "ü\nö".encode("latin-1"), {"encoding": "latin-1"}, [(2, {"ü": "ö"})]),
        # The last byte of this character is a backslash.
        ("x.jsonl", '{"a": "表"}'.encode("shift_jis"), {"encoding": "shift_jis"}, [(1, {"a": "表"})]),
        ("x.conll", "ü O".encode("latin-1"), {"encoding": "latin-1"}, [(1, tagged_row("ü", "O"))]),
        ("x.json", squad(QUESTION), {"encoding": "ascii", "format": "squad"}, [(1, question_row())]),
        ("x.txt", b"\xef\xbb\xbfa", {"encoding": "utf_8_sig"}, [(1, {"text": "a"})]),
        # Strings that are not Unicode, also in lists and objects.
        ("x.jsonl", json.dumps(NESTED).encode(), {}, [(1, NESTED)]),
        ("x.jsonl", b'{"a": [["\xff"], {"b\xff": "\\ud800"}]}', {"cleaning": {"encoding": "replace"}},
            [(1, {"a": [["\ufffd"], {"b\ufffd": "\ufffd"}]})]),
        ("x.conll", b"a O\n\n\xff O\n\nb O", {"cleaning": {"encoding": "drop"}}, [
            (1, tagged_row("a", "O")), (5, tagged_row("b", "O")),
        ]),
        ("x.parquet", lambda: parquet_bytes([{"a": [b"\xc3\xbc", b"\xff"]}]), {"cleaning": {"encoding": "replace"}},
            [(1, {"a": ["ü", "\ufffd"]})]),
    ],
)  # fmt: skip
def test_rows_of_every_format_are_read(tmp_path, name, content, choices, expected):
    (tmp_path / name).write_bytes(content() if callable(content) else content)
    assert table(tmp_path / name, **choices) == expected


@pytest.mark.parametrize(
    ("name", "content", "choices", "message"),
    [
        # A file that ends in the middle of a row.
        ("x.csv", b'a,b\n1,2\n3,"four\nfive', {}, "x.csv:3: unexpected end of data; correct the quotes of this row"),
        ("x.csv", b"a,b\n1,2\n3", {}, "x.csv:3: the row has 1 fields, the header has 2 (a, b); correct the row"),
        ("x.tsv", b"1\t2\n3", {"columns": ("a", "b")}, "x.tsv:2: the row has 1 fields, data.columns has 2 (a, b)"),
        ("x.jsonl", b'{"a": 1}\n{"a": "tw', {}, "x.jsonl:2: not a JSON object (Unterminated string"),
        ("x.jsonl", b'{"a": 1}\n{"a": 2', {}, "x.jsonl:2: not a JSON object (Expecting ',' delimiter, column 8)"),
        # conll
        ("x.conll", b"a O\nb\n", {}, "x.conll:2: the line 'b' has 1 columns, line 1 has 2; correct it: a token,"),
        ("x.conll", b"\na O\n\nb c O", {}, "x.conll:4: the line 'b c O' has 3 columns, line 2 has 2"),
        ("x.conll", b"a\tO\n\tO", {}, "x.conll:2: the token of the line '\\tO' is empty"),
        ("x.conll", b"a\tO\nb\t", {}, "x.conll:2: the tag of the line 'b\\t' is empty"),
        ("x.conll", b"a O\n\nb O\n\xff O", {}, "x.conll:3: column 'tokens' is not UTF-8"),
        # squad
        ("x.json", squad(QUESTION)[:-9], {}, "x.json:1: invalid JSON at column"),
        ("x.jsonl", squad(QUESTION)[:150], {"format": "jsonl"}, "set --data.format squad"),
        ("x", squad(QUESTION)[:-30], {"format": "squad"}, "x:1: invalid JSON at column"),
        ("x", b'{"data":\n [', {"format": "squad"}, "x:2: invalid JSON at column 3, character 11 of 11 (Expect"),
        ("x", b"[]", {"format": "squad"}, "x: the file is a list, not an object; correct it: data[].paragraphs[]."),
        ("x", b"{}", {"format": "squad"}, "x: the file has no 'data'"),
        ("x", b'{"data": [3]}', {"format": "squad"}, "x: data[0] is an integer, not an object"),
        ("x", squad(QUESTION, {}), {"format": "squad"}, "x: data[0].paragraphs[0].qas[1] has no 'question'"),
        ("x", squad(context=None), {"format": "squad"}, "'context' of data[0].paragraphs[0] is null, not a string"),
        ("x", squad({"question": "?", "answers": [{"text": "a", "answer_start": True}]}), {"format": "squad"},
            "'answer_start' of data[0].paragraphs[0].qas[0].answers[0] is true or false, not an integer"),
        # pattern
        ("x.txt", b"A:b c\n\n? d", {"pattern": TREC}, "x.txt:3: the line '? d' does not match data.pattern '(?P<l"),
        ("x.txt", b"a", {"pattern": "("}, "data.pattern '(' is not a regular expression: missing )"),
        ("x.txt", b"a", {"pattern": "(.)"}, "data.pattern '(.)' has no named group"),
        ("x.txt", b"a", {"pattern": TREC, "documents": "file"}, "data.pattern applies to lines, but data.documents is"),
        # charset
        ("x.txt", b"a", {"encoding": "klingon"}, "data.encoding 'klingon' is not an encoding that"),
        ("x.txt", b"a", {"encoding": "hex"}, "data.encoding 'hex' is not an encoding that"),
        ("x.txt", b"a", {"encoding": "a\0"}, "data.encoding 'a\\x00' is not an encoding that"),
        ("x.txt", b"a", {"encoding": "utf-16"}, "x.txt:1: the text after line 0 is not utf-16 (truncated data)"),
        ("x.csv", b"a\nb\n\x81", {"encoding": "cp1252"}, "x.csv:3: byte 81 is not cp1252 (character maps to"),
        ("x.txt", b"a\n\xff", {"encoding": "ascii", "documents": "file"}, "x.txt:2: byte ff is not ascii"),
        ("x.txt", b"a\n\xff", {"pattern": "(?P<text>.)"}, "x.txt:2: column 'text' is not UTF-8; convert the data"),
        ("x.jsonl", b'{"a": "\\n", "b": [{"c": "\\n\\ud800"}]}', {}, "x.jsonl:1: column 'b' holds a lone surrogate"),
    ],
)  # fmt: skip
def test_invalid_files_and_choices_raise_an_error(tmp_path, name, content, choices, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        table(tmp_path / name, **choices)
    assert message in str(error.value)


def test_rows_are_streamed(tmp_path):
    for name, content in {
        "x.conll": b"a O\n\nb\n",
        "x.csv": b'a,b\n1,2\n"',
        "x.jsonl": b'{"a": 1}\n{',
        "x.txt": b"a\n\xff",
    }.items():
        (tmp_path / name).write_bytes(content)
        found = rows(str(tmp_path / name), DataConfig(), "train")
        next(found)  # returns before the broken row is read
        with pytest.raises(UserError):
            next(found)


def test_a_format_applies_to_the_whole_path(tmp_path):
    (tmp_path / "a.part").write_text("a O\n")
    (tmp_path / "b.part.gz").write_bytes(gzip.compress(b"b O\n"))
    both = [(1, tagged_row("a", "O")), (1, tagged_row("b", "O"))]
    assert table(tmp_path, format="conll") == both
    assert table(f"{tmp_path}/*.part*", format="conll") == both


@given(st.lists(st.lists(st.tuples(*[st.text("aü-\xa0\u3000\x85#", min_size=1)] * 2), min_size=1)))
def test_conll_files_round_trip(tmp_path_factory, texts):
    file = tmp_path_factory.mktemp("data") / "x.conll"
    file.write_text("\n".join("".join(f"{token}\t{tag}\n" for token, tag in text) for text in texts), newline="\n")
    found = [list(zip(row["tokens"], row["tags"], strict=True)) for _, row in table(file)]
    assert found == texts


@pytest.mark.parametrize(
    ("name", "choices", "count", "line", "first"),
    [
        ("trec/TREC.train.gz", {"pattern": TREC, "encoding": "iso-8859-1"}, 5452, 66, {"label": "LOC", "fine": "city"}),
        ("trec/TREC.test", {"pattern": TREC, "encoding": "iso-8859-1"}, 500, 1, {"label": "NUM", "fine": "dist"}),
        ("wnut17/wnut17train.conll.gz", {}, 3394, 29, {}),
        ("wnut17/emerging.dev.conll", {}, 1009, 1, {}),
        ("wnut17/emerging.test.annotated", {"format": "conll"}, 1287, 1, {}),
        ("squad2_cs224n/dev-v2.0.json.gz", {"format": "squad"}, 6078, 1, {"title": "Normans", "is_impossible": False}),
        ("squad2_cs224n/test-v2.0.json.gz", {"format": "squad"}, 5915, 1, {}),
        ("xquad/xquad.en.json.gz", {"format": "squad"}, 1190, 1, {"title": "Super_Bowl_50"}),
        ("xquad/xquad.zh.json.gz", {"format": "squad"}, 1190, 1, {}),
        ("stsb/sts-train.csv.gz", {"format": "tsv", "columns": STSB}, 5749, 1, {"id": "0001", "score": "5.000"}),
        ("stsb/sts-dev.csv.gz", {"format": "tsv", "columns": STSB}, 1500, 1, {}),
        ("stsb/sts-test.csv.gz", {"format": "tsv", "columns": STSB}, 1379, 1, {}),
        ("sst2_glue/dev.tsv.gz", {}, 6735, 2, {}),
        ("sentiment_labelled_sentences/imdb_labelled.txt", {"pattern": r"(?P<text>.*)\t(?P<label>[01])"}, 1000, 1, {}),
        ("scitldr_a/dev.jsonl.gz", {}, 619, 1, {}),
    ],
)  # fmt: skip
def test_published_data_sets_are_read(name, choices, count, line, first):
    if not (SHARED / name).exists():
        pytest.skip(f"shared data {name} is not here")
    found = table(SHARED / name, **choices)
    assert len(found) == count
    row = dict(found)[line]
    assert {column: row[column] for column in first} == first
    for _, row in found:
        assert len(row.get("tokens", [])) == len(row.get("tags", []))
        answers = row.get("answers", {"text": [], "answer_start": []})
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            assert row["context"].startswith(text, start)


@pytest.mark.filterwarnings("ignore")  # tfds and its dependencies raise warnings
def test_tfds_data_sets_are_read_without_tensorflow(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyLines(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate({"text": text} for text in ("a", "naïve", "c"))

    builder = TinyLines(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    folder = str(builder.data_path)
    assert sorted(read(folder)) == ["a", "c", "naïve"]
    assert len(read(folder, split="train[:2]")) == 2
    assert f"{folder} has no split 'trian'; perhaps you meant 'train'" in error_message(folder, split="trian")
    assert "the columns are 'text'" in error_message(folder, text="body")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert "tfds has no data set 'imdb_reviws'; perhaps you meant 'imdb_reviews'" in error_message("tfds:imdb_reviws")
    assert "tfds:imdb_reviews/nothing cannot be opened" in error_message("tfds:imdb_reviews/nothing")
    for name in ("glue/sst2", "cnn_dailymail"):
        message = error_message(f"tfds:{name}")
        assert "requires TensorFlow" in message and "file_format='array_record'" in message
    assert fingerprint("tfds:imdb_reviews") == fingerprint("tfds:imdb_reviews/plain_text")
    assert "tensorflow" not in sys.modules


def test_heavy_libraries_are_imported_only_on_use():
    heavy = "{'pyarrow', 'tensorflow_datasets', 'sentencepiece', 'tokenizers'}"
    code = f"import sys, jaxlm.data.source, jaxlm.data.tokenizers.tokenizer; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_arrays_of_tfds_become_plain_values():
    row = {
        "tokens": np.array([b"a", b"\xc3\xa9"], object),
        "label": np.int64(3),
        "nested": {"starts": np.array([4, 5])},
    }
    assert source._decode(row, []) == {"tokens": ["a", "\u00e9"], "label": 3, "nested": {"starts": [4, 5]}}

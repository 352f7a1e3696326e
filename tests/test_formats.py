"""Files of other programs: every encoding, line end, delimiter, layout and container is read.

The expected values are those that the writers of the formats wrote (csv, json, pandas, pyarrow, the CoNLL tasks).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import Classification, DataConfig, MultipleChoice, QuestionAnswering, RunConfig, Seq2Seq, Tagging
from jaxlm.data import source
from jaxlm.data.formats import literals
from jaxlm.data.formats.rows import Columns
from jaxlm.errors import UserError
from jaxlm.inference import prompts as prompt_files
from jaxlm.tasks import TASKS, columns_of
from jaxlm.tasks.reading import load


def rows(path: Path, needed: Columns | None = None, **fields) -> list[dict]:
    return [row for _, row in source.rows(str(path), DataConfig(**fields), "train", columns=needed)]


def error_message(path: Path, needed: Columns | None = None, **fields) -> str:
    with pytest.raises(UserError) as error:
        rows(path, needed, **fields)
    assert "Traceback" not in str(error.value)
    return str(error.value)


def load_records(path: Path, task, **fields):
    """Returns the records of a task, and the names of its labels."""
    run = RunConfig(model=None, task=task, init="x", data=DataConfig(path=str(path), **fields))
    kind = TASKS[type(task)]
    part = load(kind, run, str(path), "", "train", Counter())
    names = kind.names(task, part)
    return kind.map_labels(task, [part], names)[0], names


# Lines

LINES = ["first", "", "two\x0cparts", "three\x85\u2028parts", "last"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_every_reader_splits_lines_alike(tmp_path, end, bom):
    texts = [line for line in LINES if line]
    text = bom + end.join([*LINES, ""]).encode()
    (tmp_path / "a.txt").write_bytes(text)
    assert [row["text"] for row in rows(tmp_path / "a.txt")] == texts
    assert prompt_files.read(str(tmp_path / "a.txt")) == LINES
    pairs = source.rows(str(tmp_path / "a.txt"), DataConfig(), "", target_path=str(tmp_path / "a.txt"))
    assert [row["target"] for _, row in pairs] == texts
    (tmp_path / "a.csv").write_bytes(bom + end.join(["text,n", *(f'"{line}",1' for line in texts)]).encode())
    assert [row["text"] for row in rows(tmp_path / "a.csv")] == texts
    (tmp_path / "a.jsonl").write_bytes(bom + end.join(json.dumps({"text": line}) for line in texts).encode())
    assert [row["text"] for row in rows(tmp_path / "a.jsonl")] == texts
    (tmp_path / "a.conll").write_bytes(bom + end.join(["a\tO", "b\tB-x", "", "c\tO"]).encode())
    assert [row["tags"] for row in rows(tmp_path / "a.conll")] == [["O", "B-x"], ["O"]]
    blocks = rows(tmp_path / "a.txt", documents="blank_line")
    assert [row["text"] for row in blocks] == ["first", end.join(texts[1:])]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1", "shift_jis"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_have_a_name_or_a_byte_order_mark(tmp_path, encoding, end):
    word = "naïve" if encoding != "shift_jis" else "表"
    for name, text in {
        "x.txt": f"{word}{end}b",
        "x.csv": f"text{end}{word}{end}b",
        "x.jsonl": f'{{"text": "{word}"}}',
    }.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert rows(tmp_path / name, encoding=encoding)[0]["text"] == word
        if encoding in ("utf-16", "utf-32"):
            assert rows(tmp_path / name)[0]["text"] == word
        else:
            assert (
                f"--data.encoding {encoding if 'utf' in encoding else ''}".strip() in error_message(tmp_path / name)
                or len(text) < 20
            )


# Tables

TABLES = [
    (b"text;label\na, b;1\nc;0\n", [{"text": "a, b", "label": "1"}, {"text": "c", "label": "0"}], "semicolons"),
    (b"text\tlabel\na, b\t1\n", [{"text": "a, b", "label": "1"}], "tabs"),
    (b"text|label\na, b|1\n", [{"text": "a, b", "label": "1"}], "bars"),
    (b'text,label\n"a ""b"" c",1\n', [{"text": 'a "b" c', "label": "1"}], ""),
    (b'text,label\n"a \\"b\\" c",1\n"d, \\"e\\"",0\n',
        [{"text": 'a "b" c', "label": "1"}, {"text": 'd, "e"', "label": "0"}], "backslashes"),
    (b'text,label\na \\"b\\" c,1\n', [{"text": 'a "b" c', "label": "1"}], "backslashes"),
    (b'text,label\n"a ""b\\"" c",1\n"\\",0\n', [{"text": 'a "b\\" c', "label": "1"}, {"text": "\\", "label": "0"}], ""),
    (b"text;label\r1,5;x\r2;y\r", [{"text": "1,5", "label": "x"}, {"text": "2", "label": "y"}], "semicolons"),
    (b",text,label\n0,a,1\n1,b,0\n", [{"": "0", "text": "a", "label": "1"}, {"": "1", "text": "b", "label": "0"}], ""),
    (b"text, label\na,1\n", [{"text": "a", "label": "1"}], ""),
    (b"text\na b; c\n", [{"text": "a b; c"}], ""),
    (b"sep=;\r\ntext;label\r\na, b;1\r\n", [{"text": "a, b", "label": "1"}], "semicolons"),
    (b'text, label\n"a, b", "1"\n', [{"text": "a, b", "label": "1"}], ""),
    (b"text,label\na\0b,1\n", [{"text": "a\0b", "label": "1"}], ""),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected", "message"), TABLES)
def test_csv_files_of_other_programs_are_read(tmp_path, capsys, content, expected, message):
    (tmp_path / "X.CSV").write_bytes(content)
    assert rows(tmp_path / "X.CSV") == expected
    printed = capsys.readouterr().err
    assert message in printed and len(printed.splitlines()) == bool(message)


def test_quoted_tsv_files_are_read(tmp_path, capsys):
    """pandas and csv writers quote a field with a quote, also in a tsv file."""
    cells = [("['it\\'s', \"so\"]", "a"), ("b", "c")]
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter="\t").writerows([("text", "label"), *cells])
    (tmp_path / "x.tsv").write_text(stream.getvalue(), newline="")
    assert [tuple(row.values()) for row in rows(tmp_path / "x.tsv")] == cells
    assert "--data.format tsv" in capsys.readouterr().err
    assert rows(tmp_path / "x.tsv", format="tsv")[0]["text"] == '"[\'it\\\'s\', ""so""]"'
    task = Classification(problem="multi_label", label="text", text=("label",))
    with pytest.raises(UserError, match=r"a list in quotes; read the file with --data\.format quoted_tsv"):
        load_records(tmp_path / "x.tsv", task, format="tsv")


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1), st.sampled_from(",;\t|"))
def test_csv_round_trip_with_every_delimiter(tmp_path_factory, cells, delimiter):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("one", "two"), *cells])
    file = tmp_path_factory.mktemp("data") / "x.csv"
    try:
        file.write_text(stream.getvalue(), newline="")
    except UnicodeEncodeError:
        return
    assert [tuple(row.values()) for row in rows(file)] == cells


def test_bad_tables_are_refused(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("I liked it,1\nnot at all,0\n")
    needed = Columns(("text", "label"))
    with pytest.raises(UserError, match=r"--data\.columns"):
        load_records(file, Classification())
    with pytest.raises(UserError, match=r"--data\.columns"):
        list(source.documents(str(file), DataConfig(), "", Counter()))
    assert [row["label"] for row in rows(file, needed, columns=("text", "label"))] == ["1", "0"]
    file.write_text("a,a\n1,2\n")
    assert "x.csv:1: the header has the column 'a' twice" in error_message(file)
    file.write_text("text,label\n" + "x" * 300_000 + ",1\n")
    assert len(rows(file)[0]["text"]) == 300_000
    # The file has invalid bytes in a column that is not read.
    file.write_bytes(b"text,label,note\na,1,\xff\n")
    assert rows(file, needed)[0]["text"] == "a"
    assert "column 'note' is not UTF-8" in error_message(file)


# JSON

ALPACA = [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Say", "input": "", "output": "ü"}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "X.JSON"])
@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: {"version": "1", "data": x}, lambda x: {"train": x, "test": x[:1]}]
)
def test_a_json_file_may_be_one_value(tmp_path, indent, name, wrap):
    value = wrap(ALPACA)
    (tmp_path / name).write_text(json.dumps(value, indent=indent))
    if name == "x.jsonl" and isinstance(value, dict):
        assert rows(tmp_path / name) == [value]
    else:
        assert rows(tmp_path / name) == ALPACA
    (tmp_path / "y.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(row, indent=indent) for row in ALPACA))
    assert rows(tmp_path / "y.jsonl") == ALPACA


def test_json_tables_of_pandas_are_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": ["a", "b"], "label": [1, 0]})
    expected = table.to_dict("records")
    for orient, lines in (("columns", False), ("records", False), ("records", True), ("table", False)):
        table.to_json(tmp_path / "x.json", orient=orient, lines=lines)
        found = [{name: row[name] for name in ("text", "label")} for row in rows(tmp_path / "x.json")]
        assert found == expected, orient
    (tmp_path / "x.json").write_text(json.dumps(table.to_dict("list")))
    assert rows(tmp_path / "x.json") == expected
    (tmp_path / "x.json").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    assert list(rows(tmp_path / "x.json")[0]) == ["messages"]
    (tmp_path / "x.jsonl").write_text('{"text": NaN, "label": "a"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:1: column 'text' holds float nan, not text"):
        load_records(tmp_path / "x.jsonl", Classification())


DIGITS, NESTED = "9" * 5000, "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "value",
    [
        {"authors": [{"name": "x"}], "data": [{"text": "a", "label": 1}]},
        {"columns": ["text", "label"], "index": [0], "data": [["a", 1]]},
        {"id7": {"text": "a", "label": 1}},
        {"names": ["b", "1"], "data": [{"text": "a", "label": 1}]},
        {"features": {"label": {"names": ["b", "1"], "_type": "ClassLabel"}}, "data": [{"text": "a", "label": 1}]},
    ],
)
def test_rows_of_a_json_object_are_found(tmp_path, value):
    (tmp_path / "x.json").write_text(json.dumps(value))
    [row] = rows(tmp_path / "x.json", columns_of(Classification(), labelled=True))
    assert {name: str(cell) for name, cell in row.items()} == {"text": "a", "label": "1"}


@pytest.mark.parametrize("value", [DIGITS, NESTED])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.jsonl", '{{"text": "a"}}\n{{"text": {}}}\n'),
        ("x.json", '[{{"text": "a"}},\n {{"text": {}}}]'),
        ("x.json", '{{"data": [{{"paragraphs": [{{"context":\n {}}}]}}]}}'),
    ],
)
def test_json_beyond_the_limits_of_python_is_refused(tmp_path, name, text, value):
    (tmp_path / name).write_text(text.format(value))
    message = error_message(tmp_path / name)
    assert f"{name}:" in message and ("4,300 digits" in message or "too many nested" in message)


def test_a_wrong_encoding_is_refused(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"text,label\na,1\n")
    for encoding in ("utf-16", "utf-32", "utf-16-le"):
        assert f"x.csv:1: the text after line 0 is not {encoding}" in error_message(
            tmp_path / "x.csv", encoding=encoding
        )


def test_a_lone_surrogate_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "a\\ud83d"}\n')
    assert "x.jsonl:2: column 'text' holds a lone surrogate, '\\ud83d'" in error_message(tmp_path / "x.jsonl")


# CoNLL

CONLL_U = """# text = vámonos al mar
1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tvamos\tir\tVERB\tV\tM=I\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\tP\t_\t1\tobj\t_\t_
2.1\tgo\tgo\tVERB\tV\t_\t_\t_\t_\t_
3\tmar\tmar\tNOUN\tN\t_\t1\tobl\t_\t_

# text = #a
# newpar
1\t#\t#\tSYM\tS\t_\t0\troot\t_\t_
"""
LAYOUTS = [
    (CONLL_U, ["vamos nos mar", "#"], ["VERB PRON NOUN", "SYM"]),
    ("1\tEU\tB-ORG\n2\trejects\tO\n\n1\tPeter\tB-PER\n", ["EU rejects", "Peter"], ["B-ORG O", "B-PER"]),
    ("#\thttp://a.b [2009]\n1\tJo\tB-PER\tO\n2\tis\tO\tO\n", ["Jo is"], ["O O"]),  # GermEval 2014
    ("# id 7 domain=en\nthe _ _ O\nMet _ _ B-G\n\n# id 8 domain=en\nx _ _ O\n", ["the Met", "x"], ["O B-G", "O"]),
    ("# O\nwin O\n#x O\n", ["# win #x"], ["O O O"]),
    ("#begin document (a)\na 0 x O\n\n#end document\n", ["a"], ["O"]),
    ("O\twhat\nB-ACTOR\tmovies\nO\tfeature\n", ["what movies feature"], ["O B-ACTOR O"]),  # the MIT corpora
    ("-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\n", ["EU"], ["B-ORG"]),
    ("1 O\n2 O\n\n7 B-x\n", ["1 2", "7"], ["O O", "B-x"]),
    ("1\tEU\tB-ORG\n2\tis\tO\n\n3\tJo\tB-PER\n4\tis\tO\n", ["EU is", "Jo is"], ["B-ORG O", "B-PER O"]),
    ("1\tEU\tB-ORG\n2\tis\tO\n5\tJo\tB-PER\n", ["EU is Jo"], ["B-ORG O B-PER"]),
    ("EU\tB-ORG\t1\nis\tO\t2\n\nJo\tB-PER\t1\n", ["EU is", "Jo"], ["B-ORG O", "B-PER"]),
    ("# id 7\tdomain=en\nthe\tO\nMet\tB-G\n", ["the Met"], ["O B-G"]),
    ("# global.columns = ID FORM UPOS PARSEME:MWE\n1\tgive\tVERB\tB-V\n2\tup\tADP\tO\n", ["give up"], ["B-V O"]),
    ("EU\tPROPN\nis\tAUX\n\nJo\tPROPN\nran\tVERB\n", ["EU is", "Jo ran"], ["PROPN AUX", "PROPN VERB"]),
]


def test_sentences_are_read_from_tables_of_words(tmp_path):
    tagging = columns_of(Tagging(), labelled=True)
    (tmp_path / "x.tsv").write_text("EU\tB-ORG\nis\tO\n\nJo\tB-PER\nran\tO\n")
    assert [row["tokens"] for row in rows(tmp_path / "x.tsv", tagging)] == [["EU", "is"], ["Jo", "ran"]]
    text = "#\thttp://a.b/x y [2009]\n1\tJo\tB-PER\n2\tis\tO\n\n#\thttp://a.b [2009]\n1\tWer\tO\n"  # GermEval 2014
    (tmp_path / "comments.tsv").write_text(text)
    assert [row["tokens"] for row in rows(tmp_path / "comments.tsv", tagging)] == [["Jo", "is"], ["Wer"]]
    (tmp_path / "lists.tsv").write_text("tokens\ttags\nEU is\tB-ORG O\n\nJo\tB-PER\n")
    assert [row["tokens"] for row in rows(tmp_path / "lists.tsv", tagging)] == ["EU is", "Jo"]
    (tmp_path / "x.csv").write_text("Word,Tag\n" + "EU,B-ORG\nis,O\n" * 40)
    with pytest.raises(UserError, match="each of the 80 rows holds one token"):
        load_records(tmp_path / "x.csv", Tagging(tokens="Word", tags="Tag"))


@pytest.mark.parametrize("name", ["x.conll", "x.txt", "x", "X.CONLLU"])
@pytest.mark.parametrize(("text", "tokens", "tags"), LAYOUTS)
def test_columns_of_conll_files_are_found(tmp_path, name, text, tokens, tags):
    (tmp_path / name).write_text(text)
    columns = columns_of(Tagging(), labelled=True)
    found = rows(tmp_path / name, columns)
    assert [row["tokens"] for row in found] == [text.split() for text in tokens]
    assert [row["tags"] for row in found] == [text.split() for text in tags]


def test_columns_of_conll_files_can_be_named(tmp_path):
    (tmp_path / "x.conll").write_text(CONLL_U)
    names = ("id", "tokens", "lemma", "tags")
    found = rows(tmp_path / "x.conll", columns=names)
    assert list(found[0]) == list(names) and found[0]["lemma"] == ["ir", "nosotros", "mar"]
    assert rows(tmp_path / "x.conll")[0]["xpos"] == ["V", "P", "N"]
    assert "x.conll:2: the line has 10 columns, data.columns names 11" in error_message(
        tmp_path / "x.conll", columns=("a",) * 11
    )


def test_text_that_is_not_conll_is_read_as_text(tmp_path):
    (tmp_path / "x.txt").write_text("a O\nb O\n")
    assert rows(tmp_path / "x.txt", columns_of(Classification(), labelled=False)) == [{"text": "a O"}, {"text": "b O"}]
    (tmp_path / "y").write_text('"text"\tlabel\na\t1\n')
    assert rows(tmp_path / "y", columns_of(Classification(), labelled=True))[0]["label"] == "1"


# Parquet

HUGGINGFACE = {
    "label": {"names": ["neg", "pos"], "_type": "ClassLabel"},
    "tags": {"feature": {"names": ["O", "B-x"], "_type": "ClassLabel"}, "_type": "List"},
    "old": [{"names": ["O", "B-x"], "_type": "ClassLabel"}],
    "inner": {"kind": {"names": ["a", "b"], "_type": "ClassLabel"}},
}


def parquet(file: Path, names: bool = False, **columns) -> Path:
    table = pyarrow.table(columns)
    if names:
        metadata = json.dumps({"info": {"features": HUGGINGFACE}})
        table = table.replace_schema_metadata({"huggingface": metadata})
    pyarrow.parquet.write_table(table, file)
    return file


def not_utf8() -> pyarrow.Array:
    return pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"], pyarrow.binary()).buffers())


UNUSED = {
    "year 10000": pyarrow.array([2932897], pyarrow.int32()).cast(pyarrow.date32()),
    "timestamp": pyarrow.array([2**60], pyarrow.timestamp("us")),
    "nanoseconds": pyarrow.array([1234567890123456789], pyarrow.timestamp("ns")),
    "duration": pyarrow.array([2**62 + 1], pyarrow.duration("ns")),
    "text": not_utf8(),
    "dictionary": pyarrow.DictionaryArray.from_arrays([0], not_utf8()),
    "zone": pyarrow.array([1], pyarrow.timestamp("ns", "Moon/Base")),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_unused_columns_of_parquet_are_not_read(tmp_path, kind):
    file = parquet(tmp_path / "x.parquet", words=["a"], label=["b"], other=UNUSED[kind])
    task = Classification(text=("words",))
    assert rows(file, columns_of(task, labelled=True)) == [{"words": "a", "label": "b"}]
    if kind in ("text", "dictionary", "zone"):
        assert "column 'other'" in error_message(file)
    else:
        assert str(rows(file)[0]["other"]) == {"year 10000": "10000-01-01", "duration": str(2**62 + 1)}.get(
            kind, str(rows(file)[0]["other"])
        )


def test_names_of_classes_are_read_from_the_metadata_of_the_file(tmp_path):
    file = parquet(
        tmp_path / "x.parquet",
        names=True,
        text=["a", "b", "c"],
        label=[1, 0, -1],
        tags=[[0, 1], [], [1]],
        old=[[1], [0], None],
        inner=[{"kind": 0}, {"kind": 1}, None],
    )
    expected = [
        {"label": "pos", "tags": ["O", "B-x"], "old": ["B-x"], "inner": {"kind": "a"}},
        {"label": "neg", "tags": [], "old": ["O"], "inner": {"kind": "b"}},
        {"label": None, "tags": ["B-x"], "old": None, "inner": None},
    ]
    assert [{name: row[name] for name in expected[0]} for row in rows(file)] == expected
    # Labels that are numbers of options stay numbers.
    choice = MultipleChoice(question="text", options=("text", "text"))
    assert [row["label"] for row in rows(file, columns_of(choice, labelled=True))] == [1, 0, -1]
    bad = parquet(tmp_path / "y.parquet", names=True, label=[2])
    assert "y.parquet:1: column 'label' contains 2, but the metadata of the data set has 2 classes" in error_message(
        bad
    )


CARD = """---
dataset_info:
  features:
  - name: label
    dtype:
      class_label:
        names:
          '0': neg
          '1': pos
  - name: tags
    sequence:
      class_label:
        names: {'0': O, '1': B-x}
---
# A data set
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dataset_info.json", json.dumps({"features": HUGGINGFACE})),
        ("dataset_infos.json", json.dumps({"default": {"features": HUGGINGFACE}})),
        ("README.md", CARD),
    ],
)
@pytest.mark.parametrize("folder", [".", "data"])
def test_names_of_classes_are_read_from_other_files_of_the_folder(tmp_path, name, text, folder):
    (tmp_path / name).write_text(text)
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "train.jsonl").write_text('{"text": "a", "label": 1, "tags": [0, 1]}\n')
    assert rows(tmp_path)[0] == {"text": "a", "label": "pos", "tags": ["O", "B-x"]}


# Lists in tables

LISTS = [
    ("['good', 'funny']", ["good", "funny"]),
    ('["good", "funny"]', ["good", "funny"]),
    ("['good' 'funny']", ["good", "funny"]),
    (str(np.array(["it's", 'so "good"'])), ["it's", 'so "good"']),
    (repr(np.array(["a", "b"], object)), ["a", "b"]),
    (str([np.str_("a"), np.int64(3)]), ["a", 3]),
    (str(np.array([0, 1, 1])), [0, 1, 1]),
    (str(np.array([0.0, 1.0])), [0.0, 1.0]),
    ("('a', 'b')", ["a", "b"]),
    ("{'a', 'b'}", ["a", "b"]),
    (json.dumps(["ü\n\U0001f600"]), ["ü\n\U0001f600"]),
    ("[]", []),
    ("set()", []),
    ("tensor([1, 0], dtype=torch.int8, device='cuda:0')", [1, 0]),
    ("Index(['a', 'b'], dtype='object', name='x')", ["a", "b"]),
    ("deque(['a'], maxlen=3)", ["a"]),
    ("(1, 0)", [1, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), LISTS)
def test_lists_that_pandas_and_numpy_print_are_parsed(text, value):
    assert literals.looks_listed(text) and literals.parse(text) == value


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.lists(json_values) | st.dictionaries(st.text(), json_values))
def test_literals_that_python_and_json_print_are_parsed(value):
    assert literals.parse(repr(value)) == value
    assert literals.parse(json.dumps(value)) == value


@given(st.text(alphabet="[](){}'\",: 01aeE.\\x\n-") | st.text())
def test_any_text_is_refused_or_parsed_as_a_literal(text):
    with suppress(literals.NotALiteralError):
        assert literals.parse(text) is None or isinstance(literals.parse(text), list | dict | str | int | float | bool)


def table(file: Path, labels: list[str], name: str = "label") -> Path:
    with open(file, "w", newline="") as stream:
        csv.writer(stream).writerows([("text", name), *(("x", label) for label in labels)])
    return file


MULTI = Classification(problem="multi_label")
NAMED = Classification(problem="multi_label", names=("a", "b", "c"))


@pytest.mark.parametrize(
    ("task", "labels", "expected", "names"),
    [
        (MULTI, ["['good', 'funny']", "[]", "['good']"], [("good", "funny"), (), ("good",)], ("funny", "good")),
        (MULTI, ["[1, 1, 0]", "[0, 0, 0]", "[0, 1, 0]"], [("LABEL_0", "LABEL_1"), (), ("LABEL_1",)],
         ("LABEL_0", "LABEL_1", "LABEL_2")),
        (NAMED, ["[1 1 0]", "[0. 0. 1.]"], [("a", "b"), ("c",)], ("a", "b", "c")),
        (NAMED, ["1,1,0", "0,0,1"], [("a", "b"), ("c",)], ("a", "b", "c")),
        (MULTI, ["[True, False]", "[False, False]"], [("LABEL_0",), ()], ("LABEL_0", "LABEL_1")),
        (NAMED, ["[0, 2]", "[1]"], [("a", "c"), ("b",)], ("a", "b", "c")),
        (MULTI, ["[0, 1]", "[2]", "[0]"], [("0", "1"), ("2",), ("0",)], ("0", "1", "2")),
        (MULTI, ["a|b", "c"], [("a|b",), ("c",)], ("a|b", "c")),  # | is not the separator
        (Classification(), ["(a)", "b (c)", "(1, 2-x)"], ["(a)", "b (c)", "(1, 2-x)"], ("(1, 2-x)", "(a)", "b (c)")),
        (MULTI, ["good,funny", "good"], [("good", "funny"), ("good",)], ("funny", "good")),
        (Classification(names=("neg", "pos")), ["1", "0", "1"], ["pos", "neg", "pos"], ("neg", "pos")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_lists_of_classes_are_read(tmp_path, task, labels, expected, names, kind):
    file = table(tmp_path / "x.csv", labels)
    if kind == "jsonl":
        values = [literals.parse(label) if label[0] == "[" else label for label in labels]
        file = tmp_path / "x.jsonl"
        file.write_text("\n".join(json.dumps({"text": "x", "label": value}) for value in values))
    part, found = load_records(file, task)
    assert [record["label"] for record in part.records] == expected
    assert found == names


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        (
            Classification(),
            ["['good']", "a"],
            "x.csv:2: column 'label' holds list ['good'], which is not a label; set --t",
        ),
        (MULTI, ["[good, funny]", "a"], "x.csv:2: column 'label' holds '[good, funny]', which is in brackets"),
        *(
            (Classification(), [text, "a"], "x.csv:2: column 'label' holds list")
            for text in ("('a', 'b')", "{'a'}", "frozenset({'a'})", "set()", "(1, 0)", "tensor([1, 0])", "deque(['a'])")
        ),
        (
            MULTI,
            ["a|b", "c", "a"],
            "x.csv:2: column 'label' holds 'a|b', and no row has the separator ','; if '|' separates",
        ),
        (MULTI, ["a;b", "b;c", "a;c", "a;b;c"], "set --task.separator ';'"),
        (MULTI, ["['good', 'fun", "a"], "x.csv:2: column 'label' holds"),
        (MULTI, ["['a' ... 'b']"], "x.csv:2: column 'label' holds"),
        (MULTI, ["[1, 1, 0]", "[2]"], "x.csv:2: column 'label' holds a list of 0 and 1, and in other rows"),
        (NAMED, ["[1, 1, 0, 0]"], "x.csv:2: column 'label' holds 4 values of 0 and 1, and there are 3 classes"),
    ],
)
def test_bad_lists_of_classes_are_refused(tmp_path, task, labels, message):
    with pytest.raises(UserError) as error:
        load_records(table(tmp_path / "x.csv", labels), task)
    assert message in str(error.value)


@pytest.mark.parametrize("tokens", ["['EU', 'rejects']", '["EU", "rejects"]', "['EU' 'rejects']", "EU rejects"])
def test_lists_of_tokens_are_read_from_csv(tmp_path, tokens):
    with open(tmp_path / "x.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([("tokens", "tags"), (tokens, "['B-ORG', 'O']")])
    part, names = load_records(tmp_path / "x.csv", Tagging())
    assert part.records[0]["tokens"] == ["EU", "rejects"] and names == ("O", "B-ORG", "I-ORG")


def test_lists_and_objects_of_other_tasks_are_read_from_csv(tmp_path):
    with open(tmp_path / "x.csv", "w", newline="") as stream:
        answers = str({"text": np.array(["b"], object), "answer_start": np.array([2], np.int32)})
        csv.writer(stream).writerows(
            [("context", "question", "answers", "options", "label"), ("a b", "Who?", answers, "['x', 'y']", "1")]
        )
    assert load_records(tmp_path / "x.csv", QuestionAnswering())[0].records[0]["label"] == [("b", 2)]
    assert load_records(tmp_path / "x.csv", MultipleChoice())[0].records[0]["options"] == ["x", "y"]


# Shapes of data


def test_labels_are_names_of_folders_or_files(tmp_path):
    for name in ("pos/a.txt", "pos/b.txt", "neg/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\nsecond line\n")
    for path in (tmp_path, tmp_path / "*" / "*.txt"):
        part, names = load_records(path, Classification(), label_from="folder", documents="file")
        assert [record["label"] for record in part.records] == ["neg", "pos", "pos"] and names == ("neg", "pos")
    part, names = load_records(tmp_path, Classification(), label_from="folder", limit=3)
    assert [record["label"] for record in part.records] == ["neg", "pos", "neg"]
    part, names = load_records(tmp_path, Classification(), label_from="file")
    assert names == ("a", "b", "c") and len(part.records) == 6
    (tmp_path / "pos" / "a.txt").rename(tmp_path / "pos" / "a.jsonl")
    (tmp_path / "pos" / "a.jsonl").write_text('{"text": "a", "label": 1}')
    with pytest.raises(UserError, match=r"leave out --data\.label-from"):
        load_records(tmp_path, Classification(), label_from="folder")


def test_rows_are_limited_and_have_references(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("source,target,b,c\n1,x,y,\n2,x,y,z\n3,x,,\n")
    part, _ = load_records(file, Seq2Seq(references=("b", "c")), limit=2)
    assert [record["label"] for record in part.records] == [("x", "y"), ("x", "y", "z")]
    assert len(rows(file, limit=5)) == 3
    with pytest.raises(UserError, match=r"x\.csv:2: there is no column 'd'.*--task\.references"):
        load_records(file, Seq2Seq(references=("b", "d")))


# Containers


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_are_read(tmp_path, suffix):
    content = "".join(f"text {n}, \u00fc\n" for n in range(5000)).encode()
    compressed = COMPRESSORS[suffix](content)
    for name in (f"x.txt{suffix}", f"X.TXT{suffix.upper()}", "x.txt", "x"):
        (tmp_path / name).write_bytes(compressed)
        assert len(rows(tmp_path / name)) == 5000
    for broken in (compressed[: len(compressed) // 2], b"plain text", compressed[:20] + b"\0" * 40):
        (tmp_path / f"y.txt{suffix}").write_bytes(broken)
        assert f"y.txt{suffix} is not a whole" in error_message(tmp_path / f"y.txt{suffix}")
    table = pyarrow.table({"text": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "z.parquet")
    (tmp_path / f"z.parquet{suffix}").write_bytes(COMPRESSORS[suffix]((tmp_path / "z.parquet").read_bytes()))
    (tmp_path / "z").write_bytes((tmp_path / "z.parquet").read_bytes())
    assert rows(tmp_path / f"z.parquet{suffix}") == rows(tmp_path / "z") == [{"text": "a"}]


@pytest.mark.parametrize(
    "name", ["x.csv", "x.jsonl", "x.json", "x.txt", "x.conll", "x.tsv", "x.parquet", "x.txt.gz", "x"]
)
def test_empty_files_have_no_rows(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    try:
        assert rows(tmp_path / name) == []
    except UserError as error:
        assert name in str(error) and name == "x.parquet"


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04\x14\0\0\0",
        b"%PDF-1.4",
        b"SQLite format 3\0",
        b"\x80\x04\x95\0",
        b"\x93NUMPY\1\0",
        b"h\0e\0l\0l\0o\0 \0y\0o\0u\0",
    ],
)
def test_binary_files_are_refused(tmp_path, content):
    (tmp_path / "x.csv").write_bytes(content)
    assert "x.csv " in error_message(tmp_path / "x.csv")


def test_files_of_metadata_are_not_data(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "README.md").write_text("# x\n")
    assert rows(tmp_path) == [{"text": "a"}]


def test_names_of_classes_replace_texts_and_floats(tmp_path):
    features = {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(features))
    (tmp_path / "x.csv").write_text("text,label\na,1\nb,neg\nc,-1\n")
    (tmp_path / "x.jsonl").write_text('{"label": 1.0}\n{"label": 0.0}\n{"label": null}\n')
    assert [row["label"] for row in rows(tmp_path / "x.csv")] == ["pos", "neg", None]
    assert [row["label"] for row in rows(tmp_path / "x.jsonl")] == ["pos", "neg", None]


def test_ambiguous_or_unreadable_parquet_columns_are_refused(tmp_path):
    text, number = pyarrow.array(["a"]), pyarrow.array([0])
    twice = pyarrow.Table.from_arrays([text, number, number], ["text", "label", "label"])
    pyarrow.parquet.write_table(twice, tmp_path / "x.parquet")
    assert "the column 'label' twice" in error_message(tmp_path / "x.parquet")
    zone = pyarrow.array([0], pyarrow.timestamp("us", "No/Where"))
    assert "column 'd' of type" in error_message(parquet(tmp_path / "y.parquet", text=text, d=zone))
    (tmp_path / "z.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in error_message(tmp_path / "z.parquet")

"""Documents are the same from every format, cleaning counts what it does, and every mistake has a message."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.config import CleaningConfig, DataConfig
from jaxlm.data.clean import clean
from jaxlm.data.source import documents, fingerprint, rows
from jaxlm.errors import UserError

TEXTS = ["a plain row", 'two\nlines, one "quoted"', "  spaces  ", "naïve 😀", "'; tab\there", "l" * 200_000]


def read(path: Path | str, report: Counter | None = None, **choices) -> list[str]:
    cleaning = CleaningConfig(**choices.pop("cleaning", {}))
    data = DataConfig(cleaning=cleaning, **choices)
    return list(documents(str(path), data, data.split, Counter() if report is None else report))


def refused(path: Path | str, **choices) -> str:
    with pytest.raises(UserError) as error:
        read(path, **choices)
    return str(error.value)


def write(path: Path, texts: list[str]) -> Path:
    """Texts as a table in the format of the suffix, with a second column."""
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
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_every_format_gives_the_same_documents(tmp_path, suffix, packed):
    report = Counter()
    assert read(write(tmp_path / f"data{suffix}{packed}", TEXTS), report) == TEXTS
    assert report["rows"] == report["documents"] == len(TEXTS)


def test_tsv_takes_quotes_as_they_are(tmp_path):
    (tmp_path / "data.tsv").write_text('text\tlabel\n"a quote that never ends\t0\nb\t1\n')
    assert read(tmp_path / "data.tsv") == ['"a quote that never ends', "b"]


def test_rows_know_their_place(tmp_path):
    found = list(rows(str(write(tmp_path / "data.csv", TEXTS[:3])), DataConfig(), "train"))
    assert [place.line for place, _ in found] == [2, 3, 5]  # the second row has two lines
    assert found[0][1] == {"n": "0", "text": TEXTS[0]}


@given(st.text())
def test_a_file_is_one_document_unchanged(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("data") / "x.txt"
    file.write_bytes(text.encode())
    if text and not text.isspace():
        assert read(file, documents="file") == [text]


def test_plain_text_is_divided_as_asked(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfzero\r\n= A =\n a\n\n\nb\r\nc\n= B =")
    assert read(tmp_path / "x.txt") == ["zero", "= A =", " a", "b", "c", "= B ="]
    assert read(tmp_path / "x.txt", documents="blank_line") == ["zero\r\n= A =\n a", "b\r\nc\n= B ="]
    divided = read(tmp_path / "x.txt", documents="boundary", boundary="= .* =$")
    assert divided == ["zero", "= A =\n a\nb\r\nc", "= B ="]


def test_folders_and_globs_come_in_sorted_order(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]
    assert read(f"{tmp_path}/*.txt") == ["a.txt", "b.txt"]
    assert read(f"{tmp_path}/*.md") == ["README.md"]


def test_cleaning_does_and_counts_what_it_says(tmp_path):
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
def test_without_choices_cleaning_changes_nothing(text):
    blank = not text or text.isspace()
    assert clean(text, CleaningConfig(), set(), Counter()) == (None if blank else text)


def test_rows_that_are_not_utf8(tmp_path):
    for name, content in {
        "x.txt": b"good\nb\xffd\nlast",
        "x.csv": b"text\ngood\nb\xffd\nlast",
        "x.jsonl": b'{"text": "good"}\n{"text": "b\xffd"}\n{"text": "last"}',
    }.items():
        file = tmp_path / name
        file.write_bytes(content)
        line = 3 if name == "x.csv" else 2
        assert f"{name}:{line}: column 'text' is not UTF-8" in refused(file)
        report = Counter()
        assert read(file, report, cleaning={"encoding": "drop"}) == ["good", "last"]
        assert report["dropped: encoding"] == 1
        assert read(file, report, cleaning={"encoding": "replace"}) == ["good", "b\ufffdd", "last"]
        assert report["changed: encoding"] == 1
    assert "x.txt:2: " in refused(tmp_path / "x.txt", documents="file")


def test_fingerprint_follows_content_and_not_place(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("same")
    a = fingerprint(str(tmp_path / "a"))
    assert a == fingerprint(str(tmp_path / "b")) == fingerprint(str(tmp_path / "a" / "x.txt"))
    (tmp_path / "b" / "x.txt").write_text("else")
    assert a != fingerprint(str(tmp_path / "b"))


def test_missing_and_empty_paths(tmp_path):
    (tmp_path / "train.csv").write_text("text\n")
    assert "perhaps you meant 'train.csv'" in refused(tmp_path / "trian.csv")
    assert "nor a folder" in refused(tmp_path / "nowhere" / "x.txt")
    assert "holds no document (rows 0)" in refused(tmp_path / "train.csv")
    (tmp_path / "blank.txt").write_text("\n  \n")
    assert "holds no document" in refused(tmp_path / "blank.txt")
    (tmp_path / "folder").mkdir()
    assert "holds no files" in refused(tmp_path / "folder")


def test_broken_tables(tmp_path):
    for name, content, message in [
        (
            "x.csv",
            b"a,b\n1,2\n",
            "x.csv:2: there is no column 'text'; the columns are 'a', 'b'; choose one with --data.t",
        ),
        ("x.jsonl", b'{"body": "x"}', "x.jsonl:1: there is no column 'text'; the columns are 'body'"),
        ("x.jsonl", b'{"text": [1]}', "x.jsonl:1: column 'text' holds list [1], not text"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl:2: not a JSON object (Expecting value"),
        ("x.json", b"[1]", "x.json:1: not a JSON object (a list)"),
        ("x.csv", b"text,b\n1,2\n\n1,2,3\n", "x.csv:4: the row has 3 fields, the header 2 (text, b)"),
        ("x.csv", b'text,b\n"1"x,2\n', "x.csv:2: ',' expected after"),
        ("x.parquet", b"PAR0", "x.parquet is no readable parquet file"),
        ("x.txt.gz", b"plain", "x.txt.gz is not a whole gzip file"),
        ("x.txt.gz", gzip.compress(b"plain text")[:-4], "x.txt.gz is not a whole gzip file"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert message in refused(tmp_path / name), name
    assert "the columns are 'n', 'text'" in refused(write(tmp_path / "y.parquet", ["a"]), text="body")
    (tmp_path / "x.txt").write_text("a")
    assert "data.boundary '(' is no regular expression" in refused(
        tmp_path / "x.txt", documents="boundary", boundary="("
    )


@pytest.mark.filterwarnings("ignore")  # tfds and what it imports warn of themselves
def test_tfds_without_tensorflow(tmp_path, monkeypatch):
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
    assert f"{folder} has no split 'trian'; perhaps you meant 'train'" in refused(folder, split="trian")
    assert "the columns are 'text'" in refused(folder, text="body")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert "tfds has no data set 'imdb_reviws'; perhaps you meant 'imdb_reviews'" in refused("tfds:imdb_reviws")
    assert "tfds:imdb_reviews/nothing cannot be opened" in refused("tfds:imdb_reviews/nothing")
    for name in ("glue/sst2", "cnn_dailymail"):
        message = refused(f"tfds:{name}")
        assert "needs TensorFlow" in message and "file_format='array_record'" in message
    assert fingerprint("tfds:imdb_reviews") == fingerprint("tfds:imdb_reviews/plain_text")
    assert "tensorflow" not in sys.modules


def test_heavy_libraries_are_imported_where_used():
    heavy = "{'pyarrow', 'tensorflow_datasets', 'sentencepiece', 'tokenizers'}"
    code = f"import sys, jaxlm.data.source, jaxlm.data.tokenizer; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stdout + done.stderr

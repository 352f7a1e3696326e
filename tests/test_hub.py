"""Safetensors files: exact reading and writing, and refusal of invalid files. Downloads from the hub."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np
import pytest
import safetensors as reference
import safetensors.numpy
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.hub.download import fetch
from jaxlm.hub.safetensors import INDEX, WEIGHTS, Pending, read, write, write_sharded

ROOT = Path(__file__).parent.parent
DTYPES = [np.bool, np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float16]
DTYPES += [np.float32, np.float64, np.complex64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
DTYPES = [np.dtype(dtype) for dtype in DTYPES]


def random(shape: tuple[int, ...], dtype: type | np.dtype = np.float32) -> np.ndarray:
    """Returns random bits, except that a bool is 0 or 1."""
    dtype = np.dtype(dtype)
    bits = np.random.default_rng(0).integers(0, 2 if dtype == np.bool else 256, (*shape, dtype.itemsize), np.uint8)
    return bits.reshape(-1).view(dtype).reshape(shape)


def bits(array) -> tuple:
    """Returns the values that must be equal for two tensors to be the same."""
    return tuple(array.shape), np.dtype(array.dtype), np.asarray(array).tobytes()


def all_bits(tensors) -> dict[str, tuple]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


MIXED = {  # unordered dtypes, unusual names, no elements, no axes, views
    "b.2": random((3, 5)),
    "b.10": random((3, 5)).T,
    "ä": random((2, 6, 4), ml_dtypes.bfloat16)[:, ::2],
    "a": random((7,), np.bool),
    "scalar": random((), np.int64),
    "none": random((3, 0, 2), np.float16),
    "": random((2,), np.float64),
}


# Writing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 3), (2, 3, 4, 5)], ids=str)
def test_a_file_is_read_exactly_and_equals_the_file_of_safetensors(tmp_path, dtype, shape):
    x = random(shape, dtype)
    write({"x": x, "y": x}, tmp_path / WEIGHTS)
    found = read(tmp_path)
    assert all_bits(found) == {"x": bits(x), "y": bits(x)}
    assert (found["x"].shape, found["x"].dtype) == (shape, dtype)
    theirs = safetensors.numpy.save({"x": x, "y": x}, metadata={"format": "pt"})
    assert (tmp_path / WEIGHTS).read_bytes() == theirs


def test_a_file_may_have_many_dtypes_names_and_views(tmp_path):
    write(MIXED, tmp_path / WEIGHTS, metadata={"über": "\n"})
    assert all_bits(read(tmp_path)) == all_bits(MIXED)
    theirs = dict(reference.deserialize((tmp_path / WEIGHTS).read_bytes()))
    assert {name: bytes(x["data"]) for name, x in theirs.items()} == {name: x.tobytes() for name, x in MIXED.items()}
    assert all(tensor.view().flags.aligned for tensor in read(tmp_path).values())
    with reference.safe_open(tmp_path / WEIGHTS, "numpy") as file:
        assert file.metadata() == {"über": "\n"}


def test_a_file_may_have_no_tensors(tmp_path):
    write({}, tmp_path / WEIGHTS)
    assert dict(read(tmp_path)) == {}


def test_a_view_is_read_only_and_outlives_a_release(tmp_path):
    x = random((4, 6))
    write({"x": x}, tmp_path / WEIGHTS)
    stored = read(tmp_path)["x"]
    view = stored.view().T.reshape(3, 8)
    stored.release()
    assert np.array_equal(view, x.T.reshape(3, 8), equal_nan=True)
    for array in (stored.view(), stored.view()[1:], stored.view().T):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    for index in (0, (1, 2), slice(1, 3), ([3, 0], 2), (..., None)):
        assert stored[index].tobytes() == x[index].tobytes()
        assert stored[index].flags.writeable
    assert np.asarray(stored, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="view"):
        np.asarray(stored, copy=False)


def test_tensors_outlive_their_file(tmp_path):
    write(MIXED, tmp_path / WEIGHTS)
    found = read(tmp_path)
    write({}, tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    assert all_bits(found) == all_bits(MIXED)


def test_a_system_without_madvise_reads_the_same(tmp_path, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)
    write(MIXED, tmp_path / WEIGHTS)
    assert all_bits(read(tmp_path)) == all_bits(MIXED)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 40), max_size=12), st.integers(0, 100))
def test_shards_are_those_of_transformers(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"x.{i:02}": random((size,), np.uint8) for i, size in enumerate(sizes)}
    write_sharded(dict(reversed(tensors.items())), folder, max_shard_bytes=limit)
    assert all_bits(read(folder)) == all_bits(tensors)
    theirs = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda x: x.nbytes,
        max_shard_size=limit,
        filename_pattern="model{suffix}.safetensors",
    )
    shards = {name for name, members in theirs.filename_to_tensors.items() if members} or {WEIGHTS}
    if len(theirs.filename_to_tensors) > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index == {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}
        shards.add(INDEX)
    assert {path.name for path in folder.iterdir()} == shards


def test_a_model_replaces_all_weights_of_a_folder(tmp_path):
    (tmp_path / "config.json").touch()
    one, few, many = ({f"{i}": random((n, 10))} | {"x": random((3, 10))} for i, n in enumerate((1, 2, 3)))
    for tensors, limit, files in ((one, 1000, 1), (few, 120, 3), (many, 1, 3), (one, 1000, 1), (many, 1, 3)):
        write_sharded(tensors, tmp_path, max_shard_bytes=limit)
        assert all_bits(read(tmp_path)) == all_bits(tensors)
        assert len(list(tmp_path.iterdir())) == files + 1


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


FAILURES = {
    "interrupted": (KeyboardInterrupt, "manually"),
    "another shape": (ValueError, r"z is float32 \(3,\), expected float32 \(2,\)"),
    "full disk": (OSError, "No space left"),
    "dtype": (UserError, "z has dtype complex128, which safetensors does not support; known: BOOL"),
}


@pytest.mark.parametrize("limit", [10**9, 100, 1])
@pytest.mark.parametrize("before", [None, 10**9, 1])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_model_is_written_atomically(tmp_path, monkeypatch, failure, before, limit):
    def interrupt():
        raise KeyboardInterrupt("manually")

    if before is not None:
        write_sharded(MIXED, tmp_path, max_shard_bytes=before)
    before_write = tree(tmp_path)
    z = {
        "interrupted": Pending((2,), np.dtype(np.float32), interrupt),
        "another shape": Pending((2,), np.dtype(np.float32), lambda: np.zeros(3, np.float32)),
        "full disk": random((2,)),
        "dtype": np.zeros(2, np.complex128),
    }[failure]
    if failure == "full disk":
        monkeypatch.setattr(os, "fsync", full_disk)
    kind, message = FAILURES[failure]
    with pytest.raises(kind, match=message) as error:
        write_sharded(MIXED | {"z": z}, tmp_path, max_shard_bytes=limit)
    assert tree(tmp_path) == before_write
    if failure == "full disk":
        assert error.value.errno == errno.ENOSPC


def test_tensors_are_created_one_at_a_time(tmp_path):
    created = []

    def create(i):
        created.append(i)
        return np.full(2, i, np.float32)

    tensors = {f"{i}": Pending((2,), np.dtype(np.float32), partial(create, i)) for i in range(4)}
    write_sharded(tensors, tmp_path, max_shard_bytes=16)
    assert created == [0, 1, 2, 3]
    assert [np.asarray(x).tolist() for x in read(tmp_path).values()] == [[i, i] for i in range(4)]


# Reading untrusted files

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LATER = F32 | {"data_offsets": [8, 16]}


def file(header: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


CORRUPT = {
    "empty": (b"", "Expecting value"),
    "short": (b"\1", "header has a length of 1 bytes, more than 0"),
    "no header": (bytes(8), "Expecting value"),
    "header beyond the file": (file({"x": F32}, b"", 64), "header has a length of 64 bytes, more than 61"),
    "header beyond memory": (file({}, b"", 2**64 - 1), "18,446,744,073,709,551,615 bytes, more than 2"),
    "pickle": (b"\x80\x02}q\x00.", "header has a length"),
    "not UTF-8": (file(b'{"\xff": 1}'), "'utf-8' codec"),
    "UTF-16": (file(json.dumps({"x": F32}).encode("utf-16")), "'utf-8' codec"),
    "half a surrogate pair": (file({"\ud800": F32}), "surrogates not allowed"),
    "not JSON": (file(b"{'x': 1}"), "Expecting property name"),
    "more after the JSON": (file(b"{}{}"), "Extra data"),
    "list": (file([]), "contains a list, not an object"),
    "deep": (file(b'{"x":' * 100_000), "recursion"),
    "deep lists": (file(b"[" * 100_000), "recursion"),
    "many digits": (file(b'{"x":' + b"1" * 5000 + b"}"), "4300 digits"),
    "duplicate name": (file(b'{"x":%b,"x":%b}' % ((json.dumps(F32).encode(),) * 2)), "it contains 'x' twice"),
    "duplicate field": (file(b'{"x":{"dtype":"F32","dtype":"F32"}}'), "it contains 'dtype' twice"),
    "NaN": (file({"x": float("nan")}), "'x' is nan, not dtype, shape and data_offsets"),
    "null": (file({"x": None}), "'x' is None, not"),
    "field missing": (file({"x": {"dtype": "F32", "shape": [2]}}), "'x' is {'dtype': 'F32', 'shape': "),
    "field unknown": (file({"x": F32 | {"strides": [1]}}), "'strides'"),
    "metadata is text": (file({"__metadata__": "pt", "x": F32}), "__metadata__ is 'pt', not an object of strings"),
    "metadata holds a number": (file({"__metadata__": {"a": 1}, "x": F32}), "__metadata__ is {'a': 1}"),
    "shape is text": (file({"x": F32 | {"shape": "2"}}), "has shape '2'"),
    "shape is negative": (file({"x": F32 | {"shape": [-1, -2]}}), r"has shape \[-1, -2\]"),
    "shape is a float": (file({"x": F32 | {"shape": [2.0]}}), r"has shape \[2.0\]"),
    "shape is infinite": (file({"x": F32 | {"shape": [float("inf")]}}), r"has shape \[inf\]"),
    "shape is true": (file({"x": F32 | {"shape": [True, 2]}}), r"has shape \[True, 2\]"),
    "shape overflows": (file({"x": F32 | {"shape": [2**61 + 1, 8]}}), "has shape .* at most 64 axes"),
    "shape overflows to nothing": (
        file({"x": F32 | {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}),
        "has shape",
    ),
    "axis overflows": (file({"x": F32 | {"shape": [2**64, 0], "data_offsets": [0, 0]}}), "has shape"),
    "many axes": (file({"x": F32 | {"shape": [1] * 64 + [2]}}), "at most 64 axes"),
    "endless shape": (file({"x": F32 | {"shape": [10**4000] * 200}}), "at most 64 axes"),
    "shape too small": (file({"x": F32 | {"shape": [1]}}), r"'x' has 8 bytes, F32 \[1\] requires 4"),
    "shape too large": (file({"x": F32 | {"shape": [2, 2**40]}}), "requires 8,796,093,022,208"),
    "offsets reversed": (file({"x": F32 | {"data_offsets": [8, 0]}}), "has -8 bytes"),
    "offset negative": (file({"x": F32 | {"data_offsets": [-8, 0]}}), r"has data_offsets \[-8, 0\]"),
    "three offsets": (file({"x": F32 | {"data_offsets": [0, 8, 8]}}), r"data_offsets \[0, 8, 8\]"),
    "offsets beyond": (file({"x": F32 | {"data_offsets": [2**70, 2**70 + 8]}}), "has data_offsets"),
    "overlap": (file({"x": F32, "y": F32}, bytes(16)), "'y' begins at byte 130 of the file, not at 138"),
    "hole": (file({"x": LATER}, bytes(16)), "'x' begins at byte .* of the file, not at"),
    "data missing": (file({"x": F32, "y": LATER}, bytes(15)), "tensors end at byte"),
    "data after the tensors": (file({"x": F32}, bytes(9)), "tensors end at byte"),
    "data without tensors": (file({}), "tensors end at byte 10 of the file"),
}


STRICTER = {"duplicate name", "field unknown", "many axes"}  # cases that the reference package accepts


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_files_are_refused_and_the_message_gives_the_reason(tmp_path, case):
    content, reason = CORRUPT[case]
    (tmp_path / WEIGHTS).write_bytes(content)
    message = rf"{WEIGHTS} \({len(content):,} bytes\) is truncated or corrupt: .*{reason}.*; download the file again"
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path)
    assert len(str(error.value)) < 1000
    if case not in STRICTER:
        with pytest.raises(reference.SafetensorError):
            reference.deserialize(content)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "f32", "I128", "", None, 3, ["F32"], "x" * 10**6])
def test_the_message_names_an_unsupported_dtype(tmp_path, dtype):
    (tmp_path / WEIGHTS).write_bytes(file({"x": F32 | {"dtype": dtype}}))
    with pytest.raises(
        UserError, match=rf"has 'x' in dtype {re.escape(repr(dtype))[:40]}.*known: BOOL, .*convert the file"
    ):
        read(tmp_path)


def test_truncated_and_extended_files_are_refused(tmp_path):
    path = tmp_path / WEIGHTS
    write(MIXED, path)
    whole = path.read_bytes()
    for content in [whole[:n] for n in range(len(whole))] + [whole + b"\0", b" " + whole]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"truncated or corrupt.*; download the file again"):
            read(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, INDEX])
def test_a_path_that_is_not_a_regular_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = tmp_path / name

    def check_refusal(message):
        with pytest.raises(UserError, match=message):
            read(tmp_path)
        path.unlink()

    os.mkfifo(name)
    check_refusal("is not a regular file")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(name)
        check_refusal("cannot be read")
    path.symlink_to("/dev/zero")
    check_refusal("is not a regular file")
    path.symlink_to("absent")
    check_refusal(r"cannot be read \(No such file")
    path.symlink_to(path)
    check_refusal("cannot be read")
    path.touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied")))
        check_refusal(r"cannot be read \(Permission denied\)")
    path.mkdir()
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read(tmp_path)


@pytest.mark.parametrize("folder", ["file", "file/below", "x" * 300, "nul\0"])
def test_a_path_that_is_not_a_folder_is_refused(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"has no weights: neither {WEIGHTS} nor {INDEX} .*; add them"):
        read(tmp_path / folder)


HOSTILE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.integers(-(2**70), 2**70) | st.integers(-1, 9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
SIZES = st.lists(st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 8, 2**31, 2**62, 2**63, 2**64]), max_size=4)
CODES = st.sampled_from(["BOOL", "U8", "F16", "BF16", "F32", "I64", "F8_E4M3", "F4"])


@st.composite
def altered_files(draw) -> bytes:
    """Draws a file with some bytes changed, removed or added, or with a wrong header."""
    whole = safetensors.numpy.save({name: MIXED[name] for name in ("a", "b.2", "ä", "none")}, {"format": "pt"})
    start = 8 + int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8:start]), whole[start:]
    if draw(st.booleans()):
        raw = bytearray(whole)
        for position, byte in draw(
            st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)
        ):
            raw[position] = byte
        return bytes(raw[: draw(st.integers(0, len(raw)) | st.just(len(raw)))]) + draw(st.just(b"") | st.binary())
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(header)) | st.text(max_size=3))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "format", "more"]))
        value = draw({"dtype": CODES, "shape": SIZES, "data_offsets": SIZES}.get(field, HOSTILE) | HOSTILE)
        entry = header.get(name)
        header[name] = entry | {field: value} if isinstance(entry, dict) and draw(st.booleans()) else value
        if draw(st.booleans()):
            header[draw(st.text(max_size=3))] = header.pop(name)
    length = draw(st.none() | st.integers(0, len(whole)) | st.integers(0, 2**64 - 1))
    return file(header, data, length if draw(st.booleans()) else None)


@settings(deadline=None, max_examples=1000)
@given(altered_files())
def test_an_altered_file_is_refused_or_read_as_safetensors_reads_it(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / WEIGHTS).write_bytes(content)
    try:
        theirs = dict(reference.deserialize(content))
    except reference.SafetensorError:
        theirs = None
    try:
        found = read(folder)
    except UserError as error:
        stricter = "it contains .* twice|not dtype, shape and data_offsets|in dtype|None, not an object of strings"
        stricter += "|not the sizes of at most 64 axes in memory"
        assert theirs is None or re.search(stricter, str(error))
        assert len(str(error)) < 2000
    else:
        assert {name: (list(x.shape), np.asarray(x).tobytes()) for name, x in found.items()} == {
            name: (x["shape"], bytes(x["data"])) for name, x in theirs.items()
        }


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_an_altered_index_is_refused_or_correct(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "index"
    if not folder.exists():
        folder.mkdir()
        write_sharded(MIXED, folder, max_shard_bytes=40)
        (folder / "whole").write_bytes((folder / INDEX).read_bytes())
    whole = (folder / "whole").read_bytes()
    names, files = st.sampled_from(sorted(MIXED)) | st.text(max_size=3), st.sampled_from(sorted(os.listdir(folder)))
    if data.draw(st.booleans()):
        raw = bytearray(whole)
        for position, byte in data.draw(
            st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=3)
        ):
            raw[position] = byte
        content = bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    else:
        odd = st.sampled_from(["..", "/", ".safetensors", "a\0.safetensors", "x" * 300 + ".safetensors"])
        entries = st.dictionaries(names, files | odd | HOSTILE, max_size=3)
        values = data.draw(HOSTILE | st.fixed_dictionaries({"weight_map": entries | HOSTILE}))
        if data.draw(st.booleans()):
            values = {"weight_map": json.loads(whole)["weight_map"] | data.draw(entries)}
        content = json.dumps(values).encode()
    (folder / INDEX).write_bytes(content)
    try:
        found = read(folder)
    except UserError as error:
        assert len(str(error)) < 2000
    else:
        assert all_bits(found).items() <= all_bits(MIXED).items()


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write({"x": random((2,))}, tmp_path / "a.safetensors")
    write({"x": random((3,)), "y": random((1,))}, tmp_path / "b.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(UserError, match="disagree about the file of x"):
        read(tmp_path)


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from jaxlm.hub.safetensors import Pending, read, write_sharded

folder, tensors, size, sums = Path(sys.argv[1]), 16, 1 << 26, {}

def make(i):
    array = np.random.default_rng(i).integers(0, 1 << 32, size // 4, np.uint32)
    sums[i] = array.sum()
    return array

def measured(label, work):
    status = lambda field: int(Path("/proc/self/status").read_text().split(field)[1].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS:")
    work()
    print(label, round(status("VmHWM:") - before, 1))

def write():
    pending = {f"{i:02}": Pending((size // 4,), np.dtype(np.uint32), lambda i=i: make(i)) for i in range(tensors)}
    write_sharded(pending, folder)

def view():
    for tensor in read(folder).values():
        tensor.view().T.max()
        tensor.release()

def copy():
    for i, tensor in enumerate(read(folder).values()):
        assert np.asarray(tensor).sum() == sums[i]

def index():
    for tensor in read(folder).values():
        assert tensor[::2].size == size // 8

def transposed():
    for tensor in read(folder).values():
        np.ascontiguousarray(tensor.view().reshape(4096, -1).T)
        tensor.release()

make(0)
for work in (write, view, copy, index, transposed):
    measured(work.__name__, work)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux reports the peak of a process")
def test_a_model_is_read_and_written_in_the_memory_of_its_largest_tensor(tmp_path):
    result = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    peaks = {label: float(mib) for label, mib in map(str.split, result.stdout.splitlines())}
    print(f"a file of 1,024 MiB, tensors of 64 MiB; increase of the peak in MiB: {peaks}")
    assert (tmp_path / WEIGHTS).stat().st_size > 1 << 30
    # In units of tensors: allocated memory, and mapped bytes of the file.
    allocated = {"write": 1, "view": 0, "copy": 1, "index": 0.5, "transposed": 1}
    mapped = {"view": 1, "index": 1, "transposed": 1}
    for label, peak in peaks.items():
        assert peak < 64 * (allocated[label] + mapped.get(label, 0)) + 16, label


# The hub


class Hub(ThreadingHTTPServer):
    """Serves models, `name -> revision -> file -> content`, to huggingface_hub. The first revision is main."""

    def __init__(self, models: dict[str, dict[str, dict[str, bytes]]]) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.models, self.sent = models, list[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fetched_files(self) -> set[str]:
        """Returns the files that were sent since the last call, and checks that none was sent twice."""
        sent, self.sent = self.sent, []
        assert len(set(sent)) == len(sent)
        return set(sent)


class HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        name = next((name for name in self.server.models if f"{name}/" in f"{path}/"), None)
        if name == "org/broken":
            return self.answer(503)
        if name is None:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        endpoint, _, rest = f"{path}/".partition(f"{name}/")[2].strip("/").partition("/")
        revisions = self.server.models[name]
        commits = {commit(name, revision): revision for revision in revisions}
        reference, _, file = rest.partition("/")
        revision = commits.get(reference, reference) or next(iter(revisions))
        revision = next(iter(revisions)) if revision == "main" else revision
        if revision not in revisions:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        files = revisions[revision]
        if endpoint == "tree":
            entries = [{"type": "file", "path": p, "size": len(c), "oid": f"{len(c):040}"} for p, c in files.items()]
            return self.answer(200, content=json.dumps(entries).encode())
        if endpoint != "resolve":
            siblings = [{"rfilename": file} for file in files]
            values = {"id": name, "sha": commit(name, revision), "siblings": siblings}
            return self.answer(200, content=json.dumps(values).encode())
        if name == "org/gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if self.command == "GET":
            self.server.sent.append(f"{name}/{file}")
        tag = f'"{commit(file, repr(files[file]))}"'
        return self.answer(200, {"ETag": tag, "X-Repo-Commit": commit(name, revision)}, files[file])

    do_HEAD = do_GET

    def answer(self, status: int, headers: Mapping[str, str] = MappingProxyType({}), content: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content if self.command == "GET" else b"")

    def log_message(self, *_) -> None:
        pass


def commit(*of: str) -> str:
    return hashlib.sha1(repr(of).encode()).hexdigest()


SMALL = {"config.json": b"{}", "tokenizer.json": b"{ }", "vocab.txt": b"a\nb", "spiece.model": b"pieces"}
SMALL |= {"chat_template.jinja": b"{{ }}", "tokenizer_config.json": b"[]"}
MODULES = {"modules.json": b"[ ]", "1_Pooling/config.json": b"{  }", "2_Dense/model.safetensors": b"dense"}
OTHERS = ["README.md", "pytorch_model.bin", "model.fp16.safetensors", "consolidated.safetensors", "flax_model.msgpack"]
OTHERS += ["onnx/config.json", "onnx/model.onnx", "openvino/openvino_model.bin", "modeling.py", "tf_model.h5"]
OTHERS += ["checkpoint-5/model.safetensors", "2_Dense/pytorch_model.bin", "original/tokenizer.model", "rng.pth"]
OTHERS = {name: name.encode() for name in OTHERS}
SHARDS = {"one.safetensors": b"1", "model-00002-of-00002.safetensors": b"2"}
SHARDED = SHARDS | {INDEX: json.dumps({"weight_map": dict(zip("ab", SHARDS))}).encode()}
MODELS = {
    "org/model": {"first": OTHERS | SMALL | MODULES | {WEIGHTS: b"weights"}, "v2": {WEIGHTS: b"others"}},
    "small": {"main": SMALL | {WEIGHTS: b"weights of small"}},
    "org/sharded": {"main": OTHERS | SHARDED | {"config.json": b"{}"}},
    "org/both": {"main": SHARDED | {WEIGHTS: b"weights of both"}},
    "org/pickled": {"main": OTHERS | SMALL},
    "org/words": {"main": SMALL},
    "org/quantised": {"main": {"README.md": b"text", "a.Q4_0.gguf": b"GGUF", "b.gguf": b"GGUF"}},
    "org/gated": {"main": SMALL},
    "org/outside": {"main": {INDEX: b'{"weight_map": {"a": "../b.safetensors"}}'}},
    "org/broken": {},
}
FETCH = """
import json, sys
from jaxlm.errors import UserError
from jaxlm.hub.download import fetch
for name, options in json.loads(sys.argv[1]):
    try:
        print(json.dumps(str(fetch(name, **options))))
    except UserError as error:
        print(json.dumps(f"refused: {error}"))
"""


@pytest.fixture(scope="module")
def hub():
    server = Hub(MODELS)
    yield server
    server.shutdown()
    server.server_close()


def fetch_in_process(home: Path, url: str, *names, **environment: str) -> list[str]:
    """Returns the folders or errors that a new process prints, since a process reads its cache and hub at its start."""
    requests = [(name, {}) if isinstance(name, str) else name for name in names]
    variables = {name: value for name, value in os.environ.items() if not re.match("HF_|HUGGING|.*_proxy$", name, re.I)}
    variables |= {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"} | environment
    command = [sys.executable, "-c", FETCH, json.dumps(requests)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=60)
    assert result.returncode == 0, result.stderr
    return list(map(json.loads, result.stdout.splitlines()))


def deep_tree(folder: str) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_model_is_downloaded_once_and_without_unused_files(hub, tmp_path):
    expected = {
        "org/model": SMALL | MODULES | {WEIGHTS: b"weights"},
        "small": SMALL | {WEIGHTS: b"weights of small"},
        "org/sharded": SHARDED | {"config.json": b"{}"},
        "org/both": {INDEX: SHARDED[INDEX], WEIGHTS: b"weights of both"},
        "org/words": SMALL,
    }
    unknown = "org/pickled"  # not in the cache
    not_cached = f"{unknown} is not a folder, and the cache has no complete copy of"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # a port without a listener
        no_hub = f"http://127.0.0.1:{unused.getsockname()[1]}"
        hub.sent.clear()
        *folders, again = fetch_in_process(tmp_path, hub.url, *expected, "small")
        assert list(map(deep_tree, folders)) == list(expected.values())
        assert again == folders[1]
        assert hub.fetched_files() == {f"{name}/{file}" for name in expected for file in expected[name]}

        offline = [("small", {"offline": True}), (unknown, {"offline": True})]
        *again, refused, small, refused_too = fetch_in_process(tmp_path, no_hub, *expected, unknown, *offline)
        assert (again, small) == (folders, folders[1])
        assert re.match(f"refused: {unknown} is not a folder, and {no_hub}/{unknown} .* cannot be reached", refused)
        assert re.match(f"refused: {not_cached}", refused_too)

        *again, refused = fetch_in_process(tmp_path, hub.url, *expected, unknown, HF_HUB_OFFLINE="1")
        assert again == folders
        assert re.match(f"refused: {not_cached}", refused)
        assert not hub.fetched_files()


def test_revisions_and_another_cache_are_supported(hub, tmp_path):
    first, second = (commit("org/model", revision) for revision in ("first", "v2"))
    revisions = [{"revision": revision} for revision in ("v2", second, first, "main")]
    *folders, other = fetch_in_process(
        tmp_path / "home", hub.url, *(("org/model", r) for r in revisions), ("small", {"cache_dir": f"{tmp_path}/here"})
    )
    assert [Path(folder).name for folder in folders] == [second, second, first, first]
    assert [Path(folder, WEIGHTS).read_bytes() for folder in folders] == [b"others"] * 2 + [b"weights"] * 2
    assert Path(other).is_relative_to(tmp_path / "here")


def test_errors_of_the_hub_have_a_remedy(hub, tmp_path):
    refusals = {
        "org/absent": f"org/absent is not a folder, and {hub.url}/org/absent does not exist .*the name, or log in",
        "org/gated": f"{hub.url}/org/gated has restricted access .*403.*request access .*`hf auth login`",
        "org/broken": f"{hub.url}/org/broken cannot be downloaded: the hub returned HTTP status 503; try later",
        "org/pickled": rf"{hub.url}/org/pickled has only pickled weights \(pytorch_model.bin, rng.pth\)",
        "org/quantised": rf"{hub.url}/org/quantised has only GGUF files \(a.Q4_0.gguf, b.gguf\) as weights; "
        "download one with `hf download org/quantised FILE`, and give its path",
        "org/outside": r"lists '../b.safetensors'; a shard is a .safetensors file of the same folder",
        "a/b/c": "'a/b/c' is not a folder and not a valid name of a model",
        "./model": "'./model' is not a folder and not a valid name of a model",
        "": "'' is not a folder and not a valid name",
        "nul\0": "is not a folder and not a valid name",
        "x" * 300: "is not a folder and not a valid name",
    }
    hub.sent.clear()
    answers = fetch_in_process(tmp_path, hub.url, *refusals, ("small", {"revision": "v9"}))
    refusals["revision"] = f"{hub.url}/small has no revision 'v9'; give one of its branches, tags or commits"
    for answer, message in zip(answers, refusals.values()):
        assert re.match(f"refused: .*{message}", answer)
    assert not {name for name in hub.fetched_files() if re.search(r"\.(bin|pth|safetensors)$", name)}


def test_a_local_folder_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert fetch("small") == Path("small")
    assert fetch(tmp_path, offline=True) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; give its folder"):
        fetch("file")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/blobs"), OSError, "No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/blobs"), UserError, "denied: '/blobs'.*; set HF_HOME"),
        (
            RuntimeError("connection reset"),
            UserError,
            r"cannot be reached \(RuntimeError: connection reset\); fix the",
        ),
    ],
)
def test_errors_during_a_download_have_a_message(monkeypatch, error, kind, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(kind, match=message) as found:
        fetch("org/model")
    assert found.value is error or isinstance(found.value, UserError)

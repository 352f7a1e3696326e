"""A config file that does not do what it should ends in one sentence that names the file, the line and the remedy."""

from __future__ import annotations

import pytest

from jaxlm.__main__ import main

HEAD = "from pathlib import Path\nfrom jaxlm import *\n\n\ndef config():\n    return "
# What the file holds, and what the message must say.
FILES = {
    "syntax": ("def config(:\n    pass\n", ["line 1", "correct the syntax"]),
    "indentation": ("def config():\nreturn 1\n", ["line 2", "correct the syntax"]),
    "not Python": (b"\x00\x01", ["correct"]),
    "not UTF-8": (b"x = 'na\xefve'\n", ["correct"]),
    "returns nothing": ("def config():\n    pass\n", ["config() returns None", "RunConfig"]),
    "returns a dict": ("def config():\n    return {'batch': 8}\n", ["returns {'batch': 8}", "RunConfig"]),
    "raises": ("def config():\n    raise KeyError('corpus')\n", ["line 2", "KeyError: 'corpus'", "correct the config"]),
    "raises deep below": (
        "import json\n\n\ndef config():\n    return json.loads('[')\n",
        ["line 5", "JSONDecodeError", "correct the config"],
    ),
    "raises when it is read": ("x = 1 / 0\n", ["line 1", "ZeroDivisionError", "correct"]),
    "imports what is missing": ("import no_such_thing\n", ["line 1", "no_such_thing", "install the module"]),
    "imports a wrong name": ("from jaxlm import RunConfg\n", ["line 1", "RunConfg", "correct the config"]),
    "raises several lines": ("raise ValueError('one\\n  two')\n", ["line 1", "ValueError: one two; correct"]),
    "raises what has no text": (
        "class Odd(Exception):\n    def __str__(self):\n        raise TypeError\n\nraise Odd\n",
        ["line 5", "Odd; correct the config"],
    ),
    "raises ours": ("from jaxlm import UserError\nraise UserError('give a corpus')\n", ["give a corpus"]),
    "a null byte": ("x = 1\0\n", ["null bytes", "correct the syntax"]),
    "leaves": ("raise SystemExit(0)\n", ["line 1", "SystemExit", "correct"]),
    "never ends": ("def config():\n    return config()\n", ["line 2", "RecursionError"]),
    "a float": (f"{HEAD}RunConfig(data=DataConfig(path='x'), steps=1e3)\n", ["steps is 1000.0", "an integer"]),
    "a text": (f"{HEAD}RunConfig(data=DataConfig(path='x'), batch='8')\n", ["batch is '8'", "an integer"]),
    "None": (f"{HEAD}RunConfig(data=DataConfig(path=None))\n", ["data.path is None", "a string"]),
    "no such field": (f"{HEAD}RunConfig(bach=8)\n", ["line 6", "bach", "correct"]),
    "parts of another kind": (f"{HEAD}RunConfig(data='x')\n", ["data is 'x'", "of type DataConfig"]),
    "a class for a task": (f"{HEAD}RunConfig(task=CausalLM)\n", ["task is <class", "CausalLM()"]),
    "a range": (f"{HEAD}RunConfig(seed=-1)\n", ["seed is -1", "at least 0"]),
    "a range of a task": (f"{HEAD}RunConfig(task=MaskedLM(mask_rate=2))\n", ["task.mask_rate is 2", "below 1"]),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verb", ["train", "plan", "inspect"])
def test_a_faulty_config_file(tmp_path, monkeypatch, capsys, verb, name):
    monkeypatch.chdir(tmp_path)
    content, words = FILES[name]
    (tmp_path / "mine.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([verb, "mine.py"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "mine.py" in said, said
    assert all(word in said for word in words), said


def test_a_path_is_a_text(tmp_path, monkeypatch, capsys):
    """pathlib's paths are what Python users have."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(f"{HEAD}RunConfig(data=DataConfig(path=Path('gone.txt')))\n")
    assert main(["train", "mine.py", "--data.length", "64"]) == 2
    assert "'gone.txt'" in capsys.readouterr().err


OTHER_NAMES = {
    "lr": "--optimizer.rate",
    "learning-rate": "--optimizer.rate",
    "learning_rate": "--optimizer.rate",
    "num-train-epochs": "--epochs",
    "batch-size": "--batch",
    "max-length": "--data.length",
    "model": "--init",
    "output-dir": "--workdir",
    "train-file": "--data.path",
    "gradient-accumulation-steps": "--accumulate",
    "rate": "--optimizer.rate",
    "fsdp": "--mesh.fsdp",
    "resume": "resumes the run",
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_flag_of_another_tool_suggests_ours(capsys, name):
    for words in ([f"--{name}", "1"], [f"--{name}=1"]):
        assert main(["train", "quickstart", *words]) == 2
        said = capsys.readouterr().err
        assert f"there is no --{name.replace('_', '-')}" in said and OTHER_NAMES[name] in said


def test_every_suggested_flag_exists():
    from jaxlm.__main__ import FileArguments, Generate
    from jaxlm.config import Classification, DataConfig, MaskedLM, RunConfig, Seq2Seq, Tagging, flags

    runs = [RunConfig(data=DataConfig(), task=task()) for task in (Classification, MaskedLM, Seq2Seq, Tagging)]
    known = {name for config in (*runs, Generate(model=""), FileArguments()) for name in flags.names(config)}
    assert {name for names in flags._SUGGESTED.values() for name in names} <= known
    of_one_verb = {"output", "file", "model", "max-length", "early-stopping"}
    assert not flags._SUGGESTED.keys() & known - of_one_verb


def test_the_help_of_predict_needs_no_file(capsys):
    """It shows the fields of a task, and none of the data's that are of training alone."""
    with pytest.raises(SystemExit) as ended:
        main(["predict", "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "--task.text" in said and "jaxlm predict RUN --help" in said
    assert "--data.format" in said and "--data.eval" not in said and "--data.path" not in said


SWEEPS = {
    "too many": (
        [f"epochs={','.join(map(str, range(100)))}", f"seed={','.join(map(str, range(100)))}"],
        ["10,000", "1,000"],
    ),
    "the folder": (["workdir=a,b"], ["workdir", "its own folder"]),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_that_is_refused(capsys, name):
    words, expected = SWEEPS[name]
    assert main(["train", "quickstart", "--sweep", *words]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in expected), said


def test_a_mesh_larger_than_any_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 100)
    assert main(["train", "quickstart", "--data.path", "text.txt", "--mesh.data", "100000"]) == 2
    assert "'data': 100000" in capsys.readouterr().err.replace("100,000", "100000")

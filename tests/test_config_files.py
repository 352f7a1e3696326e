"""The error of a faulty config file is one sentence that names the file, the line and the remedy."""

from __future__ import annotations

import dataclasses

import pytest

from jaxlm.__main__ import main

HEAD = "from pathlib import Path\nfrom jaxlm import *\n\n\ndef config():\n    return "
# The content of the file, and the expected words of the message.
FILES = {
    "syntax": ("def config(:\n    pass\n", ["line 1", "correct the syntax"]),
    "indentation": ("def config():\nreturn 1\n", ["line 2", "correct the syntax"]),
    "not Python": (b"\x00\x01", ["correct"]),
    "not UTF-8": (b"x = 'na\xefve'\n", ["correct"]),
    "returns nothing": ("def config():\n    pass\n", ["config() returns None", "RunConfig"]),
    "returns a dict": ("def config():\n    return {'batch': 8}\n", ["returns {'batch': 8}", "RunConfig"]),
    "raises": ("def config():\n    raise KeyError('corpus')\n", ["line 2", "KeyError: 'corpus'", "correct the config"]),
    "raises in a library": (
        "import json\n\n\ndef config():\n    return json.loads('[')\n",
        ["line 5", "JSONDecodeError", "correct the config"],
    ),
    "raises on import": ("x = 1 / 0\n", ["line 1", "ZeroDivisionError", "correct"]),
    "imports a missing module": ("import no_such_thing\n", ["line 1", "no_such_thing", "install the module"]),
    "imports a wrong name": ("from jaxlm import RunConfg\n", ["line 1", "RunConfg", "correct the config"]),
    "raises several lines": ("raise ValueError('one\\n  two')\n", ["line 1", "ValueError: one two; correct"]),
    "raises an error without a text": (
        "class Odd(Exception):\n    def __str__(self):\n        raise TypeError\n\nraise Odd\n",
        ["line 5", "Odd; correct the config"],
    ),
    "raises UserError": ("from jaxlm import UserError\nraise UserError('give a corpus')\n", ["give a corpus"]),
    "a null byte": ("x = 1\0\n", ["null bytes", "correct the syntax"]),
    "exits": ("raise SystemExit(0)\n", ["line 1", "SystemExit", "correct"]),
    "never ends": ("def config():\n    return config()\n", ["line 2", "RecursionError"]),
    "a float": (f"{HEAD}RunConfig(data=DataConfig(path='x'), steps=1e3)\n", ["steps is 1000.0", "an integer"]),
    "a string": (f"{HEAD}RunConfig(data=DataConfig(path='x'), batch='8')\n", ["batch is '8'", "an integer"]),
    "None": (f"{HEAD}RunConfig(data=DataConfig(path=None))\n", ["data.path is None", "a string"]),
    "an unknown field": (f"{HEAD}RunConfig(bach=8)\n", ["line 6", "bach", "correct"]),
    "a part of another type": (f"{HEAD}RunConfig(data='x')\n", ["data is 'x'", "of type DataConfig"]),
    "a class for a task": (f"{HEAD}RunConfig(task=CausalLM)\n", ["task is <class", "CausalLM()"]),
    "a range": (f"{HEAD}RunConfig(seed=-1)\n", ["seed is -1", "at least 0"]),
    "a range of a task": (f"{HEAD}RunConfig(task=MaskedLM(mask_rate=2))\n", ["task.mask_rate is 2", "below 1"]),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verb", ["train", "plan", "inspect"])
def test_a_faulty_config_file_raises_one_clear_error(tmp_path, monkeypatch, capsys, verb, name):
    monkeypatch.chdir(tmp_path)
    content, expected = FILES[name]
    (tmp_path / "mine.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([verb, "mine.py"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "mine.py" in message, message
    assert all(word in message for word in expected), message


def test_a_pathlib_path_is_accepted(tmp_path, monkeypatch, capsys):
    """Users of Python often write paths of pathlib."""
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
    "model-name": "--init",
    "output-dir": "--workdir",
    "train-file": "--data.path",
    "gradient-accumulation-steps": "--accumulate",
    "rate": "--optimizer.rate",
    "fsdp": "--mesh.fsdp",
    "resume": "resumes the run",
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_flag_of_another_tool_suggests_that_of_jaxlm(capsys, name):
    for arguments in ([f"--{name}", "1"], [f"--{name}=1"]):
        assert main(["train", "quickstart", *arguments]) == 2
        message = capsys.readouterr().err
        assert f"there is no --{name.replace('_', '-')}" in message and OTHER_NAMES[name] in message


PRESETS = {
    "a near name": (["--model", "lstm-classifer"], ["not a preset", "'lstm-classifier'"]),
    "a hub name": (["--model=bert-base-uncased"], ["not a preset", "--init"]),
    "no value": (["--model", "--steps", "3"], ["--model has no value", "preset"]),
}


@pytest.mark.parametrize("verb", ["train", "plan", "baseline"])
@pytest.mark.parametrize("name", PRESETS)
def test_an_unknown_preset_raises_an_error(capsys, verb, name):
    arguments, expected = PRESETS[name]
    assert main([verb, "quickstart", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in expected), message


def test_a_preset_replaces_the_model_of_a_config():
    from pathlib import Path

    from jaxlm.families import PRESETS
    from jaxlm.verbs.arguments import read_run

    run = read_run("train", Path("trec"), [], ["--model", "gru-tagger", "--model.layers", "2", "--batch", "8"])
    assert run.model == dataclasses.replace(PRESETS["gru-tagger"], layers=2) and run.batch == 8


def test_every_suggested_flag_exists():
    from jaxlm.config import Classification, DataConfig, MaskedLM, RunConfig, Seq2Seq, Tagging, flags
    from jaxlm.verbs.files import FileArguments
    from jaxlm.verbs.generate import Generate

    runs = [RunConfig(data=DataConfig(), task=task()) for task in (Classification, MaskedLM, Seq2Seq, Tagging)]
    known = {name for config in (*runs, Generate(model=""), FileArguments()) for name in flags.names(config)}
    assert {name for names in flags._SUGGESTED.values() for name in names} <= known
    of_one_verb = {"output", "file", "model", "max-length", "early-stopping"}
    assert not flags._SUGGESTED.keys() & known - of_one_verb


def test_the_help_of_predict_requires_no_file(capsys):
    """The help shows the fields of the task. It omits the fields of the data that only training uses."""
    with pytest.raises(SystemExit) as exit_info:
        main(["predict", "--help"])
    output = capsys.readouterr().out
    assert exit_info.value.code == 0 and "--task.text" in output and "jaxlm predict RUN --help" in output
    assert "--data.format" in output and "--data.eval" not in output and "--data.path" not in output


INVALID_SWEEPS = {
    "too many": (
        [f"epochs={','.join(map(str, range(100)))}", f"seed={','.join(map(str, range(100)))}"],
        ["10,000", "1,000"],
    ),
    "the folder": (["workdir=a,b"], ["workdir", "its own folder"]),
}


@pytest.mark.parametrize("name", INVALID_SWEEPS)
def test_an_invalid_sweep_raises_an_error(capsys, name):
    arguments, expected = INVALID_SWEEPS[name]
    assert main(["train", "quickstart", "--sweep", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in expected), message


def test_a_mesh_larger_than_the_machine_raises_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 100)
    assert main(["train", "quickstart", "--data.path", "text.txt", "--mesh.data", "100000"]) == 2
    assert "'data': 100000" in capsys.readouterr().err.replace("100,000", "100000")

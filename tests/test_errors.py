"""A mistake of the user leads to exit code 2 and one message (value, limit, remedy), before anything is compiled."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import config as configs
from jaxlm.__main__ import main
from jaxlm.config import TaskConfig
from jaxlm.config.ranges import Config
from jaxlm.errors import UserError
from jaxlm.run.weights import check_fits

ROOT = Path(__file__).parent.parent

CONFIG = """
from pathlib import Path
from jaxlm import CausalLM, DataConfig, MaskedLM, ModelConfig, RunConfig, TokenizerConfig

HERE = Path(__file__).parent

def config():
    return RunConfig(
        model=ModelConfig(vocabulary=64, max_length=32, width=32, layers=2, heads=2{model}),
        task={task},
        data=DataConfig(path=str(HERE / "text.txt"), length=32, cache=str(HERE / "cache")),
        tokenizer=TokenizerConfig(train="characters"),
        batch=8, steps=2, sample_tokens=0,
        workdir=str(HERE / "run"),
    )
"""


@pytest.fixture
def cwd(tmp_path, monkeypatch) -> Path:
    """Returns a folder with a config, data of many kinds, and other files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.py").write_text(CONFIG.format(model="", task="CausalLM()"))
    encoder = ', structure="encoder", heads_on_top=("masked_lm",)'
    (tmp_path / "masked.py").write_text(CONFIG.format(model=encoder, task="MaskedLM()"))
    (tmp_path / "no_config.py").write_text("x = 1\n")
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 100)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "table.csv").write_text('words,label\n"to be",1\n')
    (tmp_path / "latin.txt").write_bytes(b"to be\nor not\nna\xefve\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text('{"run": {}, "data": ""}')
    return tmp_path


# The flags, and the words that the message must contain: the value, the limit and the remedy.
MISTAKES = {
    "missing config": (["tony.py"], ["no config tony.py", "perhaps you meant 'tiny.py'"]),
    "missing name": (["quikstart"], ["no config quikstart", "perhaps you meant 'quickstart'"]),
    "no config given": ([], ["train requires a config", "shakespeare_char"]),
    "config without config()": (["no_config.py"], ["no_config.py", "config()", "RunConfig"]),
    "missing data": (["tiny.py", "--data.path", "test.txt"], ["'test.txt'", "perhaps you meant 'text.txt'"]),
    "no data": (["tiny.py", "--data.path", ""], ["data.path is empty", "--data.path"]),
    "empty data": (["tiny.py", "--data.path", "empty.txt"], ["empty.txt", "no document"]),
    "no such column": (["tiny.py", "--data.path", "table.csv"], ["'text'", "'words', 'label'", "--data.text"]),
    "not UTF-8": (["tiny.py", "--data.path", "latin.txt"], ["latin.txt:3", "UTF-8", "--data.cleaning.encoding"]),
    "unknown data set": (["tiny.py", "--data.path", "tfds:imbd_reviews"], ["'imbd_reviews'", "'imdb_reviews'"]),
    "heads": (["tiny.py", "--model.heads", "3"], ["heads is 3", "width 32", "choose heads from 1, 2, 4"]),
    "length": (["tiny.py", "--data.length", "64"], ["length is 64", "32 positions", "--data.length"]),
    "accumulate": (["tiny.py", "--accumulate", "3"], ["accumulate is 3", "batch 8", "choose accumulate from 1, 2, 4"]),
    "dropout": (["tiny.py", "--model.dropout", "1"], ["dropout is 1.0", "at least 0 and below 1"]),
    "steps": (["tiny.py", "--steps", "0"], ["steps is 0", "at least 1"]),
    "mesh and batch": (["tiny.py", "--batch", "12", "--mesh.data", "8"], ["batch 12", "'data': 8", "--batch 8 or 16"]),
    "mesh and devices": (["tiny.py", "--mesh.data", "3"], ["'data': 3", "8 devices"]),
    "mesh sizes": (["tiny.py", "--mesh.fsdp", "-1"], ["'data': -1, 'fsdp': -1", "at most one"]),
    "mesh and width": (
        ["tiny.py", "--mesh.data", "1", "--mesh.fsdp", "8", "--model.width", "36"],
        ["width 36", "8 ways", "32, 40"],
    ),
    "vocabulary": (["tiny.py", "--model.vocabulary", "8"], ["8", "vocabulary"]),
    "no [MASK]": (["masked.py"], ["mask", "wordpiece"]),
    "foreign folder": (["tiny.py", "--workdir", "foreign"], ["foreign", "contains no run", "--workdir"]),
    "model as folder": (["tiny.py", "--workdir", "model"], ["model", "contains no run", "--workdir"]),
    "file as folder": (["tiny.py", "--workdir", "text.txt"], ["text.txt", "--workdir"]),
    "missing init": (["tiny.py", "--init", "gone"], ["gone is not a folder"]),
    "init without a model": (["tiny.py", "--init", "foreign"], ["foreign", "config.json"]),
    "init without an export": (["tiny.py", "--init", "unfinished"], ["unfinished", "no export"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_run_is_one_error(cwd, capsys, monkeypatch, name):
    arguments, words = MISTAKES[name]
    import jax

    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("something is compiled"))
    assert main(["train", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    assert len(re.findall(r"^error: ", printed.err, re.MULTILINE)) == 1
    message = printed.err[printed.err.index("error: ") :]
    assert all(word in message for word in words), message
    assert not (cwd / "run" / "config.json").exists()


# tyro prints these messages in a frame.
USAGE = {
    "unknown field": (["tiny.py", "--model.widht", "32"], ["--model.widht", "--model.width"]),
    "unknown choice": (["tiny.py", "--optimizer.name", "adam"], ["adam", "adamw"]),
    "wrong type": (["tiny.py", "--steps", "many"], ["many", "--steps"]),
    "no value": (["tiny.py", "--steps"], ["--steps"]),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_mistake_in_the_command_is_reported(cwd, capsys, name):
    arguments, words = USAGE[name]
    with pytest.raises(SystemExit) as error:
        main(["train", *arguments])
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in words), printed


VERBS = {
    "unknown verb": (["trian"], ["'trian'", "'train'"]),
    "no folder": (["generate", "gone"], ["gone is not a folder"]),
    "no model": (["generate", "foreign"], ["foreign", "config.json"]),
    "no export": (["generate", "unfinished"], ["unfinished", "no export yet"]),
    "inspect a missing folder": (["inspect", "gone"], ["gone is not a folder"]),
    "inspect a folder without a model": (["inspect", "foreign"], ["foreign", "config.json"]),
    "inspect a config": (["inspect", "tony.py"], ["no config tony.py", "'tiny.py'"]),
    "convert a missing folder": (["convert", "gone", "new"], ["gone is not a folder"]),
    "convert into a folder with files": (
        ["convert", "model", "foreign"],
        ["foreign exists and is not empty", "set overwrite"],
    ),
    "shards of zero bytes": (["convert", "model", "new", "--shard-gb", "0"], ["shard_gb is 0.0", "above 0"]),
    "no weights": (["convert", "model", "new"], ["model has no weights", "model.safetensors"]),
    "pickled weights": (["inspect", "pickled"], ["only pickled weights (pytorch_model.bin)", "save_pretrained"]),
}


@pytest.mark.parametrize("name", VERBS)
def test_a_mistake_in_a_verb_is_one_error(cwd, capsys, name):
    arguments, words = VERBS[name]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert len(re.findall(r"^error: ", printed, re.MULTILINE)) == 1 and all(word in printed for word in words), printed


def test_weights_that_do_not_fit_are_listed():
    with pytest.raises(UserError, match=r"- encoder/norm \(4,\)\n  \+ mlp \(2,\)\nchange --model"):
        check_fits({"encoder/norm": (4,)}, {"mlp": (2,)})


@pytest.mark.long
def test_weights_that_do_not_fit_are_refused_and_a_corrected_command_succeeds(cwd, capsys, devices, no_plots):
    """The message shows both shapes. The corrected command can use the folder of the refused one."""
    assert main(["train", "tiny.py"]) == 0
    capsys.readouterr()
    other = ["train", "tiny.py", "--workdir", "other", "--init", "run"]
    assert main([*other, "--model.width", "16"]) == 2
    printed = capsys.readouterr().err
    assert "do not fit" in printed and re.search(
        r"- embeddings/tokens \(64, 32\)\n  \+ embeddings/tokens \(64, 16\)", printed
    )
    assert main([*other, "--data.path", "empty.txt"]) == 2
    assert main([*other, "--steps", "1"]) == 0
    assert "in other" in capsys.readouterr().err
    assert main(["train", "tiny.py", "--seed", "1"]) == 2  # the folder of another run
    assert re.search(r"seed: 1 \| 0\nchoose another --workdir", capsys.readouterr().err)


def test_help_explains_every_field():
    command = [sys.executable, "train.py", "configs/quickstart.py", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=None)
    assert result.returncode == 0
    text = re.sub(r"[│╭╮╰╯─]", "", result.stdout)
    options = re.split(r"\n\s*(?=--|-h)", text)[1:]
    explanations = {}
    for option in options:
        name = re.match(r"--[\w.-]+", option)
        if name:
            body = option.split("\n", 1)[1] if "\n" in option else ""
            explanations[name[0]] = re.sub(r"\(default:.*", "", body, flags=re.DOTALL).strip()
    assert len(explanations) > 70
    assert [name for name, words in explanations.items() if len(words) < 4] == []


KINDS = [
    k for k in vars(configs).values() if isinstance(k, type) and issubclass(k, Config) and k not in (Config, TaskConfig)
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_comment(kind):
    """tyro prints the comment of a field as its help, also for classes that the quickstart does not use."""
    bases = [base for base in kind.__mro__ if dataclasses.is_dataclass(base)]
    body = "\n".join(map(inspect.getsource, bases))  # tyro also reads the comments of inherited fields
    for field in dataclasses.fields(kind):
        if not dataclasses.is_dataclass(field.default_factory) and field.name != "task":
            assert re.search(rf"^    {field.name}: .*  # \S", body, re.MULTILINE), field.name

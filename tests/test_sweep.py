"""Sweeps, runs of several tasks, and a user-defined task."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import (
    Classification,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    Tagging,
    TokenizerConfig,
    UserError,
)
from jaxlm.__main__ import main
from jaxlm.config import MultiTask, Part, from_json, to_json
from jaxlm.data import source
from jaxlm.nn.transformer import init
from jaxlm.run.sweep import Trial, best_of, combinations, folder_of, single_runs, table
from jaxlm.tasks import make_task, prepare

PAGE = (Path(__file__).parent.parent / "docs" / "your_task.md").read_text()
MODEL = ModelConfig(
    structure="encoder", heads_on_top=(), vocabulary=47, max_length=32, width=16, layers=2, heads=2, types=2,
    norm_place="post", embedding_norm=True, initial_std=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns a folder with a table of texts, a file of tagged words, a tokenizer, and a config that uses the table."""
    folder = tmp_path_factory.mktemp("tables")
    random = np.random.default_rng(0)
    words = ["good", "bad", "film", "plot", "rome", "oslo", "in", "a"]
    texts = [" ".join(random.choice(words, random.integers(2, 7))) for _ in range(60)]
    rows = [{"text": t, "label": "yes" if "good" in t else "no", "stars": 5 if "good" in t else 1} for t in texts]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tags = {"rome": "B-place", "oslo": "B-place"}
    lines = ["".join(f"{w} {tags.get(w, 'O')}\n" for w in text.split()) for text in texts]
    (folder / "names.conll").write_text("\n".join(lines))
    jaxlm.data.tokenizers.tokenizer.train(texts, TokenizerConfig(train="wordpiece"), 47).save(folder / "tokenizer")
    (folder / "tiny.py").write_text(
        f"from jaxlm import *\nfrom dataclasses import replace\n"
        f"def config():\n    return RunConfig(model={MODEL!r}, task=Classification(), examples=8, epochs=1,\n"
        f"        data=DataConfig(path={str(folder / 'texts.jsonl')!r}, length=32), log_every=2,\n"
        f"        tokenizer=TokenizerConfig(path={str(folder / 'tokenizer')!r}), workdir={str(folder / 'run')!r})\n"
    )
    return folder


def test_a_sweep_has_every_combination_of_values():
    assert combinations([]) == [{}]
    assert combinations(["a.b=1,2", "seed=0,1"]) == [
        {"a.b": "1", "seed": "0"}, {"a.b": "1", "seed": "1"}, {"a.b": "2", "seed": "0"}, {"a.b": "2", "seed": "1"},
    ]  # fmt: skip


TRIALS = [
    Trial({"rate": "1", "seed": "0"}, "a", {"step": 5, "loss": 1.0, "accuracy": 0.5, "f1/yes": 0.1}),
    Trial({"rate": "1", "seed": "1"}, "b", {"step": 5, "loss": 2.0, "accuracy": 0.7}),
    Trial({"rate": "2", "seed": "0"}, "c", {"step": 5, "loss": 3.0, "accuracy": 0.9}),
    Trial({"rate": "2", "seed": "1"}, "d", {}, "the loss is nan"),
]


def cells(markdown: str) -> list[list[str]]:
    """Returns the cells of a table, without the line below its head."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in markdown.splitlines()]
    assert all(set(cell) == {"-"} for cell in lines.pop(1))
    return lines


def test_the_table_has_means_and_standard_deviations_over_seeds_best_first():
    assert cells(table(TRIALS, "accuracy")) == [
        ["fields", "runs", "accuracy", "loss"],
        ["rate=2", "2, 1 failed", "0.9000", "3.0000"],
        ["rate=1", "2", "0.6000 ± 0.1414", "1.5000 ± 0.7071"],
    ]
    assert cells(table(TRIALS, "loss"))[1][0] == "rate=1"
    assert len({len(line) for line in table(TRIALS, "accuracy").splitlines()}) == 1  # columns are aligned


def test_single_runs_have_a_table_and_the_best_run_of_the_best_fields_is_found():
    assert cells(single_runs(TRIALS, "accuracy")) == [
        ["run", "step", "accuracy", "loss"],
        ["c", "5", "0.9000", "3.0000"],
        ["b", "5", "0.7000", "2.0000"],
        ["a", "5", "0.5000", "1.0000"],
        ["d", "failed", "–", "–"],
    ]
    assert best_of(TRIALS, "accuracy").folder == "c"
    assert best_of(TRIALS, "loss").folder == "a"
    assert best_of(TRIALS[3:], "loss") is None


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"optimizer.rate": "2e-5", "seed": "0"}, r"optimizer\.rate-2e-5_seed-0"),
        ({"init": "/models/my bert", "task.label": "Größe=1"}, r"init-_models_my_bert_task\.label-Gr_e_1_[0-9a-f]{8}"),
        ({"data.path": "x" * 500}, r"data\.path-x+_[0-9a-f]{8}"),
        ({"optimizer.final": "-1"}, r"optimizer\.final--1"),
    ],
)
def test_the_name_of_a_folder_requires_no_quotes(fields, name):
    assert re.fullmatch(name, folder_of(fields)) and len(folder_of(fields)) < 200
    others = [{key: f"{value}{end}" for key, value in fields.items()} for end in (" ", "=", "/", "ä")]
    assert len({folder_of(values) for values in (fields, *others)}) == 5


@pytest.mark.long
def test_a_sweep_writes_one_table_and_resumes(folder, capsys):
    command = ["train", str(folder / "tiny.py"), "--sweep", "optimizer.rate=1e-3,1e14", "seed=0,1"]
    assert main(command) == 0
    printed = capsys.readouterr()
    lines = (folder / "run" / "sweep.md").read_text().splitlines()
    assert re.match(r"\| optimizer.rate=1e-3 +\| 2 ", lines[2]) and "2 failed" in lines[3]
    assert lines[5].startswith("| run ") and len(lines) == 11  # the file ends with a table of single runs
    assert lines[2] in printed.out and lines[7] in printed.out
    assert "the loss is" in printed.out or "not finite" in printed.out
    folders = sorted(path.name for path in (folder / "run").iterdir() if path.is_dir())
    assert len(folders) == 4 and "optimizer.rate-1e-3_seed-0" in folders
    assert not any((folder / "run" / name / "checkpoints").exists() for name in folders if "1e-3" in name)
    # The output has one summary, that of the best run, and the command that trains it alone.
    assert (printed.out + printed.err).count("held-out accuracy") == 1
    command_alone = printed.out.splitlines()[-1].split()
    assert command_alone[-2].startswith("--seed=") and command_alone[-1] == f"--workdir={folder / 'run'}-best"
    assert command_alone[-3] == "--optimizer.rate=1e-3" and str(folder / "tiny.py") in command_alone
    assert main(["train", str(folder / "tiny.py"), "--sweep", "optimizer.rate=1e-3", "seed=0,1"]) == 0
    assert capsys.readouterr().err.count("nothing is left to do") == 2


MISTAKES = {
    "no fields": ([], "--sweep has no fields"),
    "no value": (["seed"], "--sweep has 'seed'; give FIELD=VALUE,VALUE"),
    "an empty value": (["seed=0,,1"], "give FIELD=VALUE,VALUE"),
    "a duplicate field": (["seed=0", "seed=1"], "has 'seed' twice"),
    "a duplicate value": (["seed=0,1,0"], "has seed=0 twice"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_sweep_are_reported(folder, name, capsys):
    words, message = MISTAKES[name]
    assert main(["train", str(folder / "tiny.py"), "--sweep", *words]) == 2
    assert message in capsys.readouterr().err


def two_tasks(folder: Path, **weights: float) -> RunConfig:
    parts = {  # the first part is not the first by name
        "names": Part(Tagging(), DataConfig(path=str(folder / "names.conll")), weights.get("names", 0.0)),
        "mood": Part(Classification(), DataConfig(path=str(folder / "texts.jsonl")), weights.get("mood", 0.0)),
    }
    return RunConfig(
        model=MODEL, task=MultiTask(parts), data=DataConfig(length=32), batch=8, steps=60, log_every=20,
        tokenizer=TokenizerConfig(path=str(folder / "tokenizer")), optimizer=OptimizerConfig(rate=1e-2),
    )  # fmt: skip


def build_task(run: RunConfig):
    prepared = prepare(run, None, lambda _: None)
    task = make_task(run, prepared.tokenizer, prepared.labels)
    return task, prepared, task.batches(prepared.train, run.batch, run.data.length, run.seed)


def test_rows_are_mixed_by_weight_and_are_a_function_of_the_step(folder):
    run = two_tasks(folder, mood=3.0, names=1.0)
    task, prepared, batches = build_task(run)
    mood = sum((batches.batch_at(n)["mood.weights_BE"].sum(1) > 0).sum() for n in range(100))
    assert mood == pytest.approx(600, abs=15)
    again = build_task(run)[2]
    for step in (37, 3, 250):
        for name, value in again.batch_at(step).items():
            np.testing.assert_array_equal(value, batches.batch_at(step)[name])
    # The rows of each task are the same, in the same order, as in a run of that task only.
    alone = task.parts["mood"].batches(prepared.train["mood"], 1, run.data.length, run.seed)
    rows = [row for n in range(10) for row in zip(*[batches.batch_at(n)[f] for f in ("tokens_BT", "mood.weights_BE")])]
    mood_tokens = [tokens for tokens, weights in rows if weights.any()]
    for n, tokens in enumerate(mood_tokens):
        np.testing.assert_array_equal(tokens, alone.batch_at(n)["tokens_BT"][0])


def test_each_head_learns_only_from_its_own_examples(folder):
    run = two_tasks(folder)
    task, _, batches = build_task(run)
    module = task.module(jaxlm.nn.transformer.Transformer)(task.configure(MODEL))
    params = jax.jit(partial(init, module))(jax.random.key(0))
    batch = {name: np.asarray(value) for name, value in batches.batch_at(0).items()}
    assert batch["mood.weights_BE"].any() and batch["names.weights_BT"].any()
    loss = lambda params, name: task.losses(module, params, batch, None)[0][f"{name}/loss"][0]
    for name, other in (("mood", "names"), ("names", "mood")):
        grads = jax.jit(jax.grad(loss), static_argnums=1)(params, name)
        size = lambda head, grads=grads: sum(abs(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(grads[head]))
        assert size(f"own_{name}") > 0
        assert size(f"own_{other}") == 0


@pytest.mark.long
@pytest.mark.usefixtures("devices", "no_plots")
def test_several_tasks_train_export_and_predict(folder, tmp_path):
    run = replace(two_tasks(folder), workdir=str(tmp_path / "run"))
    assert from_json(RunConfig, to_json(run)) == run
    lm = jaxlm.fit(run)
    assert lm.config.heads_on_top == ("tokens",)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert {"mean", "loss", "mood/accuracy", "names/f1", "names/accuracy"} <= scores.keys()
    assert scores["mood/accuracy"] > 0.6
    mood, names = (jaxlm.load(tmp_path / "run" / "export" / name) for name in ("mood", "names"))
    assert (mood.config.labels, names.config.labels) == (("no", "yes"), ("O", "B-place", "I-place"))
    assert names.origin.config["architectures"] == ["BertForTokenClassification"]
    rows = list(source.rows(str(folder / "texts.jsonl"), DataConfig(), ""))
    assert jaxlm.evaluate(mood, rows, Classification())["accuracy"] > 0.6
    assert len(jaxlm.predict(names, ["good film in rome"])[0]["prediction"]) == 4
    assert (
        jaxlm.fit(run).config.labels == lm.config.labels
    )  # a finished run returns the first part again, not the first by name


WRONG = {
    "an invalid name": (lambda parts: {"Mood!": parts["mood"]}, "names consist of lower-case letters"),
    "a language model": (
        lambda parts: {"a": Part(jaxlm.CausalLM(), DataConfig(path="x"))},
        "parts are tasks with labels",
    ),
    "no path": (lambda parts: {"a": Part(Tagging(), DataConfig())}, "data.path of the part 'a' is empty"),
    "some weights": (
        lambda parts: parts | {"a": replace(parts["mood"], weight=2.0)},
        "give every part a weight, or none",
    ),
    "a missing column": (
        lambda parts: parts | {"mood": replace(parts["mood"], task=Classification(text=("spam",)))},
        r"mood: .*texts.jsonl:1: there is no column 'spam'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_in_several_tasks_are_reported(folder, tmp_path, name):
    change, message = WRONG[name]
    run = replace(two_tasks(folder), workdir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=message):
        jaxlm.fit(replace(run, task=MultiTask(change(run.task.parts))))


@pytest.mark.long
def test_a_user_defined_task_requires_one_file_and_one_config(folder, tmp_path, monkeypatch, capsys):
    """The example in docs/your_task.md, unchanged, with a tiny model instead of pretrained weights."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    [task] = [block for block in blocks if "class StarsTask" in block]
    [config] = [block for block in blocks if "task=Stars()" in block]
    (tmp_path / "stars.py").write_text(task)
    config = config.replace("model=None", f"model={MODEL!r}").replace(
        "from jaxlm import", "from jaxlm import ModelConfig,"
    )
    (tmp_path / "config.py").write_text(config)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    train = [
        "train",
        "config.py",
        "--data.path",
        str(folder / "texts.jsonl"),
        "--workdir",
        "run",
        "--data.length",
        "32",
    ]
    train += ["--tokenizer.path", str(folder / "tokenizer"), "--optimizer.rate", "1e-2", "--epochs", "20"]
    assert main(train) == 0
    assert json.loads(Path("run/scores.json").read_text())["accuracy"] > 0.5
    capsys.readouterr()
    predict = ["predict", "run", str(folder / "texts.jsonl"), "--output", "predictions.jsonl"]
    assert main([*predict, "--config", "config.py"]) == 0
    predictions = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 60 and {row["prediction"] for row in predictions} <= {1, 2, 3, 4, 5}
    jaxlm.config.TASK_CONFIGS.pop("Stars")
    assert main(predict) == 2
    assert "the task is Stars, which is not a built-in task; give its config with --config" in capsys.readouterr().err
    sys.modules.pop("stars")


@pytest.mark.long
@pytest.mark.usefixtures("devices", "no_plots")
def test_a_run_with_a_model_requires_no_model_config(folder, tmp_path):
    """`fit(run, model=lm)` uses the head and the labels of the task, and the dropout of the run."""
    params = init(jaxlm.nn.transformer.Transformer(MODEL), jax.random.key(0))
    tokenizer = jaxlm.data.tokenizers.tokenizer.load(folder / "tokenizer")
    lm = jaxlm.LM(MODEL, jaxlm.nn.transformer.Transformer(MODEL), params, tokenizer)
    run = RunConfig(
        model=None, task=Classification(), data=DataConfig(path=str(folder / "texts.jsonl"), length=32), batch=8,
        steps=2, dropout=0.25, workdir=str(tmp_path / "run"),
    )  # fmt: skip
    tuned = jaxlm.fit(run, model=lm)
    assert (tuned.config.heads_on_top, tuned.config.labels) == (("classes",), ("no", "yes"))
    assert (tuned.config.dropout, tuned.config.attention_dropout) == (0.25, 0.25)
    with pytest.raises(UserError, match=r"the config defines the model; set --model\.dropout instead"):
        replace(run, model=MODEL).check()

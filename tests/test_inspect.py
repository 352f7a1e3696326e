"""The output of `inspect`, and the files that `convert` writes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import LM, families
from jaxlm.__main__ import main
from jaxlm.config import RunConfig, to_json
from jaxlm.families import PRESETS
from jaxlm.hub import safetensors
from jaxlm.nn.transformer import Transformer, count_parameters
from jaxlm.planning import inspect

SMALL = {"vocabulary": 48, "max_length": 16, "width": 16, "layers": 2, "heads": 2, "mlp_width": 24}
MODEL = dataclasses.replace(PRESETS["distilbert-base"], **SMALL)


@pytest.fixture
def folder(tmp_path):
    jaxlm.save(LM(MODEL, Transformer(MODEL), random_params(MODEL)), tmp_path / "model")
    return tmp_path / "model"


def test_every_parameter_has_a_line(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("distilbert (DistilBertForMaskedLM): encoder, 2 layers of width 16, 2 heads of 8")
    line = next(line for line in output.splitlines() if line.startswith("encoder/layers/attention/query/kernel"))
    assert line.split("  ")[1:] and "2 x 16 x 2 x 8" in line and "layers, width, heads, head_width" in line
    assert line.endswith("distilbert.transformer.layer.{i}.attention.q_lin.weight")
    assert f"{count_parameters(MODEL):,} parameters" in output
    assert (
        len(inspect.rows_of_folder(families.open_folder(folder))) == output.count("float32") - 1
    )  # the last occurrence is in the totals


def test_a_randomly_initialised_head_is_reported(folder, capsys):
    assert main(["inspect", str(folder), "--head", "tokens"]) == 0
    output = capsys.readouterr().out
    assert "heads on top: tokens" in output
    assert next(line for line in output.splitlines() if "tokens_head/out/bias" in line).endswith(
        "(randomly initialised)"
    )


def test_presets_configs_and_runs_without_an_export_are_described(tmp_path, capsys):
    assert main(["inspect", "gpt2-xl"]) == 0
    assert "1,557,611,200 parameters" in capsys.readouterr().out
    run = RunConfig(model=MODEL)
    (tmp_path / "config.json").write_text(json.dumps({"run": to_json(run), "data": ""}))
    (tmp_path / "mine.py").write_text("import jaxlm\ndef config():\n    return jaxlm.RunConfig()\n")
    for target, start in ((tmp_path, "distilbert (Distil"), (tmp_path / "mine.py", "gpt2 (GPT2LMHeadModel)")):
        assert main(["inspect", str(target)]) == 0
        assert capsys.readouterr().out.startswith(start)


def test_convert_changes_dtype_head_and_shards(folder, tmp_path, capsys):
    new = tmp_path / "new"
    assert main(["convert", str(folder), str(new), "--dtype", "bfloat16", "--shard-gb", "0.000005"]) == 0
    assert capsys.readouterr().out == f"{new}: distilbert format\n"
    assert len(list(new.glob("model-*.safetensors"))) > 1
    old, stored = safetensors.read(folder), safetensors.read(new)
    assert {tensor.dtype.name for tensor in stored.values()} == {"bfloat16"}
    for name, tensor in stored.items():
        np.testing.assert_allclose(np.asarray(tensor, np.float32), old[name], rtol=1e-2)
    assert main(["convert", str(folder), str(new)]) == 2
    assert "set overwrite" in capsys.readouterr().err
    assert main(["convert", str(folder), str(new), "--head", "none", "--overwrite"]) == 0
    assert json.loads((new / "config.json").read_text())["architectures"] == ["DistilBertModel"]
    assert "embeddings.word_embeddings.weight" in safetensors.read(new)


def test_the_sharding_of_parameters_is_printed_as_a_table():
    mesh = {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    table = inspect.sharding_table(MODEL, mesh)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["encoder/layers/attention/query/kernel"] == ["2 x 16 x 2 x 8", "-, fsdp, tensor, -", "256"]
    output = inspect.describe_config(MODEL, mesh)
    assert all(" ".join(row[-1:]) in output for row in table.rows) and "on each of 8 devices" in table.note

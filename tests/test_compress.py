"""`jaxlm compress`: every variant is written, loads, and has a line in the table."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params
from test_quantized_files import BERT, LLAMA

import jaxlm
from jaxlm import TokenizerConfig
from jaxlm.__main__ import main
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.lm import LM
from jaxlm.nn.transformer import Transformer

TEXT = "the quick brown fox jumps over the lazy dog\n\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    tokenizer = tokenizers.train([TEXT] * 4, TokenizerConfig(train="characters"), 48)
    lm = LM(LLAMA, Transformer(LLAMA), jax.tree.map(jnp.asarray, random_params(LLAMA)), tokenizer)
    jaxlm.save(lm, folder)
    (folder.parent / "text.txt").write_text(TEXT * 10)
    return folder


@pytest.mark.long
def test_every_variant_is_written_and_measured(model, tmp_path, capsys):
    text, out = str(model.parent / "text.txt"), tmp_path / "out"
    arguments = ["--weights", "int8", "int4", "--group", "16", "--method", "gptq", "--calibration", text]
    assert main(["compress", str(model), str(out), *arguments, "--evaluate", text, "--embeddings"]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:5] == ["model", "files (MB)", "memory (MB)", "tokens/s", "perplexity"]
    assert [line[0] for line in lines[2:]] == ["original", "int8", "int4"]
    files, memory, perplexity = (np.array([float(line[n]) for line in lines[2:]]) for n in (1, 2, 4))
    assert files[0] > files[1] > files[2] and memory[0] > 2 * memory[1]
    assert abs(perplexity[1] / perplexity[0] - 1) < 0.05
    assert (out / "compress.md").read_text().startswith("| model") and (out / "compress.png").exists()
    for name, bits in {"int8": 8, "int4": 4}.items():
        config = json.loads((out / name / "config.json").read_text())["quantization_config"]
        assert config["config_groups"]["group_0"]["weights"]["num_bits"] == bits
        assert jaxlm.generate(jaxlm.load(out / name), ["the"], max_new_tokens=3, temperature=0)


def test_inputs_are_rounded_with_calibrated_scales(model, tmp_path):
    text, out = str(model.parent / "text.txt"), tmp_path / "out"
    arguments = ["--weights", "int8", "--inputs", "int8_static", "--calibration", text]
    assert main(["compress", str(model), str(out), *arguments]) == 0
    up = jaxlm.load(out).params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert up.input_format == "int8" and up.input_scale.shape == (2,) and (np.asarray(up.input_scale) > 0).all()


def test_one_variant_is_written_to_the_folder_itself(tmp_path, capsys):
    lm = LM(BERT, Transformer(BERT), jax.tree.map(jnp.asarray, random_params(BERT)))
    jaxlm.save(lm, tmp_path / "bert")
    assert main(["compress", str(tmp_path / "bert"), str(tmp_path / "out"), "--weights", "int8"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    jaxlm.load(tmp_path / "out")


def test_a_variant_may_be_smaller_and_pruned(model, tmp_path):
    text, out = str(model.parent / "text.txt"), tmp_path / "out"
    arguments = ["--layers", "1", "--mlp", "16", "--pattern", "2:4", "--pruning", "wanda", "--calibration", text]
    assert main(["compress", str(model), str(out), *arguments, "--weights", "float", "int8"]) == 0
    for name in ("float", "int8"):
        lm = jaxlm.load(out / name)
        assert (lm.config.layers, lm.config.F) == (1, 16)
        up = jaxlm.merge(lm, dequantize=True).params["decoder"]["layers"]["mlp"]["up"]["kernel"]
        zeros = (np.asarray(up).reshape(1, -1, 4, 16) == 0).sum(2)
        assert (zeros >= 2).all() and zeros.mean() < 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has no variants; give formats with --weights"),
        (["--weights", "int8", "--pruning", "wanda"], "nothing is pruned; set --sparsity or --pattern"),
        (["--sparsity", "0.5", "--method", "gptq"], "nothing is quantised; set --weights"),
        (["--weights", "int8", "int8"], "variant int8 is given twice"),
        (["--weights", "int4", "--group", "5"], "group is 5, which does not divide"),
        (["--weights", "int4", "--targets", "querry"], "no projection matches 'querry'; known: all"),
        (["--weights", "int4", "--method", "gptq"], "requires calibration data"),
        (["--weights", "int8", "--inputs", "int8_static"], "give a file of texts with --calibration"),
        (["--weights", "float", "--sparsity", "0.5", "--inputs", "int8_static"], "nothing is quantised"),
        (["--weights", "int8", "nf4", "--inputs", "int8_static", "--calibration", "TEXT"], "integer weights, not nf4"),
        (["--weights", "fp8", "--inputs", "int8"], "integer weights, not fp8"),
        (["--weights", "int8", "--inputs", "int8_static", "--calibration", "EMPTY"], "contains no documents"),
        (["--weights", "int8", "--inputs", "int8_static", "--calibration", "SHORT"], "requires at least 128"),
        (["--weights", "int4", "--method", "gptq", "--calibration", "none.txt"], "none.txt"),
        (["--weights", "int4", "--calibration", "TEXT"], "nothing uses it"),
        (["--weights", "nf4", "--no-symmetric"], "nf4 has no zero points"),
        (["--weights", "int8", "--evaluate", "none.txt"], "none.txt"),
        (["--weights", "int4", "--method", "gptq", "--calibration", "EMPTY"], "empty.txt contains no documents"),
    ],
)
def test_mistakes_end_before_anything_is_written(arguments, message, model, tmp_path, capsys):
    (model.parent / "empty.txt").write_text("\n\n")
    (model.parent / "short.txt").write_text("the fox")
    names = {"TEXT": "text.txt", "EMPTY": "empty.txt", "SHORT": "short.txt"}
    arguments = [str(model.parent / names[word]) if word in names else word for word in arguments]
    assert main(["compress", str(model), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_overwritten(model, capsys):
    assert main(["compress", str(model), str(model), "--weights", "int8"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["compress", str(model)]) == 2
    assert "requires a model and a folder" in capsys.readouterr().err

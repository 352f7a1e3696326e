"""Compares tiny models of every family and head with the stored outputs of transformers in goldens/."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxlm
from jaxlm.hub import safetensors

GOLDENS = Path(__file__).parent / "goldens" / "families.npz"
T = 9


def draw_tensor(name: str, shape: list[int]) -> np.ndarray:
    """Returns a tensor that depends only on its name and is equal on every machine."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return (0.3 * random.standard_normal(shape)).astype(np.float32)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, list[int]]) -> None:
    """Writes a folder in the format of Hugging Face."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.write({name: draw_tensor(name, shape) for name, shape in tensors.items()}, folder / safetensors.WEIGHTS)


def inputs(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns two rows, and the inputs of the decoder of an encoder-decoder. The second row is padded."""
    random = np.random.RandomState(0)
    mask = (np.arange(T) < np.array([[T], [5]])).astype(np.int64)
    if config.get("summary_type") == "last":  # XLNet's classifier in transformers reads the last position
        mask = np.ascontiguousarray(mask[:, ::-1])
    padding, end = config.get("pad_token_id") or 0, config.get("eos_token_id")
    tokens = random.randint(6, config["vocab_size"], (2, T))
    if config.get("is_encoder_decoder"):
        tokens[[0, 1], [T - 1, 4]] = end
    if config["architectures"] == ["LongformerForQuestionAnswering"]:  # transformers requires three separators
        tokens[[[0], [1]], [[2, 3, T - 1], [1, 2, 4]]] = config["sep_token_id"]
    arrays = {"tokens_BT": np.where(mask, tokens, padding), "mask_BT": mask}
    classes = "ForSequenceClassification" in config["architectures"][0]
    if config.get("is_encoder_decoder") and not classes and "Encoder" not in config["architectures"][0]:
        arrays["target_tokens_BT"] = random.randint(6, config["vocab_size"], (2, 7))
    return arrays


@cache
def goldens() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(GOLDENS) as arrays:
        return json.loads(arrays["models"].tobytes()), {name: arrays[name] for name in arrays.files if "/" in name}


FAST = ("bert", "deberta-v2", "modernbert", "gpt2", "llama", "gemma2", "t5", "bart")


def cases() -> list[Any]:
    """Returns the classes of transformers. All except the first classes of some families have the mark `long`."""
    models = goldens()[0] if GOLDENS.exists() else {}
    first = {model["config"]["model_type"]: name for name, model in reversed(models.items())}
    fast = {first.get(name) for name in FAST}
    return [pytest.param(name, marks=() if name in fast else pytest.mark.long) for name in models]


@pytest.mark.parametrize("name", cases())
def test_outputs_equal_those_of_transformers(tmp_path, name):
    models, arrays = goldens()
    write(tmp_path / "model", **models[name])
    lm = jaxlm.load(tmp_path / "model")
    model_inputs = inputs(models[name]["config"])
    if lm.config.structure != "encoder_decoder":
        model_inputs.pop("target_tokens_BT", None)
    out = lm(**model_inputs)
    is_token = model_inputs["mask_BT"] > 0
    found = {"last_hidden_state": out.hidden_BTD, "logits": out.logits, "prediction_logits": out.logits}
    if lm.config.heads_on_top == ("span",):
        found |= {"start_logits": out.logits[..., 0], "end_logits": out.logits[..., 1]}
    compared = 0
    for output, array in found.items():
        expected = arrays.get(f"{name}/{output}")
        if expected is None:
            continue
        array, rows = np.asarray(array), is_token if expected.shape[:2] == is_token.shape else np.s_[:]
        np.testing.assert_allclose(array[rows], expected[rows], atol=1e-4, rtol=1e-4, err_msg=output)
        compared += 1
    assert compared


def test_every_family_has_a_stored_output():
    from jaxlm.families import FAMILIES

    stored = {model["config"]["model_type"] for model in goldens()[0].values()}
    assert stored == set(FAMILIES) - {"new"}  # the original code of GTE is not part of transformers

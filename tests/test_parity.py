"""The same numbers as transformers, both ways, for random models of odd shapes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.families import PRESETS, load, save
from jaxlm.hub import safetensors
from jaxlm.nn.transformer import Transformer, init

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

ODD = {"vocabulary": 31, "max_length": 16, "width": 24, "layers": 2, "heads": 3}
SHAPES = {
    "odd": ODD,
    "one layer": ODD | {"layers": 1, "heads": 1, "mlp_width": 10},
    "relu": ODD | {"activation": "relu", "norm_epsilon": 1e-3},
    "untied": ODD | {"tied_embeddings": False},
}
CLASSES = {
    "GPT2LMHeadModel": ("gpt2", ("lm",)),
    "GPT2Model": ("gpt2", ()),
    "BertModel": ("bert-base", ("pooled",)),
    "BertForMaskedLM": ("bert-base", ("masked_lm",)),
    "BertForPreTraining": ("bert-base", ("masked_lm", "next_sentence")),
    "BertForNextSentencePrediction": ("bert-base", ("next_sentence",)),
}
OUTPUTS = {  # of transformers -> the method of ours that reads it off hidden states
    "last_hidden_state": None,
    "logits": "lm",
    "pooler_output": "pooled",
    "prediction_logits": "masked_lm",
    "seq_relationship_logits": "next_sentence",
}


def random_params(config):
    """No leaf at a special initial value (zeros, ones), so that none can go unnoticed."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init(Transformer(config), jax.random.key(0)))
    return jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), shapes)


def assert_same_outputs(model, config, params) -> None:
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, config.vocabulary, (3, 11))
    segments_BT = (np.arange(11) < np.array([[11], [7], [1]])).astype(np.int32)
    types_BT = rng.integers(0, config.types, (3, 11)) if config.types else None
    inputs = {"input_ids": tokens_BT, "attention_mask": segments_BT} | (
        {} if types_BT is None else {"token_type_ids": types_BT}
    )
    with torch.no_grad():
        theirs = model.eval()(**{name: torch.tensor(x) for name, x in inputs.items()})

    module = Transformer(config)
    hidden_BTD = jax.jit(module.apply)({"params": params}, tokens_BT, segments_BT, None, types_BT)
    compared = 0
    for output, head in OUTPUTS.items():
        if output not in theirs or theirs[output] is None:
            continue
        if output == "logits":
            head = next(h for h in ("lm", "masked_lm", "next_sentence") if h in config.heads_on_top)
        pooled = head in ("pooled", "next_sentence")
        x = hidden_BTD[:, 0] if pooled else hidden_BTD
        ours = np.asarray(x if head is None else module.apply({"params": params}, x, method=head))
        real = np.ones(3, bool) if pooled else segments_BT > 0
        np.testing.assert_allclose(ours[real], theirs[output].numpy()[real], atol=1e-4, rtol=1e-4)
        compared += 1
    assert compared


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLASSES)
def test_both_ways(tmp_path, name, shape):
    preset, heads = CLASSES[name]
    config = dataclasses.replace(PRESETS[preset], heads_on_top=heads, **SHAPES[shape])
    params = random_params(config)
    save(config, params, tmp_path / "ours", extra={"pad_token_id": 0})

    model, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_outputs(model, config, params)

    for module in model.modules():  # weights that never were ours
        for parameter in module.parameters(recurse=False):
            torch.nn.init.normal_(parameter, std=0.3)
    if shape == "untied" and hasattr(getattr(model, "cls", None), "predictions"):
        # transformers computes with decoder.bias and keeps an idle `bias` beside it.
        model.cls.predictions.bias.data.copy_(model.cls.predictions.decoder.bias.data)
    model.save_pretrained(tmp_path / "theirs")
    loaded, leaves = load(tmp_path / "theirs")
    assert loaded.heads_on_top == heads
    assert_same_outputs(model, loaded, jax.tree.map(jnp.asarray, leaves))

    save(loaded, leaves, tmp_path / "again")
    again, theirs = (safetensors.read(tmp_path / folder) for folder in ("again", "theirs"))
    assert {n: np.asarray(x).tobytes() for n, x in again.items()} == {
        n: np.asarray(x).tobytes() for n, x in theirs.items()
    }


@pytest.mark.parametrize("preset", ["gpt2", "bert-base"])
def test_auto_model_picks_the_class(tmp_path, preset):
    config = dataclasses.replace(PRESETS[preset], **ODD)
    save(config, random_params(config), tmp_path)
    assert type(transformers.AutoModel.from_pretrained(tmp_path)).__name__ in ("GPT2Model", "BertModel")
    [named] = transformers.AutoConfig.from_pretrained(tmp_path).architectures
    assert named in ("GPT2LMHeadModel", "BertForPreTraining")


def test_half_precision_is_kept(tmp_path):
    config = dataclasses.replace(PRESETS["bert-base"], heads_on_top=("pooled",), **ODD)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config))
    save(config, params, tmp_path)
    assert transformers.AutoModel.from_pretrained(tmp_path).dtype == torch.bfloat16

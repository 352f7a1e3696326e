"""Continued pre-training of any checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import CausalLM, DataConfig, Infilling, MaskedLM, PermutedLM, RunConfig, SpanCorruption, UserError
from jaxlm.config import OptimizerConfig, TokenizerConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.families import PRESETS
from jaxlm.lm import LM
from jaxlm.nn import parameters
from jaxlm.nn.transformer import Transformer

ROOT = Path(__file__).parent.parent
TEXT = [f"Line {n} is here. It speaks of {n * n} things! Does it? Yes, the {n % 7} of them." for n in range(120)]
SMALL = {"vocabulary": 320, "max_length": 64, "width": 16, "layers": 2, "heads": 2, "mlp_width": 24}
FROZEN = OptimizerConfig(rate=0.0, schedule="constant")  # the weights do not change
CASES = {  # preset, task, kind of tokenizer
    "bert": ("bert-base", MaskedLM(), "wordpiece"),
    "bert with pairs": ("bert-base", MaskedLM(next_sentence=True), "wordpiece"),
    "roberta": ("roberta-base", MaskedLM(), "wordpiece"),
    "longformer": ("longformer-base", MaskedLM(), "wordpiece"),
    "mpnet": ("mpnet-base", MaskedLM(), "wordpiece"),
    "nomic bert": ("nomic-bert", MaskedLM(), "wordpiece"),
    "gte": ("gte-base-en-v1.5", MaskedLM(), "wordpiece"),
    "distilbert": ("distilbert-base", MaskedLM(), "wordpiece"),
    "albert": ("albert-base", MaskedLM(whole_words=True), "wordpiece"),
    "electra": ("electra-small", MaskedLM(), "wordpiece"),
    "deberta": ("deberta-v3-small", MaskedLM(), "wordpiece"),
    "modernbert": ("modernbert-base", MaskedLM(), "wordpiece"),
    "xlnet": ("xlnet-base", PermutedLM(), "wordpiece"),
    "gpt2": ("gpt2", CausalLM(), "bpe"),
    "llama": ("llama-3.2-1b", CausalLM(stream=False), "bpe"),
    "gemma": ("gemma-2b", CausalLM(), "bpe"),
    "t5": ("t5-small", SpanCorruption(), "unigram"),
    "m2m_100": ("m2m100-418m", Infilling(), "unigram"),
    "pegasus": ("pegasus-large", Infilling(), "unigram"),
    "bart": ("bart-base", Infilling(), "unigram"),
    "led": ("led-base", Infilling(), "unigram"),
}
FAST = ("bert",)


@pytest.fixture(autouse=True)
def one_device(devices):
    """Uses one device, since eight compile longer. tests/test_load.py measures the memory of eight."""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for n in range(0, len(TEXT), 10):
        (folder / f"{n:03}.txt").write_text("\n".join(TEXT[n : n + 10]) + "\n")
    return folder


def checkpoint(folder: Path, preset: str, kind: str) -> tuple[Path, LM]:
    """Saves a model of the family, an encoder without a head, and returns its folder and the loaded model."""
    config = PRESETS[next(name for name in PRESETS if name.startswith(preset))]
    small = SMALL | {"kv_heads": 1 if config.kv_heads else None, "head_width": 8 if config.head_width else None}
    small |= {"embedding_width": 8} if config.embedding_width else {}
    small |= {"decoder_layers": None, "decoder_max_length": None}
    body = () if config.structure == "encoder" else ("lm",)
    config = replace(config, **small, dropout=0.0, attention_dropout=0.0, heads_on_top=body)
    tokenizer = tokenizers.train(TEXT, TokenizerConfig(train=kind, sentinels=20 * (kind == "unigram")), 320)
    lm = LM(config, Transformer(config), random_params(config, std=0.02), tokenizer)
    jaxlm.save(lm, folder)
    return folder, jaxlm.load(folder)  # parameters that the files of a family lack are read as their fixed values


@pytest.mark.parametrize(
    "name", [case if case in FAST else pytest.param(case, marks=pytest.mark.long) for case in CASES]
)
def test_pre_training_of_any_checkpoint_is_continued(name, text, tmp_path, no_plots, capsys):
    """At a rate of 0 the body does not change. Missing heads are randomly initialised, and reported."""
    preset, task, kind = CASES[name]
    folder, lm = checkpoint(tmp_path / "given", preset, kind)
    data = DataConfig(path=str(text), documents="file", length=32, cache=str(tmp_path / "cache"))
    run = RunConfig(
        model=None, task=task, data=data, optimizer=FROZEN, batch=4, steps=2, init=str(folder),
        workdir=str(tmp_path / "adapt"), sample_tokens=0,
    )  # fmt: skip
    adapted = jaxlm.fit(run)
    assert (
        f"randomly initialised, since the given weights have none: {task.heads[0]}_head" in capsys.readouterr().err
    ) == (lm.config.structure == "encoder")
    before, after = parameters.by_path(lm.params), parameters.by_path(adapted.params)
    for path, leaf in before.items():
        np.testing.assert_array_equal(np.asarray(after[path]), leaf, err_msg=path)
    assert set(task.heads) <= set(adapted.config.heads_on_top)
    assert adapted.tokenizer.encode(TEXT[0]) == lm.tokenizer.encode(TEXT[0])
    scores = json.loads((tmp_path / "adapt" / "scores.json").read_text())
    assert np.isfinite(scores["loss"])
    config = json.loads((tmp_path / "adapt" / "export" / "config.json").read_text())
    assert config["model_type"] == json.loads((folder / "config.json").read_text())["model_type"]


def test_pre_training_of_a_model_in_memory_is_continued_with_its_tokenizer(text, tmp_path, no_plots):
    """The result has the head of the task and the dtype float32. The model of the caller does not change."""
    _, lm = checkpoint(tmp_path / "given", "bert-base", "wordpiece")
    lm = replace(lm, params=jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), lm.params))
    data = DataConfig(path=str(text), documents="file", length=32, cache=str(tmp_path / "cache"))
    run = RunConfig(None, MaskedLM(), data, optimizer=FROZEN, batch=4, steps=1, workdir=str(tmp_path / "adapt"))
    adapted = jaxlm.fit(run, model=lm)
    assert adapted.config.heads_on_top == ("masked_lm",)
    for path, leaf in parameters.by_path(lm.params).items():
        after = parameters.by_path(adapted.params)[path]
        assert after.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(after), np.asarray(leaf, np.float32), err_msg=path)


@pytest.mark.long
def test_a_task_starts_from_the_adapted_model(text, tmp_path, no_plots, capsys):
    """The configs run sequentially: adapt.py, then finetune_csv.py from the folder of its run."""
    from jaxlm.__main__ import main

    folder, _ = checkpoint(tmp_path / "given", "bert-base", "wordpiece")
    small = ["--data.length", "32", "--batch", "4", "--data.cache", str(tmp_path / "cache")]
    adapt = ["train", "configs/adapt.py", "--init", str(folder), "--data.path", str(text), *small]
    assert main([*adapt, "--steps", "2", "--epochs", "0", "--workdir", str(tmp_path / "adapt")]) == 0
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f'"{line}",{n % 2}\n' for n, line in enumerate(TEXT[:20])))
    tune = ["train", "configs/finetune_csv.py", "--init", str(tmp_path / "adapt"), "--data.path", str(table)]
    assert main([*tune, "--data.length", "32", "--epochs", "1", "--workdir", str(tmp_path / "tuned")]) == 0
    assert "randomly initialised, since the given weights have none: classes_head" in capsys.readouterr().err


REFUSED = {
    "an encoder with next tokens": ("bert-base", "wordpiece", CausalLM(), ("configs/adapt.py masked",)),
    "a decoder with masked words": ("gpt2", "bpe", MaskedLM(), ("configs/adapt.py causal",)),
    "T5 with masked words": ("t5-small", "unigram", MaskedLM(), ("configs/adapt.py spans or infilling",)),
    "RoBERTa with pairs": (
        "roberta-base",
        "wordpiece",
        MaskedLM(next_sentence=True),
        ("next_sentence", "does not support"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_task_of_another_kind_of_model_is_refused(name, text, tmp_path):
    preset, kind, task, words = REFUSED[name]
    folder, _ = checkpoint(tmp_path / "given", preset, kind)
    run = RunConfig(None, task, DataConfig(path=str(text)), init=str(folder), workdir=str(tmp_path / "run"))
    with pytest.raises(UserError) as error:
        jaxlm.fit(run)
    assert all(word in str(error.value) for word in words)


def test_the_message_names_every_parameter_that_does_not_fit_the_model_config(text, tmp_path):
    folder, lm = checkpoint(tmp_path / "given", "bert-base", "wordpiece")
    model = replace(lm.config, width=24, vocabulary=400, heads_on_top=("masked_lm",))
    run = RunConfig(model, MaskedLM(), DataConfig(path=str(text), length=32), init=str(folder))
    with pytest.raises(UserError) as error:
        jaxlm.fit(replace(run, workdir=str(tmp_path / "run")))
    for line in ("- embeddings/tokens (320, 16)", "+ embeddings/tokens (400, 24)", "mlp/up/kernel", "configs/adapt.py"):
        assert line in str(error.value)

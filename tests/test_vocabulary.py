"""Models and tokenizers of different sizes: every function refuses ids without a row, and `resize` makes them equal."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm.config import Classification, ModelConfig, TokenizerConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.errors import UserError
from jaxlm.inference.likelihood import fill, log_likelihoods, perplexity
from jaxlm.lm import LM
from jaxlm.nn import parameters
from jaxlm.nn.transformer import Transformer

TEXT = "the quick brown fox jumps over a lazy dog\n"
TINY = {"width": 16, "heads": 2, "layers": 1, "max_length": 32}
ROWS = 30  # the rows of the model, fewer than the tokens of the tokenizer


def model(rows: int = ROWS, kind: str = "characters", **fields) -> LM:
    tokenizer = tokenizers.train([TEXT * 9 + "XYZ"], TokenizerConfig(train=kind), 60)
    config = ModelConfig(**TINY, vocabulary=rows, **fields)
    return LM(config, Transformer(config), random_params(config), tokenizer)


DECODER = {"structure": "decoder", "heads_on_top": ("lm",)}
ENCODER = {"structure": "encoder", "types": 2}
BOTH = {"structure": "encoder_decoder", "heads_on_top": ("lm",), "start_token": 0}
CLASSES = {"heads_on_top": ("classes",), "labels": ("a", "b")}
BEYOND = "the quick fox"
ENTRIES = {
    "tokens": (DECODER, lambda lm: lm.tokens(BEYOND)),
    "a call": (DECODER, lambda lm: lm(np.array([[1, ROWS]]))),
    "a call with a list": (DECODER, lambda lm: lm([[1, 99]])),
    "a call with an id below 0": (DECODER, lambda lm: lm(np.array([[1, -1]]))),
    "a call with a target": (BOTH, lambda lm: lm(np.array([[1]]), target_tokens_BT=np.array([[1, ROWS]]))),
    "generate": (DECODER, lambda lm: jaxlm.generate(lm, [BEYOND], max_new_tokens=2)),
    "generate from a source": (BOTH, lambda lm: jaxlm.generate(lm, [BEYOND], max_new_tokens=2)),
    "stream": (DECODER, lambda lm: list(jaxlm.stream(lm, BEYOND, max_new_tokens=2))),
    "log_likelihoods": (DECODER, lambda lm: log_likelihoods(lm, [("the", BEYOND)])),
    "log_likelihoods of a target": (BOTH, lambda lm: log_likelihoods(lm, [("a", BEYOND)])),
    "perplexity": (DECODER, lambda lm: perplexity(lm, BEYOND)),
    "encode": (ENCODER, lambda lm: jaxlm.encode(lm, [BEYOND])),
    "fill": (ENCODER | {"heads_on_top": ("masked_lm",)}, lambda lm: fill(lm, f"{BEYOND} [MASK]")),
    "predict": (ENCODER | CLASSES, lambda lm: jaxlm.predict(lm, [BEYOND], task=Classification())),
    "evaluate": (
        ENCODER | CLASSES,
        lambda lm: jaxlm.evaluate(lm, [{"text": BEYOND, "label": "a"}], task=Classification()),
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_token_without_a_row_is_refused(name):
    fields, use = ENTRIES[name]
    kind = "wordpiece" if fields.get("structure") == "encoder" else "characters"
    lm = model(kind=kind, **fields) if kind == "characters" else model(8, kind, **fields)
    with pytest.raises(UserError) as error:
        use(lm)
    message = str(error.value)
    assert str(lm.config.vocabulary) in message and "jaxlm.resize(lm" in message
    if "call" not in name:
        assert str(lm.tokenizer.size) in message


def test_texts_of_known_tokens_are_accepted():
    """The tokenizer may have more tokens than the model, for example an unused [PAD]."""
    lm = model(**DECODER)
    assert lm.tokenizer.size > ROWS
    assert lm([[4, 5]]).logits.shape == (1, 2, ROWS)
    known = lm.tokenizer.decode([6, 7, 8])
    assert lm.tokens(known).max() < ROWS
    assert model(64, **DECODER).tokens(BEYOND).max() < 64  # padded rows
    with pytest.raises(UserError, match="dtype float"):
        lm(np.array([[1.0]]))


@pytest.mark.parametrize(
    ("name", "tied"),
    [("decoder", True), ("decoder", False), ("encoder", True), ("encoder_decoder", False), ("two tables", True)],
)
def test_new_rows_are_the_mean_of_the_old_ones(name, tied):
    fields = {
        "decoder": DECODER | {"tied_embeddings": tied},
        "encoder": ENCODER | {"heads_on_top": ("masked_lm",), "tied_embeddings": tied},
        "encoder_decoder": BOTH | {"tied_embeddings": tied},
        "two tables": BOTH | {"decoder_tokens": True, "decoder_vocabulary": 20, "tied_embeddings": tied},
    }[name]
    lm = replace(model(**fields), tokenizer=None)
    sizes = (41, 50) if name == "two tables" else (41,)
    larger = jaxlm.resize(lm, *sizes)
    assert (larger.config.vocabulary, larger.config.V) == (41, sizes[-1])
    before, after = parameters.by_path(lm.params), parameters.by_path(larger.params)
    assert before.keys() == after.keys()
    changed = [path for path in before if before[path].shape != after[path].shape]
    assert "embeddings/tokens" in changed
    for path in changed:
        count = len(before[path])
        np.testing.assert_array_equal(after[path][:count], before[path])
        mean = np.asarray(before[path]).mean(0)
        np.testing.assert_allclose(after[path][count:], np.broadcast_to(mean, after[path][count:].shape), atol=1e-6)
    assert not {p for p in before if p not in changed and not np.array_equal(before[p], after[p])}
    tokens = np.array([[1, 5, 7]])
    old, new = lm(tokens).logits, larger(tokens).logits
    np.testing.assert_allclose(new[..., : old.shape[-1]], old, atol=1e-5)
    smaller = jaxlm.resize(larger, *((30, 20) if name == "two tables" else (30,)))
    jax.tree.map(np.testing.assert_array_equal, smaller.params, lm.params)


def test_resize_uses_the_size_of_the_tokenizer(tmp_path):
    lm = model(**DECODER)
    larger = jaxlm.resize(lm)
    assert larger.config.vocabulary == larger.tokenizer.size == lm.tokenizer.size
    assert jaxlm.generate(larger, [BEYOND], max_new_tokens=2)
    jaxlm.save(larger, tmp_path / "larger")
    again = jaxlm.load(tmp_path / "larger")
    assert again.config.vocabulary == lm.tokenizer.size and again.tokens(BEYOND).size
    for size in (ROWS, 0, -1, 2.5, True, "40"):
        with pytest.raises(UserError, match=r"size is .*; it must be an integer, at least"):
            jaxlm.resize(lm, size)
    quantized = jaxlm.quantize(model(**DECODER), "int8", embeddings=True)
    with pytest.raises(UserError, match="embeddings/tokens is of the kind Quantized; resize the original model"):
        jaxlm.resize(quantized, 99)
    with pytest.raises(UserError, match="target_size is 9, but the model has one table"):
        jaxlm.resize(lm, 80, 9)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["Bert", "GPT2", "T5", "Bart"])
def test_resized_models_agree_with_transformers(family, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from test_parity import FAMILIES, SEQ2SEQ

    heads = {"Bert": "ForMaskedLM", "GPT2": "LMHeadModel"}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SEQ2SEQ if family == "Bart" else FAMILIES[family][0]))
    theirs = getattr(transformers, family + heads.get(family, "ForConditionalGeneration"))(config).eval()
    theirs.save_pretrained(tmp_path / "a")
    jaxlm.save(jaxlm.resize(jaxlm.load(tmp_path / "a"), 50), tmp_path / "b")
    theirs.resize_token_embeddings(50)
    ours = type(theirs).from_pretrained(tmp_path / "b").eval()
    tokens = torch.tensor([[3, 4, 40]])
    decoder_inputs = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
    with torch.no_grad():
        found, expected = (model(tokens, **decoder_inputs).logits for model in (ours, theirs))
    assert found.shape == expected.shape and ours.config.vocab_size == 50
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)  # transformers draws new rows around the mean

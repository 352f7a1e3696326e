"""Patching and the logit lens equal forward hooks of models of transformers with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxlm
from jaxlm import TokenizerConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.explain.lens import logit_lens
from jaxlm.explain.patching import patch, read_contrast

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TEXTS = ["a good film", "the plot is not good and never new", "a story of two friends"]
CLEAN = {"gpt2": "the plot is good", "bert": "[MASK] the plot is good", "t5": "the plot is good"}
CORRUPTED = {"gpt2": "the good is plot", "bert": "[MASK] the good is plot", "t5": "the good is plot"}


def make(name: str, tokenizer: Any) -> Any:
    sizes = {"vocab_size": tokenizer.size, "pad_token_id": tokenizer.pad}
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=24, n_layer=3, n_head=3, n_positions=32, initializer_range=0.3, **sizes)
        return transformers.GPT2LMHeadModel(config)
    if name == "bert":
        config = transformers.BertConfig(
            hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=20, initializer_range=0.3,
            max_position_embeddings=32, **sizes,
        )  # fmt: skip
        return transformers.BertForMaskedLM(config)
    config = transformers.T5Config(
        d_model=24, d_kv=8, d_ff=20, num_layers=2, num_heads=3, decoder_start_token_id=tokenizer.pad, **sizes
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.fixture(scope="module", params=["gpt2", "bert", "t5"])
def pair(request, tmp_path_factory) -> tuple[str, Any, Any]:
    name, folder = request.param, Path(tmp_path_factory.mktemp("model"))
    kind = {"gpt2": "byte_bpe", "bert": "wordpiece", "t5": "unigram"}[name]
    tokenizer = tokenizers.train(TEXTS * 20, TokenizerConfig(train=kind), 60 if kind == "wordpiece" else 280)
    torch.manual_seed(0)
    model = make(name, tokenizer).eval()
    model.save_pretrained(folder)
    tokenizer.save(str(folder))
    return name, model, jaxlm.load(str(folder))


def layers_of(name: str, model: Any) -> Any:
    """Returns the layers of the stack that is patched, which T5 has in its encoder."""
    if name == "gpt2":
        return model.transformer.h
    return model.bert.encoder.layer if name == "bert" else model.encoder.block


def submodule(name: str, layer: Any, part: str) -> Any:
    names = {
        "gpt2": {"residual": layer, "attention": getattr(layer, "attn", None), "mlp": getattr(layer, "mlp", None)},
        "bert": {"residual": layer},
        "t5": {"residual": layer},
    }
    return names[name][part]


def logits(name: str, model: Any, example: Any) -> Any:
    tokens = torch.tensor(example.tokens_T[None]).long()
    if name == "t5":
        S = example.source
        return model(input_ids=tokens[:, :S], decoder_input_ids=tokens[:, S:]).logits[0]
    return model(input_ids=tokens).logits[0]


def first_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def hooked(name: str, model: Any, contrast: Any, part: str, layer: int, position: int) -> float:
    """Returns the difference of the logits with one activation of the clean text, by forward hooks."""
    module, stored = submodule(name, layers_of(name, model)[layer], part), []
    handle = module.register_forward_hook(lambda m, i, output: stored.append(first_of(output).clone()))
    logits(name, model, contrast.clean)
    handle.remove()

    def replace(m: Any, i: Any, output: Any) -> Any:
        first_of(output)[:, position] = stored[0][:, position]
        return output

    handle = module.register_forward_hook(replace)
    values = logits(name, model, contrast.corrupted)[contrast.place]
    handle.remove()
    return float(values[contrast.outputs[0]] - values[contrast.outputs[1]])


def test_patches_equal_forward_hooks(pair):
    name, model, lm = pair
    answers = _answers(lm)
    parts = ("residual", "attention", "mlp") if name == "gpt2" else ("residual",)
    result = patch(lm, CLEAN[name], CORRUPTED[name], answers, parts)
    contrast = read_contrast(lm, CLEAN[name], CORRUPTED[name], answers)
    for grid in result.grids:
        if name == "t5" and grid.site.stack == "decoder":
            continue
        for layer, position in [(0, 2), (1, 1), (len(grid.layers) - 1, 3)]:
            expected = hooked(name, model, contrast, grid.site.part, layer, position)
            restored = (expected - result.corrupted) / (result.clean - result.corrupted)
            np.testing.assert_allclose(grid.restored[layer, position], restored, atol=2e-3)


def _answers(lm: Any) -> tuple[str, ...]:
    return tuple(token for token in ("a", "e", "o", "n") if _is_one_token(lm, token))[:2]


def _is_one_token(lm: Any, word: str) -> bool:
    ids = [lm.tokenizer.target.encode(text) for text in (word, f" {word}")]
    return any(len(some) == 1 and some[0] != lm.tokenizer.target.unk for some in ids)


@torch.no_grad()
def test_the_lens_equals_the_head_on_the_hidden_states_of_transformers(pair):
    name, model, lm = pair
    if name == "t5":
        pytest.skip("the decoder of T5 has one token here; its last row is tested by default")
    lens = logit_lens(lm, CLEAN[name])
    contrast = read_contrast(lm, CLEAN[name], CORRUPTED[name], _answers(lm))
    tokens = torch.tensor(contrast.clean.tokens_T[None]).long()
    if name == "gpt2":
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
        heads = [model.lm_head(model.transformer.ln_f(state)) for state in states[:-1]] + [model.lm_head(states[-1])]
    else:
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
        heads = [model.cls(state) for state in states]
    for n, logits_1TV in enumerate(heads):
        p_TV = logits_1TV[0, :, : lm.vocabulary].softmax(-1).numpy()
        np.testing.assert_allclose(lens.probability_LT[n], p_TV.max(-1), atol=2e-4)
        np.testing.assert_array_equal(lens.tokens_LT[n], p_TV.argmax(-1))

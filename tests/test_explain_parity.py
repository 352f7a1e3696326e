"""Attributions equal those of captum for models of transformers with the same weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxlm
from jaxlm import TokenizerConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.explain.attribution import attribute
from jaxlm.explain.prediction import predict_target

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("captum")
pytestmark = pytest.mark.parity

TEXTS = ["a good film", "the plot is not good and never new", "a story of two friends"]
SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 20}
SIZES |= {"max_position_embeddings": 32, "initializer_range": 0.3}
STEPS = 50


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Any, Any]]:
    """Returns models of transformers by name, each with the same model of jaxlm."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {"bert": "wordpiece", "gpt2": "byte_bpe", "llama": "byte_bpe", "t5": "unigram"}
    built = {}
    for name, kind in kinds.items():
        tokenizer = tokenizers.train(TEXTS * 20, TokenizerConfig(train=kind), 60 if kind == "wordpiece" else 280)
        torch.manual_seed(0)
        built[name] = save_and_load(folder / name, make(name, tokenizer), tokenizer)
    return built


def make(name: str, tokenizer: Any) -> Any:
    sizes = {"vocab_size": tokenizer.size, "pad_token_id": tokenizer.pad}
    if name == "bert":
        config = transformers.BertConfig(**SIZES, **sizes, num_labels=3, attn_implementation="eager")
        return transformers.BertForSequenceClassification(config)
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=24, n_layer=3, n_head=3, n_positions=32, initializer_range=0.3, **sizes)
        return transformers.GPT2LMHeadModel(config)
    if name == "llama":
        config = transformers.LlamaConfig(**SIZES, **sizes, num_key_value_heads=1, head_dim=8)
        return transformers.LlamaForCausalLM(config)
    config = transformers.T5Config(
        d_model=24, d_kv=8, d_ff=20, num_layers=2, num_heads=3, decoder_start_token_id=tokenizer.pad, **sizes
    )
    return transformers.T5ForConditionalGeneration(config)


def save_and_load(folder: Path, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    model.eval().save_pretrained(folder)
    tokenizer.save(str(folder))
    return model, jaxlm.load(str(folder))


def captum_scores(model: Any, layer: Any, ids: np.ndarray, baseline: np.ndarray, forward: Any, **inputs: Any) -> Any:
    """Returns integrated gradients of captum, summed over the width, and its convergence delta."""
    from captum.attr import LayerIntegratedGradients

    method = LayerIntegratedGradients(forward, layer)
    ids_1T, baseline_1T = torch.tensor(ids[None]).long(), torch.tensor(baseline[None]).long()
    scores, delta = method.attribute(ids_1T, baseline_1T, n_steps=STEPS, return_convergence_delta=True, **inputs)
    scores = scores[0] if isinstance(scores, tuple) else scores
    return scores.sum(-1)[0].detach().numpy(), float(delta)


def log_probability(model: Any, place: int, token: int, ids: Any) -> Any:
    return model(input_ids=ids).logits[:, place].log_softmax(-1)[:, token]


def baseline_of(example: Any, token: int) -> np.ndarray:
    return np.where(example.is_text_T, token, example.tokens_T)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("reference", ["padding", "mask", "unknown"])
def test_integrated_gradients_of_a_classifier_equal_captums(models, text, reference):
    model, lm = models["bert"]
    prediction = predict_target(lm, text, target="LABEL_1")
    ours = attribute(prediction, method="integrated_gradients", reference=reference, steps=STEPS)
    token = {"padding": lm.tokenizer.pad, "mask": lm.tokenizer.mask, "unknown": lm.tokenizer.unk}[reference]
    forward = lambda ids: model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 1]
    ids = prediction.example.tokens_T
    theirs, delta = captum_scores(
        model, model.bert.embeddings.word_embeddings, ids, baseline_of(prediction.example, token), forward
    )
    np.testing.assert_allclose(ours.scores_QT[0], theirs, atol=1e-4)
    change = ours.values_Q[0] - ours.references_Q[0]
    assert abs(ours.scores_QT[0].sum() - change - delta) < 1e-4  # the same completeness


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_layer_integrated_gradients_equal_captums(models, layer):
    model, lm = models["bert"]
    prediction = predict_target(lm, TEXTS[1], target="LABEL_2")
    ours = attribute(prediction, method="layer_integrated_gradients", layer=layer, steps=STEPS)
    forward = lambda ids: model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 2]
    ids, baseline = prediction.example.tokens_T, baseline_of(prediction.example, lm.tokenizer.pad)
    theirs, _ = captum_scores(model, model.bert.encoder.layer[layer], ids, baseline, forward)
    np.testing.assert_allclose(ours.scores_QT[0], theirs, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_integrated_gradients_of_generated_tokens_equal_captums(models, name):
    model, lm = models[name]
    prediction = predict_target(lm, TEXTS[0], target=" is new")
    ours = attribute(prediction, method="integrated_gradients", reference="padding", steps=STEPS)
    ids, layer = prediction.example.tokens_T, model.get_input_embeddings()
    baseline = baseline_of(prediction.example, lm.tokenizer.pad)
    assert len(prediction.targets) > 1
    for scores_T, target in zip(ours.scores_QT, prediction.targets):
        forward = partial(log_probability, model, *target.indices)
        theirs, _ = captum_scores(model, layer, ids, baseline, forward)
        np.testing.assert_allclose(scores_T, theirs, atol=1e-4)
        assert not scores_T[target.indices[0] + 1 :].any()  # a decoder does not read later tokens


def test_gradient_x_input_equals_captums(models):
    from captum.attr import LayerGradientXActivation

    model, lm = models["bert"]
    prediction = predict_target(lm, TEXTS[1], target="LABEL_0")
    ours = attribute(prediction, method="gradient_x_input")
    forward = lambda ids: model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
    method = LayerGradientXActivation(forward, model.bert.embeddings.word_embeddings)
    theirs = method.attribute(torch.tensor(prediction.example.tokens_T[None]).long()).sum(-1)[0].detach().numpy()
    np.testing.assert_allclose(ours.scores_QT[0], theirs, atol=1e-4)


def test_occlusion_and_shapley_values_equal_captums(models):
    from captum.attr import FeatureAblation, ShapleyValues

    model, lm = models["bert"]
    prediction = predict_target(lm, TEXTS[0], target="LABEL_1")
    ids_1T = torch.tensor(prediction.example.tokens_T[None]).long()
    baseline_1T = torch.tensor(baseline_of(prediction.example, lm.tokenizer.mask)[None]).long()
    forward = lambda ids: model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 1]
    theirs = FeatureAblation(forward).attribute(ids_1T, baseline_1T)[0].detach().numpy()
    ours = attribute(prediction, method="occlusion", replacement="mask")
    np.testing.assert_allclose(ours.scores_QT[0], theirs, atol=1e-4)
    # All orders of the few tokens of the text; captum also orders the special tokens, which do not change.
    text = prediction.example.is_text_T
    mask_1T = torch.tensor(np.where(text, np.cumsum(text), 0)[None])
    expected = exact_shapley(forward, ids_1T, baseline_1T, np.flatnonzero(text))
    ours = attribute(prediction, method="shapley", replacement="mask", permutations=5040)
    np.testing.assert_allclose(ours.scores_QT[0][text], expected, atol=1e-4)
    if text.sum() <= 4:
        theirs = ShapleyValues(forward).attribute(ids_1T, baseline_1T, feature_mask=mask_1T)
        np.testing.assert_allclose(theirs[0, text].detach().numpy(), expected, atol=1e-4)


def exact_shapley(forward: Any, ids_1T: Any, baseline_1T: Any, text: np.ndarray) -> np.ndarray:
    """Returns Shapley values by their definition over all subsets (Shapley 1953)."""
    from itertools import combinations
    from math import factorial

    def value(subset: tuple[int, ...]) -> float:
        ids = baseline_1T.clone()
        ids[0, list(subset)] = ids_1T[0, list(subset)]
        with torch.no_grad():
            return float(forward(ids)[0])

    n, found = len(text), []
    for token in text:
        others = [t for t in text if t != token]
        subsets = (subset for size in range(n) for subset in combinations(others, size))
        weight = lambda size: factorial(size) * factorial(n - size - 1) / factorial(n)
        found.append(sum(weight(len(s)) * (value((*s, token)) - value(s)) for s in subsets))
    return np.array(found)


def test_integrated_gradients_of_an_encoder_decoder_equal_captums(models):
    model, lm = models["t5"]
    prediction = predict_target(lm, TEXTS[0], target="good")
    ours = attribute(prediction, method="integrated_gradients", reference="zero", steps=STEPS)
    example, target = prediction.example, prediction.targets[-1]
    source_1S, written_1T = (torch.tensor(part[None]).long() for part in np.split(example.tokens_T, [example.source]))
    place, token = target.indices
    embed = model.get_input_embeddings()
    is_text_T = torch.tensor(example.is_text_T)[:, None]
    words = torch.cat([embed(source_1S), embed(written_1T)], 1).detach()[0]
    nodes, weights = np.polynomial.legendre.leggauss(STEPS)
    total = torch.zeros(len(words))
    for node, weight in zip((nodes + 1) / 2, weights / 2):
        path = torch.where(is_text_T, words * node, words).requires_grad_()
        encoded = model.encoder(inputs_embeds=path[None, : example.source])
        output = model(encoder_outputs=encoded, decoder_inputs_embeds=path[None, example.source :])
        output.logits[0, place].log_softmax(-1)[token].backward()
        total += torch.tensor(weight) * (path.grad * torch.where(is_text_T, words, torch.zeros_like(words))).sum(-1)
    np.testing.assert_allclose(ours.scores_QT[-1], total.numpy(), atol=1e-4)


def test_attention_weights_equal_those_of_transformers(models):
    from jaxlm.explain.attention import attention_weights, rollout

    model, lm = models["bert"]
    [own] = attention_weights(lm, TEXTS[1])
    ids = torch.tensor(lm.tokens(TEXTS[1])).long()
    theirs = torch.stack(model(input_ids=ids, output_attentions=True).attentions)[:, 0].detach().numpy()
    np.testing.assert_allclose(own.weights_LHTS, theirs, atol=1e-5)
    mixed = 0.5 * theirs.mean(1) + 0.5 * np.eye(theirs.shape[-1])
    np.testing.assert_allclose(rollout(own.weights_LHTS), mixed[2] @ mixed[1] @ mixed[0], atol=1e-5)

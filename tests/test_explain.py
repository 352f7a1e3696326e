"""Explanations: properties of attributions, measures of faithfulness, attention, the page, and wrong input."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import LM, TokenizerConfig, UserError
from jaxlm.__main__ import main
from jaxlm.config import ModelConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.explain import attention, faithfulness
from jaxlm.explain.analyses import explain
from jaxlm.explain.attribution import attribute, token_orders
from jaxlm.explain.outputs import Rows, outputs_of, words_of
from jaxlm.explain.prediction import predict_target, values_of
from jaxlm.explain.targets import Target
from jaxlm.nn.transformer import Transformer
from jaxlm.reports.tables import ScoredText

_WORDS = "the a film story plot actor director is was has good bad new old great poor and but very never"
WORDS = _WORDS.split()
TEXT = "the film is good but never new"
SIZES: dict[str, Any] = {"width": 16, "heads": 2, "mlp_width": 24, "max_length": 40}
DECODER: dict[str, Any] = SIZES | {"structure": "decoder", "layers": 2, "heads_on_top": ("lm",), "biases": ()}
ENCODER: dict[str, Any] = SIZES | {"structure": "encoder", "layers": 3, "norm_place": "post", "types": 2}
ENCODER |= {"embedding_norm": True}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {  # name -> fields of the config, tokenizer
    "classes": (ENCODER | {"heads_on_top": ("classes",), "labels": ("bad", "good", "so-so")}, "wordpiece"),
    "tags": (ENCODER | {"heads_on_top": ("tokens",), "labels": ("O", "B-X", "I-X")}, "wordpiece"),
    "span": (ENCODER | {"heads_on_top": ("span",)}, "wordpiece"),
    "masked": (ENCODER | {"heads_on_top": ("masked_lm",)}, "wordpiece"),
    "decoder": (DECODER | {"positions": "rotary", "norm": "rmsnorm", "norm_place": "pre"}, "byte_bpe"),
    "seq2seq": (
        SIZES | {"structure": "encoder_decoder", "layers": 2, "heads_on_top": ("lm",), "start_token": 0, "biases": ()},
        "byte_bpe",
    ),
    "lstm": (
        SIZES
        | {"structure": "encoder", "layers": 1, "mixer": "lstm", "positions": "none", "heads_on_top": ("classes",)}
        | {"labels": ("bad", "good"), "classes_from": "mean", "feed_forward": "none"},
        "wordpiece",
    ),
}


def fast(*names: str, of: Iterable[str]) -> list[Any]:
    """Returns the cases of a test; those that are not named take longer and are marked."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.long) for name in of]


def lines(count: int) -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, random.integers(4, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def models() -> dict[str, LM]:
    words = {kind: tokenizers.train(lines(200), TokenizerConfig(train=kind), 300) for kind in ("byte_bpe",)}
    words["wordpiece"] = tokenizers.train(lines(200), TokenizerConfig(train="wordpiece"), 80)
    models = {}
    for name, (fields, kind) in CONFIGS.items():
        config = ModelConfig(vocabulary=words[kind].size, **fields)
        models[name] = LM(config, Transformer(config), random_params(config), words[kind])
    return models


def text_of(name: str) -> Any:
    if name == "span":
        return {"question": "is it good", "context": TEXT}
    return TEXT.replace("good", "[MASK]") if name == "masked" else TEXT


# Outputs from word embeddings


@pytest.mark.parametrize("name", fast("seq2seq", of=("classes", "decoder", "seq2seq")))
def test_outputs_from_the_words_of_a_text_are_those_of_the_model(models, name):
    """Also with tied embeddings, which the head reads."""
    lm = models[name]
    tokens_BT = jnp.array([[5, 6, 7, 8, 9, 4], [9, 8, 7, 0, 0, 0]])
    segments_BT = jnp.array([[1] * 6, [1] * 3 + [0] * 3])
    rows = Rows(tokens_BT, segments_BT, jnp.zeros_like(tokens_BT))
    inputs: dict[str, Any] = {"mask_BT": segments_BT}
    if name == "seq2seq":
        rows = rows._replace(target_tokens_BU=tokens_BT[:, :4], target_segments_BU=segments_BT[:, :4])
        inputs |= {"target_tokens_BT": tokens_BT[:, :4], "target_mask_BT": segments_BT[:, :4]}
    expected = lm.apply(lm.params, tokens_BT, **inputs)
    actual = outputs_of(lm, lm.params, words_of(lm.params, rows), rows)
    np.testing.assert_allclose(actual.logits, expected.logits, atol=1e-5)


# Attributions


@pytest.mark.parametrize("name", fast("classes", "decoder", of=CONFIGS))
def test_integrated_gradients_add_up_to_the_change_of_the_target(models, name):
    prediction = predict_target(models[name], text_of(name), new_tokens=2 if name == "decoder" else 1)
    result = attribute(prediction, method="integrated_gradients")
    assert (result.errors_Q < 0.01).all(), result.errors_Q
    assert result.steps >= 32
    assert not result.scores_QT[:, ~result.is_text_T].any()  # special tokens are the same in the reference
    if name == "decoder":
        for scores_T, target in zip(result.scores_QT, prediction.targets):
            assert not scores_T[target.indices[0] + 1 :].any()  # causality


@pytest.mark.parametrize("name", fast("tags", of=("classes", "tags", "span")))
def test_the_explained_value_is_that_of_predict(models, name):
    lm, text = models[name], text_of(name)
    prediction = predict_target(lm, text)
    [target] = prediction.targets
    T = len(prediction.example.tokens_T)
    [probability] = values_of(prediction, target, np.ones((1, T), bool), "padding").probabilities
    [row] = jaxlm.predict(lm, [text])
    if name == "classes":
        assert target.name == row["prediction"]
        np.testing.assert_allclose(probability, row["confidence"], rtol=1e-5)
    elif name == "tags":
        word = int(target.name.partition(" at word ")[2].partition(",")[0])
        assert target.name.startswith(row["prediction"][word])
    else:
        assert target.name in (f"answer {row['prediction']!r}", "no answer")
    assert 0 < probability <= 1


def test_a_removed_token_is_like_a_text_without_it(models):
    lm = models["classes"]
    prediction = predict_target(lm, TEXT, target="bad")
    words, pieces = TEXT.split(), [len(lm.tokenizer.encode(word)) for word in TEXT.split()]
    of_token_T = np.repeat(np.arange(len(words)), pieces)
    keep_NT = np.ones((len(words), len(of_token_T) + 2), bool)
    keep_NT[:, 1:-1] = of_token_T != np.arange(len(words))[:, None]
    removed = values_of(prediction, prediction.targets[0], keep_NT, "remove").probabilities
    shorter = [" ".join(words[:n] + words[n + 1 :]) for n in range(len(words))]
    rows = jaxlm.predict(lm, shorter, probabilities=True)
    np.testing.assert_allclose(removed, [row["probabilities"]["bad"] for row in rows], atol=1e-5)


def test_layer_integrated_gradients_of_the_last_layer_belong_to_the_token_that_the_head_reads(models):
    result = attribute(models["classes"], TEXT, method="layer_integrated_gradients", layer=2)
    assert (result.errors_Q < 0.01).all()
    assert result.scores_QT[0, 0] != 0  # the head reads the first token, which has read the text
    assert abs(result.scores_QT[0, 1:]).max() < 1e-6  # and nothing else after the last layer


def test_shapley_values_share_out_the_change_of_the_target(models):
    prediction = predict_target(models["classes"], "the film is good")
    every = attribute(prediction, method="shapley", permutations=24, replacement="mask")
    assert every.steps == 24
    assert every.errors_Q[0] < 1e-5
    sampled = attribute(prediction, method="shapley", permutations=4, replacement="mask")
    assert sampled.errors_Q[0] < 1e-5  # telescopes in every order
    assert every.scores_QT.argmax() == sampled.scores_QT.argmax()


def test_orders_are_all_orders_or_pairs_of_opposite_orders():
    assert sorted(token_orders(3, 6, 0)) == [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    drawn = token_orders(9, 8, seed=1)
    assert len(drawn) == 8
    assert all(order == other[::-1] for order, other in zip(drawn[::2], drawn[1::2]))


def test_occlusion_is_the_decrease_without_a_token(models):
    prediction = predict_target(models["classes"], TEXT)
    result = attribute(prediction, method="occlusion", replacement="zero")
    T = len(prediction.example.tokens_T)
    keep_NT = np.ones((2, T), bool)
    keep_NT[1, 4] = False
    values = values_of(prediction, prediction.targets[0], keep_NT, "zero").scores
    np.testing.assert_allclose(result.scores_QT[0, 4], values[0] - values[1], atol=1e-6)


@pytest.mark.long
def test_a_target_is_any_function_of_the_outputs(models):
    target = Target("norm", lambda output: (output.hidden_BTD[:, 0] ** 2).sum(-1))
    result = attribute(models["classes"], TEXT, target=target)
    assert result.targets == ("norm",)
    assert (result.errors_Q < 0.01).all()
    lm = models["classes"]
    headless = dataclasses.replace(lm, config=dataclasses.replace(lm.config, heads_on_top=()))
    headless = dataclasses.replace(headless, module=Transformer(headless.config))
    third = Target("third token", lambda output: output.hidden_BTD[:, 2, 0])
    scores = attribute(headless, TEXT, target=third, method="occlusion", replacement="remove").scores_QT[0]
    assert np.isfinite(scores).all() and scores.any()
    with pytest.raises(UserError, match="belongs to tokens"):
        attribute(headless, TEXT, target=third._replace(place=2), method="occlusion", replacement="remove")
    with pytest.raises(UserError, match="a Target of your own"):
        attribute(models["seq2seq"], TEXT, target=target)


@pytest.mark.long
def test_longer_rows_change_nothing(models):
    """Rows are padded to a few lengths: 15 tokens to 16, 17 tokens to 32."""
    lm = models["classes"]
    for count in (13, 15):
        text = " ".join((WORDS * 2)[:count])
        prediction = predict_target(lm, text)
        [row] = jaxlm.predict(lm, [text])
        T = len(prediction.example.tokens_T)
        [p] = values_of(prediction, prediction.targets[0], np.ones((1, T), bool), "remove").probabilities
        np.testing.assert_allclose(p, row["confidence"], rtol=1e-5)


@pytest.mark.long
def test_quantised_weights_have_gradients_and_quantised_inputs_have_none(models):
    lm = models["decoder"]
    weights = dataclasses.replace(lm, params=quantised(lm.params, "float"))
    assert (attribute(weights, TEXT, target=" good").errors_Q < 0.01).all()
    inputs = dataclasses.replace(lm, params=quantised(lm.params, "int8"))
    with pytest.raises(UserError, match="rounds the inputs of its projections to int8"):
        attribute(inputs, TEXT, target=" good")
    assert np.isfinite(attribute(inputs, TEXT, target=" good", method="occlusion").scores_QT).all()


def quantised(params: Any, form: str) -> Any:
    from jaxlm.nn import quantized

    layers = jax.tree.map(lambda leaf: leaf, params["decoder"]["layers"])
    up = layers["mlp"]["up"]
    node = dataclasses.replace(quantized.quantize(up["kernel"], 1), input_format=form)
    layers = layers | {"mlp": layers["mlp"] | {"up": up | {"kernel": node}}}
    return params | {"decoder": params["decoder"] | {"layers": layers}}


# Faithfulness


def test_the_scores_of_an_additive_model_are_the_most_faithful():
    effects_n = np.array([0.3, -0.1, 0.2, 0.05, 0.0, 0.15])

    def values(keep_Nn: np.ndarray) -> Any:
        value_N = 0.2 + keep_Nn @ effects_n
        return faithfulness.Values(value_N, value_N)

    random = np.random.default_rng(0)
    scores = np.stack([effects_n, *random.standard_normal((200, 6))])
    curves, comprehensiveness, sufficiency = faithfulness._rank_measures(scores, values)
    assert comprehensiveness[0] == comprehensiveness.max()
    assert sufficiency[0] == sufficiency.min()
    np.testing.assert_allclose(curves[:, 0], 0.8)
    np.testing.assert_allclose(curves[:, -1], 0.2)
    np.testing.assert_allclose(curves[0], [0.8, 0.5, 0.3, 0.15, 0.1, 0.1, 0.2], atol=1e-12)
    # The bins of 1, 5, 10, 20 and 50 % of 6 tokens hide 1, 1, 1, 2 and 3 tokens.
    np.testing.assert_allclose(comprehensiveness[0], np.mean([0.3, 0.3, 0.3, 0.5, 0.65]))
    np.testing.assert_allclose(sufficiency[0], np.mean([0.3, 0.3, 0.3, 0.1, -0.05]))
    subsets_Nn = random.random((50, 6)) < 0.5
    decrease_N = faithfulness._decrease(subsets_Nn, values)
    measure = lambda scores_n: faithfulness._infidelity(scores_n, subsets_Nn, decrease_N)
    assert measure(effects_n) < 1e-12
    assert measure(7 * effects_n) < 1e-12  # the scale of scores has no effect
    assert abs(measure(np.zeros(6)) - 1) < 1e-9
    assert 0 < measure(random.standard_normal(6)) < 1.001


@pytest.mark.long
def test_every_method_is_measured_with_random_scores(models):
    means = faithfulness.compare_methods(
        models["classes"], [TEXT, "a poor plot"], ("occlusion", "integrated_gradients"), draws=2
    )
    assert means.methods == ("occlusion", "integrated_gradients", "random")
    assert means.means.shape == (3, len(faithfulness.MEASURES))
    assert np.isfinite(means.means).all()
    assert means.texts == 2
    assert not means.better[-1].any()


# Attention


def test_rollout_mixes_the_layers():
    random = np.random.default_rng(0)
    weights_LHTS = random.dirichlet(np.ones(5), (3, 2, 5))
    total_TS = attention.rollout(weights_LHTS)
    np.testing.assert_allclose(total_TS.sum(1), 1)
    own = np.broadcast_to(np.eye(5), (3, 2, 5, 5))
    np.testing.assert_allclose(attention.rollout(own), np.eye(5))
    np.testing.assert_allclose(attention.rollout(weights_LHTS[:1]), 0.5 * weights_LHTS[0].mean(0) + 0.5 * np.eye(5))
    cross = attention.cross_rollout(weights_LHTS, random.dirichlet(np.ones(4), (3, 2, 5)), np.eye(4))
    assert cross.shape == (5, 9)
    np.testing.assert_allclose(cross.sum(1), 1)
    causal = np.tril(weights_LHTS)
    assert not np.triu(attention.rollout(causal / causal.sum(-1, keepdims=True)), 1).any()


def test_the_flow_of_two_layers_is_limited_by_each_edge():
    weights_LHTS = np.random.default_rng(0).dirichlet(np.ones(4), (2, 3, 4))
    first_TS, second_TS = attention.with_residual(weights_LHTS)
    for token in range(4):
        # All paths of two edges from a token to a state are disjoint.
        expected = np.minimum(second_TS[token][:, None], first_TS).sum(0)
        np.testing.assert_allclose(attention.flow(weights_LHTS, token), expected, atol=1e-5)


@pytest.mark.parametrize("name", fast("decoder", of=("classes", "decoder", "seq2seq")))
def test_attention_weights_have_the_shapes_of_the_text(models, name):
    stacks = attention.attention_weights(models[name], TEXT)
    names = ["encoder", "decoder", "cross-attention"] if name == "seq2seq" else [models[name].config.structure]
    assert [stack.name for stack in stacks] == names
    for stack in stacks:
        assert stack.weights_LHTS.shape == (len(stack.layers), 2, len(stack.written), len(stack.read))
        np.testing.assert_allclose(stack.weights_LHTS.sum(-1), 1, atol=1e-5)


# Pages and the command line


def test_a_text_with_scores_is_coloured_in_notebooks_and_pages():
    text = ScoredText("scores", ("a", " <b>", "##c"), (0.5, -1.0, 0.0), "note")
    page = text._repr_mimebundle_()[0]["text/html"]
    assert 'class="chip raises" style="--depth: 0.30" title="+0.5">a<' in page
    assert 'class="chip lowers" style="--depth: 0.60" title="-1">&lt;b&gt;<' in page
    assert 'class="chip neutral"' in page
    with pytest.raises(ValueError, match="2 tokens and 1 scores"):
        _ = ScoredText("scores", ("a", "b"), (1.0,)).chips


@pytest.mark.parametrize("name", fast("classes", of=("classes", "seq2seq", "decoder")))
def test_the_command_writes_a_page_and_the_numbers(models, name, tmp_path, capsys):
    jaxlm.save(models[name], tmp_path / "model")
    words = ["explain", str(tmp_path / "model"), "--text", TEXT, "--output", str(tmp_path / "out"), "--draws", "2"]
    words += ["--target", "bad"] if name == "classes" else ["--new-tokens", "2"]
    assert main([*words, "--layer", "1", "--head", "0", "--method", "integrated_gradients,occlusion"]) == 0
    printed = capsys.readouterr().out
    assert "comprehensiveness of occlusion" in printed
    numbers = json.loads((tmp_path / "out" / "explanation.json").read_text())
    first = numbers["attribution"]["targets"][0]
    assert set(first["methods"]) == {"integrated_gradients", "occlusion"}
    assert set(first["methods"]["occlusion"]["random"]) == set(faithfulness.MEASURES)
    assert len(first["methods"]["occlusion"]["scores"]) == len(numbers["attribution"]["tokens"])
    page = (tmp_path / "out" / "report.html").read_text()
    for part in ("random scores", "All heads", "Rollout", 'class="chip'):
        assert part in page
    stack, layers = ("encoder", 3) if name == "classes" else ("decoder", 2)
    with np.load(tmp_path / "out" / "explanation.npz") as arrays:
        assert arrays[f"{stack}_LHTS"].shape[:2] == (layers, 2)


# Wrong input

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {  # name -> model, arguments, message
    "unknown method": ("classes", {"method": "lime"}, "method is 'lime'"),
    "layer without number": ("classes", {"method": "layer_integrated_gradients"}, "the layers 0 to 2"),
    "layer of another method": ("classes", {"method": "occlusion", "layer": 3}, "layer is 3.*layers 0 to 2"),
    "unknown layer": ("classes", {"method": "layer_integrated_gradients", "layer": 3}, "layer is 3.*layers 0 to 2"),
    "negative layer": ("classes", {"method": "layer_integrated_gradients", "layer": -1}, "layer is -1"),
    "unknown label": ("classes", {"target": "goood"}, "not a label.*'good'"),
    "empty target": ("classes", {"target": " "}, "target is empty"),
    "unknown tag": ("tags", {"target": "B-Y"}, "not a tag of the model"),
    "unknown word": ("tags", {"word": 70}, "words 0 to 6"),
    "word of a class": ("classes", {"word": 1}, "only tags belong to words"),
    "new tokens of a class": ("classes", {"new_tokens": 2}, "only lm generates tokens"),
    "answer elsewhere": ("span", {"target": "director"}, "not in the text"),
    "remove a tag": ("tags", {"method": "occlusion", "replacement": "remove"}, "choose one of mask"),
    "remove everything": ("decoder", {"method": "shapley", "replacement": "remove"}, "nothing would be left"),
    "no mask": ("masked", {"text": TEXT}, r"has no \[MASK\]"),
    "unknown word for a mask": ("masked", {"target": "qqq"}, "has no tokens for"),
    "two tokens in a mask": ("masked", {"target": "good bad"}, "has [0-9]+ tokens"),
    "reference without token": ("decoder", {"reference": "mask"}, "no such token.*zero"),
    "unknown reference": ("classes", {"reference": "noise"}, "reference"),
    "long text": ("classes", {"text": "the film " * 30}, "more than the 40 tokens"),
    "long prompt": ("decoder", {"text": "the film " * 60}, "more than the 40"),
    "empty text": ("classes", {"text": "  "}, "is empty"),
    "empty prompt": ("decoder", {"text": ""}, "is empty"),
    "special tokens only": ("classes", {"text": "[SEP]"}, "no tokens"),
    "not a text": ("decoder", {"text": 7}, "reads one string"),
    "lone surrogate": ("decoder", {"text": "a\ud800"}, "surrogate"),
    "no steps": ("classes", {"steps": 0}, "steps"),
    "one order": ("classes", {"method": "shapley", "permutations": 1}, "permutations"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_errors_before_compilation(models, name):
    model, arguments, message = WRONG[name]
    lm = models[model]
    arguments = {"text": text_of(model)} | arguments
    with pytest.raises(UserError, match=message):
        attribute(lm, arguments.pop("text"), **arguments)


def test_models_that_cannot_be_explained_are_errors(models):
    lm = models["classes"]
    with pytest.raises(UserError, match="no tokenizer"):
        attribute(dataclasses.replace(lm, tokenizer=None), TEXT)
    with pytest.raises(UserError, match="give what jaxlm"):
        attribute("model", TEXT)
    headless = dataclasses.replace(lm, config=dataclasses.replace(lm.config, heads_on_top=()))
    with pytest.raises(UserError, match="has the head none"):
        attribute(headless, TEXT)
    with pytest.raises(UserError, match="mixer lstm, which has no attention"):
        attention.attention_weights(models["lstm"], TEXT)
    with pytest.raises(UserError, match="layer is 5; the model has attention in the layers 0 to 2"):
        explain(lm, TEXT, ["attention"], layer=5)
    with pytest.raises(UserError, match="head is 2; the model has attention in the heads 0 to 1"):
        explain(lm, TEXT, head=2)
    with pytest.raises(UserError, match="analyses contains 'atention'; perhaps you meant 'attention'"):
        explain(lm, TEXT, ["atention"])
    with pytest.raises(UserError, match="no argument 'layers'"):
        explain(lm, TEXT, layers=2)
    with pytest.raises(UserError, match="limited to 128"):
        attention.flow(np.ones((1, 1, 129, 129)), 0)


def test_the_command_refuses_the_folder_of_a_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").touch()
    assert main(["explain", "model", "--text", TEXT, "--output", str(tmp_path)]) == 2
    assert "the folder of a run" in capsys.readouterr().err
    assert main(["explain", "model"]) == 2
    assert "requires a text" in capsys.readouterr().err


@pytest.mark.long
def test_attention_maps_of_long_texts_are_larger(tmp_path):
    """So that 128 tokens have legible labels and 12 x 12 heads have a point for each token."""
    from jaxlm.reports.pictures import AttentionMap, HeadGrid, draw

    weights_LHTS = np.full((12, 12, 128, 128), 1 / 128, np.float32)
    width = lambda path: int.from_bytes(path.read_bytes()[16:20], "big")
    assert draw(HeadGrid("heads", weights_LHTS, tuple(range(12))), tmp_path / "heads.png")
    assert width(tmp_path / "heads.png") > 12 * 128
    tokens = ("token",) * 128
    assert draw(AttentionMap("map", weights_LHTS[0, 0], tokens, tokens), tmp_path / "map.png")
    assert width(tmp_path / "map.png") > 128 * 20
    with pytest.raises(ValueError, match="has 2 layers and weights of shape"):
        draw(HeadGrid("heads", weights_LHTS, (0, 1)), tmp_path / "heads.png")

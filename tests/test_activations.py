"""Activations: reading, editing, steering; patching; the logit lens; probes; nearest and influential examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import LM, TokenizerConfig, UserError
from jaxlm.config import ModelConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.explain import nearest, patching, probes
from jaxlm.explain.activations import steer, with_edit
from jaxlm.explain.examples import read_example
from jaxlm.explain.lens import logit_lens
from jaxlm.nn.sites import Site, layers_with, stacks_of
from jaxlm.nn.transformer import Transformer

_WORDS = "the a film story plot actor director is was has good bad new old great poor and but very never"
WORDS = _WORDS.split()
SIZES: dict[str, Any] = {"width": 16, "heads": 2, "mlp_width": 24, "max_length": 40, "layers": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "decoder": {"structure": "decoder", "heads_on_top": ("lm",), "positions": "rotary", "norm": "rmsnorm"},
    "masked": {"structure": "encoder", "heads_on_top": ("masked_lm",), "norm_place": "post", "embedding_norm": True},
    "classes": {"structure": "encoder", "heads_on_top": ("classes",), "labels": ("bad", "good"), "conv_width": 3},
    "seq2seq": {"structure": "encoder_decoder", "heads_on_top": ("lm",), "start_token": 0, "decoder_layers": 2},
    "parallel": {"structure": "decoder", "heads_on_top": ("lm",), "residual": "parallel"},
    "mixed": {
        "structure": "decoder", "heads_on_top": ("lm",), "layers": 4, "positions": "rotary",
        "mixers": ("attention", "gru"), "feed_forwards": ("gated", "none"),
    },
}  # fmt: skip


def fast(*names: str, of: Iterable[str]) -> list[Any]:
    """Returns the cases of a test; those that are not named take longer and are marked."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.long) for name in of]


@pytest.fixture(scope="module")
def models() -> dict[str, LM]:
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(WORDS, random.integers(4, 9))) for _ in range(200)]
    words = {"bpe": tokenizers.train(lines, TokenizerConfig(train="byte_bpe"), 300)}
    words["wordpiece"] = tokenizers.train(lines, TokenizerConfig(train="wordpiece"), 80)
    built = {}
    for name, fields in CONFIGS.items():
        tokenizer = words["wordpiece" if fields["structure"] == "encoder" else "bpe"]
        config = ModelConfig(vocabulary=tokenizer.size, **(SIZES | {"biases": ()} | fields))
        built[name] = LM(config, Transformer(config), random_params(config), tokenizer)
    return built


def tokens(lm: LM, count: int = 7) -> np.ndarray:
    return np.random.default_rng(1).integers(5, lm.config.vocabulary, (2, count)).astype(np.int32)


def stack_outputs(output: Any, stack: str) -> Any:
    return getattr(output, stack).activations


# The sites


@pytest.mark.parametrize("name", fast("decoder", "classes", "mixed", of=CONFIGS))
def test_activations_have_the_layers_of_their_sites_and_do_not_change_the_output(models, name):
    lm = models[name]
    plain, read = lm(tokens(lm)), lm(tokens(lm), activations=True, states=True)
    np.testing.assert_allclose(plain.logits, read.logits, atol=1e-5)
    for stack in stacks_of(lm.config):
        found = stack_outputs(read, stack)
        assert {part: len(value) for part, value in found.items()} == {
            part: len(layers) for part, layers in layers_with(lm.config, stack).items()
        }
        np.testing.assert_allclose(found["residual"][:-1], getattr(read, stack).states_LBTD[1:-1], atol=1e-6)


@pytest.mark.parametrize("name", fast("decoder", "classes", "mixed", of=CONFIGS))
def test_an_edit_sees_every_site_once_and_the_identity_changes_nothing(models, name):
    lm, seen = models[name], []

    def edit(site: Site, layer: Any, value: jax.Array) -> jax.Array:
        seen.append(site)
        return value

    np.testing.assert_allclose(with_edit(lm, edit)(tokens(lm)).logits, lm(tokens(lm)).logits, atol=1e-5)
    expected = {Site(stack, part) for stack in stacks_of(lm.config) for part in layers_with(lm.config, stack)}
    assert set(seen) == expected


@pytest.mark.parametrize("name", fast("decoder", of=("decoder", "seq2seq")))
def test_steering_changes_the_states_after_the_layer_and_generated_texts_as_well_as_calls(models, name):
    lm = models[name]
    vector_D = np.random.default_rng(2).normal(size=16).astype(np.float32) * 20
    steered = steer(lm, vector_D, 1)
    before, after = (some(tokens(lm), activations=True).decoder.activations["residual"] for some in (lm, steered))
    np.testing.assert_allclose(before[0], after[0], atol=1e-6)
    np.testing.assert_allclose(before[1] + vector_D, after[1], rtol=1e-4, atol=1e-4)
    [text] = jaxlm.generate(
        steered, [[5, 6, 7]], jaxlm.Decoding(max_new_tokens=4, temperature=0), return_tokens=True, stop_tokens=()
    )
    read = [5, 6, 7, *text] if name == "decoder" else [5, 6, 7]
    more = {} if name == "decoder" else {"target_tokens_BT": np.array([[0, *text]])}
    logits_TV = steered(np.array([read]), **more).logits[0, -5 if name == "seq2seq" else 2 :]
    assert logits_TV[: len(text), : lm.vocabulary].argmax(-1).tolist() == text  # cached = uncached


@pytest.mark.long
def test_an_edit_is_part_of_the_derivative(models):
    """The gradient with respect to a vector that is added inside a jitted function."""
    lm = models["masked"]

    def loss(vector_D: jax.Array) -> jax.Array:
        edit = lambda site, n, x: jnp.where(n == 1, x + vector_D, x) if site.part == "attention" else x
        return (
            with_edit(lm, edit)
            .apply(jax.tree.map(jnp.asarray, lm.params), tokens(lm))
            .logits.astype(jnp.float32)[..., 6]
            .sum()
        )

    zero_D, step_D = jnp.zeros(16), 1e-2 * jax.random.normal(jax.random.key(0), (16,))
    slope = jax.jit(jax.grad(loss))(zero_D) @ step_D
    np.testing.assert_allclose(slope, (loss(step_D) - loss(-step_D)) / 2, rtol=2e-2)


def test_packed_rows_have_the_activations_of_separate_rows(models):
    lm = models["decoder"]
    tokens_2T = tokens(lm, 5)
    positions_BT, segments_BT = np.tile(np.arange(5), 2)[None], np.repeat([[1, 2]], 5, 1)
    packed = lm(tokens_2T.reshape(1, 10), segments_BT=segments_BT, positions_BT=positions_BT, activations=True)
    separate = lm(tokens_2T, activations=True)
    for part, value in packed.decoder.activations.items():
        expected = separate.decoder.activations[part]
        np.testing.assert_allclose(value.reshape(expected.shape), expected, atol=1e-4)


# Patching

TEXTS = {
    "decoder": ("the film is good", "the film is poor"),
    "masked": ("the film is [MASK] but good", "the film but [MASK] is good"),
    "classes": ("the film is very good", "very good is the film"),
    "seq2seq": ("the film is good", "the film is poor"),
}
ANSWERS = {"decoder": ("a", "b"), "masked": ("new", "old"), "classes": ("bad", "good"), "seq2seq": ("a", "b")}


@pytest.mark.parametrize("name", fast("classes", of=TEXTS))
def test_patching_all_positions_of_a_layer_restores_the_clean_output(models, name):
    """For the residual stream of every layer, in an encoder-decoder of the encoder, which the decoder reads.

    All heads together have the effect of the output of attention.
    """
    lm = models[name]
    contrast = patching.read_contrast(lm, *TEXTS[name], ANSWERS[name])
    stack = stacks_of(lm.config)[0]
    layers = layers_with(lm.config, stack)["residual"]
    patches = [patching.Patch(Site(stack, "residual"), n) for n in layers]
    patches += [patching.Patch(Site(stack, part), 1) for part in ("heads", "attention")]
    clean, corrupted, values = patching.patched_values(contrast, patches)
    assert abs(clean - corrupted) > 1e-3
    np.testing.assert_allclose(values[: len(layers)], clean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(values[-2], values[-1], rtol=1e-4, atol=1e-4)


def test_a_patch_of_a_decoder_has_no_effect_before_the_texts_differ(models):
    lm = models["decoder"]
    result = patching.patch(lm, *TEXTS["decoder"], ANSWERS["decoder"])
    first = next(n for n, piece in enumerate(result.pieces["decoder"]) if "|" in piece)
    by_part = {grid.site.part: grid.restored for grid in result.grids}
    np.testing.assert_allclose(by_part["residual"][:, :first], 0, atol=1e-4)
    np.testing.assert_allclose(by_part["residual"][-1, -1], 1, rtol=1e-4)
    assert by_part["heads"].shape == (3, 2)
    assert len(lm.programs) <= 32


# The logit lens


@pytest.mark.parametrize("name", fast("decoder", of=("decoder", "masked", "seq2seq", "mixed")))
def test_the_last_row_of_the_lens_is_the_output_of_the_model(models, name):
    lm = models[name]
    text = TEXTS["masked" if name == "masked" else "decoder"][0]
    result = logit_lens(lm, text)
    layers = layers_with(lm.config, stacks_of(lm.config)[-1])["residual"]
    assert result.tokens_LT.shape == (len(layers) + 1, len(result.pieces))
    row = lm.tokens(text) if name == "masked" else np.array([lm.tokenizer.encode(text)])
    inputs = {"target_tokens_BT": np.array([[0]])} if name == "seq2seq" else {}
    if name == "masked":
        row = patching.rows_of(read_example(lm, text)).tokens_BT
    elif name == "seq2seq":
        row = read_example(lm, text).tokens_T[None]
    p_TV = jax.nn.softmax(lm(row, **inputs).logits[0, :, : lm.vocabulary])
    np.testing.assert_array_equal(result.tokens_LT[-1], p_TV.argmax(-1))
    np.testing.assert_allclose(result.probability_LT[-1], p_TV.max(-1), rtol=1e-4)
    np.testing.assert_allclose(result.kl_LT[-1], 0, atol=1e-6)
    assert (result.rank_LT[-1] == 1).all() and (result.kl_LT[:-1] >= -1e-5).all()


def test_the_lens_of_the_last_layer_equals_the_output_if_the_last_layer_adds_nothing(models):
    """The final norm is applied to earlier states as to the last one."""
    lm = models["decoder"]
    zero = lambda site, n, x: jnp.where(n == 2, 0, x).astype(x.dtype) if site.part in ("attention", "mlp") else x
    result = logit_lens(with_edit(lm, zero), "the film is good")
    np.testing.assert_allclose(result.kl_LT[-2], 0, atol=1e-5)
    assert result.kl_LT[0].max() > 1e-3


def test_the_lens_requires_a_head_over_the_vocabulary(models):
    with pytest.raises(UserError, match="requires a head over the vocabulary"):
        logit_lens(models["classes"], "the film")
    with pytest.raises(UserError, match="leave it out"):
        logit_lens(models["masked"], "the film", target="good")


# Probes


def sentences(count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """Returns sentences whose tags are functions of the first letters of the words."""
    random = np.random.default_rng(seed)
    drawn = [[str(word) for word in random.choice(WORDS, 6)] for _ in range(count)]
    return [(words, ["A" if word < "h" else "B" for word in words]) for words in drawn]


def test_a_probe_reads_tags_that_depend_on_the_first_token_in_the_embeddings(models):
    result = probes.probe(models["masked"], sentences(60, 0), sentences(20, 1))
    assert result.accuracy.shape == result.control.shape == (4,)
    assert result.accuracy[0] > result.majority + 0.1  # 16 features do not separate all words
    assert result.words == (360, 120) and result.labels == ("A", "B")
    np.testing.assert_allclose(result.selectivity, result.accuracy - result.control)


def test_hidden_states_of_words_do_not_depend_on_the_other_sentences(models):
    lm, several = models["masked"], [words for words, _ in sentences(9, 0)]
    together, _ = probes.word_states(lm, several)
    alone, numbers = probes.word_states(lm, several[4:5])
    np.testing.assert_allclose(together[-1][24:30], alone[-1], atol=1e-4)
    assert numbers.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("training", "choices", "message"),
    [
        ([], {}, "training has no words"),
        ([(["a"], ["X"]), (["b"], ["X"])], {}, "at least two tags"),
        ([(["a", "b"], ["X"])], {}, "2 words and 1 tags"),
        ([["a", "b", "c"]], {}, "give \\(words, tags\\)"),
        ([([1], ["X"])], {}, "strings"),
        ("a text", {}, "list of sentences"),
        (sentences(2, 0), {"inverse_penalty": 0}, "above 0"),
        (sentences(2, 0), {"max_words": 0}, "max_words"),
    ],
)
def test_probes_name_what_is_wrong(models, training, choices, message):
    with pytest.raises(UserError, match=message):
        probes.probe(models["decoder"], training, sentences(2, 0), **choices)


# Wrong input

BAD = [
    (("the film", "the film is very new"), {}, "the clean text has"),
    (("the film", "the film"), {}, "the same tokens"),
    (TEXTS["decoder"], {"answers": ("a", "a")}, "both answers are"),
    (TEXTS["decoder"], {"answers": ("a",)}, "give two strings"),
    (TEXTS["decoder"], {"answers": ("a", "good film story plot")}, "tokens"),
    (TEXTS["decoder"], {"parts": ("residula",)}, "residual"),
    (TEXTS["decoder"], {"parts": ("cross_attention",)}, "no layer of the decoder has"),
    (TEXTS["decoder"], {"parts": ()}, "parts is empty"),
    (("", "the film"), {}, "empty"),
]


@pytest.mark.parametrize(("texts", "choices", "message"), BAD)
def test_patching_names_what_is_wrong(models, texts, choices, message):
    with pytest.raises(UserError, match=message):
        patching.patch(models["decoder"], *texts, **choices)


def test_patching_checks_labels_and_masks(models):
    with pytest.raises(UserError, match="not a label"):
        patching.patch(models["classes"], *TEXTS["classes"], ("good", "bda"))
    with pytest.raises(UserError, match="put it at one place"):
        patching.patch(models["masked"], "the film is good", "good is the film")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"layer": 3}, "0 to 2"),
        ({"layer": -1}, "layer"),
        ({"part": "mpl"}, "mlp"),
        ({"stack": "encoder"}, "the model has decoder"),
        ({"vector_D": np.ones(3)}, "requires"),
        ({"vector_D": np.full(16, np.nan)}, "NaN"),
    ],
)
def test_steering_names_what_is_wrong(models, choices, message):
    with pytest.raises(UserError, match=message):
        steer(models["decoder"], **({"vector_D": np.ones(16), "layer": 0} | choices))


def test_an_edit_must_be_a_function_and_keep_shapes(models):
    with pytest.raises(UserError, match="give a function"):
        with_edit(models["decoder"], 3)
    with pytest.raises(UserError, match="returns an array of shape"):
        with_edit(models["decoder"], lambda site, n, x: x[:, :1])(tokens(models["decoder"]))


# Nearest and influential training examples


def test_influence_ranks_examples_as_training_the_last_layer_without_each_of_them(models):
    """The exact change of the loss: the logistic regression is trained again without the example."""
    random = np.random.default_rng(0)
    N, damping = 40, 0.05
    h_ND = random.normal(size=(N, 3))
    y_N = (h_ND @ [1.0, -1, 0.5] + random.normal(size=N) > 0).astype(int)
    h_D, y = random.normal(size=3), 1

    def train(rows: np.ndarray) -> np.ndarray:
        """Newton's method for the mean cross-entropy over all N plus the penalty; the bias is penalised too."""
        x, labels, weights = np.hstack([h_ND, np.ones((N, 1))])[rows], np.eye(2)[y_N[rows]], np.zeros((2, 4))
        for _ in range(30):
            p = _softmax(x @ weights.T)
            gradient = (p - labels).T @ x / N + damping * weights
            weights -= nearest.hessian_product(x, p, gradient * N / len(x), damping * N / len(x))
        return weights

    full, everyone = train(np.arange(N)), np.arange(N)
    loss = lambda weights: -np.log(_softmax(np.append(h_D, 1) @ weights.T))[y]
    exact = np.array([loss(train(np.delete(everyone, n))) - loss(full) for n in range(N)])
    probabilities = _softmax(np.hstack([h_ND, np.ones((N, 1))]) @ full.T)
    example = h_D, _softmax(np.append(h_D, 1) @ full.T), y
    scores = nearest.last_layer_influence(h_ND, probabilities, y_N, example, damping)
    rank = lambda values: np.argsort(np.argsort(values))
    assert np.corrcoef(rank(scores), rank(exact))[0, 1] > 0.98
    np.testing.assert_allclose(scores, exact, atol=0.2 * np.abs(exact).max())
    products = nearest.last_layer_influence(h_ND, probabilities, y_N, example, None)
    assert np.corrcoef(rank(products), rank(exact))[0, 1] > 0.6


def _softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.mark.long
def test_the_gradient_of_the_last_layer_is_the_product_of_error_and_input(models):
    """Gradients of jax.grad through the whole model."""
    lm = models["classes"]
    texts = ["the film is good", "very poor plot"]
    examples = [read_example(lm, text) for text in texts]
    h_ND, p_NC = nearest.last_layer_inputs(lm, examples)
    params = jax.tree.map(jnp.asarray, lm.params)

    def loss(out: Any, tokens_T: np.ndarray) -> jax.Array:
        head = {**params["classes_head"], "out": out}
        return -jax.nn.log_softmax(lm.apply({**params, "classes_head": head}, tokens_T[None]).logits[0])[1]

    gradients = [jax.grad(loss)(params["classes_head"]["out"], example.tokens_T) for example in examples]
    for gradient, h_D, p_C in zip(gradients, h_ND, p_NC):
        np.testing.assert_allclose(gradient["kernel"], np.outer(h_D, p_C - [0, 1]), atol=1e-5)


def test_the_nearest_example_of_a_training_text_is_itself(models):
    lm = models["classes"]
    training = ["the film is good", "a great story", "very poor plot", "old and never new"]
    found = nearest.nearest_examples(lm, training[2], training, 2)
    assert found.nearest[0] == 2 and len(found.nearest) == 2
    np.testing.assert_allclose(found.scores[2], 1, rtol=1e-5)
    pairs = [(text, "good" if n % 2 else "bad") for n, text in enumerate(training)]
    influences = nearest.influential_examples(lm, training[2], pairs, "bad", count=2)
    assert influences.nearest[0] == influences.scores.argmax() and influences.farthest[0] == influences.scores.argmin()
    assert influences.scores[2] > 0  # the example itself is helpful


PAIRS = [("the film", "good"), ("the plot", "bad")]


@pytest.mark.parametrize(
    ("training", "choices", "message"),
    [
        ([], {}, "training has no examples"),
        ([("the film", "god")], {}, "good"),
        (PAIRS, {"label": "worse"}, "not one of the model"),
        (PAIRS, {"damping": 0.0}, "above 0"),
        (PAIRS, {"count": 0}, "count"),
        (["the film"], {}, "give \\(text, label\\)"),
        ("file.csv", {}, "one string"),
    ],
)
def test_influence_names_what_is_wrong(models, training, choices, message):
    with pytest.raises(UserError, match=message):
        nearest.influential_examples(models["classes"], "the film", training, **choices)


def test_nearest_examples_name_what_is_wrong(models):
    with pytest.raises(UserError, match="no examples"):
        nearest.nearest_examples(models["classes"], "the film", [])
    with pytest.raises(UserError, match="requires several classes"):
        nearest.influential_examples(models["masked"], "the film", PAIRS)

"""Scores of the tokens of a text for a prediction: gradients, integrated gradients, occlusion and Shapley values."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import Annotated, Any, NamedTuple

import numpy as np

from jaxlm.config.arguments import check_model
from jaxlm.config.ranges import Range, check_argument
from jaxlm.errors import UserError, suggestion
from jaxlm.explain.examples import read_example
from jaxlm.explain.prediction import (
    PathPoint,
    Prediction,
    check_differentiable,
    choose_reference,
    choose_replacement,
    path_scores,
    predict_target,
    replacement_for,
    values_of,
)
from jaxlm.explain.targets import Target, names_of
from jaxlm.lm import LM

FIRST_STEPS, MAX_STEPS = 32, 512  # of integrated gradients, if the number is chosen by the error
MAX_ERROR = 0.01  # of the sum of integrated gradients, as a fraction of the change of the target
PERMUTATIONS = 32  # of Shapley values

Steps = Annotated[int, Range(1, 10_000)]
Samples = Annotated[int, Range(2, 100_000)]
Seed = Annotated[int, Range(0, 2**31 - 1)]


class Attribution(NamedTuple):
    """The scores of the tokens of a text for one prediction, or for each predicted token.

    Attributes:
      method: name of the method.
      targets: names of the Q targets.
      tokens: the pieces of the T tokens.
      is_text_T: False for special tokens.
      scores_QT: positive for tokens that raise the value of the target.
      values_Q: the target for the text.
      references_Q: the target for the reference, in which no token of the text is left; NaN for gradient_x_input and
        occlusion, which do not compare with it.
      errors_Q: completeness: |sum of scores - (value - reference)| / |value - reference|; NaN without a reference.
      reference: what takes the place of a token: remove, mask, padding, unknown or zero.
      steps: number of gradients or permutations; 0 for other methods.
    """

    method: str
    targets: tuple[str, ...]
    tokens: tuple[str, ...]
    is_text_T: np.ndarray
    scores_QT: np.ndarray
    values_Q: np.ndarray
    references_Q: np.ndarray
    errors_Q: np.ndarray
    reference: str
    steps: int = 0


class Settings(NamedTuple):
    """The settings of the methods; `attribute` describes them."""

    layer: int | None = None
    reference: str | None = None
    replacement: str | None = None
    steps: int | None = None
    permutations: int = PERMUTATIONS
    seed: int = 0


class _Scores(NamedTuple):
    scores_T: np.ndarray
    value: float
    reference: float = math.nan
    steps: int = 0


def attribute(
    lm: LM | Prediction,
    text: Any = None,
    *,
    method: str = "integrated_gradients",
    target: str | Target | None = None,
    word: int | None = None,
    new_tokens: int = 1,
    layer: int | None = None,
    reference: str | None = None,
    replacement: str | None = None,
    steps: int | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    task: Any = None,
) -> Attribution:
    """Returns how much each token of a text contributes to a prediction.

    Gradients are taken with respect to word embeddings, before positions and norms are added, so that the scores equal
    those of captum for `model.get_input_embeddings()`.

    Args:
      lm: the model, or a prediction that `predict_target` returned; then `text`, `target`, `word`, `new_tokens` and
        `task` have no effect.
      text: a text, or what `jaxlm.predict` accepts as an example.
      method: a name in `METHODS`.
      target: what to explain, as for `predict_target`; None: the prediction of the model.
      word: for tags, the number of the word from 0.
      new_tokens: for the head lm without a target, the number of tokens to generate and explain.
      layer: for layer_integrated_gradients, the layer whose output is integrated over, from 0. In an encoder-decoder
        it is a layer of the encoder.
      reference: the embedding where the path of integrated gradients begins, for every token of the text: mask,
        padding, unknown (tokens) or zero (the vector). None: padding, or zero without such a token.
      replacement: what takes the place of a token in occlusion and shapley: remove, or as `reference`. None: remove,
        or the default reference where the target belongs to a token or the text has no special tokens.
      steps: number of gradients of integrated gradients (Gauss-Legendre). None: as many as the error requires.
      permutations: number of orders of the tokens for shapley; all orders, if there are not more.
      seed: for the orders.
      task: the config of a task; None: that of the model.

    Returns:
      The scores.

    Raises:
      UserError: for an unknown method or target, a layer that does not exist, a text that the model cannot read as a
        whole, and a method that the model or its target does not support.

    Sources: Sundararajan et al. 2017 (integrated gradients), Li et al. 2016 (occlusion), Castro et al. 2009 (sampling
    of Shapley values).
    """
    if method not in METHODS:
        raise UserError(f"method is {method!r}{suggestion(str(method), METHODS)}")
    settings = Settings(layer, reference, replacement, steps, permutations, seed)
    model = lm.lm if isinstance(lm, Prediction) else lm
    check_model("the model", model)
    check_settings(model, method, settings)
    if not isinstance(lm, Prediction):
        if method not in GRADIENTS:
            replacement_for(lm, read_example(lm, text, task), replacement)
        lm = predict_target(lm, text, target=target, word=word, new_tokens=new_tokens, task=task)
    return attribute_prediction(lm, method, settings)


def check_settings(lm: LM, method: str, settings: Settings) -> None:
    """Raises UserError for settings that the model or the method does not support."""
    layers = lm.config.layers
    layer = check_argument("layer", settings.layer, int | None)
    check_argument("steps", settings.steps, Steps | None)
    check_argument("permutations", settings.permutations, Samples)
    check_argument("seed", settings.seed, Seed)
    if layer is not None and not 0 <= layer < layers:
        raise UserError(f"layer is {layer}; the model has the layers 0 to {layers - 1}")
    if layer is None and method == "layer_integrated_gradients":
        raise UserError(f"layer_integrated_gradients requires a layer; the model has the layers 0 to {layers - 1}")
    if method in GRADIENTS:
        check_differentiable(lm)
        if lm.tokenizer is not None:
            choose_reference(lm, settings.reference)


def attribute_prediction(prediction: Prediction, method: str, settings: Settings) -> Attribution:
    """Returns the attribution of a prediction by a method with settings that `check_settings` accepts."""
    example = prediction.example
    replaces = method not in GRADIENTS
    choose = choose_replacement if replaces else lambda own, name: choose_reference(own.lm, name)
    reference = choose(prediction, settings.replacement if replaces else settings.reference)
    results = [METHODS[method](prediction, target, reference, settings) for target in prediction.targets]
    scores_QT = np.stack([result.scores_T for result in results])
    values_Q, references_Q = (np.array([getattr(r, name) for r in results]) for name in ("value", "reference"))
    change_Q = values_Q - references_Q
    errors_Q = np.abs(scores_QT.sum(1) - change_Q) / np.maximum(np.abs(change_Q), 1e-12)
    steps = max(result.steps for result in results)
    own = "zero" if method == "gradient_x_input" else reference
    names = names_of(prediction.targets)
    rest = scores_QT, values_Q, references_Q, errors_Q, own, steps
    return Attribution(method, names, example.pieces, example.is_text_T, *rest)


def _gradient_x_input(prediction: Prediction, target: Target, reference: str, settings: Settings) -> _Scores:
    """Gradient x input: the first-order effect of setting a word embedding to zero (Shrikumar et al. 2016)."""
    point = PathPoint(np.ones(1), np.ones(1))
    scores_T, values = path_scores(prediction, target, point, "zero", whole=True)
    return _Scores(scores_T, values[0], steps=1)


def _integrated_gradients(
    prediction: Prediction, target: Target, reference: str, settings: Settings, layer: int | None = None
) -> _Scores:
    """Integrated gradients on the straight line from the reference (Sundararajan et al. 2017, equation 1)."""
    path = lambda points: path_scores(prediction, target, points, reference, layer=layer)
    _, (start, end) = path(PathPoint(np.array([0.0, 1.0]), np.zeros(2)))
    steps = settings.steps or FIRST_STEPS
    while True:
        scores_T, _ = path(gauss_legendre(steps))
        error = abs(scores_T.sum() - (end - start)) / max(abs(end - start), 1e-12)
        if settings.steps or error <= MAX_ERROR or 2 * steps > MAX_STEPS:
            return _Scores(scores_T, end, start, steps)
        steps *= 2


def _layer_integrated_gradients(prediction: Prediction, target: Target, reference: str, settings: Settings) -> _Scores:
    """Integrated gradients over the hidden states after a layer, from those of the reference."""
    return _integrated_gradients(prediction, target, reference, settings, settings.layer)


def gauss_legendre(steps: int) -> PathPoint:
    """Returns the nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    nodes_N, weights_N = np.polynomial.legendre.leggauss(steps)
    return PathPoint((nodes_N + 1) / 2, weights_N / 2)


def _occlusion(prediction: Prediction, target: Target, replacement: str, settings: Settings) -> _Scores:
    """The decrease of the target if one token is hidden (Li et al. 2016)."""
    text = np.flatnonzero(prediction.example.is_text_T)
    T = len(prediction.example.tokens_T)
    keep_NT = np.ones((len(text) + 1, T), bool)
    keep_NT[1 + np.arange(len(text)), text] = False
    values = values_of(prediction, target, keep_NT, replacement).scores
    scores_T = np.zeros(T)
    scores_T[text] = values[0] - values[1:]
    return _Scores(scores_T, values[0])


def _shapley(prediction: Prediction, target: Target, replacement: str, settings: Settings) -> _Scores:
    """Shapley values: the mean effect of adding a token to those before it, over orders (Castro et al. 2009).

    Half of the orders are the reverse of the others, which reduces the variance (Mitchell et al. 2022).
    """
    text = np.flatnonzero(prediction.example.is_text_T)
    T, n = len(prediction.example.tokens_T), len(text)
    orders = token_orders(n, settings.permutations, settings.seed)
    keep = np.ones((len(orders), n + 1, T), bool)
    keep[:, :, text] = False
    for i, order in enumerate(orders):
        for k, token in enumerate(order):
            keep[i, k + 1 :, text[token]] = True
    values = values_of(prediction, target, keep.reshape(-1, T), replacement).scores.reshape(len(orders), n + 1)
    gains, scores_T = np.diff(values, axis=1), np.zeros(T)
    for order, gain in zip(orders, gains):
        scores_T[text[np.array(order)]] += gain / len(orders)
    return _Scores(scores_T, values[0, -1], values[0, 0], len(orders))


def token_orders(n: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Returns orders of n tokens: all of them if there are at most `count`, else random ones and their reverses."""
    if math.factorial(min(n, 12)) <= count:
        return list(permutations(range(n)))
    random = np.random.default_rng(seed)
    drawn = [tuple(random.permutation(n).tolist()) for _ in range((count + 1) // 2)]
    return [order for one in drawn for order in (one, one[::-1])]


METHODS: dict[str, Callable[..., _Scores]] = {
    "integrated_gradients": _integrated_gradients,
    "gradient_x_input": _gradient_x_input,
    "layer_integrated_gradients": _layer_integrated_gradients,
    "occlusion": _occlusion,
    "shapley": _shapley,
}
GRADIENTS = ("integrated_gradients", "gradient_x_input", "layer_integrated_gradients")

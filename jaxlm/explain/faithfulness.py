"""Measures of faithfulness: whether the tokens with high scores are those that the prediction depends on.

Each measure is also computed for random scores. An attribution that is no better than them explains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np

from jaxlm.config.arguments import check_list
from jaxlm.config.ranges import Range, check_argument
from jaxlm.errors import UserError, suggestion
from jaxlm.explain.attribution import METHODS, Attribution, Settings, attribute_prediction, check_settings
from jaxlm.explain.prediction import Prediction, Values, choose_replacement, predict_target, values_of
from jaxlm.lm import LM

BINS = (0.01, 0.05, 0.10, 0.20, 0.50)  # fractions of the tokens (DeYoung et al. 2020, section 5.2)
DRAWS = 10  # random attributions of a text
SUBSETS = 64  # random sets of tokens for infidelity
MEASURES = {  # name -> whether higher is better
    "comprehensiveness": True,
    "sufficiency": False,
    "aopc": True,
    "infidelity": False,
}
RANDOM = "random"
_DEFAULTS = Settings()

Draws = Annotated[int, Range(1, 10_000)]


class Faithfulness(NamedTuple):
    """The measures of an attribution, and of random scores for the same tokens.

    Attributes:
      method: name of the method.
      replacement: what took the place of hidden tokens.
      comprehensiveness: mean decrease of the probability if the tokens with the highest scores are hidden, over the
        fractions `BINS`; higher is better.
      sufficiency: mean decrease if only these tokens are left; lower is better.
      aopc: mean decrease while tokens are hidden from the highest score to the lowest, over the points of the curve.
      infidelity: mean squared difference between the sum of the scores of a random set of tokens, times the best
        factor, and the decrease of the target without them, divided by the mean square of this decrease; 0 is exact
        and 1 is no better than scores of 0.
      hidden_N: numbers of hidden tokens, from none to all, at most 11.
      curve_N: the probability without these numbers of tokens with the highest scores.
      random: the same measures for random scores, a row for each draw and a column for each of `MEASURES`.
      random_curve_N: the mean of their curves.
    """

    method: str
    replacement: str
    comprehensiveness: float
    sufficiency: float
    aopc: float
    infidelity: float
    hidden_N: np.ndarray
    curve_N: np.ndarray
    random: np.ndarray
    random_curve_N: np.ndarray


def measure_faithfulness(
    prediction: Prediction,
    attributions: Sequence[Attribution],
    *,
    replacement: str | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    number: int = 0,
) -> tuple[Faithfulness, ...]:
    """Returns how well the scores of each attribution predict the effect of hiding tokens.

    Args:
      prediction: the prediction.
      attributions: its attributions.
      replacement: what takes the place of a hidden token, as for `attribute`.
      draws: number of random attributions.
      seed: for the random scores and the random sets of tokens, which are the same for all attributions.
      number: the target, for a text that is predicted token by token.

    Raises:
      UserError: for a replacement that the target does not support, and an attribution of another text.

    Sources: DeYoung et al. 2020 (comprehensiveness, sufficiency; here the mean over the bins, without the empty bin of
    their equation 3), Samek et al. 2017 (AOPC), Yeh et al. 2019 (infidelity).
    """
    draws = check_argument("draws", draws, Draws)
    if any(one.tokens != prediction.example.pieces for one in attributions):
        raise UserError("an attribution belongs to another text; compute it for this prediction")
    replacement = choose_replacement(prediction, replacement)
    target, text = prediction.targets[number], _readable_tokens(prediction, number)
    T = len(prediction.example.tokens_T)

    def values(keep_Nn: np.ndarray) -> Values:
        """Returns the values for variants in which some of the tokens `text` are hidden; equal ones run once."""
        distinct_Nn, place_N = np.unique(keep_Nn, axis=0, return_inverse=True)
        keep_NT = np.ones((len(distinct_Nn), T), bool)
        keep_NT[:, text] = distinct_Nn
        found = values_of(prediction, target, keep_NT, replacement)
        return Values(*(x_N[place_N.ravel()] for x_N in found))

    random, count = np.random.default_rng(seed), len(attributions)
    own = [one.scores_QT[number, text] for one in attributions]
    scores = np.stack([*own, *random.standard_normal((draws, len(text)))])
    curves, comprehensiveness, sufficiency = _rank_measures(scores, values)
    subsets_Nn = random.random((SUBSETS, len(text))) < random.random((SUBSETS, 1))
    decrease_N = _decrease(subsets_Nn, values)
    infidelity = np.array([_infidelity(row, subsets_Nn, decrease_N) for row in scores])
    aopc = (curves[:, :1] - curves).mean(1)
    table = np.stack([comprehensiveness, sufficiency, aopc, infidelity], 1)
    of_random = table[count:], curves[count:].mean(0)
    points = hidden_counts(len(text))
    return tuple(
        Faithfulness(
            one.method,
            replacement,
            **dict(zip(MEASURES, table[i].tolist())),
            hidden_N=points,
            curve_N=curves[i],
            random=of_random[0],
            random_curve_N=of_random[1],
        )
        for i, one in enumerate(attributions)
    )


def _readable_tokens(prediction: Prediction, number: int) -> np.ndarray:
    """Returns the places of the tokens of the text that the target can depend on: in a decoder, those before it."""
    example, target = prediction.example, prediction.targets[number]
    text = np.flatnonzero(example.is_text_T)
    causal = prediction.lm.config.heads_on_top[:1] == ("lm",)
    return text[text <= target.place] if causal and target.place is not None else text


def _rank_measures(scores: np.ndarray, values: Callable[[np.ndarray], Values]) -> tuple[np.ndarray, ...]:
    """Returns curves [N, points], comprehensiveness [N] and sufficiency [N] for N scores of n tokens."""
    n, points = scores.shape[1], hidden_counts(scores.shape[1])
    rank = np.argsort(np.argsort(-scores, 1, kind="stable"), 1)  # 0 for the highest score
    counts = np.array([max(1, int(np.ceil(part * n))) for part in BINS])
    first = lambda numbers: rank[:, None, :] < numbers[None, :, None]  # [N, numbers, n]
    keep = np.concatenate([~first(points), ~first(counts), first(counts)], 1)
    probabilities = values(keep.reshape(-1, n)).probabilities.reshape(keep.shape[:2])
    curves, without, only = np.split(probabilities, [len(points), len(points) + len(counts)], 1)
    full = curves[:, :1]
    return curves, (full - without).mean(1), (full - only).mean(1)


def hidden_counts(n: int) -> np.ndarray:
    """Returns the numbers of hidden tokens at the points of a curve over n tokens: tenths of the tokens."""
    return np.unique(np.round(np.linspace(0, n, min(n, 10) + 1)).astype(int))


def _decrease(subsets_Nn: np.ndarray, values: Callable[[np.ndarray], Values]) -> np.ndarray:
    """Returns the decrease of the target without each set of tokens [N]."""
    full = np.ones((1, subsets_Nn.shape[1]), bool)
    scores = values(np.concatenate([full, ~subsets_Nn])).scores
    return scores[0] - scores[1:]


def _infidelity(scores_n: np.ndarray, subsets_Nn: np.ndarray, decrease_N: np.ndarray) -> float:
    """Returns infidelity with the factor of the scores that minimises it, relative to scores of 0."""
    sums_N = subsets_Nn @ scores_n
    square, total = float(sums_N @ sums_N), float(decrease_N @ decrease_N)
    factor = float(sums_N @ decrease_N) / square if square else 0.0
    return float(((factor * sums_N - decrease_N) ** 2).sum()) / total if total else 0.0


class MethodMeans(NamedTuple):
    """The measures of the methods over many texts.

    Attributes:
      methods: names of the M methods; the last is `RANDOM`.
      means: the mean of each measure, [M, 4], in the order of `MEASURES`.
      errors: standard errors of these means over the texts.
      better: fraction of the texts in which a method has a better value than the mean of the random scores.
      texts: number of texts.
    """

    methods: tuple[str, ...]
    means: np.ndarray
    errors: np.ndarray
    better: np.ndarray
    texts: int


def compare_methods(
    lm: LM,
    texts: Any,
    methods: Any = ("integrated_gradients", "gradient_x_input", "occlusion", "shapley"),
    *,
    settings: Settings = _DEFAULTS,
    draws: int = DRAWS,
    task: Any = None,
) -> MethodMeans:
    """Returns the faithfulness of several methods, and of random scores, over many texts.

    Args:
      lm: the model.
      texts: examples as for `attribute`, each explained for the prediction of the model.
      methods: names of the methods.
      settings: their settings.
      draws: random attributions of each text.
      task: the config of a task; None: that of the model.

    Raises:
      UserError: for an empty list, an unknown method, and as `attribute` does.
    """
    texts, methods = [*check_list("texts", texts, "texts")], check_methods(lm, methods, settings)
    if not texts:
        raise UserError("there are no texts; give at least one")
    table = np.zeros((len(methods) + 1, len(texts), len(MEASURES)))
    for i, text in enumerate(texts):
        prediction = predict_target(lm, text, task=task)
        found = [attribute_prediction(prediction, method, settings) for method in methods]
        measured = measure_faithfulness(prediction, found, replacement=settings.replacement, draws=draws, seed=i)
        table[:-1, i] = [[getattr(one, name) for name in MEASURES] for one in measured]
        table[-1, i] = measured[0].random.mean(0)
    sign = np.where(list(MEASURES.values()), 1, -1)
    better = ((table - table[-1]) * sign > 0).mean(1)
    errors = table.std(1, ddof=1) / np.sqrt(len(texts)) if len(texts) > 1 else np.full(better.shape, np.nan)
    return MethodMeans((*methods, RANDOM), table.mean(1), errors, better, len(texts))


def check_methods(lm: LM, methods: Any, settings: Settings) -> tuple[str, ...]:
    """Returns the names of methods without repetitions.

    Raises:
      UserError: for an empty list, an unknown method, and settings that a method does not support.
    """
    names = tuple(dict.fromkeys(check_list("methods", methods, "names of methods")))
    if not names:
        raise UserError(f"methods is empty; choose some of {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            raise UserError(f"method is {name!r}{suggestion(str(name), METHODS)}")
        check_settings(lm, name, settings)
    return names

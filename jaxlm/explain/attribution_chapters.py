"""Chapters about attributions and their faithfulness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.explain.attribution import GRADIENTS, Attribution, Settings, attribute_prediction
from jaxlm.explain.examples import head_of, read_example
from jaxlm.explain.faithfulness import MEASURES, Faithfulness, check_methods, measure_faithfulness
from jaxlm.explain.prediction import Prediction, choose_replacement, predict_target, replacement_for, values_of
from jaxlm.explain.request import Request, Result
from jaxlm.explain.targets import EXPLAINED_HEADS
from jaxlm.reports.pages import Chapter
from jaxlm.reports.pictures import Bars
from jaxlm.reports.tables import ScoredText, Table

MAX_TARGETS = 20  # predicted tokens with a chapter of their own
MAX_ROWS = 12  # tokens in the table of a terminal

_WHAT = {
    "integrated_gradients": "the gradients on a straight line from the reference to the text",
    "gradient_x_input": "the gradient times the word embedding, which is a first-order effect",
    "layer_integrated_gradients": "integrated gradients over the hidden states after a layer",
    "occlusion": "the decrease of the target if one token is hidden",
    "shapley": "the mean effect of a token in random orders of the tokens",
}


def check(request: Request) -> None:
    """Raises UserError for a request without a prediction to explain, and for wrong methods or settings."""
    head = head_of(request.lm)
    if head not in EXPLAINED_HEADS:
        raise UserError(
            f"the model has the head {head or 'none'}, whose outputs are no prediction for a text; attribution "
            f"requires one of the heads {', '.join(EXPLAINED_HEADS)}: use --analyses attention"
        )
    check_methods(request.lm, request.methods, _settings(request))
    replacement_for(request.lm, read_example(request.lm, request.text, request.task), request.replacement)


def _settings(request: Request) -> Settings:
    layer = request.lm.config.layers - 1 if request.layer is None else request.layer
    rest = request.reference, request.replacement, request.steps, request.permutations, request.seed
    return Settings(layer, *rest)


def run(request: Request) -> Result:
    """Returns the attributions of all methods, with the measures of their faithfulness."""
    named = {name: getattr(request, name) for name in ("target", "word", "new_tokens", "task")}
    prediction = predict_target(request.lm, request.text, **named)
    settings = _settings(request)
    replacement = choose_replacement(prediction, request.replacement)
    found = [attribute_prediction(prediction, name, settings) for name in dict.fromkeys(request.methods)]
    chosen: dict[str, Any] = {"replacement": request.replacement, "draws": request.draws, "seed": request.seed}
    chapters, lines, numbers = [], list[str](), []
    T = len(prediction.example.tokens_T)
    for index, target in enumerate(prediction.targets):
        measured = measure_faithfulness(prediction, found, number=index, **chosen)
        numbers.append(numbers_of(found, measured, index))
        [probability] = values_of(prediction, target, np.ones((1, T), bool), replacement).probabilities
        numbers[-1]["probability"] = probability
        lines += lines_of(found, measured, index)
        if index < MAX_TARGETS:
            chapters.append(chapter_of(found, measured, index, len(prediction.targets) > 1))
    chapters.append(_meaning(found, prediction, replacement))
    facts = {"explained": ", ".join(target.name for target in prediction.targets)[:200]}
    if len(prediction.targets) == 1:
        facts["probability"] = f"{probability:.3g}"
    return Result(chapters, {"tokens": list(prediction.example.pieces), "targets": numbers}, lines, facts)


def numbers_of(found: Sequence[Attribution], measured: Sequence[Faithfulness], index: int) -> dict[str, Any]:
    """Returns the numbers of one target for JSON; numbers that a method does not have are null."""
    finite = lambda value: float(value) if math.isfinite(value) else None
    methods = {}
    for one, quality in zip(found, measured):
        methods[one.method] = {
            "scores": one.scores_QT[index].tolist(),
            "value": finite(one.values_Q[index]),
            "reference_value": finite(one.references_Q[index]),
            "completeness_error": finite(one.errors_Q[index]),
            "reference": one.reference,
            "steps": one.steps,
            "faithfulness": {name: getattr(quality, name) for name in MEASURES},
            "random": dict(zip(MEASURES, quality.random.mean(0).tolist())),
            "random_standard_deviation": dict(zip(MEASURES, quality.random.std(0).tolist())),
        }
    return {"target": found[0].targets[index], "methods": methods}


def lines_of(found: Sequence[Attribution], measured: Sequence[Faithfulness], index: int) -> list[str]:
    """Returns a table of the tokens with the largest scores of the first method, and the scores of the others."""
    first = found[0]
    largest = np.argsort(-np.abs(first.scores_QT[index]), kind="stable")[:MAX_ROWS].tolist()
    order = [t for t in largest if first.scores_QT[index, t]]
    width = max([5, *(len(first.tokens[t].strip()) for t in order)])
    lines = [f"explained: {first.targets[index].strip()} ({first.values_Q[index]:.4g})"]
    lines.append(f"{'token':{width}}  {'  '.join(one.method for one in found)}")
    for t in sorted(order):
        scores = (f"{one.scores_QT[index, t]:+{max(len(one.method), 8)}.4f}" for one in found)
        lines.append(f"{first.tokens[t].strip():{width}}  {'  '.join(scores)}")
    for quality in measured:
        random = quality.random.mean(0)[0]
        lines.append(
            f"comprehensiveness of {quality.method}: {quality.comprehensiveness:.3f} (random scores {random:.3f})"
        )
    return lines


def chapter_of(
    found: Sequence[Attribution], measured: Sequence[Faithfulness], index: int, is_one_of_several: bool
) -> Chapter:
    """Returns the chapter of one target: the text with the scores of each method, and their faithfulness."""
    target = found[0].targets[index]
    sections: list[Any] = [scored_text(one, index) for one in found]
    sections += [table_of_measures(measured)]
    names = (*(one.method for one in measured), "random scores")
    values = (*(one.comprehensiveness for one in measured), float(measured[0].random[:, 0].mean()))
    sections += [Bars("Comprehensiveness", names, values, "decrease of the probability")]
    title = f"Attribution of {target.strip() or repr(target)!s}" if is_one_of_several else f"Attribution: {target}"
    return Chapter(title, (), sections)


def scored_text(attribution: Attribution, index: int = 0) -> ScoredText:
    """Returns the tokens of an attribution, coloured by their scores, for a page or a notebook.

    Args:
      attribution: the attribution.
      index: the target, for a text that is predicted token by token.
    """
    value, reference = attribution.values_Q[index], attribution.references_Q[index]
    note = f"Blue raises and orange lowers the value of {attribution.targets[index].strip()!r}, {value:.4g}."
    if math.isfinite(reference):
        error = attribution.errors_Q[index]
        note += (
            f" The scores add up to its difference from {reference:.4g}, the value for the reference "
            f"({attribution.reference}), with an error of {error:.2%}."
        )
    scores = tuple(attribution.scores_QT[index].tolist())
    return ScoredText(attribution.method.replace("_", " "), attribution.tokens, scores, note)


def table_of_measures(measured: Sequence[Faithfulness]) -> Table:
    """Returns the table of the measures of several methods, with random scores in the last row."""
    rows = [[one.method, *(f"{getattr(one, name):.3f}" for name in MEASURES)] for one in measured]
    random = measured[0].random
    spread = [f"{mean:.3f} ± {std:.3f}" for mean, std in zip(random.mean(0), random.std(0))]
    head = ("method", *(f"{name} ({'higher' if higher else 'lower'} is better)" for name, higher in MEASURES.items()))
    note = (
        f"Random scores: mean and standard deviation of {len(random)} draws. A useful method is better than they are."
    )
    return Table("Faithfulness", head, [*rows, ["random scores", *spread]], note)


def _meaning(found: Sequence[Attribution], prediction: Prediction, replacement: str) -> Chapter:
    hides = "removed from the text" if replacement == "remove" else f"replaced by the reference ({replacement})"
    text = [f"{one.method}: {_WHAT[one.method]}." for one in found]
    text += [
        f"Hidden tokens are {hides}. Special tokens are never hidden.",
        "Comprehensiveness is the mean decrease of the probability without the 1, 5, 10, 20 and 50 % of the tokens "
        "with the highest scores. Sufficiency is the mean decrease with only these tokens. AOPC is the mean decrease "
        "while tokens are hidden one by one. Infidelity compares the sum of the scores of random sets of tokens with "
        "the effect of hiding them, relative to scores of 0: 0 is exact, 1 is as good as scores of 0.",
        "A score describes this model and this text. It does not state that the model is right, and hidden tokens make "
        "texts that the model was not trained on.",
    ]
    if any(one.method in GRADIENTS for one in found):
        text += ["Gradients are taken with respect to word embeddings, in float32."]
    return Chapter("What the scores mean", text)

"""Explanations of predictions: which tokens, layers and training examples they depend on.

examples    a text as the model reads it
outputs     the outputs of a model as functions of word embeddings, or of the hidden states of a layer
targets     the number that is explained, such as the logit of a class
prediction  a prediction to explain, and its value for a text with other words
attribution    scores of the tokens of a text
faithfulness   whether the prediction depends on the tokens with high scores
attention   attention weights, rollout and flow
activations    reading, editing and steering of activations
patching    the effects of activations of one text in another
lens        what the head reads in the hidden states of each layer
probes      what linear probes read in the hidden states of each layer
nearest     the nearest training examples, and those with influence on the last layer
request     what an analysis receives and returns
analyses    the table of analyses, and the page
attribution_chapters, attention_chapters, activation_chapters, nearest_chapters    the chapters of the page
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {  # public name -> its module, which is imported when the name is used
    "Attribution": "attribution",
    "Target": "targets",
    "attention_map": "attention_chapters",
    "Neighbours": "nearest",
    "Patching": "patching",
    "LogitLens": "lens",
    "attention_weights": "attention",
    "attribute": "attribution",
    "compare_methods": "faithfulness",
    "cross_rollout": "attention",
    "explain": "analyses",
    "flow": "attention",
    "head_grid": "attention_chapters",
    "influential_examples": "nearest",
    "logit_lens": "lens",
    "measure_faithfulness": "faithfulness",
    "nearest_examples": "nearest",
    "patch": "patching",
    "Probes": "probes",
    "probe": "probes",
    "predict_target": "prediction",
    "rollout": "attention",
    "scored_text": "attribution_chapters",
    "steer": "activations",
    "with_edit": "activations",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

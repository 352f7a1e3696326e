"""What an analysis receives, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxlm.explain.attribution import PERMUTATIONS
from jaxlm.lm import LM
from jaxlm.reports.pages import Chapter


class Request(NamedTuple):
    """A text to explain, and the choices of the user.

    Attributes:
      lm: the model.
      text: a text, or what `jaxlm.predict` accepts as an example.
      target: the label, answer, token or text to explain; None: what the model predicts.
      word: for tags, the number of the word from 0.
      new_tokens: for the head lm without a target, the number of tokens to generate and explain.
      methods: names of the methods of attribution.
      layer: the layer of layer_integrated_gradients and of the large attention map, from 0. None: the last one.
      head: the head of the large attention map, from 0; None: the mean of all heads.
      reference: the embedding where integrated gradients begin; see `attribute`.
      replacement: what takes the place of hidden tokens; see `attribute`.
      steps: number of gradients of integrated gradients; None: as many as the error requires.
      permutations: number of orders of the tokens for shapley.
      draws: number of random attributions that the measures of faithfulness are compared with.
      seed: for everything that is random.
      task: the config of a task; None: that of the model.
      corrupted: for patching, the text in which the activations of the text are tested.
      answers: for patching, the tokens or classes of both texts; None: the predictions.
      training: for nearest, rows of training data by column name.
    """

    lm: LM
    text: Any
    target: str | None = None
    word: int | None = None
    new_tokens: int = 1
    methods: tuple[str, ...] = ("integrated_gradients", "occlusion")
    layer: int | None = None
    head: int | None = None
    reference: str | None = None
    replacement: str | None = None
    steps: int | None = None
    permutations: int = PERMUTATIONS
    draws: int = 10
    seed: int = 0
    task: Any = None
    corrupted: Any = None
    answers: tuple[str, str] | None = None
    training: Sequence[Mapping[str, Any]] | None = None


class Result(NamedTuple):
    """The result of an analysis.

    Attributes:
      chapters: of the page.
      numbers: what explanation.json contains.
      lines: for the terminal.
      facts: for the head of the page.
      arrays: what explanation.npz contains, for arrays that would make a large JSON file.
    """

    chapters: Sequence[Chapter]
    numbers: Mapping[str, Any]
    lines: Sequence[str] = ()
    facts: Mapping[str, str] = MappingProxyType({})
    arrays: Mapping[str, np.ndarray] = MappingProxyType({})

"""`jaxlm explain`: which tokens, layers and heads a prediction depends on."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxlm.config import DataConfig
from jaxlm.config.ranges import Config, Count, Positive, Range
from jaxlm.data.formats.rows import file_rows
from jaxlm.devices import process
from jaxlm.errors import UserError
from jaxlm.storage import disk
from jaxlm.verbs import machine
from jaxlm.verbs.arguments import parse


@dataclass(frozen=True)
class Explain(Config):
    """Explain a prediction for a text: scores of its tokens with their faithfulness, and attention."""

    # The folder of a run, a folder in Hugging Face format, a GGUF file, or a hub name.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    text: tuple[str, ...] = ()  # the text, or the texts that the task reads: a pair, or a question and a context
    # A label, an answer in the text, the token of a mask, or the text after a prompt. Empty: what the model predicts.
    target: str = ""
    word: Count | None = None  # for tags: the number of the word, from 0; not set: the first word in a span
    new_tokens: Positive = 1  # for generated texts without --target: number of tokens to generate and explain
    # The analyses: attribution, attention, lens, patching, nearest. Empty: the first two, as the model supports them.
    analyses: str = ""
    corrupted: str = ""  # for patching: a text with as many tokens, for which the model predicts something else
    answers: str = ""  # for patching: the tokens or labels of both texts, with a comma; empty: the predictions
    training: str = ""  # for nearest: a file with the training examples
    # Methods of attribution: integrated_gradients, gradient_x_input, layer_integrated_gradients, occlusion, shapley.
    method: str = "integrated_gradients,occlusion"
    # The layer of the attention map and of layer_integrated_gradients, from 0; not set: the last one.
    layer: Count | None = None
    head: Count | None = None  # the head of the attention map, from 0; not set: the mean of all heads
    # Where integrated gradients begin; not set: the padding token, or the zero vector without one.
    reference: Literal["mask", "padding", "unknown", "zero"] | None = None
    # What takes the place of hidden tokens; not set: remove, or the reference where a target belongs to a token.
    replacement: Literal["remove", "mask", "padding", "unknown", "zero"] | None = None
    steps: Annotated[int, Range(1, 10_000)] | None = None  # gradients of integrated gradients; not set: automatic
    permutations: Annotated[int, Range(2, 100_000)] = 32  # orders of the tokens for shapley
    draws: Annotated[int, Range(1, 10_000)] = 10  # random scores that faithfulness is compared with
    seed: Count = 0  # for random orders and scores
    output: str = ""  # the folder to write report.html and explanation.json to; empty: none


def explain(argv: list[str], _: process.Signals) -> int:
    """Explain a prediction by tokens, layers and heads: jaxlm explain MODEL --text TEXT [--output FOLDER]."""
    args = parse(Explain(model=tyro.MISSING), argv, "jaxlm explain")
    if not args.text:
        raise UserError("explain requires a text: jaxlm explain MODEL --text TEXT")
    if args.output:
        _check_output(args.output)
    machine.configure_process()
    import jaxlm
    from jaxlm.explain import analyses

    lm = jaxlm.load(args.model)
    text: Any = args.text[0] if len(args.text) == 1 else args.text
    same = ("word", "new_tokens", "layer", "head", "reference", "replacement", "steps", "permutations", "draws", "seed")
    choices = {name: getattr(args, name) for name in same}
    choices |= {"corrupted": args.corrupted or None, "answers": _names(args.answers) or None}
    if args.training:
        choices["training"] = [row for _, row in file_rows(_file(args.training), DataConfig())]
    choices |= {"target": args.target or None, "methods": _names(args.method)}
    explanation = analyses.explain(lm, text, _names(args.analyses) or None, **choices)
    for line in explanation.lines:
        print(line)
    if args.output:
        arguments = dataclasses.asdict(args)
        print(f"report  {explanation.write(args.output, args.model, arguments)}")
    else:
        print("--output FOLDER writes the page with all pictures and the numbers as JSON", file=sys.stderr)
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _file(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"training is {name}, which is not a file; give a file with rows, such as train.csv")
    return path


def _check_output(name: str) -> None:
    folder = disk.local(name, "output")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output is {name}, which is a file; choose a folder")
    if (folder / "metrics.jsonl").exists():
        raise UserError(f"output is {name}, the folder of a run, whose report would be lost; choose another folder")

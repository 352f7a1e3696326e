"""`jaxlm evaluate`: the scores of a model on a file."""

from __future__ import annotations

import sys

from jaxlm.devices import process
from jaxlm.errors import UserError
from jaxlm.verbs.files import FileArguments, file_arguments, scores_of


def evaluate(argv: list[str], _: process.Signals) -> int:
    """Score a model on the labelled rows of a file, or on plain text: jaxlm evaluate MODEL FILE."""
    args, lm = file_arguments(argv, evaluate)
    if args.probabilities or args.top_k or args.column != FileArguments.column:
        raise UserError("--probabilities, --top-k and --column are flags of predict; leave them out")
    scores, notes = scores_of(lm, args.file, args)
    for line in notes:
        print(line, file=sys.stderr)
    for name, value in scores.items():
        # Scripts parse these lines: one name and one number, and fractions instead of per cent.
        print(f"{name.replace('_', ' '):>20}  {value:{'.4f' if isinstance(value, float) else ','}}")
    return 0

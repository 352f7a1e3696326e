"""`jaxlm predict`: labels, answers or texts for the rows of a file."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.devices import process
from jaxlm.verbs.files import FileArguments, file_arguments


def predict(argv: list[str], _: process.Signals) -> int:
    """Predict the labels, answers or texts for the rows of a file: jaxlm predict MODEL FILE [--output FILE.csv]."""
    args, lm = file_arguments(argv, predict)
    from jaxlm.data import source
    from jaxlm.run.evaluate import predict_rows
    from jaxlm.run.folder import RowWriter
    from jaxlm.tasks import columns_of

    columns = columns_of(args.task, labelled=False)
    # All other columns are copied to the output.
    columns = columns and columns._replace(alone=False)
    data = dataclasses.replace(args.data, label_from="column")
    rows = source.rows(args.file, data, data.split, columns=columns)
    classes: dict[str, Any] = {"probabilities": args.probabilities, "top_k": args.top_k}
    with RowWriter(args.output, getattr(args.task, "separator", " ")) as writer:
        for row, prediction in predict_rows(lm, rows, args.task, args.length or None, args.batch or None, **classes):
            named = {args.column if name == "prediction" else name: value for name, value in prediction.items()}
            replaced = {args.column} - {FileArguments.column}
            writer.write({name: value for name, value in row.items() if name not in replaced}, named)
    return 0

"""`jaxlm audit`: bias in a model, on one page."""

from __future__ import annotations

from pathlib import Path

import tyro

from jaxlm.devices import process
from jaxlm.errors import UserError
from jaxlm.verbs import machine
from jaxlm.verbs.arguments import parse


def audit(argv: list[str], _: process.Signals) -> int:
    """Audit a model for bias: jaxlm audit MODEL --pairs|--associations|--bbq|--counterfactuals|--groups FILE."""
    machine.configure_process()  # before the arguments, whose module imports jax
    from jaxlm.trust import audits

    args = parse(audits.AuditArguments(model=tyro.MISSING), argv, "jaxlm audit")
    if Path(args.output).suffix != ".html":
        raise UserError(f"--output is {args.output}; give the name of a page, which ends in .html")
    audits.requested_audits(args)
    results = audits.audit(audits.load(args.model), args)
    for result in results:
        print(result.title)
        for name, value in result.scores.items():
            is_count, is_small = value.is_integer() and abs(value) > 1, 0 < abs(value) < 1e-3  # such as a p-value
            print(f"  {name:<48}  {value:{',.0f' if is_count else '.2e' if is_small else '.4f'}}")
    page, scores = audits.write(Path(args.output), args.model, results, args)
    print(f"{page}, {scores}")
    return 0

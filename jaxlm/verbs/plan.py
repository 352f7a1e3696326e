"""`jaxlm plan`: memory and step time of a run on other devices."""

from __future__ import annotations

import dataclasses
import json
import sys

from jaxlm.devices import process
from jaxlm.verbs import machine
from jaxlm.verbs.arguments import read_run, split_config

_FLAGS = """\
  --field value     change a field of the config, such as --batch 64
  --model PRESET    replace the model by a preset, such as bert-base or llama-3.1-8b
  --topology NAME   chips and their number, such as v5e:4x4 or H100:8; not set: the devices of this machine
  --fit             find the largest batch that fits into memory for each remat policy, and plan the fastest
  --json            print the plan as JSON"""


def plan(argv: list[str], _: process.Signals) -> int:
    """Predict memory and step time of a run: jaxlm plan CONFIG [--topology NAME] [--fit] [--field value ...]."""
    from jaxlm.devices import chips

    file, words, flag_words = split_config(argv, plan, _FLAGS)
    fit, as_json = "--fit" in flag_words, "--json" in flag_words
    flag_words = [flag for flag in flag_words if flag not in ("--fit", "--json")]
    topology = ""
    if "--topology" in flag_words:
        at = flag_words.index("--topology")
        topology = flag_words[at + 1] if at + 1 < len(flag_words) else ""
        flag_words = flag_words[:at] + flag_words[at + 2 :]
        chips.parse_topology(topology)
    run = read_run("plan", file, words, flag_words)
    machine.configure_process()
    import jax

    from jaxlm.planning import plan as planning

    for name, value in (chips.PLANNING_SETTINGS if topology else {}).items():
        jax.config.update(name, value)
    log = lambda line: print(line, file=sys.stderr, flush=True)
    if fit:
        plans = planning.fitting(run, topology, str(file), log)
        result = plans[0] if plans else planning.plan(dataclasses.replace(run, remat="full"), topology, str(file))
    else:
        result = planning.plan(run, topology, str(file))
    print(json.dumps(planning.as_json(result)) if as_json else planning.as_text(result))
    return 0 if result.fits else 1

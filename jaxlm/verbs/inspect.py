"""`jaxlm inspect`: the config, the parameters and the stored tensors of a model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxlm.config import MeshConfig, python_files
from jaxlm.config.ranges import Config
from jaxlm.devices import process
from jaxlm.errors import UserError
from jaxlm.verbs import machine
from jaxlm.verbs.arguments import parse


@dataclass(frozen=True)
class Inspect(Config):
    """Print the config, parameters and stored tensors of a model."""

    # The folder of a run or a model, a hub name, a preset, or a config file.
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    head: str | None = None  # show the model as loaded with this head
    revision: str | None = None  # branch, tag or commit of a hub name
    # The mesh for which the sharding of each parameter is shown.
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1))


def inspect(argv: list[str], _: process.Signals) -> int:
    """Print a model's config, parameters and stored tensors: jaxlm inspect MODEL_OR_CONFIG."""
    args = parse(Inspect(target=tyro.MISSING), argv, "jaxlm inspect")
    machine.configure_process()
    import jax

    from jaxlm.devices import sharding
    from jaxlm.families import PRESETS
    from jaxlm.planning import inspect as inspection
    from jaxlm.run.config_only import resolve_config

    devices = math.prod(dataclasses.astuple(args.mesh))
    mesh = sharding.axis_sizes(args.mesh, abs(devices)) if devices != 1 else None
    path = Path(args.target)
    if path.suffix == ".py":
        run = python_files.read(path)
        if run.model is None and not run.init:
            raise UserError(f"{path} trains the model that --init names; inspect that model instead")
        one_device = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
        print(inspection.describe_config(resolve_config(run, one_device).model, mesh))
    elif not path.exists() and args.target in PRESETS:
        print(inspection.describe_config(PRESETS[args.target], mesh))
    else:
        print(inspection.describe(args.target, args.head, args.revision, mesh))
    return 0

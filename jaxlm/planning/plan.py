"""What a run needs on chips that this machine does not have: its own step, compiled for them ahead of time.

The step of `assembly.assemble` is lowered from shapes and compiled by the compiler of the chips: libtpu, which runs
without a TPU, or JAX's plugin for CUDA, which runs without a GPU. The compiled program gives memory, memory traffic and
collectives, the jaxpr gives the operations, and a roofline of three rates of the chip gives a lower bound of the time
of a step.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jaxlm.config import RunConfig
from jaxlm.devices import chips, sharding
from jaxlm.devices.chips import Chip
from jaxlm.nn import flops
from jaxlm.planning import hlo
from jaxlm.reports.report import Bars, Table
from jaxlm.run.assembly import assemble, closed_flops, remat_of
from jaxlm.run.config_only import batch_shapes, resolve_config
from jaxlm.run.resolve import ResolvedModel

GIB = 2**30
CUDNN_VERSION = 91200  # of a planned GPU: 9.12


class Roofline(NamedTuple):
    """Seconds that a step takes if one rate of the chip is its only limit, for each of three rates."""

    compute: float
    memory: float
    network: float

    @property
    def overlapped(self) -> float:
        """Seconds if the three overlap: the largest."""
        return max(self)

    @property
    def sequential(self) -> float:
        """Seconds if the three follow one another: the sum."""
        return sum(self)


@dataclass(frozen=True)
class Plan:
    """The step of a run on a topology.

    Bytes and `roofline` are those of one device; FLOPs are those of all devices.
    """

    config: str
    topology: str
    devices: int
    kind: str
    mesh: dict[str, int]
    batch: int  # rows
    tokens: int  # positions in a step, including those of sources
    remat: str
    parameters: int  # entries
    parameter_bytes: int
    optimizer_bytes: int
    arguments_bytes: int = 0  # parameters, optimizer state and batch, with the padding of the compiler
    temporary_bytes: int = 0
    limit_bytes: int = 0  # of memory that a program may use; 0: unknown
    flops: int = 0  # of the matrix products in a step, recomputed products included
    model_flops: int = 0  # by the closed formula, without recomputation, with attention of all queries to all keys
    counted_flops: int = 0  # counted in the jaxpr of a step without recomputation
    formula_flops: int = 0  # of the same step by the closed formula
    hbm_bytes: int = 0  # read and written in a step, an estimate
    traffic: dict[str, int] = field(default_factory=dict)  # the same by purpose, in descending order
    collectives: dict[str, hlo.CollectiveTotals] = field(default_factory=dict)
    purposes: dict[str, hlo.CollectiveTotals] = field(default_factory=dict)
    roofline: Roofline | None = None
    compile_seconds: float = 0.0
    refused: str = ""  # why the compiler refused the program
    largest: tuple[str, ...] = ()  # the largest arrays of a refused program
    constants: dict[str, str] = field(default_factory=dict)

    @property
    def used_bytes(self) -> int:
        """Memory that the step uses on a device; the state is updated in place."""
        return self.arguments_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a device; True where its size is unknown."""
        return not self.refused and (not self.limit_bytes or self.used_bytes <= self.limit_bytes)

    def utilisation(self, seconds: float, peak: float) -> float:
        """Returns the model FLOPs utilisation (Chowdhery et al. 2022).

        Args:
          seconds: time of a step.
          peak: FLOPs per second of a device.
        """
        return self.model_flops / (self.devices * peak * seconds)


def plan(run: RunConfig, topology: str = "", name: str = "") -> Plan:
    """Returns the plan of a run. It reads neither data nor weights.

    Args:
      run: the config. Where `examples` is set, the length of the data would decide the batch size; here `batch` holds.
      topology: such as `v5e:4x4`; empty: the devices of this machine.
      name: of the config, for printing.

    Returns:
      The plan; a program that is too large gives a plan with `refused`.

    Raises:
      UserError: for a mesh that does not fit the devices, and for an unknown topology.
    """
    devices = chips.topology_devices(topology) if topology else jax.devices()
    resolved = resolve_config(run, sharding.make_mesh(run.mesh, devices))
    run, mesh, device_kind = resolved.run, resolved.mesh, devices[0].device_kind
    assembly, batch, chip = assemble(resolved), batch_shapes(resolved), chips.find(device_kind)
    sides = [batch[field] for field in ("segments_BT", "source_segments_BS") if field in batch]
    known: dict[str, Any] = {
        "config": name,
        "topology": topology or f"{len(devices)} x {device_kind}",
        "devices": mesh.size,
        "kind": device_kind,
        "mesh": dict(mesh.shape),
        "batch": run.batch,
        "tokens": sum(math.prod(segments.shape) for segments in sides),
        "remat": remat_of(run, mesh),
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(assembly.like.model)),
        "parameter_bytes": _bytes(assembly.like.model),
        "optimizer_bytes": _bytes(assembly.like.opt_state),
        "limit_bytes": int((chip.usable or chip.hbm).value) if chip else 0,
        "constants": {what: str(constant) for what, constant in (chip.constants if chip else {}).items()},
    }
    with _absent_gpu(devices[0]) if topology else nullcontext():
        traced = assembly.train_step.trace(assembly.like, batch)
        lowered = traced.lower()
    known |= _model_flops(resolved, batch) | {"flops": flops.count(traced.jaxpr)}
    begun = time.monotonic()
    try:
        compiled, text = _compiled(lowered, for_tpu=devices[0].platform == "tpu")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused, largest = _refusal(str(error))
        known |= {"refused": refused, "largest": largest or _largest(traced.jaxpr)}
        return Plan(**known, compile_seconds=time.monotonic() - begun)
    known["compile_seconds"] = time.monotonic() - begun
    memory, program = compiled.memory_analysis(), hlo.parse(text)
    collectives, traffic = hlo.collectives(program), hlo.traffic(program)
    moved = sum(traffic.values())
    roofline = None
    if chip is not None:
        shape = chips.parse_topology(topology)[1] if topology else ()
        network = sum(one.sent_bytes * one.times / _rate(one, mesh, chip, shape) for one in collectives)
        roofline = Roofline(known["flops"] / mesh.size / chip.flops.value, moved / chip.bandwidth.value, network)
    return Plan(
        **known,
        arguments_bytes=memory.argument_size_in_bytes,
        # A result that does not reuse the buffer of an argument needs new memory.
        temporary_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        hbm_bytes=moved,
        traffic=traffic,
        collectives=hlo.by_kind(collectives),
        purposes=hlo.by_purpose(collectives),
        roofline=roofline,
    )


@contextmanager
def _absent_gpu(device: Any) -> Iterator[None]:
    """Makes JAX assume cuDNN and the GPU of a topology, where it would look for those of this machine.

    It checks whether cuDNN's attention supports a case while it traces the case. For TPUs nothing changes.
    """
    if device.platform == "tpu":
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    capability = tuple(int(number) for number in device.compute_capability.split("."))
    numbers = lambda text: tuple(int(number) for number in text.split("."))
    assumed = {
        "check_cudnn_version": lambda: CUDNN_VERSION,
        "check_compute_capability": lambda least: capability >= numbers(least),
        "is_cuda_compute_capability_equal": lambda exact: capability == numbers(exact),
    }
    found = {name: getattr(cudnn, name) for name in assumed}
    for name, function in assumed.items():
        setattr(cudnn, name, function)
    try:
        yield
    finally:
        for name, function in found.items():
            setattr(cudnn, name, function)


def _compiled(lowered: Any, for_tpu: bool) -> tuple[Any, str]:
    """Returns the program and its text.

    The text of a TPU's program is the file that its compiler dumps: jaxlib cannot parse everything that a newer libtpu
    writes.
    """
    if not for_tpu:
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (text,) = (file.read_text() for file in Path(folder).glob("*train_step*after_optimizations.txt"))
    return compiled, text


def _model_flops(resolved: ResolvedModel, batch: dict[str, Any]) -> dict[str, int]:
    """Returns the FLOPs of the step with attention by XLA and without recomputation: counted, by the formula of the
    blocks that are computed, and by PaLM's convention."""
    plain = replace(resolved, run=replace(resolved.run, remat="none", attention="xla"))
    assembly = assemble(plain)
    formula = lambda blocks: closed_flops(resolved.task, resolved.model, plain.run.batch, batch, blocks=blocks)
    return {
        "counted_flops": flops.count(assembly.train_step.trace(assembly.like, batch).jaxpr),
        "formula_flops": formula(sharding.ways(resolved.mesh, "length") == 1),
        "model_flops": formula(False),
    }


def _bytes(tree: Any) -> int:
    """Returns the bytes of a tree on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _rate(one: hlo.Collective, mesh: jax.sharding.Mesh, chip: Chip, shape: tuple[int, ...]) -> float:
    """Returns the bytes per second that a device sends in a collective.

    It uses one link for each dimension of the torus that the group spans, and both directions where the links of a
    dimension form a ring.
    """
    group = one.groups[0] if one.groups else ()
    if not chip.dimensions or not shape or not group:
        return chip.link.value
    devices = mesh.devices.flat
    places = np.array([devices[i].coords[: len(shape)] for i in group])
    spans = [len(set(axis)) for axis in places.T.tolist()]
    dimensions = zip(spans, shape, chips.rings(chip, shape))
    links = sum(2 if ring and span == size else 1 for span, size, ring in dimensions if span > 1)
    return chip.link.value * max(1, links)


def _refusal(message: str) -> tuple[str, tuple[str, ...]]:
    """Returns why the compiler refused a program, from its message, and the largest arrays of the program."""
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    temporaries = re.search(r"HLO temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", message)
    if used:
        refused = f"it needs {used[1]} of {used[2]}"
    elif temporaries:
        refused = f"it needs {temporaries[1]} for temporaries alone, of {temporaries[2]}"
    else:
        refused = message.splitlines()[0][:200]
    largest = []
    for block in re.findall(r"Size: ([\d.]+\w)\n(.*?)(?=\n\s*={5,}|\Z)", message, re.S)[:3]:
        name = re.search(r'op_name="([^"]*)"', block[1])
        shape = re.search(r"Shape: (\S+?)\{", block[1])
        largest.append(f"{block[0]} {shape[1] if shape else ''} {hlo.purpose(name[1]) if name else ''}".strip())
    return refused, tuple(largest)


def _largest(jaxpr: Any, n: int = 3) -> tuple[str, ...]:
    """Returns the largest arrays of a step, over all devices, with those that a loop stores for the backward pass."""
    found: dict[str, int] = {}

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            what = hlo.purpose(f"{equation.source_info.name_stack}/{equation.primitive.name}")
            for value in equation.outvars:
                if hasattr(value.aval, "shape"):
                    size = math.prod(value.aval.shape) * value.aval.dtype.itemsize
                    found[f"{_gib(size).strip()} over all devices, {value.aval.str_short()} {what}"] = size
            for inner in core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jaxpr.jaxpr)
    return tuple(sorted(found, key=lambda line: -found[line])[:n])


# Search


def fitting(run: RunConfig, topology: str, name: str = "", log: Any = lambda line: None) -> list[Plan]:
    """Returns the plan of the largest batch that fits for each remat policy, the fastest first.

    The batch size doubles from the smallest that the mesh divides. The speed is tokens per second by the sequential
    roofline.

    Args:
      run: the config; its `batch` and `remat` are not used.
      topology: such as `v5e:4x4`; empty: the devices of this machine.
      name: of the config, for printing.
      log: prints a line about each plan.

    Returns:
      The plans; an empty list where the smallest batch does not fit.
    """
    devices = chips.topology_devices(topology) if topology else jax.devices()
    least = sharding.ways(sharding.make_mesh(run.mesh, devices), "batch") * run.accumulate
    found: list[Plan] = []
    for remat in ("elementwise", "dots", "full"):
        batch, tried = least, 0
        best: Plan | None = None
        while (one := plan(replace(run, batch=batch, remat=remat), topology, name)).fits:
            log(f"remat {remat:11} batch {batch:6,}: {_gib(one.used_bytes)} fits")
            best, tried, batch = one, tried + 1, batch * 2
            if not one.limit_bytes or tried == 12:
                break
        else:
            log(f"remat {remat:11} batch {batch:6,}: {one.refused or _gib(one.used_bytes)}, does not fit")
            # Search between the last batch that fitted and twice its size.
            step = (batch - best.batch) // 2 if best else 0
            while best and step >= least and step >= best.batch // 8:
                one = plan(replace(run, batch=best.batch + step, remat=remat), topology, name)
                log(f"remat {remat:11} batch {one.batch:6,}: {'fits' if one.fits else 'does not fit'}")
                best, step = (one if one.fits else best), step // 2
        found += [best] if best else []
    speed = lambda one: one.tokens / one.roofline.sequential if one.roofline else one.batch
    return sorted(found, key=lambda one: -speed(one))


# Output


def as_text(plan: Plan) -> str:
    """Returns the plan as a page of text."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    lines = [
        f"{plan.config}: {plan.parameters:,} parameters on {plan.topology}, {plan.devices:,} devices ({plan.kind})",
        f"mesh {mesh}; batch {plan.batch:,} rows, {plan.tokens:,} tokens a step; remat {plan.remat}",
        "",
        "memory of each device",
        f"  parameters       {_gib(plan.parameter_bytes)}",
        f"  optimizer state  {_gib(plan.optimizer_bytes)}",
    ]
    if plan.refused:
        lines += [f"  does not fit: {plan.refused}", *(f"    {line}" for line in plan.largest)]
    else:
        lines += [
            f"  batch, padding   {_gib(plan.arguments_bytes - plan.parameter_bytes - plan.optimizer_bytes)}",
            f"  temporaries      {_gib(plan.temporary_bytes)}",
            f"  total            {_gib(plan.used_bytes)}{_of_limit(plan)}",
        ]
    lines += [""] + [f"remedy: {line}" for line in remedies(plan)] if not plan.fits else []
    ratio = plan.counted_flops / plan.formula_flops
    same = "equal to the closed formula" if ratio == 1 else f"{ratio:.4f} of the closed formula"
    more = "" if ratio == 1 else ", which leaves out the products of pooling and of some optimizers"
    lines += [
        "",
        "matrix products of a step, all devices",
        f"  {plan.flops / 1e12:,.4g} TFLOP; the model needs {plan.model_flops / 1e12:,.4g} (no recomputation, "
        "all queries to all keys)",
        f"  counted without recomputation: {plan.counted_flops:,}, {same}{more}",
    ]
    if plan.collectives:
        lines += ["", "collectives of a step, sent by each device"]
        lines += [f"  {_mb(one.sent_bytes)}  {one.times:7,} x {kind}" for kind, one in plan.collectives.items()]
        lines += ["  by purpose"]
        lines += [f"  {_mb(one.sent_bytes)}  {one.times:7,} x {what}" for what, one in _first(plan.purposes, 8)]
    if plan.traffic:
        shares = list(plan.traffic.items())[:8]
        lines += ["", "memory traffic of a step, each device, an estimate"]
        lines += [f"  {_gib(size)}  {size / plan.hbm_bytes:6.1%}  {what}" for what, size in shares]
    if plan.roofline is not None:
        lines += ["", *_rooflines(plan)]
    elif not plan.refused:
        lines += ["", f"the rates of {plan.kind} are unknown, so no time is predicted"]
    lines += ["", f"compiled in {plan.compile_seconds:.1f} s"]
    return "\n".join(lines)


def _rooflines(plan: Plan) -> list[str]:
    chip, line = chips.find(plan.kind), plan.roofline
    assert chip is not None and line is not None
    peak = chip.flops.value
    speed = lambda seconds: f"{plan.utilisation(seconds, peak):.1%} MFU, {plan.tokens / seconds:,.0f} tokens/s"
    return [
        "lower bounds of the time of a step",
        f"  {1000 * line.compute:,.1f} ms for the products, {1000 * line.memory:,.1f} ms for the memory "
        f"({plan.hbm_bytes / GIB:,.1f} GiB, an estimate), {1000 * line.network:,.1f} ms for the network",
        f"  {1000 * line.overlapped:,.1f} ms if all three overlap: {speed(line.overlapped)}",
        f"  {1000 * line.sequential:,.1f} ms if none overlap: {speed(line.sequential)}",
        "rates of the chip",
        *(f"  {what}: {constant}" for what, constant in plan.constants.items()),
        "  a collective uses rings over every dimension of the torus that its group spans",
    ]


def remedies(plan: Plan) -> list[str]:
    """Returns at most three changes that make a plan smaller, the cheapest first."""
    state = plan.parameter_bytes + plan.optimizer_bytes
    found = []
    if plan.remat != "full":
        found.append("--remat full (or dots, if that is enough): the backward pass recomputes activations")
    if plan.limit_bytes and state > plan.limit_bytes / 2:
        found += [
            f"larger mesh axes fsdp or tensor: parameters and optimizer take {_gib(state).strip()} on each device",
            "--optimizer.momentum-dtype bfloat16 saves a sixth of the state, --optimizer.name adafactor most of it",
        ]
    found.append("a smaller --batch, or the same with a larger --accumulate")
    if plan.mesh.get("tensor", 1) == 1:
        found.append("--mesh.tensor 2: this shards the activations between layers too")
    return found[:3]


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns the plan as JSON values, with the derived figures."""
    sums = lambda found: {name: one._asdict() for name, one in found.items()}
    values = asdict(plan) | {"collectives": sums(plan.collectives), "purposes": sums(plan.purposes)}
    values |= {"used_bytes": plan.used_bytes, "fits": plan.fits, "roofline": None}
    if plan.roofline is not None:
        chip = chips.find(plan.kind)
        assert chip is not None
        of = lambda seconds: {"seconds": seconds, "mfu": plan.utilisation(seconds, chip.flops.value)}
        line = plan.roofline
        values["roofline"] = line._asdict() | {"overlapped": of(line.overlapped), "sequential": of(line.sequential)}
    return values


def as_pictures(values: Mapping[str, Any]) -> list[Bars | Table]:
    """Returns tables and bars for a report or a notebook: sizes, memory and the time of a step.

    Args:
      values: of a plan, from `as_json`.
    """
    mesh = " x ".join(f"{name} {size}" for name, size in values["mesh"].items() if size > 1) or "one device"
    limit, used = values["limit_bytes"], values["used_bytes"]
    facts = {
        "parameters": f"{values['parameters']:,}",
        "devices": f"{values['devices']:,} x {values['kind']}",
        "mesh": mesh,
        "tokens in a step": f"{values['tokens']:,}",
        "recomputed in the backward pass": values["remat"],
    }
    of = f" of {limit / GIB:,.1f} GiB: " + ("fits" if values["fits"] else "does not fit") if limit else ""
    facts["memory of each device"] = (
        f"does not fit: {values['refused']}" if values["refused"] else f"{used / GIB:,.2f} GiB{of}"
    )
    found: list[Bars | Table] = []
    if not values["refused"]:
        parts = {"parameters": values["parameter_bytes"], "optimizer": values["optimizer_bytes"]}
        parts["temporaries"] = values["temporary_bytes"]
        unit, size = ("GiB", GIB) if used >= GIB else ("MiB", 2**20)
        found.append(Bars("Memory of each device", tuple(parts), tuple(one / size for one in parts.values()), unit))
    if line := values["roofline"]:
        seconds = {"matrix products": line["compute"], "memory": line["memory"], "network": line["network"]}
        times = tuple(1000 * one for one in seconds.values())
        found.append(Bars("Lower bounds of the time of a step", tuple(seconds), times, "milliseconds"))
        for when, name in (("overlapped", "if all three overlap"), ("sequential", "if none overlap")):
            one = line[when]
            speed = f"{1000 * one['seconds']:,.1f} ms a step, {one['mfu']:.0%} of the chips' peak"
            facts[name] = f"{speed}, {values['tokens'] / one['seconds']:,.0f} tokens a second"
    title = f"Plan of {values['config']} on {values['topology']}"
    return [Table(title, ("quantity", "value"), [[name, str(value)] for name, value in facts.items()], ""), *found]


def _of_limit(plan: Plan) -> str:
    if not plan.limit_bytes:
        return " by the compiler; the memory of the device is unknown"
    left = plan.limit_bytes - plan.used_bytes
    return f" of {_gib(plan.limit_bytes).strip()}: " + (
        f"fits, {_gib(left).strip()} to spare" if left >= 0 else f"does not fit, by {_gib(-left).strip()}"
    )


def _first(found: dict[str, hlo.CollectiveTotals], n: int) -> Iterable[tuple[str, hlo.CollectiveTotals]]:
    return list(found.items())[:n]


def _gib(size: int) -> str:
    return f"{size / GIB:8.2f} GiB"


def _mb(size: int) -> str:
    return f"{size / 1e6:12,.1f} MB"

"""What a run would need on chips that nobody here has: its very step, compiled for them ahead of time.

The step of `assembly.assemble` is lowered from shapes alone and compiled by the chips' own compiler, for TPUs libtpu's,
which needs no TPU.  The program tells its memory and its collectives; operations are counted in the jaxpr; a roofline
of the three rates of the chip says how long a step takes at the least.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jaxlm.config import ModelConfig, MultiTask, RunConfig
from jaxlm.data.corpus import Corpus
from jaxlm.devices import chips, sharding
from jaxlm.devices.chips import Chip
from jaxlm.errors import UserError
from jaxlm.families import PRESETS, look
from jaxlm.lm import find
from jaxlm.nn import flops
from jaxlm.nn.transformer import Transformer
from jaxlm.planning import hlo
from jaxlm.reports.report import Bars, Table
from jaxlm.run.assembly import assemble, closed_flops, remat_of
from jaxlm.run.resolve import with_dropout
from jaxlm.tasks import make_task
from jaxlm.tasks.cells import Records
from jaxlm.tasks.multi_task import Parts
from jaxlm.tasks.records import RecordTask
from jaxlm.tasks.task import Task

GIB = 2**30
SENTINELS = 4096  # that the tokenizer of a plan has


class Roofline(NamedTuple):
    """Seconds that a step needs of each rate of a chip, if that were all that it waited for."""

    compute: float
    memory: float
    network: float

    @property
    def overlapped(self) -> float:
        """All three at once: the largest."""
        return max(self)

    @property
    def apart(self) -> float:
        """One after the other: the sum."""
        return sum(self)


@dataclass(frozen=True)
class Plan:
    """A run's step on a topology.  Bytes, and FLOPs of `roofline`, are of one device; FLOPs of the step are of all."""

    config: str
    topology: str
    devices: int
    kind: str
    mesh: dict[str, int]
    batch: int  # rows
    tokens: int  # places of a step, those of sources included
    remat: str
    parameters: int  # entries
    parameter_bytes: int
    optimizer_bytes: int
    arguments_bytes: int = 0  # parameters, optimizer and batch, as the compiler lays them out
    temporary_bytes: int = 0
    limit_bytes: int = 0  # that a program may use; 0: unknown
    flops: int = 0  # of matrix products in a step, recomputed ones included
    model_flops: int = 0  # by the closed formula: none recomputed, all queries on all keys
    counted_flops: int = 0  # by the jaxpr of the step that recomputes nothing, as `formula_flops` is by the formula
    formula_flops: int = 0
    hbm_bytes: int = 0  # moved in a step, an estimate
    collectives: dict[str, hlo.Sum] = field(default_factory=dict)
    purposes: dict[str, hlo.Sum] = field(default_factory=dict)
    roofline: Roofline | None = None
    compile_seconds: float = 0.0
    refused: str = ""  # why the compiler refused it
    largest: tuple[str, ...] = ()  # what took the memory, where it refused
    constants: dict[str, str] = field(default_factory=dict)

    @property
    def used_bytes(self) -> int:
        """Of a device's memory; the state is updated in place."""
        return self.arguments_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        """Whether it does, as far as is known."""
        return not self.refused and (not self.limit_bytes or self.used_bytes <= self.limit_bytes)

    def utilisation(self, seconds: float, peak: float) -> float:
        """Model FLOPs utilisation (Chowdhery et al. 2022) of a step that takes so long."""
        return self.model_flops / (self.devices * peak * seconds)


def plan(run: RunConfig, topology: str = "", name: str = "") -> Plan:
    """The plan of a run on a topology such as `v5e:4x4`; empty: on the devices that are here.

    Nothing is read: neither data, which need not be there, nor weights.  Where the length of the data would decide on
    the rows of a batch (`examples`), `batch` says it.  Raises UserError for a mesh that does not fit and for an
    unknown topology; a program that is too large comes back as a plan that does not fit.
    """
    devices = chips.topology(topology) if topology else jax.devices()
    run, config = alone(run)
    task, config = task_of(run, config)
    mesh = sharding.make_mesh(run.mesh, devices)
    kind = task.module(Transformer)
    made = assemble(run, task, config, mesh, kind)
    batch = batch_of(run, task, mesh)
    chip = chips.find(devices[0].device_kind)
    known: dict[str, Any] = {
        "config": name,
        "topology": topology or f"{len(devices)} x {devices[0].device_kind}",
        "devices": mesh.size,
        "kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "batch": run.batch,
        "tokens": sum(
            math.prod(batch[field].shape) for field in ("segments_BT", "source_segments_BS") if field in batch
        ),
        "remat": remat_of(run, mesh),
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made.like.model)),
        "parameter_bytes": _bytes(made.like.model),
        "optimizer_bytes": _bytes(made.like.opt_state),
        "limit_bytes": int((chip.usable or chip.hbm).value) if chip else 0,
        "constants": {what: str(constant) for what, constant in (chip.constants if chip else {}).items()},
    }
    counted, formula, model_flops = _model_flops(run, task, config, mesh, kind, batch)
    traced = made.train_step.trace(made.like, batch)
    known |= {"counted_flops": counted, "formula_flops": formula, "model_flops": model_flops}
    known |= {"flops": flops.count(traced.jaxpr)}
    begun = time.monotonic()
    try:
        compiled, text = _compiled(traced.lower(), of_tpu=bool(topology))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused, largest = _refusal(str(error))
        largest = largest or _largest(traced.jaxpr)
        return Plan(**known, refused=refused, largest=largest, compile_seconds=time.monotonic() - begun)
    known["compile_seconds"] = time.monotonic() - begun
    memory = compiled.memory_analysis()
    program = hlo.read(text)
    found = hlo.collectives(program)
    moved = hlo.hbm_bytes(program)
    roofline = None
    if chip is not None:
        shape = chips.parse(topology)[1] if topology else ()
        seconds = sum(one.sent_bytes * one.times / _rate(one, mesh, chip, shape) for one in found)
        roofline = Roofline(known["flops"] / mesh.size / chip.flops.value, moved / chip.bandwidth.value, seconds)
    return Plan(
        **known,
        arguments_bytes=memory.argument_size_in_bytes,
        # Results that have no argument's place to go to need one of their own.
        temporary_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        hbm_bytes=moved,
        collectives=hlo.by_kind(found),
        purposes=hlo.by_purpose(found),
        roofline=roofline,
    )


def _compiled(lowered: Any, of_tpu: bool) -> tuple[Any, str]:
    """The program, and its text; of a TPU's as its compiler writes it to a file, since jaxlib cannot read all of what a
    newer libtpu says."""
    if not of_tpu:
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (text,) = (file.read_text() for file in Path(folder).glob("*train_step*after_optimizations.txt"))
    return compiled, text


# ---- the run without its data


class StandIn:
    """The tokenizer of a plan: tokens that tasks ask for, and no text."""

    def __init__(self, size: int):
        self.size, self.continues = size, np.zeros(size, bool)
        self.bos = self.cls = 1
        self.eos = self.sep = 2
        self.mask, self.pad, self.unk = 3, 0, 3

    @property
    def target(self) -> StandIn:
        """Of the texts that are written: the same."""
        return self

    @property
    def backend(self) -> StandIn:
        """What knows tokens by their names: itself."""
        return self

    def token_to_id(self, name: str) -> int | None:
        """A place at the end of the vocabulary, for the sentinels of T5."""
        found = re.fullmatch(r"<extra_id_(\d+)>", name)
        return self.size - 1 - int(found[1]) if found and int(found[1]) < SENTINELS else None

    def room(self, length: int, pair: bool) -> int:
        """Tokens that are left of a row, less [CLS] and one or two [SEP]."""
        return length - 3 if pair else length - 2


def alone(run: RunConfig) -> tuple[RunConfig, ModelConfig]:
    """The run as its config alone says it, and its model."""
    config = run.model
    if config is None:
        if not run.init:
            raise UserError(
                "the config starts from the weights that --init names; give a model, or a preset, such as "
                "--init bert-base"
            )
        said = PRESETS.get(run.init) or look(find(run.init)).config
        config = with_dropout(said, run.dropout)
    data = replace(run.data, path=run.data.path or "not read")
    run = replace(run, model=config, init="", dropout=None, data=data, examples=0, epochs=0.0)
    run.check()
    return run, config


def task_of(run: RunConfig, config: ModelConfig) -> tuple[Task, ModelConfig]:
    """The run's task without its tokenizer, and the model that it makes of the config."""
    tokenizer: Any = StandIn(config.vocabulary)
    if isinstance(run.task, MultiTask):
        task = make_task(run, tokenizer, dict.fromkeys(run.task.parts, ("0", "1")))
    else:
        labelled = getattr(run.task, "has_label_head", True)
        task = make_task(run, tokenizer, config.labels or ("0", "1") if labelled else ())
    return task.bound(config), task.configured(config)


def batch_of(run: RunConfig, task: Task, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch, as `assembly.lay` lays it."""
    batches = task.batches(_nothing(task), run.batch, run.data.length, run.seed)

    def laid(name: str, x: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = (run.accumulate, len(x) // run.accumulate, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding.batch_sharding(mesh, name, shape))

    return {name: laid(name, x) for name, x in batches.nothing().items()}


def _nothing(task: Task) -> Any:
    """A part of the data with nothing in it."""
    if isinstance(task, RecordTask):
        return Records([], [])
    if hasattr(task, "parts"):
        return Parts({name: Records([], []) for name in task.parts})
    none = np.zeros(1, np.int64)
    return Corpus(np.zeros(0, np.uint16), none, none, 0)


# ---- counting


def _model_flops(
    run: RunConfig, task: Task, config: ModelConfig, mesh: Any, kind: Any, batch: dict[str, Any]
) -> tuple[int, int, int]:
    """Of the step that recomputes nothing, with attention by XLA: counted, by the formula; and by PaLM's convention."""
    plainly = assemble(replace(run, remat="none", attention="xla"), task, config, mesh, kind)
    counted = flops.count(plainly.train_step.trace(plainly.like, batch).jaxpr)
    formula = lambda blocks: closed_flops(task, config, run.batch, batch, blocks=blocks)
    return counted, formula(sharding.ways(mesh, "length") == 1), formula(False)


def _bytes(tree: Any) -> int:
    """Of one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _rate(one: hlo.Collective, mesh: jax.sharding.Mesh, chip: Chip, shape: tuple[int, ...]) -> float:
    """Bytes a second that a device sends in a collective: over a link, both ways where it closes to a ring, for each
    dimension of the torus that the group spans."""
    group = one.groups[0] if one.groups else ()
    if not chip.dimensions or not shape or not group:
        return chip.link.value
    devices = mesh.devices.flat
    places = np.array([devices[i].coords[: len(shape)] for i in group])
    spans = [len(set(axis)) for axis in places.T.tolist()]
    whole = zip(spans, shape, chips.rings(chip, shape))
    lanes = sum(2 if ring and span == size else 1 for span, size, ring in whole if span > 1)
    return chip.link.value * max(1, lanes)


def _refusal(message: str) -> tuple[str, tuple[str, ...]]:
    """What the compiler says of a program that is too large, and the largest that it would have held."""
    said = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    early = re.search(r"HLO temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", message)
    if said:
        refused = f"it needs {said[1]} of {said[2]}"
    elif early:
        refused = f"it needs {early[1]} for temporaries alone, of {early[2]}"
    else:
        refused = message.splitlines()[0][:200]
    largest = []
    for block in re.findall(r"Size: ([\d.]+\w)\n(.*?)(?=\n\s*={5,}|\Z)", message, re.S)[:3]:
        name = re.search(r'op_name="([^"]*)"', block[1])
        shape = re.search(r"Shape: (\S+?)\{", block[1])
        largest.append(f"{block[0]} {shape[1] if shape else ''} {hlo.purpose(name[1]) if name else ''}".strip())
    return refused, tuple(largest)


def _largest(jaxpr: Any, n: int = 3) -> tuple[str, ...]:
    """The largest arrays of a step, those that a loop hands on to the backward pass included; over all devices."""
    found: dict[str, int] = {}

    def look_into(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            what = hlo.purpose(f"{equation.source_info.name_stack}/{equation.primitive.name}")
            for value in equation.outvars:
                if hasattr(value.aval, "shape"):
                    size = math.prod(value.aval.shape) * value.aval.dtype.itemsize
                    found[f"{_gib(size).strip()} over all devices, {value.aval.str_short()} {what}"] = size
            for inner in core.jaxprs_in_params(equation.params):
                look_into(inner)

    look_into(jaxpr.jaxpr)
    return tuple(sorted(found, key=lambda line: -found[line])[:n])


# ---- searching


def fitting(run: RunConfig, topology: str, name: str = "", say: Any = lambda line: None) -> list[Plan]:
    """Plans of ever larger batches for each remat policy, from the cheapest, the best that fits first.

    The best has the most tokens a second by the roofline without overlap.  Batches are doubled from the least that the
    mesh divides.  An empty list: not even that fits.
    """
    devices = chips.topology(topology) if topology else jax.devices()
    least = sharding.ways(sharding.make_mesh(run.mesh, devices), "batch") * run.accumulate
    found: list[Plan] = []
    for remat in ("elementwise", "dots", "full"):
        batch, tried = least, 0
        best: Plan | None = None
        while (one := plan(replace(run, batch=batch, remat=remat), topology, name)).fits:
            say(f"remat {remat:11} batch {batch:6,}: {_gib(one.used_bytes)} fits")
            best, tried, batch = one, tried + 1, batch * 2
            if not one.limit_bytes or tried == 12:
                break
        else:
            say(f"remat {remat:11} batch {batch:6,}: {one.refused or _gib(one.used_bytes)}, does not fit")
            # Between the last that fitted and twice as many.
            step = (batch - best.batch) // 2 if best else 0
            while best and step >= least and step >= best.batch // 8:
                one = plan(replace(run, batch=best.batch + step, remat=remat), topology, name)
                say(f"remat {remat:11} batch {one.batch:6,}: {'fits' if one.fits else 'does not fit'}")
                best, step = (one if one.fits else best), step // 2
        found += [best] if best else []
    speed = lambda one: one.tokens / one.roofline.apart if one.roofline else one.batch
    return sorted(found, key=lambda one: -speed(one))


# ---- telling


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
            f"  in all           {_gib(plan.used_bytes)}{_of_limit(plan)}",
        ]
    lines += [""] + [f"to change: {line}" for line in remedies(plan)] if not plan.fits else []
    ratio = plan.counted_flops / plan.formula_flops
    same = "as the closed formula says" if ratio == 1 else f"{ratio:.4f} of what the closed formula says"
    more = "" if ratio == 1 else ": pooling, and some optimizers, have products of their own"
    lines += [
        "",
        "matrix products of a step, all devices",
        f"  {plan.flops / 1e12:,.4g} TFLOP done, {plan.model_flops / 1e12:,.4g} of the model (nothing recomputed, all "
        "queries on all keys)",
        f"  counted {plan.counted_flops:,} without recomputing, {same}{more}",
    ]
    if plan.collectives:
        lines += ["", "collectives of a step, each device sends"]
        lines += [f"  {_mb(one.sent_bytes)}  {one.times:7,} x {kind}" for kind, one in plan.collectives.items()]
        lines += ["  of which"]
        lines += [f"  {_mb(one.sent_bytes)}  {one.times:7,} x for {what}" for what, one in _first(plan.purposes, 8)]
    if plan.roofline is not None:
        lines += ["", *_rooflines(plan)]
    elif not plan.refused:
        lines += ["", f"no rates are known of {plan.kind}, so no time is predicted"]
    lines += ["", f"compiled in {plan.compile_seconds:.1f} s"]
    return "\n".join(lines)


def _rooflines(plan: Plan) -> list[str]:
    chip, line = chips.find(plan.kind), plan.roofline
    assert chip is not None and line is not None
    peak = chip.flops.value
    speed = lambda seconds: f"{plan.utilisation(seconds, peak):.1%} MFU, {plan.tokens / seconds:,.0f} tokens/s"
    return [
        "a step takes at the least",
        f"  {1000 * line.compute:,.1f} ms for the products, {1000 * line.memory:,.1f} ms for the memory "
        f"({plan.hbm_bytes / GIB:,.1f} GiB, an estimate), {1000 * line.network:,.1f} ms for the network",
        f"  {1000 * line.overlapped:,.1f} ms if all overlap: {speed(line.overlapped)}",
        f"  {1000 * line.apart:,.1f} ms if nothing does: {speed(line.apart)}",
        "by",
        *(f"  {what}: {constant}" for what, constant in plan.constants.items()),
        "  a collective sends by rings, over every dimension of the torus that its group spans",
    ]


def remedies(plan: Plan) -> list[str]:
    """What makes a plan that does not fit smaller, the cheapest first."""
    state = plan.parameter_bytes + plan.optimizer_bytes
    found = []
    if plan.remat != "full":
        found.append("--remat full (or dots, if that is enough): activations of layers are computed anew")
    if plan.limit_bytes and state > plan.limit_bytes / 2:
        found += [
            f"a mesh of more fsdp or tensor: parameters and optimizer alone are {_gib(state).strip()} on each device",
            "--optimizer.momentum-dtype bfloat16, or --optimizer.name adafactor: a sixth, or most, of the state less",
        ]
    found.append("a smaller --batch, or more --accumulate with the same")
    if plan.mesh.get("tensor", 1) == 1:
        found.append("--mesh.tensor 2: activations between the layers are split too")
    return found[:3]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values."""
    sums = lambda found: {name: one._asdict() for name, one in found.items()}
    said = asdict(plan) | {"collectives": sums(plan.collectives), "purposes": sums(plan.purposes)}
    said |= {"used_bytes": plan.used_bytes, "fits": plan.fits, "roofline": None}
    if plan.roofline is not None:
        chip = chips.find(plan.kind)
        assert chip is not None
        of = lambda seconds: {"seconds": seconds, "mfu": plan.utilisation(seconds, chip.flops.value)}
        line = plan.roofline
        said["roofline"] = line._asdict() | {"overlapped": of(line.overlapped), "apart": of(line.apart)}
    return said


def pictured(said: Mapping[str, Any]) -> list[Bars | Table]:
    """What `as_json` says of a plan, for a report or a notebook: its sizes, its memory, and the time of a step."""
    mesh = " x ".join(f"{name} {size}" for name, size in said["mesh"].items() if size > 1) or "one device"
    limit, used = said["limit_bytes"], said["used_bytes"]
    facts = {
        "parameters": f"{said['parameters']:,}",
        "devices": f"{said['devices']:,} x {said['kind']}",
        "mesh": mesh,
        "tokens in a step": f"{said['tokens']:,}",
        "recomputed in the backward pass": said["remat"],
    }
    of = f" of {limit / GIB:,.1f} GiB: " + ("fits" if said["fits"] else "does not fit") if limit else ""
    facts["memory of each device"] = (
        f"does not fit: {said['refused']}" if said["refused"] else f"{used / GIB:,.2f} GiB{of}"
    )
    found: list[Bars | Table] = []
    if not said["refused"]:
        parts = {"parameters": said["parameter_bytes"], "optimizer": said["optimizer_bytes"]}
        parts["temporaries"] = said["temporary_bytes"]
        unit, size = ("GiB", GIB) if used >= GIB else ("MiB", 2**20)
        found.append(Bars("Memory of each device", tuple(parts), tuple(one / size for one in parts.values()), unit))
    if line := said["roofline"]:
        seconds = {"matrix products": line["compute"], "memory": line["memory"], "network": line["network"]}
        times = tuple(1000 * one for one in seconds.values())
        found.append(Bars("A step needs of each, at the least", tuple(seconds), times, "milliseconds"))
        for when, name in (("overlapped", "if all overlap"), ("apart", "if nothing does")):
            one = line[when]
            speed = f"{1000 * one['seconds']:,.1f} ms a step, {one['mfu']:.0%} of the chips' peak"
            facts[name] = f"{speed}, {said['tokens'] / one['seconds']:,.0f} tokens a second"
    title = f"Plan of {said['config']} on {said['topology']}"
    return [Table(title, ("what", "how much"), [[name, str(value)] for name, value in facts.items()], ""), *found]


def _of_limit(plan: Plan) -> str:
    if not plan.limit_bytes:
        return ", as the compiler says; what there is of it is not known"
    left = plan.limit_bytes - plan.used_bytes
    return f" of {_gib(plan.limit_bytes).strip()}: " + (
        f"fits, {_gib(left).strip()} to spare" if left >= 0 else f"does not fit, by {_gib(-left).strip()}"
    )


def _first(found: dict[str, hlo.Sum], n: int) -> Iterable[tuple[str, hlo.Sum]]:
    return list(found.items())[:n]


def _gib(size: int) -> str:
    return f"{size / GIB:8.2f} GiB"


def _mb(size: int) -> str:
    return f"{size / 1e6:12,.1f} MB"

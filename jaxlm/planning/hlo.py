"""Analysis of an optimised HLO program: its collectives, and its memory traffic.

`parse` parses the text of a program that was compiled for TPU, CPU or GPU (`compiled.as_text()`), and counts how often
each computation runs in a step. All numbers are those of one device. The time is linear in the length of the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

COLLECTIVE_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
HBM = 0  # the default memory space; on TPU 1 is VMEM, 2 to 4 and 6 are also on the chip, 5 is on the host


class Buffer(NamedTuple):
    """A buffer: its size in bytes, without the padding of tiles, and its memory space."""

    bytes: int
    space: int = HBM


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    arguments: str  # the text between the parentheses
    attributes: str  # the text after the parentheses
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The buffers of the result; those of tuples are flattened."""
        return _buffers(self.shape)

    @property
    def op_name(self) -> str:
        """The names of the JAX functions and modules that it was compiled from, or an empty string."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def called(self, attribute: str) -> str | None:
        """Returns the computation in an attribute such as `calls`."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


Computation = dict[str, Instruction]


class Loop(NamedTuple):
    """A while loop."""

    name: str
    body: str
    trips: int | None  # None: unknown; the body is then counted once


class Program(NamedTuple):
    """A parsed program."""

    computations: dict[str, Computation]
    entry: str  # name of a computation
    devices: int
    times: dict[str, int]  # executions of each computation in a step; each branch of a conditional counts as taken
    fused: frozenset[str]  # computations inside one instruction; their intermediate results are not in memory
    loops: tuple[Loop, ...]


_BITS = {"pred": 8, "token": 0, "opaque": 0}  # for other dtypes, the first number of the name: f32, bf16, f8e4m3fn, s4


@lru_cache(maxsize=100_000)
def _buffers(shape: str) -> tuple[Buffer, ...]:
    buffers = []
    for dtype, sizes, layout in re.findall(r"\b([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?", shape):
        entries = math.prod(int(size) for size in re.findall(r"\d+", sizes))
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
        space = re.search(r"S\((\d+)\)", layout)
        buffers.append(Buffer(-(-entries * bits // 8), int(space[1]) if space else HBM))
    return tuple(buffers)


_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_PARENTHESIS = re.compile(r"[()]")


def _closing_parenthesis(line: str, start: int) -> int:
    """Returns the position of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in _PARENTHESIS.finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(line) - 1


def _parse_instruction(line: str) -> Instruction | None:
    match = _LINE.match(line)
    if not match:
        return None
    start = match.end()
    end = _closing_parenthesis(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    opening = line.find("(", end)
    if end <= 0 or opening < 0:
        return None
    closing = _closing_parenthesis(line, opening)
    opcode = line[end:opening].strip()
    return Instruction(
        match[2], line[start:end], opcode, line[opening + 1 : closing], line[closing + 1 :], bool(match[1])
    )


def _lines(text: str) -> Iterator[str]:
    """Yields the lines of a text, one for each instruction: attributes of Pallas kernels contain line breaks."""
    pending: list[str] = []
    for line in text.splitlines():
        if pending and not _LINE.match(line) and line != "}" and not line.startswith("}, execution_thread"):
            pending.append(line)
            continue
        if pending:
            yield "".join(pending)
        pending = [line] if _LINE.match(line) else []
        if not pending:
            yield line
    yield "".join(pending)


def parse(text: str) -> Program:
    """Parses the text of a compiled program.

    Args:
      text: the text, `compiled.as_text()`.

    Raises:
      ValueError: if no computation is marked as the entry.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _lines(text):
        if current is None:
            if head := _HEAD.match(line):
                current = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _parse_instruction(line):
            current[instruction.name] = instruction
    header = text[: text.find("\n")]
    if not entry:
        raise ValueError(
            "the text is not a compiled program: no computation is marked ENTRY; pass the result of compiled.as_text()"
        )
    counts = [re.search(rf"{name}=(\d+)", header) for name in ("num_partitions", "replica_count")]
    devices = math.prod(int(count[1]) for count in counts if count)
    times, fused, loops = _times(computations, entry)
    return Program(computations, entry, devices, times, fused, loops)


def _times(computations: dict[str, Computation], entry: str) -> tuple[dict[str, int], frozenset[str], tuple[Loop, ...]]:
    times = dict.fromkeys(computations, 0) | {entry: 1}
    fused: set[str] = set()
    loops: list[Loop] = []
    for name in reversed(computations):  # a computation comes after all computations that it calls
        if not times[name]:
            continue
        for instruction in computations[name].values():
            for called, count, is_fused in _calls(instruction, computations[name], computations, loops):
                if called in times:
                    times[called] += count * times[name]
                    if is_fused or name in fused:
                        fused.add(called)
    return times, frozenset(fused), tuple(loops)


_CALL_ATTRIBUTES = {"fusion": "calls", "call": "to_apply", "async-start": "calls"}


def _calls(
    instruction: Instruction, own: Computation, computations: dict[str, Computation], loops: list[Loop]
) -> Iterator[tuple[str, int, bool]]:
    """Yields the computations that an instruction runs, how often, and whether they are fused into it."""
    opcode = instruction.opcode
    if opcode == "while":
        body, condition = instruction.called("body"), instruction.called("condition")
        if body and condition:
            loop = Loop(instruction.name, body, _trips(instruction, own, computations, body, condition))
            loops.append(loop)
            count = 1 if loop.trips is None else loop.trips
            yield body, count, False
            yield condition, count + 1, False
    elif opcode in _CALL_ATTRIBUTES:
        if called := instruction.called(_CALL_ATTRIBUTES[opcode]):
            yield called, 1, opcode == "fusion"
    elif opcode == "custom-call":  # on TPU7x, collectives that run on the SparseCores
        computations_called = re.search(r"called_computations=\{([^}]*)\}", instruction.attributes)
        for called in re.findall(r"[\w.\-]+", computations_called[1]) if computations_called else ():
            yield called, 1, True
    elif opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        for called in re.findall(r"[\w.\-]+", branches[1]) if branches else ():
            yield called, 1, False
        for attribute in ("true_computation", "false_computation"):
            if called := instruction.called(attribute):
                yield called, 1, False


# ---- trip counts

Known = int | tuple | None  # a number, a tuple of Known, or unknown
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "NE": lambda a, b: a != b,
}
_COPIES = {"bitcast", "convert", "copy", "copy-done", "copy-start", "opt-barrier", "optimization-barrier", "reshape"}


def _trips(
    loop: Instruction, own: Computation, computations: dict[str, Computation], body: str, condition: str
) -> int | None:
    """Returns the number of trips of a loop that counts by a constant to a constant, or None for other loops."""
    known = re.search(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    if condition not in computations or body not in computations:
        return None
    first = _Values(computations).of(own, loop.operands[0], ()) if loop.operands else None
    if not isinstance(first, tuple):
        return None
    second = _Values(computations).root(body, (first,))
    compared = [_comparison(computations, condition, state) for state in (first, second)]
    if compared[0] is None or compared[1] is None or compared[0][2] != compared[1][2]:
        return None
    (a, b, direction), (a_next, b_next, _) = compared[0], compared[1]
    holds, gap, change = _COMPARISONS[direction], a - b, (a_next - b_next) - (a - b)
    if not holds(gap, 0):
        return 0
    if not change or ((direction in ("LT", "LE")) != (change > 0) and direction != "NE"):
        return None
    trips = -gap // change + 1 if direction in ("LE", "GE") else -(gap // change)
    return trips if trips >= 0 else None


def _comparison(computations: dict[str, Computation], name: str, state: Known) -> tuple[int, int, str] | None:
    """Returns the two numbers and the direction of a loop's comparison, which may be inside a fusion."""
    values = _Values(computations)
    arguments: tuple[Known, ...] = (state,)
    for _ in range(4):
        root = next((i for i in computations.get(name, {}).values() if i.is_root), None)
        if root is None:
            return None
        if root.opcode == "compare":
            a, b = (values.of(computations[name], operand, arguments) for operand in root.operands)
            direction = re.search(r"direction=(\w+)", root.attributes)
            if isinstance(a, int) and isinstance(b, int) and direction and direction[1] in _COMPARISONS:
                return a, b, direction[1]
            return None
        called = root.called("calls") or root.called("to_apply")
        if root.opcode not in ("fusion", "call") or called is None:
            return None
        arguments = tuple(values.of(computations[name], operand, arguments) for operand in root.operands)
        name = called
    return None


class _Values:
    """Evaluates the integers of a program that depend only on its constants."""

    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations

    def root(self, name: str, arguments: tuple[Known, ...]) -> Known:
        computation = self.computations.get(name, {})
        root = next((i for i in computation.values() if i.is_root), None)
        return None if root is None else self.of(computation, root.name, arguments)

    def of(self, computation: Computation, name: str, arguments: tuple[Known, ...], depth: int = 0) -> Known:
        instruction = computation.get(name)
        if instruction is None or depth > 50:
            return None
        opcode, value = instruction.opcode, lambda operand: self.of(computation, operand, arguments, depth + 1)
        if opcode == "parameter":
            n = int(instruction.arguments)
            return arguments[n] if n < len(arguments) else None
        if opcode == "tuple":
            return tuple(value(operand) for operand in instruction.operands)
        if opcode == "get-tuple-element":
            index, whole = re.search(r"index=(\d+)", instruction.attributes), value(instruction.operands[0])
            return whole[int(index[1])] if index and isinstance(whole, tuple) else None
        if opcode in _COPIES:
            return value(instruction.operands[0])
        if not re.match(r"[su]\d+\[\]", instruction.shape):
            return None
        if opcode == "constant":
            return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None
        if opcode in ("add", "subtract", "multiply"):
            a, b = (value(operand) for operand in instruction.operands)
            if not isinstance(a, int) or not isinstance(b, int):
                return None
            return a + b if opcode == "add" else a - b if opcode == "subtract" else a * b
        called = instruction.called("calls") or instruction.called("to_apply")
        if opcode in ("fusion", "call") and called:
            return self.root(called, tuple(value(operand) for operand in instruction.operands))
        return None


# ---- collectives


class Collective(NamedTuple):
    """A collective, with the bytes of one device."""

    name: str
    kind: str
    operand_bytes: int
    result_bytes: int
    groups: tuple[tuple[int, ...], ...]  # devices, numbered as in the mesh; (from, to) for a collective-permute
    times: int  # in a step
    op_name: str

    @property
    def group_size(self) -> int:
        """Number of devices in a group; 2 for a permute, the sender and the receiver."""
        return max((len(group) for group in self.groups), default=1)

    @property
    def sent_bytes(self) -> int:
        """Bytes that a device sends in one execution, with ring algorithms (How to Scale Your Model, chapter 3)."""
        n = self.group_size
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.operand_bytes
        if self.kind == "all-gather":
            return self.operand_bytes * (n - 1)
        return self.operand_bytes * (n - 1) // n * (2 if self.kind == "all-reduce" else 1)


class CollectiveTotals(NamedTuple):
    """Totals of several collectives in a step: number of executions, and bytes of one device."""

    times: int = 0
    operand_bytes: int = 0
    result_bytes: int = 0
    sent_bytes: int = 0


def collectives(program: Program) -> list[Collective]:
    """Returns all collectives that run, in the order of the program's text.

    An asynchronous pair is counted once, at its start. So is a TPU collective that is repeated in each fusion that
    overlaps with it. A TPU fusion of an all-reduce and a slice is reported as a reduce-scatter.
    """
    started, callers = _started(program), _caller_names(program)
    result = []
    for name, computation in program.computations.items():
        if not program.times[name]:
            continue
        for instruction in computation.values():
            if _kind(instruction) and _is_counted(instruction, name, program, started):
                result.append(_collective(instruction, name, program, callers.get(name, "")))
    return result


def _caller_names(program: Program) -> dict[str, str]:
    """Returns the op_name of each computation's caller, for instructions without an op_name."""
    names: dict[str, str] = {}
    for name in reversed(program.computations):
        for instruction in program.computations[name].values():
            if instruction.opcode in ("fusion", "async-start", "custom-call"):
                for called, *_ in _calls(instruction, {}, {}, []):
                    names[called] = instruction.op_name or names.get(name, "")
    return names


def _kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVE_KINDS else None


def _channel(instruction: Instruction) -> str | None:
    match = re.search(r"channel_id=(\d+)", instruction.attributes)
    return match[1] if match else None


def _target(instruction: Instruction) -> str:
    if instruction.opcode != "custom-call":
        return ""
    match = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return match[1] if match else ""


def _starts(computation: Computation) -> bool:
    return any(_target(instruction) == "AsyncCollectiveStart" for instruction in computation.values())


def _started(program: Program) -> dict[str, set[str]]:
    """Returns, for each channel of TPU's asynchronous fusions, the computations that start it."""
    started: dict[str, set[str]] = {}
    for name in program.fused:
        channels = [_channel(i) for i in program.computations[name].values() if _kind(i)]
        if channels and _starts(program.computations[name]):
            for channel in channels:
                started.setdefault(channel or "", set()).add(name)
    return started


def _is_counted(instruction: Instruction, name: str, program: Program, started: dict[str, set[str]]) -> bool:
    starts = started.get(_channel(instruction) or "", set())
    return name not in program.fused or not starts or name in starts


def _collective(instruction: Instruction, name: str, program: Program, caller: str) -> Collective:
    computation = program.computations[name]
    kind = _kind(instruction) or ""
    groups = _groups(instruction.attributes, kind, program.devices)
    size = max((len(group) for group in groups), default=1)
    read = sum(buffer.bytes for operand in instruction.operands for buffer in _buffers_of(computation, operand))
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    result = {"all-gather": read * size, "reduce-scatter": read // size}.get(kind, read)
    op_name = instruction.op_name or caller
    return Collective(instruction.name, kind, read, result, groups, program.times[name], op_name)


def _buffers_of(computation: Computation, operand: str) -> tuple[Buffer, ...]:
    return computation[operand].buffers if operand in computation else ()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _groups(attributes: str, kind: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Parses groups in any of three formats: {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0), mesh['x'=2,'y'=2] {'x'}."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", attributes)
        return tuple(tuple(_numbers(pair)) for pair in re.findall(r"\{([\d,\s]+)\}", pairs[1])) if pairs else ()
    match = re.search(r"replica_groups=(\{(?:\{[\d,\s]*\},?\s*)*\}|\[[^ ]*|mesh\[.*?\].*?\{'.*?\})", attributes)
    text = match[1] if match else ""
    all_devices = (tuple(range(devices)),)
    if text.startswith("{"):
        listed = re.findall(r"\{([\d,\s]+)\}", text[1:-1])
        return tuple(tuple(_numbers(group)) for group in listed) or all_devices
    if text.startswith("["):
        iota = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", text)
        if iota is None:
            return all_devices
        shape = _numbers(iota[1])
        ids = np.arange(math.prod(shape))
        if iota[2]:
            ids = ids.reshape(_numbers(iota[2]))
            ids = ids.transpose(_numbers(iota[3])) if iota[3] else ids
        return tuple(tuple(row) for row in ids.reshape(shape).tolist())
    if text.startswith("mesh"):
        return _mesh_groups(text)
    return all_devices


def _mesh_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Parses groups along axes of a mesh.

    An axis can be split, as in 'x':(2)4, which is the 4 of 2 x 4 x rest. The mesh can have its devices in another
    order, as in device_ids=([4,2]T(1,0)) or a list.
    """
    axes, device_order, chosen = re.match(r"mesh\[(.*?)\](.*)\{'(.*?)\}", text).groups()  # type: ignore[union-attr]
    chosen = f"'{chosen}"
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    along = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    parts: list[tuple[str, int]] = []  # the axes, with a split axis in three parts
    selected: list[tuple[str, int]] = []
    for name, size in sizes.items():
        split = next(((int(before), int(part)) for axis, before, part in along if axis == name and part), None)
        pieces = [(name, size)] if split is None else [(name, n) for n in (*split, size // math.prod(split))]
        selected += [(name, len(parts) + (0 if split is None else 1))] if any(a[0] == name for a in along) else []
        parts += pieces
    order = [a[0] for a in along]
    inner = [index for _, index in sorted(selected, key=lambda pair: order.index(pair[0]))]
    outer = [index for index in range(len(parts)) if index not in inner]
    ids = np.arange(math.prod(sizes.values()))
    if iota := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_order):
        ids = ids.reshape(_numbers(iota[1])).transpose(_numbers(iota[2]) if iota[2] else None)
    elif len(_numbers(device_order)) == len(ids):
        ids = np.array(_numbers(device_order))
    ids = ids.reshape([size for _, size in parts])
    size = math.prod(parts[index][1] for index in inner)
    return tuple(tuple(row) for row in ids.transpose(outer + inner).reshape(-1, size).tolist())


def by_kind(collectives: Iterable[Collective]) -> dict[str, CollectiveTotals]:
    """Returns the totals of a step for each kind, in descending order of bytes sent."""
    return _totals(collectives, lambda one: one.kind)


def by_purpose(collectives: Iterable[Collective]) -> dict[str, CollectiveTotals]:
    """Returns the totals of a step for each `purpose`, in descending order of bytes sent."""
    return _totals(collectives, lambda one: purpose(one.op_name))


def _totals(collectives: Iterable[Collective], key: Callable[[Collective], str]) -> dict[str, CollectiveTotals]:
    sums: dict[str, CollectiveTotals] = {}
    for one in collectives:
        each = CollectiveTotals(1, one.operand_bytes, one.result_bytes, one.sent_bytes)
        before = sums.get(key(one), CollectiveTotals())
        sums[key(one)] = CollectiveTotals(*(total + one.times * part for total, part in zip(before, each)))
    return dict(sorted(sums.items(), key=lambda item: -item[1].sent_bytes))


_STRUCTURE = re.compile(  # names that come from JAX, not from the model
    r"(jit|pjit|jvp|transpose|vmap|remat|checkpoint|shard_map|custom_\w+|pallas_call)\(.*\)|\w+\.\w+|\.\.\..*|.*->.*|"
    r"while|body|cond|body_fun|cond_fun|branch_\d+_fun|closed_call|core_call|checkpoint|rematted_computation|remat2?|"
    r"Transformer|main|shmap_body"
)


def purpose(op_name: str) -> str:
    """Returns what an instruction is for, from the names of the functions and modules that it was compiled from.

    >>> purpose("jit(step)/jvp(Transformer)/Transformer.decode/decoder/while/body/Block/mlp/up/dot_general")
    'decoder/layers mlp/up'
    >>> purpose("jit(step)/transpose(jvp(Transformer.lm))/lm_head/dot_general")
    'gradients of lm_head'
    """
    if not op_name:
        return "unnamed"
    # The names of merged instructions are in parentheses, separated by colons.
    for _ in range(20):
        shorter = re.sub(r"\(([^():]*(?:\([^()]*(?:\([^()]*\)[^()]*)*\)[^():]*)*):.*\)", r"\1", op_name)
        if shorter == op_name:
            break
        op_name = shorter
    parts = _parts(op_name)
    backward = any(part.startswith("transpose(") for part in parts)
    recomputed = "rematted_computation" in parts
    forward = any(part.startswith("jvp(") for part in parts)
    names = [part for part in parts[:-1] if not _STRUCTURE.fullmatch(part)]
    if "Block" in names:
        block = names.index("Block")
        what = "/".join([*names[:block], "layers"]) + " " + "/".join(names[block + 1 :])
    else:
        what = "/".join(names)
    if not what:
        what = "loss" if forward or backward else "update"
    if recomputed:
        return f"{what.strip()}, recomputed"
    return f"gradients of {what.strip()}" if backward else what.strip()


def _parts(op_name: str) -> list[str]:
    """Splits a name at the slashes outside of parentheses."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(op_name):
        depth += (character == "(") - (character == ")")
        if character == "/" and depth == 0:
            parts.append(op_name[start:position])
            start = position + 1
    return [*parts, op_name[start:]]


# ---- memory traffic


class Move(NamedTuple):
    """The bytes that one execution of an instruction reads from and writes to a device's memory."""

    name: str
    opcode: str
    op_name: str
    read: int
    written: int
    times: int


_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "add-dependency",
    "opt-barrier",
    "optimization-barrier",
    "partition-id",
    "replica-id",
    "domain",
    "async-start",  # the computation that it runs is counted
    "async-update",
    "async-done",
}
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"}
_SLICES = ("slice", "dynamic-slice", "gather")


def moves(program: Program) -> list[Move]:
    """Estimates the HBM traffic of each instruction, and returns those with any.

    An instruction outside of fusions counts with its operands and its result, if they are in HBM and not in the VMEM of
    a TPU. A slice counts with the size of the slice, an update in position with the size of the update. The estimate
    ignores tiles that a product reads several times, the padding of tiles, and the caches of CPU and GPU. So the real
    traffic may be higher on TPU, and lower on CPU and GPU.
    """
    started = _started(program)
    result = []
    for name, computation in program.computations.items():
        if not program.times[name] or name in program.fused:
            continue
        for instruction in computation.values():
            read, written = _moved(instruction, computation, program, started)
            if read or written:
                labels = instruction.name, instruction.opcode, instruction.op_name
                result.append(Move(*labels, read, written, program.times[name]))
    return result


def traffic(program: Program) -> dict[str, int]:
    """Returns the estimated HBM traffic of a whole step on one device for each `purpose`, in bytes, largest first."""
    sums: dict[str, int] = {}
    for move in moves(program):
        what = purpose(move.op_name)
        sums[what] = sums.get(what, 0) + (move.read + move.written) * move.times
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _in_hbm(arrays: Iterable[Buffer]) -> int:
    return sum(buffer.bytes for buffer in arrays if buffer.space == HBM)


def _moved(
    instruction: Instruction, computation: Computation, program: Program, started: dict[str, set[str]]
) -> tuple[int, int]:
    """Returns the bytes read and written by an instruction that is not part of a fusion."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in _FREE or _target(instruction) in _FREE_TARGETS:
        return 0, 0
    sources = [_buffers_of(computation, operand) for operand in operands]
    reads = sum(_in_hbm(source) for source in sources)
    if opcode == "fusion" and (called := instruction.called("calls")) in program.computations:
        fusion = _Fusion(program, called or "", started)
        limits = zip(sources, fusion.reads(len(operands)))
        return sum(min(_in_hbm(source), limit) for source, limit in limits), fusion.written()
    if opcode.endswith("-done"):  # the start reads, the end writes
        return 0, _in_hbm(instruction.buffers)
    kind = opcode.removesuffix("-start")
    if kind in _SLICES and sources:
        # The result of a start is a tuple of the operands, the result and a flag.
        result = instruction.buffers if kind == opcode else instruction.buffers[len(sources[0]) :][:1]
        size = sum(buffer.bytes for buffer in result)
        return min(_in_hbm(sources[0]), size), 0 if kind != opcode else _in_hbm(result)
    if opcode == "dynamic-update-slice" and len(sources) > 1:
        size = sum(buffer.bytes for buffer in sources[1])
        return _in_hbm(sources[1]), min(_in_hbm(sources[0]), size)
    if opcode == "scatter" and len(sources) > 2:
        updates = sum(buffer.bytes for buffer in sources[-1])
        return _in_hbm(sources[-1]) + _in_hbm(sources[1]) + min(_in_hbm(sources[0]), updates), updates
    if kind != opcode:
        return reads, 0
    return reads, _in_hbm(instruction.buffers)


class _Fusion:
    """The bytes that a fused computation reads from its parameters, and those that it writes."""

    def __init__(self, program: Program, name: str, started: dict[str, set[str]]):
        self.program, self.name, self.started = program, name, started
        self.computation = program.computations[name]
        self.users: dict[str, list[tuple[Instruction, int]]] = {}
        self.parameters: dict[int, Instruction] = {}
        for instruction in self.computation.values():
            if instruction.opcode == "parameter":
                self.parameters[int(instruction.arguments)] = instruction
            for position, operand in enumerate(instruction.operands):
                self.users.setdefault(operand, []).append((instruction, position))
        self.root = next((i for i in self.computation.values() if i.is_root), None)

    def reads(self, count: int) -> list[int]:
        """Returns the maximum of bytes read from each parameter."""
        return [self._read(self.parameters[n]) if n in self.parameters else 0 for n in range(count)]

    def _read(self, source: Instruction, depth: int = 0) -> int:
        whole, total = sum(buffer.bytes for buffer in source.buffers), 0
        for user, position in self.users.get(source.name, ()):
            opcode, called = user.opcode, user.called("calls") if user.opcode == "fusion" else None
            if opcode in _SLICES and position == 0:
                total += sum(buffer.bytes for buffer in user.buffers)
            elif (opcode == "dynamic-update-slice" and position == 0) or opcode == "tuple":
                pass  # nothing is moved
            elif opcode in ("bitcast", "get-tuple-element") and depth < 20:
                total += self._read(user, depth + 1)
            elif _kind(user):
                total += whole if _is_counted(user, self.name, self.program, self.started) else 0
            elif _target(user).startswith("AsyncCollective"):
                pass
            elif called in self.program.computations and depth < 20:
                inner = _Fusion(self.program, called or "", self.started)
                total += inner._read(inner.parameters[position], depth + 1) if position in inner.parameters else 0
            else:
                return whole
        return min(total, whole)

    def written(self) -> int:
        """Returns the bytes of the result that are written to HBM."""
        if self.root is None:
            return 0
        if self.root.opcode == "tuple":
            return sum(self._written(self.computation.get(operand)) for operand in self.root.operands)
        return self._written(self.root)

    def _written(self, source: Instruction | None, depth: int = 0) -> int:
        if source is None or source.opcode == "parameter" or _target(source) == "AsyncCollectiveStart":
            return 0
        size = _in_hbm(source.buffers)
        if source.opcode == "dynamic-update-slice" and len(source.operands) > 1:
            return min(size, sum(buffer.bytes for buffer in _buffers_of(self.computation, source.operands[1])))
        if source.opcode == "bitcast" and depth < 20:
            return min(size, self._written(self.computation.get(source.operands[0]), depth + 1)) if size else 0
        if _kind(source) and self.started.get(_channel(source) or ""):
            return 0  # the end of the asynchronous pair writes
        return size

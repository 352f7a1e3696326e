"""What an optimised program does: its collectives, and the bytes that it moves from and to memory.

`read` takes the text of a compiled program (`compiled.as_text()`), of TPU, CPU or GPU, and finds out how often each of
its computations runs in a step.  Everything is of one device.  The text is read once, in time linear in its length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
HBM = 0  # the memory space of arrays that say none; on TPU 1 is VMEM, 2 to 4 and 6 are on the chip too, 5 is the host's


class Array(NamedTuple):
    """A buffer: its bytes, without the padding of tiles, and the memory space that it lies in."""

    bytes: int
    space: int = HBM


class Instruction(NamedTuple):
    """A line of a computation.  `inside` is the text between its parentheses, `rest` what follows them."""

    name: str
    shape: str
    opcode: str
    inside: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it reads."""
        return re.findall(r"%([\w.\-]+)", self.inside)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays that it gives, those of tuples one after another."""
        return _arrays(self.shape)

    @property
    def op_name(self) -> str:
        """The names of the JAX functions and modules that it was made for; may be empty."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `calls` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


Computation = dict[str, Instruction]


class Loop(NamedTuple):
    """A while loop; trips is None where the program does not tell, and its body is then counted once."""

    name: str
    body: str
    trips: int | None


class Program(NamedTuple):
    """times: how often each computation runs in a step; of a condition's branches each is counted as if it were taken.
    fused: computations that are parts of one instruction, and of which nothing but its ends lies in memory."""

    computations: dict[str, Computation]
    entry: str
    devices: int
    times: dict[str, int]
    fused: frozenset[str]
    loops: tuple[Loop, ...]


_BITS = {"pred": 8, "token": 0, "opaque": 0}  # of the others the first number in the name: f32, bf16, f8e4m3fn, s4


@lru_cache(maxsize=100_000)
def _arrays(shape: str) -> tuple[Array, ...]:
    found = []
    for dtype, sizes, layout in re.findall(r"\b([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?", shape):
        entries = math.prod(int(size) for size in re.findall(r"\d+", sizes))
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(-(-entries * bits // 8), int(space[1]) if space else HBM))
    return tuple(found)


_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_PARENTHESIS = re.compile(r"[()]")


def _closing(line: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _PARENTHESIS.finditer(line, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(line) - 1


def _instruction(line: str) -> Instruction | None:
    found = _LINE.match(line)
    if not found:
        return None
    start = found.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    opening = line.find("(", end)
    if end <= 0 or opening < 0:
        return None
    closing = _closing(line, opening)
    opcode = line[end:opening].strip()
    return Instruction(
        found[2], line[start:end], opcode, line[opening + 1 : closing], line[closing + 1 :], bool(found[1])
    )


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, those joined that are one instruction: attributes of Pallas kernels have line breaks."""
    waiting: list[str] = []
    for line in text.splitlines():
        if waiting and not _LINE.match(line) and line != "}" and not line.startswith("}, execution_thread"):
            waiting.append(line)
            continue
        if waiting:
            yield "".join(waiting)
        waiting = [line] if _LINE.match(line) else []
        if not waiting:
            yield line
    yield "".join(waiting)


def read(text: str) -> Program:
    """The program of a text.  Raises ValueError where it has no computation that is its entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _lines(text):
        if current is None:
            if head := _HEAD.match(line):
                current = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _instruction(line):
            current[found.name] = found
    header = text[: text.find("\n")]
    if not entry:
        raise ValueError("the text is not that of a compiled program: no computation is marked ENTRY")
    counts = [re.search(rf"{name}=(\d+)", header) for name in ("num_partitions", "replica_count")]
    devices = math.prod(int(count[1]) for count in counts if count)
    times, fused, loops = _times(computations, entry)
    return Program(computations, entry, devices, times, fused, loops)


def _times(computations: dict[str, Computation], entry: str) -> tuple[dict[str, int], frozenset[str], tuple[Loop, ...]]:
    times = dict.fromkeys(computations, 0) | {entry: 1}
    fused: set[str] = set()
    loops: list[Loop] = []
    for name in reversed(computations):  # a computation stands behind all that it calls
        if not times[name]:
            continue
        for instruction in computations[name].values():
            for called, often, inside in _calls(instruction, computations[name], computations, loops):
                if called in times:
                    times[called] += often * times[name]
                    if inside or name in fused:
                        fused.add(called)
    return times, frozenset(fused), tuple(loops)


_RUNS = {"fusion": "calls", "call": "to_apply", "async-start": "calls"}  # the attribute that names what runs


def _calls(
    instruction: Instruction, own: Computation, computations: dict[str, Computation], loops: list[Loop]
) -> Iterator[tuple[str, int, bool]]:
    """The computations that an instruction runs, how often, and whether as parts of itself."""
    opcode = instruction.opcode
    if opcode == "while":
        body, condition = instruction.called("body"), instruction.called("condition")
        if body and condition:
            loop = Loop(instruction.name, body, _trips(instruction, own, computations, body, condition))
            loops.append(loop)
            often = 1 if loop.trips is None else loop.trips
            yield body, often, False
            yield condition, often + 1, False
    elif opcode in _RUNS:
        if called := instruction.called(_RUNS[opcode]):
            yield called, 1, opcode == "fusion"
    elif opcode == "custom-call":  # TPU7x has collectives done by its SparseCores so
        computed = re.search(r"called_computations=\{([^}]*)\}", instruction.rest)
        for called in re.findall(r"[\w.\-]+", computed[1]) if computed else ():
            yield called, 1, True
    elif opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
        for called in re.findall(r"[\w.\-]+", branches[1]) if branches else ():
            yield called, 1, False
        for attribute in ("true_computation", "false_computation"):
            if called := instruction.called(attribute):
                yield called, 1, False


# ---- trip counts

Known = int | tuple | None  # a number, a tuple of Known, or not known
_COMPARED: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "NE": lambda a, b: a != b,
}
_SAME = ("copy", "convert", "bitcast", "copy-start", "copy-done", "opt-barrier", "optimization-barrier", "reshape")


def _trips(
    loop: Instruction, own: Computation, computations: dict[str, Computation], body: str, condition: str
) -> int | None:
    """Of a loop that counts by a constant to a constant; None for others."""
    said = re.search(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)', loop.rest)
    if said:
        return int(said[1])
    if condition not in computations or body not in computations:
        return None
    first = _Values(computations).of(own, loop.operands[0], ()) if loop.operands else None
    if not isinstance(first, tuple):
        return None
    second = _Values(computations).root(body, (first,))
    compared = [_compared(computations, condition, state) for state in (first, second)]
    if compared[0] is None or compared[1] is None or compared[0][2] != compared[1][2]:
        return None
    (a, b, direction), (a_next, b_next, _) = compared[0], compared[1]
    holds, gap, change = _COMPARED[direction], a - b, (a_next - b_next) - (a - b)
    if not holds(gap, 0):
        return 0
    if not change or ((direction in ("LT", "LE")) != (change > 0) and direction != "NE"):
        return None
    trips = -gap // change + 1 if direction in ("LE", "GE") else -(gap // change)
    return trips if trips >= 0 else None


def _compared(computations: dict[str, Computation], name: str, state: Known) -> tuple[int, int, str] | None:
    """The two numbers that a loop's condition compares, and how; of a comparison that was made a fusion, too."""
    values = _Values(computations)
    arguments: tuple[Known, ...] = (state,)
    for _ in range(4):
        root = next((i for i in computations.get(name, {}).values() if i.root), None)
        if root is None:
            return None
        if root.opcode == "compare":
            a, b = (values.of(computations[name], operand, arguments) for operand in root.operands)
            direction = re.search(r"direction=(\w+)", root.rest)
            if isinstance(a, int) and isinstance(b, int) and direction and direction[1] in _COMPARED:
                return a, b, direction[1]
            return None
        called = root.called("calls") or root.called("to_apply")
        if root.opcode not in ("fusion", "call") or called is None:
            return None
        arguments = tuple(values.of(computations[name], operand, arguments) for operand in root.operands)
        name = called
    return None


class _Values:
    """Evaluates the whole numbers of a program that follow from its constants."""

    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations

    def root(self, name: str, arguments: tuple[Known, ...]) -> Known:
        computation = self.computations.get(name, {})
        root = next((i for i in computation.values() if i.root), None)
        return None if root is None else self.of(computation, root.name, arguments)

    def of(self, computation: Computation, name: str, arguments: tuple[Known, ...], depth: int = 0) -> Known:
        found = computation.get(name)
        if found is None or depth > 50:
            return None
        opcode, one = found.opcode, lambda operand: self.of(computation, operand, arguments, depth + 1)
        if opcode == "parameter":
            n = int(found.inside)
            return arguments[n] if n < len(arguments) else None
        if opcode == "tuple":
            return tuple(one(operand) for operand in found.operands)
        if opcode == "get-tuple-element":
            index, whole = re.search(r"index=(\d+)", found.rest), one(found.operands[0])
            return whole[int(index[1])] if index and isinstance(whole, tuple) else None
        if opcode in _SAME:
            return one(found.operands[0])
        if not re.match(r"[su]\d+\[\]", found.shape):
            return None
        if opcode == "constant":
            return int(found.inside) if re.fullmatch(r"-?\d+", found.inside) else None
        if opcode in ("add", "subtract", "multiply"):
            a, b = (one(operand) for operand in found.operands)
            if not isinstance(a, int) or not isinstance(b, int):
                return None
            return a + b if opcode == "add" else a - b if opcode == "subtract" else a * b
        called = found.called("calls") or found.called("to_apply")
        if opcode in ("fusion", "call") and called:
            return self.root(called, tuple(one(operand) for operand in found.operands))
        return None


# ---- collectives


class Collective(NamedTuple):
    """A collective of one device: what it reads and gives in bytes, with whom, and how often in a step.

    groups: the devices of each group, numbered as in the mesh; of a collective-permute the pairs (from, to).
    """

    name: str
    kind: str
    operand_bytes: int
    result_bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: int
    op_name: str

    @property
    def group_size(self) -> int:
        """Devices that take part together; 2 of a permute, the one that sends and the one that receives."""
        return max((len(group) for group in self.groups), default=1)

    @property
    def sent_bytes(self) -> int:
        """What a device sends in one execution, by the ring algorithms (How to Scale Your Model, chapter 3)."""
        n = self.group_size
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.operand_bytes
        if self.kind == "all-gather":
            return self.operand_bytes * (n - 1)
        return self.operand_bytes * (n - 1) // n * (2 if self.kind == "all-reduce" else 1)


class Sum(NamedTuple):
    """Collectives together, in a step: how many executions, and bytes of one device."""

    times: int = 0
    operand_bytes: int = 0
    result_bytes: int = 0
    sent_bytes: int = 0


def collectives(program: Program) -> list[Collective]:
    """Every collective that runs, in the order of the program's text.

    An asynchronous pair is counted once, at its start.  On TPU a collective may be repeated in each of the fusions that
    it runs beside, and a reduce-scatter be written as a fusion of an all-reduce with a slice; both are seen through.
    """
    started, callers = _started(program), _callers(program)
    found = []
    for name, computation in program.computations.items():
        if not program.times[name]:
            continue
        for instruction in computation.values():
            if _kind(instruction) and _counts(instruction, name, program, started):
                found.append(_collective(instruction, name, program, callers.get(name, "")))
    return found


def _callers(program: Program) -> dict[str, str]:
    """Of each computation that an instruction runs the op_name of that; what is in it may have none of its own."""
    names: dict[str, str] = {}
    for name in reversed(program.computations):
        for instruction in program.computations[name].values():
            if instruction.opcode in ("fusion", "async-start", "custom-call"):
                for called, *_ in _calls(instruction, {}, {}, []):
                    names[called] = instruction.op_name or names.get(name, "")
    return names


def _kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _channel(instruction: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", instruction.rest)
    return found[1] if found else None


def _target(instruction: Instruction) -> str:
    found = (
        re.search(r'custom_call_target="([^"]*)"', instruction.rest) if instruction.opcode == "custom-call" else None
    )
    return found[1] if found else ""


def _starts(computation: Computation) -> bool:
    return any(_target(instruction) == "AsyncCollectiveStart" for instruction in computation.values())


def _started(program: Program) -> dict[str, set[str]]:
    """Of each channel that TPU's asynchronous fusions begin, the computations that do."""
    started: dict[str, set[str]] = {}
    for name in program.fused:
        channels = [_channel(i) for i in program.computations[name].values() if _kind(i)]
        if channels and _starts(program.computations[name]):
            for channel in channels:
                started.setdefault(channel or "", set()).add(name)
    return started


def _counts(instruction: Instruction, name: str, program: Program, started: dict[str, set[str]]) -> bool:
    begun = started.get(_channel(instruction) or "", set())
    return name not in program.fused or not begun or name in begun


def _collective(instruction: Instruction, name: str, program: Program, caller: str) -> Collective:
    computation = program.computations[name]
    kind = _kind(instruction) or ""
    groups = _groups(instruction.rest, kind, program.devices)
    size = max((len(group) for group in groups), default=1)
    read = sum(array.bytes for operand in instruction.operands for array in _of(computation, operand))
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    given = {"all-gather": read * size, "reduce-scatter": read // size}.get(kind, read)
    op_name = instruction.op_name or caller
    return Collective(instruction.name, kind, read, given, groups, program.times[name], op_name)


def _of(computation: Computation, operand: str) -> tuple[Array, ...]:
    return computation[operand].arrays if operand in computation else ()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _groups(rest: str, kind: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Of the three ways in which groups are written: {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0), mesh['x'=2,'y'=2] {'x'}."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", rest)
        return tuple(tuple(_numbers(pair)) for pair in re.findall(r"\{([\d,\s]+)\}", pairs[1])) if pairs else ()
    found = re.search(r"replica_groups=(\{(?:\{[\d,\s]*\},?\s*)*\}|\[[^ ]*|mesh\[.*?\].*?\{'.*?\})", rest)
    text = found[1] if found else ""
    every = (tuple(range(devices)),)
    if text.startswith("{"):
        listed = re.findall(r"\{([\d,\s]+)\}", text[1:-1])
        return tuple(tuple(_numbers(group)) for group in listed) or every
    if text.startswith("["):
        iota = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", text)
        if iota is None:
            return every
        shape = _numbers(iota[1])
        ids = np.arange(math.prod(shape))
        if iota[2]:
            ids = ids.reshape(_numbers(iota[2]))
            ids = ids.transpose(_numbers(iota[3])) if iota[3] else ids
        return tuple(tuple(row) for row in ids.reshape(shape).tolist())
    if text.startswith("mesh"):
        return _mesh_groups(text)
    return every


def _mesh_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Groups along axes of a mesh; an axis may be given in part, as 'x':(2)4, the 4 in the middle of 2 x 4 x rest, and
    the mesh may have its devices in another order, as device_ids=([4,2]T(1,0)) or a list."""
    named, order_of, chosen = re.match(r"mesh\[(.*?)\](.*)\{'(.*?)\}", text).groups()  # type: ignore[union-attr]
    chosen = f"'{chosen}"
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named)}
    along = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    parts: list[tuple[str, int]] = []  # the axes, those in part divided in three
    wanted: list[tuple[str, int]] = []
    for name, size in sizes.items():
        cut = next(((int(before), int(part)) for axis, before, part in along if axis == name and part), None)
        pieces = [(name, size)] if cut is None else [(name, cut[0]), (name, cut[1]), (name, size // math.prod(cut))]
        wanted += [(name, len(parts) + (0 if cut is None else 1))] if any(a[0] == name for a in along) else []
        parts += pieces
    order = [a[0] for a in along]
    inside = [place for _, place in sorted(wanted, key=lambda pair: order.index(pair[0]))]
    outside = [place for place in range(len(parts)) if place not in inside]
    ids = np.arange(math.prod(sizes.values()))
    if turned := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order_of):
        ids = ids.reshape(_numbers(turned[1])).transpose(_numbers(turned[2]) if turned[2] else None)
    elif len(_numbers(order_of)) == len(ids):
        ids = np.array(_numbers(order_of))
    ids = ids.reshape([size for _, size in parts])
    size = math.prod(parts[place][1] for place in inside)
    return tuple(tuple(row) for row in ids.transpose(outside + inside).reshape(-1, size).tolist())


def by_kind(found: Iterable[Collective]) -> dict[str, Sum]:
    """Sums of a step for each kind, the one with most bytes sent first."""
    return _summed(found, lambda one: one.kind)


def by_purpose(found: Iterable[Collective]) -> dict[str, Sum]:
    """Sums of a step for what the collectives serve (`purpose`), the one with most bytes sent first."""
    return _summed(found, lambda one: purpose(one.op_name))


def _summed(found: Iterable[Collective], key: Callable[[Collective], str]) -> dict[str, Sum]:
    sums: dict[str, Sum] = {}
    for one in found:
        each = Sum(1, one.operand_bytes, one.result_bytes, one.sent_bytes)
        before = sums.get(key(one), Sum())
        sums[key(one)] = Sum(*(total + one.times * part for total, part in zip(before, each)))
    return dict(sorted(sums.items(), key=lambda item: -item[1].sent_bytes))


_STRUCTURE = re.compile(  # of a program, not of a model
    r"(jit|pjit|jvp|transpose|vmap|remat|checkpoint|shard_map|custom_\w+|pallas_call)\(.*\)|\w+\.\w+|\.\.\..*|.*->.*|"
    r"while|body|cond|body_fun|cond_fun|branch_\d+_fun|closed_call|core_call|checkpoint|rematted_computation|remat2?|"
    r"Transformer|main|shmap_body"
)


def purpose(op_name: str) -> str:
    """What an instruction serves, from the names of the functions and modules that it was made for.

    >>> purpose("jit(step)/jvp(Transformer)/Transformer.decode/decoder/while/body/Block/mlp/up/dot_general")
    'decoder/layers mlp/up'
    >>> purpose("jit(step)/transpose(jvp(Transformer.lm))/lm_head/dot_general")
    'gradients of lm_head'
    """
    if not op_name:
        return "unnamed"
    # Where several instructions were made one, their names stand in parentheses, divided by colons.
    for _ in range(20):
        shorter = re.sub(r"\(([^():]*(?:\([^()]*(?:\([^()]*\)[^()]*)*\)[^():]*)*):.*\)", r"\1", op_name)
        if shorter == op_name:
            break
        op_name = shorter
    parts = _parts(op_name)
    backward = any(part.startswith("transpose(") for part in parts)
    again = "rematted_computation" in parts
    forward = any(part.startswith("jvp(") for part in parts)
    named = [part for part in parts[:-1] if not _STRUCTURE.fullmatch(part)]
    if "Block" in named:
        place = named.index("Block")
        what = "/".join([*named[:place], "layers"]) + " " + "/".join(named[place + 1 :])
    else:
        what = "/".join(named)
    if not what:
        what = "loss" if forward or backward else "update"
    if again:
        return f"{what.strip()}, recomputed"
    return f"gradients of {what.strip()}" if backward else what.strip()


def _parts(op_name: str) -> list[str]:
    """Divided at the slashes that are not in parentheses."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(op_name):
        depth += (letter == "(") - (letter == ")")
        if letter == "/" and depth == 0:
            parts.append(op_name[start:place])
            start = place + 1
    return [*parts, op_name[start:]]


# ---- bytes from and to memory


class Move(NamedTuple):
    """What one execution of an instruction reads from and writes to a device's memory, in bytes."""

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
    "async-start",  # what it runs is a computation of its own
    "async-update",
    "async-done",
}
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"}
_SLICES = ("slice", "dynamic-slice", "gather")


def moves(program: Program) -> list[Move]:
    """An estimate of what each instruction moves from and to HBM, those that move nothing left out.

    Counted are the operands and the result of every instruction that is not part of a fusion, where they lie in HBM
    (what TPU's compiler has placed in VMEM is not counted); of what is sliced, the slice; of what is updated in place,
    the update.  Not known here are tiles that a product reads several times, the padding of tiles, and, on CPU and GPU,
    what a cache holds: there the real traffic may be less, on TPU more.
    """
    started = _started(program)
    found = []
    for name, computation in program.computations.items():
        if not program.times[name] or name in program.fused:
            continue
        for instruction in computation.values():
            read, written = _moved(instruction, computation, program, started)
            if read or written:
                each = instruction.name, instruction.opcode, instruction.op_name
                found.append(Move(*each, read, written, program.times[name]))
    return found


def hbm_bytes(program: Program) -> int:
    """The estimate of `moves` for a whole step of one device."""
    return sum((move.read + move.written) * move.times for move in moves(program))


def _in_hbm(arrays: Iterable[Array]) -> int:
    return sum(array.bytes for array in arrays if array.space == HBM)


def _moved(
    instruction: Instruction, computation: Computation, program: Program, started: dict[str, set[str]]
) -> tuple[int, int]:
    """Bytes read and written by an instruction that is not part of a fusion."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in _FREE or _target(instruction) in _FREE_TARGETS:
        return 0, 0
    sources = [_of(computation, operand) for operand in operands]
    reads = sum(_in_hbm(source) for source in sources)
    if opcode == "fusion" and (called := instruction.called("calls")) in program.computations:
        fusion = _Fusion(program, called or "", started)
        inside = zip(sources, fusion.reads(len(operands)))
        return sum(min(_in_hbm(source), most) for source, most in inside), fusion.written()
    if opcode.endswith("-done"):  # the start reads, the end has written
        return 0, _in_hbm(instruction.arrays)
    kind = opcode.removesuffix("-start")
    if kind in _SLICES and sources:
        # A start gives a tuple of the operands, the result and a flag.
        given = instruction.arrays if kind == opcode else instruction.arrays[len(sources[0]) :][:1]
        size = sum(array.bytes for array in given)
        return min(_in_hbm(sources[0]), size), 0 if kind != opcode else _in_hbm(given)
    if opcode == "dynamic-update-slice" and len(sources) > 1:
        size = sum(array.bytes for array in sources[1])
        return _in_hbm(sources[1]), min(_in_hbm(sources[0]), size)
    if opcode == "scatter" and len(sources) > 2:
        updates = sum(array.bytes for array in sources[-1])
        return _in_hbm(sources[-1]) + _in_hbm(sources[1]) + min(_in_hbm(sources[0]), updates), updates
    if kind != opcode:
        return reads, 0
    return reads, _in_hbm(instruction.arrays)


class _Fusion:
    """What a fused computation reads of its parameters, and what it writes."""

    def __init__(self, program: Program, name: str, started: dict[str, set[str]]):
        self.program, self.name, self.started = program, name, started
        self.computation = program.computations[name]
        self.users: dict[str, list[tuple[Instruction, int]]] = {}
        self.parameters: dict[int, Instruction] = {}
        for instruction in self.computation.values():
            if instruction.opcode == "parameter":
                self.parameters[int(instruction.inside)] = instruction
            for place, operand in enumerate(instruction.operands):
                self.users.setdefault(operand, []).append((instruction, place))
        self.root = next((i for i in self.computation.values() if i.root), None)

    def reads(self, count: int) -> list[int]:
        """Bytes read, at most, of each parameter."""
        return [self._read(self.parameters[n]) if n in self.parameters else 0 for n in range(count)]

    def _read(self, source: Instruction, depth: int = 0) -> int:
        whole, total = sum(array.bytes for array in source.arrays), 0
        for user, place in self.users.get(source.name, ()):
            opcode, called = user.opcode, user.called("calls") if user.opcode == "fusion" else None
            if opcode in _SLICES and place == 0:
                total += sum(array.bytes for array in user.arrays)
            elif (opcode == "dynamic-update-slice" and place == 0) or opcode == "tuple":
                pass  # it stays where it is
            elif opcode in ("bitcast", "get-tuple-element") and depth < 20:
                total += self._read(user, depth + 1)
            elif _kind(user):
                total += whole if _counts(user, self.name, self.program, self.started) else 0
            elif _target(user).startswith("AsyncCollective"):
                pass
            elif called in self.program.computations and depth < 20:
                inner = _Fusion(self.program, called or "", self.started)
                total += inner._read(inner.parameters[place], depth + 1) if place in inner.parameters else 0
            else:
                return whole
        return min(total, whole)

    def written(self) -> int:
        """Bytes of the result that lie in HBM and are not there already."""
        if self.root is None:
            return 0
        if self.root.opcode == "tuple":
            return sum(self._written(self.computation.get(operand)) for operand in self.root.operands)
        return self._written(self.root)

    def _written(self, source: Instruction | None, depth: int = 0) -> int:
        if source is None or source.opcode == "parameter" or _target(source) == "AsyncCollectiveStart":
            return 0
        given = _in_hbm(source.arrays)
        if source.opcode == "dynamic-update-slice" and len(source.operands) > 1:
            return min(given, sum(array.bytes for array in _of(self.computation, source.operands[1])))
        if source.opcode == "bitcast" and depth < 20:
            return min(given, self._written(self.computation.get(source.operands[0]), depth + 1)) if given else 0
        if _kind(source) and self.started.get(_channel(source) or ""):
            return 0  # the end of the asynchronous pair writes
        return given


def estimated_cycles(program: Program) -> int | None:
    """Clock cycles of a step by the TPU compiler's own cost model, without collectives; None where it gives none."""
    total, found = 0, False
    for name, computation in program.computations.items():
        if not program.times[name] or name in program.fused:
            continue
        for instruction in computation.values():
            said = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
            if said:
                found, total = True, total + int(said[1]) * program.times[name]
    return total if found else None

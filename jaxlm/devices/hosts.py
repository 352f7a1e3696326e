"""Many hosts in one run: how they find each other, what they tell each other, and how they end together.

A host is a process of JAX.  The files of a run lie where all hosts see them.  A single host is the case of one: nothing
here then waits, copies or starts anything.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

import jaxlm
from jaxlm.config import RunConfig, difference, to_json
from jaxlm.errors import RunError, UserError

Value = TypeVar("Value")

TIMEOUT = 60  # seconds that hosts wait for each other at the start
HEARTBEAT = 60  # seconds of silence after which a host counts as lost, where no connection tells it sooner
BEAT = 3  # seconds between two signs of life, by which the others know which host was lost
PART = 1 << 28  # bytes of a leaf that are gathered at once, beside the leaf itself

# How the backends, their networks and the coordination service say that the other end is gone.
_GONE = (
    "Gloo ",
    "NCCL ",
    "Connection closed by peer",
    "Connection reset by peer",
    "Socket closed",
    "heartbeat",
    "coordination service",
    "CoordinationService",
    "DEADLINE_EXCEEDED",
)


class Rendezvous(NamedTuple):
    """A process of a run: where the coordinator of all is, how many there are, which one this is.  None: as the
    environment says, which JAX reads."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


class _Ends:
    """How this process is to end, where it belongs to many."""

    joined: Rendezvous | None = None
    met: bool = False  # whether all came
    leaving: int | None = None  # the exit code, once that is known
    hook: Any = None  # kept from the garbage collector


# Finding each other


def place(environment: Mapping[str, str]) -> Rendezvous | None:
    """Where this process stands among others, by its environment; None where it is alone.

    JAXLM_COORDINATOR=host:port, of the host with JAXLM_PROCESS=0; JAXLM_PROCESSES and JAXLM_PROCESS.  Without them what
    Slurm's srun, Open MPI's mpirun and Cloud TPU set.  JAXLM_PROCESSES=1 keeps a process alone.  Raises UserError where
    they contradict each other.
    """
    names = ("JAXLM_COORDINATOR", "JAXLM_PROCESSES", "JAXLM_PROCESS")
    given = {name: environment[name] for name in names if environment.get(name)}
    if given.get("JAXLM_PROCESSES") == "1":
        return None
    if given:
        if missing := [name for name in names if name not in given]:
            raise UserError(f"{', '.join(given)} is set, {', '.join(missing)} is not; give all three or none")
        address, count, number = given.values()
        _, colon, port = address.rpartition(":")
        if not colon or not port.isdigit() or int(port) >= 1 << 16:
            raise UserError(f"JAXLM_COORDINATOR is {address!r}; give HOST:PORT, a free port of the host of process 0")
        if not count.isdigit() or not number.isdigit() or int(number) >= int(count):
            raise UserError(
                f"JAXLM_PROCESS is {number!r} of JAXLM_PROCESSES {count!r}; give numbers, the first from 0 to one less "
                f"than the second"
            )
        return Rendezvous(address, int(count), int(number))
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment and tasks != "1":
        return Rendezvous(None, int(tasks) if tasks else None)
    if "OMPI_MCA_orte_hnp_uri" in environment and environment.get("OMPI_COMM_WORLD_SIZE") != "1":
        return Rendezvous(None, int(environment["OMPI_COMM_WORLD_SIZE"]))
    return Rendezvous() if _in_pod(environment) else None


def _in_pod(environment: Mapping[str, str]) -> bool:
    """Whether this is, or may be, one of several hosts of a Cloud TPU."""
    if environment.get("JAX_PLATFORMS") == "cpu":
        return False
    named = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if named or environment.get("MEGASCALE_NUM_SLICES"):
        return "," in (named or "") or environment.get("MEGASCALE_NUM_SLICES", "1") != "1"
    # A TPU VM asks the server of its metadata, which JAX does.
    chips = (found for pattern in ("accel[0-9]*", "vfio/[0-9]*") for found in Path("/dev").glob(pattern))
    return any(chips) and "TPU_SKIP_MDS_QUERY" not in environment and importlib.util.find_spec("libtpu") is not None


def join(where: Rendezvous | None) -> None:
    """Connects this process with the others of its run; for the command line, before JAX looks for devices.

    Raises UserError where they do not all come within JAXLM_TIMEOUT seconds (60).
    """
    if where is None:
        return
    seconds = os.environ.get("JAXLM_TIMEOUT") or str(TIMEOUT)
    if not seconds.isdigit() or not int(seconds):
        raise UserError(f"JAXLM_TIMEOUT is {seconds!r}; give a number of seconds")
    if where.coordinator and where.process == 0:
        _check_free(where.coordinator)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # `agreed` does it, at the next step
    _Ends.joined = where
    _hook_aborts()
    failed: list[Exception] = []

    def connect() -> None:
        how: dict[str, Any] = {"cluster_detection_method": "deactivate"} if where.coordinator else {}
        try:
            jax.distributed.initialize(
                *where,
                initialization_timeout=int(seconds) + 60,  # JAX ends the process then, without a word for its user
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=HEARTBEAT,
                **how,
            )
        except Exception as error:
            failed.append(error)

    # In a thread of its own: the call cannot be interrupted.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(int(seconds))
    address = where.coordinator or _state("coordinator_address") or "the address that JAX found"
    fix = "JAXLM_COORDINATOR" if where.coordinator else "the environment that the scheduler gives (or JAXLM_...)"
    if failed and where == Rendezvous() and "should be defined" in str(failed[0]):  # a TPU VM that is no part of a pod
        _Ends.joined = None
        return
    if failed:
        raise UserError(f"the hosts cannot meet at {address}: {str(failed[0])[:300]}; fix {fix}")
    if thread.is_alive():
        me = "this host" if where.process is None else f"host {where.process}"
        of = f" of {where.processes}" if where.processes else ""
        if _answers(address):
            what = f"{me}{of} waited {seconds} s at {address}, and not all hosts came; start all"
        else:
            what = f"{me}{of} found no coordinator at {address} in {seconds} s; start host 0 there"
        raise UserError(f"{what}, fix {fix}, or wait longer with JAXLM_TIMEOUT")
    _Ends.met = True
    if jax.process_count() > 2:
        threading.Thread(target=_beat, daemon=True).start()


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError):
        return False
    return True


def _check_free(coordinator: str) -> None:
    """Raises UserError where this host cannot listen at the coordinator's port, which JAX does not survive."""
    port = int(coordinator.rpartition(":")[2])
    family, every = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "")
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((every, port))
        except OSError as error:
            raise UserError(
                f"host 0 cannot be the coordinator at {coordinator}: {error.strerror}; give JAXLM_COORDINATOR another "
                f"port, on all hosts"
            ) from None


def _state(name: str) -> Any:
    """What JAX knows of the connection, which it has no public name for; None where it does not say."""
    with suppress(ImportError, AttributeError):
        from jax._src import distributed

        return getattr(distributed.global_state, name)
    return None


def _beat() -> None:
    """Signs of life, as long as there is anybody to see them."""
    client, n = _state("client"), 0
    with suppress(Exception):
        while client is not None:
            client.key_value_set(f"jaxlm/beat/{jax.process_index()}", str(n := n + 1), allow_overwrite=True)
            time.sleep(BEAT)


# Telling each other


def is_first() -> bool:
    """Whether this host is the one that logs, reports and exports."""
    return jax.process_index() == 0


def told(value: Any) -> list[Any]:
    """The JSON value of each host, on all of them."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    room = 1 << int(sizes.max()).bit_length()  # few sizes, few programs
    rows = multihost_utils.process_allgather(np.pad(data, (0, room - len(data))))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


def first(make: Callable[[], Value]) -> Value:
    """What host 0 makes, a JSON value, on all hosts, which wait for it.  Its UserError or RunError is that of all."""
    if jax.process_count() == 1:
        return make()
    return _value(told(_outcome(make) if is_first() else None)[0])


def _outcome(make: Callable[[], Any]) -> dict[str, Any]:
    """What a host makes, or its error, as a JSON value."""
    try:
        return {"value": make()}
    except (UserError, RunError) as error:
        return {"error": str(error), "kind": error.exit_code}


def _value(outcome: dict[str, Any]) -> Any:
    if "error" in outcome:
        raise {kind.exit_code: kind for kind in (UserError, RunError)}[outcome["kind"]](outcome["error"])
    return outcome["value"]


def after_first(make: Callable[[], Value]) -> Value:
    """What each host makes for itself: the others after host 0, to find what it left in the caches."""
    made: list[Value] = []
    first(lambda: made.append(make()))
    return made[0] if made else make()


@contextmanager
def first_holds(hold: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Holds what host 0 holds while the block runs on all hosts, which wait for it.  Its errors are those of all."""
    with ExitStack() as stack:
        first(lambda: stack.enter_context(hold()))
        yield


def agree(run: RunConfig) -> None:
    """Raises UserError, with what differs, where hosts have other configs or versions than host 0."""
    if jax.process_count() == 1:
        return
    versions = {"jaxlm": jaxlm.__version__, "jax": jax.__version__, "source": _source()}
    host_0, *others = told({"run": to_json(run), "version": versions})
    for k, other in enumerate(others, start=1):
        if differ := difference(host_0, other):
            lines = "\n".join(f"  {line}" for line in differ)
            raise UserError(
                f"hosts 0 and {k} of {jax.process_count()} do not have the same run; they differ in (host 0 | host "
                f"{k}):\n{lines}\ngive all hosts the same command, config and code"
            )


def _source() -> str:
    """16 hexadecimal digits of the code of this package."""
    digest = hashlib.sha256()
    top = Path(__file__).parents[1]
    for file in sorted(top.rglob("*.py")):
        digest.update(f"{file.relative_to(top)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def agreed(stop: Callable[[], bool]) -> Callable[[], bool]:
    """`stop`, to be asked after each step, as an answer that all hosts have after the same step.

    Of many hosts it is yes one step after any of them said so: what they said is summed on their devices, behind the
    step that is in progress, and looked at when the next one is.
    """
    if jax.process_count() == 1:
        return stop
    devices = jax.devices()
    layout = NamedSharding(Mesh(np.array(devices), ("all",)), PartitionSpec("all"))
    whole = NamedSharding(layout.mesh, PartitionSpec())
    some = jax.jit(lambda asked: asked.max(), out_shardings=whole)
    said: list[jax.Array] = []

    def ask() -> bool:
        mine = np.full(1, stop(), np.int32)
        said.append(some(jax.make_array_from_callback((len(devices),), layout, lambda _: mine)))
        if devices[0].platform == "cpu":  # as in `fit`: programs must not queue up there
            said[-1].block_until_ready()
        return len(said) > 1 and bool(said.pop(0))

    return ask


# Arrays


def spread(x: Any, layout: Sharding, *, may_alias: bool | None = None) -> jax.Array:
    """An array that every host has, laid out over the devices of all.  may_alias: False for a copy."""
    if layout.is_fully_addressable:
        return jax.device_put(x, layout, may_alias=may_alias)
    if isinstance(x, jax.Array) and x.sharding == layout:
        return x
    x = np.array(x)
    return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])


def whole(tree: Any) -> Any:
    """The tree with what lies on devices of several hosts gathered into each one's memory, leaf by leaf."""
    return jax.tree.map(_gathered, tree)


def fetched(tree: Any) -> Any:
    """Returns the tree as NumPy arrays; every host gets the whole of an array that several hosts share."""
    return jax.device_get(whole(tree))


def _gathered(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    gather = lambda part: np.asarray(_copies(_everywhere(x))(part).addressable_data(0))
    if x.nbytes <= PART or x.shape[0] == 1:
        return gather(x)
    # A stack of layers need not fit on any one device.
    rows = max(1, x.shape[0] * PART // x.nbytes)
    return np.concatenate([gather(x[start : start + rows]) for start in range(0, x.shape[0], rows)])


def first_reads(tree: Any, make: Callable[[Any], Value]) -> Value:
    """Returns on all hosts the JSON value that `make` returns on host 0; the other hosts wait for it.

    An array on devices of several hosts is gathered when host 0 reads it: the whole array, or one entry of its first
    axis. No host has more than that in its memory.

    Args:
        tree: the arrays, the same on all hosts.
        make: takes a tree of objects with the shape and dtype of the arrays. `leaf[i]` reads an entry of the first
            axis, `np.asarray(leaf)` the whole array.

    Raises:
        UserError, RunError: those of host 0, on all hosts.
    """
    if jax.process_count() == 1:
        return make(tree)
    leaves, structure = jax.tree.flatten(tree)

    def read(leaf: int, row: int | None) -> Any:
        x = leaves[leaf]
        if row is None or not isinstance(x, jax.Array) or x.is_fully_addressable:
            return _gathered(x) if row is None else x[row]
        return np.asarray(_row_of(_everywhere(x))(x, np.int32(row)).addressable_data(0))

    if is_first():

        def ask(leaf: int, row: int | None) -> Any:
            told({"read": [leaf, row]})
            return read(leaf, row)

        asked = jax.tree.unflatten(structure, [_Asked(x.shape, x.dtype, partial(ask, i)) for i, x in enumerate(leaves)])
        return _value(told(_outcome(lambda: make(asked)))[0])
    while "read" in (said := told(None)[0]):
        read(*said["read"])
    return _value(said)


@dataclass(frozen=True, eq=False)
class _Asked:
    """An array on several hosts: `ask(row)` gathers an entry of its first axis, `ask(None)` the whole array."""

    shape: tuple[int, ...]
    dtype: Any
    ask: Callable[[int | None], Any]

    def __getitem__(self, row: Any) -> Any:
        return self.ask(int(row))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.ask(None), dtype)


def passed_on(tree: Any, like: Any) -> Any:
    """Returns arrays that host 0 has in its memory on the devices of all hosts.

    Args:
        tree: the arrays; None on the other hosts.
        like: their shapes, dtypes and shardings, `jax.ShapeDtypeStruct`s.
    """
    leaves, structure = jax.tree.flatten(like)
    given = jax.tree.leaves(tree) if is_first() else [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
    passed = [spread(_passed_on(x), leaf.sharding) for x, leaf in zip(given, leaves, strict=True)]
    return jax.tree.unflatten(structure, passed)


def _passed_on(x: np.ndarray) -> np.ndarray:
    """Returns an array of host 0, byte for byte: a sum would make 0 of -0."""
    from jax.experimental import multihost_utils

    content = np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)
    parts = [content[start : start + PART] for start in range(0, len(content), PART)]
    passed = [np.asarray(multihost_utils.broadcast_one_to_all(part)) for part in parts]
    return np.frombuffer(b"".join(part.tobytes() for part in passed), x.dtype).reshape(x.shape)


def _everywhere(x: jax.Array) -> NamedSharding:
    assert isinstance(x.sharding, NamedSharding)
    return NamedSharding(x.sharding.mesh, PartitionSpec())


@functools.lru_cache(maxsize=8)
def _copies(layout: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=layout)


@functools.lru_cache(maxsize=8)
def _row_of(layout: NamedSharding) -> Callable[[jax.Array, np.int32], jax.Array]:
    return jax.jit(lambda x, row: x[row], out_shardings=layout)


# Ending together


class Lost(RunError):  # noqa: N818 - as the others of `errors`, named for what happened
    """Another host is gone."""


def is_loss(error: BaseException | None) -> bool:
    """Whether an error means that another host is gone."""
    return (
        error is not None
        and not isinstance(error, UserError)
        and jax.process_count() > 1
        and (isinstance(error, Lost) or any(sign in str(error) for sign in _GONE))
    )


def watched(body: Callable[..., Value]) -> Callable[..., Value]:
    """The function, raising Lost where another host is gone while it runs."""

    @functools.wraps(body)
    def run(*args: Any, **named: Any) -> Value:
        try:
            return body(*args, **named)
        except Exception as error:
            if isinstance(error, Lost) or not is_loss(error):
                raise
            raise Lost(_loss(_lost_hosts())) from error

    return run


def _loss(lost: list[int]) -> str:
    who = f"host{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}" if lost else "another host"
    return (
        f"{who} of {jax.process_count()} {'were' if len(lost) > 1 else 'was'} lost, and a run needs all of its hosts; "
        f"see what {who} said; the same command on any number of hosts resumes from the last checkpoint"
    )


def _lost_hosts() -> list[int]:
    """The hosts that are gone, as far as can be found out."""
    count, me = jax.process_count(), jax.process_index()
    if count == 2:
        return [1 - me]
    client = _state("client")
    try:
        before = dict(client.key_value_dir_get("jaxlm/beat/"))
        time.sleep(3 * BEAT)
        after = dict(client.key_value_dir_get("jaxlm/beat/"))
    except Exception:  # host 0 has the service that is asked
        return [0] if me else []
    still = {int(name.rpartition("/")[2]) for name in before if after.get(name) == before[name]}
    return sorted(still - {me})


def _hook_aborts() -> None:
    """JAX's own threads end the process by abort() when they hear that another host is gone, with words for JAX's
    developers.  Then ours are the last ones, and the exit code is that of a fault of the run.

    In place of Python's `signal`, whose handlers would not run before the end.
    """
    if _Ends.hook is not None:
        return

    def aborted(_: int) -> None:
        if _Ends.leaving is None and _Ends.met:
            # Nobody answers questions any more, but for the door.
            first_is_gone = not is_first() and not _answers(_state("coordinator_address") or "")
            others = {0, 1} - {jax.process_index()} if jax.process_count() == 2 else {0} if first_is_gone else set()
            os.write(2, f"\nerror: {_loss([*others])}\n".encode())
        os._exit(RunError.exit_code if _Ends.leaving is None else _Ends.leaving)

    _Ends.hook = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(_Ends.hook, ctypes.c_void_p))


def leave(code: int, error: BaseException | None = None) -> int:
    """The exit code; of one of many hosts ends the process with it, when the others had their time to leave too.

    What the interpreter would do at its end waits for the others, for minutes where one is gone.
    """
    if _Ends.joined is None:
        return code
    _Ends.leaving = code
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, Lost):
        # The others find out who is gone from the service of host 0.
        time.sleep(0 if jax.process_count() == 2 or not is_first() else 4 * BEAT)
    elif _Ends.met:
        shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(10)
    os._exit(code)


def leave_by(error: Exception) -> None:
    """Of one of many hosts, ends the process with the traceback of an error that nobody expected."""
    if _Ends.joined is not None:
        traceback.print_exception(error)
        leave(RunError.exit_code, error)

"""Runs of several hosts: how they find each other, exchange values, and exit together.

A host is a process of JAX. All hosts can read the files of a run. On a single host, the functions of this module return
at once: they do not wait, copy or start anything.
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
HEARTBEAT_TIMEOUT = 60  # seconds without a heartbeat after which a host is lost, unless a connection breaks earlier
HEARTBEAT_INTERVAL = 3  # seconds between two heartbeats that show the other hosts which host was lost
MAX_GATHER_BYTES = 1 << 28  # bytes of a leaf that are gathered or sent at once

# Parts of the error messages that mean that another host is gone, from backends, networks and the coordination service.
_LOST_HOST_MESSAGES = (
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
    """The address of a run's coordinator, and the place of this process. JAX finds values that are None itself."""

    coordinator: str | None = None  # HOST:PORT
    processes: int | None = None  # number of processes
    process: int | None = None  # index of this process


class _State:
    """The state of this process as one of several hosts."""

    joined: Rendezvous | None = None
    connected: bool = False  # whether all hosts have joined
    silent: tuple[int, ...] = ()  # the hosts that have sent no heartbeat recently
    last_reply: float = 0.0  # time of the last reply of host 0 to a heartbeat
    exit_code: int | None = None  # set when this process exits
    abort_handler: Any = None  # a reference, so that it is not garbage-collected


# Finding each other


def find_rendezvous(environment: Mapping[str, str]) -> Rendezvous | None:
    """Returns the place of this process among the hosts of a run, or None if it is the only one.

    The place comes from JAXLM_COORDINATOR=host:port (of the host with JAXLM_PROCESS=0), JAXLM_PROCESSES and
    JAXLM_PROCESS, or else from the variables of Slurm's srun, Open MPI's mpirun and Cloud TPU. With JAXLM_PROCESSES=1 a
    process is always the only one.

    Args:
      environment: the environment variables.

    Raises:
      UserError: if the variables are incomplete or invalid.
    """
    names = ("JAXLM_COORDINATOR", "JAXLM_PROCESSES", "JAXLM_PROCESS")
    variables = {name: environment[name] for name in names if environment.get(name)}
    if variables.get("JAXLM_PROCESSES") == "1":
        return None
    if variables:
        if missing := [name for name in names if name not in variables]:
            raise UserError(f"{', '.join(variables)} is set, {', '.join(missing)} is not; give all three or none")
        address, count, index = variables.values()
        _, colon, port = address.rpartition(":")
        if not colon or not port.isdigit() or int(port) >= 1 << 16:
            raise UserError(f"JAXLM_COORDINATOR is {address!r}; give HOST:PORT, a free port of the host of process 0")
        if not count.isdigit() or not index.isdigit() or int(index) >= int(count):
            raise UserError(
                f"JAXLM_PROCESS is {index!r} of JAXLM_PROCESSES {count!r}; give numbers, the first from 0 to one less "
                f"than the second"
            )
        return Rendezvous(address, int(count), int(index))
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment and tasks != "1":
        return Rendezvous(None, int(tasks) if tasks else None)
    if "OMPI_MCA_orte_hnp_uri" in environment and environment.get("OMPI_COMM_WORLD_SIZE") != "1":
        return Rendezvous(None, int(environment["OMPI_COMM_WORLD_SIZE"]))
    return Rendezvous() if _in_pod(environment) else None


def _in_pod(environment: Mapping[str, str]) -> bool:
    """Returns whether this is, or may be, one of several hosts of a Cloud TPU."""
    if environment.get("JAX_PLATFORMS") == "cpu":
        return False
    hostnames = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if hostnames or environment.get("MEGASCALE_NUM_SLICES"):
        return "," in (hostnames or "") or environment.get("MEGASCALE_NUM_SLICES", "1") != "1"
    # On a TPU VM, JAX asks the metadata server.
    chips = (found for pattern in ("accel[0-9]*", "vfio/[0-9]*") for found in Path("/dev").glob(pattern))
    return any(chips) and "TPU_SKIP_MDS_QUERY" not in environment and importlib.util.find_spec("libtpu") is not None


def join(where: Rendezvous | None) -> None:
    """Connects this process to the other hosts of its run. Call it before JAX looks for devices.

    Args:
      where: the place of this process, as `find_rendezvous` returns it. None: do nothing.

    Raises:
      UserError: if not all hosts join within JAXLM_TIMEOUT seconds (default: 60).
    """
    if where is None:
        return
    seconds = os.environ.get("JAXLM_TIMEOUT") or str(TIMEOUT)
    if not seconds.isdigit() or not int(seconds):
        raise UserError(f"JAXLM_TIMEOUT is {seconds!r}; give a number of seconds")
    if where.coordinator and where.process == 0:
        _check_free(where.coordinator)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # `agree_on_stop` handles preemption
    _State.joined = where
    _handle_aborts()
    failed: list[Exception] = []

    def connect() -> None:
        options: dict[str, Any] = {"cluster_detection_method": "deactivate"} if where.coordinator else {}
        try:
            jax.distributed.initialize(
                *where,
                initialization_timeout=int(seconds) + 60,  # at this timeout JAX ends the process without a message
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
                **options,
            )
        except Exception as error:
            failed.append(error)

    # In a thread, because the call cannot be interrupted.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(int(seconds))
    address = where.coordinator or _jax_state("coordinator_address") or "the address that JAX found"
    fix = "JAXLM_COORDINATOR" if where.coordinator else "the variables of the scheduler (or JAXLM_...)"
    if failed and where == Rendezvous() and "should be defined" in str(failed[0]):  # a TPU VM outside of a pod
        _State.joined = None
        return
    if failed:
        raise UserError(f"the hosts cannot connect to {address}: {str(failed[0])[:300]}; fix {fix}")
    if thread.is_alive():
        host = "this host" if where.process is None else f"host {where.process}"
        host += f" of {where.processes}" if where.processes else ""
        if _is_listening(address):
            problem = f"{host} waited {seconds} s at {address}, and not all hosts came; start all hosts"
        else:
            problem = f"{host} found no coordinator at {address} in {seconds} s; start host 0 there"
        raise UserError(f"{problem}, fix {fix}, or wait longer with JAXLM_TIMEOUT")
    _State.connected = True
    if jax.process_count() > 2:
        threading.Thread(target=_send_heartbeats, daemon=True).start()


def _is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError):
        return False
    return True


def _check_free(coordinator: str) -> None:
    """Raises UserError if this host cannot listen at the coordinator's port, which would crash JAX."""
    port = int(coordinator.rpartition(":")[2])
    family, any_address = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "")
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((any_address, port))
        except OSError as error:
            raise UserError(
                f"host 0 cannot be the coordinator at {coordinator}: {error.strerror}; give JAXLM_COORDINATOR another "
                f"port, on all hosts"
            ) from None


def _jax_state(name: str) -> Any:
    """Returns a private value of JAX's distributed state, or None if it does not exist."""
    with suppress(ImportError, AttributeError):
        from jax._src import distributed

        return getattr(distributed.global_state, name)
    return None


def _send_heartbeats() -> None:
    """Sends heartbeats until the coordination service is gone, and reads which hosts send none.

    Host 0 compares the heartbeats and publishes the silent hosts, so that the other hosts read one value each.
    """
    client, n = _jax_state("client"), 0
    beats: dict[str, tuple[str, float]] = {}  # key of a host -> its last heartbeat, and when host 0 first read it
    with suppress(Exception):
        while client is not None:
            client.key_value_set(f"jaxlm/beat/{jax.process_index()}", str(n := n + 1), allow_overwrite=True)
            _State.last_reply = now = time.monotonic()
            if is_first():
                for key, beat in client.key_value_dir_get("jaxlm/beat/"):
                    if beats.get(key, ("", 0))[0] != beat:
                        beats[key] = beat, now
                silent = [key for key, (_, read) in beats.items() if now - read > 3 * HEARTBEAT_INTERVAL]
                numbers = sorted(int(key.rpartition("/")[2]) for key in silent)
                client.key_value_set("jaxlm/silent", json.dumps(numbers), allow_overwrite=True)
            with suppress(jax.errors.JaxRuntimeError):  # host 0 has not published any yet
                _State.silent = tuple(json.loads(client.key_value_try_get("jaxlm/silent")))
            time.sleep(HEARTBEAT_INTERVAL)


# Exchanging values


def is_first() -> bool:
    """Returns whether this is host 0, which logs, reports and exports."""
    return jax.process_index() == 0


def gather_json(value: Any) -> list[Any]:
    """Returns the JSON values of all hosts, on each of them."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = 1 << int(sizes.max()).bit_length()  # a power of 2, so that few programs are compiled
    rows = multihost_utils.process_allgather(np.pad(data, (0, padded - len(data))))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


def run_on_first(make: Callable[[], Value]) -> Value:
    """Calls `make` on host 0 and returns its result on all hosts, which wait for it.

    Args:
      make: a function that returns a JSON value.

    Raises:
      UserError, RunError: those of host 0, on all hosts.
    """
    if jax.process_count() == 1:
        return make()
    return _value(gather_json(_outcome(make) if is_first() else None)[0])


def _outcome(make: Callable[[], Any]) -> dict[str, Any]:
    """Returns the result of `make`, or its error, as a JSON value."""
    try:
        return {"value": make()}
    except (UserError, RunError) as error:
        return {"error": str(error), "kind": error.exit_code}


def _value(outcome: dict[str, Any]) -> Any:
    if "error" in outcome:
        raise {kind.exit_code: kind for kind in (UserError, RunError)}[outcome["kind"]](outcome["error"])
    return outcome["value"]


def run_on_first_then_others(make: Callable[[], Value]) -> Value:
    """Calls `make` on host 0 and then on the other hosts, which find the results of host 0 in the caches.

    Returns the result of each host on that host.
    """
    result: list[Value] = []
    run_on_first(lambda: result.append(make()))
    return result[0] if result else make()


@contextmanager
def context_on_first(hold: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Enters a context on host 0 only, while the block runs on all hosts. Its errors are raised on all hosts."""
    with ExitStack() as stack:
        run_on_first(lambda: stack.enter_context(hold()))
        yield


def check_same_run(run: RunConfig) -> None:
    """Checks that all hosts have the same config and versions.

    Raises:
      UserError: with the differences, if a host differs from host 0.
    """
    if jax.process_count() == 1:
        return
    versions = {"jaxlm": jaxlm.__version__, "jax": jax.__version__, "source": _source()}
    host_0, *others = gather_json({"run": to_json(run), "version": versions})
    for k, other in enumerate(others, start=1):
        if differences := difference(host_0, other):
            lines = "\n".join(f"  {line}" for line in differences)
            raise UserError(
                f"hosts 0 and {k} of {jax.process_count()} do not have the same run; they differ in (host 0 | host "
                f"{k}):\n{lines}\ngive all hosts the same command, config and code"
            )


def _source() -> str:
    """Returns a hash of the Python files of this package, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    top = Path(__file__).parents[1]
    for file in sorted(top.rglob("*.py")):
        digest.update(f"{file.relative_to(top)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def agree_on_stop(stop: Callable[[], bool]) -> Callable[[], bool]:
    """Returns a function that is called after each step, and returns True on all hosts after the same step.

    Args:
      stop: returns whether this host has to stop.

    Returns:
      `stop` itself on a single host. On several hosts, a function that returns True one step after `stop` returned
      True on any of them: the answers are reduced on the devices, after the step that is in progress, and are read
      when the next step is in progress.
    """
    if jax.process_count() == 1:
        return stop
    devices = jax.devices()
    layout = NamedSharding(Mesh(np.array(devices), ("all",)), PartitionSpec("all"))
    replicated = NamedSharding(layout.mesh, PartitionSpec())
    any_host = jax.jit(lambda answers: answers.max(), out_shardings=replicated)
    pending: list[jax.Array] = []

    def agreed_stop() -> bool:
        answer = np.full(1, stop(), np.int32)
        pending.append(any_host(jax.make_array_from_callback((len(devices),), layout, lambda _: answer)))
        if devices[0].platform == "cpu":  # as in `fit`: programs must not queue up on the CPU
            pending[-1].block_until_ready()
        return len(pending) > 1 and bool(pending.pop(0))

    return agreed_stop


# Arrays


def shard(x: Any, layout: Sharding, *, may_alias: bool | None = None) -> jax.Array:
    """Shards an array that every host has over the devices of all hosts.

    Args:
      x: the array, the same on all hosts.
      layout: the sharding of the result.
      may_alias: False for a copy, as for `jax.device_put`.
    """
    if layout.is_fully_addressable:
        return jax.device_put(x, layout, may_alias=may_alias)
    if isinstance(x, jax.Array) and x.sharding == layout:
        return x
    x = np.array(x)
    return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])


def gather(tree: Any) -> Any:
    """Gathers arrays that are sharded over several hosts into the memory of each host, leaf by leaf."""
    return jax.tree.map(_gather, tree)


def to_numpy(tree: Any) -> Any:
    """Returns the tree as NumPy arrays, gathered if they are sharded over several hosts."""
    return jax.device_get(gather(tree))


def _gather(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    gather = lambda part: np.asarray(_copy_to(_replicated(x))(part).addressable_data(0))
    if x.nbytes <= MAX_GATHER_BYTES or x.shape[0] == 1:
        return gather(x)
    # A stack of layers may be too large for one device.
    rows = max(1, x.shape[0] * MAX_GATHER_BYTES // x.nbytes)
    return np.concatenate([gather(x[start : start + rows]) for start in range(0, x.shape[0], rows)])


def read_on_first(tree: Any, make: Callable[[Any], Value]) -> Value:
    """Calls `make` on host 0 with arrays of all hosts, and returns its result on all hosts, which wait for it.

    An array that is sharded over several hosts is gathered when host 0 reads it: the whole array, or one entry of its
    first axes. No host has more than that in its memory.

    Args:
      tree: the arrays, the same on all hosts.
      make: a function that returns a JSON value. Its argument is a tree of objects with the shape and dtype of the
        arrays: `leaf[i]` or `leaf[i, j]` reads an entry of the first axes, `np.asarray(leaf)` the whole array.

    Raises:
      UserError, RunError: those of host 0, on all hosts.
    """
    if jax.process_count() == 1:
        return make(tree)
    leaves, structure = jax.tree.flatten(tree)

    def read(leaf: int, index: list[int] | None) -> Any:
        x = leaves[leaf]
        if index is None or not isinstance(x, jax.Array) or x.is_fully_addressable:
            return _gather(x) if index is None else x[tuple(index)]
        return np.asarray(_entry_of(_replicated(x))(x, tuple(map(np.int32, index))).addressable_data(0))

    if is_first():

        def request(leaf: int, index: list[int] | None) -> Any:
            gather_json({"read": [leaf, index]})
            return read(leaf, index)

        remote = [_RemoteArray(x.shape, x.dtype, partial(request, i)) for i, x in enumerate(leaves)]
        return _value(gather_json(_outcome(lambda: make(jax.tree.unflatten(structure, remote))))[0])
    while "read" in (message := gather_json(None)[0]):
        read(*message["read"])
    return _value(message)


@dataclass(frozen=True, eq=False)
class _RemoteArray:
    """An array on several hosts: `read(index)` gathers an entry of its first axes, `read(None)` the whole array."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[list[int] | None], Any]

    def __getitem__(self, index: Any) -> Any:
        return self.read([int(i) for i in (index if isinstance(index, tuple) else (index,))])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(None), dtype)


def shard_from_first(tree: Any, like: Any) -> Any:
    """Shards arrays in the memory of host 0 over the devices of all hosts.

    Args:
      tree: the arrays; None on the other hosts.
      like: their shapes, dtypes and shardings, `jax.ShapeDtypeStruct`s.
    """
    leaves, structure = jax.tree.flatten(like)
    arrays = jax.tree.leaves(tree) if is_first() else [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
    sharded = [shard(_broadcast(x), leaf.sharding) for x, leaf in zip(arrays, leaves, strict=True)]
    return jax.tree.unflatten(structure, sharded)


def _broadcast(x: np.ndarray) -> np.ndarray:
    """Returns the array of host 0 on all hosts. It is sent as bytes, since a sum would turn -0 into 0."""
    from jax.experimental import multihost_utils

    content = np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)
    parts = [content[start : start + MAX_GATHER_BYTES] for start in range(0, len(content), MAX_GATHER_BYTES)]
    received = [np.asarray(multihost_utils.broadcast_one_to_all(part)) for part in parts]
    return np.frombuffer(b"".join(part.tobytes() for part in received), x.dtype).reshape(x.shape)


def _replicated(x: jax.Array) -> NamedSharding:
    assert isinstance(x.sharding, NamedSharding)
    return NamedSharding(x.sharding.mesh, PartitionSpec())


@functools.lru_cache(maxsize=8)
def _copy_to(layout: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=layout)


@functools.lru_cache(maxsize=8)
def _entry_of(layout: NamedSharding) -> Callable[[jax.Array, tuple[np.int32, ...]], jax.Array]:
    return jax.jit(lambda x, index: x[index], out_shardings=layout)


# Exiting together


class HostLost(RunError):  # noqa: N818 - named like the other exceptions in `errors`
    """Another host was lost."""


def is_host_loss(error: BaseException | None) -> bool:
    """Returns whether an error means that another host was lost."""
    return (
        error is not None
        and not isinstance(error, UserError)
        and jax.process_count() > 1
        and (isinstance(error, HostLost) or any(text in str(error) for text in _LOST_HOST_MESSAGES))
    )


def detect_lost_hosts(body: Callable[..., Value]) -> Callable[..., Value]:
    """Wraps a function so that it raises HostLost if another host is lost while it runs."""

    @functools.wraps(body)
    def run(*args: Any, **named: Any) -> Value:
        try:
            return body(*args, **named)
        except Exception as error:
            if isinstance(error, HostLost) or not is_host_loss(error):
                raise
            raise HostLost(_loss(_wait_for_lost_hosts())) from error

    return run


def _loss(lost: list[int]) -> str:
    name = f"host{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}" if lost else "another host"
    return (
        f"{name} of {jax.process_count()} {'were' if len(lost) > 1 else 'was'} lost, and a run needs all of its hosts; "
        f"see the output of {name}; the same command on any number of hosts resumes from the last checkpoint"
    )


def _lost_hosts() -> list[int]:
    """Returns the hosts that are known to be lost."""
    own = jax.process_index()
    if jax.process_count() == 2:
        return [1 - own]
    # First the published hosts: when host 1 is lost, host 0 ends too, perhaps before host 2 reports the loss.
    if lost := [host for host in _State.silent if host != own]:
        return lost
    # Host 0 runs the coordination service. A host that is stopped still accepts connections, but does not reply.
    silence = time.monotonic() - _State.last_reply
    first_is_lost = silence > 3 * HEARTBEAT_INTERVAL or not _is_listening(_jax_state("coordinator_address") or "")
    return [0] if own and first_is_lost else []


def _wait_for_lost_hosts() -> list[int]:
    """Returns the hosts that are lost, as soon as they are known, or an empty list after several heartbeats."""
    end = time.monotonic() + 6 * HEARTBEAT_INTERVAL
    while not (lost := _lost_hosts()) and time.monotonic() < end:
        time.sleep(0.5)
    return lost


def _handle_aborts() -> None:
    """Installs a handler for SIGABRT that prints an error message and sets the exit code.

    JAX's threads call abort() when another host is lost, with a message for JAX's developers. The handler is installed
    with C's `signal`, because a handler of Python's `signal` would not run before the process ends.
    """
    if _State.abort_handler is not None:
        return

    def on_abort(_: int) -> None:
        if _State.exit_code is None and _State.connected:
            os.write(2, f"\nerror: {_loss(_lost_hosts())}\n".encode())
        os._exit(RunError.exit_code if _State.exit_code is None else _State.exit_code)

    _State.abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(_State.abort_handler, ctypes.c_void_p))


def exit_process(code: int, error: BaseException | None = None) -> int:
    """Returns the exit code of a single host. On one of several hosts, ends the process with it.

    The process does not exit through the interpreter, because its exit handlers wait for the other hosts, for minutes
    if one of them is lost.

    Args:
      code: the exit code.
      error: the error that ends the command, if any.
    """
    if _State.joined is None:
        return code
    _State.exit_code = code
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, HostLost):
        # Host 0 waits, since the others ask its service which host was lost.
        time.sleep(0 if jax.process_count() == 2 or not is_first() else 4 * HEARTBEAT_INTERVAL)
    elif _State.connected:
        shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(10)
    os._exit(code)


def exit_with_traceback(error: Exception) -> None:
    """On one of several hosts, prints the traceback of an unexpected error and ends the process."""
    if _State.joined is not None:
        traceback.print_exception(error)
        exit_process(RunError.exit_code, error)

"""Checkpoints by Orbax: written asynchronously, restored on any topology, never taken for whole when they are not."""

from __future__ import annotations

import json
import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.devices import hosts
from jaxlm.errors import RunError
from jaxlm.run.step import TrainState


@jax.jit
def checksums(tree: Any) -> jax.Array:
    """One uint32 for each leaf, which changes when any bit of it does.

    A sum modulo 2^32 of the entries' bits, each times an odd number of its own: exact in any order of summation, so it
    is the same on every topology.
    """

    def checksum(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[leaf.dtype.itemsize])
        index = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        return (bits.astype(jnp.uint32) * (2 * index + 1)).sum(dtype=jnp.uint32)

    return jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])


def checksums_of(tree: Any) -> list[int]:
    """Returns the `checksums` of a tree as numbers of Python's."""
    return [int(x) for x in np.asarray(checksums(tree))]


@jax.jit
def finite(tree: Any) -> jax.Array:
    """Whether no entry of any leaf is infinite or not a number."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


class Checkpoints:
    """The checkpoints of a run: the last `keep`, and the one with the best held-out score."""

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None] = print, alone: bool = False):
        """alone: of many hosts this one alone reads and writes them, whole; the states are in its memory."""
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        self._ocp, self._say, self.folder = ocp, say, folder.absolute()
        self._first = (lambda make: make()) if alone else hosts.first
        self._processes = 1 if alone else jax.process_count()
        me = jax.process_index()
        self._hosts = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}) if alone else None
        if alone:
            with self._faults():
                self.folder.mkdir(parents=True, exist_ok=True)  # which Orbax does for all hosts alone
        best = BestN(get_metric_fn=_worth, reverse=False, n=1, keep_checkpoints_without_metrics=False)
        self._open = lambda: ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
                best_fn=_worth,
                best_mode="max",
                cleanup_tmp_directories=True,
                create=not alone,
                **({} if self._hosts is None else {"multiprocessing_options": self._hosts}),
            ),
        )
        # The manager reads all scores when it is made, and fails where one cannot be read.
        with self._faults():
            self._first(self._clear)
            self._manager = self._open()

    def _clear(self) -> None:
        """Moves checkpoints away whose score cannot be read."""
        for file in self.folder.glob("[0-9]*/metrics/metrics"):
            step = file.parent.parent.name
            try:
                _worth(json.loads(file.read_text()))
            except (ValueError, KeyError, TypeError) as error:
                if step.isdigit():  # others are half written; the manager clears them away
                    self._move_away(int(step), error)

    def save(self, state: TrainState, metrics: dict[str, float] | None, notes: Any = None) -> None:
        """Starts to write a state; the highest `metrics["best"]` is the best.  Raises RunError on a full disk.

        The frozen part is left out: it does not change.

        notes: JSON values that come back with the state.
        """
        args, state = self._ocp.args, state._replace(frozen=None)
        notes = json.loads(json.dumps(notes))  # a copy: they are written while the caller continues
        whole = _all_checksums(state, notes)
        with self._faults(), _unwarned():
            self._manager.save(
                int(state.step),
                args=args.Composite(
                    state=args.StandardSave(state), notes=args.JsonSave({"checksums": whole, "notes": notes})
                ),
                metrics=metrics,
            )

    def wait(self) -> None:
        """Until all that was saved is on disk.  Raises RunError where that failed."""
        with self._faults():
            self._manager.wait_until_finished()

    def last(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step of the checkpoint with the best held-out score; the newest where none was evaluated."""
        steps = self._manager.best_step()
        return self.last() if steps is None else steps

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, Any] | None:
        """The state of `step`, or of the newest whole checkpoint, and its notes; None where there is none.

        Its frozen part is None.

        `like`: a tree of `jax.ShapeDtypeStruct` with the shardings wanted here, whatever they were when it was saved.
        A corrupt checkpoint is set aside under `corrupt/`, said, and the one before it is taken.  Raises RunError where
        a checkpoint may well be whole but cannot be read here.
        """
        like = like._replace(frozen=None)
        while (found := self.last() if step is None else step) is not None:
            try:
                args = self._ocp.args
                restored = self._manager.restore(
                    found, args=args.Composite(state=args.StandardRestore(like), notes=args.JsonRestore())
                )
                state, notes = restored["state"], restored["notes"]["notes"]
                if _all_checksums(state, notes) == restored["notes"]["checksums"]:
                    return state, notes
                fault: Exception = ValueError("its content does not match its checksums")
            except Exception as error:
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                if any(sign in str(error) for sign in ("PERMISSION_DENIED", "Permission denied", "Input/output error")):
                    place = self.folder / str(found)
                    raise RunError(f"{place} cannot be read: {_first_line(error)}; free it, then try again") from error
                if hosts.is_loss(error):
                    raise
                if self._processes > 1:  # the others may have read their parts, and wait for this host
                    with suppress(OSError):  # or it is moved already
                        self._move_away(found, error)
                    raise RunError(
                        f"checkpoint {found} is corrupt ({_first_line(error)}); it is moved to {self._corrupt}; "
                        f"give the same command again, which resumes from the one before it"
                    ) from error
                fault = error
            # Whatever a damaged file makes the reader raise, the run resumes from the checkpoint before it.
            self._set_aside(found, fault)
            step = None
        return None

    def restore_params(self, like: Any, step: int) -> Any | None:
        """Returns the parameters alone of the checkpoint of `step`, without what the optimizer keeps.

        like: their shapes and shardings.  None where the checkpoint is corrupt, which is reported, and it stays.

        Raises:
          Exception: what Orbax raises where memory is short, and on several hosts whatever it raises.
        """
        ocp = self._ocp
        try:
            wanted = {"params": like}
            args = ocp.args.PyTreeRestore(
                wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
            )
            of_hosts: dict[str, Any] = {} if self._hosts is None else {"multiprocessing_options": self._hosts}
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**of_hosts), **of_hosts) as reader:
                params = reader.restore(self.folder / str(step) / "state", args=args)["params"]
            file = self.folder / str(step) / "notes" / "metadata"
            whole = json.loads(file.read_text())["checksums"]
            found = checksums_of(params)
            if found == whole[1 : 1 + len(found)]:  # behind that of the step
                return params
            fault: Exception = ValueError("its content does not match its checksums")
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error) or self._processes > 1:  # others may wait for this host
                raise
            fault = error
        self._say(f"checkpoint {step}, the best, is corrupt ({_first_line(fault)}); the last weights are exported")
        return None

    def close(self) -> None:
        """Waits for what is being written, as `wait` does, and ends the threads behind it."""
        if hosts.is_loss(sys.exception()):
            return  # what is being written needs all hosts
        with self._faults():
            self._manager.close()

    def _set_aside(self, step: int, error: Exception) -> None:
        with self._faults():
            self._manager.close()
            self._first(lambda: self._move_away(step, error))
            self._manager = self._open()
        before = self.last()
        self._say("no whole checkpoint is left" if before is None else f"trying checkpoint {before}, the one before it")

    def _move_away(self, step: int, error: Exception) -> None:
        place = self._corrupt / str(step)
        place.parent.mkdir(exist_ok=True)
        copies = 1
        while os.path.lexists(place):  # an earlier one of the same step stays
            copies += 1
            place = self._corrupt / f"{step}-{copies}"
        self._say(f"checkpoint {step} is corrupt ({_first_line(error)}); it is moved to {place}")
        (self.folder / str(step)).rename(place)

    @property
    def _corrupt(self) -> Path:
        """Returns the folder that corrupt checkpoints are moved to."""
        return self.folder.parent / "corrupt"

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turns what fails while writing into one message."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if hosts.is_loss(error):
                raise
            reason = "the disk is full" if _is_full(error) else _first_line(error)
            raise RunError(
                f"the checkpoint in {self.folder} could not be written: {reason}; earlier checkpoints are kept; "
                f"make room or free the folder, then give the same command again"
            ) from error


class OfFirstHost:
    """The checkpoints of many hosts that do not see each other's folders, as `Checkpoints` has them.

    Host 0 gathers the whole state into its memory to write it, and passes on what it reads.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None] = print):
        self._own: Checkpoints | None = None

        def make() -> None:
            self._own = Checkpoints(folder, keep, say, alone=True)

        hosts.first(make)

    @property
    def _of_first(self) -> Checkpoints:
        assert self._own is not None
        return self._own

    def save(self, state: TrainState, metrics: dict[str, float] | None, notes: Any = None) -> None:
        """As `Checkpoints.save`."""

        def write(asked: Any) -> None:
            self._of_first.save(jax.tree.map(np.asarray, asked), metrics, notes)

        hosts.first_reads(state._replace(frozen=None), write)

    def wait(self) -> None:
        """As `Checkpoints.wait`."""
        hosts.first(lambda: self._of_first.wait())

    def last(self) -> int | None:
        """As `Checkpoints.last`."""
        return hosts.first(lambda: self._of_first.last())

    def best(self) -> int | None:
        """As `Checkpoints.best`."""
        return hosts.first(lambda: self._of_first.best())

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, Any] | None:
        """As `Checkpoints.restore`."""
        found: list[Any] = []
        like = like._replace(frozen=None)

        def read() -> dict[str, Any] | None:
            restored = self._of_first.restore(_empty(like), step)
            found.extend(restored or ())
            return None if restored is None else {"notes": restored[1]}

        read_there = hosts.first(read)
        return None if read_there is None else (hosts.passed_on(found[0] if found else None, like), read_there["notes"])

    def restore_params(self, like: Any, step: int) -> Any | None:
        """As `Checkpoints.restore_params`."""
        found: list[Any] = []

        def read() -> bool:
            found.append(self._of_first.restore_params(_empty(like), step))
            return found[0] is not None

        return hosts.passed_on(found[0] if found else None, like) if hosts.first(read) else None

    def close(self) -> None:
        """As `Checkpoints.close`, without waiting for other hosts."""
        if self._own is not None:
            self._own.close()


def _empty(like: Any) -> Any:
    """Returns arrays in memory of the shapes and dtypes of `like`."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without Orbax's warning that a checkpoint has no score: it is only evaluated once in a while."""
    keep, logger = lambda record: "tracked_metric" not in record.getMessage(), logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _all_checksums(state: Any, notes: Any) -> list[int]:
    return [*checksums_of(state), zlib.crc32(json.dumps(notes, sort_keys=True).encode())]


def _is_full(error: Exception) -> bool:
    return any(sign in str(error) for sign in ("No space left", "File too large", "Disk quota exceeded"))


def _first_line(error: Exception) -> str:
    return next((line[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _worth(metrics: dict[str, float]) -> float:
    return metrics["best"]

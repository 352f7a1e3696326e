"""Checkpoints with Orbax: written asynchronously, restored on any topology, verified by checksums."""

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
from jaxlm.vectors.training import VectorState

_MISMATCH = "its content does not match its checksums"


@jax.jit
def checksums(tree: Any) -> jax.Array:
    """Returns a checksum of each leaf, [leaves] uint32, which changes with any bit of the leaf.

    It is the sum modulo 2^32 of the bits of each entry times an odd number that depends on the index. The sum is exact
    in any order, and so the same on every topology.
    """

    def checksum(leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        if leaf.dtype in (jnp.int4, jnp.uint4):
            leaf = leaf.astype(jnp.int8)
        bits = jax.lax.bitcast_convert_type(leaf, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[leaf.dtype.itemsize])
        index = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        return (bits.astype(jnp.uint32) * (2 * index + 1)).sum(dtype=jnp.uint32)

    return jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])


def checksums_of(tree: Any) -> list[int]:
    """Returns the `checksums` of a tree as Python integers."""
    return [int(x) for x in np.asarray(checksums(tree))]


@jax.jit
def finite(tree: Any) -> jax.Array:
    """Returns whether all entries of all leaves are finite, as a bool array []."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


class Checkpoints:
    """The checkpoints of a run: the last few, and the one with the best held-out score."""

    def __init__(self, folder: Path, keep: int, log: Callable[[str], None] = print, alone: bool = False):
        """Opens the checkpoints in a folder, and sets aside those with damaged scores.

        Args:
          folder: is created where it does not exist.
          keep: number of the last checkpoints to keep.
          log: prints a line.
          alone: whether only this host of several reads and writes checkpoints, with whole states in its memory.

        Raises:
          RunError: where the folder cannot be read or written.
        """
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        self._ocp, self._say, self.folder = ocp, log, folder.absolute()
        self._first = (lambda make: make()) if alone else hosts.run_on_first
        self._processes = 1 if alone else jax.process_count()
        this = jax.process_index()
        options = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
        self._hosts: dict[str, Any] = {"multiprocessing_options": options} if alone else {}
        if alone:
            with self._faults():
                self.folder.mkdir(parents=True, exist_ok=True)  # Orbax creates it only for all hosts together
        best = BestN(get_metric_fn=_best_score, reverse=False, n=1, keep_checkpoints_without_metrics=False)
        self._open = lambda: ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
                best_fn=_best_score,
                best_mode="max",
                cleanup_tmp_directories=True,
                create=not alone,
                **self._hosts,
            ),
        )
        # The constructor of the manager reads all scores, and fails where one is damaged.
        with self._faults():
            self._first(self._move_damaged)
            self._manager = self._open()

    def _move_damaged(self) -> None:
        """Moves checkpoints with damaged scores away."""
        for file in self.folder.glob("[0-9]*/metrics/metrics"):
            step = file.parent.parent.name
            try:
                _best_score(json.loads(file.read_text()))
            except (ValueError, KeyError, TypeError) as error:
                if step.isdigit():  # the manager removes the others, which are incomplete
                    self._move_away(int(step), error)

    def save(self, state: TrainState | VectorState, metrics: dict[str, float] | None, notes: Any = None) -> None:
        """Starts to write a state without its frozen part, which does not change.

        Args:
          state: the state, at a step that has no checkpoint yet.
          metrics: the scores of the state; the checkpoint with the highest `metrics["best"]` is kept. None: no scores.
          notes: JSON values that `restore` returns with the state.

        Raises:
          RunError: where the folder cannot be written, such as on a full disk.
        """
        args, state = self._ocp.args, state._replace(frozen=None)
        notes = json.loads(json.dumps(notes))  # a copy, because the caller continues while they are written
        sums = _all_checksums(state, notes)
        with self._faults(), _without_warning():
            self._manager.save(
                int(state.step),
                args=args.Composite(
                    state=args.StandardSave(state), notes=args.JsonSave({"checksums": sums, "notes": notes})
                ),
                metrics=metrics,
            )

    def wait(self) -> None:
        """Waits until all checkpoints are on disk; raises RunError where one could not be written."""
        with self._faults():
            self._manager.wait_until_finished()

    def last(self) -> int | None:
        """Returns the step of the newest checkpoint; None without checkpoints."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the step of the checkpoint with the best held-out score; the newest where none was evaluated."""
        step = self._manager.best_step()
        return self.last() if step is None else step

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, Any] | None:
        """Returns the state and the notes of a checkpoint.

        A corrupt checkpoint is reported and moved to `corrupt/`, and the one before it is restored instead.

        Args:
          like: the state as a tree of `jax.ShapeDtypeStruct`, with the shardings to restore to.
          step: the step of the checkpoint; None: the newest.

        Returns:
          The state, with None as its frozen part, and the notes; None where no checkpoint is left.

        Raises:
          RunError: where a checkpoint cannot be read for another reason, and for a corrupt one on several hosts.
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
                fault: Exception = ValueError(_MISMATCH)
            except Exception as error:
                self._raise_unless_corrupt(found, error)
                fault = error
            # Any error of a damaged file has the same remedy: the run resumes from the checkpoint before it.
            self._set_aside(found, fault)
            step = None
        return None

    def _raise_unless_corrupt(self, step: int, error: Exception) -> None:
        """Raises an error after which this host must not restore an older checkpoint by itself."""
        if "RESOURCE_EXHAUSTED" in str(error):
            raise error
        if any(sign in str(error) for sign in ("PERMISSION_DENIED", "Permission denied", "Input/output error")):
            raise RunError(
                f"{self.folder / str(step)} cannot be read: {_first_line(error)}; fix the permissions or the disk, "
                f"then run the same command again"
            ) from error
        if hosts.is_host_loss(error):
            raise error
        if self._processes > 1:  # the others may have read their parts, and wait for this host
            with suppress(OSError):  # another host may have moved it
                self._move_away(step, error)
            raise RunError(
                f"checkpoint {step} is corrupt ({_first_line(error)}); it is moved to {self._corrupt}; run the same "
                f"command again to resume from the one before it"
            ) from error

    def restore_params(self, like: Any, step: int) -> Any | None:
        """Returns the parameters of a checkpoint, without the state of the optimizer.

        Args:
          like: the parameters as a tree of `jax.ShapeDtypeStruct`, with the shardings to restore to.
          step: the step of the checkpoint.

        Returns:
          The parameters; None where the checkpoint is corrupt, which is reported. It is not moved.

        Raises:
          Exception: from Orbax, where memory is exhausted; on several hosts, any exception from Orbax.
        """
        ocp = self._ocp
        try:
            tree = {"params": like}
            args = ocp.args.PyTreeRestore(
                tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
            )
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**self._hosts), **self._hosts) as reader:
                params = reader.restore(self.folder / str(step) / "state", args=args)["params"]
            file = self.folder / str(step) / "notes" / "metadata"
            expected, sums = json.loads(file.read_text())["checksums"], checksums_of(params)
            if sums == expected[1 : 1 + len(sums)]:  # the first is the checksum of the step
                return params
            fault: Exception = ValueError(_MISMATCH)
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error) or self._processes > 1:  # other hosts may wait for this one
                raise
            fault = error
        self._say(f"the best checkpoint, {step}, is corrupt ({_first_line(fault)}); the last weights are exported")
        return None

    def close(self) -> None:
        """Waits as `wait` does, and ends the threads that write."""
        if hosts.is_host_loss(sys.exception()):
            return  # writing requires all hosts
        with self._faults():
            self._manager.close()

    def _set_aside(self, step: int, error: Exception) -> None:
        with self._faults():
            self._manager.close()
            self._first(lambda: self._move_away(step, error))
            self._manager = self._open()
        last = self.last()
        self._say("no valid checkpoint is left" if last is None else f"trying checkpoint {last}, the one before it")

    def _move_away(self, step: int, error: Exception) -> None:
        path = self._corrupt / str(step)
        path.parent.mkdir(exist_ok=True)
        copies = 1
        while os.path.lexists(path):  # an earlier corrupt checkpoint of the same step
            copies += 1
            path = self._corrupt / f"{step}-{copies}"
        self._say(f"checkpoint {step} is corrupt ({_first_line(error)}); it is moved to {path}")
        (self.folder / str(step)).rename(path)

    @property
    def _corrupt(self) -> Path:
        """The folder that corrupt checkpoints are moved to."""
        return self.folder.parent / "corrupt"

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Raises errors of writing as RunError with one message."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if hosts.is_host_loss(error):
                raise
            reason = "the disk is full" if _is_full(error) else _first_line(error)
            raise RunError(
                f"the checkpoint in {self.folder} could not be written: {reason}; earlier checkpoints are kept; "
                f"free disk space or fix the permissions, then run the same command again"
            ) from error


class OfFirstHost:
    """The checkpoints of several hosts without a shared folder; its methods are those of `Checkpoints`.

    Host 0 gathers the whole state in its memory to write it, and sends each host its part when it reads one.
    """

    def __init__(self, folder: Path, keep: int, log: Callable[[str], None] = print):
        self._own: Checkpoints | None = None

        def open_checkpoints() -> None:
            self._own = Checkpoints(folder, keep, log, alone=True)

        hosts.run_on_first(open_checkpoints)

    @property
    def _of_first(self) -> Checkpoints:
        """The checkpoints, on host 0 only."""
        assert self._own is not None
        return self._own

    def save(self, state: TrainState, metrics: dict[str, float] | None, notes: Any = None) -> None:
        """See `Checkpoints.save`."""

        def write(gathered: Any) -> None:
            self._of_first.save(jax.tree.map(np.asarray, gathered), metrics, notes)

        hosts.read_on_first(state._replace(frozen=None), write)

    def wait(self) -> None:
        """See `Checkpoints.wait`."""
        hosts.run_on_first(lambda: self._of_first.wait())

    def last(self) -> int | None:
        """See `Checkpoints.last`."""
        return hosts.run_on_first(lambda: self._of_first.last())

    def best(self) -> int | None:
        """See `Checkpoints.best`."""
        return hosts.run_on_first(lambda: self._of_first.best())

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, Any] | None:
        """See `Checkpoints.restore`."""
        like = like._replace(frozen=None)
        state: Any = None  # stays None on other hosts than the first

        def read() -> dict[str, Any] | None:
            nonlocal state
            restored = self._of_first.restore(_empty(like), step)
            if restored is None:
                return None
            state, notes = restored
            return {"notes": notes}

        reply = hosts.run_on_first(read)
        return None if reply is None else (hosts.shard_from_first(state, like), reply["notes"])

    def restore_params(self, like: Any, step: int) -> Any | None:
        """See `Checkpoints.restore_params`."""
        params: Any = None  # stays None on other hosts than the first

        def read() -> bool:
            nonlocal params
            params = self._of_first.restore_params(_empty(like), step)
            return params is not None

        return hosts.shard_from_first(params, like) if hosts.run_on_first(read) else None

    def close(self) -> None:
        """Closes as `Checkpoints.close` does, without waiting for other hosts."""
        if self._own is not None:
            self._own.close()


def _empty(like: Any) -> Any:
    """Returns NumPy arrays with the shapes and dtypes of `like`."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)


@contextmanager
def _without_warning() -> Iterator[None]:
    """Hides the warning of Orbax about a checkpoint without scores: not every checkpoint is evaluated."""
    is_other, logger = lambda record: "tracked_metric" not in record.getMessage(), logging.getLogger("absl")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _all_checksums(state: Any, notes: Any) -> list[int]:
    return [*checksums_of(state), zlib.crc32(json.dumps(notes, sort_keys=True).encode())]


def _is_full(error: Exception) -> bool:
    return any(sign in str(error) for sign in ("No space left", "File too large", "Disk quota exceeded"))


def _first_line(error: Exception) -> str:
    return next((line[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _best_score(metrics: dict[str, float]) -> float:
    return metrics["best"]

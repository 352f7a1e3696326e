"""Checkpoints by Orbax: written asynchronously, restored on any topology, never taken for whole when they are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import RunError
from jaxlm.step import TrainState


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


class Checkpoints:
    """The checkpoints of a run: the last `keep`, and the one with the lowest held-out loss."""

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None] = print):
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        self._ocp, self._say, self.folder = ocp, say, folder.absolute()
        best = BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        self._open = lambda: ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
                best_fn=_loss,
                best_mode="min",
                cleanup_tmp_directories=True,
            ),
        )
        self._manager = self._open()

    def save(self, state: TrainState, metrics: dict[str, float] | None) -> None:
        """Starts to write a state; `metrics["loss"]` decides which is the best.  Raises RunError on a full disk."""
        args = self._ocp.args
        whole = [int(x) for x in np.asarray(checksums(state))]
        with self._faults():
            self._manager.save(
                int(state.step),
                args=args.Composite(state=args.StandardSave(state), checksums=args.JsonSave(whole)),
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
        """The step of the checkpoint with the lowest held-out loss; the newest where none was evaluated."""
        steps = self._manager.best_step()
        return self.last() if steps is None else steps

    def restore(self, like: Any, step: int | None = None) -> Any | None:
        """The state of `step`, or of the newest whole checkpoint; None where there is none.

        `like`: a tree of `jax.ShapeDtypeStruct` with the shardings wanted here, whatever they were when it was saved.
        A corrupt checkpoint is set aside under `corrupt/`, said, and the one before it is taken.
        """
        while (found := self.last() if step is None else step) is not None:
            try:
                args = self._ocp.args
                restored = self._manager.restore(
                    found, args=args.Composite(state=args.StandardRestore(like), checksums=args.JsonRestore())
                )
                if [int(x) for x in np.asarray(checksums(restored["state"]))] != restored["checksums"]:
                    raise ValueError("its content does not match its checksums")
                return restored["state"]
            except Exception as error:
                # Whatever a damaged file makes the reader raise, the run goes on from the checkpoint before it.
                self._set_aside(found, error)
                step = None
        return None

    def close(self) -> None:
        with self._faults():
            self._manager.close()

    def _set_aside(self, step: int, error: Exception) -> None:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        place = self.folder.parent / "corrupt" / str(step)
        self._say(f"checkpoint {step} is corrupt ({reason}); moved to {place}, going on from the one before")
        self._manager.close()
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        (self.folder / str(step)).rename(place)
        self._manager = self._open()

    def _faults(self) -> Any:
        return _Faults(self.folder)


class _Faults:
    """Turns what fails while writing into one message."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError, RuntimeError)) and not isinstance(error, RunError):
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            if "No space left" in str(error):
                reason = "the disk is full"
            raise RunError(
                f"the checkpoint in {self.folder} could not be written: {reason[:300]}; earlier checkpoints are kept; "
                f"make room or free the folder, then give the same command again"
            ) from error


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]

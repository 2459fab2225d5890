"""Train states on disk, while a run goes on: saved without stopping it, found again whatever ended it.

Orbax writes the arrays from every host, in the background, and gives a step its name when it is whole. Beside them lies a JSON
file: where the data stands, and the state's checksum, so that a state that was changed on disk is known. `restore` takes
the newest step that is whole, says which were not, and gives the state in any sharding.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from merging.checkpoints.format import CheckpointError
from merging.checkpoints.storage import absolute
from merging.checkpoints.tree_writer import naming

STATE, PROGRESS = "state", "progress"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """What a run goes on from.

    Attributes:
      step: steps taken.
      state: of the run.
      progress: what was saved beside it.
    """

    step: int
    state: Any
    progress: Mapping[str, Any]


class Checkpoints:
    """The train states of one run.

    Args:
      folder: of the steps; made if need be.
      keep: how many of the newest stay.
      keep_best: the one with the lowest metric stays too.
      log: told in words of what could not be read.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep: int,
        keep_best: bool = False,
        log: Callable[[str], None],
    ):
        self._folder = absolute(folder)
        self._log = log
        self.keeps_best = keep_best
        policy = ocp.checkpoint_managers
        kept: list[Any] = [policy.LatestN(keep)]
        if keep_best:
            kept.append(
                policy.BestN(
                    n=1,
                    get_metric_fn=lambda metrics: -metrics["metric"],
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(kept),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
            item_names=(STATE, PROGRESS),
        )

    def save(
        self,
        step: int,
        state: Any,
        progress: Mapping[str, Any],
        *,
        metric: float | None = None,
    ) -> None:
        """Begins to save the state of a step; returns when its arrays may be changed. `metric`: of a validation, less is better.

        Raises OSError where this one, or the one that was under way, can't be written.
        """
        if step in self._manager.all_steps():
            return
        described = {**progress, "checksum": int(checksum(state))}
        items = {STATE: ocp.args.StandardSave(state), PROGRESS: ocp.args.JsonSave(described)}
        with self._failures_told():  # of this one, and of the one before, which it waits for
            self._manager.save(
                step,
                args=ocp.args.Composite(**items),
                metrics=None if metric is None else {"metric": metric},
                force=True,
            )

    def wait(self) -> None:
        """Returns when what was begun is on disk. Raises OSError where it can't be written."""
        with self._failures_told():
            self._manager.wait_until_finished()

    def restore(self, like: Any) -> Restored | None:
        """The newest state that is whole, as `like` has it (ShapeDtypeStructs with shardings); None where there is none.

        Raises CheckpointError where there are states and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        told = []
        for step in steps:
            try:
                found = self.restore_step(step, like)
            except Exception as error:  # whatever a damaged file makes Orbax raise; told, and raised if none is left
                told.append(f"the checkpoint of step {step} can't be used: {_short(error)}")
                self._log(f"{told[-1]}; taking the one before")
                continue
            for damaged in steps[: steps.index(step)]:
                self._manager.delete(damaged)
            return found
        if told:
            raise CheckpointError(
                "\n".join([f"{self._folder}: no checkpoint can be used", *told])
                + "\nremove the folder to begin anew"
            )
        return None

    def restore_step(self, step: int, like: Any) -> Restored:
        """The state of one step. Raises CheckpointError where its arrays aren't those that were saved, and what Orbax raises."""
        return _checked(step, self._manager.restore(step, args=_restored_as(like)))

    def steps(self) -> Sequence[int]:
        """Of the states that are there."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Waits for what is under way. Raises OSError where it can't be written."""
        with self._failures_told():
            self._manager.close()

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        """What could not be written, and what is there to go on from."""
        try:
            with naming(self._folder):
                yield
        except OSError as error:
            steps = self.steps()
            kept = f"the one of step {steps[-1]} is kept" if steps else "there is none before it"
            raise OSError(
                error.errno,
                f"a train state can't be written, {kept}; once it can, the same command goes on from there: {error.strerror}",
                str(self._folder),
            ) from error


def read_state(step_folder: epath.PathLike, like: Any) -> Restored:
    """The state of one step of any run, whose folder is not touched. Raises CheckpointError where it isn't such a state."""
    folder = absolute(step_folder)
    handler = ocp.CompositeCheckpointHandler(STATE, PROGRESS)
    with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
        try:
            found = checkpointer.restore(folder, args=_restored_as(like))
        except (ValueError, KeyError, TypeError) as error:  # Orbax's, of trees that differ
            raise CheckpointError(
                f"{folder} is no train state of this model and optimizer: {_short(error)}"
            ) from error
    return _checked(int(folder.name), found)


def _restored_as(like: Any) -> Any:
    items = {STATE: ocp.args.StandardRestore(like), PROGRESS: ocp.args.JsonRestore()}
    return ocp.args.Composite(**items)


def _checked(step: int, found: Mapping[str, Any]) -> Restored:
    progress = dict(found[PROGRESS])
    if int(checksum(found[STATE])) != progress.pop("checksum"):
        raise CheckpointError("its arrays are not those that were saved (checksum)")
    return Restored(step=step, state=found[STATE], progress=progress)


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """uint32: the sum of all bits as 32-bit words, each leaf's multiplied by a number of its own; the same on any mesh."""
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        words = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[np.dtype(leaf.dtype).itemsize])
        total += jnp.uint32(2 * number + 1) * jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)
    return total


_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."

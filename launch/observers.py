"""Who watches a run from outside: TensorBoard, and a profiler for a few steps."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observers:
    """What is written beside the output.

    Attributes:
      tensorboard_dir: folder for event files, those of each expert in a folder of its name; None: none.
      profile_dir: folder for a trace that TensorBoard, xprof and Perfetto read; None: none.
      profile_steps: (first, behind the last) of the trace, counted in steps taken before.
    """

    tensorboard_dir: str | None = None
    profile_dir: str | None = None
    profile_steps: tuple[int, int] = (10, 13)

    def __post_init__(self) -> None:
        first, end = self.profile_steps
        if not 0 <= first < end:
            raise ValueError(
                f"PROFILE_STEPS is {tuple(self.profile_steps)}: give (first, behind the last), as in (10, 13)"
            )

    @contextlib.contextmanager
    def metrics(self) -> Iterator[Callable[[str, int, Mapping[str, float]], None]]:
        """A writer of (name of the expert, step, metrics by name)."""
        writers: dict[str, Any] = {}

        def write(name: str, step: int, values: Mapping[str, float]) -> None:
            if self.tensorboard_dir is None:
                return
            if name not in writers:
                from clu import metric_writers  # here, since it brings TensorFlow

                folder = epath.Path(self.tensorboard_dir) / name  # in a bucket too
                writers[name] = metric_writers.SummaryWriter(str(folder))
            writers[name].write_scalars(step, values)

        try:
            yield write
        finally:
            for writer in writers.values():
                writer.close()

    @contextlib.contextmanager
    def profile(self) -> Iterator[Callable[[int], None]]:
        """To be told the steps taken before each step; the trace is whole when the context is left."""
        import jax

        first, end = self.profile_steps
        running = []

        def stop() -> None:
            if running:
                running.clear()
                jax.profiler.stop_trace()

        def trace(step: int) -> None:
            if self.profile_dir is None:
                return
            if step >= end:
                stop()
            elif step >= first and not running:
                running.append(step)
                jax.profiler.start_trace(self.profile_dir)

        try:
            yield trace
        finally:
            stop()

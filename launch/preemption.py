"""SIGTERM as a wish: the run saves its state after the step that it is in, and ends."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from launch.devices import Processes


def should_stop(joined: Processes) -> Callable[[int], bool]:
    """(step) -> whether to stop there, the same on all processes. One process hears SIGTERM by itself, and a second one ends it."""
    if joined.count > 1:
        # jax.distributed has heard it, and lets all processes agree on a step.
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point
    asked = []

    def hear(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, hear)
    return lambda step: bool(asked)

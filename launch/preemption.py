"""SIGTERM as a wish: the run puts what it has done on disk, and ends with a code that starts the same command again."""

from __future__ import annotations

import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from launch import devices, exit_codes

# Processes that do not work in step look for a wish so often.
TICK_S = 0.1


def should_stop(joined: devices.Processes) -> Callable[[], bool]:
    """Whether to stop here, for work in step: all processes ask equally often, and each time all hear the same.

    One process hears SIGTERM by itself, and a second one ends it.
    """
    if joined.count == 1:
        return _heard()
    # jax.distributed has heard it, and lets all processes agree on a number that none has asked with yet. Numbers must not begin
    # again, as the steps of one training after another do.
    numbers = itertools.count(1)
    return lambda: _is_agreed(next(numbers))


def should_stop_soon(joined: devices.Processes) -> Callable[[], bool]:
    """Whether to stop, for work that is not in step: each process asks when it likes, and all hear of it in the same moment.

    Make it in all processes at the same time. A job asks with this or with `should_stop`, not with both.
    """
    if joined.count == 1:
        return _heard()
    # The same agreement, on a tick of the clock.
    begun, tick, is_asked = time.monotonic(), 0, False

    def asked() -> bool:
        nonlocal tick, is_asked
        while not is_asked and tick * TICK_S < time.monotonic() - begun:
            tick += 1
            is_asked = _is_agreed(tick)
        return is_asked

    return asked


@contextlib.contextmanager
def ending(log: Callable[[str], None], joined: devices.Processes) -> Iterator[None]:
    """Ends this process, saying so, where what runs within was asked to stop."""
    from merging.interrupted import Interrupted  # brings jax, which --help does without

    try:
        yield
    except Interrupted as stopped:
        log(f"{stopped}, as SIGTERM asked: the same command goes on from there")
        devices.end(exit_codes.PREEMPTED, joined)


def _is_agreed(number: int) -> bool:
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(number)


def _heard() -> Callable[[], bool]:
    asked = []

    def hear(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, hear)
    return lambda: bool(asked)

"""What a stage raises that was asked to stop."""

from __future__ import annotations

from collections.abc import Callable

ShouldStop = Callable[[], bool]


class Interrupted(Exception):
    """The run was asked to stop, and what it has done is on disk: the same command goes on from there."""


def never() -> bool:
    """Nobody asks to stop."""
    return False

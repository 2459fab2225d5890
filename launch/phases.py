"""The phases of a study in their order, and how workers share one: by hand, on this machine or as jobs of a cluster."""

from __future__ import annotations

REPORT = "report"
PHASES = ("bases", "experts", "cells", REPORT)


def workers_of(phase: str, workers: int) -> int:
    """How many of a study's workers a phase takes: the report is made by one."""
    return 1 if phase == REPORT else workers


def flags_of(phase: str, worker: int | str, workers: int) -> list[str]:
    """What launch.study's command is given to make a worker's items of one phase; `worker` may be what a scheduler puts in."""
    number = workers_of(phase, workers)
    return [
        f"--gin.PHASE='{phase}'",
        f"--worker={worker if number > 1 else 0}",
        f"--num_workers={number}",
    ]

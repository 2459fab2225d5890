"""Merges that share work: those that differ in their scale alone have one direction and one survey."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from merging.engine.step import Group
from merging.methods.method import Method, TaskVectorMethod


def without_scale(method: Method) -> Method:
    """The method at scale 1: what tells apart questions to the survey."""
    if isinstance(method, TaskVectorMethod):
        return dataclasses.replace(method, scale=1.0)
    return method


def group_by_scale(merges: Mapping[str, Method]) -> tuple[tuple[Group, ...], dict[str, int]]:
    """The groups for `step.merge_step`, and which of its outputs is whose, by name."""
    scales: dict[Method, list[tuple[str, float]]] = {}
    for name, method in merges.items():
        scales.setdefault(without_scale(method), []).append((name, getattr(method, "scale", 1.0)))
    groups: list[Group] = []
    place: dict[str, int] = {}
    outputs = 0
    for method, members in scales.items():
        if isinstance(method, TaskVectorMethod):
            groups.append(Group(method, np.array([scale for _, scale in members], np.float32)))
            place.update((name, outputs + i) for i, (name, _) in enumerate(members))
            outputs += len(members)
        else:  # equal settings: one output serves all of its names
            groups.append(Group(method, None))
            place.update((name, outputs) for name, _ in members)
            outputs += 1
    return tuple(groups), place

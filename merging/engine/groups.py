"""Merges that share work: those that differ in their scale alone have one direction and one survey."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from merging.engine.step import Group
from merging.methods.method import Method, TaskVectorMethod


def without_scale(method: Method) -> Method:
    """The method at scale 1: what tells apart questions to the survey."""
    if isinstance(method, TaskVectorMethod):
        return dataclasses.replace(method, scale=1.0)
    return method


def group_by_scale(
    methods: Sequence[Method], asked: Sequence[int | None] | None = None
) -> tuple[tuple[Group, ...], list[int], list[int | None]]:
    """Merges that share a direction, as groups.

    Args:
      methods: one a merge.
      asked: for each the number of its question to the survey; merges share what they asked together.

    Returns:
      The groups for `step.merge_step`, which of its outputs is whose, and the question of each group.
    """
    asked = asked or [None] * len(methods)
    members: dict[tuple[Method, int | None], list[int]] = {}
    for number, (method, question) in enumerate(zip(methods, asked, strict=True)):
        members.setdefault((without_scale(method), question), []).append(number)
    groups: list[Group] = []
    place = [0] * len(methods)
    outputs = 0
    for (method, _), numbers in members.items():
        if isinstance(method, TaskVectorMethod):
            scales = np.array([methods[number].scale for number in numbers], np.float32)
            groups.append(Group(method, scales))
            for i, number in enumerate(numbers):
                place[number] = outputs + i
            outputs += len(numbers)
        else:  # equal settings: one output serves all
            groups.append(Group(method, None))
            for number in numbers:
                place[number] = outputs
            outputs += 1
    return tuple(groups), place, [question for _, question in members]

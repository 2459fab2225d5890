"""Which of many cases the default run takes: some of each kind; the slow run takes all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], *, quick: Iterable[Any]) -> list[Any]:
    """Cases of one parameter, those marked slow that are not among the quick ones."""
    cases, quick = list(cases), list(quick)
    unknown = [case for case in quick if case not in cases]
    assert not unknown, f"no such cases: {unknown}"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]

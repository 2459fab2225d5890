"""study.json: what a study is made of, for those who read its scores. Where everything of a study lies."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from merging.checkpoints.storage import put_whole
from merging.grid.cells import Cell
from merging.manifest import OutputError, differences, digest

FILE = "study.json"
VERSION = 1
DEPENDS_ON = "depends_on"
HELD_IN, HELD_OUT = "held_in", "held_out"
PRETRAINED, INSTRUCTION_TUNED = "pretrained", "instruction_tuned"
# The names of a size and base's models that are not merged; `expert` gives the others.
BASE, MULTITASK = "base", "multitask"


def expert(category: str, steps: int | None = None) -> str:
    """The name of a category's expert; `steps`: of the one that was trained for so many, where the study has such beside the others."""
    return f"expert_{category}" if steps is None else f"expert_{category}_at_{steps}"


def is_trained(model: str) -> bool:
    """Whether a model of this name is trained, not merged."""
    return model in (BASE, MULTITASK) or model.startswith(expert(""))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """What judges a dataset.

    Attributes:
      tasks: names in scores; several where it has parts.
      metric: of their metrics the one that counts.
    """

    tasks: tuple[str, ...]
    metric: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Category:
    """A category of the study's table.

    Attributes:
      role: "held_in": it has an expert; or "held_out".
      datasets: by name.
    """

    role: str
    datasets: Mapping[str, Dataset]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """The folders of a study.

    Attributes:
      root: its OUTPUT_DIR.
    """

    root: epath.Path

    def models(self, size: str, base: str) -> epath.Path:
        """The folder of all that is trained."""
        return self.root / "models" / size / base

    def base(self, size: str, base: str) -> epath.Path:
        """The checkpoint of a base."""
        return self.models(size, base) / BASE

    def multitask(self, size: str, base: str) -> epath.Path:
        """The checkpoint of a multitask model."""
        return self.models(size, base) / MULTITASK

    def experts(self, size: str, base: str, group: int, steps: int | None = None) -> epath.Path:
        """The folder of experts that are trained by one run, each in a folder of its category; `steps` as in `expert`."""
        at = "" if steps is None else f"_at_{steps}"
        return self.models(size, base) / f"experts_{group}{at}"

    def scores(self, size: str, base: str, model: str) -> epath.Path:
        """scores.jsonl and manifest.json of one model."""
        return self.root / "scores" / size / base / model

    def merged(self, size: str, base: str, model: str) -> epath.Path:
        """The checkpoint of a merged model, where these are kept."""
        return self.root / "merged" / size / base / model

    def vectors(self, size: str, base: str) -> epath.Path:
        """How the task vectors of all experts lie to one another."""
        return self.root / "vectors" / size / f"{base}.json"

    def tuned(self, size: str, base: str, method: str, num_experts: int) -> epath.Path:
        """The setting that was chosen for merges of so many experts."""
        return self.root / "tuned" / size / base / f"{method}_n{num_experts}.json"

    @property
    def report(self) -> epath.Path:
        """What the report stage makes."""
        return self.root / "report"


def described(
    *,
    name: str,
    question: str,
    sizes: Mapping[str, int],
    bases: Sequence[str],
    methods: Mapping[str, str],
    num_experts: Sequence[int],
    seeds: Sequence[int],
    categories: Mapping[str, Category],
    cells: Sequence[Cell],
    depends_on: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of study.json; `sizes` gives numbers of parameters, `depends_on` all else that results depend on."""
    return {
        "version": VERSION,
        "name": name,
        "question": question,
        "sizes": {size: {"parameters": number} for size, number in sizes.items()},
        "bases": {base: {"role": base} for base in bases},
        "methods": dict(methods),
        "num_experts": list(num_experts),
        "seeds": list(seeds),
        "categories": {name: dataclasses.asdict(each) for name, each in categories.items()},
        "cells": [dataclasses.asdict(cell) for cell in cells],
        DEPENDS_ON: dict(depends_on),
    }


def write(root: epath.Path, description: Mapping[str, Any]) -> None:
    """Puts study.json into the study's folder.

    Raises OutputError where another study is there, or one that does not say what its results depend on.
    """
    path = root / FILE
    wanted = json.loads(json.dumps(description))
    if path.exists():
        _refuse_other(path, read(root), wanted)
        return
    root.mkdir(parents=True, exist_ok=True)
    put_whole(path, (json.dumps(wanted, indent=1) + "\n").encode())


def _refuse_other(path: epath.Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wanted = {**wanted, DEPENDS_ON: _but_for_rounding(wanted[DEPENDS_ON], found.get(DEPENDS_ON))}
    if digest(found) == digest(wanted):
        return
    if DEPENDS_ON not in found:
        raise OutputError(
            f"{path} is of an earlier version and does not say what its results depend on, such as LIMIT and the steps of training:"
            " choose another OUTPUT_DIR; or, if all in the folder was made by these settings, remove the file, and it is"
            " written anew"
        )
    names = {*found, *wanted} - {DEPENDS_ON}
    different = sorted(name for name in names if found.get(name) != wanted.get(name))
    different += differences(found[DEPENDS_ON], wanted[DEPENDS_ON])
    raise OutputError(
        f"{path} is of another study, which differs in:\n  "
        + "\n  ".join(different)
        + "\ngo on with its settings, or choose another OUTPUT_DIR"
    )


def _but_for_rounding(now: Any, then: Any) -> Any:
    """A JSON value, with what was there `then` for texts of numbers that lie as near as those of another device may."""
    if isinstance(now, Mapping) and isinstance(then, Mapping):
        return {name: _but_for_rounding(value, then.get(name)) for name, value in now.items()}
    a, b = _numbers(now), _numbers(then)
    if a.size and a.shape == b.shape:
        few = 1e-5 * np.nanmax(np.abs(b))
        return then if np.allclose(a, b, rtol=1e-3, atol=few, equal_nan=True) else now
    return now


def _numbers(text: Any) -> np.ndarray:
    """Empty where it is no text of numbers."""
    try:
        return np.array([float(word) for word in text.split()])
    except (AttributeError, ValueError):
        return np.array([])


def read(root: epath.PathLike) -> dict[str, Any]:
    """What study.json says. Raises OutputError where there is none, or none that can be read."""
    path = epath.Path(root) / FILE
    if not path.exists():
        raise OutputError(f"{path} does not exist: give the OUTPUT_DIR of a study")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise OutputError(f"{path} can't be read: {error}") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise OutputError(f"{path} is not of version {VERSION}, which this program reads")
    return found

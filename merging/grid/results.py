"""What a study has found so far: study.json, scores and manifests, as plain arrays.

A dataset's score is its metric, averaged over the prompts of a task, then over the tasks of the dataset. It is there when every
prompt of every task that any model of the study was judged by is there, so that models are compared by the same prompts.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from merging import manifest
from merging.evaluation.collect import SCORES, Score, ScoresFile
from merging.grid import study_file
from merging.grid.cells import Cell
from merging.grid.study_file import BASE, HELD_IN, MULTITASK, Places, expert

LOSS = "nats_per_token"

# A model of a study: size, base, name.
Model = tuple[str, str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """One of the study's datasets.

    Attributes:
      name, category, role: the category's role, held_in or held_out.
      metric: the one that counts.
      tasks: its parts, which count once together.
    """

    name: str
    category: str
    role: str
    metric: str
    tasks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What was to be done. The order of every axis is that of study.json.

    Attributes:
      sizes: parameters of each size, smallest first; None where unknown.
      bases: the role of each, pretrained or instruction_tuned.
      methods: each with its settings, as text.
      settings: those that the cells have.
      has_multitask: there is a multitask model of each size and base.
    """

    name: str
    question: str
    sizes: Mapping[str, int | None]
    bases: Mapping[str, str]
    methods: Mapping[str, str]
    num_experts: tuple[int, ...]
    seeds: tuple[int, ...]
    datasets: tuple[Dataset, ...]
    cells: tuple[Cell, ...]
    has_multitask: bool = True

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.setting for cell in self.cells))

    @property
    def steps(self) -> dict[str, int | None]:
        """Of each setting the steps of its experts, where these are fewer than all."""
        return {cell.setting: cell.steps for cell in self.cells}

    @property
    def roles(self) -> Mapping[str, str]:
        """The role of each category."""
        return {each.category: each.role for each in self.datasets}

    @property
    def models(self) -> list[Model]:
        """All models that are to have scores, once each: base, experts, multitask and merges of every size and base."""
        held_in = [name for name, role in self.roles.items() if role == HELD_IN]
        every = dict.fromkeys((None, *self.steps.values()))
        experts = [expert(name, steps) for steps in every for name in held_in]
        trained = [BASE, *experts, *([MULTITASK] if self.has_multitask else [])]
        merged = dict.fromkeys((cell.size, cell.base, cell.model) for cell in self.cells)
        return [
            *((size, base, name) for size in self.sizes for base in self.bases for name in trained),
            *merged,
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vectors:
    """How the task vectors of a size and base lie to one another.

    Attributes:
      experts: categories.
      norms: [experts].
      cosines, sign_conflict: [experts, experts]; sign_conflict is, of the elements that both have changed, the share
        where they have opposite signs.
    """

    experts: tuple[str, ...]
    norms: np.ndarray
    cosines: np.ndarray
    sign_conflict: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """What was found.

    Attributes:
      rows: the row of each model in the arrays.
      raw: [models, datasets] float64, NaN where it is missing.
      stderr: [models, datasets], of the examples, for prompts of one task as if they were one.
      spread: [models, datasets], standard deviation over prompts, averaged over tasks.
      chance: [datasets]; NaN where there is no such thing, as for generated text.
      losses: nats per token of the models that have them, over the tasks that all of them have.
      vectors: of the (size, base) that have them.
      manifests: by the folder in the study.
    """

    study: Study
    rows: Mapping[Model, int]
    raw: np.ndarray
    stderr: np.ndarray
    spread: np.ndarray
    chance: np.ndarray
    losses: Mapping[Model, float]
    vectors: Mapping[tuple[str, str], Vectors]
    manifests: Mapping[str, Mapping[str, Any]]

    @property
    def is_there(self) -> np.ndarray:
        """[models] bool: whether all datasets of a model have scores."""
        return np.isfinite(self.raw).all(axis=1)


def read(folder: epath.PathLike) -> Results:
    """Reads a study's folder, whatever is there of it.

    Raises:
      ValueError: for a folder without study.json, and files in it that are not what they should be.
    """
    folder = epath.Path(folder)
    study = _read_study(folder)
    places = Places(root=folder)
    scores, manifests = {}, {}
    for model in study.models:
        place = places.scores(*model)
        scores[model] = ScoresFile(place / SCORES).scores
        _add_manifest(manifests, folder, place)
    for size in study.sizes:
        for base in study.bases:
            trained = places.models(size, base)
            for depth in ("*", "*/*"):  # experts that one run trained share a folder
                for path in sorted(trained.glob(f"{depth}/{manifest.MANIFEST}")):
                    _add_manifest(manifests, folder, path.parent)
    raw, stderr, spread, chance = _arrays(study, list(scores.values()))
    return Results(
        study=study,
        rows={model: row for row, model in enumerate(scores)},
        raw=raw,
        stderr=stderr,
        spread=spread,
        chance=chance,
        losses=_losses(scores),
        vectors=dict(_read_vectors(folder, study)),
        manifests=manifests,
    )


# ---- scores -------------------------------------------------------------------------------------------------------


def _arrays(study: Study, scores: Sequence[Sequence[Score]]) -> tuple[np.ndarray, ...]:
    """raw, stderr and spread [models, datasets], chance [datasets]."""
    metrics = {task: each.metric for each in study.datasets for task in each.tasks}
    by_task: list[dict[str, dict[str, Score]]] = []  # of each model: task -> prompt -> score
    prompts: dict[str, set[str]] = collections.defaultdict(set)
    for of_model in scores:
        found: dict[str, dict[str, Score]] = collections.defaultdict(dict)
        for score in of_model:
            if metrics.get(score.task) == score.metric and math.isfinite(score.value):
                found[score.task][score.prompt] = score
                prompts[score.task].add(score.prompt)
        by_task.append(found)
    shape = len(scores), len(study.datasets)
    raw, stderr, spread = (np.full(shape, np.nan) for _ in range(3))
    chance = np.full(shape[1], np.nan)
    for column, dataset in enumerate(study.datasets):
        for row, found in enumerate(by_task):
            parts = [list(found[task].values()) for task in dataset.tasks if task in found]
            wanted = [len(prompts[task]) for task in dataset.tasks]
            if [len(part) for part in parts] != wanted:
                continue
            raw[row, column] = _mean(_mean(s.value for s in part) for part in parts)
            errors = [_mean(s.stderr for s in part) for part in parts]
            stderr[row, column] = math.hypot(*errors) / len(errors)
            spread[row, column] = _mean(np.std([s.value for s in part]) for part in parts)
            if all(s.chance is not None for part in parts for s in part):
                chance[column] = _mean(_mean(s.chance for s in part) for part in parts)
    return raw, stderr, spread, chance


def _losses(scores: Mapping[Model, Sequence[Score]]) -> dict[Model, float]:
    """Nats per token, averaged over the (task, prompt) pairs that every model which has any has."""
    found = {
        model: {
            (s.task, s.prompt): s.value
            for s in of_model
            if s.metric == LOSS and math.isfinite(s.value)
        }
        for model, of_model in scores.items()
    }
    found = {model: values for model, values in found.items() if values}
    if not found:
        return {}
    common = sorted(set.intersection(*(set(values) for values in found.values())))
    return {model: _mean(v[each] for each in common) for model, v in found.items() if common}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


# ---- other files --------------------------------------------------------------------------------------------------


def _read_study(folder: epath.Path) -> Study:
    found = study_file.read(folder)
    try:
        return parse(found)
    except (KeyError, TypeError, AttributeError) as error:
        path = folder / study_file.FILE
        raise ValueError(f"{path} does not say what a study is made of: {error!r}") from error


def parse(found: Mapping[str, Any]) -> Study:
    """The content of study.json as a study."""
    return Study(
        name=found["name"],
        question=found["question"],
        sizes={name: each["parameters"] for name, each in found["sizes"].items()},
        bases={name: each["role"] for name, each in found["bases"].items()},
        methods=found["methods"],
        num_experts=tuple(found["num_experts"]),
        seeds=tuple(found["seeds"]),
        datasets=tuple(
            Dataset(
                name=name,
                category=category,
                role=of_category["role"],
                metric=each["metric"],
                tasks=tuple(each["tasks"]),
            )
            for category, of_category in found["categories"].items()
            for name, each in of_category["datasets"].items()
        ),
        cells=tuple(
            Cell(**{**cell, "categories": tuple(cell["categories"])}) for cell in found["cells"]
        ),
        # A study.json that does not say so is of an earlier version.
        has_multitask=found.get(study_file.DEPENDS_ON, {}).get("multitask", {}) is not None,
    )


def _read_vectors(folder: epath.Path, study: Study) -> Iterable[tuple[tuple[str, str], Vectors]]:
    for size in study.sizes:
        for base in study.bases:
            path = Places(root=folder).vectors(size, base)
            if path.exists():
                found = _json(path)
                experts = tuple(found["experts"])
                arrays = {
                    k: np.array(found[k], np.float64) for k in ("norms", "cosines", "sign_conflict")
                }
                n = len(experts)
                if [a.shape for a in arrays.values()] != [(n,), (n, n), (n, n)]:
                    raise ValueError(f"{path}: {n} experts, and arrays of other sizes")
                yield (size, base), Vectors(experts=experts, **arrays)


def _add_manifest(
    found: dict[str, Mapping[str, Any]], folder: epath.Path, place: epath.Path
) -> None:
    read_here = manifest.read(place)
    if read_here is not None:
        found[place.relative_to(folder).as_posix()] = read_here


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object")
    return found

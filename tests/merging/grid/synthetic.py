"""A study as launch.study leaves it, from functions that say what each model scores: in a folder, or as arrays."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from merging.evaluation.collect import Score
from merging.grid import results

PT, IT = "pretrained", "instruct"
METHODS = {
    "averaging": "Averaging(weights=None)",
    "task_arithmetic": "TaskArithmetic(scale=0.4, weights=None)",
    "ties": "Ties(density=0.2)",
    "dare_ties": "DareTies(density=0.5)",
}

# The study's table in small: two datasets a held-in category, one of them of two parts; of the held-out ones one has one.
HELD_IN = {
    "qa": {"qa_a": ["qa_a_1", "qa_a_2"], "qa_b": ["qa_b"]},
    "sentiment": {"se_a": ["se_a"], "se_b": ["se_b"]},
    "topics": {"to_a": ["to_a"], "to_b": ["to_b"]},
    "summaries": {"su_a": ["su_a"], "su_b": ["su_b"]},
    "paraphrase": {"pa_a": ["pa_a"], "pa_b": ["pa_b"]},
    "structure": {"st_a": ["st_a"], "st_b": ["st_b"]},
    "closed": {"cl_a": ["cl_a"], "cl_b": ["cl_b"]},
    "extractive": {"ex_a": ["ex_a"], "ex_b": ["ex_b"]},
}
HELD_OUT = {
    "completion": {"co_a": ["co_a"], "co_b": ["co_b"]},
    "inference": {"in_a": ["in_a"], "in_b": ["in_b"]},
    "coreference": {"cr_a": ["cr_a"], "cr_b": ["cr_b"]},
    "sense": {"ws": ["ws"]},
}
IS_HELD_OUT = {name for datasets in HELD_OUT.values() for name in datasets}
CHANCE = 0.25

# (size, base, method, N, seed, dataset) -> the ratio to the reference; the size as its place in the order.
Ratio = Callable[[int, str, str, int, int, str], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """What is true.

    Attributes:
      merged: ratio of a merged model's score to its reference.
      multitask: the same of the multitask model, of (size, base, dataset).
      reference: raw score of the expert (held-in datasets) or the base (held-out), of (size, base, dataset).
      loss: nats per token, of (size, base, number of experts); none are there without it.
      is_there: whether a model of (size, base, name) has scores.
    """

    merged: Ratio
    multitask: Callable[[int, str, str], float] = lambda size, base, dataset: 1.0
    reference: Callable[[int, str, str], float] = lambda size, base, dataset: 0.5
    loss: Callable[[int, str, int], float] | None = None
    is_there: Callable[[str, str, str], bool] = lambda size, base, model: True
    sizes: Sequence[str] = ("xs", "s", "m", "l")
    bases: Sequence[str] = (PT, IT)
    methods: Sequence[str] = tuple(METHODS)
    num_experts: Sequence[int] = (2, 4, 6, 8)
    seeds: Sequence[int] = (0, 1, 2)
    settings: Sequence[str] = ("fixed",)

    def study(self) -> dict[str, Any]:
        """study.json."""
        categories = {
            name: {
                "role": role,
                "datasets": {
                    d: {"tasks": tasks, "metric": "accuracy"} for d, tasks in datasets.items()
                },
            }
            for role, table in (("held_in", HELD_IN), ("held_out", HELD_OUT))
            for name, datasets in table.items()
        }
        return {
            "version": 1,
            "name": "synthetic",
            "question": "Does the report find what was put in?",
            "sizes": {size: {"parameters": 10**6 * 4**i} for i, size in enumerate(self.sizes)},
            "bases": {
                base: {"role": "instruction_tuned" if base == IT else "pretrained"}
                for base in self.bases
            },
            "methods": {name: METHODS[name] for name in self.methods},
            "num_experts": list(self.num_experts),
            "seeds": list(self.seeds),
            "categories": categories,
            "cells": [
                {
                    "size": size,
                    "base": base,
                    "method": method,
                    "num_experts": n,
                    "seed": seed,
                    "setting": setting,
                    "categories": subset(n, seed),
                    "model": self._model(method, n, seed, setting),
                }
                for size in self.sizes
                for base in self.bases
                for setting in self.settings
                for method in self.methods
                for n in self.num_experts
                for seed in self.seeds
            ],
        }

    def _model(self, method: str, n: int, seed: int, setting: str) -> str:
        is_same = n == len(HELD_IN) and not method.startswith("dare")
        name = f"{method}_n{n}_s{self.seeds[0] if is_same else seed}"
        return name if setting == "fixed" else f"{name}_{setting}"

    def scores(self) -> Iterator[tuple[results.Model, int, dict[str, float]]]:
        """(model, number of experts, raw score of each dataset) of every model that has any."""
        of = {
            (c["size"], c["base"], c["model"]): (c["method"], c["num_experts"], c["seed"])
            for c in reversed(self.study()["cells"])  # of equal merges the first seed's
        }
        trained = [("base", 0), ("multitask", 8), *((f"expert_{name}", 1) for name in HELD_IN)]
        names = [
            *((s, b, name, k) for s in self.sizes for b in self.bases for name, k in trained),
            *((*model, n) for model, (_, n, _) in of.items()),
        ]
        datasets = [d for table in (HELD_IN, HELD_OUT) for each in table.values() for d in each]
        for size, base, name, k in names:
            if not self.is_there(size, base, name):
                continue
            s = list(self.sizes).index(size)
            raw = {}
            for d in datasets:
                ratio = 1.0
                if name == "multitask":
                    ratio = self.multitask(s, base, d)
                elif name == "base":
                    ratio = 1.0 if d in IS_HELD_OUT else 0.6
                elif (size, base, name) in of:
                    ratio = self.merged(s, base, *of[size, base, name], d)
                raw[d] = ratio * self.reference(s, base, d)
            yield (size, base, name), k, raw

    def results(self) -> results.Results:
        """What reading the folder gives, without the folder."""
        study = results.parse(self.study())
        rows = {model: i for i, model in enumerate(study.models)}
        raw = np.full((len(rows), len(study.datasets)), np.nan)
        losses = {}
        for model, k, scores in self.scores():
            raw[rows[model]] = [scores[each.name] for each in study.datasets]
            if self.loss is not None:
                losses[model] = self.loss(list(self.sizes).index(model[0]), model[1], k)
        return results.Results(
            study=study,
            rows=rows,
            raw=raw,
            stderr=np.full_like(raw, 0.02),
            spread=np.zeros_like(raw),
            chance=np.array([_chance(each.name) or np.nan for each in study.datasets]),
            losses=losses,
            vectors={},
            manifests={},
        )

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        """The study as files."""
        folder.mkdir(parents=True)
        (folder / "study.json").write_text(json.dumps(self.study()))
        tasks = {
            d: t for table in (HELD_IN, HELD_OUT) for c in table.values() for d, t in c.items()
        }
        for model, k, raw in self.scores():
            nats = self.loss(list(self.sizes).index(model[0]), model[1], k) if self.loss else None
            write_scores(folder, model, tasks, raw, nats)
        return folder


def subset(n: int, seed: int) -> list[str]:
    """The categories of a merge: n in a row, from a place that the seed decides."""
    names = list(HELD_IN)
    chosen = {names[(3 * seed + i) % len(names)] for i in range(n)}
    return [name for name in names if name in chosen]


def write_scores(
    folder: pathlib.Path,
    model: results.Model,
    tasks: Mapping[str, Sequence[str]],
    scores: Mapping[str, float],
    nats: float | None = None,
) -> None:
    """scores.jsonl and manifest.json of a model. Two prompts a task, a little apart; parts too; another metric beside."""
    place = folder / "scores" / "/".join(model)
    place.mkdir(parents=True)
    lines = []
    for dataset, parts in tasks.items():
        for i, task in enumerate(parts):
            value = scores[dataset] * (1 + 0.1 * (i - (len(parts) - 1) / 2))
            for prompt, factor in (("p", 0.9), ("q", 1.1)):
                lines.append(_line(model, task, prompt, "accuracy", value * factor))
                lines.append(_line(model, task, prompt, "other", 99.0))
    if nats is not None:
        lines.append(_line(model, "text", "p", "nats_per_token", nats))
    (place / "scores.jsonl").write_text("".join(line + "\n" for line in lines))
    (place / "manifest.json").write_text(json.dumps(MANIFEST))


def _chance(dataset: str) -> float | None:
    return None if dataset.startswith("su") else CHANCE


def _line(model: results.Model, task: str, prompt: str, metric: str, value: float) -> str:
    return Score(
        model="/".join(model),
        task=task,
        prompt=prompt,
        metric=metric,
        value=value,
        stderr=0.02,
        count=100,
        chance=_chance(task),
        seconds=0.1,
    ).line()


MANIFEST = {
    "stage": "study",
    "made": "2026-11-26T12:00:00+00:00",
    "environment": {
        "code": "c0de" * 16,
        "python": "3.11.0",
        "libraries": {"jax": "0.10.2"},
        "device": {"platform": "cpu", "kind": "cpu"},
        "processes": 1,
        "devices": 1,
    },
    "identity_digest": "1d" * 32,
    "merge_seconds": 0.25,
    "evaluate_seconds": 3.0,
}


def write_vectors(folder: pathlib.Path, size: str, base: str) -> None:
    """Task vectors whose cosines fall with the distance in the table."""
    names = list(HELD_IN)
    n = len(names)
    cosines = [[math.exp(-abs(i - j)) for j in range(n)] for i in range(n)]
    conflict = [[0.0 if i == j else 0.5 - 0.3 * cosines[i][j] for j in range(n)] for i in range(n)]
    path = folder / "vectors" / size / f"{base}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"experts": names, "norms": [1.0] * n, "cosines": cosines, "sign_conflict": conflict}
    path.write_text(json.dumps(content))

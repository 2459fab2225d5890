"""A study folder as launch.study leaves it, from functions that say what each model scores."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merging.evaluation.collect import Score

PT, IT = "pretrained", "instruct"
METHODS = {
    "averaging": "Averaging(weights=None)",
    "task_arithmetic": "TaskArithmetic(scale=0.4, weights=None)",
    "ties": "Ties(density=0.2)",
    "dare_ties": "DareTies(density=0.5)",
}

# The study's table in small: two datasets a held-in category, one of them of two parts; four held-out ones of which one is alone.
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
CHANCE = 0.25

# (size, base, method, N, seed, dataset) -> the ratio to the reference; size and N are numbers: 0, 1, ... and N.
Ratio = Callable[[int, str, str, int, int, str], float]


def build(
    folder: pathlib.Path,
    merged: Ratio,
    *,
    sizes: Sequence[str] = ("xs", "s", "m", "l"),
    bases: Sequence[str] = (PT, IT),
    methods: Sequence[str] = tuple(METHODS),
    num_experts: Sequence[int] = (2, 4, 6, 8),
    seeds: Sequence[int] = (0, 1, 2),
    multitask: Callable[[int, str, str], float] = lambda size, base, dataset: 1.0,
    reference: Callable[[int, str, str], float] = lambda size, base, dataset: 0.5,
    loss: Callable[[int, str, int], float] | None = None,
    settings: Sequence[str] = ("fixed",),
    is_there: Callable[[str, str, str], bool] = lambda size, base, model: True,
) -> pathlib.Path:
    """Writes a study by its contract.

    Args:
      merged: ratio of a merged model's score to its reference.
      multitask: the same of the multitask model.
      reference: raw score of the expert (held-in datasets) or the base (held-out) on a dataset.
      loss: nats per token of (size, base, number of experts); none are written without it.
      is_there: whether a model's scores are written.
    """
    tables = {"held_in": HELD_IN, "held_out": HELD_OUT}
    categories = {
        name: {
            "role": role,
            "datasets": {
                d: {"tasks": tasks, "metric": "accuracy"} for d, tasks in datasets.items()
            },
        }
        for role, table in tables.items()
        for name, datasets in table.items()
    }
    cells = [
        {
            "size": size,
            "base": base,
            "method": method,
            "num_experts": n,
            "seed": seed,
            "setting": setting,
            "categories": subset(n, seed),
            "model": _model(method, n, seed, seeds, setting),
        }
        for size in sizes
        for base in bases
        for setting in settings
        for method in methods
        for n in num_experts
        for seed in seeds
    ]
    study = {
        "version": 1,
        "name": "synthetic",
        "question": "Does the report find what was put in?",
        "sizes": {size: {"parameters": 10**6 * 4**i} for i, size in enumerate(sizes)},
        "bases": {b: {"role": "instruction_tuned" if b == IT else "pretrained"} for b in bases},
        "methods": {name: METHODS[name] for name in methods},
        "num_experts": list(num_experts),
        "seeds": list(seeds),
        "categories": categories,
        "cells": cells,
    }
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(study))
    tasks = {
        d: (name, each["role"], of["tasks"])
        for name, each in categories.items()
        for d, of in each["datasets"].items()
    }

    def write(size: str, base: str, model: str, k: int, raw: Callable[[str], float]) -> None:
        if is_there(size, base, model):
            scores = {d: raw(d) for d in tasks}
            nats = None if loss is None else loss(list(sizes).index(size), base, k)
            write_scores(folder, (size, base, model), {d: tasks[d][2] for d in tasks}, scores, nats)

    for s, size in enumerate(sizes):
        for base in bases:
            below = {d: reference(s, base, d) for d in tasks}
            write(
                size, base, "base", 0, lambda d: below[d] * (0.6 if tasks[d][1] == "held_in" else 1)
            )  # noqa: B023
            write(size, base, "multitask", 8, lambda d: below[d] * multitask(s, base, d))  # noqa: B023
            for category in HELD_IN:
                write(size, base, f"expert_{category}", 1, lambda d: below[d])  # noqa: B023
            done = set()
            for cell in cells:
                if (cell["size"], cell["base"]) == (size, base) and cell["model"] not in done:
                    done.add(cell["model"])
                    method, n, seed = cell["method"], cell["num_experts"], cell["seed"]
                    write(
                        size, base, cell["model"], n,
                        lambda d: below[d] * merged(s, base, method, n, seed, d),  # noqa: B023
                    )  # fmt: skip
    return folder


def subset(n: int, seed: int) -> list[str]:
    """The categories of a merge: n in a row, from a place that the seed decides."""
    names = list(HELD_IN)
    chosen = {names[(3 * seed + i) % len(names)] for i in range(n)}
    return [name for name in names if name in chosen]


def _model(method: str, n: int, seed: int, seeds: Sequence[int], setting: str) -> str:
    is_same = n == len(HELD_IN) and not method.startswith("dare")
    name = f"{method}_n{n}_s{seeds[0] if is_same else seed}"
    return name if setting == "fixed" else f"{name}_{setting}"


def write_scores(
    folder: pathlib.Path,
    model: tuple[str, str, str],
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
    (place / "manifest.json").write_text(json.dumps(_manifest("cell")))


def _line(model: tuple[str, str, str], task: str, prompt: str, metric: str, value: float) -> str:
    chance = None if task.startswith("su") else CHANCE
    return Score(
        model="/".join(model),
        task=task,
        prompt=prompt,
        metric=metric,
        value=value,
        stderr=0.02,
        count=100,
        chance=chance,
        seconds=0.1,
    ).line()


def _manifest(stage: str) -> dict[str, Any]:
    return {
        "stage": stage,
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
    path.write_text(
        json.dumps(
            {"experts": names, "norms": [1.0] * n, "cosines": cosines, "sign_conflict": conflict}
        )
    )

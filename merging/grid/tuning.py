"""Which settings of a method a study chooses among, where it tunes (arXiv 2410.03617 does not say whether its authors did).

At most 12 a method: as many values of what scales the merge as are wanted for a curve, times a few densities where the method trims or
draws. Averaging has nothing to choose. A choice is made once per (base, size, method, number of experts), by the experts that
seed 0 picks, on held-in validation examples that judge nobody; held-out ones have no part in it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from merging.checkpoints.storage import put_whole
from merging.engine import hosts
from merging.manifest import digest
from merging.methods.averaging import Averaging
from merging.methods.dare import Dare
from merging.methods.dare_ties import DareTies
from merging.methods.method import Method
from merging.methods.task_arithmetic import TaskArithmetic
from merging.methods.ties import Ties

if TYPE_CHECKING:
    from merging.evaluation.collect import Result
    from merging.grid.study_file import Category

SEED = 0  # that picks the experts a choice is made by

_SCALES = (0.4, 0.7, 1.0, 1.5)
_VALUES: Mapping[type[Method], Mapping[str, Sequence[float]]] = {
    Averaging: {},
    TaskArithmetic: {"scale": (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2)},
    Dare: {"density": (0.1, 0.2, 0.5), "scale": (0.2, 0.4, 0.7, 1.0)},
    Ties: {"density": (0.1, 0.2, 0.5), "scale": _SCALES},
    DareTies: {"density": (0.1, 0.2, 0.5), "scale": _SCALES},
}


def candidates(method: Method) -> list[Method]:
    """The settings that a study chooses among: the method with other scales and densities, at most 12; none where nothing is to choose."""
    values = _VALUES.get(type(method), {})
    return [
        dataclasses.replace(method, **dict(zip(values, chosen, strict=True)))
        for chosen in itertools.product(*values.values())
        if chosen
    ]


def held_in_score(results: Sequence[Result], categories: Sequence[Category]) -> float:
    """The mean over categories, of means over datasets, of the metric that counts.

    Args:
      results: of a model, on tasks of these categories among others.
      categories: of the experts in the merge.
    """
    values: dict[tuple[str, str], list[float]] = {}
    for result in results:
        for score in result.scores:
            values.setdefault((score.task, score.metric), []).append(score.value)
    means = [
        np.mean(
            [
                np.mean([np.mean(values[task, dataset.metric]) for task in dataset.tasks])
                for dataset in category.datasets.values()
            ]
        )
        for category in categories
    ]
    return float(np.mean(means))


def chosen(
    path: epath.Path,
    options: Sequence[Method],
    score: Callable[[Method], float],
    *,
    depends_on: Mapping[str, object],
) -> Method:
    """The option of the highest score, the first of equals: read from a file where an equal choice was made before, else made and put there.

    Args:
      path: of the choice, JSON: options, their scores, and which it is.
      depends_on: JSON that tells a choice from others, beside its options.
    """
    identity = digest({"options": [repr(option) for option in options], **depends_on})
    found = json.loads(path.read_text()) if hosts.is_main() and path.exists() else {}
    found = hosts.of_main(found)
    if found.get("identity") != identity:
        scores = [score(option) for option in options]
        found = {
            "identity": identity,
            "options": {repr(o): s for o, s in zip(options, scores, strict=True)},
            "chosen": int(np.argmax(scores)),
        }
        if hosts.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            put_whole(path, (json.dumps(found, indent=1) + "\n").encode())
    return options[found["chosen"]]

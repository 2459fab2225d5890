"""Validation by tasks: a model that is being trained, scored as the evaluate stage scores it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from merging.evaluation.collect import Result
from merging.evaluation.evaluator import Evaluator, Options
from merging.evaluation.examples import Task
from merging.models.config import DecoderConfig
from merging.models.families import is_prefix_lm, model_of

# The mean over tasks, of each the metric that counts.
SCORE = "score"
LOSSES = ("nats_per_token", "bits_per_byte")

# Metrics of which less is better, by the last part of their names.
LOWEST = ("loss", *LOSSES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """Tasks that a run is validated by, beside its loss.

    Attributes:
      tasks: with their examples; made by who reads text.
      main: the metric that counts, by name of the task; tasks of losses have none.
      vocabulary_digest: of the examples' tokens.
      row_length: the most tokens of a prompt with an answer.
      identity: JSON, all that the examples depend on.
    """

    tasks: Sequence[Task]
    main: Mapping[str, str]
    vocabulary_digest: str
    row_length: int = 2_048
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def metrics(self) -> list[str]:
        """The names of all values, `task/metric`, and `score` where a task has a metric that counts."""
        names = dict.fromkeys(f"{t.name}/{metric}" for t in self.tasks for metric in _metrics(t))
        return [*([SCORE] if self.main else []), *names]

    def evaluator(
        self, config: DecoderConfig, mesh: jax.sharding.Mesh, *, vocabulary_chunks: int = 1
    ) -> Callable[[Any, str], dict[str, float]]:
        """(parameters, name of the model for errors) -> values by name, each the mean over a task's prompts.

        Raises ValueError for examples that don't fit into a row.
        """
        options = Options(
            bidirectional=is_prefix_lm(config),
            row_length=self.row_length,
            vocabulary_chunks=vocabulary_chunks,
        )
        evaluator = Evaluator(model_of(config), self.tasks, mesh=mesh, options=options)
        return lambda params, name: self._values(evaluator(params, name))

    def _values(self, results: Sequence[Result]) -> dict[str, float]:
        of_prompts: dict[str, list[float]] = {}
        for score in (score for each in results for score in each.scores):
            of_prompts.setdefault(f"{score.task}/{score.metric}", []).append(score.value)
        values = {name: float(np.mean(each)) for name, each in of_prompts.items()}
        if self.main:
            mains = [values[f"{task}/{metric}"] for task, metric in self.main.items()]
            values[SCORE] = float(np.mean(mains))
        return values


def _metrics(task: Task) -> list[str]:
    """The names of a task's metrics, as they judge its first example answered rightly."""
    first = task.examples[0]
    if task.metric is None:
        return [name for name in LOSSES if name != "bits_per_byte" or first.choices_text]
    answer = first.truth if task.kind == "rank" else first.truth[0]
    return [name for name in task.metric([first.truth], [answer]) if not name.endswith("_stderr")]

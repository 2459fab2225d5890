"""scores.jsonl: lines go behind lines, and come back as they were."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import numpy as np
import pytest

from merging.evaluation.collect import Result, Score, ScoresFile, result, total_ties
from merging.evaluation.examples import Example, Task


def group(model: str, task: str, values: dict[str, float]) -> Result:
    scores = [
        Score(
            model=model,
            task=task,
            prompt="p",
            metric=metric,
            value=value,
            stderr=math.nan,
            count=3,
            chance=None,
            seconds=0.5,
        )
        for metric, value in values.items()
    ]
    return Result(task=None, scores=scores, predictions=[], choice_scores=[], ties=0)


GROUPS = [group("a", "x", {"em": 0.25, "f1": 0.5}), group("a", "y", {"em": 1.0, "f1": math.nan})]


def test_what_is_appended_goes_behind_what_is_there(tmp_path: pathlib.Path):
    path = tmp_path / "scores.jsonl"
    ScoresFile(path).append(GROUPS[:1])
    before = path.read_text()
    file = ScoresFile(path)
    assert file.done == {("a", "x", "p")}
    file.append(GROUPS[1:])
    assert file.done == ScoresFile(path).done == {("a", "x", "p"), ("a", "y", "p")}
    assert path.read_text().startswith(before)
    assert [each.name for each in tmp_path.iterdir()] == ["scores.jsonl"]


def test_scores_come_back_as_they_were(tmp_path: pathlib.Path):
    path = tmp_path / "scores.jsonl"
    ScoresFile(path).append(GROUPS)
    assert [s.line() for s in ScoresFile(path).scores] == [
        s.line() for g in GROUPS for s in g.scores
    ]
    assert math.isnan(ScoresFile(path).scores[3].value)


def test_ties_are_counted_once_a_task_whatever_its_metrics():
    scores = [dataclasses.replace(s, ties=n) for n, g in enumerate(GROUPS, 2) for s in g.scores]
    assert total_ties(scores) == 2 + 3


def test_a_line_that_is_no_score_is_named(tmp_path: pathlib.Path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"model": "a"}\n')
    with pytest.raises(ValueError, match=r"scores.jsonl:1 is not a score"):
        ScoresFile(path)


def test_a_score_that_is_not_a_number_is_named():
    choice = np.array([1], np.int32)
    task = Task(
        name="t",
        prompt="p",
        kind="rank",
        examples=[Example(id="7", prompt=choice, choices=(choice, choice), truth=0)],
        metric=lambda truths, predictions: {},
    )
    with pytest.raises(ValueError, match="model m, task t, prompt p, example 7: .* NaN"):
        result(task, "m", log_probs=[np.array([0.0, np.nan])], seconds=0.0)

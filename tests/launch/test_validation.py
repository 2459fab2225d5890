"""The tasks that a run is validated by: held-in ones, in the mixtures' words."""

from __future__ import annotations

import pytest

from launch.validation import ValidationTasks, validation

LENGTHS = {"inputs": 96, "targets": 32}


def made(names, **changes):
    asked = ValidationTasks(names=names, lengths=LENGTHS, limit=2, **changes)
    return validation(asked, {"vocabulary": None, "local_data": None})


def test_the_tasks_of_a_category_with_the_metric_that_counts():
    found = made(["sentiment_mini", "summarization_mini"])
    assert set(found.main.values()) == {"accuracy", "rougeLsum"}
    assert {len(task.examples) for task in found.tasks} == {2}
    assert {task.name for task in found.tasks} == set(found.main)
    each = {f"{task}/{metric}" for task, metric in found.main.items()}
    assert found.metrics[0] == "score" and each < set(found.metrics)
    assert not any(name.endswith("_stderr") for name in found.metrics)
    assert made(None) is None


@pytest.mark.parametrize(
    ("names", "changes", "match"),
    [
        ("held_out_mini", {}, "held_out_mini can't be validated on: it holds causes"),
        ("sentiment_min", {}, "no mixture or task 'sentiment_min'.*sentiment_mini"),
        ("sentiment_mini", {"split": None}, "VALIDATION_SPLIT is None"),
    ],
)
def test_what_a_run_may_not_choose_by(names: str, changes: dict, match: str):
    with pytest.raises(ValueError, match=match):
        made(names, **changes)

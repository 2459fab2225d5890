"""Requests of lm-evaluation-harness as examples of ours, with a stand-in for the model; and what can't be asked of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from launch import evaluate
from launch.evaluation import Examples
from merging.evaluate import Settings

pytestmark = pytest.mark.peers


@pytest.fixture
def model() -> Any:
    """Rows of eight tokens; each word is one token, and what the model was given is kept."""
    pytest.importorskip("lm_eval", reason="needs the extra `peers`")
    from launch.harness import HarnessModel

    given = []

    def run(tasks: Any) -> list[Any]:
        (task,) = tasks
        given.extend(task.examples)
        return [
            SimpleNamespace(
                predictions=["x"] * len(task.examples),
                choice_scores=[[0.0] * len(each.choices) for each in task.examples],
                is_greedy=[[True] * len(each.choices) for each in task.examples],
            )
        ]

    vocabulary = SimpleNamespace(
        eos_id=1, pad_id=0, encode=lambda text: [int(n) for n in text.split()]
    )
    made = HarnessModel(run, vocabulary, max_length=8)
    made.given = given
    return made


def written(context: str, most: int) -> Any:
    return SimpleNamespace(
        args=(context, {"until": ["."], "max_gen_toks": most, "do_sample": False})
    )


def test_a_context_without_room_loses_its_beginning_and_is_counted(model: Any):
    short, long = [2, 3], list(range(2, 12))
    model._loglikelihood_tokens([(None, short, [5, 6]), (None, long, [5, 6])])
    assert [each.prompt.tolist() for each in model.given] == [
        short,
        long[-7:],
    ]  # 7 + 2 - 1 tokens are read
    assert model.cut_contexts == 1


@pytest.mark.parametrize(("most", "kept"), [(5, [9, 10, 11]), (7, [11])])
def test_what_is_generated_has_its_room(model: Any, most: int, kept: list[int]):
    assert model.generate_until([written("8 9 10 11", most)]) == ["x"]
    assert model.given[0].prompt.tolist() == kept
    assert model.cut_contexts == 1


@pytest.mark.parametrize("most", [8, 9])
def test_generation_that_fills_the_row_is_refused(model: Any, most: int):
    with pytest.raises(
        ValueError, match=f"a task generates {most} tokens .* no room for a context in 8"
    ):
        model.generate_until([written("8 9", most)])


def test_what_the_harness_does_not_know_is_refused():
    settings = Settings(output_dir="/out", checkpoints={})
    plain = {"mixture_or_task_name": "a", "lengths": {}}
    evaluate.refuse_in_harness(settings, Examples(**plain, limit=3, seed=4, few_shot=2))
    with pytest.raises(
        ValueError, match="NUM_PROMPTS, MEASURE can't be combined with --harness_tasks"
    ):
        evaluate.refuse_in_harness(settings, Examples(**plain, num_prompts=1, measure="loss"))

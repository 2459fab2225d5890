"""What a dataset declares is checked when it is declared, and a row when it is rendered."""

from __future__ import annotations

import pytest

from tasks.dataset import Dataset, Example, Generated, Ranked

RANKED = Ranked(inputs="{text}?", choices=("no", "yes"))


def dataset(**changes) -> Dataset:
    arguments = {
        "name": "weather",
        "category": "sentiment",
        "metric": "accuracy",
        "fields": ("text", "label"),
        "prompts": {"plain": RANKED},
        "sources": {},
    }
    return Dataset(**(arguments | changes))


def test_ranked_and_generated():
    row = {"text": "wet", "label": 1, "many": ["a {b}", "c", "d"], "all": ["x", "y"]}
    assert RANKED(row) == Example(inputs="wet?", targets="yes", choices=("no", "yes"), label=1)
    own = Ranked(inputs="", choices="many")(row)
    assert (own.inputs, own.choices, own.targets) == ("", ("a {b}", "c", "d"), "c")
    generated = Generated(inputs="{text}", targets="{all[0]}", references="all")(row)
    assert (generated.targets, generated.references, generated.label) == ("x", ("x", "y"), None)


def test_white_space_around_is_taken_off():
    example = Example(inputs=" a b\n", targets=" c ", choices=("c ", "d"), label=0)
    assert (example.inputs, example.targets, example.choices) == ("a b", "c", ("c", "d"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": ("a", "b")}, "choices and a label go together"),
        ({"label": 0}, "choices and a label go together"),
        ({"choices": ("a", "b"), "label": 2}, "the label is 2, but there are 2 choices"),
        ({"choices": ("a", "b"), "label": 1}, "the targets are not the labelled choice"),
    ],
)
def test_an_example_checks_itself(changes, message: str):
    with pytest.raises(ValueError, match=message):
        Example(inputs="i", targets="a", **changes)


def test_a_prompt_with_an_unknown_field():
    with pytest.raises(
        ValueError, match="'plain' of weather speaks of a field 'txt'; did you mean text"
    ):
        dataset(prompts={"plain": Generated(inputs="{txt}", targets="{label}")})
    with pytest.raises(ValueError, match="has no prompt"):
        dataset(prompts={})
    free = dataset(prompts={"plain": lambda row: Example(inputs=row["txt"], targets="a")})
    with pytest.raises(ValueError, match="there is no field 'txt'; did you mean text"):
        free.render("plain", {"text": "a", "label": 0})


def test_a_row_that_is_wrong():
    with pytest.raises(
        ValueError, match="a row of weather has no field 'label'.* found: lable, text"
    ):
        dataset().render("plain", {"text": "a", "lable": 0})
    with pytest.raises(
        ValueError, match="'plain' of weather: the label is -1, but there are 2 choices; the row"
    ):
        dataset().render("plain", {"text": "a", "label": -1})

"""T5X fills up what a checkpoint lacks in silence; what we put before it lets no parameter be lacking."""

from __future__ import annotations

import pytest

from launch.t5x.restore import parameters_alone

STORED = {"driver": "zarr", "kvstore": {"path": "target.a/"}, "metadata": {"shape": [2]}}
WANTED = {
    "target": {"a": 1, "b": {"c": 2}},
    "state": {"step": 0, "param_states": {"a": {"v": 3}, "b": {"c": {"v": 4}}}},
}


def test_parameters_and_step_are_kept_and_the_optimizer_state_is_dropped():
    target = {"a": STORED, "b": {"c": 5}}
    stored = {"target": target, "state": {"step": 7, "param_states": {"a": {"v": 6}}}}
    assert parameters_alone(stored, WANTED) == {"target": target, "state": {"step": 7}}
    assert parameters_alone(stored, WANTED, is_resuming=True) is stored


def test_parameters_that_differ_are_refused_by_name():
    stored = {"target": {"a": STORED, "b": {"d": 5}}, "state": {"step": 7, "param_states": {}}}
    with pytest.raises(
        ValueError, match=r"b/c is missing\n.*b/d is not the model's\n.*SCAN_LAYERS"
    ):
        parameters_alone(stored, WANTED)

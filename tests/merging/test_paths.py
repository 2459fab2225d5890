"""Names of one tensor in several frameworks' spellings are one path; entries of stacked leaves are layers' paths."""

from __future__ import annotations

import jax
import jaxtyping
import numpy as np
import pytest

from merging.paths import Patterns, Stacked, canonical, is_like, of_tree_path

ONE_PATH = [
    "decoder/layers_7/mlp/wi/kernel",
    "decoder/layers/7/mlp/wi/kernel",
    "decoder.layers.7.mlp.wi.kernel",
    "decoder.layers_7.mlp/wi/kernel",
]


@pytest.mark.parametrize("name", ONE_PATH)
def test_spellings_of_one_path(name: str):
    assert canonical(name) == "decoder/layers/7/mlp/wi/kernel"


@pytest.mark.parametrize(
    "name, path",
    [
        ("", ""),
        ("w", "w"),
        ("model.embed_tokens.weight", "model/embed_tokens/weight"),
        ("layers_07/w", "layers/07/w"),
        ("layers_12", "layers/12"),
        ("block_2_1/w", "block_2_1/w"),  # what comes before the number ends in one: no layer's name
        ("wi_0/kernel", "wi/0/kernel"),
        ("conv1d_3/w", "conv1d/3/w"),
        ("layer2/w", "layer2/w"),
        ("_7/w", "_7/w"),
        ("layers__7/w", "layers__7/w"),
        ("7_layers/w", "7_layers/w"),
        ("a//b", "a//b"),
    ],
)
def test_other_names(name: str, path: str):
    assert canonical(name) == path


@pytest.mark.parametrize(
    "name", [*ONE_PATH, "", "wi_0/kernel", "block_2_1/w", "layers__7", "a_1.b_2/3"]
)
def test_a_canonical_path_is_its_own(name: str):
    assert canonical(canonical(name)) == canonical(name)


def test_the_first_pattern_counts():
    """With wildcards and without, held against names as they stand and as canonical paths."""
    patterns = Patterns(["a.1.w", "a/?/w", "a/2/w", "*", "b"])
    found = {name: patterns.first([name]) for name in ("a.1.w", "a_1/w", "a.2.w", "a.33.w", "b")}
    assert found == {"a.1.w": "a.1.w", "a_1/w": "a/?/w", "a.2.w": "a/?/w", "a.33.w": "*", "b": "*"}
    assert Patterns(["b", "*"]).first(["b"]) == "b"
    assert patterns.first(["x", "a.2.w"]) == "a/?/w"
    assert Patterns(["a[01]", "c"]).first(["a1"]) == "a[01]"
    assert Patterns(["a[01]", "c"]).first(["C", "a2"]) is None
    assert is_like("a_1/w", ["c", "a/1/*"]) and not is_like("a_1/w", ["a/2/*"])


def test_patterns_that_no_leaf_is_like():
    patterns = Patterns(["a.1.w", "a/*", "b/*", "c", "d"])
    assert patterns.unused([["a.1.w", "a/1/w"], ["c"]]) == ["b/*", "d"]


def test_paths_of_a_tree():
    tree = {"decoder": {"layers_1": [np.zeros(1), {"w": np.zeros(1)}]}, "out": np.zeros(1)}
    names = [of_tree_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert names == ["decoder/layers_1/0", "decoder/layers_1/1/w", "out"]
    assert of_tree_path(()) == ""


@pytest.mark.parametrize(
    "pattern, axis, name, layer_path",
    [
        ("decoder/layers/*", 1, "decoder/layers/mlp/wi/kernel", "decoder/layers/7/mlp/wi/kernel"),
        ("decoder/layers", 0, "decoder/layers/mlp/wi/kernel", "decoder/layers/7/mlp/wi/kernel"),
        ("decoder/layers", 0, "decoder/layers", "decoder/layers/7"),
        ("decoder.layers.*", 0, "decoder.layers.mlp/wi", "decoder/layers/7/mlp/wi"),
        ("*/layers/*/kernel", 2, "a/b/layers/mlp/kernel", "a/b/layers/7/mlp/kernel"),
        ("*/layers/*", 0, "encoder/layers/w", "encoder/layers/7/w"),
        ("enc*/layers/*", 0, "encoder/layers/w", "encoder/layers/7/w"),
        ("layers/mlp/*", 0, "layers/mlp/w", "layers/mlp/7/w"),
        ("stack_of_layers", 0, "stack_of_layers/w", "stack_of_layers/7/w"),
        ("w", 1, "w", "w/7"),
    ],
)
def test_entries_of_a_stacked_leaf(pattern: str, axis: int, name: str, layer_path: str):
    stacked = Stacked({pattern: axis})
    assert stacked.axis(name) == axis
    assert stacked.layer_path(name, 7) == layer_path
    assert stacked.unused([name, "else"]) == []


@pytest.mark.parametrize(
    "pattern, name",
    [
        ("decoder/layers/*", "decoder/layers"),
        ("decoder/layers/*", "decoder/layers_norm/w"),
        ("decoder/layers", "decoder/layers_norm/w"),
        ("decoder/layers", "encoder/decoder/layers/w"),
        ("layers/*/kernel", "layers/mlp/bias"),
        ("a+b/*", "aab/w"),  # a pattern's other characters stand for themselves
    ],
)
def test_leaves_that_are_not_stacked(pattern: str, name: str):
    stacked = Stacked({pattern: 0})
    assert stacked.axis(name) is None
    assert stacked.unused([name]) == [pattern]
    with pytest.raises(AssertionError, match="is not stacked"):
        stacked.layer_path(name, 0)


def test_a_stacked_entry_has_the_path_of_the_unstacked_leaf():
    stacked = Stacked({"decoder/layers/*": 1})
    for spelling in ONE_PATH:
        assert stacked.layer_path("decoder/layers/mlp/wi/kernel", 7) == canonical(spelling)


def test_the_first_pattern_that_fits_counts():
    stacked = Stacked({"decoder/layers/norm/*": 0, "decoder/layers/*": 1})
    assert stacked.axis("decoder/layers/norm/scale") == 0
    assert stacked.layer_path("decoder/layers/norm/scale", 2) == "decoder/layers/norm/2/scale"
    assert stacked.axis("decoder/layers/mlp/wi") == 1
    assert stacked.unused(["decoder/layers/mlp/wi"]) == ["decoder/layers/norm/*"]


def test_without_patterns_nothing_is_stacked():
    for patterns in (None, {}):
        assert Stacked(patterns).axis("decoder/layers/w") is None
        assert Stacked(patterns).unused(["w"]) == []


@pytest.fixture
def unchecked_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user calls it: the checker that tests install would refuse a wrong type first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("axis", (-1, 1.0, "1", None, True))
def test_refuses_an_axis_that_is_none(axis: object, unchecked_annotations: None):
    with pytest.raises(ValueError, match=r"stacked\['layers/\*'\] is .*give the axis over layers"):
        Stacked({"layers/*": axis})


@pytest.mark.parametrize("pattern", ("*", "*/*"))
def test_refuses_a_pattern_that_names_no_layers(pattern: str):
    with pytest.raises(ValueError, match="has no plain part"):
        Stacked({pattern: 0})

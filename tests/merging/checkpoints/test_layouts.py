"""Layouts: what they make of trees, that they lead back, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.checkpoints.format import CheckpointError, LeafSpec
from merging.checkpoints.layout_reader import arranged
from merging.checkpoints.layouts import SAME, Layout, Rule, escape

LLAMA = Layout(
    name="llama",
    rules=(
        Rule("model.embed_tokens.weight", "token_embedder/embedding"),
        Rule("model.norm.weight", "decoder/final_norm/scale"),
        Rule(
            "model.layers.{layer}.input_layernorm.weight",
            "decoder/layers/norm/scale",
            "embed -> layer embed",
        ),
        Rule(
            "model.layers.{layer}.mlp.up_proj.weight",
            "decoder/layers/mlp/wi/kernel",
            "mlp embed -> layer embed mlp",
        ),
        Rule(
            "model.layers.{layer}.self_attn.q_proj.weight",
            "decoder/layers/attention/query/kernel",
            "(heads dim) embed -> layer embed heads dim",
        ),
    ),
    sizes={"heads": 3},
)


def llama(layers: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    shapes = {"model.embed_tokens.weight": (11, 5), "model.norm.weight": (5,)}
    for i in range(layers):
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (5,)
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (7, 5)
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (12, 5)
    return tree(shapes, seed=seed)


def tree(
    shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0, dtype: object = np.float32
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=s).astype(dtype) for k, s in shapes.items()}


def specs_of(arrays: Mapping[str, np.ndarray]) -> dict[str, LeafSpec]:
    return {k: LeafSpec(name=k, shape=v.shape, dtype=v.dtype) for k, v in arrays.items()}


def layout(*rules: Rule, **given: object) -> Layout:
    return Layout(name="test", rules=rules, **given)


def assert_same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def there(made: Layout, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays in the layout, after seeing that they come back from it."""
    found = arranged(made, arrays)
    assert_same(arranged(made.inverse(), found), arrays)
    return found


def test_the_example_of_the_text():
    arrays = llama()
    found = there(LLAMA, arrays)
    assert {k: v.shape for k, v in found.items()} == {
        "token_embedder/embedding": (11, 5),
        "decoder/final_norm/scale": (5,),
        "decoder/layers/norm/scale": (2, 5),
        "decoder/layers/mlp/wi/kernel": (2, 5, 7),
        "decoder/layers/attention/query/kernel": (2, 5, 3, 4),
    }
    kernel = arrays["model.layers.1.self_attn.q_proj.weight"].reshape(3, 4, 5).transpose(2, 0, 1)
    np.testing.assert_array_equal(found["decoder/layers/attention/query/kernel"][1], kernel)
    specs = LLAMA.join(specs_of(arrays), where="x").specs
    assert {k: s.stacked for k, s in specs.items() if s.stacked is not None} == {
        k: 0 for k in found if "/layers/" in k
    }
    back = LLAMA.inverse().join(specs, where="x").specs
    assert all(spec.stacked is None for spec in back.values())


def test_rotary_pairs_become_halves():
    made = layout(
        Rule("q", "q", "(heads pair two) embed -> (heads two pair) embed"),
        sizes={"heads": 2, "two": 2},
    )
    found = there(made, {"q": np.arange(8)[:, None].repeat(3, 1)})
    np.testing.assert_array_equal(found["q"][:, 0], [0, 2, 1, 3, 4, 6, 5, 7])


def test_concatenation_of_unequal_parts():
    made = layout(
        Rule(("a.{layer}.q", "a.{layer}.k", "a.{layer}.v"), "qkv", "(h d) e -> layer e h d"),
        sizes={"h": (3, 1, 1), "d": 4},
    )
    arrays = tree(
        {f"a.{i}.{p}": (4 * h, 5) for i in range(2) for p, h in [("q", 3), ("k", 1), ("v", 1)]}
    )
    found = there(made, arrays)
    parts = [arrays[f"a.1.{p}"].reshape(-1, 4, 5) for p in "qkv"]
    np.testing.assert_array_equal(found["qkv"][1], np.concatenate(parts).transpose(2, 0, 1))


def test_named_parts_are_stacked_or_put_side_by_side():
    arrays = tree({"k.w": (6, 5), "v.w": (6, 5)})
    values = {"part": ("v", "k")}
    found = there(layout(Rule("{part}.w", "kv", "o e -> e part o"), values=values), arrays)
    np.testing.assert_array_equal(found["kv"][:, 0], arrays["v.w"].T)
    beside = there(layout(Rule("{part}.w", "kv", "o e -> (part o) e"), values=values), arrays)
    np.testing.assert_array_equal(beside["kv"], np.concatenate([arrays["v.w"], arrays["k.w"]]))


def test_layers_of_two_kinds():
    made = layout(
        Rule("l.{local_layer}.w", "local/w", "e -> local_layer e"),
        Rule("l.{global_layer}.w", "global/w", "e -> global_layer e"),
        values={"local_layer": ("0", "1", "3"), "global_layer": ("2",)},
    )
    arrays = tree({f"l.{i}.w": (5,) for i in range(4)})
    found = there(made, arrays)
    np.testing.assert_array_equal(found["local/w"][2], arrays["l.3.w"])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stacks_of_any_rank_and_more_than_one(axis: int):
    before = " ".join(f"d{i}" for i in range(axis))
    made = layout(Rule("l{layer}/e{expert}/*", "l/*", f"{before} ... -> {before} layer expert ..."))
    arrays = tree({f"l{i}/e{j}/{n}": s for i in range(2) for j in range(3) for n, s in
                   {"a": (4, 5), "b": (4, 5, 2)}.items()})  # fmt: skip
    found = there(made, arrays)
    stack = [np.stack([arrays[f"l{i}/e{j}/b"] for j in range(3)], axis) for i in range(2)]
    np.testing.assert_array_equal(found["l/b"], np.stack(stack, axis))


def test_awkward_names_and_leaves():
    arrays = {
        "a.b/c": np.array(3.0),
        "{x}*\\": np.zeros((3, 0), ml_dtypes.bfloat16),
        "\u00e9 \n": np.array([True, False]),
        "l.0.s": np.array(1, np.int64),
        "l.1.s": np.array(2, np.int64),
        "l.00.s": np.array(7, np.int8),
    }
    made = layout(
        Rule(escape("{x}*\\"), escape("**{}")),
        Rule("l.{layer}.s", "l.s", "-> layer"),
        Rule("*", "*"),
    )
    found = there(made, arrays)
    assert "**{}" in found and found["l.s"].tolist() == [1, 2] and "l.00.s" in found


REFUSED = {
    "no rule takes it": (layout(Rule("a", "b")), {"a": (2,), "c": (2,)}),
    "leaves 'a' and 'b' both become 'x'": (
        layout(Rule("a", "x"), Rule("b", "x")),
        {"a": (2,), "b": (2,)},
    ),
    "'b' becomes 'a/b', which would not come back": (
        layout(Rule("a/*", "a/*", "x y -> y x"), Rule("*", "a/*")),
        {"b": (2,)},
    ),
    "leaf 'l.1.w' is missing": (
        layout(Rule("l.{layer}.w", "w", "... -> layer ...")),
        {"l.0.w": (2,), "l.2.w": (2,)},
    ),
    "leaf 'l.0.w' is missing; ": (
        layout(Rule("l.{layer}.w", "w", "... -> layer ...")),
        {"l.999999999.w": (2,)},
    ),
    "'l.1.w' is float32[3], but 'l.0.w', with which it is put into one, is float32[2]": (
        layout(Rule("l.{layer}.w", "w", "... -> layer ...")),
        {"l.0.w": (2,), "l.1.w": (3,)},
    ),
    "leaf 'w' [10, 2]: dimension 0, (heads dim), has 10 elements, which heads = 3 doesn't divide": (
        layout(Rule("w", "w", "(heads dim) e -> e heads dim"), sizes={"heads": 3}),
        {"w": (10, 2)},
    ),
    "'w' [1000001, 2] would become more than 1,000,000 leaves": (
        layout(Rule("w", "l.{layer}", "layer ... -> ...")),
        {"w": (1_000_001, 2)},
    ),
    "give heads or dim in sizes": (
        layout(Rule("w", "w", "(heads dim) e -> e heads dim")),
        {"w": (10, 2)},
    ),
    "has 10 elements, wanted 12": (
        layout(Rule("w", "w", "a b -> b a"), sizes={"a": 12}),
        {"w": (10, 2)},
    ),
    "leaf 'w' has 3 dimensions, wanted 2": (
        layout(Rule("w", "w", "a b -> b a")),
        {"w": (1, 2, 3)},
    ),
    "'w' [3, 2]: dimension 0, (layer), has 3 elements, wanted 2 (layer = 2)": (
        layout(Rule("w", "l.{layer}", "layer ... -> ..."), values={"layer": ("a", "b")}),
        {"w": (3, 2)},
    ),
    "3 along layer, wanted 2": (
        layout(Rule("l.{layer}", "w", "... -> layer ..."), sizes={"layer": 2}),
        {"l.0": (2,), "l.1": (2,), "l.2": (2,)},
    ),
    "'b' [2, 5]: dimension 1, (e), has 5 elements, wanted 4": (
        layout(Rule(("a", "b"), "w", "h e -> h e"), sizes={"h": (1, 2)}),
        {"a": (1, 4), "b": (2, 5)},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_by_name(message: str):
    made, shapes = REFUSED[message]
    with pytest.raises(CheckpointError) as error:
        made.join(
            {k: LeafSpec(name=k, shape=s, dtype=np.dtype(np.float32)) for k, s in shapes.items()},
            where="/data/x",
        )
    assert message in str(error.value) and "/data/x" in str(error.value)
    assert "rule" in str(error.value) and "test" in str(error.value)


def test_leaves_of_different_types_are_not_put_into_one():
    arrays = {"l.0": np.zeros(2, np.float32), "l.1": np.zeros(2, np.float16)}
    with pytest.raises(CheckpointError, match="'l.1' is float16"):
        layout(Rule("l.{layer}", "w", "... -> layer ...")).join(specs_of(arrays), where="x")


@pytest.mark.parametrize(
    ("rule", "sizes", "message"),
    [
        (Rule("a", "b", "x y -> x"), {}, "each axis must"),
        (Rule("a", "b", "x x -> x x"), {}, "x stands twice"),
        (Rule("a.{l}", "b", "x -> x"), {}, "each axis must"),
        (Rule("a.{l}", "b.{l}", "l x -> x l"), {}, "one side's names must lack it"),
        (Rule("a.{l}", "b", "l x -> l x"), {}, "each axis must"),
        (Rule("a.*", "b", "... -> ..."), {}, "the same number of \\*"),
        (Rule("a", "b", "x y"), {}, "arrow"),
        (Rule("a", "b", "(x -> x"), {}, "can't read the axes"),
        (Rule("a{", "b", SAME), {}, "stray"),
        (Rule("{l}.{l}", "b", "x -> l x"), {}, "stands twice"),
        (Rule(("a", "b"), "c", "x -> x"), {}, "tuple of as many numbers"),
        (Rule(("a", "b"), "c", "x -> x"), {"x": (1, 2, 3)}, "tuple of as many numbers"),
        (Rule(("a", "b"), ("c", "d"), "x -> x"), {"x": (1, 2)}, "on one side only"),
        (Rule(("a.{l}", "b"), "c", "x -> l x"), {"x": (1, 2)}, "the same placeholders"),
    ],
)
def test_rules_that_contradict_themselves(rule: Rule, sizes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        layout(rule, sizes=sizes)


@st.composite
def rules_and_shapes(draw: st.DrawFn) -> tuple[dict[str, object], dict[str, tuple[int, ...]]]:
    """A layout's arguments, some random rules, and shapes that fit it."""
    rules, sizes, shapes = [], {}, {}
    values = {"part": ("q", "k", "v")}
    for number in range(draw(st.integers(1, 4))):
        axes = [f"r{number}a{i}" for i in range(draw(st.integers(0, 4)))]
        for axis in axes:
            sizes[axis] = draw(st.integers(1, 5))
        stacked = draw(st.sets(st.sampled_from(["layer", "part"])))
        sizes["layer"] = 3
        swapped = draw(st.sets(st.sampled_from(sorted(stacked)))) if stacked else set()
        ours, theirs = stacked - swapped, swapped  # axes of source names, of target names
        left = draw(st.permutations([*axes, *theirs]))
        right = draw(st.permutations([*axes, *ours]))
        left_dims, right_dims = draw(grouped(left)), draw(grouped(right))
        dims = [f"({' '.join(d)})" if len(d) > 1 else d[0] for d in left_dims]
        to = [f"({' '.join(d)})" if len(d) > 1 else d[0] for d in right_dims]
        name, target = (
            f"{side}{number}" + "".join(f".{{{axis}}}" for axis in sorted(placed))
            for side, placed in (("s", ours), ("t", theirs))
        )
        rules.append((name, target, f"{' '.join(dims)} -> {' '.join(to)}"))
        count = {**sizes, "part": 3}
        shape = tuple(math.prod(count[a] for a in d) for d in left_dims)
        names = [f"s{number}"]
        for axis in sorted(ours):
            entries = values["part"] if axis == "part" else range(3)
            names = [f"{n}.{entry}" for n in names for entry in entries]
        shapes |= dict.fromkeys(names, shape)
    order = draw(st.permutations(sorted(shapes)))
    # Plain data: calls that check annotations pick items at random, which hypothesis does not want while it draws.
    given_ = {"rules": rules, "sizes": sizes, "values": values}
    return given_, {name: shapes[name] for name in order}


def made_of(rules: list[tuple[str, str, str]], **given: object) -> Layout:
    return layout(*(Rule(*each) for each in rules), **given)


@st.composite
def grouped(draw: st.DrawFn, axes: list[str]) -> list[list[str]]:
    """Axes in dimensions, neighbours together."""
    dims: list[list[str]] = []
    for axis in axes:
        if dims and draw(st.booleans()):
            dims[-1].append(axis)
        else:
            dims.append([axis])
    return dims


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rules_and_shapes())
def test_a_layout_and_its_inverse_are_nothing(
    drawn: tuple[dict[str, object], dict[str, tuple[int, ...]]],
):
    made, arrays = made_of(**drawn[0]), tree(drawn[1])
    found = there(made, arrays)
    assert sum(a.size for a in found.values()) == sum(a.size for a in arrays.values())
    assert_same(there(made.inverse(), found), arrays)

"""Layouts by name, and layouts found from two checkpoints' headers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from merging.checkpoints import memory
from merging.checkpoints.format import CheckpointError
from merging.checkpoints.known_layouts import (
    find_layout,
    in_layout_of,
    named_layout,
)
from merging.checkpoints.layout_reader import LayoutReader, arranged
from tests.merging.checkpoints.test_layouts import assert_same, specs_of, there, tree

LAYERS = 3
PER_LAYER = {"mlp/wi_0/kernel": (4, 6), "mlp/wi_1/kernel": (4, 6), "norm/scale": (4,), "gain": ()}


def unrolled(template: str, *, layers: int = LAYERS) -> dict[str, np.ndarray]:
    """Parameters with each layer's as leaves of their own, named as the template says."""
    slash = "." if "." in template else "/"
    shapes = {
        template.format(i, leaf).replace("/", slash): shape
        for i in range(layers)
        for leaf, shape in PER_LAYER.items()
    }
    return tree({**shapes, f"decoder{slash}embed": (7, 4)})


def rolled(arrays: dict[str, np.ndarray], axis: int) -> dict[str, np.ndarray]:
    """The same, stacked by hand; scalars along axis 0."""
    stacks = {
        f"decoder/layers/{leaf}": np.stack(
            [arrays[f"decoder/layers_{i}/{leaf}"] for i in range(LAYERS)], min(axis, len(shape))
        )
        for leaf, shape in PER_LAYER.items()
    }
    return {"decoder/embed": arrays["decoder/embed"], **stacks}


FLAX = "decoder/layers_{}/{}"
SPELLINGS = [FLAX, "decoder/layers/{}/{}", "decoder.layers.{}.{}", "decoder.layers_{}.{}"]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("template", SPELLINGS)
def test_stacking_and_spelling_are_found(template: str, axis: int):
    flax = unrolled(FLAX)
    stacked = rolled(flax, axis)
    other = dict(zip(unrolled(template), flax.values(), strict=True))
    for wanted, found in [(stacked, other), (other, stacked), (other, flax), (flax, other)]:
        made = find_layout(specs_of(wanted), specs_of(found))
        assert (made is None) == (wanted.keys() == found.keys())
        assert_same(found if made is None else there(made, found), wanted)


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({"decoder.extra": (3,)}, ["decoder.extra"]),
        ({"decoder.embed": (8, 4)}, ["decoder/embed"]),  # the name that is wanted
        (
            {"decoder.layers.1.norm.scale": (5,)},
            [f"decoder.layers.{i}.norm.scale" for i in range(LAYERS)],
        ),
        (
            {"decoder.layers.3.norm.scale": (4,)},
            [f"decoder.layers.{i}.norm.scale" for i in range(LAYERS + 1)],
        ),
    ],
)
def test_what_differs_in_more_passes(change: dict[str, tuple[int, ...]], passed: list[str]):
    """Also where the other differs in it: the rest is as wanted."""
    dotted = unrolled("decoder.layers.{}.{}")
    stacked = rolled(dict(zip(unrolled(FLAX), dotted.values(), strict=True)), 0)
    del stacked["decoder/layers/mlp/wi_1/kernel"]
    changed = dotted | tree(change)
    found = there(find_layout(specs_of(stacked), specs_of(changed)), changed)
    lacking = [f"decoder.layers.{i}.mlp.wi_1.kernel" for i in range(LAYERS)]
    same = {name: a for name, a in stacked.items() if name not in passed and "norm" not in name}
    if not any("norm" in name for name in passed):
        same["decoder/layers/norm/scale"] = stacked["decoder/layers/norm/scale"]
    assert found.keys() == same.keys() | set(passed) | set(lacking)
    assert_same({name: found[name] for name in same}, same)


def test_where_nothing_would_change_there_is_no_layout():
    flax = unrolled(FLAX)
    assert find_layout({}, specs_of(flax)) is None
    assert find_layout(specs_of(flax), specs_of(flax | tree({"extra": (3,)}))) is None
    twice = flax | {"decoder.embed": flax["decoder/embed"]}
    assert find_layout(specs_of(twice), specs_of(twice)) is None


def test_an_axis_that_shapes_do_not_tell_is_not_guessed():
    single = specs_of(tree({f"layers_{i}/w": (3, 3) for i in range(3)}))
    stacked = specs_of(tree({"layers/w": (3, 3, 3)}))
    with pytest.raises(CheckpointError, match="STACKED"):
        find_layout(stacked, single)
    known = {k: dataclasses.replace(spec, stacked=1) for k, spec in stacked.items()}
    made = find_layout(known, single)
    assert made is not None and made.join(single, where="x").specs["layers/w"].stacked == 1
    # A neighbour tells it as well.
    norms = tree({f"layers_{i}/norm": (5,) for i in range(3)})
    made = find_layout(
        {**stacked, **specs_of(tree({"layers/norm": (5, 3)}))}, single | specs_of(norms)
    )
    assert made is not None and "d0 layer" in str(made.rules)


def test_a_reader_in_the_layout_of_another():
    flax = unrolled(FLAX)
    stacked = rolled(flax, 1)
    reader = memory.Reader(flax)
    assert in_layout_of(specs_of(flax), reader) is reader
    assert in_layout_of(specs_of({"other": np.zeros(2)}), reader) is reader
    found = in_layout_of(specs_of(stacked), reader)
    assert isinstance(found, LayoutReader)
    box = (slice(1, 3), slice(2, 3), slice(0, 5))
    name = "decoder/layers/mlp/wi_1/kernel"
    np.testing.assert_array_equal(found.read(name, box), stacked[name][box])


@pytest.mark.parametrize("template", SPELLINGS)
@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_and_back(template: str, axis: int):
    arrays = {k: v for k, v in unrolled(template).items() if not k.endswith("gain")}
    made = named_layout(f"stacked(axis={axis})", specs_of(arrays))
    found = there(made, arrays)
    assert sum("layers" in name for name in found) == 3
    wi = next(name for name in found if "wi_1" in name)
    assert found[wi].shape == ((3, 4, 6) if axis == 0 else (4, 3, 6))
    before_number = template[template.index("{}") - 1]
    back = named_layout(f"unstacked(axis={axis}, separator='{before_number}')", specs_of(found))
    assert_same(arranged(back, found), arrays)


def test_unstacked_knows_axes_and_spelling_by_itself():
    for template in (FLAX, "decoder.layers.{}.{}"):
        arrays = unrolled(template)
        reader = LayoutReader(memory.Reader(arrays), named_layout("stacked", specs_of(arrays)))
        back = LayoutReader(reader, named_layout("unstacked", reader.specs()))
        assert set(back.specs()) == set(arrays)


def test_what_not_all_layers_have_stays():
    arrays = unrolled(FLAX) | tree({"decoder/layers_1/bias": (2,), "decoder/layers_0/x": (2,)})
    found = there(named_layout("stacked", specs_of(arrays)), arrays)
    assert {"decoder/layers_1/bias", "decoder/layers_0/x", "decoder/layers/gain"} <= set(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rolled", "known are stacked, unstacked, own, huggingface"),
        ("stacked(1)", "write a name"),
        ("stacked(axis=", "write a name"),
        ("stacked(axes=1)", "axes"),
        ("stacked(axis=1)", "'decoder/layers_0/gain' \\[\\] can't be stacked"),
        ("stacked(under='tower')", "no leaf has a number under tower"),
        ("unstacked", "no leaf is stacked under layers or"),
        ("unstacked(separator='-')", "separator"),
    ],
)
def test_names_and_options_are_checked(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        named_layout(text, specs_of(unrolled(FLAX)))


def test_unstacked_wants_to_know_the_axis_and_one_number_of_layers():
    arrays = tree({"layers/a": (3, 2), "layers/b": (4, 2)})
    with pytest.raises(CheckpointError, match="its axis over layers is None"):
        named_layout("unstacked", specs_of(arrays))
    with pytest.raises(CheckpointError, match="4 layers along axis 0, others have 3"):
        named_layout("unstacked(axis=0)", specs_of(arrays))

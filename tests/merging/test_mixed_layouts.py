"""One merge of inputs in different layouts gives the bits of the same in one layout."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

import merging
from merging.checkpoints.known_layouts import find_layout, named_layout
from merging.checkpoints.layout_reader import arranged
from merging.methods.averaging import Averaging
from merging.methods.dare_ties import DareTies
from merging.methods.method import Method
from merging.methods.ties import Ties
from tests import models
from tests.merging.checkpoints.test_layouts import specs_of

LAYERS = 5
SHAPES = {
    "decoder/embedding": (129, 24),
    **{f"decoder/layers_{i}/mlp/kernel": (24, 40) for i in range(LAYERS)},
    **{f"decoder/layers_{i}/norm/scale": (24,) for i in range(LAYERS)},
    "model.square.weight": (96, 96),
}


def stacked(model: models.Model, axis: int) -> models.Model:
    return arranged(named_layout(f"stacked(axis={axis})", specs_of(model)), model)


def spelled(model: models.Model) -> models.Model:
    return {name.replace("layers_", "layers.").replace("/", "."): a for name, a in model.items()}


@pytest.mark.parametrize("method", [Averaging(), Ties(density=0.3), DareTies()], ids=str)
def test_scanned_and_unscanned_inputs_mix(method: Method, tmp_path: pathlib.Path):
    base, experts = models.base_and_experts(3, shapes=SHAPES, copied=False)
    paths = models.save_all(tmp_path / "plain", base, experts)
    merging.merge_checkpoints(**paths, method=method, output_dir=tmp_path / "one")
    one = models.load(tmp_path / "one")
    for axis in (None, 0, 1):
        forms = [stacked(experts[0], axis or 0), spelled(experts[1]), experts[2]]
        if axis is None:
            forms[2] = stacked(experts[2], 1)
        mixed = [models.save(tmp_path / f"{axis}_{i}", form) for i, form in enumerate(forms)]
        form = base if axis is None else stacked(base, axis)
        folder = models.save(tmp_path / f"base_{axis}", form)
        merging.merge_checkpoints(
            base=folder,
            experts=mixed,
            method=method,
            output_dir=tmp_path / f"out_{axis}",
            stacked=None if axis is None else {"decoder/layers": axis},
        )
        found = models.load(tmp_path / f"out_{axis}")
        assert found.keys() == form.keys()
        layout = find_layout(specs_of(base), specs_of(found))
        assert models.same_bits(one, found if layout is None else arranged(layout, found))


def test_what_no_layout_joins_is_told_as_ever(tmp_path: pathlib.Path):
    base, experts = models.base_and_experts(1, shapes=SHAPES, copied=False)
    del experts[0]["decoder/layers_2/norm/scale"]
    paths = models.save_all(tmp_path, base, [stacked(experts[0], 0)])
    with pytest.raises(ValueError, match="decoder/layers/mlp/kernel .* is not in the base"):
        merging.merge_checkpoints(**paths, method=Averaging(), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert np.array_equal(
        models.load(paths["base"])["decoder/embedding"], base["decoder/embedding"]
    )

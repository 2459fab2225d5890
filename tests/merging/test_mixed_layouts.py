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
    with pytest.raises(ValueError, match=r":\n.*decoder/layers_2/norm/scale .* is missing\n\S"):
        merging.merge_checkpoints(**paths, method=Averaging(), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert np.array_equal(
        models.load(paths["base"])["decoder/embedding"], base["decoder/embedding"]
    )


HEAD = "decoder/lm_head/weight"


def test_layouts_go_with_tied_leaves_vocabulary_rows_and_exclude(tmp_path: pathlib.Path):
    """Experts that are stacked and spelled otherwise, and differ from the base in what settings settle, besides."""
    base, experts = models.base_and_experts(3, shapes=SHAPES, copied=False)
    for model in (base, *experts):
        model[HEAD] = model["decoder/embedding"].copy()
    more = np.ones((7, 24), experts[0]["decoder/embedding"].dtype)
    for name in ("decoder/embedding", HEAD):
        experts[0][name] = np.concatenate([experts[0][name], more])
    del experts[1][HEAD]
    experts[1]["model.square.weight"] = np.ones((4, 4), np.float32)
    experts[2]["decoder/layers_1/square/kernel"] = np.ones(3, np.float32)
    settings = dict(
        method=Ties(density=0.3),
        tied={HEAD: "decoder/embedding"},
        vocabulary_rows="common",
        exclude=["*square*"],
    )
    forms = [stacked(spelled(model), 1) for model in experts]
    for has_head in (True, False):
        found = []
        for name, each in (("plain", experts), ("mixed", forms)):
            folder = tmp_path / f"{name}_{has_head}"
            paths = models.save_all(folder, base, each)
            merging.merge_checkpoints(**paths, **settings, output_dir=folder / "out")
            found.append(models.load(folder / "out"))
        assert found[0].keys() == base.keys()
        assert not np.array_equal(found[0]["decoder/embedding"], base["decoder/embedding"])
        assert models.same_bits(*found)
        base.pop(HEAD, None)  # now the experts have a leaf that the base ties


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tied": "refuse"}, "leaf decoder/lm_head/weight .* is missing"),
        ({"vocabulary_rows": "refuse"}, r"136 vocabulary rows, not 129\)\n\S"),
    ],
)
def test_what_settings_would_settle_is_all_that_is_told(
    settings: dict[str, str], told: str, tmp_path: pathlib.Path
):
    base, experts = models.base_and_experts(1, shapes=SHAPES, copied=False)
    base[HEAD] = base["decoder/embedding"].copy()
    more = np.ones((7, 24), np.float32)
    experts[0]["decoder/embedding"] = np.concatenate([experts[0]["decoder/embedding"], more])
    paths = models.save_all(tmp_path, base, [stacked(spelled(experts[0]), 0)])
    good = {"tied": {HEAD: "decoder/embedding"}, "vocabulary_rows": "common"}
    with pytest.raises(ValueError, match=told) as error:
        merging.merge_checkpoints(
            **paths, **(good | settings), method=Averaging(), output_dir=tmp_path / "out"
        )
    assert "mlp" not in str(error.value)
    assert not (tmp_path / "out").exists()

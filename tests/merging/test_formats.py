"""Merges of different formats at once, and into each of them."""

from __future__ import annotations

import contextlib
import pathlib

import numpy as np
import pytest

import merging
from merging.checkpoints import FORMATS, open_checkpoint
from merging.convert import Settings, convert
from merging.methods.averaging import Averaging
from merging.methods.dare_ties import DareTies
from merging.methods.ties import Ties
from tests import models

METHODS = {"averaging": Averaging(), "ties": Ties(), "dare_ties": DareTies()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, pathlib.Path]:
    """(safetensors folders, the same with each expert in another format, the merges of the former)."""
    folder = tmp_path_factory.mktemp("formats")
    shapes = {
        name.replace(".", "/").replace("layers/", "layers_"): shape
        for name, shape in models.SHAPES.items()
    }
    plain = models.save_all(folder, *models.base_and_experts(3, shapes=shapes))
    mixed = []
    for expert, kind in zip(plain["experts"], ("orbax", "t5x", "t5x_orbax"), strict=True):
        convert(Settings(input=expert, output_dir=folder / kind, format=kind))
        mixed.append(folder / kind)
    merging.merge_checkpoints(**plain, output_dir=folder / "merged", methods=METHODS)
    return plain, {**plain, "experts": mixed}, folder / "merged"


def read(folder: pathlib.Path) -> models.Model:
    with contextlib.closing(open_checkpoint(folder)) as reader:
        return {
            name: reader.read(name, tuple(slice(0, size) for size in spec.shape))
            for name, spec in reader.specs().items()
        }


@pytest.mark.parametrize("output", FORMATS)
def test_experts_of_three_formats_over_a_fourth_give_the_bits_of_one(
    inputs, output: str, tmp_path: pathlib.Path
):
    _, mixed, merged = inputs
    merging.merge_checkpoints(
        **mixed, output_dir=tmp_path / "out", methods=METHODS, format=output, seed=0
    )
    for name in METHODS:
        assert models.same_bits(read(tmp_path / "out" / name), models.load(merged / name)), name


def test_the_output_keeps_the_format_of_the_base(inputs, tmp_path: pathlib.Path):
    plain, mixed, merged = inputs
    convert(Settings(input=plain["base"], output_dir=tmp_path / "base", format="orbax"))
    merging.merge_checkpoints(
        base=tmp_path / "base",
        experts=mixed["experts"],
        output_dir=tmp_path / "out",
        method=Ties(),
    )
    import orbax.checkpoint as ocp

    restored = ocp.StandardCheckpointer().restore(tmp_path / "out")
    embedding = restored["model"]["embed_tokens"]["weight"]
    wanted = models.load(merged / "ties")["model/embed_tokens/weight"]
    assert np.asarray(embedding).tobytes() == wanted.tobytes()


def test_safetensors_have_no_place_for_optimizer_state(inputs, tmp_path: pathlib.Path):
    plain, _, _ = inputs
    with pytest.raises(ValueError, match="OPTIMIZER_STATE is 'base', but safetensors"):
        merging.merge_checkpoints(
            **plain, output_dir=tmp_path / "out", method=Averaging(), optimizer_state="base"
        )
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused(inputs, tmp_path: pathlib.Path):
    plain, _, _ = inputs
    with pytest.raises(ValueError, match="FORMAT is 'gguf': choose one of safetensors, orbax"):
        merging.merge_checkpoints(
            **plain, output_dir=tmp_path / "out", method=Averaging(), format="gguf"
        )

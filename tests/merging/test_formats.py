"""Merges of different formats at once, and into each of them."""

from __future__ import annotations

import contextlib
import pathlib
import re

import numpy as np
import pytest

import merging
from merging.checkpoints import FORMATS, memory, open_checkpoint, open_writer, shares
from merging.convert import Settings, convert
from merging.convert import plan as plan_convert
from merging.engine import plan
from merging.methods.averaging import Averaging
from merging.methods.dare_ties import DareTies
from merging.methods.ties import Ties
from tests import models
from tests.merging.checkpoints.trees_common import nested

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


def read(folder: pathlib.Path, params_path: str | None = None) -> models.Model:
    with contextlib.closing(open_checkpoint(folder, params_path=params_path)) as reader:
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


STATE = {
    "params/w": np.ones((3, 2), np.float32),
    "opt_state/mu/w": np.arange(6, dtype=np.float32).reshape(3, 2),
    "step": np.int32(7),
}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A train state that the library of Orbax wrote; no train state of T5X."""
    import orbax.checkpoint as ocp

    folder = tmp_path_factory.mktemp("state") / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, nested(STATE))
    return folder


@pytest.mark.parametrize(
    ("base", "given", "message"),
    [
        ("plain", {"optimizer_state": "base"}, "safetensors files hold parameters only"),
        (
            "plain",
            {"optimizer_state": "base", "format": "orbax"},
            "only checkpoints that are trees",
        ),
        ("state", {"optimizer_state": "base", "format": "safetensors"}, "hold parameters only"),
        ("state", {"optimizer_state": "base", "format": "t5x"}, "no place for .*opt_state/mu/w"),
        ("state", {"optimizer_state": "base", "format": "t5x_orbax"}, "no place for .*opt_state"),
        (["a//b"], {"format": "orbax"}, "key '' is empty"),
        (["a", "a/b"], {"format": "t5x"}, "'b'.* lies in another leaf"),
        (["w" * 300], {"format": "t5x"}, "too long for the folder"),
    ],
)
def test_what_a_format_can_not_hold_is_told_when_planning(
    inputs, state, tmp_path: pathlib.Path, base, given: dict, message: str
):
    """So that a dry run says it."""
    if isinstance(base, str):
        folder = {"plain": inputs[0]["base"], "state": state}[base]
    else:
        folder = models.save(tmp_path / "base", dict.fromkeys(base, np.ones(2, np.float32)))
    before = sorted(tmp_path.rglob("*"))
    given = {"base": folder, "experts": [folder], "method": Averaging(), **given}
    params_path = "params" if base == "state" else None
    with pytest.raises(ValueError, match=message):
        plan.plan(plan.Settings(**given, params_path=params_path, output_dir=tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_conversion_says_what_it_drops_and_keeps_it_when_told(state, tmp_path: pathlib.Path):
    told = r"2 leaves \(28 B\) beside the parameters: opt_state/mu/w, step \(OPTIMIZER_STATE='{}'\)"
    for choice, doing in (("drop", "drops"), ("input", "keeps")):
        settings = Settings(
            input=state,
            output_dir=tmp_path / choice,
            params_path="params",
            optimizer_state=choice,
            output_dtype="bfloat16",
        )
        with contextlib.closing(plan_convert(settings)) as planned:
            assert re.search(f"{doing} +{told.format(choice)}", planned.describe())
        convert(settings)
    params = {"params/w": STATE["params/w"].astype(models.BFLOAT16)}
    assert models.same_bits(read(tmp_path / "drop", ""), params)
    assert models.same_bits(read(tmp_path / "input", ""), STATE | params)


def test_an_unknown_format_is_refused(inputs, tmp_path: pathlib.Path):
    plain, _, _ = inputs
    with pytest.raises(ValueError, match="FORMAT is 'gguf': choose one of safetensors, orbax"):
        merging.merge_checkpoints(
            **plain, output_dir=tmp_path / "out", method=Averaging(), format="gguf"
        )


@pytest.mark.parametrize("name", FORMATS)
def test_shares_are_what_writers_take(name: str, tmp_path: pathlib.Path):
    shapes = {"a": (300, 8), "b": (), "c": (5,), "d": (40, 8), "e": (1,), "f": (70, 8)}
    arrays = {n: np.zeros(shape, np.float32) for n, shape in shapes.items()}
    like = memory.Reader(arrays)
    for count in (1, 2, 3, 7):
        taken = []
        for index in range(count):
            (folder := tmp_path / f"{count}_{index}").mkdir()
            with contextlib.closing(
                open_writer(
                    name,
                    folder,
                    like.specs(),
                    like=like,
                    shard_bytes=2_000,
                    process_index=index,
                    process_count=count,
                )
            ) as writer:
                taken.append(writer.names_mine)
        assert shares(name, like.specs(), shard_bytes=2_000, process_count=count) == taken
        assert sorted(sum(taken, [])) == sorted(shapes)

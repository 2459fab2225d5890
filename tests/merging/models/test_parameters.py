"""Parameters from checkpoints of several formats and forms: every bit, sharded as the rules say, each box read once."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import flax.traverse_util
import numpy as np
import pytest
from safetensors.numpy import save_file

from merging.checkpoints import boxes, memory, open_checkpoint, orbax
from merging.checkpoints.format import CheckpointError, Index
from merging.checkpoints.layout_reader import arranged
from merging.models import huggingface
from merging.models.parameters import read_params
from merging.partitioning import MeshShape
from tests.merging.models import families

EIGHT = MeshShape(data=2, fsdp=2, model=2)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def same(found: Any, wanted: dict[str, np.ndarray]) -> None:
    found = flat(found)
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        assert found[name].dtype == leaf.dtype and np.array_equal(found[name], leaf), name


def write_orbax(folder: pathlib.Path, leaves: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    specs = memory.Reader(leaves).specs()
    writer = orbax.Writer(folder, specs)
    for name, leaf in leaves.items():
        writer.write(name, boxes.whole(leaf.shape), leaf)
    writer.commit()


def test_our_own_checkpoint_in_any_stacking(tmp_path: pathlib.Path):
    model = families.build("palm")
    params = families.params_of(model)
    write_orbax(tmp_path / "scanned", flat(params))
    write_orbax(tmp_path / "unrolled", flat(families.unstacked(params)))
    for folder in ("scanned", "unrolled"):
        found = read_params(tmp_path / folder, model.config, EIGHT.mesh())
        same(found, flat(params))
    kernel = found["layers"]["mlp"]["wi_0"]["kernel"]  # [layers, embed over fsdp, mlp over model]
    assert kernel.addressable_shards[0].data.shape == (3, 16, 24)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_hugging_face_folder(family: str, tmp_path: pathlib.Path):
    model = families.build(family)
    ours = flat(families.params_of(model))
    theirs = arranged(huggingface.layout(model.config).inverse(), ours)
    save_file(theirs, tmp_path / "model.safetensors")
    same(read_params(tmp_path, model.config, MeshShape(fsdp=2, model=4).mesh()), ours)


def test_numbers_are_converted_once_to_the_parameters_type():
    model = families.build("palm", param_dtype="bfloat16")
    wide = flat(families.params_of(families.build("palm")))
    found = read_params(memory.Reader(wide), model.config, EIGHT.mesh())
    same(found, {k: v.astype(model.config.parameter_dtype) for k, v in wide.items()})


class Counting(memory.Reader):
    """Counts the elements that are read."""

    elements = 0

    def read(self, name: str, index: Index, *, out: np.ndarray | None = None) -> np.ndarray:
        box = super().read(name, index, out=out)
        Counting.elements += box.size
        return box


def test_a_box_that_several_devices_hold_is_read_once():
    model = families.build("palm")
    params = flat(families.params_of(model))
    read_params(Counting(params), model.config, EIGHT.mesh())
    assert Counting.elements == sum(leaf.size for leaf in params.values())


def test_all_that_does_not_fit_is_told_at_once(tmp_path: pathlib.Path):
    model = families.build("palm")
    params = flat(families.params_of(model))
    params["token_embedder/embedding"] = params["token_embedder/embedding"][:-1]
    params["more/kernel"] = params.pop("final_norm/scale")
    write_orbax(tmp_path / "other", params)
    with pytest.raises(CheckpointError) as told:
        read_params(tmp_path / "other", model.config, EIGHT.mesh())
    for part in (
        "'final_norm/scale' is missing, wanted [32]",
        "'more/kernel' is [32], wanted none",
        "'token_embedder/embedding' is [39, 32], wanted [40, 32]",
        str(tmp_path / "other"),
    ):
        assert part in str(told.value)


def test_a_train_states_parameters(tmp_path: pathlib.Path):
    model = families.build("palm")
    params = flat(families.params_of(model))
    state = {f"params/{k}": v for k, v in params.items()} | {"step": np.array(3, np.int32)}
    write_orbax(tmp_path / "state", state)
    with pytest.raises(CheckpointError, match="PARAMS_PATH"):
        read_params(tmp_path / "state", model.config, EIGHT.mesh())
    same(read_params(tmp_path / "state", model.config, EIGHT.mesh(), params_path="params"), params)
    with contextlib.closing(open_checkpoint(tmp_path / "state", params_path="params")) as reader:
        same(read_params(reader, model.config, EIGHT.mesh()), params)

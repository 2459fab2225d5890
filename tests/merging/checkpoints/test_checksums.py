"""Checksums of written boxes: right, and found wrong where a byte changed, in every format."""

from __future__ import annotations

import contextlib
import pathlib

import google_crc32c
import numpy as np
import orbax.checkpoint as ocp
import pytest

import merging
from launch.show import shown
from merging import manifest
from merging.checkpoints import FORMATS, checksums, memory, open_checkpoint
from merging.checkpoints.format import CheckpointError
from merging.methods.averaging import Averaging
from merging.methods.ties import Ties
from tests import models
from tests.merging.checkpoints.trees_common import nested


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict:
    shapes = {name.replace(".", "/"): shape for name, shape in models.SHAPES.items()}
    base, experts = models.base_and_experts(2, shapes=shapes)
    return models.save_all(tmp_path_factory.mktemp("checksums"), base, experts)


@pytest.mark.parametrize("name", FORMATS)
def test_a_merge_is_verified_and_a_changed_byte_is_found(
    folders, name: str, tmp_path: pathlib.Path
):
    merging.merge_checkpoints(**folders, output_dir=tmp_path / "out", method=Ties(), format=name)
    last = list(shown([str(tmp_path / "out")], is_verified=True))[-1]
    assert last.startswith("verified ") and last.endswith("all are what was written")

    _change_a_byte_of("model/square/weight", tmp_path / "out")
    lines: list[str] = []
    with pytest.raises(ValueError, match="1 of .* pieces are not what was written"):
        for line in shown([str(tmp_path / "out")], is_verified=True):
            lines.append(line)
    leaf = f"{'target/' if name.startswith('t5x') else ''}model/square/weight"
    assert lines[-1].startswith(f"DIFFERS  leaf {leaf}, box [0:96,0:96]: crc32c is ")


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Train states by the path of their parameters: one of Flax and one of T5X, as Orbax writes them."""
    folder = tmp_path_factory.mktemp("states")
    rng = np.random.default_rng(0)
    w, slot = (rng.normal(size=(96, 96)).astype(np.float32) for _ in range(2))
    trees = {
        "params": {"params/w": w, "opt_state/mu/w": slot, "step": np.int32(7)},
        "target": {"target/w": w, "state/param_states/w/m": slot, "state/step": np.int32(7)},
    }
    for name, tree in trees.items():
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder / name, nested(tree))
    return {name: folder / name for name in trees}


@pytest.mark.parametrize(
    ("params_path", "format", "slot"),
    [
        ("params", "orbax", "opt_state/mu/w"),
        ("target", "t5x", "state/param_states/w/m"),
        ("target", "t5x_orbax", "state/param_states/w/m"),
    ],
)
def test_a_train_state_is_verified_whole(
    states, params_path: str, format: str, slot: str, tmp_path: pathlib.Path
):
    """Names in the manifest are those of the tree; what is copied beside the parameters has checksums too."""
    state = states[params_path]
    for kept in ("drop", "base"):
        merging.merge_checkpoints(
            base=state,
            experts=[state],
            output_dir=tmp_path / kept,
            method=Averaging(),
            format=format,
            params_path=params_path,
            optimizer_state=kept,
        )
        lines = list(shown([str(tmp_path / kept)], is_verified=True))
        assert lines[1].split() == ["36,864", "float32", "[96,", "96]", "w"]
        assert lines[-1].endswith("all are what was written")
    told = manifest.read(tmp_path / "base")
    assert told["params_path"] == params_path
    with contextlib.closing(open_checkpoint(state, params_path="")) as reader:
        assert told["checksums"].keys() == reader.specs().keys()
        array = reader.read(slot, (slice(0, 96), slice(0, 96)))
    found = f"{google_crc32c.value(array.tobytes()):08x}"
    assert told["checksums"][slot] == {"0:96,0:96": found}

    _change_a_byte_of(slot, tmp_path / "base", params_path="")
    lines = []
    with pytest.raises(ValueError, match="1 of .* pieces are not what was written"):
        for line in shown([str(tmp_path / "base")], is_verified=True):
            lines.append(line)
    assert lines[-1].startswith(f"DIFFERS  leaf {slot}, box ")


def test_where_the_parameters_are_may_be_said(states):
    with pytest.raises(ValueError, match="holds more than parameters"):
        list(shown([str(states["params"])]))
    assert " w" in list(shown([str(states["params"])], params_path=["params"]))[1]
    assert len(list(shown([str(states["params"])], params_path=[""]))) == 5
    both = [str(states["params"]), str(states["target"])]
    lines = list(shown(both, params_path=["params", "target"]))
    assert lines[-1] == "1 of 1 leaves compared are equal"
    with pytest.raises(ValueError, match="--params_path has 3 paths for 2 checkpoints"):
        list(shown(both, params_path=["a", "b", "c"]))


def _change_a_byte_of(name: str, folder: pathlib.Path, params_path: str | None = None) -> None:
    """In whatever file the leaf's last row lies."""
    with contextlib.closing(open_checkpoint(folder, params_path=params_path)) as reader:
        row = reader.read(name, (slice(95, 96), slice(0, 96))).tobytes()
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if (at := content.find(row)) >= 0:
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            return
    raise AssertionError(f"no file holds {name} as it is")


def test_checksum_is_crc32c():
    array = np.arange(1000, dtype=np.float32)
    assert checksums.checksum(array) == f"{google_crc32c.value(array.tobytes()):08x}"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": {"0:2,0:3": "0"}, "b": {"": "0"}}, "leaf b of the manifest is not in"),
        ({"a": {"0:1,0:3": "0"}}, "checksums of 3 of 6 elements"),
        ({"a": {"0:3,0:3": "0"}}, "'0:3,0:3' is no box of"),
        ({"a": {"0:2,0:": "0"}}, "is no box of"),
        ({"a": {"9" * 30 + ":1": "0"}}, "is no box of"),
    ],
)
def test_a_manifest_of_another_checkpoint_is_refused(found: dict, message: str):
    reader = memory.Reader({"a": np.zeros((2, 3), np.float32)})
    with pytest.raises(CheckpointError, match=message):
        list(checksums.verify(reader, found))


def test_only_what_was_written_here_can_be_verified(folders):
    with pytest.raises(ValueError, match="has no manifest with checksums"):
        list(shown([folders["base"]], is_verified=True))

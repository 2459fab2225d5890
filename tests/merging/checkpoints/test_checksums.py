"""Checksums of written boxes: right, and found wrong where a byte changed, in every format."""

from __future__ import annotations

import contextlib
import pathlib

import google_crc32c
import numpy as np
import pytest

import merging
from launch.show import shown
from merging.checkpoints import FORMATS, checksums, memory, open_checkpoint
from merging.checkpoints.format import CheckpointError
from merging.methods.ties import Ties
from tests import models


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
    assert lines[-1].startswith("DIFFERS  leaf model/square/weight, box [0:96,0:96]: crc32c is ")


def _change_a_byte_of(name: str, folder: pathlib.Path) -> None:
    """In whatever file the leaf's last row lies."""
    with contextlib.closing(open_checkpoint(folder)) as reader:
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

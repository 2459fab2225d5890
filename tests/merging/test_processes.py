"""Two processes of four devices each give the bytes of one process, and read each input byte once a pass between them."""

from __future__ import annotations

import json
import pathlib
import sys

import merging
from launch.pod.local import run_local
from tests import models
from tests.merging.process_settings import EXPERTS, SETTINGS


def test_two_processes_equal_one(tmp_path: pathlib.Path):
    base, experts = models.base_and_experts(EXPERTS)
    folders = models.save_all(tmp_path, base, experts)
    command = [sys.executable, "-m", "tests.merging.processes_job", str(tmp_path)]
    outputs = run_local(command, processes=2, devices=4, timeout_s=300, echo=lambda _: None)
    assert all(f"bit-equal on process {i}" in output for i, output in enumerate(outputs))

    alone = merging.merge_checkpoints(**folders, output_dir=tmp_path / "alone", methods=SETTINGS)
    for name in SETTINGS:
        got = models.load(tmp_path / "streamed" / name)
        assert models.same_bits(got, models.load(tmp_path / "alone" / name)), name
    read = [json.loads((tmp_path / f"read_{i}.json").read_text()) for i in range(2)]
    assert [reads for _, reads in read] == [alone.reads] * 2
    assert sum(nbytes for nbytes, _ in read) == alone.bytes_read
    assert all(nbytes > 0.3 * alone.bytes_read for nbytes, _ in read)
    statistics = [
        json.loads((tmp_path / f / "ties/statistics.json").read_text())
        for f in ("alone", "streamed")
    ]
    assert statistics[0]["model"] == statistics[1]["model"]
    manifest = json.loads((tmp_path / "streamed/ties/manifest.json").read_text())
    assert set(manifest["checksums"]) == {name for name, array in base.items() if array.size}

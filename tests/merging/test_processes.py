"""Two processes of four devices each give the bytes of one process, and read each input byte once a pass between them."""

from __future__ import annotations

import json
import pathlib
import signal
import sys

import pytest

import merging
from launch import exit_codes
from launch.pod.local import ProcessFailed, run_local
from merging.engine import journal
from merging.manifest import OutputError
from tests import models
from tests.merging.process_settings import EXPERTS, SETTINGS


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_to_one_process_stops_both_and_both_go_on(
    tmp_path: pathlib.Path, number: signal.Signals
):
    base, experts = models.base_and_experts(EXPERTS)
    folders = models.save_all(tmp_path, base, experts)

    def job(sent_at: int) -> None:
        given = [str(tmp_path), str(sent_at), number.name]
        command = [sys.executable, "-m", "tests.merging.resume_job", *given]
        run_local(command, processes=2, devices=1, timeout_s=300, echo=lambda _: None)

    with pytest.raises(ProcessFailed) as failed:
        job(12)
    if number == signal.SIGTERM:
        assert failed.value.returncode == exit_codes.PREEMPTED
        assert all((tmp_path / f"stopped_{i}").exists() for i in range(2))
    there = [
        sum("leaf" in record for record in journal.read(path)[1])
        for path in sorted((tmp_path / "out.partial").glob("journal.*"))
    ]
    at_most = 12 if number == signal.SIGKILL else 12 + 2 * 64  # those that waited were finished
    assert len(there) == 2 and 0 < there[1] < at_most
    with pytest.raises(OutputError, match="processes was 2, is 1"):
        merging.merge_checkpoints(
            **folders, output_dir=tmp_path / "out", methods=SETTINGS, shard_bytes=4_000
        )
    job(0)
    told = [json.loads((tmp_path / f"report_{i}.json").read_text()) for i in range(2)]
    assert [each["kept"] for each in told] == there
    total = sum(each["pieces"] for each in told)
    assert f"resuming: {sum(there)} of {total} pieces are there" in told[0]["said"]
    assert [each["reads"] for each in told] == [1, 1], "the survey was there"
    merging.merge_checkpoints(**folders, output_dir=tmp_path / "alone", methods=SETTINGS)
    for name in SETTINGS:
        got = models.load(tmp_path / "out" / name)
        assert models.same_bits(got, models.load(tmp_path / "alone" / name)), name
    manifest = json.loads((tmp_path / "out/ties/manifest.json").read_text())
    assert (manifest["pieces"], manifest["pieces_resumed"]) == (total, sum(there))

"""The campaign of stages by several processes, in its smallest form; and that it finds what it is for."""

from __future__ import annotations

import json
import pathlib

import pytest

from tests.campaigns import pods

SMALL = ["--one=1x2", "--layouts=2x1", "--stages=reads", "--parameters=2e5", "--experts=2"]


@pytest.mark.slow
def test_a_merge_by_two_processes_reads_each_byte_once_a_pass(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit) as ended:
        pods.main([*SMALL, f"--work_dir={tmp_path}"])
    told = capsys.readouterr().out
    assert ended.value.code == 0, told
    assert told.count("each byte read 1 to 1 times, wanted 1") == 2
    assert told.count("each byte read 2 to 2 times, wanted 2") == 2
    assert told.count("all bits equal") == 2 and "BAD" not in told


def test_differences_are_found(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    campaign = pods.Campaign(tmp_path, pods.parse([*SMALL]))
    layout = pods.Layout(2, 1)
    for each, loss in ((campaign.one, 2.0), (layout, 2.0001)):
        folder = campaign.place(each, "base")
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
        score = {"model": "m", "task": "t", "prompt": "p", "metric": "f1", "value": loss}
        line = json.dumps(score | {"seconds": loss})
        (folder / "scores.jsonl").write_text(line + "\n")
    pods.compare_losses(campaign, layout, "losses", "base")
    pods.compare_scores(campaign, layout, "scores", "base", is_exact=True)
    assert campaign.failed == 2
    told = capsys.readouterr().out
    assert "1 losses of 1 curves differ by at most 5.0e-05" in told
    assert "1 scores, 1 differ, by at most 0.0001" in told
    pods.compare_losses(campaign, layout, "nothing", "nowhere")
    assert campaign.failed == 3

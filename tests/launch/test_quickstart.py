"""The quickstart: every method's output is there, and a second run finds it."""

from __future__ import annotations

import pathlib

import pytest

from launch import devices, quickstart
from merging.methods import METHODS


def test_quickstart_merges_by_every_method_and_runs_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    quickstart.main(devices.Processes())
    first = capsys.readouterr().out
    for name in METHODS:
        assert (tmp_path / "quickstart" / "merged" / name / "manifest.json").exists()
        assert f"\n{name} " in first.partition("mean |change|")[2]
    quickstart.main(devices.Processes())
    second = capsys.readouterr().out
    assert "done before" in second
    assert second.partition("mean |change|")[2] == first.partition("mean |change|")[2]

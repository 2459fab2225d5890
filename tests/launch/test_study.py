"""The command of a study: how it ends."""

from __future__ import annotations

import pathlib

import jax
import pytest

from launch import devices, exit_codes, preemption, study
from tests.launch.test_quickstart import FILES


def test_a_report_on_what_is_not_done_names_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(study, "check_mixtures", lambda names, registered: None)
    monkeypatch.setattr(preemption, "should_stop", lambda joined: lambda step: False)
    folder = tmp_path / "study"
    bindings = [f"OUTPUT_DIR = {str(folder)!r}", "PHASE = 'report'"]
    # optax raises float numbers to the power of a count.
    with jax.numpy_dtype_promotion("standard"), pytest.raises(SystemExit) as ended:
        study.study(study.configured(FILES, bindings), devices.Processes())
    assert ended.value.code == exit_codes.INPUT_MISSING == 3
    told = capsys.readouterr()
    told = told.out + told.err
    assert (
        f"the phase report needs what an earlier phase has not made yet; run that to its end first:\n  {folder}/models/"
        in told
    )
    assert (
        "and 54 more" in told
    )  # of 2 bases, 18 folders of experts and multitask models, 44 scores
    assert not (folder / "report").exists()

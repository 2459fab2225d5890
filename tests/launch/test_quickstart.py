"""The whole line as its command: the study of quick.gin, but for sizes, steps and one base, from nothing to the report."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from launch import devices, study
from tests import buckets, score_files

REPOSITORY = pathlib.Path(__file__).parents[2]
TINY = [
    "mini_m/named.name='mini_xs'",
    *(
        f"{scope}/Training.train_steps=2"
        for scope in ("pretrain", "instruct", "expert", "multitask")
    ),
    *(
        f"{scope}/Training.batch_size=2"
        for scope in ("pretrain", "instruct", "expert", "multitask")
    ),
    "BASES={'pretrained': @pretrain/Training()}",
    "METHODS={'averaging': @Averaging(), 'ties': @Ties()}",
    "NUM_EXPERTS=(2,)",
    "LIMIT=2",
    "SHAPES=1",
]
FILES = ["gin_configs/runs/study.gin", "gin_configs/studies/quick.gin"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """A study that nothing ended, and what its command printed."""
    place = tmp_path_factory.mktemp("whole")
    return place, run(place)


@pytest.mark.slow
def test_quick_study_from_nothing_to_the_report(whole: tuple[pathlib.Path, str]):
    place, told = whole
    assert "made       1 bases, 9 experts, 12 cells" in told
    assert "scores of 12 of 12 models" in told
    assert json.loads((place / "study/report/report.json").read_text())
    assert (place / "study/report/index.html").stat().st_size > 10_000
    assert "made       0 bases, 0 experts, 0 cells" in run(place)


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_scores(
    whole: tuple[pathlib.Path, str], tmp_path: pathlib.Path
):
    kill_three_times(tmp_path)
    assert scores(tmp_path) == scores(whole[0])


@pytest.mark.slow
def test_killed_three_times_in_a_bucket_it_ends_with_the_same_scores(
    whole: tuple[pathlib.Path, str], tmp_path: pathlib.Path
):
    """All that a study holds, models, scores and report, in an object store."""
    pytest.importorskip("gcsfs")
    with buckets.store(tmp_path) as store:
        environment = buckets.environment(store.address)
        kill_three_times(tmp_path, output="gs://bucket/study", environment=environment)
        assert scores(store.folder) == scores(whole[0])
        assert (store.folder / "study/report/index.html").stat().st_size > 10_000


def kill_three_times(place: pathlib.Path, **where: Any) -> None:
    """By SIGKILL, and gone on with to the end; arguments as of `started`."""
    for line in ("experts 2/9", "experts 6/9", "cells 5/12"):
        with started(place, **where, stderr=subprocess.PIPE) as process:
            assert any(told.startswith(line) for told in process.stderr), line
            process.kill()  # in the middle of what comes next
    assert "scores of 12 of 12 models" in run(place, **where)


def scores(place: pathlib.Path) -> dict[str, Any]:
    """Of every model."""
    return score_files.read_all(place / "study/scores")


def started(
    place: pathlib.Path,
    *,
    output: str = "study",
    environment: Mapping[str, str] = os.environ,
    **how: Any,
) -> subprocess.Popen[str]:
    """The command, which works in a folder of its own, by default with a relative output."""
    command = [sys.executable, "-m", "launch.study", "--study=quick", f"--output={output}"]
    command += [f"--gin.{binding}" for binding in TINY]
    environment = {**environment} | {
        "PYTHONPATH": str(REPOSITORY),
        "XDG_CACHE_HOME": str(place / "cache"),
    }
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(command, cwd=place, env=environment, text=True, **how)


def run(place: pathlib.Path, **where: Any) -> str:
    """What the command prints; arguments as of `started`."""
    with started(place, **where, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        told, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    return told


@pytest.mark.parametrize(
    ("binding", "match"),
    [
        ("METHODS={'mine': @Mine()}", "Mine"),
        ("mini_m/named.name = 'mini_xxl'", "there is no size 'mini_xxl'"),
        ("NUM_EXPERTS = (2, 9)", "there are 8 held-in categories"),
        ("COLLECTION = 'maxi'", "COLLECTION is 'maxi'"),
        ("PHASE = 'merges'", "PHASE is 'merges'"),
    ],
)
def test_what_makes_no_study_is_refused(tmp_path: pathlib.Path, binding: str, match: str):
    bindings = [binding, f"OUTPUT_DIR = {str(tmp_path / 'study')!r}"]
    with pytest.raises(ValueError, match=match):
        study.study(study.configured(FILES, bindings), devices.Processes(), is_dry_run=True)


def test_held_out_datasets_are_not_trained_on(tmp_path: pathlib.Path):
    bindings = [
        "instruct/Training.mixture = 'held_out_mini'",
        f"OUTPUT_DIR = {str(tmp_path / 'study')!r}",
    ]
    with pytest.raises(ValueError, match="held_out_mini can't be trained on: it holds causes"):
        study.study(study.configured(FILES, bindings), devices.Processes(), is_dry_run=True)
    assert not (tmp_path / "study").exists()

"""What is there and missing of a study, and the time left, from manifests alone."""

from __future__ import annotations

import pathlib

import pytest

from launch import study
from launch.study_status import described
from merging import manifest
from tests.launch.test_quickstart import FILES


@pytest.fixture
def planned(tmp_path: pathlib.Path):
    bindings = [f"OUTPUT_DIR = {str(tmp_path / 'study')!r}"]
    return study.plan(study.configured(FILES, bindings))


def finish(item, **seconds: float) -> None:
    for folder in item.folders:
        folder.mkdir(parents=True)
        manifest.write(folder, seconds)


def test_nothing_is_there(planned):
    told = described(planned)
    assert "experts  mini_m     0       18" in told
    assert "missing    bases mini_m/bases, experts mini_m/pretrained/experts_0, " in told
    assert ", and 53 more" in told  # of 1 + 18 + 44
    assert "time left  0 s, and what no item of its phase and size tells yet" in told


def test_the_time_left_is_that_of_what_was_made_so_far(planned):
    (bases,) = planned.items["bases"]
    finish(bases, seconds=50.0)  # of each of its two folders
    for item, seconds in zip(planned.items["experts"], (10.0, 30.0), strict=False):
        finish(item, seconds=seconds)
    finish(planned.items["cells"][0], load_or_merge_seconds=0.5, evaluate_seconds=1.5)
    told = described(planned)
    assert "bases    mini_m     1        0  100.0" in told
    assert "20.0             5 min 20 s" in told  # 16 experts
    assert "2.0              1 min 26 s" in told  # 43 models
    assert told.endswith("time left  6 min 46 s")


def test_all_is_there(planned):
    for items in planned.items.values():
        for item in items:
            finish(item, seconds=1.0)
    assert described(planned).endswith("nothing is missing but the report, which takes seconds")

"""The report stage: what it writes of whole, partial and tiny studies, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import pathlib

import pytest

from launch import report as entry
from merging import manifest
from merging.report import report
from tests.merging.grid.synthetic import IS_HELD_OUT, IT, World


def merged(s: int, base: str, method: str, n: int, seed: int, d: str) -> float:
    return 1.1 if d in IS_HELD_OUT else 0.8 + 0.01 * seed


TINY = {"sizes": ("xs",), "methods": ("averaging", "ties"), "num_experts": (2, 8), "seeds": (0, 1)}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two settings; of one base's merges half are there."""
    world = World(
        merged=merged,
        settings=("fixed", "tuned"),
        reference=lambda s, b, d: 0.0 if (b, d) == (IT, "ws") else 0.5,
        is_there=lambda size, base, model: base == IT or "_s1" not in model,
        **TINY,
    )
    folder = world.write(tmp_path_factory.mktemp("report") / "study")
    report(folder, draws=50)
    return folder


def test_all_files_are_there_and_agree(study: pathlib.Path):
    folder = study / "report"
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names >= {
        "index.html", "report.md", "cells.csv", "references.csv", "report.json", "manifest.json",
        "figures/held_in_by_base.png", "figures/held_in_by_base.svg", "figures/methods_tuned.svg",
    }  # fmt: skip
    found = json.loads((folder / "report.json").read_text())
    assert [c["id"] for c in found["claims"]["tuned"]][:3] == ["F1", "F2", "F3a"]
    rows = list(csv.DictReader(io.StringIO((folder / "cells.csv").read_text())))
    assert len(rows) == 2 * 2 * 2 * 2 * 2  # settings, bases, methods, N, seeds
    one = next(
        r
        for r in rows
        if (r["base"], r["seed"], r["setting"], r["method"], r["num_experts"])
        == (IT, "1", "fixed", "ties", "2")
    )
    assert float(one["held_in"]) == pytest.approx(0.81)
    assert float(one["held_in_raw"]) == pytest.approx(0.405)
    assert float(one["held_out"]) == pytest.approx(1.1)
    assert float(one["raw_qa_a"]) == pytest.approx(0.405)
    assert one["raw_ws"] == "0.0"
    missing = next(
        r for r in rows if (r["base"], r["seed"], r["num_experts"]) == ("pretrained", "1", "2")
    )
    assert missing["held_in"] == missing["held_in_low"] == missing["raw_qa_a"] == ""


def test_the_page_says_how_much_is_there_and_what_is_left_out(study: pathlib.Path):
    page = (study / "report" / "index.html").read_text()
    found = json.loads((study / "report" / "report.json").read_text())["models"]
    assert found["there"] < found["wanted"]
    assert f"Scores of {found['there']} of {found['wanted']} models are there." in page
    assert (
        "Left out of the means, since the reference below the ratio is 0: ws at xs instruct" in page
    )
    assert "http" not in page.replace("http://www.w3.org/", "")
    assert "0: no ratio" in page and "needs at least two sizes" in page


def test_a_folder_with_something_else_is_not_touched(study: pathlib.Path, tmp_path: pathlib.Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(manifest.OutputError, match="holds something that is no report"):
        report(study, tmp_path)
    (tmp_path / "manifest.json").write_text('{"stage": "merge"}')
    with pytest.raises(manifest.OutputError, match="holds the output of merge, no report"):
        report(study, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_study_that_has_hardly_begun_has_a_report_which_is_then_replaced(tmp_path: pathlib.Path):
    world = World(merged=merged, is_there=lambda size, base, model: model == "base", **TINY)
    study = world.write(tmp_path / "study")
    made = report(study, draws=20)
    assert {each.verdict for each in made.claims["fixed"]} == {"undecided"}
    assert "scores of 2 of " in made.describe()
    before = made.page.read_bytes()
    (study / "report" / "stray").write_text("")
    entry.report(entry.configured([entry.RUN_FILE], [f"STUDY_DIR = {str(study)!r}", "DRAWS = 20"]))
    assert made.page.read_bytes() == before
    assert not (study / "report" / "stray").exists()
    assert sorted(p.name for p in study.iterdir()) == ["report", "scores", "study.json"]

"""Relative scores against a study small enough to be worked out by hand, with every trap of a mean of ratios in it."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest

from merging.grid import bootstrap, results, summaries
from merging.grid.relative import Grid, Relative, grid, relative
from merging.report import report
from tests.merging.grid.synthetic import IT, World, write_scores

TASKS = {
    "a1": ["a1_x", "a1_y"],
    "a2": ["a2"],
    "b1": ["b1"],
    "h1": ["h1"],
    "h2": ["h2"],
    "g1": ["g1"],
}
CATEGORIES = {
    "A": ("held_in", ["a1", "a2"]),
    "B": ("held_in", ["b1"]),
    "H": ("held_out", ["h1", "h2"]),
    "G": ("held_out", ["g1"]),
}
SCORES = {
    "base": {"a1": 0.1, "a2": 0.1, "b1": 0.1, "h1": 0.2, "h2": 0.0, "g1": 0.5},
    "expert_A": {"a1": 0.5, "a2": 0.8, "b1": 0.3, "h1": 0.2, "h2": 0.2, "g1": 0.2},
    "expert_B": {"a1": 0.9, "a2": 0.9, "b1": 0.4, "h1": 0.2, "h2": 0.2, "g1": 0.2},
    "multitask": {"a1": 0.25, "a2": 0.8, "b1": 0.2, "h1": 0.3, "h2": 0.1, "g1": 0.5},
    "averaging_n1_s0": {"a1": 0.4, "a2": 0.4, "b1": 0.9, "h1": 0.3, "h2": 0.7, "g1": 0.25},
    "averaging_n2_s0": {"a1": 0.5, "a2": 0.4, "b1": 0.4, "h1": 0.2, "h2": 0.9, "g1": 0.6},
}


@pytest.fixture
def study(tmp_path: pathlib.Path) -> pathlib.Path:
    described = {
        "version": 1,
        "name": "by hand",
        "question": "?",
        "sizes": {"xs": {"parameters": None}},
        "bases": {"pretrained": {"role": "pretrained"}},
        "methods": {"averaging": "Averaging(weights=None)"},
        "num_experts": [1, 2],
        "seeds": [0],
        "categories": {
            name: {
                "role": role,
                "datasets": {d: {"tasks": TASKS[d], "metric": "accuracy"} for d in datasets},
            }
            for name, (role, datasets) in CATEGORIES.items()
        },
        "cells": [
            {
                "size": "xs",
                "base": "pretrained",
                "method": "averaging",
                "num_experts": len(names),
                "seed": 0,
                "setting": "fixed",
                "categories": names,
                "model": f"averaging_n{len(names)}_s0",
            }
            for names in (["A"], ["A", "B"])
        ],
    }
    (tmp_path / "study.json").write_text(json.dumps(described))  # of a version before `depends_on`
    for name, scores in SCORES.items():
        write_scores(tmp_path, ("xs", "pretrained", name), TASKS, scores)
    return tmp_path


def graded(folder: pathlib.Path) -> tuple[Relative, Grid]:
    found = results.read(folder)
    ratios = relative(found, "fixed")
    drawn = bootstrap.draw([e.role for e in found.study.datasets], 1, draws=1)
    return ratios, grid(ratios, drawn)


def test_raw_scores_are_means_over_prompts_then_parts(study: pathlib.Path):
    found = results.read(study)
    assert [e.name for e in found.study.datasets] == ["a1", "a2", "b1", "h1", "h2", "g1"]
    for name, scores in SCORES.items():
        row = found.rows["xs", "pretrained", name]
        np.testing.assert_allclose(found.raw[row], list(scores.values()), rtol=1e-12)
    assert found.is_there.all()
    np.testing.assert_array_equal(found.chance, 0.25)


def test_a_study_without_multitask_models_is_whole_without_them(study: pathlib.Path):
    described = json.loads((study / "study.json").read_text())
    described["depends_on"] = {"multitask": None}
    (study / "study.json").write_text(json.dumps(described))
    shutil.rmtree(study / "scores/xs/pretrained/multitask")
    ratios, cells = graded(study)
    assert ratios.results.is_there.all() and len(ratios.results.rows) == len(SCORES) - 1
    assert cells.held_in[0, 0, 0, 0, 1, 0] == pytest.approx((0.75 + 1.0) / 2)
    assert np.isnan(cells.multitask_held_in).all() and np.isnan(cells.multitask_held_out).all()
    made = report(study, draws=10)
    assert made.there == made.wanted == len(SCORES) - 1
    claims = {each.claim.id: each for each in made.claims["fixed"]}
    assert {each.verdict for each in claims.values() if "multitask" in each.claim.needs} == {
        "undecided"
    }


def test_relative_scores_are_those_worked_out_by_hand(study: pathlib.Path):
    ratios, cells = graded(study)
    one, two = (0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 1, 0)  # [R, S, B, M, N, K]
    # A alone: 0.4 / 0.5 and 0.4 / 0.8; a ratio of means would be 0.615, and b1 would make it larger.
    assert cells.held_in[one] == pytest.approx((0.8 + 0.5) / 2)
    # A: 1 and 0.5; B: 1. The categories' mean; that of the datasets would be 0.833.
    assert cells.held_in[two] == pytest.approx((0.75 + 1.0) / 2)
    # h2 has 0 below the line: H is h1 alone.
    assert cells.held_out[one] == pytest.approx((1.5 + 0.5) / 2)
    assert cells.held_out[two] == pytest.approx((1.0 + 1.2) / 2)
    # The multitask model over the same categories as each merge.
    assert cells.multitask_held_in[one] == pytest.approx((0.5 + 1.0) / 2)
    assert cells.multitask_held_in[two] == pytest.approx((0.75 + 0.5) / 2)
    assert cells.multitask_held_out[one] == pytest.approx((1.5 + 1.0) / 2)
    assert ratios.without_ratio == [("xs", "pretrained", "h2")]


def test_a_missing_part_leaves_its_cell_out_and_no_other(study: pathlib.Path):
    path = study / "scores/xs/pretrained/averaging_n2_s0/scores.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"a1_y"' not in line or '"q"' not in line))
    ratios, cells = graded(study)
    assert ratios.is_there.ravel().tolist() == [True, False]
    assert np.isnan(cells.held_in[0, 0, 0, 0, 1, 0]) and np.isnan(cells.held_out[0, 0, 0, 0, 1, 0])
    assert cells.held_in[0, 0, 0, 0, 0, 0] == pytest.approx(0.65)


def test_a_dataset_that_does_not_count_may_be_missing(study: pathlib.Path):
    path = study / "scores/xs/pretrained/averaging_n1_s0/scores.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"b1"' not in line))
    assert graded(study)[1].held_in[0, 0, 0, 0, 0, 0] == pytest.approx(0.65)


def test_a_missing_expert_leaves_held_in_out_alone(study: pathlib.Path):
    (study / "scores/xs/pretrained/expert_B/scores.jsonl").unlink()
    cells = graded(study)[1]
    assert cells.held_in[0, 0, 0, 0, 0, 0] == pytest.approx(0.65)
    assert np.isnan(cells.held_in[0, 0, 0, 0, 1, 0])
    assert cells.held_out[0, 0, 0, 0, 1, 0] == pytest.approx(1.1)


def test_a_folder_read_is_what_was_written(tmp_path: pathlib.Path):
    world = World(
        merged=lambda s, b, m, n, seed, d: 0.5 + 0.1 * s + 0.01 * n + 0.02 * seed + 0.001 * len(d),
        loss=lambda s, b, k: 2.0 + s + 1 / (k + 1),
        sizes=("xs", "s"),
        methods=("averaging", "dare_ties"),
        num_experts=(2, 8),
        seeds=(0, 1),
        is_there=lambda size, base, model: (size, base, model) != ("s", IT, "averaging_n2_s1"),
    )
    read, made = results.read(world.write(tmp_path / "study")), world.results()
    assert read.study == made.study and read.rows == made.rows
    np.testing.assert_allclose(read.raw, made.raw, rtol=1e-12)
    np.testing.assert_allclose(read.chance, made.chance)
    assert read.losses == pytest.approx(made.losses)
    assert (~read.is_there).sum() == 1
    # Merges of all experts without random masks are one model.
    assert ("s", IT, "averaging_n8_s0") in read.rows and (
        "s",
        IT,
        "averaging_n8_s1",
    ) not in read.rows
    assert ("s", IT, "dare_ties_n8_s1") in read.rows


def test_a_folder_that_is_no_study_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(
        ValueError, match=r"study\.json does not exist: give the OUTPUT_DIR of a study"
    ):
        results.read(tmp_path)
    (tmp_path / "study.json").write_text('{"version": 7}')
    with pytest.raises(ValueError, match="is not of version 1, which this program reads"):
        results.read(tmp_path)
    (tmp_path / "study.json").write_text('{"version": 1, "name": "x"}')
    with pytest.raises(ValueError, match="does not say what a study is made of: KeyError"):
        results.read(tmp_path)


def test_draws_are_of_each_role_and_of_seeds():
    drawn = bootstrap.draw(["in", "in", "out", "in"], 3, draws=500)
    assert drawn.datasets.shape == (501, 4) and drawn.seeds.shape == (501, 3)
    np.testing.assert_array_equal(drawn.datasets[0], 1)
    np.testing.assert_array_equal(drawn.datasets[:, 2], 1)  # alone in its role
    np.testing.assert_array_equal(drawn.datasets[:, [0, 1, 3]].sum(axis=1), 3)
    np.testing.assert_array_equal(drawn.seeds.sum(axis=1), 3)
    # Multinomial counts of mean 1 and variance 2/3.
    assert drawn.seeds[1:].mean(axis=0) == pytest.approx([1, 1, 1], abs=0.15)
    assert drawn.seeds[1:].var() == pytest.approx(2 / 3, abs=0.1)
    again = bootstrap.draw(["in", "in", "out", "in"], 3, draws=500)
    np.testing.assert_array_equal(again.datasets, drawn.datasets)


def test_an_interval_is_quantiles_of_the_draws():
    draws = np.concatenate([[50.0], np.arange(101.0)])
    found = bootstrap.estimate(draws)
    assert (found.value, found.low, found.high) == pytest.approx((50.0, 2.5, 97.5))
    assert bootstrap.estimate(np.concatenate([[-5.0], np.arange(101.0)])).low == -5.0
    half = np.where(np.arange(102) % 3 == 0, draws, np.nan)
    assert np.isnan(bootstrap.estimate(half).low)


def test_times_and_cuts_are_those_of_the_manifests(study: pathlib.Path):
    assert summaries.shares(results.read(study)) == summaries.cut_inputs(results.read(study)) == ""
    of_model = {"load_seconds": 1.0, "evaluate_seconds": 8.0, "forward_seconds": 6.0}
    cut = {
        "a1_x": {"examples": 50, "inputs": 10, "targets": 0},
        "h1": {"examples": 150, "inputs": 0, "targets": 0},
    }
    made = {
        "scores/xs/pretrained/base": {**of_model, "merge_seconds": 0.0, "cut": cut},
        "scores/xs/pretrained/averaging_n2_s0": {**of_model, "merge_seconds": 1.0, "cut": cut},
        "models/xs/pretrained/experts_0": {"seconds": 81.0, "step_seconds": 67.0},
        "models/xs/pretrained/experts_0/A": {"seconds": 40.0, "step_seconds": 30.0},
    }
    for place, found in made.items():
        (study / place).mkdir(parents=True, exist_ok=True)
        (study / place / "manifest.json").write_text(json.dumps(found))
    found = results.read(study)
    # 6 + 7 + 67 of 9 + 10 + 81; of the cell's 10 seconds 1.
    assert summaries.shares(found) == (
        "Of the outputs that tell it, 20.0% of the time passed outside training steps, merges and forward passes; merging took"
        " 10.0% of the time of a cell."
    )
    assert summaries.cut_inputs(found) == (
        "Cut to the lengths that were set, of 200 examples: inputs of 5.0% (a1_x 20%); targets of 0.0%."
    )

"""What a study will cost, against numbers by hand."""

from __future__ import annotations

import pytest

from launch import study
from launch.study_price import prices
from tests.launch.test_quickstart import FILES


def test_the_price_of_a_small_study():
    steps = {"pretrain": 100, "instruct": 50, "expert": 10, "multitask": 20}
    bindings = [f"{scope}/Training.train_steps = {number}" for scope, number in steps.items()]
    resolved = study.configured(FILES, [*bindings, "OUTPUT_DIR = '/nowhere'"])
    (found,) = prices(study.plan(resolved), resolved.arguments["sources"])
    # 6 N + 12 L H h T: mini_m has 5 layers, 4 heads of 32, and rows of 128 tokens, of 64 to pretrain.
    short, flops = (6 * 1_319_680 + 12 * 5 * 4 * 32 * length for length in (64, 128))
    assert found.parameters == 1_319_680
    assert found.steps == 100 + 50 + 2 * 8 * 10 + 2 * 20
    tokens = (50 + 2 * 8 * 10 + 2 * 20) * 8 * 128
    assert found.train_flops == pytest.approx(tokens * flops + 100 * 8 * 64 * short)
    assert (found.merges, found.evaluations) == (24, 44 * 23)
    assert found.evaluate_flops == pytest.approx(44 * 23 * 50 * 128 * flops / 3)
    assert found.merge_bytes == 4 * 1_319_680 * 2 * 4 * sum(n + 2 for n in (2, 4, 8))
    assert found.stored_bytes == 4 * 1_319_680 * 20
    assert found.chip_hours("v5e", 0.5) == pytest.approx(
        (found.train_flops + found.evaluate_flops) / (197e12 * 0.5 * 3600)
    )
    text = study.priced(resolved, "v5e", 0.5)
    assert "mini_m" in text and "v5e chip-hours at 50% of the peak" in text


def test_choosing_settings_has_its_price():
    def price(tune: bool):
        bindings = ["OUTPUT_DIR = '/nowhere'", f"TUNE = {tune}"]
        resolved = study.configured(FILES, bindings)
        return prices(study.plan(resolved), resolved.arguments["sources"])[0]

    fixed, tuned = price(False), price(True)
    # Averaging has nothing to choose; the others have a merge more for each of 3 numbers of experts and 2 bases.
    assert (fixed.merges, tuned.merges) == (24, 24 + 18)
    flops = 6 * 1_319_680 + 12 * 5 * 4 * 32 * 128
    # 12 settings of 3 methods, judged by 25 examples of 16 held-in datasets.
    choosing = 12 * 3 * 3 * 2 * 25 * 16
    assert tuned.evaluate_flops - fixed.evaluate_flops == pytest.approx(
        (18 * 23 * 50 + choosing) * 128 * flops / 3
    )

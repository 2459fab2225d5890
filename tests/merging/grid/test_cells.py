"""Which experts the cells of a grid merge, and which of them are one merge."""

from __future__ import annotations

import pytest

from merging.grid.cells import cells, subset
from merging.methods.averaging import Averaging
from merging.methods.dare_ties import DareTies

CATEGORIES = tuple("abcdefgh")


def grid(**changes):
    options = {
        "sizes": ["s", "m"],
        "bases": ["pretrained", "instruction_tuned"],
        "methods": {"averaging": Averaging(), "dare_ties": DareTies()},
        "num_experts": (2, 4, 8),
        "seeds": (0, 1, 2),
        "categories": CATEGORIES,
    }
    return cells(**options | changes)


def test_every_cell_is_there_once():
    found = grid()
    keys = {(c.size, c.base, c.method, c.num_experts, c.seed) for c in found}
    assert len(found) == len(keys) == 2 * 2 * 2 * 3 * 3
    assert all(len(c.categories) == c.num_experts for c in found)


def test_the_same_experts_at_every_size_from_every_base_by_every_method():
    chosen: dict[tuple[int, int], set[tuple[str, ...]]] = {}
    for cell in grid():
        chosen.setdefault((cell.num_experts, cell.seed), set()).add(cell.categories)
    assert all(len(each) == 1 for each in chosen.values())


def test_more_experts_hold_fewer_and_seeds_differ():
    for seed in range(5):
        sets = [set(subset(CATEGORIES, n, seed)) for n in (2, 4, 6, 8)]
        assert all(a < b for a, b in zip(sets, sets[1:], strict=False))
    assert len({subset(CATEGORIES, 4, seed) for seed in range(20)}) > 10
    assert subset(CATEGORIES, 3, 0) == tuple(sorted(subset(CATEGORIES, 3, 0)))  # the table's order


def test_merges_of_all_experts_are_one_unless_masks_are_drawn():
    models = {
        (cell.method, cell.seed): cell.model
        for cell in grid(sizes=["s"], bases=["pretrained"])
        if cell.num_experts == 8
    }
    assert {models["averaging", seed] for seed in (0, 1, 2)} == {"averaging_n8_s0"}
    assert [models["dare_ties", seed] for seed in (0, 1, 2)] == [
        "dare_ties_n8_s0", "dare_ties_n8_s1", "dare_ties_n8_s2",
    ]  # fmt: skip


def test_more_experts_than_categories_are_refused():
    with pytest.raises(ValueError, match="NUM_EXPERTS has 9: there are 8 held-in categories"):
        grid(num_experts=(2, 9))

"""Claims on grids whose truth is known: one where all hold, one where none does, one where nothing can be said."""

from __future__ import annotations

import dataclasses
import math
import zlib

import numpy as np
import pytest

from merging.grid import bootstrap, claims, paper
from merging.grid.relative import grid, over_cells, relative
from tests.merging.grid.synthetic import IS_HELD_OUT, IT, World

IDS = [each.id for each in claims.CLAIMS]


def noise(*what: object) -> float:
    """Between -0.003 and 0.003, from what it is of."""
    return 0.003 * (zlib.crc32(repr(what).encode()) % 2001 / 1000 - 1)


def as_the_paper_says(s: int, base: str, method: str, n: int, seed: int, d: str) -> float:
    apart = {"averaging": 0.0, "task_arithmetic": 0.05, "ties": 0.02, "dare_ties": 0.04}[method]
    level = apart / (1 + 3 * s) + noise(s, base, method, n, seed, d)
    if d in IS_HELD_OUT:
        return level + 1.02 + 0.03 * s + (0.015 * (n - 2) if base == IT else 0.0)
    return level + (0.75 if base == IT else 0.45) + 0.03 * s - (0.04 - 0.008 * s) * (n - 2)


def as_it_does_not(s: int, base: str, method: str, n: int, seed: int, d: str) -> float:
    apart = {"averaging": -0.05, "task_arithmetic": 0.05, "ties": 0.02, "dare_ties": 0.04}[method]
    level = apart * (1 + s) / 2 + noise(s, base, method, n, seed, d)
    if d in IS_HELD_OUT:
        return level + 0.7 - 0.04 * s + (-0.015 * (n - 2) if base == IT else 0.03 * (n - 2) - 0.2)
    return level + (1.6 if base == IT else 1.9) - 0.04 * s + (0.02 - 0.004 * s) * (n - 2)


def side(d: str) -> int:
    """Half of a role's datasets lie on either side of every threshold, by as much."""
    return {"a": 1, "b": -1}.get(d[-1], 0)


def as_datasets_decide(s: int, base: str, method: str, n: int, seed: int, d: str) -> float:
    """Everything depends on which datasets were drawn: on average there is nothing."""
    at = s - 1.5
    apart = 0.0 if method == "averaging" else 0.02 * (1 + side(d) * 0.2 * at / 1.5)
    tilt = side(d) * (
        0.2 + (0.3 if base == IT else 0.1) + 0.05 * at + 0.02 * (n - 5) * (1 - 0.3 * at)
    )
    level = 1.0 - 0.01 + apart + tilt + noise(s, base, method, n, seed, d)
    if d in IS_HELD_OUT and base != IT:
        return level + 0.01 * (n - 5)  # the threshold of its slope
    return level


def no_multitask_gap(s: int, base: str, d: str) -> float:
    """At scale merged models lie at the margin behind it, on average."""
    return 1.02 if d in IS_HELD_OUT else 1.0


def judged(world: World) -> dict[str, claims.Judged]:
    found = world.results()
    drawn = bootstrap.draw([e.role for e in found.study.datasets], len(world.seeds), draws=400)
    return {each.claim.id: each for each in claims.judge(grid(relative(found, "fixed"), drawn))}


@pytest.fixture(scope="module")
def true() -> dict[str, claims.Judged]:
    return judged(World(merged=as_the_paper_says, multitask=lambda s, b, d: 1.03))


@pytest.fixture(scope="module")
def false() -> dict[str, claims.Judged]:
    return judged(World(merged=as_it_does_not))


@pytest.fixture(scope="module")
def balanced() -> dict[str, claims.Judged]:
    return judged(World(merged=as_datasets_decide, multitask=no_multitask_gap))


@pytest.mark.parametrize("name", IDS)
def test_a_claim_holds_where_it_is_true(name: str, true: dict[str, claims.Judged]):
    assert true[name].verdict == claims.HOLDS, true[name].tests


@pytest.mark.parametrize("name", IDS)
def test_a_claim_does_not_hold_where_it_is_false(name: str, false: dict[str, claims.Judged]):
    assert false[name].verdict == claims.FAILS, false[name].tests


@pytest.mark.parametrize("name", IDS)
def test_a_claim_is_undecided_where_it_hangs_on_the_datasets(
    name: str, balanced: dict[str, claims.Judged]
):
    assert balanced[name].verdict == claims.UNDECIDED, balanced[name].tests
    assert "both sides" in balanced[name].why


def test_numbers_are_what_was_put_in():
    def plain(s: int, base: str, method: str, n: int, seed: int, d: str) -> float:
        if d in IS_HELD_OUT:
            return 1.1 + (0.01 if base == IT else -0.02) * n
        return (0.9 if base == IT else 0.7) - 0.03 * n + (0.005 * n * s)

    found = judged(World(merged=plain, multitask=lambda s, b, d: 1.3 if d in IS_HELD_OUT else 0.8))
    numbers = {id: [t.found.value for t in each.tests] for id, each in found.items()}
    assert numbers["F1"] == pytest.approx([1.0, 0.2])
    assert numbers["F2"] == pytest.approx([1.0])
    assert numbers["F3a"] == pytest.approx([0.5 + 0.5 * 0.5, 1.1 - 0.005 * 5])  # PT: N = 2, 4
    assert numbers["F3b"] == pytest.approx([1.1 + 0.07 - 1.3])
    assert numbers["F3c"] == pytest.approx([0.0])  # all sizes are equal
    assert numbers["F4a"] == pytest.approx([-1.0, -0.005 * 6 * 3])
    assert numbers["F4b"] == pytest.approx([-0.03 + 0.005 * 1.5])
    assert numbers["F4c"] == pytest.approx([0.01])
    assert numbers["F5"] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert numbers["F7"] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert numbers["F8"] == pytest.approx([-0.02, 0.5])
    below = [  # held-in below the multitask model: of N = 2, 4, 6, 8 and four sizes
        (0.9 if it else 0.7) - 0.03 * n + 0.005 * n * s < 0.8
        for it in (True, False)
        for n in (2, 4, 6, 8)
        for s in range(4)
    ]
    assert numbers["F6"][:2] == pytest.approx([1.0, np.mean(below)])


def test_what_a_grid_lacks_leaves_claims_undecided_and_says_what():
    small = World(
        merged=as_the_paper_says, sizes=("xs",), bases=("pretrained",), num_experts=(2,), seeds=(0,)
    )
    found = judged(small)
    lacking = {id: each.why for id, each in found.items() if each.verdict == claims.UNDECIDED}
    assert set(lacking) == {"F1", "F2", "F3b", "F3c", "F4a", "F4b", "F4c", "F5", "F7", "F8"}
    assert lacking["F1"] == "needs both bases"
    assert all(why.startswith("needs ") for why in lacking.values())


def test_a_study_under_way_compares_seeds_that_both_have():
    def seeds_differ(s: int, base: str, method: str, n: int, seed: int, d: str) -> float:
        return 0.5 + 0.2 * seed + (0.1 if base == IT else 0.0)

    half = World(
        merged=seeds_differ,
        num_experts=(2, 4),
        is_there=lambda size, base, model: base == IT or "_s0" in model or "_n" not in model,
    )
    gap = judged(half)["F1"].tests[1].found.value
    assert gap == pytest.approx(0.1)  # not 0.3, the gap of means over the seeds that each has


def test_equal_merges_enter_a_draw_once():
    """At N = 8 only DARE's differ between seeds: the others' interval is that of one seed."""

    def by_seed(s: int, base: str, method: str, n: int, seed: int, d: str) -> float:
        return 1.0 + 0.1 * seed

    world = World(merged=by_seed, num_experts=(8,), sizes=("xs",), bases=(IT,))
    found = world.results()
    drawn = bootstrap.draw([e.role for e in found.study.datasets], 3, draws=200)
    cells = grid(relative(found, "fixed"), drawn)
    value, low, high = bootstrap.intervals(over_cells(cells, cells.held_in, ["seed"]))
    methods = list(world.methods)
    assert value[0, 0, methods.index("ties"), 0] == low[0, 0, methods.index("ties"), 0] == 1.0
    dare = (0, 0, methods.index("dare_ties"), 0)
    assert value[dare] == pytest.approx(1.1)
    assert low[dare] == pytest.approx(1.0) and high[dare] == pytest.approx(1.2)


def test_the_papers_own_numbers():
    """By hand from the table: 6 sizes-and-N pairs have both bases."""
    reported = {c.id: [float(t.statistic(paper.grid())[0]) for t in c.tests] for c in claims.CLAIMS}
    gaps = [0.25, 0.47, 0.27, 0.46, 0.20, 0.26]
    assert reported["F1"] == pytest.approx([1.0, np.mean(gaps)])
    assert reported["F3b"] == pytest.approx([np.mean([1.18 - 1.18, 1.09 - 1.05])])
    it = np.mean([0.05, 0.07, 0.04, 0.07]) / 6
    pt = np.mean([0.27, 0.26, 0.13]) / 6
    assert reported["F4b"] == pytest.approx([-(4 * it + 3 * pt) / 7])
    assert all(map(math.isnan, reported["F7"]))


def test_ranks_and_slopes():
    values = np.array([[3.0, 1.0, np.nan, 3.0], [np.nan, 2.0, np.nan, np.nan]])
    np.testing.assert_array_equal(
        claims.ranks(values), [[1.5, 0.0, np.nan, 1.5], [np.nan, 0.0, np.nan, np.nan]]
    )
    # By hand: orders 0, 1, 2 and ranks 1.5, 0, 1.5: no covariance.
    found = claims.rank_correlation(values, 1)
    assert found[0] == pytest.approx(0.0) and np.isnan(found[1])
    slopes = claims.slope(
        np.array([[1.0, np.nan, 5.0], [1.0, np.nan, np.nan]]), np.array([2.0, 4.0, 8.0])
    )
    assert slopes[0] == pytest.approx(4 / 6) and np.isnan(slopes[1])


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.1, 0.2), "holds"),
        ((-0.1, 0.0), "does not hold"),
        ((-0.1, 0.1), "undecided"),
        ((math.nan,) * 2, "undecided"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(interval: tuple[float, float], verdict: str):
    above = claims.Test(name="", statistic=lambda g: g, above=0.0)
    assert above.verdict(estimate(*interval)) == verdict
    mirrored = dataclasses.replace(above, above=None, below=0.0)
    low, high = interval
    assert mirrored.verdict(estimate(-high, -low)) == verdict


def estimate(low: float, high: float) -> bootstrap.Estimate:
    return bootstrap.Estimate(value=(low + high) / 2, low=low, high=high)

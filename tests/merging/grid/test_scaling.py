"""The scaling law: known laws are found again, and forecasts are those of the law."""

from __future__ import annotations

import pytest

from merging.grid.scaling import Point, fit, forecast, forecasts
from tests.merging.grid.synthetic import IT, World

PARAMETERS = {"xs": 10**6, "s": 4 * 10**6, "m": 16 * 10**6, "l": 64 * 10**6}


def law(size: str, k: float) -> float:
    return 1.5 + 40 * PARAMETERS[size] ** -0.3 + 0.8 / (k + 0.5)


def points(sizes: tuple[str, ...], ks: tuple[int, ...]) -> list[Point]:
    return [Point(size=s, parameters=PARAMETERS[s], k=k, loss=law(s, k)) for s in sizes for k in ks]


def test_a_known_law_is_found_again():
    found = fit(points(tuple(PARAMETERS), (1, 2, 4)))
    assert found.exponent == pytest.approx(0.3, rel=0.02)
    assert found.limit == pytest.approx(1.5, rel=0.01)
    assert found.gain == pytest.approx(0.8, rel=0.02)
    assert found.offset == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("sizes", [tuple(PARAMETERS), ("xs", "l"), ("m",)])
def test_it_forecasts_more_experts(sizes: tuple[str, ...]):
    found = forecast(IT, "ties", points(sizes, (1, 2, 4, 6, 8)))
    assert found.fit_error < 1e-4
    assert found.forecast_error < 1e-3
    by_hand = [abs(law(s, 4) - law(s, k)) / law(s, k) for s in sizes for k in (6, 8)]
    assert found.persistence_error == pytest.approx(sum(by_hand) / len(by_hand))
    assert (found.law.exponent is None) == (len(sizes) < 3)


def test_no_floor_is_below_nothing():
    """A straight line in k, which b beyond its bound would fit best over a limit far below 0; and its losses rise or fall."""
    for slope in (-0.5, 0.1):
        line = [
            Point(size=s, parameters=n, k=k, loss=3 + slope * (k - 1))
            for s, n in PARAMETERS.items()
            for k in (1, 2, 4)
        ]
        found = fit(line)
        assert found.limit >= 0
        assert all(floor >= 0 for floor in found.floors.values())
        assert (found.gain > 0) == (slope < 0)


def test_losses_of_a_study_are_averaged_over_distinct_models():
    world = World(
        merged=lambda s, b, m, n, seed, d: 1.0,
        loss=lambda s, b, k: law("m", k),
        sizes=("m",),
        methods=("ties",),
        num_experts=(2, 4, 8),
        is_there=lambda size, base, model: not (base == IT and model == "expert_qa"),
    )
    (found,) = forecasts(world.results(), "fixed")  # the other base lacks an expert, so k = 1
    assert found.base == "pretrained"
    assert {p.k: p.loss for p in found.points} == pytest.approx(
        {k: law("m", k) for k in (1, 2, 4, 8)}
    )

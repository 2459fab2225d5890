"""The campaign of kills in small: the run goes on by itself, with the bits of one that nobody stopped."""

from __future__ import annotations

import pathlib

import pytest

from tests.campaigns import finetune_kills

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("layout", finetune_kills.LAYOUTS)
def test_killed_runs_have_the_bits_of_an_unbroken_one(
    layout: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    told = finetune_kills.campaign(layout, kills=2, seed=1, folder=tmp_path)
    assert told.kills == {"SIGKILL": 1, "SIGTERM": 1}
    assert told.different == []


def test_a_difference_is_found(tmp_path: pathlib.Path):
    import jax

    from tests.merging.training import runs

    with jax.numpy_dtype_promotion("standard"):
        runs.run(tmp_path / "one", train_steps=2)
        runs.run(tmp_path / "two", train_steps=2, seed=1)
    found = finetune_kills.differences(tmp_path / "two", tmp_path / "one")
    assert "two: the curve" in found and "two: final_norm/scale" in found

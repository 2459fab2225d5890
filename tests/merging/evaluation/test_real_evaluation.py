"""SmolLM2-135M-Instruct on real tasks: the choice log-likelihoods of `transformers`; `tests.campaigns.evaluate` has all examples."""

from __future__ import annotations

import pathlib

import pytest

from tests.campaigns.evaluate import compare

pytestmark = [pytest.mark.real, pytest.mark.peers, pytest.mark.slow]


def test_log_likelihoods_are_those_of_transformers(
    real_checkpoints: pathlib.Path, real_data: pathlib.Path
):
    pytest.importorskip("transformers", reason="needs the extra `peers`")
    folder = real_checkpoints / "smollm2"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    compared = list(compare(folder, real_data, ["copa", "trec"], limit=5, prompts=1))
    assert [each.examples for each in compared] == [5, 5]
    assert all(each.is_good for each in compared), compared

"""A tenth of the campaign of kills: one in each format, all methods from one read."""

from __future__ import annotations

import pytest

from tests.campaigns import merge_kills


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> merge_kills.Campaign:
    return merge_kills.Campaign(tmp_path_factory.mktemp("kills"), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("format", merge_kills.FORMATS_HERE)
def test_a_killed_merge_ends_with_the_same_bytes(campaign: merge_kills.Campaign, format: str):
    campaign.kill(merge_kills.Case(format, merge_kills.ALL), by_clock=False)

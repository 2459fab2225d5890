"""A tenth of the campaign of faults: one of each kind in a merge."""

from __future__ import annotations

import pathlib

import pytest

from tests.campaigns import pod_faults


@pytest.mark.slow
def test_a_merge_that_loses_a_process_ends_names_it_and_goes_on(tmp_path: pathlib.Path):
    pod_faults.fork_for(["merge"])
    told = pod_faults.Campaign("merge", tmp_path, seed=0).run(pod_faults.KINDS)
    assert told.faults == dict.fromkeys(pod_faults.KINDS, 1)
    assert told.whole and told.wrong == []


@pytest.mark.parametrize(
    ("words", "victim", "is_named"),
    [
        ("Process 1 of 4: process 2 has gone: see in its log why.", 2, True),
        ("Process 1 of 4: process 2 has gone: see in its log why.", 1, False),
        ("Process 1 of 4: processes 2, 3 of 4 did not come within 30 s", 3, True),
        ("Process 3 of 4: process 0 did not answer at 127.0.0.1:1 within 30 s", 0, True),
        ("unhealthy (stopped sending heartbeats):\n12\n", 12, True),
        ("unhealthy (stopped sending heartbeats):\n12\n", 1, False),
    ],
)
def test_who_is_named(words: str, victim: int, is_named: bool):
    assert pod_faults.names(words, victim) == is_named

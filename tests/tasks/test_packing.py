"""Packing loses and repeats no example, and a batch says of each token what a prefix-LM needs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import packing
from tasks.packing import Lengths, Tokens


def tokens(inputs: list[int], targets: list[int]) -> Tokens:
    return Tokens(inputs=np.array(inputs, np.int32), targets=np.array(targets, np.int32))


def unpacked(rows: list[packing.Row]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    found = []
    for row in rows:
        for segment in range(1, int(row.segment_ids.max()) + 1):
            inside = row.segment_ids == segment
            found.append(
                tuple(
                    tuple(row.targets[inside & (row.kinds == kind)].tolist())
                    for kind in (packing.INPUT, packing.TARGET)
                )
            )
    return found


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=80),
    open_rows=st.integers(1, 5),
)
def test_no_example_is_lost_or_repeated(sizes: list[tuple[int, int]], open_rows: int):
    examples, at = [], 1
    for inputs, targets in sizes:
        examples.append(
            tokens([*range(at, at + inputs)], [*range(at + inputs, at + inputs + targets)])
        )
        at += inputs + targets
    rows = list(packing.pack(examples, length=14, open_rows=open_rows))
    wanted = [(tuple(e.inputs.tolist()), tuple(e.targets.tolist())) for e in examples]
    assert sorted(unpacked(rows)) == sorted(wanted)
    assert all((row.kinds > 0).tolist() == (row.segment_ids > 0).tolist() for row in rows)


def test_rows_are_full():
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 60, 2000)
    rows = list(packing.pack((tokens([1] * n, [2]) for n in sizes), length=160))
    assert sum(int((row.kinds > 0).sum()) for row in rows) == sizes.sum() + 2000
    assert (sizes.sum() + 2000) / (160 * len(rows)) > 0.98


def test_an_example_that_fits_no_row():
    with pytest.raises(ValueError, match="an example of 5 tokens does not fit in a row of 4"):
        list(packing.pack([tokens([1, 2, 3], [4, 5])], length=4))


def test_a_batch_token_by_token():
    rows = list(packing.pack([tokens([5, 6, 7], [8, 1]), tokens([], [9, 1])], length=8))
    batch = packing.batch(**packing.concatenated(rows), start_id=3)
    assert {name: array[0].tolist() for name, array in batch.items()} == {
        "targets": [5, 6, 7, 8, 1, 9, 1, 0],
        "tokens": [3, 5, 6, 7, 8, 3, 9, 0],
        "loss_weights": [0, 0, 0, 1, 1, 1, 1, 0],
        "positions": [0, 1, 2, 3, 4, 0, 1, 0],
        "segment_ids": [1, 1, 1, 1, 1, 2, 2, 0],
        "prefix_mask": [True, True, True, True, False, True, False, False],
    }
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "targets": "int32",
        "tokens": "int32",
        "loss_weights": "float32",
        "positions": "int32",
        "segment_ids": "int32",
        "prefix_mask": "bool",
    }


def test_truncation_by_a_named_rule():
    lengths = Lengths(inputs=3, targets=2)
    inputs, targets = np.arange(10, 15, dtype=np.int32), np.array([7, 8, 9, 1], np.int32)
    end = packing.truncate(inputs, targets, lengths=lengths)
    assert (end.inputs.tolist(), end.targets.tolist()) == ([10, 11, 12], [7, 1])
    assert end.cut == ("inputs", "targets")
    start = packing.truncate(inputs, targets[-2:], lengths=lengths, rule="start")
    assert (start.inputs.tolist(), start.targets.tolist(), start.cut) == (
        [12, 13, 14],
        [9, 1],
        ("inputs",),
    )
    none = packing.truncate(inputs, targets, lengths=Lengths(inputs=0, targets=4), rule="start")
    assert (none.inputs.tolist(), len(none.targets)) == ([], 4)
    with pytest.raises(ValueError, match="truncation is one of end, start; found 'middle'"):
        packing.truncate(inputs, targets, lengths=lengths, rule="middle")
    with pytest.raises(ValueError, match="lengths must be at least"):
        Lengths(inputs=3, targets=0)

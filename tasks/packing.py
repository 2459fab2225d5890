"""Examples into rows of fixed length for a decoder, several to a row, none lost and none twice.

A row holds sequences one behind another, each its inputs and then its targets, which a prefix-LM reads so:

  targets       i1 i2 i3 t1 t2 </s>     what is to be predicted; 0 behind the last sequence
  tokens        <s> i1 i2 i3 t1 t2      what is read: the targets one later, from the start token
  prefix_mask    1  1  1  1  0  0       who sees one another in both directions: the start token and the inputs
  loss_weights   0  0  0  1  1  1       only targets are learnt
  positions      0  1  2  3  4  5       within the sequence
  segment_ids    1  1  1  1  1  1       2, 3, ... for the next ones in the row; 0 is padding

seqio's PrefixLMFeatureConverter gives the same numbers for one sequence a row.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

Batch = dict[str, np.ndarray]

# Which tokens an input that is too long loses. T5X and T0 cut the end.
TRUNCATIONS = ("end", "start")

# Rows that wait for a fitting example. More pack denser (64: over 98 % full where examples are short against rows) and
# cost little.
OPEN_ROWS = 64

PADDING, INPUT, TARGET = 0, 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens that an example's inputs and targets may have; a row has as many as both.

    Attributes:
      inputs: 1024 in the study.
      targets: 256 in the study; the end of sequence is one of them.
    """

    inputs: int = 1024
    targets: int = 256

    def __post_init__(self) -> None:
        if self.inputs < 0 or self.targets < 1:
            raise ValueError(f"lengths must be at least 0 (inputs) and 1 (targets); found {self}")

    @classmethod
    def of(cls, given: Mapping[str, int]) -> Lengths:
        """From {"inputs": tokens, "targets": tokens}. Raises ValueError where others are named."""
        if given.keys() != {"inputs", "targets"}:
            raise ValueError(
                f"TASK_FEATURE_LENGTHS is {dict(given)}: give 'inputs' and 'targets', and nothing else"
            )
        return cls(**given)

    @property
    def row(self) -> int:
        return self.inputs + self.targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """One example as tokens.

    Attributes:
      inputs: [i] int32.
      targets: [t] int32, with the end of sequence.
      cut: of "inputs" and "targets", what was too long.
    """

    inputs: np.ndarray
    targets: np.ndarray
    cut: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs) + len(self.targets)


def truncate(
    inputs: np.ndarray, targets: np.ndarray, *, lengths: Lengths, rule: str = "end"
) -> Tokens:
    """Cuts what is too long.

    Args:
      inputs: [i] tokens.
      targets: [t] tokens, of which the last, the end of sequence, is kept always.
      lengths: what they may have.
      rule: what inputs lose: their "end" or their "start". Targets lose what stands before the end of sequence.
    """
    if rule not in TRUNCATIONS:
        raise ValueError(f"truncation is one of {', '.join(TRUNCATIONS)}; found {rule!r}")
    cut = []
    if len(inputs) > lengths.inputs:
        cut.append("inputs")
        inputs = (
            inputs[: lengths.inputs] if rule == "end" else inputs[len(inputs) - lengths.inputs :]
        )
    if len(targets) > lengths.targets:
        cut.append("targets")
        targets = np.concatenate([targets[: lengths.targets - 1], targets[-1:]])
    return Tokens(inputs=inputs, targets=targets, cut=tuple(cut))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A packed row.

    Attributes:
      targets: [T] int32.
      segment_ids: [T] uint16.
      kinds: [T] uint8: PADDING, INPUT or TARGET.
    """

    targets: np.ndarray
    segment_ids: np.ndarray
    kinds: np.ndarray


def pack(examples: Iterable[Tokens], *, length: int, open_rows: int = OPEN_ROWS) -> Iterator[Row]:
    """Rows of a stream of examples, the same for the same stream: each example goes to the fullest open row it fits in.

    Raises:
      ValueError: for an example longer than a row.
    """
    waiting: list[tuple[int, int, list[Tokens]]] = []  # (free, number, examples), the fullest first
    number = 0
    for example in examples:
        if len(example) > length:
            raise ValueError(
                f"an example of {len(example)} tokens does not fit in a row of {length}"
            )
        fitting = bisect.bisect_left(waiting, len(example), key=lambda row: row[0])
        if fitting < len(waiting):
            free, opened, inside = waiting.pop(fitting)
        else:
            if len(waiting) == open_rows:
                yield _row(waiting.pop(0)[2], length)
            free, opened, inside = length, number, []
            number += 1
        inside.append(example)
        bisect.insort(waiting, (free - len(example), opened, inside), key=lambda row: row[:2])
    for _, _, inside in sorted(waiting, key=lambda row: row[1]):
        yield _row(inside, length)


def _row(examples: Sequence[Tokens], length: int) -> Row:
    targets = np.zeros(length, np.int32)
    segment_ids = np.zeros(length, np.uint16)
    kinds = np.zeros(length, np.uint8)
    at = 0
    for segment, example in enumerate(examples, start=1):
        middle, end = at + len(example.inputs), at + len(example)
        targets[at:middle], targets[middle:end] = example.inputs, example.targets
        kinds[at:middle], kinds[middle:end] = INPUT, TARGET
        segment_ids[at:end] = segment
        at = end
    return Row(targets=targets, segment_ids=segment_ids, kinds=kinds)


def batch(
    targets: np.ndarray, segment_ids: np.ndarray, kinds: np.ndarray, *, start_id: int
) -> Batch:
    """What a decoder reads, from packed rows.

    Args:
      targets: [B, T] tokens.
      segment_ids: [B, T].
      kinds: [B, T].
      start_id: the token that every sequence starts with.

    Returns:
      tokens, targets, positions, segment_ids [B, T] int32; loss_weights [B, T] float32; prefix_mask [B, T] bool.
    """
    is_real = segment_ids > 0
    is_first = np.ones_like(is_real)
    is_first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    tokens = np.empty(targets.shape, np.int32)
    tokens[:, 0] = start_id
    tokens[:, 1:] = np.where(is_first[:, 1:], start_id, targets[:, :-1])
    follows_input = np.zeros_like(is_real)
    follows_input[:, 1:] = kinds[:, :-1] == INPUT
    column = np.arange(targets.shape[1], dtype=np.int32)
    begins = np.maximum.accumulate(np.where(is_first, column, 0), axis=1)
    return {
        "tokens": np.where(is_real, tokens, 0),
        "targets": targets.astype(np.int32),
        "loss_weights": (kinds == TARGET).astype(np.float32),
        "positions": np.where(is_real, column - begins, 0).astype(np.int32),
        "segment_ids": segment_ids.astype(np.int32),
        "prefix_mask": is_real & (is_first | follows_input),
    }


def concatenated(rows: Sequence[Row]) -> Mapping[str, np.ndarray]:
    """Rows as [R, T] arrays: the first three arguments of `batch`."""
    return {
        field.name: np.stack([getattr(row, field.name) for row in rows])
        for field in dataclasses.fields(Row)
    }

"""Examples as rows of few lengths, made once for all models.

A row is a prompt with its choices one behind another. The choices start at the same position, see the prompt and themselves and
not one another, so that the prompt is run once, and all choices are scored from its keys and values in the same step:

  tokens       <s> i1 i2 | a1 a2 | b1          each choice but for its last token
  segment_ids   1  1  1  | 2  2  | 3           0 is padding
  positions     0  1  2  | 3  4  | 3
  reads         2  3  4    2  5                where the distribution of each target is read
  targets       a1 a2 a3   b1 b2

A choice's log-probability is the sum of those of its targets. An example whose choices don't fit into one row gets several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

PROMPT = 1  # segment of a row's prompt

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of choices.

    Attributes:
      tokens, segment_ids, positions: [T].
      reads, targets: [N].
      slots: [N], the number that each target's log-probability is added to.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    reads: np.ndarray
    targets: np.ndarray
    slots: np.ndarray

    @property
    def shape(self) -> Shape:
        return len(self.tokens), len(self.reads)


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """One prompt that is continued; `slot` is the number of its example."""

    tokens: np.ndarray
    slot: int
    max_new_tokens: int
    eos_id: int | None

    @property
    def shape(self) -> Shape:
        return (len(self.tokens),)


def choice_rows(
    prompt: np.ndarray, choices: Sequence[np.ndarray], *, first_slot: int, row_length: int
) -> list[Row]:
    """The rows of one example, as few as its choices fit into.

    Args:
      prompt: [p] tokens.
      choices: [c] tokens each.
      first_slot: the first choice's number; the others follow.
      row_length: the most tokens of one row.

    Raises ValueError where the prompt and one choice are longer.
    """
    rows: list[Row] = []
    waiting: list[tuple[int, np.ndarray]] = []
    length = len(prompt)
    for slot, choice in enumerate(choices, first_slot):
        if len(prompt) + len(choice) - 1 > row_length:
            raise ValueError(
                f"a prompt of {len(prompt):,} tokens and a choice of {len(choice):,} don't fit into {row_length:,}"
            )
        if length + len(choice) - 1 > row_length:
            rows.append(_row(prompt, waiting))
            waiting, length = [], len(prompt)
        waiting.append((slot, choice))
        length += len(choice) - 1
    return [*rows, _row(prompt, waiting)]


def _row(prompt: np.ndarray, choices: Sequence[tuple[int, np.ndarray]]) -> Row:
    start = len(prompt)
    tokens, segments, positions = [prompt], [np.full(start, PROMPT)], [np.arange(start)]
    reads, slots = [], []
    end = start
    for number, (slot, choice) in enumerate(choices):
        more = len(choice) - 1
        tokens.append(choice[:-1])
        segments.append(np.full(more, PROMPT + 1 + number))
        positions.append(start + np.arange(more))
        reads += [np.array([start - 1]), end + np.arange(more)]
        slots.append(np.full(len(choice), slot))
        end += more
    return Row(
        tokens=_ids(tokens),
        segment_ids=_ids(segments),
        positions=_ids(positions),
        reads=_ids(reads),
        targets=_ids([choice for _, choice in choices]),
        slots=np.concatenate(slots),
    )


def _ids(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int32)


# ---- few shapes -----------------------------------------------------------------------------------------------------


def few_shapes(
    shapes: Iterable[Shape], *, most: int, cost: Callable[[np.ndarray], np.ndarray]
) -> list[Shape]:
    """At most so many shapes into which all rows fit, chosen so that padding costs little.

    Args:
      shapes: of all rows.
      most: at least 1.
      cost: [n, dims] shapes -> [n] costs of a row of each.

    Starts from the rows' own shapes, rounded up to an eighth, and joins the two that cost least to join until few are left.
    """
    found, counts = np.unique(
        np.array([[_rounded(size) for size in shape] for shape in shapes]),
        axis=0,
        return_counts=True,
    )
    while len(found) > most:
        joined = np.maximum(found[:, None], found[None])  # [n, n, dims]
        each = cost(found) * counts
        together = cost(joined.reshape(-1, joined.shape[-1])).reshape(len(found), len(found))
        added = together * (counts[:, None] + counts[None]) - each[:, None] - each[None]
        added[np.tril_indices(len(found))] = np.inf
        a, b = np.unravel_index(np.argmin(added), added.shape)
        found[a], counts[a] = joined[a, b], counts[a] + counts[b]
        found, counts = np.delete(found, b, axis=0), np.delete(counts, b)
    return sorted({tuple(int(size) for size in shape) for shape in found})


def shape_of(
    shape: Shape, shapes: Sequence[Shape], cost: Callable[[np.ndarray], np.ndarray]
) -> Shape:
    """The cheapest of the shapes that holds this one."""
    fitting = [each for each in shapes if all(a >= b for a, b in zip(each, shape, strict=True))]
    return fitting[int(np.argmin(cost(np.array(fitting))))]


def _rounded(size: int) -> int:
    """Up to a multiple of an eighth of the power of two below it."""
    step = max(1, 2 ** (int(size).bit_length() - 1) // 8)
    return -(-int(size) // step) * step


def batch_size(rows: int, *, most: int, multiple: int) -> int:
    """Rows of each of the fewest batches of at most `most`, a multiple of `multiple`, with little padding."""
    most = max(multiple, most // multiple * multiple)
    batches = -(-rows // most)
    return -(-rows // (batches * multiple)) * multiple


def stacked(arrays: Sequence[np.ndarray], *, rows: int, length: int) -> np.ndarray:
    """[rows, length] int32, each array in the beginning of its row, 0 elsewhere."""
    out = np.zeros((rows, length), np.int32)
    for row, array in zip(out, arrays, strict=False):
        row[: len(array)] = array
    return out

"""What is in a checkpoint, and how two differ: norms, values that are not finite, differences, leaf by leaf.

What it promises: float64 arithmetic in bounded memory, whatever the leaves' sizes, on any format's Reader; every byte
is read once. Sums run in C order over blocks, so figures agree with other programs' to 1e-9 or so, not bit for bit.
What it leaves out: printing (`launch/show.py`), and leaves that only one of two checkpoints has, or in another shape,
beyond saying so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from merging.checkpoints.boxes import row_boxes
from merging.checkpoints.format import LeafSpec, Reader
from merging.paths import is_like

# Elements read and converted at a time: some 10 float64 arrays of 8 MiB are alive at once. Smaller blocks pay Python's
# overhead more often, larger ones fall out of the cache.
BLOCK_ELEMENTS = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """The numbers of one leaf, or of many together.

    Attributes:
      norm: L2, of the finite elements; inf where the squares overflow float64.
      largest: the largest finite magnitude; 0 where there is none.
      not_finite: how many elements are NaN or infinite.
    """

    name: str
    norm: float
    largest: float
    not_finite: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How the elements of one leaf differ between two checkpoints, or those of many together.

    Attributes:
      size: elements compared.
      different: how many are not equal as numbers: bfloat16 1 equals float32 1, -0 equals 0, NaN equals NaN.
      largest, norm: of the differences, where they are finite; integers beyond 2^53 are rounded.
      not_finite: how many of those that differ are NaN or infinite on either side.
    """

    name: str
    size: int
    different: int
    largest: float
    norm: float
    not_finite: int

    @property
    def share(self) -> float:
        """Of the elements, that differ."""
        return self.different / self.size if self.size else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """How the leaves of two checkpoints differ, by their headers.

    Attributes:
      only_first, only_second: leaves that the other has not.
      reshaped, retyped: leaves of another shape, and of the same shape but another dtype, as both have them.
      comparable: names of the leaves whose elements can be compared.
    """

    only_first: Sequence[LeafSpec]
    only_second: Sequence[LeafSpec]
    reshaped: Sequence[tuple[LeafSpec, LeafSpec]]
    retyped: Sequence[tuple[LeafSpec, LeafSpec]]
    comparable: Sequence[str]


def matching(specs: Mapping[str, LeafSpec], pattern: str, *, where: str) -> dict[str, LeafSpec]:
    """The leaves whose name, as stored or as a canonical path, is like a shell's pattern: `*mlp*`.

    Raises ValueError if there are leaves and none is.
    """
    found = {name: spec for name, spec in specs.items() if is_like(name, [pattern])}
    if specs and not found:
        raise ValueError(f"{where}: no leaf is like {pattern!r}; one is {next(iter(specs))}")
    return found


def structure(first: Mapping[str, LeafSpec], second: Mapping[str, LeafSpec]) -> Structure:
    """Compares the specs of two checkpoints; in the order of the first, then of the second."""
    common = [(spec, second[name]) for name, spec in first.items() if name in second]
    return Structure(
        only_first=[spec for name, spec in first.items() if name not in second],
        only_second=[spec for name, spec in second.items() if name not in first],
        reshaped=[(a, b) for a, b in common if a.shape != b.shape],
        retyped=[(a, b) for a, b in common if a.shape == b.shape and a.dtype != b.dtype],
        comparable=[a.name for a, b in common if a.shape == b.shape],
    )


def contents(reader: Reader, names: Iterable[str]) -> Iterator[Contents]:
    """The numbers of each named leaf, as it is read."""
    specs = reader.specs()
    for name in names:
        norm, largest, not_finite = 0.0, 0.0, 0
        for box in row_boxes(specs[name].shape, BLOCK_ELEMENTS):
            block = _float64(reader.read(name, box))
            finite = np.isfinite(block)
            if not finite.all():
                not_finite += int(np.count_nonzero(~finite))
                block = block[finite]
            norm = math.hypot(norm, _norm(block))
            largest = max(largest, float(np.abs(block).max(initial=0.0)))
        yield Contents(name=name, norm=norm, largest=largest, not_finite=not_finite)


def differences(first: Reader, second: Reader, names: Iterable[str]) -> Iterator[Difference]:
    """How each named leaf differs, as it is read; both must have it in one shape (`Structure.comparable`)."""
    specs = first.specs()
    for name in names:
        different, largest, norm, not_finite = 0, 0.0, 0.0, 0
        for box in row_boxes(specs[name].shape, BLOCK_ELEMENTS):
            unequal, change = _change(first.read(name, box), second.read(name, box))
            finite = change[np.isfinite(change)]
            different += unequal
            not_finite += change.size - finite.size
            norm = math.hypot(norm, _norm(finite))
            largest = max(largest, float(np.abs(finite).max(initial=0.0)))
        yield Difference(
            name=name,
            size=specs[name].size,
            different=different,
            largest=largest,
            norm=norm,
            not_finite=not_finite,
        )


def total_contents(leaves: Iterable[Contents]) -> Contents:
    """The numbers of all leaves together."""
    leaves = list(leaves)
    return Contents(
        name="all leaves",
        norm=math.hypot(*(leaf.norm for leaf in leaves)),
        largest=max((leaf.largest for leaf in leaves), default=0.0),
        not_finite=sum(leaf.not_finite for leaf in leaves),
    )


def total_difference(leaves: Iterable[Difference]) -> Difference:
    """The differences of all leaves together."""
    leaves = list(leaves)
    return Difference(
        name="all leaves",
        size=sum(leaf.size for leaf in leaves),
        different=sum(leaf.different for leaf in leaves),
        largest=max((leaf.largest for leaf in leaves), default=0.0),
        norm=math.hypot(*(leaf.norm for leaf in leaves)),
        not_finite=sum(leaf.not_finite for leaf in leaves),
    )


# ---- blocks ---------------------------------------------------------------------------------------------------------


def _change(first: np.ndarray, second: np.ndarray) -> tuple[int, np.ndarray]:
    """How many elements are not equal, and second - first of these, float64 [unequal], finite or not."""
    if first.dtype.kind in "biu" and second.dtype.kind in "biu":
        unequal = first != second  # before any rounding
        a, b = _float64(first[unequal]), _float64(second[unequal])
    else:
        a, b = _float64(first), _float64(second)
        unequal = (a != b) & ~(np.isnan(a) & np.isnan(b))
        a, b = a[unequal], b[unequal]
    with np.errstate(invalid="ignore", over="ignore"):
        return a.size, b - a


def _float64(block: np.ndarray) -> np.ndarray:
    """[n] float64."""
    return block.reshape(-1).astype(np.float64)


def _norm(block: np.ndarray) -> float:
    """L2 norm of finite numbers."""
    with np.errstate(over="ignore"):
        return math.sqrt(np.dot(block, block))

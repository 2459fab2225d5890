"""The exact k-th largest magnitude of an array too big to sort, found by counting.

A `Search` holds an interval of magnitudes that must contain the answer, and shrinks it by exact counts of how many
entries are at least as large as some edges. Counts are integers, so they add up over slices, leaves, devices and hosts
in any order, and the answer is exact whatever the data. Where a sample proposes a narrow interval first, one pass of
counts usually proves the answer in it; otherwise the search says what is left and is asked again.

Magnitudes are handled as *codes*, integers in the order of the magnitudes: code 0 is zero and all subnormal numbers
(XLA flushes them), code 1 is the smallest normal float32, and so on. Infinity and NaN have no code and must not occur.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

_SMALLEST_NORMAL_BITS = 0x00800000
_INFINITY_BITS = 0x7F800000
CODES = (
    _INFINITY_BITS - _SMALLEST_NORMAL_BITS + 1
)  # codes are 0 .. CODES - 1; CODES stands for infinity

# Bins of one bracket. 2^19 int64 are 4 MiB; a sample's bracket is some 10^5 codes wide (1 % of a magnitude), so fewer
# bins would cost a second survey, and more only memory.
MAX_BINS = 1 << 19


def code_to_magnitude(code: int) -> np.float32:
    """The smallest magnitude with this code, +inf for CODES: float32."""
    bits = 0 if code == 0 else code + _SMALLEST_NORMAL_BITS - 1
    return np.uint32(bits).view(np.float32)


def magnitude_to_code(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The code of |x|, in a jitted computation."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.uint32)
    return jnp.where(
        bits < _SMALLEST_NORMAL_BITS,
        jnp.uint32(0),
        bits - jnp.uint32(_SMALLEST_NORMAL_BITS - 1),
    )


def code_of(x: np.ndarray) -> np.ndarray:
    """The same in numpy, of float32: int64."""
    bits = np.abs(x).view(np.uint32).astype(np.int64)
    return np.maximum(bits - (_SMALLEST_NORMAL_BITS - 1), 0)


@dataclasses.dataclass(frozen=True)
class Bracket:
    """Codes [low, high) in bins of 2^shift; `guess` is the code that the sample says is the answer."""

    low: int
    high: int
    shift: int
    guess: int

    @property
    def bins(self) -> int:
        return (self.high - self.low + (1 << self.shift) - 1) >> self.shift


class Search:
    """The search for one threshold: the int(density * d)-th largest of d magnitudes.

    Attributes:
      rank: k; 0 means that nothing is kept, and the threshold is +inf without any count.
      size: d.
      low, high: the answer's code is in [low, high).
      at_least_low: how many entries have a code of at least `low`.
    """

    def __init__(self, rank: int, size: int):
        """k, and d: how many magnitudes there are in all."""
        assert 0 <= rank <= size
        self.rank, self.size = rank, size
        self.low, self.high = 0, CODES
        self.at_least_low = size
        self._proposal: tuple[int, int, int] | None = None

    @property
    def is_done(self) -> bool:
        return self.rank == 0 or self.high - self.low == 1

    @property
    def threshold(self) -> np.float32:
        """Entries of at least this magnitude are kept, float32."""
        assert self.is_done, f"the search is still in codes [{self.low}, {self.high})"
        return np.float32(np.inf) if self.rank == 0 else code_to_magnitude(self.low)

    @property
    def kept(self) -> int:
        """How many entries are kept: at least `rank`, more where magnitudes tie at the threshold."""
        assert self.is_done
        return 0 if self.rank == 0 else self.at_least_low

    def propose(self, low: int, high: int, guess: int) -> None:
        """A sample's opinion: the answer is probably in [low, high), most likely `guess`."""
        self._proposal = (low, high, guess)

    def bracket(self) -> Bracket:
        """What to count next: the proposal where it can still be right, else all that is left."""
        low, high, guess = self.low, self.high, self.low
        if self._proposal is not None:
            p_low, p_high, p_guess = self._proposal
            if max(p_low, low) < min(p_high, high):
                low, high = max(p_low, low), min(p_high, high)
                guess = min(max(p_guess, low), high - 1)
        bracket = Bracket(low, high, 0, guess)
        while bracket.bins > MAX_BINS:
            bracket = dataclasses.replace(bracket, shift=bracket.shift + 1)
        return bracket

    def edges(self, number: int) -> list[int]:
        """At most `number` edges that cut what is left into equal parts."""
        width = self.high - self.low
        parts = min(number + 1, width)
        return [self.low + width * i // parts for i in range(1, parts)]

    def narrow(self, edges: np.ndarray | list[int], at_least: np.ndarray | list[int]) -> None:
        """Takes exact counts: at_least[i] entries have a code of at least edges[i]."""
        for edge, count in zip(edges, at_least, strict=True):
            edge, count = int(edge), int(count)
            if count >= self.rank and edge >= self.low:
                self.low, self.at_least_low = edge, count
            elif count < self.rank:
                self.high = min(self.high, edge)
        assert self.low < self.high, "counts of different data, or not monotone"

    def narrow_by_bins(self, bracket: Bracket, above: int, bins: np.ndarray) -> None:
        """Takes exact counts of a bracket: `above` entries beyond it, bins[i] in its i-th bin."""
        at_least = above + np.cumsum(bins[::-1])[::-1]  # at the lower edge of each bin
        edges = bracket.low + (np.arange(len(bins)) << bracket.shift)
        passing = np.flatnonzero(at_least >= self.rank)  # a prefix: at_least falls
        if len(passing) == 0:
            self.narrow([bracket.low], [int(at_least[0])])
            return
        last = passing[-1]
        self.narrow([int(edges[last])], [int(at_least[last])])
        if last + 1 < len(bins):
            self.narrow([int(edges[last + 1])], [int(at_least[last + 1])])
        else:
            self.narrow([bracket.high], [above])


def propose_from_sample(blocks: Sequence[np.ndarray], density: float) -> tuple[int, int, int]:
    """A bracket that holds the threshold with overwhelming probability, and the best guess in it.

    Args:
      blocks: uint32 [any] each, codes of a sample drawn in whole blocks spread over the data.
      density: the fraction of all entries that is kept.

    Returns:
      (low, high, guess). The half width is six standard errors of the kept share, measured between blocks since
      neighbours are alike, and never less than two sample entries.
    """
    codes = np.concatenate(blocks)
    codes[::-1].sort()  # largest first; a sample, so a sort is cheap
    rank = min(max(int(density * codes.size), 1), codes.size)
    guess = int(codes[rank - 1])
    share = (
        np.count_nonzero(codes >= guess) / codes.size
    )  # more than the density where magnitudes tie
    excess = [np.count_nonzero(block >= guess) - share * block.size for block in blocks]
    between = np.sqrt(np.square(excess).sum())
    within = np.sqrt(density * (1 - density) * codes.size)
    half = int(6 * max(between, within)) + 2
    low = 0 if rank + half > codes.size else int(codes[rank + half - 1])
    high = CODES if rank - half < 1 else int(codes[rank - half - 1]) + 1
    return low, high, guess


def answer_from_all(blocks: Sequence[np.ndarray], rank: int) -> tuple[int, int, int]:
    """The same from a sample that holds every entry: the answer itself, still to be proven by the counts."""
    if rank == 0:
        return 0, CODES, 0
    codes = np.concatenate(blocks)
    codes.sort()
    answer = int(codes[codes.size - rank])
    return answer, answer + 1, answer

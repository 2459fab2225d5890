"""How the experts interfere, gathered while the merge reads them anyway: from a sample of blocks, in float64.

Per leaf and for the whole model: norms of the task vectors, cosines between them, the share of elements on which two
experts disagree in sign, and the share of each task vector that a method kept. A block is 16,384 elements that begin at a
multiple of 16,384 in their tensor; of every tensor every k-th block is taken, with k from the share that was asked for, and
more of a small tensor (at least one block). Which blocks depends on nothing else, so the numbers agree between
any slicing, sharding and number of hosts to rounding in float64 (1e-9). A norm from a share s of the blocks is the square
root of the sampled sum over s; share 1 gives exact norms.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, UInt32

from merging.engine.packed import count, pack
from merging.engine.pieces import Tensor
from merging.engine.step import ONE_THREAD, Facts, Geometry, draw_for
from merging.engine.stream import LoadedPiece, padded_size, to_float32
from merging.engine.vectors import norms_and_cosines
from merging.kernels.element_index import ElementIndex
from merging.methods.method import TaskVectorMethod
from merging.methods.ties import trim

# Elements. Smaller blocks would touch more of the pieces, and each touch costs some twenty calls whatever its size;
# larger ones would leave too few of a small tensor.
BLOCK = 1 << 14
FEWEST_BLOCKS = 1  # of a tensor: 16,384 elements tell a cosine to 0.008


# Elements of one product of task vectors: a larger one makes BLAS start threads of its own, which get in the workers' way.
_GRAM_ELEMENTS = 1 << 12


def every_kth_block(tensor: Tensor, share: float) -> int:
    """k: every k-th block of this tensor is sampled."""
    blocks = -(-tensor.size // BLOCK)
    return max(1, min(round(1 / share), blocks // FEWEST_BLOCKS))


def sampled_runs(tensor: Tensor, start: int, size: int, share: float) -> list[slice]:
    """Which elements of the run [start, start + size) of a tensor are sampled, as slices relative to start."""
    step = every_kth_block(tensor, share) * BLOCK
    return [
        slice(max(begin, start) - start, min(begin + BLOCK, start + size) - start)
        for begin in range(start // step * step, start + size, step)
        if begin + BLOCK > start
    ]


class Statistics:
    """Sums of one leaf (or, added up, of the model) for N experts and M merges.

    One flat float64 vector, so that it adds up over pieces and hosts: Gram matrix of the sampled task vectors, numbers
    of elements (all, sampled, in conflict), then per merge and expert the number kept; and the Gram matrix scaled up
    to all elements, leaf by leaf, since leaves are sampled at different shares.
    """

    def __init__(self, experts: int, merges: int):
        self.experts, self.merges = experts, merges
        self.gram = np.zeros((experts, experts))
        self.counts = np.zeros(3)  # elements, sampled, in conflict
        self.kept = np.zeros((merges, experts))

    def add(self, other: Statistics) -> None:
        self.gram += other.gram
        self.counts += other.counts
        self.kept += other.kept

    def scaled_to_all(self) -> Statistics:
        """The same with every sum multiplied up from the sample to all elements."""
        result = Statistics(self.experts, self.merges)
        factor = self.counts[0] / self.counts[1] if self.counts[1] else 0.0
        result.gram, result.kept = self.gram * factor, self.kept * factor
        result.counts = np.array([self.counts[0], self.counts[1], self.counts[2] * factor])
        return result

    def to_vector(self) -> np.ndarray:
        return np.concatenate([self.gram.ravel(), self.counts, self.kept.ravel()])

    @classmethod
    def from_vector(cls, vector: np.ndarray, experts: int, merges: int) -> Statistics:
        result = cls(experts, merges)
        gram, counts, kept = np.split(vector, [experts**2, experts**2 + 3])
        result.gram = gram.reshape(experts, experts)
        result.counts, result.kept = counts, kept.reshape(merges, experts)
        return result

    def described(self, merge: int) -> dict[str, Any]:
        """As JSON, for one merge; `self` must be scaled to all elements."""
        norms, cosines = norms_and_cosines(self.gram)
        elements = self.counts[0]
        return {
            "elements": int(elements),
            "sampled": int(self.counts[1]),
            "norms": norms.tolist(),
            "cosines": cosines.tolist(),
            "sign_conflict_share": self.counts[2] / elements if elements else 0.0,
            "kept_share": (self.kept[merge] / elements if elements else self.kept[merge]).tolist(),
        }


def gather(
    loaded: LoadedPiece,
    methods: Sequence[TaskVectorMethod | None],
    facts: Sequence[Facts],
    share: float,
) -> Statistics:
    """The statistics of one piece; methods without task vectors (None) keep everything."""
    result = Statistics(len(loaded.experts), len(methods))
    runs = sampled_runs(loaded.tensor, loaded.piece.start, loaded.size, share)
    sampled = sum(run.stop - run.start for run in runs)
    result.counts[:2] = loaded.size, sampled
    if sampled == 0:
        return result
    stored = [
        np.concatenate([array[run] for run in runs]) for array in (loaded.base, *loaded.experts)
    ]
    numbers = np.stack([to_float32(array) for array in stored])
    vectors = numbers[1:] - numbers[0]  # [N, sampled], float32
    for at in range(0, sampled, _GRAM_ELEMENTS):
        exact = vectors[:, at : at + _GRAM_ELEMENTS].astype(np.float64)
        result.gram += exact @ exact.T
    result.counts[2] = np.count_nonzero((vectors.max(0) > 0) & (vectors.min(0) < 0))
    nonzero = None
    for i, (method, fact) in enumerate(zip(methods, facts, strict=True)):
        if method is not None and type(method).vectors is not TaskVectorMethod.vectors:
            result.kept[i] = _count_kept(loaded, method, fact, runs, stored)
        elif fact.thresholds is not None:
            survives = (np.abs(vectors) >= fact.thresholds[:, None]) & (vectors != 0)
            result.kept[i] = np.count_nonzero(survives, axis=1)
        else:
            nonzero = np.count_nonzero(vectors, axis=1) if nonzero is None else nonzero
            result.kept[i] = nonzero
    return result


def _count_kept(
    loaded: LoadedPiece,
    method: TaskVectorMethod,
    fact: Facts,
    runs: Sequence[slice],
    stored: Sequence[np.ndarray],
) -> np.ndarray:
    """How many sampled entries of each task vector survive a random drop (and a trim) and are not zero: [N]."""
    sampled = len(stored[0])
    padded = padded_size(
        max(sampled, BLOCK)
    )  # one size, hence one compilation, for what a piece holds of a block
    index = np.zeros(padded, np.uint64)
    index[:sampled] = np.concatenate([np.arange(run.start, run.stop) for run in runs])
    index += np.uint64(loaded.piece.start)
    base, *experts = (np.concatenate([a, np.zeros(padded - sampled, a.dtype)]) for a in stored)
    words = _kept_step(
        method,
        fact,
        base,
        tuple(experts),
        loaded.keys,
        index.astype(np.uint32),
        (index >> np.uint64(32)).astype(np.uint32) if loaded.geometry.wide else None,
    )
    return count([np.asarray(word)[:sampled] for word in words], len(experts))


@functools.partial(jax.jit, compiler_options=ONE_THREAD)
def _kept_step(
    method: TaskVectorMethod,
    fact: Facts,
    base: Array,
    experts: tuple[Array, ...],
    keys: UInt32[Array, "n 2"],
    low: UInt32[Array, "m"],  # noqa: F821
    high: UInt32[Array, "m"] | None,  # noqa: F821
) -> list[UInt32[Array, "m"]]:  # noqa: F821
    """Words of counted bits, one an expert: whether its entry survives the method's drop and trim and is not zero."""
    geometry = Geometry((base.shape[0],), (1,), wide=high is not None)
    survey = fact.survey(geometry)
    draw = draw_for(keys, ElementIndex(low, high), geometry)
    vectors = method.vectors(base, experts, survey=survey, draw=draw)
    if survey.thresholds:
        vectors = trim(vectors, survey)
    return pack([vector != 0 for vector in vectors])

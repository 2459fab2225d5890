"""How the experts interfere, gathered while the merge reads them anyway: from a sample of blocks, in float64.

Per leaf and for the whole model: norms of the task vectors, cosines between them, the share of elements on which two
experts disagree in sign, and the share of each task vector that a method kept. A block is 4,096 elements that begin at a
multiple of 4,096 in their tensor; of every tensor every k-th block is taken, with k from the share that was asked for, and
more of a small tensor (at least 16 blocks, or all). Which blocks depends on nothing else, so the numbers agree between
any slicing, sharding and number of hosts to rounding in float64 (1e-9). A norm from a share s of the blocks is the square
root of the sampled sum over s; share 1 gives exact norms.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

from merging.engine.pieces import Tensor
from merging.engine.step import Facts, Geometry, draw_for
from merging.engine.stream import LoadedPiece, padded_size
from merging.kernels.element_index import ElementIndex
from merging.methods.method import TaskVectorMethod
from merging.methods.ties import trim

BLOCK = 1 << 12
FEWEST_BLOCKS = 16  # of a tensor; fewer would make the numbers of a single small leaf worthless


def every_kth_block(tensor: Tensor, share: float) -> int:
    """k: every k-th block of this tensor is sampled."""
    blocks = -(-tensor.size // BLOCK)
    return max(1, min(round(1 / share), blocks // FEWEST_BLOCKS))


def sampled_elements(tensor: Tensor, start: int, size: int, share: float) -> np.ndarray:
    """Which elements of the run [start, start + size) of a tensor are sampled: int64, relative to start."""
    step = every_kth_block(tensor, share) * BLOCK
    first = start // step * step
    runs = [
        np.arange(max(begin, start), min(begin + BLOCK, start + size)) - start
        for begin in range(first, start + size, step)
        if begin + BLOCK > start
    ]
    return np.concatenate(runs) if runs else np.zeros(0, np.int64)


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
        norms = np.sqrt(np.diag(self.gram))
        product = np.outer(norms, norms)
        cosine = np.divide(self.gram, product, out=np.zeros_like(product), where=product > 0)
        elements = self.counts[0]
        return {
            "elements": int(elements),
            "sampled": int(self.counts[1]),
            "norms": norms.tolist(),
            "cosines": cosine.tolist(),
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
    tensor, experts = loaded.tensor, len(loaded.experts)
    result = Statistics(experts, len(methods))
    chosen = sampled_elements(tensor, loaded.piece.start, loaded.size, share)
    result.counts[:2] = loaded.size, len(chosen)
    if len(chosen) == 0:
        return result
    base = loaded.base[chosen].astype(np.float32)
    vectors = np.stack([e[chosen].astype(np.float32) - base for e in loaded.experts])
    exact = vectors.astype(np.float64)
    result.gram = exact @ exact.T
    result.counts[2] = np.count_nonzero((vectors > 0).any(0) & (vectors < 0).any(0))
    result.kept[:] = np.count_nonzero(vectors, axis=1)
    asked = [i for i, method in enumerate(methods) if method is not None]
    if asked:
        kept = _kept(loaded, [methods[i] for i in asked], [facts[i] for i in asked], chosen)
        for i, survives in zip(asked, kept, strict=True):
            result.kept[i] = np.count_nonzero(survives[:, : len(chosen)], axis=1)
    return result


def _kept(
    loaded: LoadedPiece,
    methods: Sequence[TaskVectorMethod],
    facts: Sequence[Facts],
    chosen: np.ndarray,
) -> list[np.ndarray]:
    index = np.zeros(padded_size(len(chosen)), np.int64)
    index[: len(chosen)] = chosen
    flat = (loaded.piece.start + index).astype(np.uint64)
    kept = _kept_step(
        tuple(methods),
        tuple(facts),
        loaded.base[index],
        tuple(expert[index] for expert in loaded.experts),
        loaded.keys,
        flat.astype(np.uint32),
        (flat >> np.uint64(32)).astype(np.uint32) if loaded.geometry.wide else None,
    )
    return [np.asarray(k) for k in kept]


@functools.partial(jax.jit)
def _kept_step(
    methods: tuple[TaskVectorMethod, ...],
    facts: tuple[Facts, ...],
    base: Array,
    experts: tuple[Array, ...],
    keys: UInt32[Array, "n 2"],
    low: UInt32[Array, "m"],  # noqa: F821
    high: UInt32[Array, "m"] | None,  # noqa: F821
) -> list[Bool[Array, "n m"]]:
    """Which entries of the task vectors survive each method's drop and trim and are not zero."""
    geometry = Geometry((base.shape[0],), (1,), wide=high is not None)
    draw = draw_for(keys, ElementIndex(low, high), geometry)
    result = []
    for method, fact in zip(methods, facts, strict=True):
        survey = fact.survey(geometry)
        vectors = method.vectors(base, experts, survey=survey, draw=draw)
        if survey.thresholds:
            vectors = trim(vectors, survey)
        result.append(jnp.stack([vector != 0 for vector in vectors]))
    return result

"""How task vectors lie to one another: norms, cosines and sign conflicts of each pair, of arrays on devices.

Where a merge reads from disk it samples such numbers as it goes (`engine.statistics`); here all elements are in memory and all count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskVectors:
    """Facts of N task vectors over all float leaves.

    Attributes:
      norms: float64 [N].
      cosines: float64 [N, N].
      sign_conflict: float64 [N, N], of the elements that neither has at zero the share with opposite signs.
    """

    norms: np.ndarray
    cosines: np.ndarray
    sign_conflict: np.ndarray


def task_vectors_of(base: Any, experts: Sequence[Any]) -> TaskVectors:
    """Compares the task vectors of trees that lie alike. Sums are float32 within a leaf, float64 over leaves."""
    leaves = zip(jax.tree.leaves(base), *map(jax.tree.leaves, experts), strict=True)
    found = [
        _of_leaf(first, tuple(rest))
        for first, *rest in leaves
        if jnp.issubdtype(first.dtype, jnp.floating)
    ]
    gram, both, opposite = np.sum([np.asarray(each, np.float64) for each in found], 0)
    norms, cosines = norms_and_cosines(gram)
    return TaskVectors(
        norms=norms,
        cosines=cosines,
        sign_conflict=np.divide(opposite, both, out=np.zeros_like(both), where=both > 0),
    )


def norms_and_cosines(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N] and [N, N] from inner products [N, N]; the cosine with a vector of zeros is 0."""
    norms = np.sqrt(np.diag(gram))
    product = np.outer(norms, norms)
    return norms, np.divide(gram, product, out=np.zeros_like(product), where=product > 0)


@jax.jit
def _of_leaf(base: Array, experts: tuple[Array, ...]) -> Float[Array, "3 n n"]:
    """Inner products, elements that neither of two has at zero, and those where their signs differ."""
    start = base.astype(jnp.float32)
    vectors = [expert.astype(jnp.float32) - start for expert in experts]
    signs = [jnp.sign(vector) for vector in vectors]
    rows = []
    for i, (vector, sign) in enumerate(zip(vectors, signs, strict=True)):
        pairs = []
        for j in range(len(vectors)):
            if j < i:
                pairs.append(rows[j][i])
                continue
            agreement = sign * signs[j]
            pairs.append(
                jnp.stack(
                    [
                        jnp.sum(vector * vectors[j]),
                        jnp.sum(jnp.abs(agreement)),
                        jnp.sum(agreement < 0, dtype=jnp.float32),
                    ]
                )
            )
        rows.append(pairs)
    return jnp.moveaxis(jnp.stack([jnp.stack(row) for row in rows]), -1, 0)

"""Keep masks for DARE that depend on nothing but what is masked.

A draw is a 32-bit hash of (seed, position of the expert, path of the tensor, flat index of the element in that
tensor). It does not depend on slices, shardings, hosts, the order of leaves or whether layers are stacked, and it is
computed inside the merge: no mask is ever stored and no random state is threaded.

The seed, the expert and the path enter through two 32-bit key words taken from BLAKE2b. The element index is mixed with
them by three rounds of xor-shift and multiply (the constants are Chris Wellons' `triple32`,
https://github.com/skeeto/hash-prospector), the second key word entering after the first round, so that two keys give
unrelated sequences and not the same one in another order. Under one key the 2^32 draws of a tensor are all different:
the kept share of a whole tensor therefore varies a little less than that of independent draws would.

Left out: cryptographic strength.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax.numpy as jnp
import numpy as np

# jax.Array or numpy.ndarray: everything here is operators only, so that both give the same bits.
AnyArray = Any

GOLDEN = np.uint32(0x9E3779B9)  # 2^32 / golden ratio: spreads the high index word over the key


def tensor_key(*, seed: int, expert: int, path: str) -> np.ndarray:
    """The two key words of one tensor of one expert: uint32 [2].

    Args:
      seed: the merge's seed, any integer of 64 bits.
      expert: position in the list of experts.
      path: canonical path of the tensor in the base, with the layer's index in it (`paths.canonical`).
    """
    text = f"{seed}\0{expert}\0{path}".encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), dtype="<u4").astype(
        np.uint32
    )


def hash32(key0: AnyArray, key1: AnyArray, low: AnyArray, high: AnyArray | None = None) -> AnyArray:
    """Hash of a 64-bit element index under a key: uint32 of `low`'s shape.

    Args:
      key0, key1: uint32 scalars (or arrays that broadcast: one key a layer).
      low: uint32 low word of the element index.
      high: uint32 high word; None where the tensor has at most 2^32 elements, which saves the operations.
    """
    x = low ^ key0
    x = x ^ (x >> np.uint32(17))
    x = x * np.uint32(0xED5AD4BB)
    x = x ^ (key1 if high is None else key1 + high * GOLDEN)
    x = x ^ (x >> np.uint32(11))
    x = x * np.uint32(0xAC4C1B51)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x31848BAB)
    return x ^ (x >> np.uint32(14))


def keep_limit(keep: AnyArray) -> AnyArray:
    """The largest draw that is kept, so that a share `keep` of all 2^32 is: uint32 [].

    Args:
      keep: probability, float32 in (0, 1]; at 1 everything is kept, below 2^-32 one draw is.
    """
    scaled = jnp.asarray(keep, jnp.float32) * jnp.float32(2.0**32)  # exact: a power of two
    count = jnp.clip(scaled, jnp.float32(1), jnp.float32(2.0**32 - 2.0**8)).astype(jnp.uint32)
    return jnp.where(keep >= 1, jnp.uint32(0xFFFFFFFF), count - jnp.uint32(1))


def keep_mask(
    key0: AnyArray, key1: AnyArray, low: AnyArray, high: AnyArray | None, keep: AnyArray
) -> AnyArray:
    """True where an element is kept, with probability `keep`; arguments as `hash32` and `keep_limit`."""
    return hash32(key0, key1, low, high) <= keep_limit(keep)

"""The flat index of every element of a box in the tensor it was cut from, as two 32-bit words.

JAX has no 64-bit integers by default and TPUs emulate them, so an index is a low and a high uint32 word, and the high
word is left out where no element of the tensor needs it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


class ElementIndex(NamedTuple):
    """Low and high words of flat indices; `high` is None where all are below 2^32."""

    low: UInt32[Array, "*shape"]
    high: UInt32[Array, "*shape"] | None


def element_index(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: tuple[Array, Array],
    *,
    wide: bool,
) -> ElementIndex:
    """offset + sum_d iota_d * strides_d, modulo 2^64.

    Args:
      shape: of the box.
      strides: elements of the tensor per step along each axis of the box; 0 along a stacked axis of layers.
      offset: (low, high) uint32 words of the flat index of the box's first element.
      wide: whether the tensor has more than 2^32 elements. Without it `high` is None.
    """
    low = jnp.broadcast_to(offset[0], shape)
    high = jnp.broadcast_to(offset[1], shape) if wide else None
    for axis, stride in enumerate(strides):
        if shape[axis] == 1 or stride == 0:
            continue
        step = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        term_low, term_high = multiply(step, stride, wide=wide)
        total = low + term_low
        if wide:
            carry = (total < low).astype(jnp.uint32)
            high = high + term_high + carry
        low = total
    return ElementIndex(low, high)


def multiply(
    x: UInt32[Array, "*shape"], factor: int, *, wide: bool
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"] | None]:
    """The 64-bit product of 32-bit x and a factor below 2^64, by 16-bit halves: (low, high)."""
    low_factor = factor & 0xFFFFFFFF
    product = x * jnp.uint32(low_factor)
    if not wide:
        return product, None
    a0, a1 = x & jnp.uint32(0xFFFF), x >> jnp.uint32(16)
    b0, b1 = jnp.uint32(low_factor & 0xFFFF), jnp.uint32(low_factor >> 16)
    middle = a1 * b0 + ((a0 * b0) >> jnp.uint32(16))  # < 2^32
    middle_low = a0 * b1 + (middle & jnp.uint32(0xFFFF))  # < 2^32
    high = a1 * b1 + (middle >> jnp.uint32(16)) + (middle_low >> jnp.uint32(16))
    return product, high + x * jnp.uint32(factor >> 32)

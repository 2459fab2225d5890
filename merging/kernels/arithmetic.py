"""float32 arithmetic that gives the same bits wherever XLA puts it.

Promise: a sum of products written with `unfused`, and a quotient written with `divide`, equal the plain numpy float32
transcription bit for bit on XLA:CPU, jitted or eager, whatever XLA fuses around them. Left out: subnormal numbers, which XLA:CPU flushes to zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A setting of a merge: a Python number outside jit, a float32 scalar inside.
Number = int | float | Array


def unfused(product: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns `product` unchanged, rounded on its own.

    XLA:CPU contracts a product that is then added into one fused multiply-add, which skips the product's rounding: 2 to
    9 % of elements differ between jit and eager. A select between the multiply and the add prevents the contraction
    and costs nothing; `reduce_precision`, `optimization_barrier` and bitcasts were seen not to.
    """
    return jnp.where(product == product, product, jnp.float32(jnp.nan))


def divide(dividend: Float[Array, "*shape"], divisor: Number) -> Float[Array, "*shape"]:
    """`dividend / divisor` for one divisor of all elements, correctly rounded.

    XLA turns a division by a constant, or by any number that is the same for all elements, into a product with its
    reciprocal, and (a / b) / c into a / (b * c): each rounds twice, and a fifth to a third of elements differ. A select
    on either side that looks as if it depended on the data prevents both.
    """
    constant = jnp.asarray(divisor, jnp.float32)
    return unfused(dividend) / jnp.where(dividend == dividend, constant, jnp.float32(jnp.nan))


def float32(x: Array) -> Float[Array, "*shape"]:
    """`x` in float32; exact for bfloat16 and float16."""
    return jax.lax.convert_element_type(x, jnp.float32)

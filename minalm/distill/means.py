"""Sums and means over the rows of the whole batch, on every mesh."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped

from minalm.parallel.collectives import fsdp_sum


def total(values: Shaped[Array, "*shape"]) -> Float32[Array, ""]:
    """The sum over the rows of all devices."""
    return fsdp_sum(jnp.sum(values.astype(jnp.float32)))


def mean(
    values: Float[Array, "*shape"], counted: Shaped[Array, "*shape"], count: Float32[Array, ""]
) -> Float[Array, ""]:
    """The sum of the counted values of these rows over the count of the whole batch; 0 where nothing is counted."""
    counted = counted.astype(jnp.float32)
    return total(jnp.where(counted > 0.0, values * counted, 0.0)) / jnp.maximum(count, 1.0)

"""Sums over chunks of tokens, and chunks merged into groups."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from minalm.types import TokenStats


def sum_by(
    values: Float[Array, "batch item"], index: Int[Array, "batch item"], size: int
) -> Float[Array, "batch size"]:
    """Sums of values by index within each row; index -1 is left out."""
    rows = jnp.arange(values.shape[0])[:, None]
    bins = jnp.zeros((values.shape[0], size + 1), values.dtype)
    return bins.at[rows, jnp.where(index < 0, size, index)].add(values)[:, :size]


def chunk_sums(
    stats: TokenStats, chunk: Int[Array, "batch time"], chunk_end: Int[Array, "batch chunk"]
) -> tuple[Float32[Array, "batch chunk"], Float32[Array, "batch chunk"], Float32[Array, "batch chunk"]]:
    """(log-probability, number of targets, log boundary mass at the end) of each chunk of one side (section 3.2)."""
    size = chunk_end.shape[1]
    logp = sum_by(stats.logp, chunk, size)
    count = sum_by(jnp.ones_like(stats.logp), chunk, size)
    boundary = jnp.take_along_axis(stats.boundary, jnp.maximum(chunk_end, 0), axis=1)
    return logp, count, boundary


class Groups(NamedTuple):
    """Chunks merged into groups; a group stands in the column of its number."""

    index: Int[Array, "batch chunk"]  # the group of each chunk
    end: Int[Array, "batch chunk"]  # per group: its last chunk that has targets, -1 where it has none

    def total(self, values: Float[Array, "batch chunk"]) -> Float[Array, "batch chunk"]:
        return sum_by(values, self.index, values.shape[1])

    def at_end(self, values: Float[Array, "batch chunk"]) -> Float[Array, "batch chunk"]:
        return jnp.take_along_axis(values, jnp.maximum(self.end, 0), axis=1)


def merge(filled: Bool[Array, "batch chunk"], may_end: Bool[Array, "batch chunk"]) -> Groups:
    """The group of a chunk is the number of chunks before it that may end (section 3.3).

    The last group of a row is kept though nothing ended it.
    """
    ends = may_end.astype(jnp.int32)
    index = jnp.cumsum(ends, axis=1) - ends
    rows, columns = jnp.arange(filled.shape[0])[:, None], jnp.arange(filled.shape[1])
    end = jnp.full(filled.shape, -1).at[rows, index].max(jnp.where(filled, columns, -1))
    return Groups(index, end)

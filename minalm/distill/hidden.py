"""The distance between hidden states of teacher and student at the last token of each chunk (section 3.4).

States are [batch, depth, chunk, embed]: the last state alone, or those of the embeddings and of every layer.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from minalm.distill.means import total
from minalm.parallel.collectives import fsdp_sum
from minalm.types import AlignedChunks

LatentsNorm = Literal["l2_channelwise", "l2", "l1", "l1_channelwise"]


class Normalizer(NamedTuple):
    """What `latents` divides by, of the whole batch."""

    chunks: Float32[Array, ""]  # the number of compared chunks
    size: Float32[Array, "1 depth 1 embed_or_1"]  # the mean of |t|^n, of each channel or over all channels


def compared(chunks: AlignedChunks) -> Bool[Array, "batch chunk"]:
    """The chunks whose hidden states are compared: those that end on both sides, that of bos included."""
    return (chunks.student_chunk_end >= 0) & (chunks.teacher_chunk_end >= 0)


def channel_sums(
    values: Float32[Array, "batch depth chunk embed"], counted: Bool[Array, "batch chunk"]
) -> Float32[Array, "1 depth 1 embed"]:
    """Sums over the counted chunks of all devices, of each layer and channel."""
    return fsdp_sum(jnp.sum(jnp.where(counted[:, None, :, None], values, 0.0), axis=(0, 2), keepdims=True))


def power(states: Float[Array, "*shape"], norm: LatentsNorm) -> Float32[Array, "*shape"]:
    """|x|^n of hidden states or their differences, n = 1 or 2."""
    return (jnp.square if norm.startswith("l2") else jnp.abs)(states.astype(jnp.float32))


def normalizer(
    teacher: Float[Array, "batch depth chunk embed"], counted: Bool[Array, "batch chunk"], norm: LatentsNorm
) -> Normalizer:
    """The number of compared chunks of all rows, and the size of the teacher's states at their ends."""
    count = total(counted)
    size = channel_sums(power(teacher, norm), counted) / jnp.maximum(count, 1.0)
    return Normalizer(count, size if norm.endswith("channelwise") else jnp.mean(size, axis=-1, keepdims=True))


def latents(
    student: Float[Array, "batch depth chunk embed"],
    teacher: Float[Array, "batch depth chunk embed"],
    counted: Bool[Array, "batch chunk"],
    norm: LatentsNorm,
    normalizer: Normalizer,
) -> Float[Array, ""]:
    """The mean over layers, compared chunks and channels of |s - t|^n / (size + 1e-8)."""
    difference = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    distance = channel_sums(power(difference, norm), counted) / jnp.maximum(normalizer.chunks, 1.0)
    return jnp.mean(distance / (normalizer.size + 1e-8))

"""Microbatches: the rows of each device in parts, read one after the other, and the order of teacher and student."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from minalm.types import Batch, ModelOutput


def split(rows: PyTree, parts: int) -> PyTree:
    """This device's rows, [row, ...], as [part, row, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), rows)


def join(rows: PyTree) -> PyTree:
    """The way back."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)


def in_parts(read: Callable[[Batch], ModelOutput], batch: Batch, parts: int) -> ModelOutput:
    """What a model says of a batch, read a part at a time."""
    return read(batch) if parts == 1 else join(jax.lax.map(read, split(batch, parts)))


def after(teacher: ModelOutput, batch: Batch) -> Batch:
    """The batch, for a student that runs when the teacher is done, whose logits are then gone from memory.

    Adds to the student's inputs a number of the teacher's that is 0 unless its log-probabilities hold a NaN: XLA on CPU
    drops an `optimization_barrier` before it chooses the order of a program.
    """
    read = teacher.stats.logp if teacher.byte_targets is None else teacher.byte_targets.open
    done = jnp.isnan(jnp.sum(read)).astype(jnp.int32)
    return eqx.tree_at(lambda batch: batch.student.inputs, batch, batch.student.inputs + done)

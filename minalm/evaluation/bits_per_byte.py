"""How close a student is to its teacher on held-out text, both sides measured on the same stretches of bytes."""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32

from minalm.distill.chunks import chunk_sums
from minalm.errors import InputError
from minalm.models.contract import Model, read
from minalm.models.head import VocabularyMask
from minalm.parallel.collectives import fsdp_sum
from minalm.parallel.mesh import ROWS, shard_map, shard_rows, specs
from minalm.types import Batch


def batch_sums(
    student: Model,
    teacher: Model | None,
    student_mask: VocabularyMask,
    teacher_mask: VocabularyMask | None,
    batch: Batch,
    dtype: jnp.dtype,
) -> dict[str, Float32[Array, ""]]:
    """Sums over the chunks of text: nats of each side, |log p_S - log p_T|, bytes, chunks. Runs inside `shard_map`."""
    chunks = batch.chunks
    counted = chunks.text_bytes > 0

    def nats(model, mask, tokens, chunk, chunk_end):
        logp, targets, _ = chunk_sums(read(model, mask, tokens, dtype).stats, chunk, chunk_end)
        return -logp, targets > 0.0

    ours, complete = nats(student, student_mask, batch.student, chunks.student_chunk, chunks.student_chunk_end)
    counted = counted & complete
    sums = {"student": ours}
    if teacher is not None:
        theirs, complete = nats(teacher, teacher_mask, batch.teacher, chunks.teacher_chunk, chunks.teacher_chunk_end)
        counted = counted & complete
        sums |= {"teacher": theirs, "difference": jnp.abs(ours - theirs)}
    sums |= {"bytes": chunks.text_bytes.astype(jnp.float32), "chunks": jnp.ones_like(ours)}
    return {name: fsdp_sum(jnp.sum(jnp.where(counted, value, 0.0))) for name, value in sums.items()}


@functools.partial(jax.jit, static_argnames=("mesh", "dtype"))
def _sums(models: tuple, batch: Batch, mesh: Mesh, dtype: jnp.dtype) -> dict[str, Float32[Array, ""]]:
    layout = *specs(models, mesh), ROWS
    return shard_map(functools.partial(batch_sums, dtype=dtype), mesh, in_specs=layout, out_specs=P())(*models, batch)


def measure(
    student: Model,
    teacher: Model | None,
    student_mask: VocabularyMask,
    teacher_mask: VocabularyMask | None,
    batches: Iterable[Batch],
    mesh: Mesh,
    dtype: jnp.dtype,
) -> dict[str, float]:
    """`student` and `teacher`: bits per byte of the text. `agreement`: mean |log p_S - log p_T| of a chunk, in nats.

    Raises InputError if the batches hold no text that is in a chunk.
    """
    models = student, teacher, student_mask, teacher_mask
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in jax.device_get(_sums(models, shard_rows(batch, mesh), mesh, dtype)).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    if not totals.get("bytes"):
        raise InputError("there is no held-out text that both tokenizers spell: give other text to evaluate on")
    to_bits = 1.0 / (math.log(2.0) * totals["bytes"])
    result = {side: totals[side] * to_bits for side in ("student", "teacher") if side in totals}
    if teacher is not None:
        result["agreement"] = totals["difference"] / max(totals["chunks"], 1.0)
    return result

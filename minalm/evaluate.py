"""How close a student is to its teacher on held-out text, both sides measured on the same stretches of bytes."""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float32

from minalm.head import Entries, token_stats
from minalm.losses import chunk_sums
from minalm.model import Transformer
from minalm.sharding import ROWS, P, on_mesh, place_rows, rows_sum, specs
from minalm.text import InputError
from minalm.types import Batch, Tokens, TokenStats


def read(model: Transformer, entries: Entries, tokens: Tokens, dtype: jnp.dtype) -> TokenStats:
    """A model's token statistics for one side of a batch. Runs inside shard_map."""
    x, _ = model.trunk(tokens.inputs, tokens.ngram, None, dtype)
    return token_stats(model.finish(x), tokens.targets, model.unembedding, entries, model.config.final_softcap)


def batch_sums(
    student: Transformer,
    teacher: Transformer | None,
    student_entries: Entries,
    teacher_entries: Entries | None,
    batch: Batch,
    dtype: jnp.dtype,
) -> dict[str, Float32[Array, ""]]:
    """Sums over the chunks of text: nats of each side, |log p_S - log p_T|, bytes, chunks. Runs inside shard_map."""
    chunks = batch.chunks
    counted = chunks.text_bytes > 0

    def nats(model, entries, tokens, chunk, close):
        logp, targets, _ = chunk_sums(read(model, entries, tokens, dtype), chunk, close)
        return -logp, targets > 0.0

    ours, complete = nats(student, student_entries, batch.student, chunks.student_chunk, chunks.student_close)
    counted = counted & complete
    sums = {"student": ours}
    if teacher is not None:
        theirs, complete = nats(teacher, teacher_entries, batch.teacher, chunks.teacher_chunk, chunks.teacher_close)
        counted = counted & complete
        sums |= {"teacher": theirs, "difference": jnp.abs(ours - theirs)}
    sums |= {"bytes": chunks.text_bytes.astype(jnp.float32), "chunks": jnp.ones_like(ours)}
    return {name: rows_sum(jnp.sum(jnp.where(counted, value, 0.0))) for name, value in sums.items()}


@functools.partial(jax.jit, static_argnames=("mesh", "dtype"))
def _sums(models: tuple, batch: Batch, mesh: Mesh, dtype: jnp.dtype) -> dict[str, Float32[Array, ""]]:
    layout = *specs(models, mesh), ROWS
    return on_mesh(functools.partial(batch_sums, dtype=dtype), mesh, in_specs=layout, out_specs=P())(*models, batch)


def measure(
    student: Transformer,
    teacher: Transformer | None,
    student_entries: Entries,
    teacher_entries: Entries | None,
    batches: Iterable[Batch],
    mesh: Mesh,
    dtype: jnp.dtype,
) -> dict[str, float]:
    """`student` and `teacher`: bits per byte of the text. `agreement`: mean |log p_S - log p_T| of a chunk, in nats.

    Raises InputError if the batches hold no text that is in a chunk.
    """
    models = student, teacher, student_entries, teacher_entries
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in jax.device_get(_sums(models, place_rows(batch, mesh), mesh, dtype)).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    if not totals.get("bytes"):
        raise InputError("there is no held-out text that both tokenizers spell: give other text to evaluate on")
    to_bits = 1.0 / (math.log(2.0) * totals["bytes"])
    result = {side: totals[side] * to_bits for side in ("student", "teacher") if side in totals}
    if teacher is not None:
        result["agreement"] = totals["difference"] / max(totals["chunks"], 1.0)
    return result

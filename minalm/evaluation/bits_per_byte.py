"""How close a student is to its teacher on held-out text, both sides measured on the same stretches of bytes."""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32

from minalm.distill.chunks import chunk_sums
from minalm.errors import InputError
from minalm.models.contract import Model, read
from minalm.models.head import PrefixTree, VocabularyMask
from minalm.parallel.collectives import fsdp_sum, tp_offset, tp_sum
from minalm.parallel.mesh import ROWS, shard_map, shard_rows, specs
from minalm.types import Batch, Tokens, TokenStats

BINS = 15  # of the calibration error


def batch_sums(
    student: Model,
    teacher: Model | None,
    student_mask: VocabularyMask,
    teacher_mask: VocabularyMask | None,
    tree: PrefixTree | None,
    batch: Batch,
    dtype: jnp.dtype,
) -> dict[str, Float32[Array, "..."]]:
    """Sums over the chunks of text: nats of each side, |log p_S - log p_T|, bytes, chunks; and over positions, for
    `measure`'s other numbers. Runs inside `shard_map`."""
    chunks = batch.chunks
    counted = chunks.text_bytes > 0

    def nats(stats, chunk, chunk_end):
        logp, targets, _ = chunk_sums(stats, chunk, chunk_end)
        return -logp, targets > 0.0

    targets = None
    if teacher is not None:
        places = None if tree is None else (tree, batch.bytes)
        theirs = read(teacher, teacher_mask, batch.teacher, dtype, bytes_at=places)
        targets = theirs.byte_targets
    ours = read(student, student_mask, batch.student, dtype, targets=targets)
    own, complete = nats(ours.stats, chunks.student_chunk, chunks.student_chunk_end)
    counted = counted & complete
    sums = {"student": own}
    if teacher is not None:
        other, complete = nats(theirs.stats, chunks.teacher_chunk, chunks.teacher_chunk_end)
        counted = counted & complete
        sums |= {"teacher": other, "difference": jnp.abs(own - other)}
    sums |= {"bytes": chunks.text_bytes.astype(jnp.float32), "chunks": jnp.ones_like(own)}
    sums = {name: jnp.sum(jnp.where(counted, value, 0.0)) for name, value in sums.items()}
    sums |= boundary_bins(ours.stats, batch.student, student_mask)
    if targets is not None:
        sums |= {"greedy": jnp.sum(ours.byte_scores.greedy & targets.counted), "places": jnp.sum(targets.counted)}
    return {name: fsdp_sum(value.astype(jnp.float32)) for name, value in sums.items()}


def boundary_bins(stats: TokenStats, tokens: Tokens, mask: VocabularyMask) -> dict[str, Float32[Array, " bin"]]:
    """The boundary mass at the positions that count, and how often a boundary entry did come next, summed up in BINS
    bins of the mass."""
    local = tokens.targets - tp_offset(len(mask.boundary))
    held = (local >= 0) & (local < len(mask.boundary))
    came = tp_sum(jnp.where(held & mask.boundary[jnp.where(held, local, 0)], 1.0, 0.0))
    mass = jnp.exp(stats.boundary)
    place = jnp.minimum(mass * BINS, BINS - 1.0).astype(jnp.int32)
    inside = (place[..., None] == jnp.arange(BINS)) & (tokens.weight > 0.0)[..., None]
    sums = {"expected": mass[..., None], "came": came[..., None], "positions": 1.0}
    return {name: jnp.sum(jnp.where(inside, value, 0.0), axis=(0, 1)) for name, value in sums.items()}


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
    tree: PrefixTree | None = None,
) -> dict[str, float]:
    """`student` and `teacher`: bits per byte of the text. `agreement`: mean |log p_S - log p_T| of a chunk, in nats.
    `greedy`: the share of places at which a byte student's most probable next byte is the one that the teacher implies.
    `calibration`: the expected calibration error of the student's boundary mass (Guo et al. 2017, arXiv 1706.04599).

    Raises InputError if the batches hold no text that is in a chunk.
    """
    models = student, teacher, student_mask, teacher_mask, tree
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        for name, value in jax.device_get(_sums(models, shard_rows(batch, mesh), mesh, dtype)).items():
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
    if not totals.get("bytes"):
        raise InputError("there is no held-out text that both tokenizers spell: give other text to evaluate on")
    to_bits = 1.0 / (math.log(2.0) * totals["bytes"])
    result = {side: float(totals[side] * to_bits) for side in ("student", "teacher") if side in totals}
    result["calibration"] = float(np.abs(totals["expected"] - totals["came"]).sum() / totals["positions"].sum())
    if teacher is not None:
        result["agreement"] = float(totals["difference"] / max(totals["chunks"], 1.0))
    if tree is not None:
        result["greedy"] = float(totals["greedy"] / max(totals["places"], 1.0))
    return result

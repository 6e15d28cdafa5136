"""What is particular to training a Bolmo (models/bolmo.py): its teacher in stage 1, its losses, what to log.

In stage 1 patches end where the teacher's tokens do, so that a token and a patch are one event: "these bytes, and the
patch ends on the last one" has as its probability the product of the fused probabilities of its bytes. Over all strings
of bytes these events are disjoint and their probabilities add up to 1, less that of never ending. So the loss `alm`
compares probabilities of one and the same event, each chunk being a token, and nothing has to be debiased.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from minalm.distill.divergences import log_one_minus_exp
from minalm.distill.means import mean, total
from minalm.models.bolmo import LOG_HALF, forced_boundaries
from minalm.models.head import VocabularyMask
from minalm.models.transformer import Remat, Transformer, TrunkOutput, last_block, pick, stacked_blocks
from minalm.types import Batch, Guide, ModelOutput, PatchOutput, Tokens

LEAST_SURE = -1e-3  # the log-probability of a boundary, at most, that its loss reads


def read_guide(
    teacher: Transformer, mask: VocabularyMask, rows: Batch, dtype: jnp.dtype, remat: Remat, blocks: int
) -> ModelOutput:
    """The log-probabilities of a subword teacher's tokens, and its states where tokens end: after the first `blocks` of
    its blocks, and after the last. Runs inside `shard_map`."""
    config, ends = teacher.config, rows.chunks.teacher_chunk_end
    x = teacher.embed_tokens(rows.teacher.inputs, rows.teacher.suffix, dtype)
    early, _ = stacked_blocks(teacher.blocks, config, x, remat, part=slice(blocks))
    x, _ = stacked_blocks(teacher.blocks, config, early, remat, part=slice(blocks, None))
    x = last_block(teacher.last, config, x, remat)
    early = x if blocks == config.layers else early
    stats = teacher.tail(TrunkOutput(x, None), rows.teacher, mask).stats
    return ModelOutput(stats, guide=Guide(pick(x, ends), pick(early, ends), blocks))


def representation(
    student: Float[Array, "batch patch embed"],
    teacher: Float[Array, "batch patch embed"],
    counted: Bool[Array, "batch patch"],
    count: Float32[Array, ""],
) -> Float[Array, ""]:
    """The mean over patches of |s - t| / sqrt(embed), the states after the first blocks."""
    square = jnp.mean(jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32)), axis=-1)
    apart = square > 0.0  # the root has no gradient at 0
    return mean(jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0), counted, count)


def boundary(patches: PatchOutput, tokens: Tokens, count: Float32[Array, ""]) -> Float[Array, ""]:
    """Cross-entropy of the predicted boundaries against the ends of the teacher's tokens, in nats per byte that has one
    behind it."""
    logp = jnp.minimum(patches.boundary, LEAST_SURE)
    ends = forced_boundaries(tokens)
    return mean(-jnp.where(ends, logp, log_one_minus_exp(logp)), tokens.weight, count)


def patch_metrics(patches: PatchOutput, tokens: Tokens) -> dict[str, Float32[Array, ""]]:
    """Bytes per patch; the share of patches for which there is no slot; how often the predictor says what the label is."""
    slots, read = tokens.patch_ends.shape[1], jnp.max(tokens.patch_ends, axis=1) + 1
    count = jnp.sum(patches.ends, axis=1)
    right = (patches.boundary > LOG_HALF) == forced_boundaries(tokens)
    every = jnp.maximum(total(count), 1.0)
    return {
        "bytes_per_patch": total(read) / every,
        "patches_lost": total(jnp.maximum(count - slots, 0.0)) / every,
        "boundary_accuracy": total(jnp.where(right, tokens.weight, 0.0)) / jnp.maximum(total(tokens.weight), 1.0),
    }

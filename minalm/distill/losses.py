"""The losses: arithmetic on [batch, time] and [batch, chunk] arrays, averaged over the whole batch on every mesh.

To add a loss, write its function here or in a file beside this one, give it a weight in `LossConfig`, and enter it
under the name of that weight in `LOSSES`. Its value must be summed over all devices, as `means.mean` does.

l is the log-probability of a chunk, p = exp(l / tau); subscripts T teacher, S student. Sections and equations are those
of Minixhofer, Vulić, Ponti: Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching (arXiv
2503.20083).
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from minalm.distill import hidden, patches
from minalm.distill.chunks import Groups, chunk_sums, merge, sum_by
from minalm.distill.divergences import Divergence, divergence
from minalm.distill.means import mean, total
from minalm.errors import InputError, flag
from minalm.types import AlignedChunks, Batch, ModelOutput, TokenStats


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which losses, and how they are balanced. A weight of 0 leaves the loss out."""

    sft: float = 1.0
    """Weight of next-token cross-entropy on the student's own tokens."""
    alm: float = 1.0
    """Weight of approximate likelihood matching."""
    next_byte: float = 0.0
    """Weight of the cross-entropy of a byte student against the next byte that the teacher implies."""
    latents: float = 0.0
    """Weight of the distance between hidden states at chunk ends; of models of different widths, through a learnt map."""
    representation: float = 0.0
    """Bolmo students: weight of the distance between the states of patches and of the teacher's tokens after the first
    blocks."""
    boundary: float = 0.0
    """Bolmo students: weight of the cross-entropy of predicted boundaries against the ends of the teacher's tokens."""
    guided: bool = False
    """Bolmo students, stage 1: patches end where the teacher's tokens do, and its last states stand for them."""
    representation_blocks: int = 4
    """After how many blocks those states are compared."""
    balance: Literal["gradmag", "fixed"] = "gradmag"
    """gradmag: each loss's weight over the norm of its gradient in the last layer; fixed: the weights alone."""
    preserve_magnitude: bool = True
    """gradmag only: divide the weights by their sum, so that the total keeps the scale of one loss."""
    chunks: Literal["unconstrained", "space", "merged", "unbiased"] = "merged"
    """Where a chunk may end. unconstrained: every common token end; space: before a space on both sides; merged: where
    the teacher's boundary mass passes gamma; unbiased: where both values of --losses.pair-bias are small."""
    pair_bias: Path | None = None
    """Unbiased chunks: what each pair of a teacher's and a student's token excludes; `convert.py pair-bias` makes it."""
    pair_bias_threshold: float = 1e-4
    """Unbiased chunks: both values of the last tokens must be at most this share of all tokens."""
    debias: bool = True
    """Add the log boundary mass at each chunk's end to its log-probability."""
    gamma: float = 0.1
    """Boundary mass (a probability) that the teacher must exceed for a merged chunk to end."""
    divergence: Divergence = "binary_ce"
    """The f-divergence between teacher and student chunk probabilities."""
    tau: float = 100.0
    """Temperature of the chunk probabilities."""
    alpha: float = 2.0
    """Order of the Rényi divergence."""
    latents_layers: Literal["last", "all"] = "last"
    """Hidden states compared: after the final norm, or also the embeddings and every layer's output."""
    latents_norm: hidden.LatentsNorm = "l2_channelwise"
    """Distance, and whether it is divided by the teacher's mean per channel or over all channels."""

    @property
    def inputs(self) -> list[Path]:
        """Files that are read."""
        return [] if self.pair_bias is None else [self.pair_bias]

    def check(self, needs_files: bool = True) -> None:
        """Raises InputError for values that make no sense. Without `needs_files`, the run reads none."""
        for name in (*LOSSES, "gamma", "pair_bias_threshold"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"{flag('losses.' + name)} is {getattr(self, name)}: it must be a number of at least 0"
                )
        if not 0.0 < self.tau < math.inf:
            raise InputError("--losses.tau must be above 0: for its limit use --losses.divergence binary_kl_temp_limit")
        if not 0.0 < self.alpha < math.inf or self.alpha == 1.0:
            raise InputError("--losses.alpha must be above 0 and not 1: for the limit 1 use binary_ce")
        for owner, settings in SETTINGS_OF.items():
            for name in settings:
                if getattr(self, owner) == 0.0 and getattr(self, name) != getattr(LossConfig, name):
                    raise InputError(f"{flag('losses.' + name)} is for {owner}, which has weight 0: leave it out")
        for name in ("pair_bias", "pair_bias_threshold"):
            if self.chunks != "unbiased" and getattr(self, name) != getattr(LossConfig, name):
                raise InputError(f"{flag('losses.' + name)} is for --losses.chunks unbiased: leave it out")
        if needs_files and self.chunks == "unbiased" and self.pair_bias is None:
            raise InputError(
                "unbiased chunks need the values of pairs of tokens: make them with `python convert.py pair-bias` and "
                "name the file with --losses.pair-bias"
            )
        if self.representation_blocks < 1:
            raise InputError(f"--losses.representation-blocks is {self.representation_blocks}: it must be at least 1")
        if self.representation > 0.0 and not self.guided:
            raise InputError("--losses.representation compares with a teacher that guides: add --losses.guided")
        if not self.names:
            raise InputError(
                f"every loss has weight 0: give one of {', '.join(flag(f'losses.{name}') for name in LOSSES)} a weight"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The losses that are on, in the order of `LOSSES`."""
        return tuple(name for name in LOSSES if getattr(self, name) > 0.0)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights of the losses that are on."""
        return tuple(getattr(self, name) for name in self.names)

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss that is on compares with the teacher."""
        return self.guided or any(LOSSES[name].needs_teacher for name in self.names)

    @property
    def needs_states(self) -> bool:
        """Whether a loss that is on compares hidden states."""
        return any(LOSSES[name].needs_states for name in self.names)

    @property
    def needs_bytes(self) -> bool:
        """Whether a loss that is on compares distributions of the next byte."""
        return any(LOSSES[name].needs_bytes for name in self.names)

    @property
    def compares_all_layers(self) -> bool:
        """Whether those are the states of all layers, not the last ones alone."""
        return self.needs_states and self.latents_layers == "all"


SETTINGS_OF = {
    "alm": ("chunks", "pair_bias", "pair_bias_threshold", "debias", "gamma", "divergence", "tau", "alpha"),
    "latents": ("latents_layers", "latents_norm"),
    "representation": ("representation_blocks",),
}

# --- arithmetic ---------------------------------------------------------------------------------------------------


def next_token(stats: TokenStats, weight: Float[Array, "batch time"], count: Float32[Array, ""]) -> Float[Array, ""]:
    """Cross-entropy of the student's own tokens, nats per counted token."""
    return mean(-stats.logp, weight, count)


def teacher_groups(
    teacher: TokenStats, chunks: AlignedChunks, config: LossConfig
) -> tuple[Groups, Bool[Array, "batch chunk"], Float32[Array, "batch chunk"]]:
    """(groups of chunks, which chunks have targets, log-probability of each group) by the teacher."""
    logp, count, boundary = chunk_sums(teacher, chunks.teacher_chunk, chunks.teacher_chunk_end)
    filled = count > 0.0
    may_end = {
        "unconstrained": jnp.ones_like(filled),
        "space": chunks.before_space,
        "merged": boundary > math.log(max(config.gamma, 1e-30)),
        "unbiased": chunks.unbiased,
    }
    ends = may_end[config.chunks] & (chunks.teacher_chunk_end >= 0)
    groups = merge(filled, ends if chunks.text_end is None else ends | chunks.text_end)
    logp = groups.total(logp)
    return groups, filled, logp + groups.at_end(boundary) if config.debias else logp


def alm(
    student: TokenStats, teacher: TokenStats, chunks: AlignedChunks, config: LossConfig, count: Float32[Array, ""]
) -> Float[Array, ""]:
    """Approximate likelihood matching: the mean divergence over the groups of chunks that have targets (equation 5)."""
    groups, filled, t_logp = teacher_groups(teacher, chunks, config)
    s_logp, _, s_boundary = chunk_sums(student, chunks.student_chunk, chunks.student_chunk_end)
    s_logp = groups.total(jnp.where(filled, s_logp, 0.0))
    if config.debias:
        s_logp = s_logp + groups.at_end(s_boundary)
    counted = groups.end >= 0
    # Columns without a group get a harmless value before the divergence, so that no NaN reaches the gradient.
    s_logp, t_logp = jnp.where(counted, s_logp, -1.0), jnp.where(counted, t_logp, -1.0)
    return mean(divergence(t_logp, s_logp, config.divergence, config.tau, config.alpha), counted, count)


# --- the losses of a step -----------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """A loss is the sum of what rows add to it, over a number that is known before the student runs.

    So the losses of a batch in parts (gradient accumulation) add up to those of the whole batch.
    """

    normalizer: Callable[[LossConfig, Batch, ModelOutput | None], Any]
    """(config, batch, teacher) -> what the loss divides by, summed over all rows of all devices."""
    value: Callable[[LossConfig, Batch, ModelOutput, ModelOutput | None, Any], Float[Array, ""]]
    """(config, rows, student, teacher, normalizer) -> what these rows add to the loss."""
    needs_teacher: bool = True
    needs_states: bool = False  # hidden states at the ends of chunks
    needs_bytes: bool = False  # the teacher's and the student's distribution of the next byte


LOSSES = {
    "sft": Loss(
        lambda config, batch, teacher: total(batch.student.weight),
        lambda config, rows, student, teacher, count: next_token(student.stats, rows.student.weight, count),
        needs_teacher=False,
    ),
    "alm": Loss(
        lambda config, batch, teacher: total(teacher_groups(teacher.stats, batch.chunks, config)[0].end >= 0),
        lambda config, rows, student, teacher, count: alm(student.stats, teacher.stats, rows.chunks, config, count),
    ),
    "next_byte": Loss(
        lambda config, batch, teacher: total(teacher.byte_targets.counted),
        lambda config, rows, student, teacher, count: mean(
            student.byte_scores.cross_entropy, teacher.byte_targets.counted, count
        ),
        needs_bytes=True,
    ),
    "latents": Loss(
        lambda config, batch, teacher: hidden.normalizer(
            teacher.states, hidden.compared(batch.chunks), config.latents_norm
        ),
        lambda config, rows, student, teacher, normalizer: hidden.latents(
            student.states, teacher.states, hidden.compared(rows.chunks), config.latents_norm, normalizer
        ),
        needs_states=True,
    ),
    "representation": Loss(
        lambda config, batch, teacher: total(hidden.compared(batch.chunks)),
        lambda config, rows, student, teacher, count: patches.representation(
            student.patches.early, teacher.guide.early, hidden.compared(rows.chunks), count
        ),
    ),
    "boundary": Loss(
        lambda config, batch, teacher: total(batch.student.weight),
        lambda config, rows, student, teacher, count: patches.boundary(student.patches, rows.student, count),
        needs_teacher=False,
    ),
}


def normalizers(config: LossConfig, batch: Batch, teacher: ModelOutput | None) -> dict[str, Any]:
    """What each loss that is on divides by. The arrays hold this device's rows of the whole batch."""
    return {name: LOSSES[name].normalizer(config, batch, teacher) for name in config.names}


def loss_terms(
    config: LossConfig, rows: Batch, student: ModelOutput, teacher: ModelOutput | None, normalizers: dict[str, Any]
) -> Float32[Array, " loss"]:
    """What these rows add to each loss that is on, in the order of `config.names`."""
    terms = [LOSSES[name].value(config, rows, student, teacher, normalizers[name]) for name in config.names]
    return jnp.stack(terms)


def bits_per_byte(
    logp: Float32[Array, "batch time"], chunk: Int[Array, "batch time"], text_bytes: Int[Array, "batch chunk"]
) -> Float32[Array, ""]:
    """-log2 p of the text in chunks over its UTF-8 bytes; neither special tokens count nor chunks without a target."""
    size = text_bytes.shape[1]
    counted = (text_bytes > 0) & (sum_by(jnp.ones_like(logp), chunk, size) > 0.0)
    nats = total(jnp.where(counted, -sum_by(logp, chunk, size), 0.0))
    count = total(jnp.where(counted, text_bytes, 0))
    return nats / jnp.maximum(count, 1.0) / math.log(2.0)

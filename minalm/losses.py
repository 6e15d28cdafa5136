"""The losses: arithmetic on [batch, time] and [batch, chunk] arrays, averaged over the whole batch on every mesh.

To add a loss: write a function of what `loss_terms` has at hand that ends in `mean`, by a count of `WholeBatch`; give it
a weight in LossConfig and its name in LossConfig.names, and add its line to `loss_terms`.

l is the log-probability of a chunk, p = exp(l / tau); subscripts T teacher, S student. Sections and equations are those
of Minixhofer, Vulić, Ponti: Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching (arXiv
2503.20083).
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from minalm.sharding import rows_sum
from minalm.text import InputError
from minalm.types import AlignedChunks, Batch, TokenStats

BELOW_ONE = 1e-6  # subtracted from l / tau so that log(1 - p) stays finite

Divergence = Literal["binary_ce", "reverse_binary_kl", "binary_kl_temp_limit", "abs", "abs_exp", "renyi", "k2", "k3"]
LatentsNorm = Literal["l2_channelwise", "l2", "l1", "l1_channelwise"]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which losses, and how they are balanced. A weight of 0 leaves the loss out."""

    sft: float = 1.0
    """Weight of next-token cross-entropy on the student's own tokens."""
    alm: float = 1.0
    """Weight of approximate likelihood matching."""
    latents: float = 0.0
    """Weight of the distance between hidden states at chunk ends."""
    balance: Literal["gradmag", "fixed"] = "gradmag"
    """gradmag: each loss's weight over the norm of its gradient in the last layer; fixed: the weights alone."""
    preserve_magnitude: bool = True
    """gradmag only: divide the weights by their sum, so that the total keeps the scale of one loss."""
    chunks: Literal["unconstrained", "space", "merged"] = "merged"
    """unconstrained: every common token end; space: before a space on both sides; merged: where the teacher's boundary
    mass passes gamma."""
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
    latents_norm: LatentsNorm = "l2_channelwise"
    """Distance, and whether it is divided by the teacher's mean per channel or over all channels."""

    def check(self) -> None:
        """Raises InputError for values that make no sense."""
        for name in ("sft", "alm", "latents", "gamma"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise InputError(f"--losses.{name} is {getattr(self, name)}: it must be a number of at least 0")
        if not 0.0 < self.tau < math.inf:
            raise InputError("--losses.tau must be above 0: for its limit use --losses.divergence binary_kl_temp_limit")
        if not 0.0 < self.alpha < math.inf or self.alpha == 1.0:
            raise InputError("--losses.alpha must be above 0 and not 1: for the limit 1 use binary_ce")
        if not self.names:
            raise InputError("every loss has weight 0: give one of --losses.sft, .alm, .latents a weight")

    @property
    def names(self) -> tuple[str, ...]:
        """The losses that are on, in the order of `loss_terms`."""
        return tuple(name for name in ("sft", "alm", "latents") if getattr(self, name) > 0.0)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name in self.names)

    @property
    def needs_teacher(self) -> bool:
        return self.alm > 0.0 or self.latents > 0.0


# --- chunks -------------------------------------------------------------------------------------------------------


def sum_by(
    values: Float[Array, "batch item"], index: Int[Array, "batch item"], size: int
) -> Float[Array, "batch size"]:
    """Sums of values by index within each row; index -1 is left out."""
    rows = jnp.arange(values.shape[0])[:, None]
    bins = jnp.zeros((values.shape[0], size + 1), values.dtype)
    return bins.at[rows, jnp.where(index < 0, size, index)].add(values)[:, :size]


def chunk_sums(
    stats: TokenStats, chunk: Int[Array, "batch time"], close: Int[Array, "batch chunk"]
) -> tuple[Float32[Array, "batch chunk"], Float32[Array, "batch chunk"], Float32[Array, "batch chunk"]]:
    """(log-probability, number of targets, log boundary mass at the end) of each chunk of one side (section 3.2)."""
    size = close.shape[1]
    logp = sum_by(stats.logp, chunk, size)
    count = sum_by(jnp.ones_like(stats.logp), chunk, size)
    boundary = jnp.take_along_axis(stats.boundary, jnp.maximum(close, 0), axis=1)
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


# --- divergences between p_T and p_S ------------------------------------------------------------------------------


def log_one_minus_exp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log(1 - e^x) for x < 0, by the branch that keeps its digits, with a safe input on the branch not taken."""
    near_zero = x > -math.log(2.0)
    small = jnp.log(-jnp.expm1(jnp.where(near_zero, x, -1.0)))
    large = jnp.log1p(-jnp.exp(jnp.where(near_zero, -1.0, x)))
    return jnp.where(near_zero, small, large)


def tempered(l: Float[Array, "*shape"], tau: float) -> Float[Array, "*shape"]:
    """min(l / tau, 0) - 1e-6, the gradient passed straight through: rounding can make a sum of logs positive."""
    x = l / tau
    return x + jax.lax.stop_gradient(jnp.minimum(x, 0.0) - x) - BELOW_ONE


def divergence(
    teacher: Float[Array, "batch chunk"], student: Float[Array, "batch chunk"], config: LossConfig
) -> Float[Array, "batch chunk"]:
    """f(p_T || p_S) + f(1 - p_T || 1 - p_S) of chunk log-probabilities (equation 4; others from the appendix).

    With r = (l_T - l_S) / tau, k2 and k3 are the estimators of the KL divergence of Schulman,
    http://joschu.net/blog/kl-approx.html. tau does not enter abs, binary_kl_temp_limit and renyi.
    """
    if config.divergence == "abs":
        return jnp.abs(teacher - student)
    ratio = (teacher - student) / config.tau
    if config.divergence == "k2":
        return jnp.square(ratio) / 2.0
    if config.divergence == "k3":
        return jnp.expm1(ratio) - ratio

    tau = 1.0 if config.divergence in ("binary_kl_temp_limit", "renyi") else config.tau
    log_pt, log_ps = tempered(teacher, tau), tempered(student, tau)
    if config.divergence == "binary_kl_temp_limit":
        # (l_T - l_S) + l_T log(l_S / l_T); where both are near, the difference is taken before it can cancel.
        excess = (log_ps - log_pt) / log_pt
        near = jnp.abs(excess) < 0.5
        ratio = jnp.log(-log_ps) - jnp.log(-log_pt)
        return log_pt * (jnp.where(near, jnp.log1p(jnp.where(near, excess, 0.0)), ratio) - excess)
    if config.divergence == "abs_exp":
        return jnp.abs(jnp.exp(log_pt) - jnp.exp(log_ps))
    log_qt, log_qs = log_one_minus_exp(log_pt), log_one_minus_exp(log_ps)  # q = 1 - p
    if config.divergence == "binary_ce":
        return -(jnp.exp(log_pt) * log_ps - jnp.expm1(log_pt) * log_qs)
    if config.divergence == "reverse_binary_kl":
        return jnp.exp(log_ps) * (log_ps - log_pt) - jnp.expm1(log_ps) * (log_qs - log_qt)
    power_p = config.alpha * log_pt + (1.0 - config.alpha) * log_ps
    power_q = config.alpha * log_qt + (1.0 - config.alpha) * log_qs
    return jnp.logaddexp(power_p, power_q) / (config.alpha - 1.0)  # renyi


# --- the losses ---------------------------------------------------------------------------------------------------


class WholeBatch(eqx.Module):
    """What the losses divide by. It is taken over all rows of all devices before the student is run, so that the losses
    of a batch in parts (gradient accumulation) add up to that of the whole."""

    targets: Float32[Array, ""]  # counted targets of the student
    groups: Float32[Array, ""] | None  # groups of chunks with targets; None: no alm
    chunks: Float32[Array, ""]  # chunks whose hidden states are compared
    teacher_size: Float32[Array, "depth 1 1 embed_or_1"] | None  # see latents_size; None: no latents


def whole_batch(
    config: LossConfig,
    batch: Batch,
    teacher: TokenStats | None,
    teacher_states: Float[Array, "depth batch chunk embed"] | None,
) -> WholeBatch:
    """Counts and sizes of all rows; the arrays hold this device's."""
    compared = compares(batch.chunks)
    return WholeBatch(
        targets=total(batch.student.weight),
        groups=total(teacher_groups(teacher, batch.chunks, config)[0].end >= 0) if config.alm else None,
        chunks=total(compared),
        teacher_size=latents_size(teacher_states, compared, config.latents_norm) if config.latents else None,
    )


def total(values: Shaped[Array, "*shape"]) -> Float32[Array, ""]:
    """The sum over the rows of all devices."""
    return rows_sum(jnp.sum(values.astype(jnp.float32)))


def mean(
    values: Float[Array, "*shape"], counted: Shaped[Array, "*shape"], count: Float32[Array, ""]
) -> Float[Array, ""]:
    """The sum of the counted values of these rows over the count of the whole batch; 0 where nothing is counted."""
    counted = counted.astype(jnp.float32)
    return total(jnp.where(counted > 0.0, values * counted, 0.0)) / jnp.maximum(count, 1.0)


def next_token(stats: TokenStats, weight: Float[Array, "batch time"], count: Float32[Array, ""]) -> Float[Array, ""]:
    """Cross-entropy of the student's own tokens, nats per counted token."""
    return mean(-stats.logp, weight, count)


def teacher_groups(
    teacher: TokenStats, chunks: AlignedChunks, config: LossConfig
) -> tuple[Groups, Bool[Array, "batch chunk"], Float32[Array, "batch chunk"]]:
    """(groups of chunks, which chunks have targets, log-probability of each group) by the teacher."""
    logp, count, boundary = chunk_sums(teacher, chunks.teacher_chunk, chunks.teacher_close)
    filled = count > 0.0
    may_end = {
        "unconstrained": jnp.ones_like(filled),
        "space": chunks.before_space,
        "merged": boundary > math.log(max(config.gamma, 1e-30)),
    }
    groups = merge(filled, may_end[config.chunks] & (chunks.teacher_close >= 0))
    logp = groups.total(logp)
    return groups, filled, logp + groups.at_end(boundary) if config.debias else logp


def alm(
    student: TokenStats, teacher: TokenStats, chunks: AlignedChunks, config: LossConfig, count: Float32[Array, ""]
) -> Float[Array, ""]:
    """Approximate likelihood matching: the mean divergence over the groups of chunks that have targets (equation 5)."""
    groups, filled, t_logp = teacher_groups(teacher, chunks, config)
    s_logp, _, s_boundary = chunk_sums(student, chunks.student_chunk, chunks.student_close)
    s_logp = groups.total(jnp.where(filled, s_logp, 0.0))
    if config.debias:
        s_logp = s_logp + groups.at_end(s_boundary)
    counted = groups.end >= 0
    # Columns without a group get a harmless value before the divergence, so that no NaN reaches the gradient.
    s_logp, t_logp = jnp.where(counted, s_logp, -1.0), jnp.where(counted, t_logp, -1.0)
    return mean(divergence(t_logp, s_logp, config), counted, count)


def compares(chunks: AlignedChunks) -> Bool[Array, "batch chunk"]:
    """The chunks whose hidden states are compared: complete on both sides, that of bos included."""
    return (chunks.student_close >= 0) & (chunks.teacher_close >= 0)


def channel_sums(
    values: Float32[Array, "depth batch chunk embed"], counted: Bool[Array, "batch chunk"]
) -> Float32[Array, "depth 1 1 embed"]:
    """Sums over the counted chunks of all devices, of each layer and channel."""
    return rows_sum(jnp.sum(jnp.where(counted[None, :, :, None], values, 0.0), axis=(1, 2), keepdims=True))


def latents_power(states: Float[Array, "*shape"], norm: LatentsNorm) -> Float32[Array, "*shape"]:
    """|x|^n of hidden states or their differences."""
    return (jnp.square if norm.startswith("l2") else jnp.abs)(states.astype(jnp.float32))


def latents_size(
    teacher: Float[Array, "depth batch chunk embed"], counted: Bool[Array, "batch chunk"], norm: LatentsNorm
) -> Float32[Array, "depth 1 1 embed_or_1"]:
    """The mean of |t|^n over the counted chunks of all rows, of each channel, or over the channels too."""
    size = channel_sums(latents_power(teacher, norm), counted) / jnp.maximum(total(counted), 1.0)
    return size if norm.endswith("channelwise") else jnp.mean(size, axis=-1, keepdims=True)


def latents(
    student: Float[Array, "depth batch chunk embed"],
    teacher: Float[Array, "depth batch chunk embed"],
    counted: Bool[Array, "batch chunk"],
    norm: LatentsNorm,
    count: Float32[Array, ""],
    size: Float32[Array, "depth 1 1 embed_or_1"],
) -> Float[Array, ""]:
    """The distance between hidden states at the last token of each chunk, relative to the teacher's size: the mean
    over layers, counted chunks and channels of |s - t|^n / (size + 1e-8) (section 3.4)."""
    difference = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    distance = channel_sums(latents_power(difference, norm), counted) / jnp.maximum(count, 1.0)
    return jnp.mean(distance / (size + 1e-8))


def loss_terms(
    config: LossConfig,
    batch: Batch,
    student: TokenStats,
    teacher: TokenStats | None,
    student_states: Float[Array, "depth batch chunk embed"] | None,
    teacher_states: Float[Array, "depth batch chunk embed"] | None,
    whole: WholeBatch,
) -> Float32[Array, " loss"]:
    """What these rows add to each loss that is on, in the order of `config.names`; `whole` is of the batch that they are
    a part of, or all."""
    terms = {}
    if config.sft:
        terms["sft"] = next_token(student, batch.student.weight, whole.targets)
    if config.alm:
        terms["alm"] = alm(student, teacher, batch.chunks, config, whole.groups)
    if config.latents:
        compared = compares(batch.chunks)
        terms["latents"] = latents(
            student_states, teacher_states, compared, config.latents_norm, whole.chunks, whole.teacher_size
        )
    return jnp.stack([terms[name] for name in config.names])


def bits_per_byte(
    logp: Float32[Array, "batch time"], chunk: Int[Array, "batch time"], text_bytes: Int[Array, "batch chunk"]
) -> Float32[Array, ""]:
    """-log2 p of the text in chunks over its UTF-8 bytes; neither control tokens count nor chunks without a target."""
    size = text_bytes.shape[1]
    counted = (text_bytes > 0) & (sum_by(jnp.ones_like(logp), chunk, size) > 0.0)
    nats = total(jnp.where(counted, -sum_by(logp, chunk, size), 0.0))
    count = total(jnp.where(counted, text_bytes, 0))
    return nats / jnp.maximum(count, 1.0) / math.log(2.0)

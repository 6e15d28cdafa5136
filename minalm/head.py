"""From hidden states to the numbers that losses read: the only file that sees the vocabulary axis.

Positions are worked off in blocks whose logits are recomputed in the backward pass, and entries are divided over `tp`,
so that no array with both a time axis and a whole vocabulary axis exists, forward or backward.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from minalm.layers import softcap
from minalm.sharding import gather_channels, param, tp_max, tp_offset, tp_sum
from minalm.types import TokenStats

BLOCK_ELEMENTS = 2**25  # logits of one block on one device: 128 MiB in float32
BLOCK_POSITIONS = 512


class Entries(eqx.Module):
    """What is known of each row of a vocabulary's table."""

    exists: Bool[Array | np.ndarray, " vocab"] = param(
        "tp"
    )  # False: padding beyond the tokenizer, excluded from the softmax
    boundary: Bool[Array | np.ndarray, " vocab"] = param(
        "tp"
    )  # begins with white space, or a control token: a word may end before it


def block_logits(
    hidden: Float[Array, "position embed"],
    table: Float[Array, "vocab embed"],
    exists: Bool[Array, " vocab"],
    final_softcap: float | None,
) -> Float32[Array, "position vocab"]:
    """Float32 logits of this device's entries; -inf where no entry exists."""
    logits = jnp.einsum("pe,ve->pv", hidden, table, preferred_element_type=jnp.float32)
    return jnp.where(exists, softcap(logits, final_softcap), -jnp.inf)


def token_stats(
    hidden: Float[Array, "batch time embed"],
    targets: Int[Array, "batch time"],
    unembedding: Float[Array, "vocab slice"],
    entries: Entries,
    final_softcap: float | None,
) -> TokenStats:
    """log p(target) and the log boundary mass at every position, from the states after the final norm.

    The entries are split into boundary and rest, each with its own maximum: one exponential per entry, and the boundary
    mass keeps its digits and its gradient however small it is.
    """
    batch, time, embed = hidden.shape
    # Gathered in the compute dtype, but kept in the stored one: the gradients of all blocks add up in float32.
    table = gather_channels(unembedding, hidden.dtype).astype(unembedding.dtype)
    offset = tp_offset(table.shape[0])

    def log_sum(exponentials, maximum, chosen):
        return jnp.log(tp_sum(jnp.sum(exponentials, axis=-1, where=chosen))) + maximum

    @jax.checkpoint
    def of_block(block):
        hidden, targets = block
        logits = block_logits(hidden, table.astype(hidden.dtype), entries.exists, final_softcap)
        top = tp_max(jnp.max(logits, axis=-1, where=entries.boundary, initial=-jnp.inf))
        rest_top = tp_max(jnp.max(logits, axis=-1, where=~entries.boundary, initial=-jnp.inf))
        exponentials = jnp.exp(logits - jnp.where(entries.boundary, top[:, None], rest_top[:, None]))
        boundary = log_sum(exponentials, top, entries.boundary)
        total = jnp.logaddexp(boundary, log_sum(exponentials, rest_top, ~entries.boundary))
        local = targets - offset
        held = (local >= 0) & (local < table.shape[0])
        at_target = jnp.take_along_axis(logits, jnp.where(held, local, 0)[:, None], axis=1)[:, 0]
        return tp_sum(jnp.where(held, at_target, 0.0)) - total, boundary - total

    positions = batch * time
    block = min(positions, BLOCK_POSITIONS, max(1, BLOCK_ELEMENTS // table.shape[0]))
    padding = -positions % block
    hidden = jnp.pad(hidden.reshape(positions, embed), ((0, padding), (0, 0))).reshape(-1, block, embed)
    targets = jnp.pad(targets.reshape(positions), (0, padding)).reshape(-1, block)
    logp, boundary = jax.lax.map(of_block, (hidden, targets))
    return TokenStats(
        logp=logp.reshape(-1)[:positions].reshape(batch, time),
        boundary=boundary.reshape(-1)[:positions].reshape(batch, time),
    )

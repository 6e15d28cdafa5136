"""From hidden states to the numbers that losses read: the only file that sees the vocabulary axis.

Entries are divided over `tp`. Logits are computed in blocks of positions and entries, with running sums of exponentials
(online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867). The backward pass computes each block again. So no
array has both a time axis and a whole vocabulary axis, forward or backward, and the table is read once for many
positions.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from minalm.models.layers import softcap
from minalm.parallel.collectives import gather_channels, tp_max, tp_offset, tp_sum, vary_like
from minalm.parallel.mesh import param
from minalm.types import TokenStats

BLOCK_ENTRIES = 8192
BLOCK_ELEMENTS = 2**22  # logits of one block on one device: 16 MiB in float32
LOWEST = -1e30  # the maximum over no logits, finite so that exp(-inf - LOWEST) is 0


class VocabularyMask(eqx.Module):
    """What is known of each row of a vocabulary's table."""

    # False: padding beyond the tokenizer, excluded from the softmax.
    exists: Bool[Array | np.ndarray, " vocab"] = param("tp")
    # It begins with white space, or is a special token: a word may end before it.
    boundary: Bool[Array | np.ndarray, " vocab"] = param("tp")


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
    mask: VocabularyMask,
    final_softcap: float | None,
) -> TokenStats:
    """log p(target) and the log boundary mass at every position, from the states after the final norm.

    The entries are split into boundary and rest, each with its own maximum: one exponential per entry, and the boundary
    mass keeps its digits and its gradient however small it is. Gradients of all blocks add up in float32.
    """
    batch, time, embed = hidden.shape
    table = gather_channels(unembedding, hidden.dtype)
    positions = batch * time
    blocks = -(-positions // max(1, BLOCK_ELEMENTS // min(table.shape[0], BLOCK_ENTRIES)))
    size = -(-positions // blocks)
    padding = blocks * size - positions
    # Each device of `tp` has a gradient of the states by its own entries; the transpose of this line sums them.
    hidden = vary_like(hidden, table)
    hidden = jnp.pad(hidden.reshape(positions, embed), ((0, padding), (0, 0))).reshape(blocks, size, embed)
    local = targets.reshape(positions) - tp_offset(table.shape[0])
    local = jnp.pad(local, (0, padding)).reshape(blocks, size)
    logp, boundary = _stats(final_softcap, hidden, local, table, mask)
    return TokenStats(
        logp=logp.reshape(-1)[:positions].reshape(batch, time),
        boundary=boundary.reshape(-1)[:positions].reshape(batch, time),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats(cap, hidden, targets, table, mask):
    """(log p of the targets, log boundary mass), [block, position] each. `hidden` is [block, position, embed] and
    `targets`, [block, position], are numbers of rows of this device's table, or none of them."""
    return _stats_forward(cap, hidden, targets, table, mask)[0]


def _stats_forward(cap, hidden, targets, table, mask):
    def of_positions(block):
        hidden, targets = block

        def add(sums, start):
            tops, masses, at_target = sums
            _, logits, numbers, fresh, boundary = _block(cap, hidden, table, mask, start)
            kinds = boundary, ~boundary
            found = [jnp.max(logits, axis=-1, where=kind, initial=LOWEST) for kind in kinds]
            higher = jnp.maximum(tops, jnp.stack(found))
            exponentials = jnp.exp(logits - jnp.where(boundary, higher[0][:, None], higher[1][:, None]))
            added = jnp.stack([jnp.sum(exponentials, axis=-1, where=kind) for kind in kinds])
            hit = fresh & (numbers == targets[:, None])
            at_target = at_target + jnp.sum(logits, axis=-1, where=hit)
            return (higher, masses * jnp.exp(tops - higher) + added, at_target), None

        nothing = jnp.full((2, len(targets)), LOWEST), jnp.zeros((2, len(targets))), jnp.zeros(len(targets))
        sums = vary_like(nothing, (hidden, targets))
        (tops, masses, at_target), _ = jax.lax.scan(add, sums, _starts(table))
        highest = tp_max(tops)
        boundary, rest = jnp.log(tp_sum(masses * jnp.exp(tops - highest))) + highest
        total = jnp.logaddexp(boundary, rest)
        return tp_sum(at_target) - total, boundary - total, boundary, total

    logp, mass, boundary, total = jax.lax.map(of_positions, (hidden, targets))
    return (logp, mass), (hidden, targets, table, mask, boundary, total)


def _stats_backward(cap, saved, grads):
    """With p = exp(logit - total), and q = exp(logit - boundary) of boundary entries: d logp = [target] - p and
    d mass = q - p."""
    hidden, targets, table, mask, *masses = saved

    def of_positions(table_grad, block):
        hidden, targets, (boundary_mass, total), (logp_grad, mass_grad) = block

        def add(sums, start):
            hidden_grad, table_grad = sums
            rows, logits, numbers, fresh, boundary = _block(cap, hidden, table, mask, start)
            inside = jnp.where(boundary, mass_grad[:, None] * jnp.exp(logits - boundary_mass[:, None]), 0.0)
            grad = inside - (logp_grad + mass_grad)[:, None] * jnp.exp(logits - total[:, None])
            grad = grad + jnp.where(numbers == targets[:, None], logp_grad[:, None], 0.0)
            if cap is not None:
                grad = grad * (1.0 - jnp.square(logits / cap))
            grad = jnp.where(fresh, grad, 0.0).astype(hidden.dtype)
            rows_grad = jnp.einsum("pv,pe->ve", grad, hidden, preferred_element_type=jnp.float32)
            rows_grad = rows_grad + jax.lax.dynamic_slice_in_dim(table_grad, start, len(rows))
            table_grad = jax.lax.dynamic_update_slice_in_dim(table_grad, rows_grad, start, 0)
            hidden_grad = hidden_grad + jnp.einsum("pv,ve->pe", grad, rows, preferred_element_type=jnp.float32)
            return (hidden_grad, table_grad), None

        hidden_grad = vary_like(jnp.zeros(hidden.shape, jnp.float32), hidden)
        (hidden_grad, table_grad), _ = jax.lax.scan(add, (hidden_grad, table_grad), _starts(table))
        return table_grad, hidden_grad.astype(hidden.dtype)

    table_grad = vary_like(jnp.zeros(table.shape, jnp.float32), (table, hidden))
    table_grad, hidden_grad = jax.lax.scan(of_positions, table_grad, (hidden, targets, tuple(masses), grads))
    return hidden_grad, None, table_grad.astype(table.dtype), None


_stats.defvjp(_stats_forward, _stats_backward)


def _starts(table):
    """First rows of the blocks of a table. The last block may begin in the one before it."""
    rows = table.shape[0]
    size = min(rows, BLOCK_ENTRIES)
    return np.minimum(np.arange(0, rows, size), rows - size).astype(np.int32)


def _block(cap, hidden, table, mask, start):
    """(rows of the table, logits [position, entry], numbers of the rows, which of these exist and were not in an
    earlier block, which are boundary entries) of the block that begins at `start`."""
    size = min(table.shape[0], BLOCK_ENTRIES)
    rows, exists, boundary = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (table, mask.exists, mask.boundary))
    numbers = start + jnp.arange(size)
    fresh = exists & (numbers >= -(-start // size) * size)  # from where a block begins if all are full
    return rows, block_logits(hidden, rows, fresh, cap), numbers, fresh, boundary

"""From hidden states to the numbers that losses read: the only file that sees the vocabulary axis.

Entries are divided over `tp`. Logits are computed in blocks of positions and entries, with running sums of exponentials
(online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867). The backward pass computes each block again. So no
array has both a time axis and a whole vocabulary axis, forward or backward, and the table is read once for many
positions. One kind of array is excepted: the distribution of the next byte, over a byte student's few hundred entries.
"""

import dataclasses
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Integer

from minalm.models.layers import softcap
from minalm.parallel.collectives import gather_channels, tp_max, tp_offset, tp_sum, vary_like
from minalm.parallel.mesh import param
from minalm.tokenization.prefixes import END, WINDOW, Prefixes
from minalm.types import BytePlaces, ByteScores, ByteTargets, TokenStats

BLOCK_ENTRIES = 8192
BLOCK_POSITIONS = 512  # of a teacher whose next byte is asked for
BLOCK_ELEMENTS = 2**22  # logits of one block on one device: 16 MiB in float32
TINY = 1e-26  # a sum of float32 exponentials, of at most 1, below which digits may be lost
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

    There is one exponential per entry, and the boundary mass keeps its digits and its gradient however small it is.
    Gradients of all blocks add up in float32.
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
            top, mass, lower, inside, at_target = sums
            _, logits, _, fresh, boundary = _block(cap, hidden, table, mask, start)
            highest = jnp.maximum(top, jnp.max(logits, axis=0))
            exponentials = jnp.exp(logits - highest)
            found = jnp.sum(jnp.where(boundary[:, None], exponentials, 0.0), axis=0)

            def anew():  # a mass that is tiny beside the rest has lost digits: beside its own maximum it has not
                logs = jnp.where(boundary[:, None], logits, -jnp.inf)
                own = jnp.max(logs, axis=0, initial=LOWEST)
                return own, jnp.sum(jnp.exp(logs - own), axis=0)

            tiny = jnp.any(found < TINY) & jnp.any(boundary)
            reference, found = jax.lax.cond(tiny, anew, lambda: (highest, found))
            raised = jnp.maximum(lower, reference)
            inside = inside * jnp.exp(lower - raised) + found * jnp.exp(reference - raised)
            mass = mass * jnp.exp(top - highest) + jnp.sum(exponentials, axis=0)
            row = jnp.clip(targets - start, 0, len(logits) - 1)
            value = jnp.take_along_axis(logits, row[None], axis=0)[0]
            at_target = at_target + jnp.where(fresh[row] & (start + row == targets), value, 0.0)
            return (highest, mass, raised, inside, at_target), None

        zero, lowest = jnp.zeros(len(targets)), jnp.full(len(targets), LOWEST)
        sums = vary_like((lowest, zero, lowest, zero, zero), (hidden, targets, table))
        (top, mass, lower, inside, at_target), _ = jax.lax.scan(add, sums, _starts(table))
        total, boundary = _log_sum(mass, top), _log_sum(inside, lower)
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
            inside = jnp.where(boundary[:, None], mass_grad * jnp.exp(logits - boundary_mass), 0.0)
            grad = inside - (logp_grad + mass_grad) * jnp.exp(logits - total)
            grad = grad + jnp.where(numbers[:, None] == targets, logp_grad, 0.0)
            if cap is not None:
                grad = grad * (1.0 - jnp.square(logits / cap))
            grad = jnp.where(fresh[:, None], grad, 0.0).astype(hidden.dtype)
            rows_grad = jnp.einsum("vp,pe->ve", grad, hidden, preferred_element_type=jnp.float32)
            rows_grad = rows_grad + jax.lax.dynamic_slice_in_dim(table_grad, start, len(rows))
            table_grad = jax.lax.dynamic_update_slice_in_dim(table_grad, rows_grad, start, 0)
            hidden_grad = hidden_grad + jnp.einsum("vp,ve->pe", grad, rows, preferred_element_type=jnp.float32)
            return (hidden_grad, table_grad), None

        hidden_grad = vary_like(jnp.zeros(hidden.shape, jnp.float32), hidden)
        (hidden_grad, table_grad), _ = jax.lax.scan(add, (hidden_grad, table_grad), _starts(table))
        return table_grad, hidden_grad.astype(hidden.dtype)

    table_grad = vary_like(jnp.zeros(table.shape, jnp.float32), (table, hidden))
    table_grad, hidden_grad = jax.lax.scan(of_positions, table_grad, (hidden, targets, tuple(masses), grads))
    return hidden_grad, None, table_grad.astype(table.dtype), None


_stats.defvjp(_stats_forward, _stats_backward)


def _log_sum(mass, top):
    """log of the sum over `tp` of mass * e^top."""
    highest = tp_max(top)
    return jnp.log(tp_sum(mass * jnp.exp(top - highest))) + highest


def _starts(table):
    """First rows of the blocks of a table. The last block may begin in the one before it."""
    rows = table.shape[0]
    size = min(rows, BLOCK_ENTRIES)
    return np.minimum(np.arange(0, rows, size), rows - size).astype(np.int32)


def _block(cap, hidden, table, mask, start):
    """(rows of the table, logits [entry, position], numbers of the rows, which of these exist and were not in an
    earlier block, which are boundary entries) of the block that begins at `start`. Entries come first: sums over them
    add up vectors of positions, which costs next to nothing beside the product (docs/performance.md)."""
    size = min(table.shape[0], BLOCK_ENTRIES)
    rows, exists, boundary = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (table, mask.exists, mask.boundary))
    numbers = start + jnp.arange(size)
    fresh = exists & (numbers >= -(-start // size) * size)  # from where a block begins if all are full
    logits = jnp.einsum("ve,pe->vp", rows, hidden, preferred_element_type=jnp.float32)
    return rows, jnp.where(fresh[:, None], softcap(logits, cap), -jnp.inf), numbers, fresh, boundary


# --- the next byte ------------------------------------------------------------------------------------------------


class Level(eqx.Module):
    """The slots of one depth of a `PrefixTree`, and the slot that each is added to."""

    child: Int[Array | np.ndarray, " slots"] = param(None)
    parent: Int[Array | np.ndarray, " slots"] = param(None)


class PrefixTree(eqx.Module):
    """The beginnings of a teacher's entries (tokenization/prefixes.py, where its fields are explained)."""

    slot: Int[Array | np.ndarray, " vocab"] = param("tp")
    window: Int[Array | np.ndarray, " vocab"] = param(None)
    order: Int[Array | np.ndarray, " entries"] = param(None)
    start: Int[Array | np.ndarray, " entries"] = param(None)
    length: Int[Array | np.ndarray, " entries"] = param(None)
    letters: Integer[Array | np.ndarray, " letters"] = param(None)
    low: Int[Array | np.ndarray, " nodes"] = param(None)
    high: Int[Array | np.ndarray, " nodes"] = param(None)
    depth: Int[Array | np.ndarray, " nodes"] = param(None)
    inner: Int[Array | np.ndarray, " nodes"] = param(None)
    children: Int[Array | np.ndarray, "inner places"] = param(None, None)
    outcomes: Int[Array | np.ndarray, " outcomes"] = param(None)
    levels: tuple[Level, ...]
    slots: int = eqx.field(static=True)

    @classmethod
    def of(cls, prefixes: Prefixes) -> "PrefixTree":
        levels = tuple(Level(*level) for level in prefixes.levels)
        names = [field.name for field in dataclasses.fields(cls) if field.name != "levels"]
        return cls(levels=levels, **{name: getattr(prefixes, name) for name in names})


def byte_targets(
    hidden: Float[Array, "batch time embed"],
    targets: Int[Array, "batch time"],
    unembedding: Float[Array, "vocab slice"],
    mask: VocabularyMask,
    final_softcap: float | None,
    tree: PrefixTree,
    places: BytePlaces,
) -> ByteTargets:
    """What a teacher implies of the next byte (Phan et al. 2024, arXiv 2410.09303), without a gradient.

    With P_k the teacher's distribution of its token k, and S_k(u) the sum over the entries that begin with u: after the
    bytes u of token k, byte b follows with m(b) = S_k(ub) / S_k(u), and with e = P_k(u) / S_k(u) an entry ends. Where
    the teacher's own token ended there (u is all of it), the next one begins: q = m + e S_{k+1}(b). After a special
    token, q = S_{k+1}(b). Elsewhere it is open what e falls on. The position counts if S_k(u) is not 0 in float32,
    which it is below e^-87 of the largest probability.

    Rows of the batch are read in groups, so that there are about BLOCK_POSITIONS positions at once.
    """
    batch, time, embed = hidden.shape
    table = gather_channels(unembedding, hidden.dtype)
    rows = math.gcd(batch, max(1, BLOCK_POSITIONS // time))

    def of_rows(group):
        hidden, targets, places = group
        hidden = hidden.reshape(rows * time, embed)
        masses, total, scale = _masses(final_softcap, hidden, table, mask, tree)
        window = _window_logits(final_softcap, hidden, tree.window[targets.reshape(-1)], table, tree)
        within, node, after = (x.reshape(-1) for x in (places.within, places.node, places.after))
        first = jnp.repeat(np.arange(rows) * time, places.node.shape[1])  # of this position's row
        position, node, begins = first + jnp.maximum(within, 0), jnp.maximum(node, 0), first + jnp.maximum(after, 0)

        found = tree.children[jnp.maximum(tree.inner[node], 0)]
        crown = tp_sum(masses[found, position[:, None]] * scale[position, None])
        near = _near_masses(window[position], tree.window[targets.reshape(-1)][position], node, tree)
        mass = jnp.where((tree.inner[node] >= 0)[:, None], crown, near)
        sums = jnp.sum(mass, axis=-1, keepdims=True)
        under_way = within >= 0
        shares = jnp.where(under_way[:, None], mass / jnp.maximum(sums, 1e-37), 0.0)
        ends = jnp.where(under_way, shares[:, -1], 1.0)

        outcomes = (tp_sum(masses[tree.outcomes] * scale) / total).T[begins]
        known = jnp.pad(shares[:, :-1], ((0, 0), (0, outcomes.shape[1] - 256)))
        known = known + jnp.where(after >= 0, ends, 0.0)[:, None] * outcomes
        counted = jnp.where(under_way, sums[:, 0] > 0.0, after >= 0)
        return known, jnp.where(after >= 0, 0.0, ends), counted

    inputs = jax.lax.stop_gradient((hidden, targets, places))
    found = jax.lax.map(of_rows, jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), inputs))
    return ByteTargets(*(x.reshape(batch, -1, *x.shape[2:]) for x in found))


def _masses(cap, hidden, table, mask, tree):
    """(the probability that is in each slot, [slot, position], times a constant of the position and of this device of
    `tp`; the sum over all entries of all devices; what makes the constants of all devices the same)."""

    def add(sums, start):
        reference, masses, total = sums
        rows, logits, _, _, _ = _block(cap, hidden, table, mask, start)
        slots = jax.lax.dynamic_slice_in_dim(tree.slot, start, len(rows))
        highest = jnp.max(logits, axis=0)

        def raised():  # seldom after the first block: the sums would be too large otherwise
            higher = jnp.maximum(reference, highest)
            return higher, masses * jnp.exp(reference - higher), total * jnp.exp(reference - higher)

        reference, masses, total = jax.lax.cond(
            jnp.any(highest > reference + 40.0), raised, lambda: (reference, masses, total)
        )
        exponentials = jnp.exp(logits - reference)
        return (reference, masses.at[slots].add(exponentials), total + jnp.sum(exponentials, axis=0)), None

    positions = len(hidden)
    nothing = jnp.full(positions, LOWEST), jnp.zeros((tree.slots, positions)), jnp.zeros(positions)
    (reference, masses, total), _ = jax.lax.scan(add, vary_like(nothing, (hidden, table)), _starts(table))
    for level in tree.levels:
        masses = masses.at[level.parent].add(masses[level.child])
    scale = jnp.exp(reference - tp_max(reference))
    return masses, tp_sum(total * scale), scale


def _window_logits(cap, hidden, first, table, tree):
    """Logits of the WINDOW entries from the rank `first` on, [position, entry], each from the device that has it."""
    size = max(1, BLOCK_ELEMENTS // (WINDOW * hidden.shape[1]))

    def of_position(position):
        hidden, first = position
        entries = tree.order[jnp.minimum(first + np.arange(WINDOW), len(tree.order) - 1)] - tp_offset(len(table))
        held = (entries >= 0) & (entries < len(table))
        rows = table[jnp.where(held, entries, 0)]
        logits = jnp.einsum("e,we->w", hidden, rows, preferred_element_type=jnp.float32)
        return jnp.where(held, softcap(logits, cap), 0.0)

    return tp_sum(jax.lax.map(of_position, (hidden, first), batch_size=size))


def _near_masses(window, first, node, tree):
    """Of the children of nodes that are not inner, the probability times a constant of the position, [position, place].
    `window` are the logits of the ranks from `first` on."""
    ranks = jnp.minimum(first[:, None] + np.arange(WINDOW), len(tree.order) - 1)
    below = (ranks >= tree.low[node][:, None]) & (ranks < tree.high[node][:, None])
    below = below & (np.arange(WINDOW) < len(tree.order) - first[:, None])
    depth = tree.depth[node][:, None]
    letter = tree.letters[jnp.minimum(tree.start[ranks] + depth, len(tree.letters) - 1)].astype(jnp.int32)
    place = jnp.where(tree.length[ranks] == depth, END, letter)
    highest = jnp.max(window, axis=-1, where=below, initial=LOWEST, keepdims=True)
    exponentials = jnp.where(below, jnp.exp(jnp.minimum(window - highest, 0.0)), 0.0)
    nothing = vary_like(jnp.zeros((len(node), END + 1)), exponentials)
    return nothing.at[np.arange(len(node))[:, None], place].add(exponentials)


def byte_scores(
    hidden: Float[Array, "batch time embed"],
    unembedding: Float[Array, "vocab slice"],
    mask: VocabularyMask,
    final_softcap: float | None,
    targets: ByteTargets,
) -> ByteScores:
    """Cross-entropy of a byte student's distribution of the next byte p, against the teacher's q.

    What is open goes to where the student exceeds the teacher: q = known + open r, with r proportional to
    max(p - known, 0) and constant. What the student has no entry for is missing in q, which then sums to less than 1.
    """
    batch, time, embed = hidden.shape
    table = gather_channels(unembedding, hidden.dtype)
    hidden = vary_like(hidden, table)
    own = tp_offset(len(table))
    known = jax.lax.dynamic_slice_in_dim(targets.known, own, len(table), axis=2)
    best = jnp.argmax(targets.known, axis=-1) - own
    positions = batch * time
    blocks = -(-positions // max(1, BLOCK_ELEMENTS // len(table)))
    size = -(-positions // blocks)

    def divided(x):
        x = x.reshape(positions, *x.shape[2:])
        return jnp.pad(x, ((0, blocks * size - positions), *((0, 0),) * (x.ndim - 1))).reshape(
            blocks, size, *x.shape[1:]
        )

    arguments = divided(hidden), table, mask.exists, *map(divided, (known, targets.open, best))
    scores = _byte_scores(final_softcap, *arguments)
    return ByteScores(*(x.reshape(-1)[:positions].reshape(batch, time) for x in scores))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _byte_scores(cap, hidden, table, exists, known, open, best):
    return _byte_scores_forward(cap, hidden, table, exists, known, open, best)[0]


def _byte_distribution(cap, hidden, table, exists, known, open):
    """(logits, log p, q) of the entries of this device, [position, entry] each."""
    logits = block_logits(hidden, table, exists, cap)
    highest = tp_max(jnp.max(logits, axis=-1, keepdims=True))
    logp = logits - highest - jnp.log(tp_sum(jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True)))
    excess = jnp.maximum(jnp.exp(logp) - known, 0.0)
    return logits, logp, known + open[:, None] * excess / jnp.maximum(tp_sum(jnp.sum(excess, -1, keepdims=True)), 1e-37)


def _byte_scores_forward(cap, hidden, table, exists, known, open, best):
    def of_positions(block):
        hidden, known, open, best = block
        logits, logp, q = _byte_distribution(cap, hidden, table, exists, known, open)
        cross_entropy = tp_sum(-jnp.sum(jnp.where(q > 0.0, q * jnp.maximum(logp, LOWEST), 0.0), axis=-1))
        at_best = jnp.where(np.arange(len(table)) == best[:, None], logits, -jnp.inf)
        return cross_entropy, tp_max(jnp.max(at_best, axis=-1)) >= tp_max(jnp.max(logits, axis=-1))

    saved = hidden, table, exists, known, open, best
    return jax.lax.map(of_positions, (hidden, known, open, best)), saved


def _byte_scores_backward(cap, saved, grads):
    """d cross-entropy / d logit = p sum(q) - q."""
    hidden, table, exists, known, open, _ = saved

    def of_positions(table_grad, block):
        hidden, known, open, grad = block
        logits, logp, q = _byte_distribution(cap, hidden, table, exists, known, open)
        grad = grad[:, None] * (jnp.exp(logp) * tp_sum(jnp.sum(q, axis=-1, keepdims=True)) - q)
        if cap is not None:
            grad = grad * (1.0 - jnp.square(logits / cap))
        grad = jnp.where(exists, grad, 0.0).astype(hidden.dtype)
        table_grad = table_grad + jnp.einsum("pv,pe->ve", grad, hidden, preferred_element_type=jnp.float32)
        return table_grad, jnp.einsum("pv,ve->pe", grad, table, preferred_element_type=jnp.float32).astype(hidden.dtype)

    table_grad = vary_like(jnp.zeros(table.shape, jnp.float32), (table, hidden))
    table_grad, hidden_grad = jax.lax.scan(of_positions, table_grad, (hidden, known, open, grads[0]))
    return hidden_grad, table_grad.astype(table.dtype), None, None, None, None


_byte_scores.defvjp(_byte_scores_forward, _byte_scores_backward)

"""Gradients of several losses balanced by their size in the last layer (GradMag), in one forward and one backward pass.

Each loss i is pulled back through the losses, the head and the last block only, to the gradient G_i of the last block
and to a cotangent of the trunk's output. With weights from the norms of the G_i, one weighted cotangent then goes
through the trunk. The gradients are those of the two-pass definition "weights first, then the gradient of the weighted
sum".
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PyTree

from minalm.losses import LossConfig
from minalm.sharding import squared_norm


def magnitude_weights(
    norms: Float32[Array, " loss"], preferences: tuple[float, ...], preserve_magnitude: bool
) -> Float32[Array, " loss"]:
    """preference / (norm + 1e-8), divided by their sum with `preserve_magnitude`; 0 where the gradient is exactly 0,
    since a loss without a counted element would otherwise take all the weight."""
    weights = jnp.where(norms > 0.0, jnp.array(preferences, jnp.float32) / (norms + 1e-8), 0.0)
    return weights / jnp.maximum(jnp.sum(weights), 1e-30) if preserve_magnitude else weights


def balanced_grad(
    trunk: Callable[[PyTree, PyTree], PyTree],
    tail: Callable[[PyTree, PyTree, PyTree], tuple[Float32[Array, " loss"], PyTree]],
    model: PyTree,
    batch: PyTree,
    config: LossConfig,
) -> tuple[PyTree, Float32[Array, " loss"], Float32[Array, " loss"], PyTree]:
    """(gradient of the weighted sum of losses, losses, weights, auxiliary output of tail).

    `trunk(model, batch)` gives what `tail(model, batch, trunk output)` turns into one value per loss; `model.last` is
    the last block.
    """
    hidden, pull_trunk = jax.vjp(lambda model: trunk(model, batch), model)
    in_tail, in_trunk = eqx.partition(model, model.in_tail())
    losses, pull_tail, auxiliary = jax.vjp(
        lambda part, hidden: tail(eqx.combine(part, in_trunk), batch, hidden), in_tail, hidden, has_aux=True
    )
    if config.balance == "fixed":
        weights = jnp.array(config.weights, jnp.float32)
        tail_grad, hidden_grad = pull_tail(weights)
    else:
        each = _each(pull_tail, config)
        weights = _weights(each[0].last, config)

        def weighted(leaf):
            return jnp.tensordot(weights, leaf.astype(jnp.float32), axes=1).astype(leaf.dtype)

        tail_grad, hidden_grad = jax.tree.map(weighted, each)
    (trunk_grad,) = pull_trunk(hidden_grad)
    return eqx.apply_updates(trunk_grad, tail_grad), losses, weights, auxiliary


def accumulated_grad(
    trunk: Callable[[PyTree, PyTree], PyTree],
    tail: Callable[[PyTree, PyTree, PyTree], tuple[Float32[Array, " loss"], PyTree]],
    model: PyTree,
    parts: PyTree,
    config: LossConfig,
) -> tuple[PyTree, Float32[Array, " loss"], Float32[Array, " loss"], PyTree]:
    """What `balanced_grad` gives for the batch whose parts are the leading axis of `parts`, with the memory of one part.

    The losses of the parts add up to those of the batch. So do their gradients in the last block, and the weights are
    formed of the norms of these sums: for them the parts are run twice, first to the last block's gradients alone.
    """

    def added(total, part):
        return jax.tree.map(jnp.add, total, part)

    if config.balance == "fixed":
        weights = jnp.array(config.weights, jnp.float32)
    else:

        def last_grads(totals, part):
            hidden = trunk(model, part)
            _, pull, _ = jax.vjp(
                lambda last: tail(eqx.tree_at(lambda m: m.last, model, last), part, hidden), model.last, has_aux=True
            )
            return added(totals, _each(pull, config)[0]), None

        nothing = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf) for _ in config.names]), model.last)
        each, _ = jax.lax.scan(last_grads, nothing, parts)
        weights = _weights(each, config)

    def weighted_grad(totals, part):
        def loss(model):
            losses, auxiliary = tail(model, part, trunk(model, part))
            return jnp.sum(weights * losses), (losses, auxiliary)

        grad, (losses, auxiliary) = jax.grad(loss, has_aux=True)(model)
        return added(totals, (grad, losses)), auxiliary

    nothing = jax.tree.map(jnp.zeros_like, model), jnp.zeros(len(config.names), jnp.float32)
    (grad, losses), auxiliary = jax.lax.scan(weighted_grad, nothing, parts)
    return grad, losses, weights, auxiliary


def _each(pull: Callable, config: LossConfig) -> PyTree:
    """What each loss pulls back, stacked along a leading axis; one after the other, for the memory of one."""
    return jax.lax.map(pull, jnp.eye(len(config.names), dtype=jnp.float32))


def _weights(last_grads: PyTree, config: LossConfig) -> Float32[Array, " loss"]:
    """The weights from the last block's gradient of each loss, [loss, ...]."""
    norms = [squared_norm(jax.tree.map(lambda leaf: leaf[loss], last_grads)) for loss in range(len(config.names))]
    return magnitude_weights(jnp.sqrt(jnp.stack(norms)), config.weights, config.preserve_magnitude)

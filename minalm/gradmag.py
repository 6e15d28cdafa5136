"""Gradients of several losses balanced by their size in the last layer (GradMag), in one forward and one backward pass.

Each loss i is pulled back through the losses, the head and the last block only, to the gradient G_i of the last block
and to a cotangent of the trunk's output. With weights from the norms of the G_i, one weighted cotangent then goes
through the trunk. The gradients are those of the two-pass definition "weights first, then the gradient of the weighted
sum".
"""

from collections.abc import Callable

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
    trunk: Callable[[PyTree], PyTree],
    tail: Callable[[PyTree, PyTree], tuple[Float32[Array, " loss"], PyTree]],
    model: PyTree,
    config: LossConfig,
) -> tuple[PyTree, Float32[Array, " loss"], Float32[Array, " loss"], PyTree]:
    """(gradient of the weighted sum of losses, losses, weights, auxiliary output of tail).

    `trunk(model)` gives what `tail(model, trunk output)` turns into one value per loss; `model.last` is the last block.
    """
    hidden, pull_trunk = jax.vjp(trunk, model)
    losses, pull_tail, auxiliary = jax.vjp(tail, model, hidden, has_aux=True)
    if config.balance == "fixed":
        weights = jnp.array(config.weights, jnp.float32)
        tail_grad, hidden_grad = pull_tail(weights)
    else:
        each = [pull_tail(one_hot) for one_hot in jnp.eye(len(config.names), dtype=jnp.float32)]
        norms = jnp.sqrt(jnp.stack([squared_norm(grad.last) for grad, _ in each]))
        weights = magnitude_weights(norms, config.weights, config.preserve_magnitude)

        def weighted(*leaves):
            total = sum(weight * leaf.astype(jnp.float32) for weight, leaf in zip(weights, leaves, strict=True))
            return total.astype(leaves[0].dtype)

        tail_grad, hidden_grad = jax.tree.map(weighted, *each)
    (trunk_grad,) = pull_trunk(hidden_grad)
    return jax.tree.map(jnp.add, tail_grad, trunk_grad), losses, weights, auxiliary

"""Gradients of several losses balanced by their size in the last layer (GradMag), in one forward and one backward pass.

Each loss is pulled back through the losses, the head and the last block only, to the gradient G_i of the last block and
to a cotangent of the trunk's output. With weights from the norms of the G_i, one weighted cotangent then goes through
the trunk. The gradients are those of the two-pass definition: weights first, then the gradient of the weighted sum.

The losses are pulled back one after the other, in the memory of one: a weight is known but for the sum of all weights,
so what a loss pulls back is added up weighted, and divided by that sum at the end. The final norm and the unembedding,
which with a tied table of a subword vocabulary is larger than the block, are pulled back once, by the weighted sum.

With a batch in parts (gradient accumulation) the weights are those of the whole batch: a first pass over the parts adds
up each loss's gradient of the last block. It costs one more forward pass of the student and the pullbacks; weights of
each part by itself would be another method.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PyTree

from minalm.distill.losses import LossConfig
from minalm.distill.parts import join, split
from minalm.parallel.collectives import squared_norm


class Forward(NamedTuple):
    """The way from a model and a batch to losses, cut before and after the last layer.

    Of the parameters, `last_layer` reads `model.last` alone, and `tail` what `model.in_tail()` names (see
    models/contract.py).
    """

    trunk: Callable[[PyTree, PyTree], PyTree]
    """(model, batch) -> what the last layer reads"""
    last_layer: Callable[[PyTree, PyTree], PyTree]
    """(model, output of trunk) -> what the tail reads"""
    tail: Callable[[PyTree, PyTree, PyTree], tuple[Float32[Array, " loss"], PyTree]]
    """(model, batch, output of last_layer) -> losses, auxiliary output"""


def magnitude_weights(
    norms: Float32[Array, "*losses"],
    preferences: tuple[float, ...] | Float32[Array, "*losses"],
    preserve_magnitude: bool,
) -> Float32[Array, "*losses"]:
    """preference / (norm + 1e-8), divided by their sum with `preserve_magnitude`.

    The weight is 0 where the gradient is exactly 0: a loss without a counted element would otherwise take all of it.
    """
    weights = jnp.where(norms > 0.0, jnp.asarray(preferences, jnp.float32) / (norms + 1e-8), 0.0)
    return weights / jnp.maximum(jnp.sum(weights), 1e-30) if preserve_magnitude else weights


def balanced_gradients(
    forward: Forward,
    model: PyTree,
    batch: PyTree,
    config: LossConfig,
    parts: int,
) -> tuple[PyTree, Float32[Array, " loss"], Float32[Array, " loss"], PyTree]:
    """(gradient of the weighted sum of losses, losses, weights, auxiliary output of tail), in `parts` microbatches."""
    if parts == 1:
        return balanced_grad(forward, model, batch, config)
    grad, losses, weights, auxiliary = accumulated_grad(forward, model, split(batch, parts), config)
    return grad, losses, weights, join(auxiliary)


def balanced_grad(
    forward: Forward,
    model: PyTree,
    batch: PyTree,
    config: LossConfig,
) -> tuple[PyTree, Float32[Array, " loss"], Float32[Array, " loss"], PyTree]:
    """`balanced_gradients` of a batch at once."""
    hidden, pull_trunk = jax.vjp(lambda model: forward.trunk(model, batch), model)
    output, pull_last = jax.vjp(
        lambda last, hidden: forward.last_layer(eqx.tree_at(lambda m: m.last, model, last), hidden), model.last, hidden
    )
    head, others = eqx.partition(model, model.in_tail())
    losses, pull_tail, auxiliary = jax.vjp(
        lambda head, output: forward.tail(eqx.combine(head, others), batch, output), head, output, has_aux=True
    )
    if config.balance == "fixed":
        weights = jnp.array(config.weights, jnp.float32)
        head_grad, output_grad = pull_tail(weights)
        last_grad, hidden_grad = pull_last(output_grad)
    else:

        def add(totals, loss):
            cotangent, preference = loss
            found = pull_last(pull_tail(cotangent)[1])
            weight = magnitude_weights(jnp.sqrt(squared_norm(found[0])), preference, False)
            return jax.tree.map(lambda total, leaf: total + weight * leaf.astype(jnp.float32), totals, found), weight

        parts = model.last, hidden
        nothing = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), parts)
        each = jnp.eye(len(config.names), dtype=jnp.float32), jnp.array(config.weights, jnp.float32)
        totals, weights = jax.lax.scan(add, nothing, each)
        size = jnp.maximum(jnp.sum(weights), 1e-30) if config.preserve_magnitude else 1.0
        weights = weights / size
        last_grad, hidden_grad = jax.tree.map(lambda total, leaf: (total / size).astype(leaf.dtype), totals, parts)
        head_grad, _ = pull_tail(weights)
    (grad,) = pull_trunk(hidden_grad)
    grad = eqx.apply_updates(grad, head_grad)
    return eqx.tree_at(lambda m: m.last, grad, last_grad), losses, weights, auxiliary


def accumulated_grad(
    forward: Forward,
    model: PyTree,
    parts: PyTree,
    config: LossConfig,
) -> tuple[PyTree, Float32[Array, " loss"], Float32[Array, " loss"], PyTree]:
    """`balanced_gradients` of a batch whose parts are the leading axis of `parts`, in the memory of one part."""

    def added(total, part):
        # Without the barrier the TPU compiler (libtpu 0.0.42.1) fails on a Bolmo in bfloat16: it tries to take the sums
        # over the devices out of the loop and does not expect the cast behind them.
        return jax.tree.map(lambda total, leaf: total + jax.lax.optimization_barrier(leaf), total, part)

    if config.balance == "fixed":
        weights = jnp.array(config.weights, jnp.float32)
    else:

        def last_grads(totals, part):
            hidden = forward.trunk(model, part)

            def of_last(last):
                whole = eqx.tree_at(lambda m: m.last, model, last)
                return forward.tail(whole, part, forward.last_layer(whole, hidden))

            _, pull, _ = jax.vjp(of_last, model.last, has_aux=True)
            return added(totals, _each(pull, config)[0]), None

        nothing = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf) for _ in config.names]), model.last)
        each, _ = jax.lax.scan(last_grads, nothing, parts)
        weights = _weights(each, config)

    def weighted_grad(totals, part):
        def loss(model):
            hidden = forward.last_layer(model, forward.trunk(model, part))
            losses, auxiliary = forward.tail(model, part, hidden)
            return jnp.sum(weights * losses), (losses, auxiliary)

        grad, (losses, auxiliary) = jax.grad(loss, has_aux=True)(model)
        return added(totals, (grad, losses)), auxiliary

    nothing = jax.tree.map(jnp.zeros_like, model), jnp.zeros(len(config.names), jnp.float32)
    (grad, losses), auxiliary = jax.lax.scan(weighted_grad, nothing, parts)
    return grad, losses, weights, auxiliary


def _each(pull: Callable, config: LossConfig) -> PyTree:
    """What each loss pulls back, stacked along a leading axis."""
    return jax.lax.map(pull, jnp.eye(len(config.names), dtype=jnp.float32))


def _weights(last_grads: PyTree, config: LossConfig) -> Float32[Array, " loss"]:
    """The weights from the last block's gradient of each loss, [loss, ...]."""
    norms = [squared_norm(jax.tree.map(lambda leaf: leaf[loss], last_grads)) for loss in range(len(config.names))]
    return magnitude_weights(jnp.sqrt(jnp.stack(norms)), config.weights, config.preserve_magnitude)

"""Several models' distributions of the next token as one."""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from minalm.errors import InputError

Mean = Literal["probability", "log"]


def combine(
    logits: Sequence[Float[Array, "*rows vocab"]], weights: tuple[float, ...], mean: Mean
) -> Float32[Array, "*rows vocab"]:
    """Normalized log-probabilities of an ensemble, from each model's logits over the same entries.

    "probability": log sum_i w_i p_i, a mixture. "log": the log-softmax of sum_i w_i log p_i, a product of experts
    (Hinton 2002), in which an entry that one model excludes (-inf) is excluded. Weights are positive and add up to 1.
    Runs on whole arrays, outside of `shard_map`; differentiable.
    """
    logp = jnp.stack([jax.nn.log_softmax(each.astype(jnp.float32), axis=-1) for each in logits])
    if len(logits) == 1:
        return logp[0]
    weight = jnp.asarray(weights, jnp.float32).reshape(-1, *[1] * (logp.ndim - 1))
    if mean == "probability":
        return jax.nn.logsumexp(logp + jnp.log(weight), axis=0)
    return jax.nn.log_softmax(jnp.sum(weight * logp, axis=0), axis=-1)


def normalized_weights(weights: Sequence[float] | None, models: int) -> tuple[float, ...]:
    """Weights of an ensemble that add up to 1; None: equal ones.

    Raises InputError unless there is a positive number for each model.
    """
    if weights is None:
        return (1.0 / models,) * models
    if len(weights) != models or not all(0.0 < weight < math.inf for weight in weights):
        shown = " ".join(map(str, weights)) or "none"
        raise InputError(f"--weights {shown} for {models} models: give one positive number for each model")
    return tuple(weight / sum(weights) for weight in weights)

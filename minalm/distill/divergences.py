"""Divergences between the chunk probabilities of teacher and student."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BELOW_ONE = 1e-6  # subtracted from l / tau so that log(1 - p) stays finite


Divergence = Literal[
    "binary_ce", "binary_kl", "reverse_binary_kl", "binary_kl_temp_limit", "abs", "abs_exp", "renyi", "k2", "k3"
]


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
    teacher: Float[Array, "batch chunk"],
    student: Float[Array, "batch chunk"],
    kind: Divergence,
    tau: float,
    alpha: float,
) -> Float[Array, "batch chunk"]:
    """f(p_T || p_S) + f(1 - p_T || 1 - p_S) of chunk log-probabilities (equation 4; others from the appendix).

    With r = (l_T - l_S) / tau, k2 and k3 are the estimators of the KL divergence of Schulman,
    http://joschu.net/blog/kl-approx.html. tau does not enter abs, binary_kl_temp_limit and renyi.
    """
    if kind == "abs":
        return jnp.abs(teacher - student)
    ratio = (teacher - student) / tau
    if kind == "k2":
        return jnp.square(ratio) / 2.0
    if kind == "k3":
        return jnp.expm1(ratio) - ratio

    tau = 1.0 if kind in ("binary_kl_temp_limit", "renyi") else tau
    log_pt, log_ps = tempered(teacher, tau), tempered(student, tau)
    if kind == "binary_kl_temp_limit":
        # (l_T - l_S) + l_T log(l_S / l_T); where both are near, the difference is taken before it can cancel.
        excess = (log_ps - log_pt) / log_pt
        near = jnp.abs(excess) < 0.5
        ratio = jnp.log(-log_ps) - jnp.log(-log_pt)
        return log_pt * (jnp.where(near, jnp.log1p(jnp.where(near, excess, 0.0)), ratio) - excess)
    if kind == "abs_exp":
        return jnp.abs(jnp.exp(log_pt) - jnp.exp(log_ps))
    log_qt, log_qs = log_one_minus_exp(log_pt), log_one_minus_exp(log_ps)  # q = 1 - p
    if kind == "binary_ce":
        return -(jnp.exp(log_pt) * log_ps - jnp.expm1(log_pt) * log_qs)
    if kind == "binary_kl":
        return jnp.exp(log_pt) * (log_pt - log_ps) - jnp.expm1(log_pt) * (log_qt - log_qs)
    if kind == "reverse_binary_kl":
        return jnp.exp(log_ps) * (log_ps - log_pt) - jnp.expm1(log_ps) * (log_qs - log_qt)
    power_p = alpha * log_pt + (1.0 - alpha) * log_ps
    power_q = alpha * log_qt + (1.0 - alpha) * log_qs
    return jnp.logaddexp(power_p, power_q) / (alpha - 1.0)  # renyi

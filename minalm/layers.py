"""Pure functions on arrays, the arithmetic of a transformer. No parameters, no policy, no mesh.

Axes: batch, time (queries), key_time, embed, heads, kv_heads, head_dim, mlp.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def project(
    x: Float[Array, "batch time *inner"], weight: Float[Array, "*shape"], inner: int = 1
) -> Float[Array, "..."]:
    """x times weight over the last `inner` dimensions of x and the first `inner` of weight.

    Written as a product of two matrices, which the CPU compiler hands to its fast kernel; as an einsum over four
    dimensions it does not.
    """
    out = weight.shape[inner:]
    rows = x.shape[: x.ndim - inner]
    flat = x.reshape(math.prod(rows), -1) @ weight.reshape(-1, math.prod(out))
    return flat.reshape(*rows, *out)


def rms_norm(
    x: Float[Array, "*rows embed"],
    weight: Float[Array, " embed"],
    eps: float,
    plus_one: bool,
    mean_square: Float[Array, "*rows 1"] | None = None,
) -> Float[Array, "*rows embed"]:
    """x / sqrt(mean x^2 + eps), times weight or (Gemma) 1 + weight; computed in float32.

    `mean_square` is that mean where x is only a part of what it is taken over.
    """
    wide = x.astype(jnp.float32)
    if mean_square is None:
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + eps)
    scale = weight.astype(jnp.float32)
    return (normed * (1.0 + scale if plus_one else scale)).astype(x.dtype)


def softcap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap * tanh(x / cap): bounds |x| by cap, the identity for None (Gemma 2, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope(
    x: Float[Array, "batch time heads head_dim"],
    positions: Int[Array, "rows time"],
    inverse_frequencies: Float[Array | np.ndarray, " half"],
    magnitude: Float[Array | np.ndarray, ""],
) -> Float[Array, "batch time heads head_dim"]:
    """Rotary position embedding, half-split: channel i turns with i + head_dim / 2, as in Hugging Face weights. The
    result is `magnitude` times as long (YaRN)."""
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies
    sin, cos = ((magnitude * turned).astype(x.dtype) for turned in (jnp.sin(angles), jnp.cos(angles)))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch key_time kv_heads head_dim"],
    v: Float[Array, "batch key_time kv_heads head_dim"],
    positions: Int[Array, "rows time"],
    window: Int[Array | np.ndarray, ""],
    scale: float,
    cap: float | None,
) -> Float[Array, "batch time heads head_dim"]:
    """Causal attention with grouped heads; key j sits at position j, and a query sees the last `window` keys.

    Scores are capped before the mask (Gemma 2, section 2) and normalised in float32.
    """
    batch, time, heads, head_dim = q.shape
    key_time, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    # The query heads of a group become rows of one matrix: fewer, larger products.
    q = q.reshape(batch, time, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, group * time, head_dim) * jnp.asarray(scale, q.dtype)
    scores = jnp.einsum("bkqd,bskd->bkqs", q, k, preferred_element_type=jnp.float32)
    scores = softcap(scores, cap).reshape(batch, kv_heads, group, time, key_time)
    distance = positions[:, :, None] - jnp.arange(key_time)
    visible = (distance >= 0) & (distance < window)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, kv_heads, group * time, key_time)
    mixed = jnp.einsum("bkqs,bskd->bkqd", weights, v).reshape(batch, kv_heads, group, time, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, head_dim)

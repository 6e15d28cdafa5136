"""Pure functions on arrays, the arithmetic of a transformer. No parameters, no policy, no mesh.

Axes: batch, time (queries), key_time, embed, heads, kv_heads, head_dim, mlp.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from minalm.parallel.collectives import vary_like

PROJECTED = "projected"  # the name under which a rematerialisation policy finds the results of `project`


class Rotation(NamedTuple):
    """Sines and cosines of the rotary embedding at some positions, for all heads."""

    sin: Float[Array, "*stack rows time 1 half"]
    cos: Float[Array, "*stack rows time 1 half"]


def project(
    x: Float[Array, "batch time *inner"], weight: Float[Array, "*shape"], inner: int = 1
) -> Float[Array, "..."]:
    """x times weight over the last `inner` dimensions of x and the first `inner` of weight.

    Written as a product of two matrices, for which XLA on CPU has a fast kernel; for an einsum over four dimensions it
    has none.
    """
    out = weight.shape[inner:]
    rows = x.shape[: x.ndim - inner]
    flat, matrix = x.reshape(math.prod(rows), -1), weight.reshape(-1, math.prod(out))
    product = flat @ matrix if x.dtype == jnp.float32 else _rounded_product(*vary_like((flat, matrix), (flat, matrix)))
    return checkpoint_name(product, PROJECTED).reshape(*rows, *out)


@jax.custom_vjp
def _rounded_product(left: Float[Array, "m k"], right: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """A bfloat16 product, on a CPU rounded from a float32 one, which takes three quarters of the time there.

    The backward pass does the same, with the rounded result as its input. Other platforms add up in float32 anyway, and
    on a TPU the float32 results would go to memory (docs/performance.md).
    """

    def wide(left, right):
        return jnp.matmul(left, right, preferred_element_type=jnp.float32).astype(left.dtype)

    return jax.lax.platform_dependent(left, right, cpu=wide, default=jnp.matmul)


def _rounded_product_backward(saved, grad):
    left, right = saved
    return _rounded_product(grad, right.T), _rounded_product(left.T, grad)


_rounded_product.defvjp(lambda left, right: (_rounded_product(left, right), (left, right)), _rounded_product_backward)


def rms_norm(
    x: Float[Array, "*rows embed"],
    weight: Float[Array, " embed"],
    eps: float,
    plus_one: bool,
    mean_square: Float[Array, "*rows 1"] | None = None,
) -> Float[Array, "*rows embed"]:
    """x / sqrt(mean x^2 + eps), times weight or (Gemma) 1 + weight; computed in float32.

    `mean_square` is the mean of x^2 where x holds only a part of what it is taken over.
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


def scaled(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """x times a factor that is not rounded to the dtype of x (Granite)."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def rotation(
    positions: Int[Array, "rows time"],
    inverse_frequencies: Float[np.ndarray, " half"],
    magnitude: float,
    dtype: jnp.dtype,
) -> Rotation:
    """The table for `rotate` at these positions, times `magnitude` (YaRN). Computed in float32."""
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies
    return Rotation(*((magnitude * turned).astype(dtype) for turned in (jnp.sin(angles), jnp.cos(angles))))


def rotate(
    x: Float[Array, "batch time heads head_dim"], rotation: Rotation
) -> Float[Array, "batch time heads head_dim"]:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

    Channel i turns with channel i + half, as in Hugging Face weights; channels from 2 half on stay what they are.
    """
    sin, cos = rotation
    half = sin.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def attend(
    q: Float[Array, "batch heads time head_dim"],
    keys: Sequence[Float[Array, "batch kv_heads head_dim _"]],
    values: Sequence[Float[Array, "batch kv_heads _ head_dim"]],
    visible: Bool[Array, "batch time key_time"],
    scale: float,
    cap: float | None,
) -> Float[Array, "batch heads time head_dim"]:
    """Attention with grouped heads to keys that come in parts, for decoding: those of a cache, and new ones.

    Scores are capped before the mask (Gemma 2, section 2) and normalised in float32. Keys have their channels first, with
    which XLA on CPU makes the scores of one query in a quarter to two thirds of the time.
    """
    batch, heads, time, head_dim = q.shape
    kv_heads = keys[0].shape[1]
    group = heads // kv_heads
    # The query heads of a group become rows of one matrix: fewer, larger products.
    q = q.reshape(batch, kv_heads, group * time, head_dim) * jnp.asarray(scale, q.dtype)
    scores = [jnp.einsum("bkqd,bkds->bkqs", q, part, preferred_element_type=jnp.float32) for part in keys]
    scores = softcap(jnp.concatenate(scores, axis=-1), cap).reshape(batch, kv_heads, group, time, -1)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(batch, kv_heads, group * time, -1)
    parts = jnp.split(weights, np.cumsum([part.shape[3] for part in keys[:-1]]).tolist(), axis=-1)
    mixed = sum(jnp.einsum("bkqs,bksd->bkqd", part, value) for part, value in zip(parts, values, strict=True))
    return mixed.reshape(batch, heads, time, head_dim)

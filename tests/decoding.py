"""What decoding computes: greedy continuations by the package's own generator, and its attention."""

from collections.abc import Collection

import jax.numpy as jnp

from minalm.generation.engine import Generator
from minalm.generation.sampling import SamplingConfig
from minalm.huggingface.loaded import LoadedModel
from minalm.models import layers

FLOAT32 = jnp.dtype(jnp.float32)


def generator(model, mask, suffixes, mesh) -> Generator:
    """A generator of a model whose vocabulary does not matter."""
    return Generator.of([LoadedModel(model, None, suffixes, mask)], mesh, FLOAT32)


def greedy(model, mask, suffixes, prompts, new: int, mesh, stop: Collection[int] = ()) -> list[list[int]]:
    """The continuations of prompts by `new` tokens."""
    return generator(model, mask, suffixes, mesh).generate(prompts, SamplingConfig(), new, stop)


def attend(q, k, v, positions, window, scale, cap):
    """`layers.attend` for arrays [batch, time, heads, head_dim]: queries at `positions`, keys from 0 on, in two parts."""
    distance = positions[:, :, None] - jnp.arange(k.shape[1])
    visible = jnp.broadcast_to((distance >= 0) & (distance < window), (q.shape[0], *distance.shape[1:]))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    cut = k.shape[2] // 2
    keys = k[:, :, :cut].swapaxes(2, 3), k[:, :, cut:].swapaxes(2, 3)
    return layers.attend(q, keys, (v[:, :, :cut], v[:, :, cut:]), visible, scale, cap).swapaxes(1, 2)

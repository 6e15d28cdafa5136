"""Greedy continuations by the package's own generator."""

from collections.abc import Collection

import jax.numpy as jnp

from minalm.generation.engine import Generator
from minalm.generation.sampling import SamplingConfig
from minalm.huggingface.loaded import LoadedModel

FLOAT32 = jnp.dtype(jnp.float32)


def generator(model, mask, suffixes, mesh) -> Generator:
    """A generator of a model whose vocabulary does not matter."""
    return Generator.of([LoadedModel(model, None, suffixes, mask)], mesh, FLOAT32)


def greedy(model, mask, suffixes, prompts, new: int, mesh, stop: Collection[int] = ()) -> list[list[int]]:
    """The continuations of prompts by `new` tokens."""
    return generator(model, mask, suffixes, mesh).generate(prompts, SamplingConfig(), new, stop)

"""Sampling from a model: one pass over the prompts, then one token a row and step, with a cache."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int, PRNGKeyArray

from minalm.models.config import LongRopeScaling
from minalm.models.head import VocabularyMask, block_logits
from minalm.models.transformer import Cache, Transformer
from minalm.parallel.collectives import gather_channels
from minalm.parallel.mesh import ROWS, shard_map, shardings, specs

Suffixes = Callable[[Int[np.ndarray, "batch time"]], Int[np.ndarray, "batch time"]]


CACHE_LAYOUT = P(None, "fsdp", None, "tp", None), P("fsdp", None, "tp", None)  # of the stacked blocks, of the last


def next_logits(
    model: Transformer,
    mask: VocabularyMask,
    caches: tuple[Cache, Cache],
    inputs: Int[Array, "batch time"],
    suffix: Int[Array, "batch time"] | None,
    positions: Int[Array, "batch time"],
    last: Int[Array, " batch"],
    dtype: jnp.dtype,
) -> tuple[Float32[Array, "batch vocab"], tuple[Cache, Cache]]:
    """Logits after input `last` of each row, and the caches (of the stacked blocks, of the last) with the inputs added.

    Padding behind a row's last input is written to the cache too. It is overwritten before any query can see it.
    Runs inside `shard_map`.
    """
    x = model.embed_tokens(inputs, suffix, dtype)
    x, _, stacked = model.stacked_blocks(x, positions, cache=caches[0])
    x, single = model.last_block(x, positions, cache=caches[1])
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    hidden = model.before_head(model.final_norm(x))[:, 0]
    logits = block_logits(hidden, gather_channels(model.unembedding, dtype), mask.exists, model.config.final_softcap)
    return logits, (stacked, single)


def empty_caches(model: Transformer, batch: int, length: int, mesh: Mesh, dtype: jnp.dtype) -> tuple[Cache, Cache]:
    """Room for `length` positions of each row."""
    kv_heads = max(model.config.kv_heads, mesh.shape["tp"])  # one that several devices share is held by each
    shape = (batch, length, kv_heads, model.config.head_dim)
    shapes = (model.config.layers - 1, *shape), shape

    def cache(shape, layout):
        return Cache(*(jnp.zeros(shape, dtype, device=layout) for _ in range(2)))

    stacked, single = map(cache, shapes, shardings(CACHE_LAYOUT, mesh))
    return stacked, single


def sample(logits: Float32[Array, "batch vocab"], temperature: float, key: PRNGKeyArray) -> Int[Array, " batch"]:
    """One id for each row; the likeliest at temperature 0."""
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1)
    return jax.random.categorical(key, logits / temperature)


def generate(
    model: Transformer,
    mask: VocabularyMask,
    suffixes: Suffixes | None,
    prompts: Sequence[Int[np.ndarray, " _"]],
    new_tokens: int,
    stop: int | None,
    mesh: Mesh,
    dtype: jnp.dtype,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continuations of prompts of any lengths: up to `new_tokens` ids each, without the `stop` id that ends one.

    `suffixes` gives the expansion ids of rows of inputs (suffixes.py), for a model that has an expansion table.
    """

    def continued(prompts, new_tokens):
        return _continuations(model, mask, suffixes, prompts, new_tokens, mesh, dtype, temperature, seed)

    scalings = [rope.scaling for rope in model.config.ropes if rope is not None]
    limits = [scaling.original_length for scaling in scalings if isinstance(scaling, LongRopeScaling)]
    continuations = []
    if any(min(map(len, prompts)) <= limit < max(map(len, prompts)) + new_tokens - 1 for limit in limits):
        # A text that is longer than this is read anew, since all its keys change: each row by itself.
        for prompt in prompts:
            ids = np.asarray(prompt)
            first = min(max(limits[0] + 1 - len(ids), 0), new_tokens)
            for count in (first, new_tokens - first):
                ids = np.concatenate([ids, continued([ids], count)[0]]).astype(np.int32) if count else ids
            continuations.append(ids[len(prompt) :].tolist())
    else:
        continuations = continued(prompts, new_tokens)
    return [new[: new.index(stop)] if stop in new else new for new in continuations]


def _continuations(model, mask, suffixes, prompts, new_tokens, mesh, dtype, temperature, seed) -> list[list[int]]:
    """Those of `generate`, with one cache and without stops."""
    batch = (
        len(prompts) + -len(prompts) % mesh.shape["fsdp"]
    )  # the devices divide the rows; nobody reads the added ones
    lengths = np.array([*map(len, prompts), *[1] * (batch - len(prompts))])
    ids = np.zeros((batch, lengths.max() + new_tokens), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    step = jax.jit(
        shard_map(
            functools.partial(next_logits, dtype=dtype),
            mesh,
            in_specs=(
                *specs((model, mask), mesh),
                CACHE_LAYOUT,
                ROWS,
                None if suffixes is None else ROWS,
                ROWS,
                ROWS,
            ),
            out_specs=(P("fsdp", "tp"), CACHE_LAYOUT),
        ),
        donate_argnums=2,
    )

    @functools.partial(jax.jit, out_shardings=shardings(P(), mesh))  # every process goes on with all rows
    def choose(logits, number):
        keys = jax.random.split(jax.random.key(seed), new_tokens)
        return sample(logits, temperature, keys[number])

    caches = empty_caches(model, batch, ids.shape[1] - 1, mesh, dtype)  # the last id is not read
    rows = np.arange(batch)
    positions = np.arange(lengths.max())[None].repeat(batch, 0)
    for number in range(new_tokens):
        expanded = None if suffixes is None else np.take_along_axis(suffixes(ids), positions, axis=1)
        inputs = np.take_along_axis(ids, positions, axis=1)
        last = lengths - 1 if number == 0 else np.zeros_like(lengths)
        logits, caches = step(model, mask, caches, inputs, expanded, positions, last)
        ids[rows, lengths + number] = jax.device_get(choose(logits, number))
        positions = (lengths + number)[:, None]
    return [ids[row, length : length + new_tokens].tolist() for row, length in zip(range(len(prompts)), lengths)]

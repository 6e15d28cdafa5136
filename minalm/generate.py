"""Sampling from a model: the prompts are read in one pass, then one token a row and step, with a cache."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int, PRNGKeyArray

from minalm.head import Entries, block_logits
from minalm.model import Cache, Transformer
from minalm.sharding import ROWS, P, gather_channels, on_mesh, shardings, specs

Ngrams = Callable[[Int[np.ndarray, "batch time"]], Int[np.ndarray, "batch time"]]
CACHE_LAYOUT = P(None, "fsdp", None, "tp", None), P("fsdp", None, "tp", None)  # of the stacked blocks, of the last


def next_logits(
    model: Transformer,
    entries: Entries,
    caches: tuple[Cache, Cache],
    inputs: Int[Array, "batch time"],
    ngram: Int[Array, "batch time"] | None,
    positions: Int[Array, "batch time"],
    last: Int[Array, " batch"],
    dtype: jnp.dtype,
) -> tuple[Float32[Array, "batch vocab"], tuple[Cache, Cache]]:
    """Logits after input `last` of each row, and the caches (of the stacked blocks, of the last) with the inputs added.

    Padding behind a row's last input is written to the cache too; it is overwritten before any query can see it.
    Runs inside shard_map.
    """
    config = model.config
    stacked_varying, last_varying = config.varying()
    x = model.embed_tokens(inputs, ngram, dtype)

    def body(x, layer):
        block, varying, cache = layer
        return block(x, config, positions, varying, cache)

    x, stacked = jax.lax.scan(body, x, (model.blocks, stacked_varying, caches[0]))
    x, single = model.last(x, config, positions, last_varying, caches[1])
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    hidden = model.final_norm(x)[:, 0]
    logits = block_logits(hidden, gather_channels(model.unembedding, dtype), entries.exists, config.final_softcap)
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
    """One entry a row; the likeliest at temperature 0."""
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1)
    return jax.random.categorical(key, logits / temperature)


def generate(
    model: Transformer,
    entries: Entries,
    ngrams: Ngrams | None,
    prompts: Sequence[Int[np.ndarray, " _"]],
    new_tokens: int,
    stop: int | None,
    mesh: Mesh,
    dtype: jnp.dtype,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continuations of prompts of any lengths: up to `new_tokens` ids each, without the `stop` id that ends one.

    `ngrams` gives the expansion ids of rows of inputs (ngrams.py), for a model that has an expansion table.
    """
    batch = len(prompts) + -len(prompts) % mesh.shape["fsdp"]  # rows divide over the devices; the added ones are unread
    lengths = np.array([*map(len, prompts), *[1] * (batch - len(prompts))])
    ids = np.zeros((batch, lengths.max() + new_tokens), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    step = jax.jit(
        on_mesh(
            functools.partial(next_logits, dtype=dtype),
            mesh,
            in_specs=(*specs((model, entries), mesh), CACHE_LAYOUT, ROWS, None if ngrams is None else ROWS, ROWS, ROWS),
            out_specs=(P("fsdp", "tp"), CACHE_LAYOUT),
        ),
        donate_argnums=2,
    )

    @functools.partial(jax.jit, out_shardings=shardings(P(), mesh))  # every process goes on with all rows
    def choose(logits, number):
        keys = jax.random.split(jax.random.key(seed), new_tokens)
        return sample(logits, temperature, keys[number])

    caches = empty_caches(model, batch, ids.shape[1], mesh, dtype)
    rows = np.arange(batch)
    positions = np.arange(lengths.max())[None].repeat(batch, 0)
    for number in range(new_tokens):
        expanded = None if ngrams is None else np.take_along_axis(ngrams(ids), positions, axis=1)
        inputs = np.take_along_axis(ids, positions, axis=1)
        last = lengths - 1 if number == 0 else np.zeros_like(lengths)
        logits, caches = step(model, entries, caches, inputs, expanded, positions, last)
        ids[rows, lengths + number] = jax.device_get(choose(logits, number))
        positions = (lengths + number)[:, None]
    continuations = [
        ids[row, length : length + new_tokens].tolist() for row, length in zip(range(len(prompts)), lengths)
    ]
    return [new[: new.index(stop)] if stop in new else new for new in continuations]

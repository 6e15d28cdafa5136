"""A Transformer laid out for decoding: whole along `fsdp`, products of one input fused, one block after the other.

A step of decoding reads every weight once for a few rows, so what counts is that nothing else is read or copied, and how
many operations there are. Rows of a batch are aligned at their ends: a *column* holds one token of each row, every row
writes its keys in the same place, and a row's position is the column less its `offset`.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int

from minalm.models import layers
from minalm.models.config import FULL_ATTENTION, LongRopeScaling, ModelConfig, Rope
from minalm.models.contract import Model
from minalm.models.head import VocabularyMask, block_logits
from minalm.models.transformer import Block, Transformer, head_norm
from minalm.parallel.collectives import tp_offset, tp_share, tp_size, tp_sum
from minalm.parallel.mesh import layouts, param, shard_map, specs

T = TypeVar("T")


class Cache(eqx.Module):
    """Keys and values of one block, in a ring: column c is in slot c modulo the number of slots."""

    k: Float[Array, "batch kv_heads head_dim slot"] = param("fsdp", "tp", None, None)
    v: Float[Array, "batch kv_heads slot head_dim"] = param("fsdp", "tp", None, None)


class DecoderBlock(eqx.Module):
    """One block. Each device of `tp` holds side by side what it needs of q, k and v, and of gate and up. Matrices are
    [out, in], which XLA on CPU reads fastest for a few rows, if they are large (docs/performance.md)."""

    qkv: Float[Array, "qkv embed"] = param("tp", None)
    qkv_bias: Float[Array, " qkv"] | None = param("tp")
    o: Float[Array, "embed heads_x_head_dim"] = param(None, "tp")
    o_bias: Float[Array, " embed"] | None = param(None)
    q_norm: Float[Array, " q_norm"] | None = param(None)
    k_norm: Float[Array, " k_norm"] | None = param(None)
    gate_up: Float[Array, "gate_up embed"] = param("tp", None)
    gate_up_bias: Float[Array, " gate_up"] | None = param("tp")
    down: Float[Array, "embed mlp"] = param(None, "tp")
    down_bias: Float[Array, " embed"] | None = param(None)
    attention_norm: Float[Array, " embed"] | None = param(None)
    mlp_norm: Float[Array, " embed"] | None = param(None)
    attention_post_norm: Float[Array, " embed"] | None = param(None)
    mlp_post_norm: Float[Array, " embed"] | None = param(None)


class Decoder(eqx.Module):
    """A Transformer's parameters in the compute dtype, as `read` wants them."""

    embed: Float[Array, "vocab embed"] = param("tp", None)
    expansion: Float[Array, "original_vocab embed"] | None = param("tp", None)
    blocks: tuple[DecoderBlock, ...]
    norm: Float[Array, " embed"] = param(None)
    unembed: Float[Array, "vocab embed"] | None = param("tp", None)  # None: tied
    exists: Bool[Array, " vocab"] = param("tp")  # False: padding beyond the tokenizer
    config: ModelConfig = eqx.field(static=True)

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return self.embed.dtype


def lay_out(model: Transformer, mask: VocabularyMask, mesh: Mesh, dtype: jnp.dtype) -> Decoder:
    """The Decoder, in the compute dtype, of a model that is on a mesh. What `fsdp` divides is gathered, once."""
    return made_on_mesh(functools.partial(_laid_out, dtype=dtype), model, mask, mesh)


def made_on_mesh(make: Callable[..., T], model: Model, mask: VocabularyMask, mesh: Mesh) -> T:
    """What `make` makes of a model and its mask that are on a mesh, where each device has of them what `tp` leaves."""

    def without_fsdp(spec):
        return P(*(None if axis == "fsdp" else axis for axis in spec))

    whole = jax.tree.map(without_fsdp, specs((model, mask), mesh), is_leaf=lambda spec: isinstance(spec, P))
    single = Mesh(mesh.devices[:1, :1], mesh.axis_names, axis_types=mesh.axis_types)
    shapes = jax.eval_shape(shard_map(make, single, in_specs=P(), out_specs=P()), model, mask)
    return jax.jit(shard_map(make, mesh, in_specs=whole, out_specs=layouts(shapes)))(model, mask)


def _laid_out(model: Transformer, mask: VocabularyMask, dtype: jnp.dtype) -> Decoder:
    norm = model.norm  # read as it is, as in training
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
    blocks = [jax.tree.map(lambda leaf: leaf[number], model.blocks) for number in range(model.config.layers - 1)]
    return Decoder(
        embed=model.embed,
        expansion=model.expansion,
        blocks=tuple(decoder_block(block, model.config) for block in (*blocks, model.last)),
        norm=norm,
        unembed=model.unembed,
        exists=mask.exists,
        config=model.config,
    )


def decoder_block(block: Block, config: ModelConfig) -> DecoderBlock:
    """One block laid out, of parameters that are whole along `fsdp`. Runs inside `shard_map`."""
    attention, mlp = block.attention, block.mlp

    def own(weight, heads):
        """What this device's heads need, as a matrix."""
        weight = tp_share(weight, axis=1) if weight.shape[1] == heads else weight
        return weight.reshape(config.embed, -1)

    def own_channels(vector, heads):
        return None if vector is None else tp_share(vector.reshape(heads, config.head_dim)).reshape(-1)

    def joined(*parts, axis=0):
        return None if parts[0] is None else jnp.concatenate(parts, axis)

    heads, kv_heads = config.heads, config.kv_heads
    return DecoderBlock(
        qkv=joined(own(attention.q, heads), own(attention.k, kv_heads), own(attention.v, kv_heads), axis=1).T,
        qkv_bias=joined(
            own_channels(attention.q_bias, heads),
            own_channels(attention.k_bias, kv_heads),
            own_channels(attention.v_bias, kv_heads),
        ),
        o=attention.o.reshape(-1, config.embed).T,
        o_bias=attention.o_bias,
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        gate_up=joined(mlp.gate, mlp.up, axis=1).T,
        gate_up_bias=joined(mlp.gate_bias, mlp.up_bias),
        down=mlp.down.T,
        down_bias=mlp.down_bias,
        attention_norm=block.attention_norm,
        mlp_norm=block.mlp_norm,
        attention_post_norm=block.attention_post_norm,
        mlp_post_norm=block.mlp_post_norm,
    )


def cache_lengths(config: ModelConfig, capacity: int, piece: int) -> list[int]:
    """Slots of each block's cache, for `capacity` columns read at most `piece` at a time.

    A block that sees a window needs no more than the window and a piece; one that sees all, a slot for each column.
    """
    rings = [capacity if window is None else -(-(window + piece) // 32) * 32 for window in config.windows]
    return [min(ring, capacity) for ring in rings]


def read(
    decoder: Decoder,
    caches: tuple[Cache, ...],
    inputs: Int[Array, "batch time"],
    suffix: Int[Array, "batch time"] | None,
    column: Int[Array, ""],
    offset: Int[Array, " batch"],
    long: Bool[Array, " batch"],
) -> tuple[Float[Array, "batch time embed"], tuple[Cache, ...]]:
    """Reads the columns from `column` on: what the head reads of each, and the caches with their keys and values.

    Of each row, `offset` is the column of its first token: what stands before is never seen, and its results mean
    nothing. `long`: LongRoPE's frequencies are those of long texts. Runs inside `shard_map`.
    """
    config, dtype = decoder.config, decoder.dtype
    x = table_rows(decoder.embed, inputs)
    if decoder.expansion is not None:
        x = x + table_rows(decoder.expansion, suffix)
    x = x * jnp.asarray(config.embedding_scale, dtype)
    columns = column + jnp.arange(inputs.shape[1])
    positions = columns - offset[:, None]
    rotations = {rope: rotation_at(rope, config, positions, long, dtype) for rope in config.ropes}
    masks: dict[tuple[int | None, int], Array] = {}
    written = []
    for layer, (block, cache) in enumerate(zip(decoder.blocks, caches, strict=True)):
        window = config.windows[layer]
        if (seen := (window, cache.v.shape[2])) not in masks:
            masks[seen] = _visible(*seen, columns, offset)
        slots, rotation = columns % cache.v.shape[2], rotations[config.rope_of(layer)]
        x, cache = read_block(block, config, x, rotation, cache, slots, window is not None, masks[seen])
        written.append(cache)
    x = layers.rms_norm(x, decoder.norm, config.norm_eps, config.norm_plus_one)
    return layers.scaled(x, 1.0 / config.logits_divisor), tuple(written)


def logits(decoder: Decoder, hidden: Float[Array, "batch time embed"]) -> Float32[Array, "batch time vocab"]:
    """Logits of this device's entries, -inf where there is none. Runs inside `shard_map`."""
    table = decoder.embed if decoder.unembed is None else decoder.unembed
    flat = hidden.reshape(-1, hidden.shape[-1])
    return block_logits(flat, table, decoder.exists, decoder.config.final_softcap).reshape(*hidden.shape[:2], -1)


def table_rows(table: Float[Array, "vocab embed"], ids: Int[Array, "batch time"]) -> Float[Array, "batch time embed"]:
    """Rows of a table whose entries `tp` divides. Runs inside `shard_map`."""
    if tp_size() == 1:
        return table[ids]
    local = ids - tp_offset(table.shape[0])
    held = (local >= 0) & (local < table.shape[0])
    return tp_sum(jnp.where(held[..., None], table[jnp.where(held, local, 0)], 0))


def rotation_at(
    rope: Rope | None,
    config: ModelConfig,
    positions: Int[Array, "batch time"],
    long: Bool[Array, " batch"],
    dtype: jnp.dtype,
) -> layers.Rotation | None:
    """The rotary embedding at each row's own positions; `long` as in `read`."""
    if rope is None:
        return None
    limit = rope.scaling.original_length if isinstance(rope.scaling, LongRopeScaling) else 0
    frequencies = jnp.asarray(rope.inverse_frequencies(config.head_dim, limit))
    if limit:
        frequencies = jnp.where(
            long[:, None, None, None], rope.inverse_frequencies(config.head_dim, limit + 1), frequencies
        )
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return layers.Rotation(*((rope.magnitude * turned).astype(dtype) for turned in (jnp.sin(angles), jnp.cos(angles))))


def _visible(window, length, columns, offset):
    """What the queries of some new columns see, [batch, time, slot + time]: slots of a ring, then the new ones."""
    last = columns[0] - 1
    held = last - (last - jnp.arange(length)) % length  # the newest column that a slot may hold
    held = jnp.concatenate([held, columns])
    distance = columns[:, None] - held
    near = (distance >= 0) & (distance < (FULL_ATTENTION if window is None else window))
    return near[None] & (held >= offset[:, None])[:, None]


def read_block(
    block: DecoderBlock,
    config: ModelConfig,
    x: Float[Array, "batch time embed"],
    rotation: layers.Rotation | None,
    cache: Cache,
    slots: Int[Array, "*batch time"],
    wraps: bool,
    visible: Bool[Array, "batch time slot_and_time"],
) -> tuple[Float[Array, "batch time embed"], Cache]:
    """One block on new positions, whose keys go to `slots` of its cache: the same for all rows, consecutive but where
    the ring `wraps`; or each row's own, and none beyond the cache. Runs inside `shard_map`."""
    batch, time, _ = x.shape

    def norm(value, weight):
        return value if weight is None else layers.rms_norm(value, weight, config.norm_eps, config.norm_plus_one)

    def biased(value, bias):
        return value if bias is None else value + bias

    def added(value, bias, weight):
        return layers.scaled(norm(biased(tp_sum(value), bias), weight), config.residual_scale)

    def turned(value, weight):
        value = value if weight is None else head_norm(value, weight, config)
        return value if rotation is None else layers.rotate(value, rotation)

    def by_head(value):  # [batch, time, head, head_dim] -> [batch, head, time, head_dim]
        return value.swapaxes(1, 2)

    qkv = biased(product(norm(x, block.attention_norm), block.qkv), block.qkv_bias)
    kv_heads = cache.k.shape[1]
    qkv = qkv.reshape(batch, time, -1, config.head_dim)
    q, k, v = jnp.split(qkv, (qkv.shape[2] - 2 * kv_heads, qkv.shape[2] - kv_heads), axis=2)
    q, k = turned(q, block.q_norm), turned(k, block.k_norm)
    new = Cache(by_head(k).swapaxes(2, 3), by_head(v))
    # The new keys are not read from the cache, so that it can be written in place, behind all that reads it.
    parts = (cache.k, new.k), (cache.v, new.v)
    mixed = layers.attend(by_head(q), *parts, visible, config.scale, config.attention_softcap)
    # The write is made to depend on what was read, which XLA cannot see through: else it copies the cache, twice a step.
    read = mixed[0, 0, 0, 0]
    new = jax.tree.map(lambda array: jnp.where(read == read, array, jnp.nan), new)
    cache = Cache(_written(cache.k, new.k, slots, wraps, 3), _written(cache.v, new.v, slots, wraps, 2))
    x = x + added(product(by_head(mixed).reshape(batch, time, -1), block.o), block.o_bias, block.attention_post_norm)

    both = biased(product(norm(x, block.mlp_norm), block.gate_up), block.gate_up_bias)
    gate, up = jnp.split(both, 2, axis=-1)
    activation = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}[config.activation]
    x = x + added(product(activation(gate) * up, block.down), block.down_bias, block.mlp_post_norm)
    return x, cache


def product(x: Float[Array, "batch time embed"], matrix: Float[Array, "out embed"]) -> Float[Array, "batch time out"]:
    """x times a matrix that is stored as [out, in]. (A transposed one would be written anew before the loop.)"""
    rows = x.reshape(-1, x.shape[-1])
    found = jax.lax.dot_general(rows, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return found.astype(x.dtype).reshape(*x.shape[:2], -1)


def _written(cache, new, slots, wraps, axis):
    """A cache with new keys or values in slots of an axis; in place where XLA may."""
    if slots.ndim == 2:  # each row's own
        rows, places = jnp.arange(len(slots))[:, None], (slice(None),) * 2
        index = (rows, *places, slots) if axis == 3 else (rows, places[0], slots)
        return cache.at[index].set(jnp.moveaxis(new, axis, 1), mode="drop")
    if new.shape[axis] == 1 or not wraps:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, slots[0], axis)
    return cache.at[(*[slice(None)] * axis, slots)].set(new)

"""A Bolmo laid out for decoding, and the functions that read with it: bytes, patches, and what the decoder makes of both.

As in decoder.py, everything is whole along `fsdp`, and what one input is multiplied with lies side by side. Rows are
aligned at their beginnings, and each has its own number of bytes and of patches: what is padding is not `present`, and
changes neither a memory nor a cache. The functions run inside `shard_map`.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int

from minalm.generation.decoder import (
    Cache,
    DecoderBlock,
    decoder_block,
    made_on_mesh,
    read_block,
    rotation_at,
    table_rows,
)
from minalm.models import layers, mlstm
from minalm.models.bolmo import LOG_HALF, Bolmo, LocalBlock, boundary_logp
from minalm.models.config import FULL_ATTENTION, BolmoConfig
from minalm.models.head import VocabularyMask, block_logits
from minalm.parallel.collectives import tp_share, tp_sum
from minalm.parallel.mesh import param


class Memory(eqx.Module):
    """What an mLSTM layer remembers of each row (mlstm.State, with a layout)."""

    memory: Float32[Array, "batch heads key value"] = param("fsdp", "tp", None, None)
    normalizer: Float32[Array, "batch heads key"] = param("fsdp", "tp", None)
    stabilizer: Float32[Array, "batch heads"] = param("fsdp", "tp")

    def where(self, changes: Bool[Array, " batch"], new: "Memory") -> "Memory":
        """The new one for the rows that change."""

        def choose(old, new):
            return jnp.where(changes.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        return jax.tree.map(choose, self, new)


class ByteBlock(eqx.Module):
    """One block of the encoder or the decoder. Each device of `tp` holds what its heads and hidden units need."""

    norm: Float[Array, " embed"] = param(None)
    qkvo: Float[Array, "embed qkvo"] = param(None, "tp")  # queries, keys, values, output gate
    gates: Float[Array, "embed gates"] = param(None, "tp")  # input and forget gate of each head
    gate_bias: Float32[Array, " gates"] = param("tp")
    head_norm: Float[Array, "heads value"] = param("tp", None)
    out: Float[Array, "heads_x_value embed"] = param("tp", None)
    mlp_norm: Float[Array, " embed"] = param(None)
    gate_up: Float[Array, "embed gate_up"] = param(None, "tp")
    down: Float[Array, "mlp embed"] = param("tp", None)


class Linear(eqx.Module):
    """A map with a bias; its inputs are divided over `tp`."""

    weight: Float[Array, "embed out"] = param("tp", None)
    bias: Float[Array, " out"] = param(None)

    def __call__(self, x: Float[Array, "batch time embed"]) -> Float[Array, "batch time out"]:
        return tp_sum(layers.project(tp_share(x, axis=2), self.weight)) + self.bias


class BolmoDecoder(eqx.Module):
    """A Bolmo's parameters in the compute dtype."""

    embed: Float[Array, "ids embed"] = param("tp", None)
    expansion: Float[Array, "subwords embed"] = param("tp", None)
    encoder: tuple[ByteBlock, ...]
    encoder_norm: Float[Array, " embed"] = param(None)
    boundary_q: Float[Array, "embed out"] = param(None, "tp")
    boundary_k: Float[Array, "embed out"] = param(None, "tp")
    pool: Linear
    blocks: tuple[DecoderBlock, ...]
    patch_norm: Float[Array, " embed"] = param(None)
    depool: Linear
    decoder: tuple[ByteBlock, ...]
    norm: Float[Array, " embed"] = param(None)
    unembed: Float[Array, "ids embed"] = param("tp", None)
    exists: Bool[Array, " ids"] = param("tp")
    config: BolmoConfig = eqx.field(static=True)

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return self.embed.dtype


def lay_out(model: Bolmo, mask: VocabularyMask, mesh: Mesh, dtype: jnp.dtype) -> BolmoDecoder:
    """The BolmoDecoder, in the compute dtype, of a model that is on a mesh. What `fsdp` divides is gathered, once."""
    return made_on_mesh(functools.partial(_laid_out, dtype=dtype), model, mask, mesh)


def _laid_out(model: Bolmo, mask: VocabularyMask, dtype: jnp.dtype) -> BolmoDecoder:
    config = model.config

    def cast(tree):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)

    def byte_block(block: LocalBlock) -> ByteBlock:
        cell, mlp = cast(block.mlstm), cast(block.mlp)

        def joined(*parts):
            return jnp.concatenate([part.reshape(config.embed, -1) for part in parts], axis=1)

        return ByteBlock(
            norm=block.norm,  # read as it is, as in training
            qkvo=joined(cell.q, cell.k, cell.v, cell.output_gate),
            gates=joined(cell.input_gate, cell.forget_gate),
            gate_bias=jnp.concatenate([block.mlstm.input_bias, block.mlstm.forget_bias]).astype(jnp.float32),
            head_norm=cell.norm,
            out=cell.out.reshape(-1, config.embed),
            mlp_norm=block.mlp_norm,
            gate_up=jnp.concatenate([mlp.gate, mlp.up], axis=1),
            down=mlp.down,
        )

    def layer(stacked, number):
        return jax.tree.map(lambda leaf: leaf[number], stacked)

    trunk = cast(model.patches)
    blocks = [layer(trunk.blocks, number) for number in range(config.blocks.layers - 1)]
    return BolmoDecoder(
        embed=model.embed.astype(dtype),
        expansion=model.expansion.astype(dtype),
        encoder=tuple(byte_block(layer(model.encoder, number)) for number in range(config.encoder_layers)),
        encoder_norm=model.encoder_norm,
        boundary_q=model.boundary.q.astype(dtype),
        boundary_k=model.boundary.k.astype(dtype),
        pool=Linear(*cast((model.pool.weight, model.pool.bias))),
        blocks=tuple(decoder_block(block, config.blocks) for block in (*blocks, trunk.last)),
        patch_norm=model.patch_norm,
        depool=Linear(*cast((model.depool.weight, model.depool.bias))),
        decoder=(
            *(byte_block(layer(model.decoder, number)) for number in range(config.decoder_layers - 1)),
            byte_block(model.last),
        ),
        norm=model.norm,
        unembed=model.unembed.astype(dtype),
        exists=mask.exists,
        config=config,
    )


def no_memory(config: BolmoConfig, batch: int, count: int) -> tuple[Memory, ...]:
    """What so many layers remember at the beginning, of all heads."""
    zeros = mlstm.zero_state(batch, config.heads, config.key_dim, config.value_dim)
    return (Memory(zeros.memory, zeros.normalizer, zeros.stabilizer),) * count


def _byte_blocks(blocks, config, x, memories, present):
    """The blocks, one after the other, on new bytes; `present` is None where every row has its one new byte."""
    new = []
    for block, memory in zip(blocks, memories, strict=True):
        x, memory = _byte_block(block, config, x, memory, present)
        new.append(memory)
    return x, tuple(new)


def _byte_block(block, config, x, memory, present):
    heads, (batch, time, _) = len(block.head_norm), x.shape
    normed = layers.rms_norm(x, block.norm, config.norm_eps, False)
    narrow, wide = heads * config.key_dim, heads * config.value_dim
    parts = jnp.split(layers.project(normed, block.qkvo), (narrow, 2 * narrow, 2 * narrow + wide), axis=-1)
    q, k, v = (part.astype(jnp.float32).reshape(batch, time, heads, -1) for part in parts[:3])
    gates = layers.project(normed, block.gates).astype(jnp.float32) + block.gate_bias
    gates = jnp.split(layers.softcap(gates, mlstm.GATE_CAP), 2, axis=-1)
    state = mlstm.State(memory.memory, memory.normalizer, memory.stabilizer)
    if present is None:
        state, found = mlstm.step(state, *(each[:, 0] for each in (q, k, v, *gates)))
        found = found[:, None]
    else:
        state, found = mlstm.chunkwise(state, q, k, v, *gates, present)
    normed_heads = (mlstm.head_norm(found) * block.head_norm.astype(jnp.float32)).astype(x.dtype)
    opened = jax.nn.sigmoid(parts[3]) * normed_heads.reshape(batch, time, -1)
    x = x + tp_sum(layers.project(opened, block.out))
    both = layers.project(layers.rms_norm(x, block.mlp_norm, config.norm_eps, False), block.gate_up)
    gate, up = jnp.split(both, 2, axis=-1)
    x = x + tp_sum(layers.project(jax.nn.silu(gate) * up, block.down))
    return x, Memory(state.memory, state.normalizer, state.stabilizer)


def encode(
    decoder: BolmoDecoder,
    ids: Int[Array, "batch time"],
    suffix: Int[Array, "batch time"],
    memories: tuple[Memory, ...],
    present: Bool[Array, "batch time"] | None,
) -> tuple[Float[Array, "batch time embed"], tuple[Memory, ...]]:
    """What the encoder makes of new bytes, and its memories behind them."""
    x = table_rows(decoder.embed, ids) + table_rows(decoder.expansion, suffix)
    x, memories = _byte_blocks(decoder.encoder, decoder.config, x, memories, present)
    return layers.rms_norm(x, decoder.encoder_norm, decoder.config.local_norm_eps, False), memories


def predicted(decoder: BolmoDecoder, h: Float[Array, "batch time embed"]) -> Bool[Array, "batch time"]:
    """Whether the encoder finds that a patch ends at each byte of whole texts; it has to know the next byte. The first
    byte always ends one, of the last one it is not known."""
    return boundary_logp(h, decoder.boundary_q, decoder.boundary_k) > LOG_HALF


def read_patches(
    decoder: BolmoDecoder,
    caches: tuple[Cache, ...],
    h: Float[Array, "batch patch embed"],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
) -> tuple[Float[Array, "batch patch embed"], tuple[Cache, ...]]:
    """The subword model's blocks on each row's next `count` patches, given by the encoder's output at their last bytes:
    normed, as the decoder reads them. `start`: how many patches each row has read."""
    config, slots, new = decoder.config.blocks, caches[0].v.shape[2], jnp.arange(h.shape[1])
    x = decoder.pool(h)
    positions = start[:, None] + new
    rotations = {
        rope: rotation_at(rope, config, positions, jnp.zeros(len(h), bool), decoder.dtype) for rope in config.ropes
    }
    places = jnp.where(new < count[:, None], positions, slots)  # patches that are not there are written nowhere

    def visible(window):
        known = jnp.arange(slots)
        old = (known < start[:, None, None]) & (positions[:, :, None] - known < window)
        distance = new[:, None] - new
        own = (distance >= 0) & (distance < window)
        return jnp.concatenate([old, jnp.broadcast_to(own, (len(h), *own.shape))], axis=2)

    windows = [FULL_ATTENTION if window is None else window for window in config.windows]
    masks = {window: visible(window) for window in set(windows)}
    written = []
    for layer, (block, cache) in enumerate(zip(decoder.blocks, caches, strict=True)):
        rotation, mask = rotations[config.rope_of(layer)], masks[windows[layer]]
        x, cache = read_block(block, config, x, rotation, cache, places, False, mask)
        written.append(cache)
    return layers.rms_norm(x, decoder.patch_norm, decoder.config.local_norm_eps, False), tuple(written)


def decode(
    decoder: BolmoDecoder,
    h: Float[Array, "batch time embed"],
    patches: Float[Array, "batch time embed"],
    memories: tuple[Memory, ...],
    present: Bool[Array, "batch time"] | None,
) -> tuple[Float[Array, "batch time embed"], tuple[Memory, ...]]:
    """What the head reads at new bytes, given the last patch (of `read_patches`) that has ended at each."""
    x, memories = _byte_blocks(decoder.decoder, decoder.config, decoder.depool(h) + patches, memories, present)
    return layers.rms_norm(x, decoder.norm, decoder.config.norm_eps, False), memories


def logits(decoder: BolmoDecoder, x: Float[Array, "batch time embed"]) -> Float32[Array, "batch time ids"]:
    """Logits of this device's ids: the next byte, or, in the second half, a byte that also ends a patch."""
    flat = x.reshape(-1, x.shape[-1])
    return block_logits(flat, decoder.unembed, decoder.exists, None).reshape(*x.shape[:2], -1)

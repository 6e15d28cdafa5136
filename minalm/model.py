"""Decoder-only transformers (Llama 3, Gemma 2) as Equinox modules; a family is a value of ModelConfig.

Modules hold parameters in slices and declare each one's shape and layout on its field. Their methods run inside
`jax.shard_map` (see sharding.py). The last block stands apart from the stacked ones because GradMag (gradmag.py)
differentiates it alone.
"""

import dataclasses
import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from minalm import layers
from minalm.sharding import gather, lookup, param, tp_sum

EVERYTHING = 2**30  # a window no sequence fills: full attention

REMAT_POLICIES = {  # what the backward pass of a block finds saved: all, matrix products, the block's input alone
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the slow rotary frequencies (Llama 3.1 release, `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture. Every switch is a value here; no code asks for the family."""

    vocab_size: int  # rows of the embedding table, padding included
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # per layer: how many positions a query sees, itself included; None: all
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    query_scale: float | None = None  # factor on the scores; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None
    final_softcap: float | None = None
    norm_eps: float = 1e-5
    norm_plus_one: bool = False  # RMSNorm multiplies by 1 + weight
    post_norms: bool = False  # a norm after attention and after the MLP too
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    tied: bool = True  # the unembedding is the embedding table
    expansion_size: int | None = None  # rows of the original table added at input (byte students); None: no expansion

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim) if self.query_scale is None else self.query_scale

    def inverse_frequencies(self) -> Float[np.ndarray, " half"]:
        """Radians per position of each rotary channel pair, after scaling."""
        frequencies = 1.0 / self.rope_theta ** (np.arange(0, self.head_dim, 2) / self.head_dim)
        if self.rope_scaling is not None:
            scaling = self.rope_scaling
            turns = scaling.original_length * frequencies / (2 * math.pi)  # full turns within the original length
            smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            smooth = np.clip(smooth, 0.0, 1.0)
            frequencies = frequencies * (smooth + (1.0 - smooth) / scaling.factor)
        return frequencies.astype(np.float32)


class Attention(eqx.Module):
    q: Float[Array, "*stack embed heads head_dim"] = param("fsdp", "tp", None)
    k: Float[Array, "*stack embed kv_heads head_dim"] = param("fsdp", "tp", None)
    v: Float[Array, "*stack embed kv_heads head_dim"] = param("fsdp", "tp", None)
    o: Float[Array, "*stack heads head_dim embed"] = param("tp", None, "fsdp")


class MLP(eqx.Module):
    gate: Float[Array, "*stack embed mlp"] = param("fsdp", "tp")
    up: Float[Array, "*stack embed mlp"] = param("fsdp", "tp")
    down: Float[Array, "*stack mlp embed"] = param("tp", "fsdp")


class Cache(eqx.Module):
    """Keys and values of the positions read so far, for decoding."""

    k: Float[Array, "*stack batch key_time kv_heads head_dim"]
    v: Float[Array, "*stack batch key_time kv_heads head_dim"]


class Block(eqx.Module):
    attention: Attention
    mlp: MLP
    attention_norm: Float[Array, "*stack embed"] = param(None)
    mlp_norm: Float[Array, "*stack embed"] = param(None)
    attention_post_norm: Float[Array, "*stack embed"] | None = param(None)
    mlp_post_norm: Float[Array, "*stack embed"] | None = param(None)

    def __call__(
        self,
        x: Float[Array, "batch time embed"],
        config: ModelConfig,
        positions: Int[Array, "rows time"],
        window: Int[Array, ""],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch time embed"], Cache | None]:
        """One layer. With a cache, the keys and values of x are written to it at `positions` and all of it is read."""
        weights = gather(self, x.dtype)

        def norm(value, weight):
            return value if weight is None else layers.rms_norm(value, weight, config.norm_eps, config.norm_plus_one)

        normed = norm(x, weights.attention_norm)
        frequencies = config.inverse_frequencies()
        q = layers.rope(layers.project(normed, weights.attention.q), positions, frequencies)
        k = layers.rope(layers.project(normed, weights.attention.k), positions, frequencies)
        v = layers.project(normed, weights.attention.v)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            cache = Cache(cache.k.at[rows, positions].set(k), cache.v.at[rows, positions].set(v))
            k, v = cache.k, cache.v
        mixed = layers.attend(q, k, v, positions, window, config.scale, config.attention_softcap)
        x = x + norm(tp_sum(layers.project(mixed, weights.attention.o, inner=2)), weights.attention_post_norm)

        normed = norm(x, weights.mlp_norm)
        activation = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}[config.activation]
        gated = activation(layers.project(normed, weights.mlp.gate)) * layers.project(normed, weights.mlp.up)
        x = x + norm(tp_sum(layers.project(gated, weights.mlp.down)), weights.mlp_post_norm)
        return x, cache


class Transformer(eqx.Module):
    """embed -> blocks 0..n-2, stacked and scanned -> last block n-1 -> norm; the head (head.py) reads `unembedding`."""

    embed: Float[Array, "vocab embed"] = param("tp", "fsdp")
    expansion: Float[Array, "original_vocab embed"] | None = param("tp", "fsdp")
    blocks: Block
    last: Block
    norm: Float[Array, " embed"] = param(None)
    unembed: Float[Array, "vocab embed"] | None = param("tp", "fsdp")  # None: tied, one leaf and one gradient
    config: ModelConfig = eqx.field(static=True)

    @property
    def unembedding(self) -> Float[Array, "vocab embed"]:
        return self.embed if self.unembed is None else self.unembed

    def embed_tokens(
        self, inputs: Int[Array, "batch time"], ngram: Int[Array, "batch time"] | None, dtype: jnp.dtype
    ) -> Float[Array, "batch time embed"]:
        """Embeddings of the inputs, plus those of the longest original subword that ends at each (byte students)."""
        x = lookup(self.embed, inputs, dtype)
        if self.expansion is not None:
            x = x + lookup(self.expansion, ngram, dtype)
        return x * jnp.asarray(self.config.embedding_scale, dtype)

    def trunk(
        self,
        inputs: Int[Array, "batch time"],
        ngram: Int[Array, "batch time"] | None,
        picks: Int[Array, "batch chunk"] | None,
        dtype: jnp.dtype,
        remat: Remat = "none",
    ) -> tuple[Float[Array, "batch time embed"], Float[Array, "depth batch chunk embed"] | None]:
        """All but the last block. Returns its output, and the states at positions `picks` (None: not wanted) of the
        embeddings and of every block, [layers, batch, chunk, embed]: at the picked positions only, so that no array of
        all layers and all positions exists."""
        x = self.embed_tokens(inputs, ngram, dtype)
        positions = jnp.arange(inputs.shape[1])[None]
        windows = jnp.array([window or EVERYTHING for window in self.config.windows[:-1]])

        def body(x, layer):
            block, window = layer
            x, _ = block(x, self.config, positions, window)
            return x, pick(x, picks)

        first = pick(x, picks)
        x, rest = jax.lax.scan(jax.checkpoint(body, policy=REMAT_POLICIES[remat]), x, (self.blocks, windows))
        return x, None if picks is None else jnp.concatenate([first[None], rest])

    def finish(self, x: Float[Array, "batch time embed"]) -> Float[Array, "batch time embed"]:
        """The last block and the final norm."""
        positions = jnp.arange(x.shape[1])[None]
        x, _ = self.last(x, self.config, positions, jnp.array(self.config.windows[-1] or EVERYTHING))
        return self.final_norm(x)

    def final_norm(self, x: Float[Array, "batch time embed"]) -> Float[Array, "batch time embed"]:
        return layers.rms_norm(x, self.norm, self.config.norm_eps, self.config.norm_plus_one)


def pick(
    x: Float[Array, "batch time embed"], positions: Int[Array, "batch chunk"] | None
) -> Float[Array, "batch chunk embed"] | None:
    """The states at the given positions of each row; position -1 (no chunk) reads position 0."""
    return None if positions is None else jnp.take_along_axis(x, jnp.maximum(positions, 0)[..., None], axis=1)


def initialize(config: ModelConfig, key: PRNGKeyArray) -> Transformer:
    """Random parameters: standard deviation 0.02, of output projections 0.02 / sqrt(2 * layers) (GPT-2)."""
    keys = iter(jax.random.split(key, 32))

    def normal(*shape, scale=0.02):
        return scale * jax.random.normal(next(keys), shape, jnp.float32)

    def identity(*stack):
        return jnp.full((*stack, config.embed), 0.0 if config.norm_plus_one else 1.0, jnp.float32)

    def block(*stack):
        c, out = config, 0.02 / math.sqrt(2 * config.layers)
        attention = Attention(
            q=normal(*stack, c.embed, c.heads, c.head_dim),
            k=normal(*stack, c.embed, c.kv_heads, c.head_dim),
            v=normal(*stack, c.embed, c.kv_heads, c.head_dim),
            o=normal(*stack, c.heads, c.head_dim, c.embed, scale=out),
        )
        mlp = MLP(
            gate=normal(*stack, c.embed, c.mlp),
            up=normal(*stack, c.embed, c.mlp),
            down=normal(*stack, c.mlp, c.embed, scale=out),
        )
        post_norms = (identity(*stack), identity(*stack)) if c.post_norms else (None, None)
        return Block(attention, mlp, identity(*stack), identity(*stack), *post_norms)

    return Transformer(
        embed=normal(config.vocab_size, config.embed),
        expansion=None if config.expansion_size is None else normal(config.expansion_size, config.embed),
        blocks=block(config.layers - 1),
        last=block(),
        norm=identity(),
        unembed=None if config.tied else normal(config.vocab_size, config.embed),
        config=config,
    )

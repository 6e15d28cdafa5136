"""Decoder-only transformers as Equinox modules; a family (Llama, Gemma, Qwen, OLMo, ...) is a value of ModelConfig.

Modules hold parameters in slices and declare each one's shape and layout on its field. Their methods run inside
`jax.shard_map` (see sharding.py). The last block stands apart from the stacked ones because GradMag (gradmag.py)
differentiates it alone.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from minalm import layers
from minalm.attention import SAVED, self_attention
from minalm.sharding import GATHERED, TP_OR_WHOLE, gather, lookup, param, tp_share, tp_size, tp_sum

EVERYTHING = 2**30  # a window no sequence fills: full attention

SUMMED = "summed"  # the name under which a policy finds sums over `tp`, which take messages to compute again

REMAT_POLICIES = {  # what the backward pass of a block finds saved: products and attention, or the block's input alone
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED, SUMMED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by a factor (`rope_type: linear`; Gemma 3)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretching of the slow rotary frequencies (Llama 3.1 release, `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2): between the channels that turn `beta_fast` and
    `beta_slow` times within the original length, frequencies go over from kept to divided by the factor."""

    factor: float
    attention_factor: float  # on queries and keys
    beta_fast: float
    beta_slow: float
    original_length: int
    truncate: bool = True  # the two channels are rounded outwards


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a layer."""

    theta: float = 10_000.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def inverse_frequencies(self, head_dim: int) -> Float[np.ndarray, " half"]:
        """Radians per position of each rotary channel pair, after scaling."""
        frequencies = 1.0 / self.theta ** (np.arange(0, head_dim, 2) / head_dim)
        scaling = self.scaling
        if scaling is None:
            share = np.ones_like(frequencies)  # of each frequency, how much is kept rather than divided by the factor
        elif isinstance(scaling, LinearScaling):
            share = np.zeros_like(frequencies)
        elif isinstance(scaling, Llama3Scaling):
            turns = scaling.original_length * frequencies / (2 * math.pi)  # full turns within the original length
            share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        else:
            first, last = (self._channel(head_dim, turns) for turns in (scaling.beta_fast, scaling.beta_slow))
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_dim - 1)
            share = 1.0 - (np.arange(head_dim // 2) - first) / ((last - first) or 0.001)
        share = np.clip(share, 0.0, 1.0)
        divided = frequencies if scaling is None else frequencies / scaling.factor
        return (frequencies * share + divided * (1.0 - share)).astype(np.float32)

    def _channel(self, head_dim: int, turns: float) -> float:
        """The channel pair that turns so many times within YaRN's original length."""
        length = self.scaling.original_length
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    @property
    def magnitude(self) -> float:
        """What queries and keys are multiplied by as they are turned."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0


class Varying(eqx.Module):
    """What differs from layer to layer, as arrays that a scan runs over."""

    window: Int[Array | np.ndarray, "*stack"]
    inverse_frequencies: Float[Array | np.ndarray, "*stack half"]
    rope_magnitude: Float[Array | np.ndarray, "*stack"]


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
    rope: Rope = Rope()
    local_rope: Rope | None = None  # of layers with a window; None: the same as everywhere
    query_scale: float | None = None  # factor on the scores; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None
    final_softcap: float | None = None
    norm_eps: float = 1e-5
    norm_plus_one: bool = False  # RMSNorm multiplies by 1 + weight
    pre_norms: bool = True  # a norm before attention and before the MLP
    post_norms: bool = False  # a norm after attention and after the MLP
    qk_norm: Literal["head", "all"] | None = None  # a norm of queries and keys: of each head, or over all heads
    qkv_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    tied: bool = True  # the unembedding is the embedding table
    expansion_size: int | None = None  # rows of the original table added at input (byte students); None: no expansion
    model_type: str | None = None  # Hugging Face's name for it, for the way back; nothing is computed by it

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim) if self.query_scale is None else self.query_scale

    def varying(self) -> tuple[Varying, Varying]:
        """Of the stacked layers 0..n-2, and of the last one."""
        ropes = [self.local_rope if window and self.local_rope else self.rope for window in self.windows]
        every = Varying(
            window=np.array([window or EVERYTHING for window in self.windows], np.int32),
            inverse_frequencies=np.stack([rope.inverse_frequencies(self.head_dim) for rope in ropes]),
            rope_magnitude=np.array([rope.magnitude for rope in ropes], np.float32),
        )
        return jax.tree.map(lambda array: array[:-1], every), jax.tree.map(lambda array: np.asarray(array[-1]), every)


class Attention(eqx.Module):
    q: Float[Array, "*stack embed heads head_dim"] = param("fsdp", "tp", None)
    k: Float[Array, "*stack embed kv_heads head_dim"] = param("fsdp", TP_OR_WHOLE, None)
    v: Float[Array, "*stack embed kv_heads head_dim"] = param("fsdp", TP_OR_WHOLE, None)
    o: Float[Array, "*stack heads head_dim embed"] = param("tp", None, "fsdp")
    q_bias: Float[Array, "*stack heads_x_head_dim"] | None = param(None)
    k_bias: Float[Array, "*stack kv_heads_x_head_dim"] | None = param(None)
    v_bias: Float[Array, "*stack kv_heads_x_head_dim"] | None = param(None)
    q_norm: Float[Array, "*stack q_norm"] | None = param(None)  # head_dim, or heads * head_dim
    k_norm: Float[Array, "*stack k_norm"] | None = param(None)


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
    attention_norm: Float[Array, "*stack embed"] | None = param(None)
    mlp_norm: Float[Array, "*stack embed"] | None = param(None)
    attention_post_norm: Float[Array, "*stack embed"] | None = param(None)
    mlp_post_norm: Float[Array, "*stack embed"] | None = param(None)

    def __call__(
        self,
        x: Float[Array, "batch time embed"],
        config: ModelConfig,
        positions: Int[Array, "rows time"],
        varying: Varying,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch time embed"], Cache | None]:
        """One layer. With a cache, the keys and values of x are written to it at `positions` and all of it is read."""
        weights = gather(self, x.dtype)

        def norm(value, weight):
            return value if weight is None else layers.rms_norm(value, weight, config.norm_eps, config.norm_plus_one)

        def project(value, weight, bias, heads):
            if weight.shape[1] == heads:  # not divided over tp, or there is one device
                weight = tp_share(weight, axis=1)
            projected = layers.project(value, weight)
            return projected if bias is None else projected + tp_share(bias.reshape(heads, -1))

        def summed(value):
            return checkpoint_name(tp_sum(value), SUMMED)

        def rotate(value, weight):
            if weight is not None:
                value = head_norm(value, weight, config)
            return layers.rope(value, positions, varying.inverse_frequencies, varying.rope_magnitude)

        normed, attention = norm(x, weights.attention_norm), weights.attention
        q = rotate(project(normed, attention.q, attention.q_bias, config.heads), attention.q_norm)
        k = rotate(project(normed, attention.k, attention.k_bias, config.kv_heads), attention.k_norm)
        v = project(normed, attention.v, attention.v_bias, config.kv_heads)
        scoring = (config.scale, config.attention_softcap)
        if cache is None:
            mixed = self_attention(q, k, v, varying.window, config.windows, *scoring)
        else:
            rows = jnp.arange(x.shape[0])[:, None]
            cache = Cache(cache.k.at[rows, positions].set(k), cache.v.at[rows, positions].set(v))
            mixed = layers.attend(q, cache.k, cache.v, positions, varying.window, *scoring)
        x = x + norm(summed(layers.project(mixed, attention.o, inner=2)), weights.attention_post_norm)

        normed = norm(x, weights.mlp_norm)
        activation = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}[config.activation]
        gated = activation(layers.project(normed, weights.mlp.gate)) * layers.project(normed, weights.mlp.up)
        x = x + norm(summed(layers.project(gated, weights.mlp.down)), weights.mlp_post_norm)
        return x, cache


def head_norm(
    x: Float[Array, "batch time heads head_dim"], weight: Float[Array, " norm"], config: ModelConfig
) -> Float[Array, "batch time heads head_dim"]:
    """RMS norm of queries or keys: of each head (Qwen 3, Gemma 3), or over all heads of all devices (OLMo 2)."""
    if config.qk_norm == "head":
        return layers.rms_norm(x, weight, config.norm_eps, config.norm_plus_one)
    flat = x.reshape(*x.shape[:2], -1)
    squares = jnp.sum(jnp.square(flat.astype(jnp.float32)), -1, keepdims=True)
    mean_square = tp_sum(squares) / (tp_size() * flat.shape[-1])  # heads that devices share count once for each
    weight = tp_share(weight.reshape(-1, config.head_dim)).reshape(-1)
    return layers.rms_norm(flat, weight, config.norm_eps, config.norm_plus_one, mean_square).reshape(x.shape)


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

    def in_tail(self) -> "Transformer":
        """True in the place of each parameter that the last block, the final norm and the head read, else False."""
        none = jax.tree.map(lambda _: False, self)
        parts = "last", "norm", "embed" if self.unembed is None else "unembed"
        return eqx.tree_at(
            lambda model: [getattr(model, part) for part in parts],
            none,
            [jax.tree.map(lambda _: True, getattr(self, part)) for part in parts],
        )

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
        stacked, _ = self.config.varying()

        def body(x, layer):
            block, varying = layer
            x, _ = block(x, self.config, positions, varying)
            return x, pick(x, picks)

        first = pick(x, picks)
        x, rest = jax.lax.scan(checkpointed(body, remat), x, (self.blocks, stacked))
        return x, None if picks is None else jnp.concatenate([first[None], rest])

    def finish(self, x: Float[Array, "batch time embed"], remat: Remat = "none") -> Float[Array, "batch time embed"]:
        """The last block and the final norm."""
        positions = jnp.arange(x.shape[1])[None]
        _, varying = self.config.varying()

        def body(last, x):
            return last(x, self.config, positions, varying)[0]

        # Its backward pass runs once for each loss (gradmag.py): the weights are not gathered anew for each.
        return self.final_norm(checkpointed(body, remat, (GATHERED,))(self.last, x))

    def final_norm(self, x: Float[Array, "batch time embed"]) -> Float[Array, "batch time embed"]:
        return layers.rms_norm(x, self.norm, self.config.norm_eps, self.config.norm_plus_one)


def checkpointed(body: Callable, remat: Remat, also: tuple[str, ...] = ()) -> Callable:
    """A block's function, of which the backward pass finds saved what `remat` says, and what has one of these names."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return body
    policy = policies.save_from_both_policies(REMAT_POLICIES[remat], policies.save_only_these_names(*also))
    return jax.checkpoint(body, policy=policy)


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

    def identity(*shape):
        return jnp.full(shape, 0.0 if config.norm_plus_one else 1.0, jnp.float32)

    def block(*stack):
        c, out = config, 0.02 / math.sqrt(2 * config.layers)

        def head_norm(heads):
            channels = {"head": c.head_dim, "all": heads * c.head_dim}
            return None if c.qk_norm is None else identity(*stack, channels[c.qk_norm])

        def bias(heads):
            return jnp.zeros((*stack, heads * c.head_dim), jnp.float32) if c.qkv_bias else None

        def norms(wanted):
            return (identity(*stack, c.embed), identity(*stack, c.embed)) if wanted else (None, None)

        attention = Attention(
            q=normal(*stack, c.embed, c.heads, c.head_dim),
            k=normal(*stack, c.embed, c.kv_heads, c.head_dim),
            v=normal(*stack, c.embed, c.kv_heads, c.head_dim),
            o=normal(*stack, c.heads, c.head_dim, c.embed, scale=out),
            q_bias=bias(c.heads),
            k_bias=bias(c.kv_heads),
            v_bias=bias(c.kv_heads),
            q_norm=head_norm(c.heads),
            k_norm=head_norm(c.kv_heads),
        )
        mlp = MLP(
            gate=normal(*stack, c.embed, c.mlp),
            up=normal(*stack, c.embed, c.mlp),
            down=normal(*stack, c.mlp, c.embed, scale=out),
        )
        return Block(attention, mlp, *norms(c.pre_norms), *norms(c.post_norms))

    return Transformer(
        embed=normal(config.vocab_size, config.embed),
        expansion=None if config.expansion_size is None else normal(config.expansion_size, config.embed),
        blocks=block(config.layers - 1),
        last=block(),
        norm=identity(config.embed),
        unembed=None if config.tied else normal(config.vocab_size, config.embed),
        config=config,
    )

"""Decoder-only transformers as Equinox modules; a family (Llama, Gemma, Qwen, OLMo, ...) is a value of ModelConfig.

Modules hold parameters in slices and declare each one's shape and layout on its field. Their methods run inside
`jax.shard_map` (see parallel/mesh.py). The last block stands apart from the stacked ones because GradMag
(distill/gradmag.py) differentiates it alone.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from minalm.models import layers
from minalm.models.attention import SAVED, self_attention
from minalm.models.config import LayerSettings, ModelConfig
from minalm.models.head import PrefixTree, VocabularyMask, byte_scores, byte_targets, token_stats
from minalm.parallel.collectives import GATHERED, gather, lookup, tp_share, tp_size, tp_sum
from minalm.parallel.mesh import TP_OR_WHOLE, param
from minalm.types import BytePlaces, ByteTargets, ModelOutput, Tokens

SUMMED = "summed"  # the name under which a policy finds sums over `tp`, which take messages to compute again
REMAT_SAVES = {  # what a block saves for its backward pass beside its input, by name; the rest is computed again
    "dots": (layers.PROJECTED, SAVED, SUMMED),
    "full": (),
}
Remat = Literal["none", "dots", "full"]


class Attention(eqx.Module):
    q: Float[Array, "*stack embed heads head_dim"] = param("fsdp", "tp", None)
    k: Float[Array, "*stack embed kv_heads head_dim"] = param("fsdp", TP_OR_WHOLE, None)
    v: Float[Array, "*stack embed kv_heads head_dim"] = param("fsdp", TP_OR_WHOLE, None)
    o: Float[Array, "*stack heads head_dim embed"] = param("tp", None, "fsdp")
    q_bias: Float[Array, "*stack heads_x_head_dim"] | None = param(None)
    k_bias: Float[Array, "*stack kv_heads_x_head_dim"] | None = param(None)
    v_bias: Float[Array, "*stack kv_heads_x_head_dim"] | None = param(None)
    o_bias: Float[Array, "*stack embed"] | None = param(None)
    q_norm: Float[Array, "*stack q_norm"] | None = param(None)  # head_dim, or heads * head_dim
    k_norm: Float[Array, "*stack k_norm"] | None = param(None)


class MLP(eqx.Module):
    gate: Float[Array, "*stack embed mlp"] = param("fsdp", "tp")
    up: Float[Array, "*stack embed mlp"] = param("fsdp", "tp")
    down: Float[Array, "*stack mlp embed"] = param("tp", "fsdp")
    gate_bias: Float[Array, "*stack mlp"] | None = param("tp")
    up_bias: Float[Array, "*stack mlp"] | None = param("tp")
    down_bias: Float[Array, "*stack embed"] | None = param(None)


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
        rotation: layers.Rotation,
        settings: LayerSettings,
        segments: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time embed"]:
        """One layer. A position sees those of its own segment."""
        if settings.rope is not None:
            rotation = jax.tree.map(lambda table: table[settings.rope], rotation)
        weights = gather(self, x.dtype)

        def norm(value, weight):
            return value if weight is None else layers.rms_norm(value, weight, config.norm_eps, config.norm_plus_one)

        def biased(value, bias):
            return value if bias is None else value + bias

        def project(value, weight, bias, heads):
            if weight.shape[1] == heads:  # not divided over tp, or there is one device
                weight = tp_share(weight, axis=1)
            return biased(layers.project(value, weight), None if bias is None else tp_share(bias.reshape(heads, -1)))

        def added(value, bias, weight):
            """What is added to the states, of this device's part of a product."""
            whole = biased(checkpoint_name(tp_sum(value), SUMMED), bias)  # the bias once, not on each device
            return layers.scaled(norm(whole, weight), config.residual_scale)

        def rotate(value, weight):
            if weight is not None:
                value = head_norm(value, weight, config)
            return layers.rotate(value, rotation)

        normed, attention = norm(x, weights.attention_norm), weights.attention
        q = rotate(project(normed, attention.q, attention.q_bias, config.heads), attention.q_norm)
        k = rotate(project(normed, attention.k, attention.k_bias, config.kv_heads), attention.k_norm)
        v = project(normed, attention.v, attention.v_bias, config.kv_heads)
        mixed = self_attention(
            q, k, v, settings.window, config.windows, config.scale, config.attention_softcap, segments
        )
        x = x + added(layers.project(mixed, attention.o, inner=2), attention.o_bias, weights.attention_post_norm)

        normed, mlp = norm(x, weights.mlp_norm), weights.mlp
        activation = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}[config.activation]
        gate = activation(biased(layers.project(normed, mlp.gate), mlp.gate_bias))
        gated = gate * biased(layers.project(normed, mlp.up), mlp.up_bias)
        x = x + added(layers.project(gated, mlp.down), mlp.down_bias, weights.mlp_post_norm)
        return x


def head_norm(
    x: Float[Array, "batch time heads head_dim"], weight: Float[Array, " norm"], config: ModelConfig
) -> Float[Array, "batch time heads head_dim"]:
    """RMS norm of queries or keys: of each head (Qwen 3, Gemma 3), or over the heads of all devices (OLMo 2)."""
    if config.qk_norm == "head":
        return layers.rms_norm(x, weight, config.norm_eps, config.norm_plus_one)
    flat = x.reshape(*x.shape[:2], -1)
    squares = jnp.sum(jnp.square(flat.astype(jnp.float32)), -1, keepdims=True)
    mean_square = tp_sum(squares) / (tp_size() * flat.shape[-1])  # heads that devices share count once for each
    weight = tp_share(weight.reshape(-1, config.head_dim)).reshape(-1)
    return layers.rms_norm(flat, weight, config.norm_eps, config.norm_plus_one, mean_square).reshape(x.shape)


class TrunkOutput(eqx.Module):
    """What the last block of a Transformer reads, and what it gives."""

    x: Float[Array, "batch time embed"]
    states: Float[Array, "batch depth chunk embed"] | None  # of the embeddings and of each block; None: not wanted
    segments: Float32[Array, "batch time"] | None = (
        None  # Tokens.segments, as numbers through which a gradient can flow
    )


class Transformer(eqx.Module):
    """embed -> blocks 0..n-2, stacked and scanned -> last block n-1 -> norm; the head (head.py) reads `unembedding`.
    See contract.py."""

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
        """True in the place of each parameter that the final norm or the head reads, else False."""
        none = jax.tree.map(lambda _: False, self)
        parts = "norm", "embed" if self.unembed is None else "unembed"
        return eqx.tree_at(
            lambda model: [getattr(model, part) for part in parts],
            none,
            [jax.tree.map(lambda _: True, getattr(self, part)) for part in parts],
        )

    def embed_tokens(
        self, inputs: Int[Array, "batch time"], suffix: Int[Array, "batch time"] | None, dtype: jnp.dtype
    ) -> Float[Array, "batch time embed"]:
        """Embeddings of the inputs, plus those of the longest original subword that ends at each (byte students)."""
        x = lookup(self.embed, inputs, dtype)
        if self.expansion is not None:
            x = x + lookup(self.expansion, suffix, dtype)
        return x * jnp.asarray(self.config.embedding_scale, dtype)

    def trunk(
        self,
        tokens: Tokens,
        dtype: jnp.dtype,
        remat: Remat = "none",
        states_at: Int[Array, "batch chunk"] | None = None,
    ) -> TrunkOutput:
        """All but the last block; the states of all layers at the positions `states_at` only, for memory."""
        x = self.embed_tokens(tokens.inputs, tokens.suffix, dtype)
        segments = tokens.segments
        x, states = stacked_blocks(self.blocks, self.config, x, remat, states_at, segments=segments)
        return TrunkOutput(x, states, None if segments is None else segments.astype(jnp.float32))

    def last_layer(self, output: TrunkOutput, remat: Remat = "none") -> TrunkOutput:
        """The last block; the states of the others stay what they are."""
        segments = None if output.segments is None else output.segments.astype(jnp.int32)
        x = last_block(self.last, self.config, output.x, remat, segments)
        return TrunkOutput(x, output.states, output.segments)

    def tail(
        self,
        output: TrunkOutput,
        tokens: Tokens,
        mask: VocabularyMask,
        states_at: Int[Array, "batch chunk"] | None = None,
        bytes_at: tuple[PrefixTree, BytePlaces] | None = None,
        targets: ByteTargets | None = None,
    ) -> ModelOutput:
        """Final norm and head; the final states at `states_at` follow those of the trunk."""
        x = self.final_norm(output.x)
        states = output.states
        if states_at is not None:
            final = pick(x, states_at)[:, None]
            states = final if states is None else jnp.concatenate([states, final], axis=1)
        x = self.before_head(x)
        table, cap = self.unembedding, self.config.final_softcap
        return ModelOutput(
            stats=token_stats(x, tokens.targets, table, mask, cap),
            states=states,
            byte_targets=None if bytes_at is None else byte_targets(x, tokens.targets, table, mask, cap, *bytes_at),
            byte_scores=None if targets is None else byte_scores(x, table, mask, cap, targets),
        )

    def final_norm(self, x: Float[Array, "batch time embed"]) -> Float[Array, "batch time embed"]:
        return layers.rms_norm(x, self.norm, self.config.norm_eps, self.config.norm_plus_one)

    def before_head(self, x: Float[Array, "*rows embed"]) -> Float[Array, "*rows embed"]:
        """What the head reads of the states after the final norm: divided, and so are the logits (Granite)."""
        return layers.scaled(x, 1.0 / self.config.logits_divisor)


def stacked_blocks(
    blocks: Block,
    config: ModelConfig,
    x: Float[Array, "batch time embed"],
    remat: Remat = "none",
    states_at: Int[Array, "batch chunk"] | None = None,
    part: slice = slice(None),
    segments: Int[Array, "batch time"] | None = None,
) -> tuple[Float[Array, "batch time embed"], Float[Array, "batch depth chunk embed"] | None]:
    """All blocks but the last, or a part of them: their output, and the states at `states_at` (of x too). With
    `segments`, each is a sequence of its own."""
    rotation = rotary_tables(config, x.shape[1], x.dtype, segments)
    settings, _ = config.layer_settings()

    def body(x, layer):
        block, settings = layer
        x = block(x, config, rotation, settings, segments)
        return x, pick(x, states_at)

    first, layers_read = pick(x, states_at), (blocks, settings)
    if part != slice(None):
        layers_read = jax.tree.map(lambda leaf: leaf[part], layers_read)
    x, states = jax.lax.scan(checkpointed(body, remat), x, layers_read)
    if states is not None:
        states = jnp.moveaxis(jnp.concatenate([first[None], states]), 0, 1)
    return x, states


def last_block(
    last: Block,
    config: ModelConfig,
    x: Float[Array, "batch time embed"],
    remat: Remat = "none",
    segments: Int[Array, "batch time"] | None = None,
) -> Float[Array, "batch time embed"]:
    """The last block's output."""
    rotation = rotary_tables(config, x.shape[1], x.dtype, segments)  # the compiler shares it with the stacked blocks
    _, settings = config.layer_settings()

    def body(last, x):
        return last(x, config, rotation, settings, segments)

    # Its backward pass runs once for each loss (gradmag.py): the weights are not gathered anew for each.
    return checkpointed(body, remat, (GATHERED,))(last, x)


def checkpointed(body: Callable, remat: Remat, also: tuple[str, ...] = ()) -> Callable:
    """A block's function, whose backward pass finds saved what `remat` says and what carries one of these names."""
    if remat == "none":
        return body
    policy = jax.checkpoint_policies.save_only_these_names(*REMAT_SAVES[remat], *also)
    return jax.checkpoint(body, policy=policy)


def pick(
    x: Float[Array, "batch time embed"], positions: Int[Array, "batch chunk"] | None
) -> Float[Array, "batch chunk embed"] | None:
    """The states at the given positions of each row; position -1 (no chunk) reads position 0."""
    return None if positions is None else jnp.take_along_axis(x, jnp.maximum(positions, 0)[..., None], axis=1)


def rotary_tables(
    config: ModelConfig, length: int, dtype: jnp.dtype, segments: Int[Array, "batch time"] | None = None
) -> layers.Rotation:
    """Sines and cosines for all layers, of sequences of this length: one table, or a stack of one for each of
    `config.ropes` if these are several. In each of `segments` positions begin anew."""
    positions = jnp.arange(length)[None]
    if segments is not None:
        begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        positions = positions - jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)

    def table(rope):
        if rope is None:  # turned by nothing: the numbers stay exactly what they are
            half = config.rope.channels(config.head_dim) // 2
            return layers.rotation(positions, np.zeros(half, np.float32), 1.0, dtype)
        return layers.rotation(positions, rope.inverse_frequencies(config.head_dim, length), rope.magnitude, dtype)

    tables = [table(rope) for rope in config.ropes]
    return tables[0] if len(tables) == 1 else jax.tree.map(lambda *table: jnp.stack(table), *tables)


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

        def bias(wanted, size):
            return jnp.zeros((*stack, size), jnp.float32) if wanted else None

        def norms(wanted):
            return (identity(*stack, c.embed), identity(*stack, c.embed)) if wanted else (None, None)

        attention = Attention(
            q=normal(*stack, c.embed, c.heads, c.head_dim),
            k=normal(*stack, c.embed, c.kv_heads, c.head_dim),
            v=normal(*stack, c.embed, c.kv_heads, c.head_dim),
            o=normal(*stack, c.heads, c.head_dim, c.embed, scale=out),
            q_bias=bias(c.qkv_bias, c.heads * c.head_dim),
            k_bias=bias(c.qkv_bias, c.kv_heads * c.head_dim),
            v_bias=bias(c.qkv_bias, c.kv_heads * c.head_dim),
            o_bias=bias(c.o_bias, c.embed),
            q_norm=head_norm(c.heads),
            k_norm=head_norm(c.kv_heads),
        )
        mlp = MLP(
            gate=normal(*stack, c.embed, c.mlp),
            up=normal(*stack, c.embed, c.mlp),
            down=normal(*stack, c.mlp, c.embed, scale=out),
            gate_bias=bias(c.mlp_bias, c.mlp),
            up_bias=bias(c.mlp_bias, c.mlp),
            down_bias=bias(c.mlp_bias, c.embed),
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


def leaves(model: Any) -> dict[str, Any]:
    """Path of each array, for example "blocks.attention.q" -> the array, in the order of the tree."""
    found, _ = jax.tree_util.tree_flatten_with_path(model)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}


def from_leaves(config: ModelConfig, arrays: Mapping[str, Any]) -> Transformer:
    """The Transformer of this architecture that has these `leaves`."""
    return filled(abstract(config), arrays)


def filled(shapes: Any, arrays: Mapping[str, Any]) -> Any:
    """A model of shapes with these `leaves` in their places."""
    wanted = {leaf: array.shape for leaf, array in leaves(shapes).items()}
    given = {leaf: array.shape for leaf, array in arrays.items()}
    if given != wanted:
        raise ValueError(f"the arrays have the shapes {given} where the architecture has {wanted}")
    return jax.tree.unflatten(jax.tree.structure(shapes), [arrays[leaf] for leaf in wanted])


@functools.cache
def abstract(config: ModelConfig) -> Transformer:
    """A Transformer of shapes."""
    return eqx.filter_eval_shape(initialize, config, jax.random.key(0))

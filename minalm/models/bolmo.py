"""Bolmo: a byte model whose middle is a subword model, which reads patches of bytes that the model itself cuts.

    h = norm(encoder(embed[x] + expansion[longest subword that ends here]))     each byte
    b = boundary(h), with one byte of lookahead                                 whether a patch ends here
    g = pool(h where b)                                                         each patch: its last byte
    G = the subword model's blocks (g)
    a = decoder(depool(h) + norm(G of the last patch that has ended))           each byte
    p = softmax(unembed · norm(a))     over ids twice: the next byte, and the next byte that also ends a patch

Encoder and decoder are mLSTM blocks (mlstm.py). The methods run inside `shard_map`; see contract.py, which `Bolmo`
keeps. In stage 1 a `Guide` stands for the boundaries and for G; else the model is whole.
"""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from minalm.models import layers, transformer
from minalm.models.config import BolmoConfig, ModelConfig
from minalm.models.head import PrefixTree, VocabularyMask, token_stats
from minalm.models.mlstm import MLSTM, State
from minalm.models.transformer import MLP, Block, Remat, checkpointed, last_block, stacked_blocks
from minalm.parallel.collectives import gather, lookup, tp_share, tp_sum
from minalm.parallel.mesh import param
from minalm.types import BytePlaces, ByteTargets, ModelOutput, PatchOutput, Tokens

LOG_HALF = math.log(0.5)
MOST_ALIKE = 1.0 - 1e-3  # cosine from which on a boundary is not less probable
NEVER = -1e5  # the log-probability of a boundary where no next byte can be seen
INPUT_GATE_BIAS = -10.0  # of the input gates at the start: the memory fills slowly


class LocalBlock(eqx.Module):
    """An mLSTM layer and an MLP, each on a norm of what it is added to."""

    norm: Float[Array, "*stack embed"] = param(None)
    mlstm: MLSTM
    mlp_norm: Float[Array, "*stack embed"] = param(None)
    mlp: MLP

    def __call__(
        self,
        x: Float[Array, "batch time embed"],
        eps: float,
        state: State | None = None,
        present: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time embed"], State]:
        """(output, the mLSTM's state after these positions); see `MLSTM`."""
        mixed, state = self.mlstm(layers.rms_norm(x, self.norm, eps, False), state, present)
        x = x + mixed
        normed, mlp = layers.rms_norm(x, self.mlp_norm, eps, False), gather(self.mlp, x.dtype)
        gated = jax.nn.silu(layers.project(normed, mlp.gate)) * layers.project(normed, mlp.up)
        return x + tp_sum(layers.project(gated, mlp.down)), state


class Projection(eqx.Module):
    """A linear map with a bias; its inputs are divided over `tp`."""

    weight: Float[Array, "embed out"] = param("tp", "fsdp")
    bias: Float[Array, " out"] = param(None)

    def __call__(self, x: Float[Array, "batch time embed"]) -> Float[Array, "batch time out"]:
        whole = gather(self, x.dtype)
        return tp_sum(layers.project(tp_share(x, axis=2), whole.weight)) + whole.bias


class BoundaryPredictor(eqx.Module):
    """A patch ends where two neighbours, each seen by a map of its own, are unlike."""

    q: Float[Array, "embed out"] = param("fsdp", "tp")
    k: Float[Array, "embed out"] = param("fsdp", "tp")

    def __call__(self, h: Float[Array, "batch time embed"]) -> Float32[Array, "batch time"]:
        """log p with p = (1 - cos(q h[t], k h[t + 1])) / 2. The first position always ends a patch (bos is one), the
        last, whose neighbour is not there, never does. A patch ends where p > 1/2."""
        whole = gather(self, h.dtype)
        return boundary_logp(h, whole.q, whole.k)


def boundary_logp(
    h: Float[Array, "batch time embed"], q: Float[Array, "embed out"], k: Float[Array, "embed out"]
) -> Float32[Array, "batch time"]:
    """`BoundaryPredictor` with parameters that are whole along `fsdp`."""
    ours = layers.project(h[:, :-1], q).astype(jnp.float32)
    next_one = layers.project(h[:, 1:], k).astype(jnp.float32)
    sums = (ours * next_one, jnp.square(ours), jnp.square(next_one))
    product, *squares = tp_sum(jnp.stack([jnp.sum(each, axis=-1) for each in sums]))
    cosine = product / jnp.prod(jnp.sqrt(jnp.maximum(jnp.stack(squares), 1e-24)), axis=0)
    logp = jnp.log1p(-jnp.minimum(cosine, MOST_ALIKE)) + LOG_HALF
    return jnp.pad(logp[:, 1:], ((0, 0), (1, 1)), constant_values=((0.0, 0.0), (0.0, NEVER)))


class GlobalModel(eqx.Module):
    """The blocks of the subword model, without its tables and its final norm."""

    blocks: Block
    last: Block

    def __call__(
        self, g: Float[Array, "batch patch embed"], config: ModelConfig, remat: Remat = "none"
    ) -> Float[Array, "batch patch embed"]:
        """All blocks. The number of a patch is its position."""
        return last_block(self.last, config, stacked_blocks(self.blocks, config, g, remat)[0], remat)

    def first(
        self, g: Float[Array, "batch patch embed"], config: ModelConfig, count: int, remat: Remat = "none"
    ) -> Float[Array, "batch patch embed"]:
        """The first `count` blocks."""
        if count == config.layers:
            return self(g, config, remat)
        return stacked_blocks(self.blocks, config, g, remat, part=slice(count))[0]


class BolmoOutput(eqx.Module):
    """What the last block of the decoder reads, and what it gives; and what the losses read of the patches."""

    x: Float[Array, "batch time embed"]
    patches: PatchOutput


class Bolmo(eqx.Module):
    """See the top of this file."""

    embed: Float[Array, "ids embed"] = param("tp", "fsdp")  # of published models twice `vocab_size` rows: half are read
    expansion: Float[Array, "subwords embed"] = param("tp", "fsdp")
    encoder: LocalBlock  # stacked
    encoder_norm: Float[Array, " embed"] = param(None)
    boundary: BoundaryPredictor
    pool: Projection
    patches: GlobalModel
    patch_norm: Float[Array, " embed"] = param(None)
    depool: Projection
    decoder: LocalBlock  # all but the last, stacked
    last: LocalBlock
    norm: Float[Array, " embed"] = param(None)
    unembed: Float[Array, "ids embed"] = param("tp", "fsdp")
    config: BolmoConfig = eqx.field(static=True)

    @property
    def unembedding(self) -> Float[Array, "ids embed"]:
        return self.unembed

    def encode(
        self,
        inputs: Int[Array, "batch time"],
        suffix: Int[Array, "batch time"],
        dtype: jnp.dtype,
        remat: Remat = "none",
        state: State | None = None,
        present: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time embed"], State]:
        """(h, the states of the encoder's blocks after these bytes, stacked)."""
        z = lookup(self.embed, inputs, dtype) + lookup(self.expansion, suffix, dtype)
        x, state = local_blocks(self.encoder, self.config, z, remat, state, present)
        return layers.rms_norm(x, self.encoder_norm, self.config.local_norm_eps, False), state

    def pooled(
        self, h: Float[Array, "batch time embed"], ends: Int[Array, "batch patch"]
    ) -> Float[Array, "batch patch embed"]:
        """g: what stands for each patch. Slots that hold no patch (-1) come after all others, and no byte reads them."""
        return self.pool(jnp.take_along_axis(h, jnp.maximum(ends, 0)[..., None], axis=1))

    def depooled(
        self,
        h: Float[Array, "batch time embed"],
        patches: Float[Array, "batch patch embed"],
        patch: Int[Array, "batch time"],
    ) -> Float[Array, "batch time embed"]:
        """What the decoder reads: each byte, and the patch `patch` after the subword model's blocks."""
        normed = layers.rms_norm(patches, self.patch_norm, self.config.local_norm_eps, False)
        return self.depool(h) + jnp.take_along_axis(normed, patch[..., None], axis=1)

    def trunk(
        self,
        tokens: Tokens,
        dtype: jnp.dtype,
        remat: Remat = "none",
        states_at: Int[Array, "batch chunk"] | None = None,
    ) -> BolmoOutput:
        """All but the last block of the decoder."""
        if states_at is not None:
            raise ValueError("a Bolmo has no hidden states at every position of a subword model")
        slots, guide = tokens.patch_ends.shape[1], tokens.guide
        h, _ = self.encode(tokens.inputs, tokens.suffix, dtype, remat)
        logp = self.boundary(h)
        ends = forced_boundaries(tokens) if guide is not None else predicted_boundaries(logp, tokens)
        g = self.pooled(h, patch_ends(ends, slots))
        if guide is None:
            patches, early = self.patches(g, self.config.blocks, remat), None
        else:
            patches = guide.states.astype(dtype)
            early = self.patches.first(g, self.config.blocks, guide.blocks, remat)
        x = self.depooled(h, patches, patch_of(ends, slots))
        x, _ = local_blocks(self.decoder, self.config, x, remat)
        return BolmoOutput(x, PatchOutput(logp, ends.astype(jnp.float32), early))

    def last_layer(self, output: BolmoOutput, remat: Remat = "none") -> BolmoOutput:
        """The last block of the decoder."""
        x = checkpointed(lambda block, x: block(x, self.config.norm_eps)[0], remat)(self.last, output.x)
        return BolmoOutput(x, output.patches)

    def tail(
        self,
        output: BolmoOutput,
        tokens: Tokens,
        mask: VocabularyMask,
        states_at: Int[Array, "batch chunk"] | None = None,
        bytes_at: tuple[PrefixTree, BytePlaces] | None = None,
        targets: ByteTargets | None = None,
    ) -> ModelOutput:
        """Final norm and head. What is predicted is the next byte together with whether it ends a patch."""
        if states_at is not None or bytes_at is not None or targets is not None:
            raise ValueError("a Bolmo gives neither hidden states of tokens nor a distribution of plain bytes here")
        x = layers.rms_norm(output.x, self.norm, self.config.norm_eps, False)
        fused = fused_targets(tokens.targets, output.patches.ends, self.config.vocab_size)
        return ModelOutput(token_stats(x, fused, self.unembed, mask, None), patches=output.patches)

    def in_tail(self) -> "Bolmo":
        """True in the place of each parameter that the final norm or the head reads, else False."""
        none = jax.tree.map(lambda _: False, self)
        return eqx.tree_at(lambda model: (model.norm, model.unembed), none, (True, True))


def local_blocks(
    blocks: LocalBlock,
    config: BolmoConfig,
    x: Float[Array, "batch time embed"],
    remat: Remat = "none",
    state: State | None = None,
    present: Bool[Array, "batch time"] | None = None,
) -> tuple[Float[Array, "batch time embed"], State]:
    """(output of stacked blocks, their states after these positions), from the states before them (None: the beginning);
    positions that are not `present` leave the states as they are."""

    def body(x, layer):
        block, state = layer
        return block(x, config.norm_eps, state, present)

    return jax.lax.scan(checkpointed(body, remat), x, (blocks, state))


# --- where patches end --------------------------------------------------------------------------------------------


def forced_boundaries(tokens: Tokens) -> Bool[Array, "batch time"]:
    """Patches end where the teacher's tokens do."""
    ends = tokens.patch_ends
    rows, time = jnp.arange(ends.shape[0])[:, None], tokens.inputs.shape[1]
    return jnp.zeros(tokens.inputs.shape, bool).at[rows, jnp.where(ends < 0, time, ends)].set(True, mode="drop")


def predicted_boundaries(logp: Float32[Array, "batch time"], tokens: Tokens) -> Bool[Array, "batch time"]:
    """Patches end where the predictor finds it more probable than not. The last byte of a row, behind which there is
    nothing to look at, ends one; what fills the row up ends none."""
    last = jnp.max(tokens.patch_ends, axis=1, keepdims=True)
    position = jnp.arange(logp.shape[1])
    return jnp.where(position < last, logp > LOG_HALF, position == last)


def patch_ends(ends: Bool[Array, "batch time"], slots: int) -> Int[Array, "batch patch"]:
    """The last position of each patch, -1 where a slot holds none; patches past the slots have none."""
    rows, time = jnp.arange(ends.shape[0])[:, None], jnp.arange(ends.shape[1])
    number = jnp.where(ends, jnp.cumsum(ends, axis=1) - 1, slots)
    return jnp.full((ends.shape[0], slots), -1).at[rows, number].set(time[None], mode="drop")


def patch_of(ends: Bool[Array, "batch time"], slots: int) -> Int[Array, "batch time"]:
    """The last patch that has ended at each position, that very position included; past the slots, the last slot."""
    return jnp.clip(jnp.cumsum(ends, axis=1) - 1, 0, slots - 1)


def fused_targets(
    targets: Int[Array, "batch time"], ends: Float32[Array, "batch time"], vocab_size: int
) -> Int[Array, "batch time"]:
    """The ids that are predicted: those from `vocab_size` on are of a byte that also ends a patch."""
    following = jnp.pad(ends[:, 1:], ((0, 0), (0, 1)))
    return targets + vocab_size * following.astype(targets.dtype)


# --- parameters ---------------------------------------------------------------------------------------------------


def initialize(config: BolmoConfig, key: PRNGKeyArray, patches: GlobalModel | None = None) -> Bolmo:
    """Random parameters, around the blocks of a subword model or random ones.

    Maps are uniform in ±1/sqrt(inputs), norms and the predictor's maps are ones and identities, the output table has
    standard deviation 0.02 (cut at 3 of them), the other tables too.
    """
    keys = iter(jax.random.split(key, 64))
    c, heads, narrow, wide = config, config.heads, config.key_dim, config.value_dim

    def uniform(inputs, *shape):
        return jax.random.uniform(next(keys), shape, minval=-(inputs**-0.5), maxval=inputs**-0.5)

    def local(*stack):
        mlstm = MLSTM(
            q=uniform(c.embed, *stack, c.embed, heads, narrow),
            k=uniform(c.embed, *stack, c.embed, heads, narrow),
            v=uniform(c.embed, *stack, c.embed, heads, wide),
            output_gate=uniform(c.embed, *stack, c.embed, heads, wide),
            input_gate=uniform(c.embed, *stack, c.embed, heads),
            forget_gate=uniform(c.embed, *stack, c.embed, heads),
            input_bias=jnp.full((*stack, heads), INPUT_GATE_BIAS),
            forget_bias=uniform(c.embed, *stack, heads),
            norm=jnp.ones((*stack, heads, wide)),
            out=uniform(c.embed, *stack, heads, wide, c.embed),
        )
        mlp = MLP(
            gate=uniform(c.embed, *stack, c.embed, c.mlp),
            up=uniform(c.embed, *stack, c.embed, c.mlp),
            down=uniform(c.mlp, *stack, c.mlp, c.embed),
            gate_bias=None,
            up_bias=None,
            down_bias=None,
        )
        return LocalBlock(jnp.ones((*stack, c.embed)), mlstm, jnp.ones((*stack, c.embed)), mlp)

    def projection():
        return Projection(uniform(c.embed, c.embed, c.embed), uniform(c.embed, c.embed))

    if patches is None:
        whole = transformer.initialize(c.blocks, next(keys))
        patches = GlobalModel(whole.blocks, whole.last)
    return Bolmo(
        embed=0.02 * jax.random.normal(next(keys), (2 * c.vocab_size, c.embed)),
        expansion=0.02 * jax.random.normal(next(keys), (c.expansion_size, c.embed)),
        encoder=local(c.encoder_layers),
        encoder_norm=jnp.ones(c.embed),
        boundary=BoundaryPredictor(jnp.eye(c.embed), jnp.eye(c.embed)),
        pool=projection(),
        patches=patches,
        patch_norm=jnp.ones(c.embed),
        depool=projection(),
        decoder=local(c.decoder_layers - 1),
        last=local(),
        norm=jnp.ones(c.embed),
        unembed=0.02 * jax.random.truncated_normal(next(keys), -3.0, 3.0, (2 * c.vocab_size, c.embed)),
        config=config,
    )


@functools.cache
def abstract(config: BolmoConfig) -> Bolmo:
    """A Bolmo of shapes."""
    return eqx.filter_eval_shape(initialize, config, jax.random.key(0))

"""mLSTM layers (Beck et al. 2024, arXiv 2405.04517): a memory of outer products that gates let grow and fade.

The cell has two forms that give the same numbers: `step` follows the recurrence and is what decoding does, `chunkwise`
reads many positions at once and is what training does. Gates, memory and sums are float32 in both. Heads are divided
over `tp`.

Axes: batch, time, head, key and value channels of a head, embed.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32

from minalm.models import layers
from minalm.models.attention import SAVED
from minalm.models.transformer import SUMMED
from minalm.parallel.collectives import gather, tp_sum, vary_like
from minalm.parallel.mesh import param

CHUNK = 128  # positions that are read at once
GATE_CAP = 15.0  # no gate's input is larger
EPS = 1e-6  # of the cell's denominator and of the norm of each head
ABSENT = -1e30  # the input gate of a position that is not there; finite, so that differences of two are numbers
# On a TPU a float32 product is by default rounded to bfloat16, which a memory of thousands of sums would feel.
PRECISION = jax.lax.Precision.HIGH


class State(eqx.Module):
    """What a cell remembers. Memory and normalizer are divided by exp(stabilizer)."""

    memory: Float32[Array, "batch head key value"]
    normalizer: Float32[Array, "batch head key"]
    stabilizer: Float32[Array, "batch head"]


def zero_state(batch: int, heads: int, keys: int, values: int) -> State:
    """What a cell remembers before the first position: nothing."""
    return State(jnp.zeros((batch, heads, keys, values)), jnp.zeros((batch, heads, keys)), jnp.zeros((batch, heads)))


def step(
    state: State,
    q: Float32[Array, "batch head key"],
    k: Float32[Array, "batch head key"],
    v: Float32[Array, "batch head value"],
    input_gate: Float32[Array, "batch head"],
    forget_gate: Float32[Array, "batch head"],
) -> tuple[State, Float32[Array, "batch head value"]]:
    """One position: (the state after it, what the cell says). The gates are what exp and sigmoid are taken of."""
    decay = jax.nn.log_sigmoid(forget_gate)
    stabilizer = jnp.maximum(decay + state.stabilizer, input_gate)
    keep, add = jnp.exp(decay + state.stabilizer - stabilizer), jnp.exp(input_gate - stabilizer)
    memory = keep[..., None, None] * state.memory + add[..., None, None] * k[..., :, None] * v[..., None, :]
    normalizer = keep[..., None] * state.normalizer + add[..., None] * k
    q = q / math.sqrt(q.shape[-1])
    found = jnp.einsum("bhk,bhkv->bhv", q, memory, precision=PRECISION)
    weight = jnp.abs(jnp.sum(normalizer * q, axis=-1))
    out = found / (jnp.maximum(weight, jnp.exp(-stabilizer)) + EPS)[..., None]
    return State(memory, normalizer, stabilizer), out


def chunkwise(
    state: State,
    q: Float32[Array, "batch time head key"],
    k: Float32[Array, "batch time head key"],
    v: Float32[Array, "batch time head value"],
    input_gate: Float32[Array, "batch time head"],
    forget_gate: Float32[Array, "batch time head"],
    present: Bool[Array, "batch time"] | None = None,
    chunk: int = CHUNK,
) -> tuple[State, Float32[Array, "batch time head value"]]:
    """Many positions: (the state after them, what the cell says at each). `step` for each in turn gives the same.

    Within a chunk every position reads the earlier ones as in attention, with the gates between the two as weights; what
    came before the chunk it reads from the state. Positions that are not `present` leave the state as it is. The
    backward pass computes each chunk again, from the state before it.
    """
    batch, time = q.shape[:2]
    chunk = min(chunk, time)
    decay = jax.nn.log_sigmoid(forget_gate)
    if present is not None:
        input_gate = jnp.where(present[..., None], input_gate, ABSENT)
        decay = jnp.where(present[..., None], decay, 0.0)
    padding = -time % chunk

    def chunks(x, fill=0.0):
        """[batch, time, head, ...] as [chunk, batch, head, position, ...]."""
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        x = x.reshape(batch, -1, chunk, *x.shape[2:])
        return jnp.moveaxis(jnp.swapaxes(x, 2, 3), 1, 0)

    inputs = chunks(q), chunks(k), chunks(v), chunks(input_gate, ABSENT), chunks(decay)
    state, out = jax.lax.scan(jax.checkpoint(_chunk), vary_like(state, inputs), inputs)
    out = jnp.swapaxes(jnp.moveaxis(out, 0, 1), 2, 3)
    return state, out.reshape(batch, time + padding, *out.shape[3:])[:, :time]


def _chunk(state, inputs):
    """One chunk of `chunkwise`; [batch, head, position, ...] arrays."""
    q, k, v, input_gate, decay = inputs
    size = q.shape[2]
    q = q / math.sqrt(q.shape[-1])
    faded = jnp.cumsum(decay, axis=-1)  # what is left, in logarithms, of what was there before the chunk
    before = faded + state.stabilizer[..., None]
    since = jnp.where(  # of what position s added, what is left at position t, in logarithms: [..., t, s]
        jnp.tri(size, dtype=bool), faded[..., :, None] - faded[..., None, :] + input_gate[..., None, :], ABSENT
    )
    stabilizer = jnp.maximum(before, _largest(since))
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k, precision=PRECISION) * jnp.exp(since - stabilizer[..., None])
    old = q * jnp.exp(before - stabilizer)[..., None]
    found = jnp.einsum("bhtk,bhkv->bhtv", old, state.memory, precision=PRECISION)
    found = found + jnp.einsum("bhts,bhsv->bhtv", scores, v, precision=PRECISION)
    weight = jnp.abs(jnp.sum(old * state.normalizer[..., None, :], axis=-1) + jnp.sum(scores, axis=-1))
    out = found / (jnp.maximum(weight, jnp.exp(-stabilizer)) + EPS)[..., None]

    last = since[..., -1, :]
    stabilizer = jnp.maximum(before[..., -1], _largest(last))
    keep, added = jnp.exp(before[..., -1] - stabilizer), k * jnp.exp(last - stabilizer[..., None])[..., None]
    memory = keep[..., None, None] * state.memory + jnp.einsum("bhsk,bhsv->bhkv", added, v, precision=PRECISION)
    normalizer = keep[..., None] * state.normalizer + jnp.sum(added, axis=-2)
    return State(memory, normalizer, stabilizer), out


def _largest(x):
    """The maximum over the last axis. Its gradient goes to the first largest element. That of jnp.max goes to those that
    are equal to a maximum computed earlier, which after rematerialisation none may be: it would be 0 / 0."""
    at = jnp.arange(x.shape[-1]) == jnp.argmax(x, axis=-1, keepdims=True)
    return jnp.sum(jnp.where(at, x, 0.0), axis=-1)


class MLSTM(eqx.Module):
    """Projections to queries, keys, values and gates, the cell, a norm of each head, an output gate, a projection."""

    q: Float[Array, "*stack embed head key"] = param("fsdp", "tp", None)
    k: Float[Array, "*stack embed head key"] = param("fsdp", "tp", None)
    v: Float[Array, "*stack embed head value"] = param("fsdp", "tp", None)
    output_gate: Float[Array, "*stack embed head value"] = param("fsdp", "tp", None)
    input_gate: Float[Array, "*stack embed head"] = param("fsdp", "tp")
    forget_gate: Float[Array, "*stack embed head"] = param("fsdp", "tp")
    input_bias: Float[Array, "*stack head"] = param("tp")
    forget_bias: Float[Array, "*stack head"] = param("tp")
    norm: Float[Array, "*stack head value"] = param("tp", None)
    out: Float[Array, "*stack head value embed"] = param("tp", None, "fsdp")

    def __call__(
        self,
        x: Float[Array, "batch time embed"],
        state: State | None = None,
        present: Bool[Array, "batch time"] | None = None,
        chunk: int = CHUNK,
    ) -> tuple[Float[Array, "batch time embed"], State]:
        """(the layer's output, the state after these positions), from the state before them (None: the beginning)."""
        whole = gather(self, x.dtype)
        wide = jnp.float32
        q, k, v = (layers.project(x, weight).astype(wide) for weight in (whole.q, whole.k, whole.v))

        def gate(weight, bias):
            return layers.softcap(layers.project(x, weight).astype(wide) + bias.astype(wide), GATE_CAP)

        gates = gate(whole.input_gate, self.input_bias), gate(whole.forget_gate, self.forget_bias)
        if state is None:
            state = zero_state(len(x), q.shape[2], q.shape[3], v.shape[3])
        state, found = chunkwise(state, q, k, v, *gates, present, chunk)
        found = checkpoint_name(found, SAVED)
        normed = (head_norm(found) * whole.norm.astype(wide)).astype(x.dtype)
        opened = jax.nn.sigmoid(layers.project(x, whole.output_gate)) * normed
        return checkpoint_name(tp_sum(layers.project(opened, whole.out, inner=2)), SUMMED), state


def head_norm(x: Float32[Array, "*rows value"]) -> Float32[Array, "*rows value"]:
    """Each head's channels without their mean, over their standard deviation (layer norm)."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + EPS)

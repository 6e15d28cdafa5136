"""How the next token is chosen: pure functions on logits, and the settings that they take.

Settings are numbers that a compiled program reads, so another temperature compiles nothing. Filters work by a threshold
that is found by halving an interval: sorting a vocabulary of 50,000 would take longer than many a step.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Key

from minalm.errors import InputError, flag


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. Filters apply in this order, each to what the one before it leaves."""

    temperature: float = 0.0
    """Logits are divided by it; 0: the most probable token, always."""
    top_k: int | None = None
    """Only so many tokens, the most probable ones. Default: all."""
    top_p: float | None = None
    """Only the most probable tokens that have this probability together. Default: all."""
    min_p: float | None = None
    """Only tokens at least this times as probable as the most probable one. Default: all."""
    repetition_penalty: float | None = None
    """Logits of tokens that have occurred are divided by it where positive, else multiplied. Default: 1, none."""

    def check(self) -> None:
        """Raises InputError for a setting out of its range."""
        bounds = {
            "temperature": (0.0, np.inf),
            "top_k": (1, np.inf),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (0.0, np.inf),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            outside = value is not None and (not low <= value <= high or value == np.inf)
            if outside or (value == 0 and name in ("top_p", "repetition_penalty")):
                limits = f"from {low} to {high}" if high < np.inf else f"of at least {low}"
                more = ", and not 0" if name in ("top_p", "repetition_penalty") else ""
                raise InputError(f"{flag(name)} is {value}: it must be a number {limits}{more}")


class Sampling(eqx.Module):
    """A SamplingConfig as arrays; None: not asked for, and not compiled."""

    temperature: Float32[Array | np.ndarray, ""] | None  # None: greedy
    top_k: Int[Array | np.ndarray, ""] | None
    top_p: Float32[Array | np.ndarray, ""] | None
    min_p: Float32[Array | np.ndarray, ""] | None
    repetition_penalty: Float32[Array | np.ndarray, ""] | None

    @classmethod
    def of(cls, config: SamplingConfig) -> "Sampling":
        """The arrays of a configuration; what changes nothing is None. Raises InputError."""
        config.check()

        def number(value, neutral, dtype=np.float32):
            return None if value is None or value == neutral else np.asarray(value, dtype)

        penalty = number(config.repetition_penalty, 1.0)
        if config.temperature == 0.0:  # no filter takes the most probable token away
            return cls(None, None, None, None, penalty)
        return cls(
            temperature=np.asarray(config.temperature, np.float32),
            top_k=number(config.top_k, None, np.int32),
            top_p=number(config.top_p, 1.0),
            min_p=number(config.min_p, 0.0),
            repetition_penalty=penalty,
        )


def adjusted(
    logits: Float32[Array, "*rows vocab"], sampling: Sampling, seen: Bool[Array, "*rows vocab"] | None
) -> Float32[Array, "*rows vocab"]:
    """Logits of the distribution that is sampled, -inf where it has none. `seen`: tokens that have occurred, for the
    repetition penalty (Keskar et al. 2019, arXiv 1909.05858)."""
    if sampling.repetition_penalty is not None:
        penalty = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature is None:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        k = jnp.minimum(sampling.top_k, logits.shape[-1])
        logits = _keep(logits, lambda above: jnp.sum(above, axis=-1, keepdims=True) >= k)
    if sampling.top_p is not None:  # nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751)
        p = jax.nn.softmax(logits, axis=-1)
        enough = jnp.minimum(sampling.top_p, 1.0 - 1e-6)  # of a sum that rounding may keep below 1
        logits = _keep(logits, lambda above: jnp.sum(jnp.where(above, p, 0.0), axis=-1, keepdims=True) >= enough)
    if sampling.min_p is not None:  # Nguyen et al. 2024, arXiv 2407.01082
        top = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits >= top + jnp.log(sampling.min_p), logits, -jnp.inf)
    return logits


def choose(
    logits: Float32[Array, "batch vocab"], sampling: Sampling, keys: Key[Array, " batch"]
) -> Int[Array, " batch"]:
    """One token for each row, of `adjusted` logits and the row's own key (the Gumbel-max trick)."""
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    return jnp.argmax(logits + noise, axis=-1)


def _keep(logits, enough):
    """Without the logits below the highest threshold above or at which there is `enough`."""
    order = _ordered(logits)
    shape = (*logits.shape[:-1], 1)
    low, high = jnp.zeros(shape, jnp.uint32), jnp.full(shape, 2**32 - 1, jnp.uint32)

    def halve(_, bounds):  # there is always enough at `low`
        low, high = bounds
        middle = low + (high - low) // 2 + (high - low) % 2
        inside = enough(order >= middle)
        return jnp.where(inside, middle, low), jnp.where(inside, high, middle - 1)

    threshold, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where(order >= threshold, logits, -jnp.inf)


def _ordered(x):
    """Unsigned integers in the order of the numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

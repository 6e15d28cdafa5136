"""Hidden states and logits at all positions, which the package itself never holds. They run inside `shard_map`."""

import jax.numpy as jnp

from minalm.models import layers
from minalm.models.contract import read
from minalm.models.head import VocabularyMask
from minalm.parallel.collectives import gather_channels
from minalm.types import Tokens

FLOAT32 = jnp.dtype(jnp.float32)


def tokens_of(inputs, suffix=None):
    """One side of a batch of which nothing is predicted."""
    return Tokens(inputs, jnp.zeros_like(inputs), jnp.zeros(inputs.shape), suffix)


def final_states(model, inputs, suffix=None, dtype=FLOAT32, remat="none"):
    """Hidden states after the final norm, [batch, time, embed]."""
    mask = VocabularyMask(*jnp.ones((2, model.unembedding.shape[0]), bool))
    everywhere = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    return read(model, mask, tokens_of(inputs, suffix), dtype, remat, everywhere).states[:, 0]


def logits(model, inputs, suffix=None, dtype=FLOAT32, remat="none"):
    """Logits, [batch, time, vocab]; of this device's entries of the vocabulary."""
    states = final_states(model, inputs, suffix, dtype, remat)
    product = jnp.einsum("bte,ve->btv", states, gather_channels(model.unembedding, dtype)) / model.config.logits_divisor
    return layers.softcap(product, model.config.final_softcap)

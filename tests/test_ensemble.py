"""Ensembles against numpy in float64, and what says whether models can be combined."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import vocabulary

from minalm.errors import InputError
from minalm.huggingface.loaded import LoadedModel
from minalm.huggingface.shared import shared_vocabulary
from minalm.models.config import ModelConfig, Rope
from minalm.models.ensemble import combine, normalized_weights
from minalm.models.transformer import abstract


def plain_log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def random_logits(seed, models=3, shape=(2, 5, 11)):
    return np.random.default_rng(seed).normal(0.0, 5.0, (models, *shape)).astype(np.float32)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from(("probability", "log")))
def test_combine_is_the_weighted_mean(seed, models, mean):
    logits = random_logits(seed, models)
    weights = np.random.default_rng(seed + 1).dirichlet(np.ones(models)) * 0.9 + 0.1 / models
    logp = plain_log_softmax(logits)
    weight = weights[:, None, None, None]
    if mean == "probability":
        expected = np.log((weight * np.exp(logp)).sum(0))
    else:
        expected = plain_log_softmax((weight * logp).sum(0))
    found = np.asarray(combine([*map(jnp.asarray, logits)], tuple(weights.tolist()), mean))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize("mean", ("probability", "log"))
def test_a_model_with_itself_is_the_model(mean):
    logits = jnp.asarray(random_logits(0)[0])
    found = combine([logits, logits, logits], (0.2, 0.5, 0.3), mean)
    np.testing.assert_allclose(found, plain_log_softmax(logits), atol=1e-5)


def test_what_a_model_excludes():
    """A mixture keeps what one member has; a product keeps what all have."""
    logits = jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([[0.0, -jnp.inf, 0.0]])
    mixed = np.exp(combine(logits, (0.5, 0.5), "probability"))
    np.testing.assert_allclose(mixed, [[0.5, 0.25, 0.25]], atol=1e-6)
    np.testing.assert_allclose(np.exp(combine(logits, (0.5, 0.5), "log")), [[1.0, 0.0, 0.0]], atol=1e-6)


def test_weights():
    assert normalized_weights(None, 4) == (0.25,) * 4
    assert normalized_weights([1.0, 3.0], 2) == (0.25, 0.75)
    for wrong in ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], []):
        with pytest.raises(InputError, match="--weights"):
            normalized_weights(wrong, 2)


def loaded(kind, **changes):
    own = dataclasses.replace(vocabulary(kind), **changes)
    config = ModelConfig(
        vocab_size=own.size,
        embed=8,
        mlp=8,
        layers=2,
        heads=1,
        kv_heads=1,
        head_dim=8,
        windows=(None,) * 2,
        rope=Rope(100.0),
    )
    return LoadedModel.of(abstract(config), own, None)


def test_models_of_one_vocabulary_share_all_ids():
    shared = shared_vocabulary([loaded("llama"), loaded("llama")])
    assert shared.size == vocabulary("llama").size and shared.end is None
    rows = jnp.asarray(random_logits(1)[0, :, :, :1]) + jnp.arange(shared.size + 3, dtype=jnp.float32)
    np.testing.assert_array_equal(shared.outcomes(rows, 1), rows[..., : shared.size])


def test_byte_students_of_different_families_share_bytes_and_an_end():
    """Their special tokens have other ids: what ends a text is one outcome."""
    pair = [loaded("bytes of llama"), loaded("bytes of gemma")]
    shared = shared_vocabulary(pair)
    assert shared.size == 257 and shared.end == 256 and shared.text_ids.tolist() == [*range(256)]
    for member, model in enumerate(pair):
        size = model.vocabulary.size
        logits = np.random.default_rng(2).normal(0.0, 2.0, (4, size)).astype(np.float32)
        found = np.asarray(shared.outcomes(jnp.asarray(logits), member), np.float64)
        np.testing.assert_array_equal(found[:, :256], logits[:, :256])
        stops = logits[:, model.vocabulary.stop_ids].astype(np.float64)
        assert stops.shape[1] >= 1
        np.testing.assert_allclose(found[:, 256], np.log(np.exp(stops).sum(1)), atol=1e-5)


def test_a_member_that_never_ends():
    pair = [loaded("bytes of llama"), loaded("bytes of gemma", names={}, stops=(), chat_template=None)]
    assert pair[1].vocabulary.stop_ids == []
    logits = jnp.zeros((1, pair[1].vocabulary.size))
    assert shared_vocabulary(pair).outcomes(logits, 1)[0, 256] == -jnp.inf


@pytest.mark.parametrize("kinds", (("llama", "bytes of llama"), ("llama", "qwen"), ("bytes of gemma", "gemma")))
def test_other_vocabularies_are_refused(kinds):
    pair = [loaded(kind) for kind in kinds]
    with pytest.raises(InputError, match="do not share a vocabulary") as found:
        shared_vocabulary(pair)
    assert all(model.vocabulary.name in str(found.value) for model in pair)

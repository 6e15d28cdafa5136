"""Ensembles against numpy in float64, and what says whether models can be combined."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import vocabulary

from minalm.errors import InputError
from minalm.generation.members import shared_entries
from minalm.models.ensemble import combine, normalized_weights


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


def test_models_of_one_vocabulary_share_all_ids():
    assert shared_entries([vocabulary("llama"), vocabulary("llama")]) is None


def test_byte_students_of_different_families_share_bytes_and_an_end():
    """Their special tokens have other ids: what ends a text is one entry."""
    pair = [vocabulary("bytes of llama"), vocabulary("bytes of gemma")]
    shared = shared_entries(pair)
    assert shared.text.tolist() == [*range(256)]
    for member, own in enumerate(pair):
        logits = np.random.default_rng(2).normal(0.0, 2.0, (4, own.size)).astype(np.float32)
        found = np.asarray(shared.of_member(member, jnp.asarray(logits)), np.float64)
        np.testing.assert_array_equal(found[:, :256], logits[:, :256])
        stops = logits[:, own.stop_ids].astype(np.float64)
        np.testing.assert_allclose(found[:, 256], np.log(np.exp(stops).sum(1)), atol=1e-5)


@pytest.mark.parametrize("kinds", (("llama", "bytes of llama"), ("llama", "qwen"), ("bytes of gemma", "gemma")))
def test_other_vocabularies_are_refused(kinds):
    with pytest.raises(InputError, match="writes text in other tokens"):
        shared_entries([vocabulary(kind) for kind in kinds])

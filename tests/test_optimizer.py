"""Schedules, weight decay and bounds of the optimizer's settings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minalm.errors import InputError
from minalm.models.config import ModelConfig
from minalm.models.transformer import abstract, leaves
from minalm.run.optimizer import OptimizerConfig, decays, learning_rate, make_optimizer

MODEL = ModelConfig(
    vocab_size=16,
    embed=8,
    mlp=12,
    layers=3,
    heads=2,
    kv_heads=1,
    head_dim=4,
    windows=(None,) * 3,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm="head",
    post_norms=True,
    tied=False,
)


@pytest.mark.parametrize("schedule", ("linear", "cosine", "constant", "wsd"))
@pytest.mark.parametrize("steps, warmup", ((10, 4), (10, 0), (3, 3), (3, 8), (1, 0)))
def test_schedules(schedule, steps, warmup):
    """The same on the host and on the device, and as in plain arithmetic; no update is made at rate 0."""
    config = OptimizerConfig(steps=steps, warmup_steps=warmup, learning_rate=2.0, schedule=schedule)
    rises = min(warmup, steps)
    expected = []
    for done in range(steps):
        left = (steps - done) / (steps - rises) if steps > rises else 1.0
        shape = {
            "linear": left,
            "cosine": (1 - math.cos(math.pi * min(left, 1))) / 2,
            "constant": 1.0,
            "wsd": min((steps - done) / (0.1 * steps), 1.0),
        }[schedule]
        expected.append(2.0 * min((done + 1) / max(rises, 1), shape))
    found = [float(learning_rate(config, done)) for done in range(steps)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert min(found) > 0 and max(found) <= 2.0
    if (steps, warmup) == (10, 4):
        on_device = jax.jit(jax.vmap(lambda done: learning_rate(config, done, jnp)))(jnp.arange(steps))
        np.testing.assert_allclose(on_device, expected, rtol=2e-6)


def test_wsd_is_flat_and_then_falls():
    config = OptimizerConfig(steps=100, warmup_steps=10, learning_rate=1.0, schedule="wsd", decay_share=0.2)
    rates = [float(learning_rate(config, done)) for done in range(101)]
    assert rates[9:81] == [1.0] * 72
    np.testing.assert_allclose(rates[80:], np.linspace(1, 0, 21))


@pytest.mark.parametrize("decay_all", (False, True))
def test_norms_and_biases_do_not_decay_unless_asked(decay_all):
    """Without a gradient, an update is the decay alone."""
    names = ("q", "q_bias", "q_norm", "norm", "embed")
    model = {name: np.full(3, 2.0, np.float32) for name in names}
    optimizer = make_optimizer(
        OptimizerConfig(steps=1, warmup_steps=0, learning_rate=0.5, weight_decay=0.25, decay_all=decay_all)
    )
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(
            lambda model: optimizer.update(jax.tree.map(jnp.zeros_like, model), optimizer.init(model), model)
        )
        updates, _ = update(model)
    for name in names:
        decayed = decay_all or name in ("q", "embed")
        np.testing.assert_allclose(updates[name], -0.25 if decayed else 0.0, rtol=1e-6, err_msg=name)


def test_every_matrix_decays():
    marked = leaves(decays(abstract(MODEL)))
    assert {name for name, marks in marked.items() if marks} == {
        name
        for name in marked
        if name.rpartition(".")[2] in ("q", "k", "v", "o", "gate", "up", "down", "embed", "unembed")
    }


@pytest.mark.parametrize(
    "values, sentence",
    (
        ({"beta1": 1.0}, "--beta1 is 1.0: it must be below 1"),
        ({"beta2": 0.99999999999}, "--beta2 is 0.99999999999: it must be below 1"),  # which float32 rounds to 1
        ({"epsilon": 0.0}, "--epsilon is 0.0: it must be a number of at least 1.2e-38"),
        ({"epsilon": 1e-50}, "--epsilon is 1e-50"),
        ({"epsilon": math.nan}, "--epsilon is nan"),
        ({"learning_rate": 1e300}, "--learning-rate is 1e.300: it must be a number of at most 3.4e.38"),
        ({"weight_decay": 1e39}, "--weight-decay is 1e.39"),
        ({"clip_norm": 1e39}, "--clip-norm is 1e.39"),
        ({"steps": 2**31}, "--steps is 2147483648"),
        ({"schedule": "wsd", "decay_share": 0.0}, "--decay-share is 0.0"),
        ({"decay_share": 0.5}, "--decay-share is for --schedule wsd"),
    ),
)
def test_bounds(values, sentence):
    OptimizerConfig(steps=1).check()
    with pytest.raises(InputError, match=sentence):
        OptimizerConfig(**{"steps": 1, **values}).check()

"""Hidden states of a student that is narrower than its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minalm.models.config import ModelConfig
from minalm.models.contract import Model, read
from minalm.models.head import VocabularyMask
from minalm.models.mapped import Mapped, bare, random_maps, with_student
from minalm.models.transformer import initialize
from minalm.parallel.mesh import ROWS, make_mesh, shard, shard_map, specs
from minalm.types import Tokens

CONFIG = ModelConfig(
    vocab_size=32, embed=24, mlp=36, layers=3, heads=4, kv_heads=2, head_dim=6, windows=(None,) * 3, tied=False
)


@pytest.mark.parametrize("all_layers", (False, True))
@pytest.mark.parametrize("axes", (pytest.param((1, 1), marks=pytest.mark.slow), (2, 2)))
def test_states_are_those_of_the_student_times_the_maps(all_layers, axes):
    student = jax.device_get(initialize(CONFIG, jax.random.key(0)))
    depth = CONFIG.layers + 1 if all_layers else 1
    model = Mapped(student, random_maps(depth, CONFIG.embed, 40, seed=1))
    assert isinstance(model, Model) and bare(model) is student and bare(student) is student
    rng = np.random.default_rng(0)
    ids, ends = rng.integers(0, CONFIG.vocab_size, (2, 9)), rng.integers(-1, 9, (2, 4))
    tokens = Tokens(ids, np.roll(ids, -1, 1), np.ones((2, 9), np.float32), None)
    mask = VocabularyMask(np.ones(CONFIG.vocab_size, bool), np.arange(CONFIG.vocab_size) % 3 == 0)
    mesh = make_mesh(*axes)

    def states(model):
        def run(model, mask, tokens, ends):
            return read(model, mask, tokens, jnp.dtype("float32"), states_at=ends, all_layers=all_layers)

        layout = *specs((model, mask), mesh), ROWS, ROWS
        placed = shard(model, mesh), shard(mask, mesh)
        return jax.device_get(jax.jit(shard_map(run, mesh, layout, ROWS))(*placed, tokens, ends))

    own, mapped = states(student), states(model)
    expected = np.einsum("bdce,def->bdcf", own.states.astype(np.float64), model.maps.astype(np.float64))
    np.testing.assert_allclose(mapped.states, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(mapped.stats.logp, own.stats.logp, rtol=1e-6)


def test_what_a_tail_reads():
    student = initialize(CONFIG, jax.random.key(0))
    model = Mapped(student, random_maps(1, 8, 12, 0))
    in_tail = model.in_tail()
    assert in_tail.maps is True and jax.tree.all(jax.tree.map(lambda a, b: a == b, in_tail.student, student.in_tail()))
    swapped = with_student(model, None, 1)
    assert swapped.student is None and swapped.maps == 1


def test_random_maps_keep_the_size_of_states():
    maps = random_maps(2, 300, 200, seed=3)
    states = np.random.default_rng(0).standard_normal((500, 300))
    assert maps.dtype == np.float32 and abs(np.std(states @ maps[1]) - 1) < 0.02
    np.testing.assert_array_equal(maps, random_maps(2, 300, 200, seed=3))

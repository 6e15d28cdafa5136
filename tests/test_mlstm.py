"""The mLSTM cell: chunkwise = recurrent = plain numpy, gradients too, and what is not there changes nothing."""

import functools

import jax
import jax.numpy as jnp
import mlstm_numpy
import numpy as np
import pytest

from minalm.models import mlstm
from minalm.models.mlstm import State, chunkwise, step, zero_state
from minalm.parallel.mesh import P, make_mesh, shard_map

ROWS, HEADS, NARROW, WIDE = 2, 3, 4, 7


def draw(time: int, seed: int = 0, scale: float = 4.0) -> tuple[np.ndarray, ...]:
    """Queries, keys, values and gates, some of which reach the cap."""
    random = np.random.default_rng(seed)
    shapes = (NARROW, NARROW, WIDE, None, None)
    arrays = [random.normal(size=(ROWS, time, HEADS, *([] if size is None else [size]))) for size in shapes]
    arrays[3], arrays[4] = (np.clip(scale * gate, -15, 15) for gate in arrays[3:])
    return tuple(each.astype(np.float32) for each in arrays)


def on_one_device(function):
    """`function` of replicated arrays, as the step calls it."""
    return jax.jit(shard_map(function, make_mesh(1, 1), in_specs=P(), out_specs=P()))


def zeros() -> State:
    return zero_state(ROWS, HEADS, NARROW, WIDE)


def some_state() -> State:
    state, _ = on_one_device(chunkwise)(zeros(), *draw(5, seed=9))
    return state


def steps(state, q, k, v, input_gate, forget_gate):
    """The recurrence, position by position."""

    def body(state, at):
        return step(state, *at)

    state, out = jax.lax.scan(
        body, state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, k, v, input_gate, forget_gate))
    )
    return state, jnp.swapaxes(out, 0, 1)


def numpy_cell(state, *arrays):
    """The same in float64, row by row."""
    rows = []
    for row in range(ROWS):
        own = tuple(np.asarray(part[row], np.float64) for part in (state.memory, state.normalizer, state.stabilizer))
        rows.append(mlstm_numpy.cell(*(np.asarray(x[row], np.float64) for x in arrays), state=own))
    states = [np.stack(parts) for parts in zip(*(state for state, _ in rows), strict=True)]
    return states, np.stack([out for _, out in rows])


def assert_near(found, expected, tolerance=1e-5):
    """Differences relative to the largest magnitude."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    "time, chunk, begins",
    ((1, 4, some_state), (21, 8, some_state), pytest.param(21, 64, zeros, marks=pytest.mark.slow)),
)
def test_both_forms_are_the_formula(time, chunk, begins):
    arrays, state = draw(time), begins()
    states, expected = numpy_cell(state, *arrays)
    for form in (steps, functools.partial(chunkwise, chunk=chunk)):
        after, found = on_one_device(form)(state, *arrays)
        assert_near(found, expected)
        for part, ours in zip(states, (after.memory, after.normalizer, after.stabilizer), strict=True):
            assert_near(ours, part)


def pulled(form, weights, state, *arrays):
    """Gradients of a weighted sum of outputs and final memory, by all inputs."""

    def value(state, *arrays):
        after, out = form(state, *arrays)
        return jnp.sum(out * weights) + jnp.sum(after.memory)

    return jax.grad(value, argnums=tuple(range(6)))(state, *arrays)


def test_gradients_of_both_forms_are_those_of_the_formula():
    time = 13
    arrays, state = draw(time, seed=1, scale=2.0), some_state()
    weights = np.random.default_rng(3).normal(size=(ROWS, time, HEADS, WIDE)).astype(np.float32)
    ours, theirs = (
        on_one_device(functools.partial(pulled, form, weights))(state, *arrays)
        for form in (functools.partial(chunkwise, chunk=5), steps)
    )
    jax.tree.map(assert_near, ours, theirs)

    def value(arrays):
        states, out = numpy_cell(state, *arrays)
        return (out * weights).sum() + states[0].sum()

    random, arrays = np.random.default_rng(4), [x.astype(np.float64) for x in arrays]
    for number, grad in enumerate(ours[1:]):
        direction = random.normal(size=arrays[number].shape)
        up, down = (
            [x + sign * 1e-6 * direction if n == number else x for n, x in enumerate(arrays)] for sign in (1, -1)
        )
        expected = (value(up) - value(down)) / 2e-6
        found = (np.asarray(grad, np.float64) * direction).sum()
        assert abs(found - expected) <= 1e-4 * np.linalg.norm(grad) * np.linalg.norm(direction)


def test_a_sequence_read_in_parts_is_the_same():
    arrays = draw(17)
    whole, expected = on_one_device(functools.partial(chunkwise, chunk=4))(zeros(), *arrays)
    state, first = on_one_device(functools.partial(chunkwise, chunk=8))(zeros(), *(x[:, :6] for x in arrays))
    state, second = on_one_device(functools.partial(chunkwise, chunk=3))(state, *(x[:, 6:] for x in arrays))
    assert_near(np.concatenate([first, second], axis=1), expected)
    jax.tree.map(assert_near, state, whole)


def test_positions_that_are_not_there_change_nothing():
    """Rows of different lengths in one batch: the state is that of each row's own last position."""
    arrays, lengths = draw(11), (4, 9)
    present = np.arange(11) < np.array(lengths)[:, None]
    state, found = on_one_device(functools.partial(chunkwise, chunk=4))(zeros(), *arrays, present)
    for row, length in enumerate(lengths):
        alone, expected = on_one_device(chunkwise)(zeros(), *(x[:, :length] for x in arrays))
        assert_near(found[row, :length], expected[row])
        jax.tree.map(lambda ours, theirs: assert_near(ours[row], theirs[row]), state, alone)


@pytest.mark.parametrize("gate", (-15.0, 15.0))
def test_gates_at_their_cap_give_numbers(gate):
    q, k, v, _, _ = draw(40)
    gates = np.full((ROWS, 40, HEADS), gate, np.float32), np.full((ROWS, 40, HEADS), -gate, np.float32)
    weights = np.ones((ROWS, 40, HEADS, WIDE), np.float32)
    for leaf in jax.tree.leaves(on_one_device(functools.partial(pulled, chunkwise, weights))(zeros(), q, k, v, *gates)):
        assert np.isfinite(leaf).all()


def test_each_head_has_mean_0_and_variance_1():
    x = 3.0 + 5.0 * np.random.default_rng(0).normal(size=(2, 3, 4, 32)).astype(np.float32)
    found = np.asarray(mlstm.head_norm(jnp.asarray(x)))
    np.testing.assert_allclose(found.mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(found.var(-1), 1.0, rtol=1e-4)

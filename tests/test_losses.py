"""The losses and the head against plain loops in float64, and where numbers are hard: p near 0 and 1, nothing counted."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import whole_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from minalm.distill import chunks, divergences, losses
from minalm.distill.gradmag import magnitude_weights
from minalm.distill.losses import LossConfig
from minalm.models import head
from minalm.models.head import VocabularyMask, token_stats
from minalm.parallel import collectives
from minalm.parallel.mesh import ROWS, P, make_mesh, shard, shard_map, specs
from minalm.types import AlignedChunks, Batch, ModelOutput, Tokens, TokenStats

BATCH, STUDENT_TIME, TEACHER_TIME, CHUNKS = 3, 14, 11, 9
DIVERGENCES = (
    "binary_ce",
    "binary_kl",
    "reverse_binary_kl",
    "binary_kl_temp_limit",
    "abs",
    "abs_exp",
    "renyi",
    "k2",
    "k3",
)
NORMS = ("l2_channelwise", "l2", "l1", "l1_channelwise")


def on_one_device(function, out_specs=P()):
    return jax.jit(shard_map(function, mesh=make_mesh(1, 1), in_specs=ROWS, out_specs=out_specs))


# --- plain definitions --------------------------------------------------------------------------------------------


def diverge(teacher, student, config):
    return divergences.divergence(teacher, student, config.divergence, config.tau, config.alpha)


def plain_divergence(l_t, l_s, config):
    """The divergence of two chunk log-probabilities, and its derivative with respect to the student's."""
    tau, alpha = config.tau, config.alpha
    ratio = (l_t - l_s) / tau
    if config.divergence == "abs":
        return abs(l_t - l_s), -np.sign(l_t - l_s)
    if config.divergence == "k2":
        return ratio**2 / 2, -ratio / tau
    if config.divergence == "k3":
        return np.expm1(ratio) - ratio, -np.expm1(ratio) / tau
    if config.divergence in ("binary_kl_temp_limit", "renyi"):
        tau = 1.0
    x_t, x_s = (min(l / tau, 0.0) - 1e-6 for l in (l_t, l_s))
    if config.divergence == "binary_kl_temp_limit":
        return (x_t - x_s) + x_t * math.log(x_s / x_t), -1.0 + x_t / x_s
    (p_t, q_t), (p_s, q_s) = ((math.exp(x), -math.expm1(x)) for x in (x_t, x_s))
    if config.divergence == "binary_ce":
        return -(p_t * x_s + q_t * math.log(q_s)), -(p_t - q_t * p_s / q_s) / tau
    if config.divergence == "binary_kl":
        value = p_t * (x_t - x_s) + q_t * (math.log(q_t) - math.log(q_s))
        return value, -(p_t - q_t * p_s / q_s) / tau
    if config.divergence == "reverse_binary_kl":
        logs = (x_s - x_t) - (math.log(q_s) - math.log(q_t))
        return p_s * (x_s - x_t) + q_s * (math.log(q_s) - math.log(q_t)), p_s * logs / tau
    if config.divergence == "abs_exp":
        return abs(p_t - p_s), np.sign(p_s - p_t) * p_s / tau
    terms = [alpha * t + (1 - alpha) * s for t, s in ((x_t, x_s), (math.log(q_t), math.log(q_s)))]
    value = np.logaddexp(*terms) / (alpha - 1)
    of_p, of_q = (math.exp(term - np.logaddexp(*terms)) for term in terms)
    return value, -(of_p - of_q * p_s / q_s)


def plain_groups(row, student, teacher, chunks, config):
    """(l_T, l_S) of each group of one row, walking from chunk to chunk."""
    group, found = [], []

    def finish():
        if group:
            l_s, l_t = sum(l[0] for l in group), sum(l[1] for l in group)
            last = group[-1][2]
            if config.debias:
                l_s += float(student.boundary[row, chunks.student_chunk_end[row, last]])
                l_t += float(teacher.boundary[row, chunks.teacher_chunk_end[row, last]])
            found.append((l_t, l_s))
            group.clear()

    for chunk in range(CHUNKS):
        if chunks.teacher_chunk_end[row, chunk] < 0:
            continue
        ours = [float(student.logp[row, t]) for t in range(STUDENT_TIME) if chunks.student_chunk[row, t] == chunk]
        theirs = [float(teacher.logp[row, t]) for t in range(TEACHER_TIME) if chunks.teacher_chunk[row, t] == chunk]
        if theirs:
            group.append((sum(ours), sum(theirs), chunk))
        mass = math.exp(float(teacher.boundary[row, chunks.teacher_chunk_end[row, chunk]]))
        may_end = {
            "unconstrained": True,
            "space": bool(chunks.before_space[row, chunk]),
            "unbiased": bool(chunks.unbiased[row, chunk]),
            "merged": mass > config.gamma,
        }
        if may_end[config.chunks]:
            finish()
    finish()
    return found


def plain_alm(student, teacher, chunks, config):
    found = [pair for row in range(BATCH) for pair in plain_groups(row, student, teacher, chunks, config)]
    return sum(plain_divergence(*pair, config)[0] for pair in found) / len(found) if found else 0.0


def plain_latents(student, teacher, counted, norm):
    power = (lambda x: x**2) if norm.startswith("l2") else abs
    depth, _, _, embed = student.shape
    places = [(row, chunk) for row in range(BATCH) for chunk in range(CHUNKS) if counted[row, chunk]]
    if not places:
        return 0.0
    total = 0.0
    for layer in range(depth):
        states = [[x[layer, row, chunk].astype(np.float64) for row, chunk in places] for x in (student, teacher)]
        size = [sum(power(t[i]) for t in states[1]) / len(places) for i in range(embed)]
        if not norm.endswith("channelwise"):
            size = [sum(size) / embed] * embed
        for s, t in zip(*states):
            total += sum(power(s[i] - t[i]) / (size[i] + 1e-8) for i in range(embed))
    return total / (depth * len(places) * embed)


# --- made-up batches ----------------------------------------------------------------------------------------------


@st.composite
def structures(draw) -> AlignedChunks:
    """Chunks of several tokens, tokens between chunks, a first chunk of bos alone or of more, rows without a chunk."""
    chunks = AlignedChunks(
        student_chunk=np.full((BATCH, STUDENT_TIME), -1, np.int32),
        teacher_chunk=np.full((BATCH, TEACHER_TIME), -1, np.int32),
        student_chunk_end=np.full((BATCH, CHUNKS), -1, np.int32),
        teacher_chunk_end=np.full((BATCH, CHUNKS), -1, np.int32),
        before_space=np.zeros((BATCH, CHUNKS), bool),
        text_bytes=np.zeros((BATCH, CHUNKS), np.int32),
        unbiased=np.zeros((BATCH, CHUNKS), bool),
    )
    for row in range(BATCH):
        ours = theirs = 0  # the next token of each side
        for chunk in range(draw(st.integers(0, CHUNKS))):
            first = ours == 0 or theirs == 0
            ours += draw(st.integers(0, 1)) * (not first)
            theirs += draw(st.integers(0, 1)) * (not first)
            our_end, their_end = ours + draw(st.integers(1, 3)), theirs + draw(st.integers(1, 2))
            if our_end > STUDENT_TIME or their_end > TEACHER_TIME:
                break
            if not first:  # the chunk of a row's first token has a chunk_end, but no targets
                chunks.student_chunk[row, ours - 1 : our_end - 1] = chunk
                chunks.teacher_chunk[row, theirs - 1 : their_end - 1] = chunk
            ours, theirs = our_end, their_end
            chunks.student_chunk_end[row, chunk], chunks.teacher_chunk_end[row, chunk] = ours - 1, theirs - 1
            chunks.before_space[row, chunk], chunks.unbiased[row, chunk] = draw(st.booleans()), draw(st.booleans())
            chunks.text_bytes[row, chunk] = draw(st.integers(0, 3))
    return chunks


def numbers(seed: int) -> tuple[TokenStats, TokenStats]:
    """Student's and teacher's log-probabilities; boundary masses on both sides of every gamma."""
    random = np.random.default_rng(seed)

    def side(time):
        values = [-random.exponential(scale, (BATCH, time)).astype(np.float32) for scale in (2.0, 3.0)]
        return TokenStats(*map(jnp.asarray, values))

    return side(STUDENT_TIME), side(TEACHER_TIME)


CONFIGS = (
    LossConfig(),
    LossConfig(tau=5.0),
    LossConfig(gamma=0.5),
    LossConfig(gamma=1e-4, debias=False),
    LossConfig(gamma=0.0),
    LossConfig(gamma=1.0),
    LossConfig(chunks="space"),
    LossConfig(chunks="space", tau=1.0, debias=False),
    LossConfig(chunks="unbiased"),
    LossConfig(chunks="unbiased", tau=5.0, debias=False),
    LossConfig(chunks="unconstrained"),
    LossConfig(chunks="unconstrained", debias=False, divergence="abs"),
    *(LossConfig(divergence=name, tau=3.0) for name in DIVERGENCES),
)


@on_one_device
def every_alm(student, teacher, chunks):
    return jnp.stack([whole_batch.alm(student, teacher, chunks, config) for config in CONFIGS])


@settings(max_examples=60, deadline=None)
@given(structures(), st.integers(0, 2**31))
def test_alm_is_the_mean_over_groups(chunks, seed):
    student, teacher = numbers(seed)
    found = every_alm(student, teacher, chunks)
    for config, value in zip(CONFIGS, found, strict=True):
        expected = plain_alm(student, teacher, chunks, config)
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6, err_msg=str(config))


sums_of_chunks = on_one_device(chunks.chunk_sums, ROWS)


@settings(max_examples=50, deadline=None)
@given(structures(), st.integers(0, 2**31))
def test_chunk_sums(chunks, seed):
    stats = numbers(seed)[0]
    logp, count, boundary = sums_of_chunks(stats, chunks.student_chunk, chunks.student_chunk_end)
    for row, chunk in np.ndindex(BATCH, CHUNKS):
        inside = [t for t in range(STUDENT_TIME) if chunks.student_chunk[row, t] == chunk]
        assert count[row, chunk] == len(inside)
        np.testing.assert_allclose(logp[row, chunk], sum(float(stats.logp[row, t]) for t in inside), rtol=1e-6)
        if chunks.student_chunk_end[row, chunk] >= 0:
            assert boundary[row, chunk] == stats.boundary[row, chunks.student_chunk_end[row, chunk]]


merged = on_one_device(chunks.merge, ROWS)
flags = st.lists(st.booleans(), min_size=CHUNKS, max_size=CHUNKS)


@settings(max_examples=100, deadline=None)
@given(st.lists(flags, min_size=BATCH, max_size=BATCH), st.lists(flags, min_size=BATCH, max_size=BATCH))
def test_merge(filled, may_end):
    groups = merged(np.array(filled), np.array(may_end))
    for row in range(BATCH):
        index, end = 0, [-1] * CHUNKS
        for chunk in range(CHUNKS):
            assert groups.index[row, chunk] == index
            if filled[row][chunk]:
                end[index] = chunk
            index += may_end[row][chunk]
        assert groups.end[row].tolist() == end


bits_per_byte = on_one_device(losses.bits_per_byte)


@settings(max_examples=50, deadline=None)
@given(structures(), st.integers(0, 2**31))
def test_bits_per_byte(chunks, seed):
    """Text whose first token has no log-probability counts neither in the bits nor in the bytes."""
    stats = numbers(seed)[0]
    nats, size = 0.0, 0
    for row, chunk in np.ndindex(BATCH, CHUNKS):
        inside = [t for t in range(STUDENT_TIME) if chunks.student_chunk[row, t] == chunk]
        if inside and chunks.text_bytes[row, chunk]:
            nats -= sum(float(stats.logp[row, t]) for t in inside)
            size += chunks.text_bytes[row, chunk]
    found = bits_per_byte(stats.logp, chunks.student_chunk, chunks.text_bytes)
    np.testing.assert_allclose(found, nats / max(size, 1) / math.log(2), rtol=1e-5)


next_token = on_one_device(jax.value_and_grad(whole_batch.next_token), (P(), ROWS))


@pytest.mark.parametrize("share", (1.0, 0.5, 0.1))
def test_next_token(share):
    stats = numbers(0)[0]
    weight = (np.random.default_rng(1).random((BATCH, STUDENT_TIME)) < share).astype(np.float32)
    value, gradient = next_token(stats, weight)
    counted = [(row, t) for row, t in np.ndindex(weight.shape) if weight[row, t]]
    np.testing.assert_allclose(value, -sum(float(stats.logp[place]) for place in counted) / len(counted), rtol=1e-6)
    np.testing.assert_allclose(gradient.logp, -weight / len(counted), rtol=1e-6)
    assert not gradient.boundary.any()


def random_states(seed, depth=2, embed=5):
    random = np.random.default_rng(seed)
    shape = BATCH, depth, CHUNKS, embed  # rows first for shard_map
    scale = np.exp(random.normal(size=embed))
    return [jnp.asarray((scale * random.normal(size=shape)).astype(np.float32)) for _ in range(2)]


@on_one_device
def every_latents(states, counted):
    return jnp.stack([whole_batch.latents(*states, counted, norm) for norm in NORMS])


@pytest.mark.parametrize("share", (1.0, 0.5, 0.1))
def test_latents(share):
    states = random_states(0)
    counted = np.random.default_rng(2).random((BATCH, CHUNKS)) < share

    found = every_latents(states, counted)
    for norm, ours in zip(NORMS, found):
        expected = plain_latents(*(np.asarray(s).swapaxes(0, 1) for s in states), counted, norm)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, err_msg=norm)


# --- divergences --------------------------------------------------------------------------------------------------

# A sum of log-probabilities: above 0 by rounding, p near 1, in the middle on both sides of log 2, p near 0, p = 0.
LOGS = (1e-3, 1e-6, 0.0, -1e-9, -1e-6, -1e-4, -1e-2, -0.3, -0.69, -0.6932, -1.0, -7.0, -30.0, -87.0, -104.0, -300.0)


@pytest.mark.parametrize("tau", (1.0, 5.0, 100.0))
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_and_gradient(name, tau):
    config = LossConfig(divergence=name, tau=tau, alpha=2.0)
    teacher, student = (x.ravel() for x in np.meshgrid(np.float32(LOGS), np.float32(LOGS)))

    @jax.jit
    @jax.vmap
    def value_and_gradient(l_t, l_s):
        return jax.value_and_grad(lambda l_s: diverge(l_t[None, None], l_s[None, None], config)[0, 0])(l_s)

    values, gradient = value_and_gradient(teacher, student)
    pairs = list(zip(teacher.astype(float), student.astype(float)))
    inside = np.array([name != "k3" or (t - s) / tau < 80.0 for t, s in pairs])  # e^r leaves float32 by its definition
    plain = [plain_divergence(*pair, config) if use else (0.0, 0.0) for pair, use in zip(pairs, inside)]
    expected, slope = np.array(plain, np.float64).T
    assert np.isfinite(values[inside]).all() and np.isfinite(gradient[inside]).all()
    np.testing.assert_allclose(values[inside], expected[inside], rtol=2e-5, atol=2e-6)
    smooth = inside & ~((name in ("abs", "abs_exp")) & (expected < 1e-6))  # where the difference is lost in rounding
    np.testing.assert_allclose(gradient[smooth], slope[smooth], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("alpha", (0.5, 3.0))
def test_renyi_of_other_orders(alpha):
    config = LossConfig(divergence="renyi", alpha=alpha)
    pairs = [(-0.1, -2.0), (-3.0, -0.5), (-1.0, -1.0)]
    found = diverge(*(jnp.asarray([x], jnp.float32) for x in zip(*pairs)), config)[0]
    np.testing.assert_allclose(found, [plain_divergence(*pair, config)[0] for pair in pairs], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ("binary_kl", "reverse_binary_kl", "binary_kl_temp_limit", "abs", "abs_exp", "renyi", "k2", "k3")
)
def test_equal_probabilities_have_no_divergence(name):
    l = jnp.asarray([[-3.0, -0.01, -40.0]], jnp.float32)
    np.testing.assert_allclose(diverge(l, l, LossConfig(divergence=name)), 0.0, atol=1e-6)


def test_log_one_minus_exp():
    x = np.concatenate([-np.geomspace(1e-7, 100, 400), [-math.log(2.0)], -math.log(2.0) + np.array([-1e-6, 1e-6])])
    x = x.astype(np.float32)
    exact = x.astype(np.float64)
    values, gradient = jax.vmap(jax.value_and_grad(divergences.log_one_minus_exp))(jnp.asarray(x))
    expected = np.where(exact > -1, np.log(-np.expm1(exact)), np.log1p(-np.exp(exact)))
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(gradient, np.exp(exact) / np.expm1(exact), rtol=1e-6, atol=1e-37)
    assert jax.grad(divergences.log_one_minus_exp)(-200.0) == 0.0


def test_tempered_passes_the_gradient_through_the_minimum():
    for l, x in ((-3.0, -1.5), (0.0, 0.0), (0.7, 0.0)):
        value, gradient = jax.value_and_grad(divergences.tempered)(l, 2.0)
        np.testing.assert_allclose(value, x - 1e-6, rtol=1e-6)
        assert gradient == 0.5


# --- nothing counted ----------------------------------------------------------------------------------------------


def test_nothing_counted_is_zero_with_zero_gradient():
    student, teacher = numbers(0)
    nothing = AlignedChunks(
        student_chunk=np.full((BATCH, STUDENT_TIME), -1, np.int32),
        teacher_chunk=np.full((BATCH, TEACHER_TIME), -1, np.int32),
        student_chunk_end=np.full((BATCH, CHUNKS), -1, np.int32),
        teacher_chunk_end=np.full((BATCH, CHUNKS), -1, np.int32),
        before_space=np.zeros((BATCH, CHUNKS), bool),
        text_bytes=np.zeros((BATCH, CHUNKS), np.int32),
    )
    ids = np.zeros((BATCH, STUDENT_TIME), np.int32)
    tokens = Tokens(ids, ids, np.zeros(ids.shape, np.float32), None)
    batch = Batch(tokens, tokens, nothing, np.ones(BATCH, bool))
    config = LossConfig(latents=1.0)
    states = random_states(1)

    def gradient_and_value(student, states, teacher, batch):
        def terms(student, states):
            ours, theirs = ModelOutput(student, states[0]), ModelOutput(teacher, states[1])
            return losses.loss_terms(config, batch, ours, theirs, losses.normalizers(config, batch, theirs))

        value = terms(student, states)
        return value, jax.grad(lambda *x: jnp.sum(terms(*x)), (0, 1))(student, states)

    value, gradient = on_one_device(gradient_and_value, (P(), ROWS))(student, states, teacher, batch)
    assert value.tolist() == [0.0, 0.0, 0.0]
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))
    assert bits_per_byte(student.logp, nothing.student_chunk, nothing.text_bytes) == 0.0


def _every_alm_gradient(student, teacher, chunks):
    """By the student's statistics, [batch, config, time]."""
    each = [jax.grad(lambda s: whole_batch.alm(s, teacher, chunks, config))(student) for config in FINITE_CONFIGS]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *each)


FINITE_CONFIGS = [config for config in CONFIGS if config.divergence != "k3"]  # e^r leaves float32 by its definition
every_alm_gradient = on_one_device(_every_alm_gradient, ROWS)


@settings(max_examples=30, deadline=None)
@given(structures(), st.integers(0, 2**31))
def test_gradients_are_finite_and_stay_inside_chunks(chunks, seed):
    student, teacher = numbers(seed)
    student = dataclasses.replace(student, logp=student.logp.at[0].set(0.0).at[1].mul(1e4))  # p = 1 and p = 0
    gradient = every_alm_gradient(student, teacher, chunks)
    outside = np.asarray(chunks.student_chunk) < 0
    assert np.isfinite(gradient.logp).all() and np.isfinite(gradient.boundary).all()
    assert (np.asarray(gradient.logp).swapaxes(0, 1)[:, outside] == 0).all()


# --- GradMag's weights --------------------------------------------------------------------------------------------


def test_magnitude_weights():
    norms = jnp.array([0.5, 2.0, 0.0], jnp.float32)
    weights = magnitude_weights(norms, (1.0, 3.0, 1.0), False)
    np.testing.assert_allclose(weights, [2.0, 1.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(magnitude_weights(norms, (1.0, 3.0, 1.0), True), [2 / 3.5, 1.5 / 3.5, 0.0], rtol=1e-6)
    nothing = magnitude_weights(jnp.zeros(2), (1.0, 1.0), True)
    assert nothing.tolist() == [0.0, 0.0]


# --- the head -----------------------------------------------------------------------------------------------------

VOCAB, ROWS_OF_TABLE, EMBED, TIME = 14, 20, 8, 5  # at tp 4 the last device holds rows of padding only


def plain_stats(hidden, targets, table, boundary, cap):
    batch, time, _ = hidden.shape
    logp, mass = np.zeros((batch, time)), np.zeros((batch, time))
    for row, t in np.ndindex(batch, time):
        logits = [float(np.dot(hidden[row, t].astype(float), table[v].astype(float))) for v in range(VOCAB)]
        logits = [l if cap is None else cap * math.tanh(l / cap) for l in logits]
        top = max(logits)
        total = top + math.log(sum(math.exp(l - top) for l in logits))
        inside = [l for l, b in zip(logits, boundary) if b]
        logp[row, t] = logits[targets[row, t]] - total
        mass[row, t] = max(inside) + math.log(sum(math.exp(l - max(inside)) for l in inside)) - total
    return logp, mass


def head_arguments(scale=1.0):
    random = np.random.default_rng(0)
    hidden = random.normal(size=(4, TIME, EMBED)).astype(np.float32)
    table = (scale * random.normal(size=(ROWS_OF_TABLE, EMBED))).astype(np.float32)
    targets = random.integers(0, VOCAB, (4, TIME)).astype(np.int32)
    boundary = np.arange(ROWS_OF_TABLE) % 5 == 1
    boundary[VOCAB:] = False
    return hidden, targets, table, VocabularyMask(np.arange(ROWS_OF_TABLE) < VOCAB, boundary)


def head_stats(hidden, targets, table, entries, cap=None, fsdp=1, tp=1):
    """logp, boundary, and the gradients of sum(sin(logp) + cos(boundary)) with respect to states and table."""

    def run(hidden, targets, table, entries):
        def value(hidden, table):
            stats = token_stats(hidden, targets, table, entries, cap)
            return jnp.sum(jnp.sin(stats.logp) + jnp.cos(stats.boundary)), stats

        gradient, stats = jax.grad(value, (0, 1), has_aux=True)(hidden, table)
        return stats, gradient

    mesh = make_mesh(fsdp, tp)
    layout, rows = P("tp", "fsdp"), ROWS
    mapped = shard_map(
        run, mesh=mesh, in_specs=(rows, rows, layout, specs(entries, mesh)), out_specs=(rows, (rows, layout))
    )
    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(mapped)(hidden, targets, table, shard(entries, mesh)))


@pytest.mark.parametrize("cap", (None, 1.5))
def test_token_stats(cap):
    hidden, targets, table, entries = head_arguments()
    stats, _ = head_stats(hidden, targets, table, entries, cap)
    logp, mass = plain_stats(hidden, targets, table, entries.boundary[:VOCAB], cap)
    np.testing.assert_allclose(stats.logp, logp, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(stats.boundary, mass, rtol=1e-6, atol=2e-6)


def test_padding_rows_are_not_in_the_vocabulary():
    hidden, targets, table, entries = head_arguments()
    stats, (_, gradient) = head_stats(hidden, targets, table, entries)
    table[VOCAB:] = 1e3
    padded, (_, padded_gradient) = head_stats(hidden, targets, table, entries)
    for before, after in zip(jax.tree.leaves((stats, gradient)), jax.tree.leaves((padded, padded_gradient))):
        np.testing.assert_array_equal(before, after)
    assert (gradient[VOCAB:] == 0).all() and (gradient[:VOCAB] != 0).all()


@pytest.fixture(scope="module")
def whole():
    """What a mesh of one device and a single block of positions give."""
    return jax.tree.leaves(head_stats(*head_arguments(), 1.5))


def assert_equal_leaves(found, expected):
    for after, before in zip(jax.tree.leaves(found), expected, strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("positions, rows", ((1, 20), (7, 20), (20, 7), (4, 8), (3, 1)))  # of 20 and 20
def test_blocks_do_not_change_the_numbers(monkeypatch, whole, positions, rows):
    monkeypatch.setattr(head, "BLOCK_ENTRIES", rows)
    monkeypatch.setattr(head, "BLOCK_ELEMENTS", positions * rows)
    assert_equal_leaves(head_stats(*head_arguments(), 1.5), whole)


def test_blocks_on_a_mesh(monkeypatch, whole):
    monkeypatch.setattr(head, "BLOCK_ENTRIES", 4)
    monkeypatch.setattr(head, "BLOCK_ELEMENTS", 12)
    assert_equal_leaves(head_stats(*head_arguments(), 1.5, 2, 2), whole)


@pytest.mark.parametrize("fsdp, tp", ((4, 2), (2, 4), (1, 4)))
def test_head_on_a_mesh(whole, fsdp, tp):
    assert_equal_leaves(head_stats(*head_arguments(), 1.5, fsdp, tp), whole)


def test_a_tiny_boundary_mass_keeps_digits_and_gradient():
    """Boundary entries 200 and 210 nats below the rest: e^-200 is 0 in float32."""
    logits = np.array([0.0, 1.0, -200.0, -210.0, 0.5], np.float32)
    entries = VocabularyMask(np.ones(5, bool), np.array([False, False, True, True, False]))

    def run(logits, table):
        def mass(logits):
            entries_here = jax.tree.map(jnp.array, entries)
            stats = token_stats(logits[None, None], jnp.zeros((1, 1), jnp.int32), table, entries_here, None)
            return stats.boundary[0, 0]

        value, gradient = jax.value_and_grad(mass)(logits)
        return collectives.fsdp_sum(value), collectives.fsdp_sum(gradient)

    mapped = shard_map(run, mesh=make_mesh(1, 1), in_specs=(ROWS, P("tp", "fsdp")), out_specs=P())
    with jax.default_matmul_precision("highest"):
        value, gradient = jax.jit(mapped)(logits, np.eye(5, dtype=np.float32))
    exact = logits.astype(np.float64)
    total = np.log(np.exp(exact).sum())
    np.testing.assert_allclose(value, np.logaddexp(-200.0, -210.0) - total, rtol=1e-6)
    inside = np.array([0.0, 0.0, 1.0, np.exp(-10.0), 0.0]) / (1.0 + np.exp(-10.0))
    np.testing.assert_allclose(gradient, inside - np.exp(exact - total), rtol=1e-5, atol=1e-12)

"""The training step: the same on every mesh, balanced as defined, one scan each way, no [time, vocabulary] array."""

import collections
import dataclasses
import functools
import math
from pathlib import Path

import configs
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr
from programs import equations

import train
from minalm.distill import gradmag, losses
from minalm.distill.losses import LossConfig
from minalm.distill.means import mean, total
from minalm.errors import InputError
from minalm.models import head, transformer
from minalm.models.config import ModelConfig, Rope
from minalm.models.transformer import initialize
from minalm.parallel import collectives
from minalm.parallel.mesh import ROWS, P, make_mesh, shard, shard_map, shard_rows, specs
from minalm.run.optimizer import OptimizerConfig, learning_rate
from minalm.types import AlignedChunks, Batch, Tokens

# Pairwise different sizes; every axis divides by 4, rows by 8. Gemma 2's switches are on.
TEACHER = ModelConfig(
    vocab_size=52,
    embed=40,
    mlp=36,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=6,
    windows=(3, None, 5, None),
    rope=Rope(100.0),
    query_scale=14**-0.5,
    attention_softcap=5.0,
    final_softcap=3.0,
    norm_plus_one=True,
    post_norms=True,
    activation="gelu_tanh",
    embedding_scale=40**0.5,
    tied=True,
)
STUDENT = dataclasses.replace(TEACHER, vocab_size=60, tied=False, expansion_size=52)
ROWS_OF_BATCH, STUDENT_TIME, TEACHER_TIME, CHUNKS = 16, 22, 14, 11


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


MESHES = (slow(8, 1), (4, 2), slow(1, 2), slow(2, 4))
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # half the time of compiling


def settings(**changes) -> train.Config:
    loss = LossConfig(sft=0.25, alm=1.0, latents=3.0, latents_layers="all", tau=5.0)
    config = configs.config(
        out=Path("unused"), steps=10, warmup_steps=0, losses=loss, compute_dtype="float32", learning_rate=1e-2
    )
    return configs.change(config, **changes)


def parameters(config: ModelConfig, seed: int):
    """Random, and large enough for soft-caps and post-norms to bite."""
    model = initialize(config, jax.random.key(seed))
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
    leaves = [
        6.0 * leaf if leaf.ndim > 1 and leaf.std() > 0 else leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys)
    ]
    return jax.tree.unflatten(structure, leaves)


def random_batch() -> Batch:
    """Chunks of several tokens and tokens in no chunk; row 0 is empty, as of a text that was left out."""
    random = np.random.default_rng(0)
    rows = ROWS_OF_BATCH

    def tokens(time, vocabulary, suffix):
        ids = random.integers(0, vocabulary - 3, (rows, time + 1)).astype(np.int32)
        weight = (random.random((rows, time)) < 0.8).astype(np.float32)
        weight[0], weight[:, -1] = 0.0, 0.0
        expansion = random.integers(0, 52, (rows, time)).astype(np.int32) if suffix else None
        return Tokens(ids[:, :-1], ids[:, 1:], weight, expansion)

    chunks = AlignedChunks(
        student_chunk=np.full((rows, STUDENT_TIME), -1, np.int32),
        teacher_chunk=np.full((rows, TEACHER_TIME), -1, np.int32),
        student_chunk_end=np.full((rows, CHUNKS), -1, np.int32),
        teacher_chunk_end=np.full((rows, CHUNKS), -1, np.int32),
        before_space=random.random((rows, CHUNKS)) < 0.5,
        text_bytes=np.zeros((rows, CHUNKS), np.int32),
    )
    for row in range(1, rows):
        ours = theirs = 1
        chunks.student_chunk_end[row, 0] = chunks.teacher_chunk_end[row, 0] = 0  # bos
        for chunk in range(1, CHUNKS):
            ours, theirs = ours + (random.random() < 0.2), theirs + (random.random() < 0.1)
            our_end, their_end = ours + random.integers(1, 4), theirs + random.integers(1, 3)
            if our_end > STUDENT_TIME or their_end > TEACHER_TIME:
                break
            chunks.student_chunk[row, ours - 1 : our_end - 1] = chunk
            chunks.teacher_chunk[row, theirs - 1 : their_end - 1] = chunk
            chunks.student_chunk_end[row, chunk], chunks.teacher_chunk_end[row, chunk] = our_end - 1, their_end - 1
            chunks.text_bytes[row, chunk] = random.integers(0, 4)
            ours, theirs = our_end, their_end
    return Batch(tokens(STUDENT_TIME, 60, True), tokens(TEACHER_TIME, 52, False), chunks, np.arange(rows) == 0)


BATCH = random_batch()


def mask(config: ModelConfig) -> head.VocabularyMask:
    """The last three rows of the table are padding."""
    rows = np.arange(config.vocab_size)
    return head.VocabularyMask(rows < config.vocab_size - 3, (rows % 3 == 0) & (rows < config.vocab_size - 3))


def models(student: ModelConfig = STUDENT, teacher: ModelConfig = TEACHER):
    """(what is trained, Fixed); the expansion table is frozen."""
    model = parameters(student, 0)
    trained = jax.tree.map(lambda _: True, model)
    if model.expansion is not None:
        trained = eqx.tree_at(lambda m: m.expansion, trained, False)
    trained, frozen = eqx.partition(model, trained)
    return trained, train.Frozen(frozen, parameters(teacher, 1), mask(student), mask(teacher))


def gradients(config: train.Config, fsdp: int, tp: int, trained, fixed):
    """`train.gradients` on a mesh: the gradient's leaves by name, and the metrics, as numpy arrays."""
    mesh = make_mesh(fsdp, tp)
    layout = specs(trained, mesh)
    mapped = shard_map(
        functools.partial(train.gradients, config.losses, config.compute),
        mesh=mesh,
        in_specs=(layout, specs(fixed, mesh), jax.tree.map(lambda _: ROWS, BATCH)),
        out_specs=(layout, P()),
    )
    with jax.default_matmul_precision("highest"):
        grad, metrics = jax.jit(mapped, compiler_options=QUICK)(
            shard(trained, mesh), shard(fixed, mesh), shard_rows(BATCH, mesh)
        )
    return jax.device_get((transformer.leaves(grad), metrics))


def assert_near(found, expected, tolerance):
    """Differences relative to the largest magnitude of a leaf. Returns the largest."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, value in expected.items():
        assert np.isfinite(value).all() and np.abs(value).max() > 0, name
        difference = np.abs(found[name] - value).max() / np.abs(value).max()
        assert difference <= tolerance, (name, difference)
        worst = max(worst, float(difference))
    print(f"largest relative difference {worst:.1e}")  # shown by pytest -s


@pytest.fixture(scope="module")
def reference():
    return gradients(settings(), 1, 1, *models())


@pytest.mark.parametrize("fsdp, tp", MESHES)
def test_every_mesh_gives_the_same_losses_weights_and_gradients(reference, fsdp, tp):
    grad, metrics = gradients(settings(), fsdp, tp, *models())
    names = [f"{kind}/{loss}" for kind in ("loss", "weight") for loss in ("sft", "alm", "latents")]
    assert sorted(metrics) == sorted([*names, "bits_per_byte", "bytes", "left_out"])
    assert_near(metrics, reference[1], 1e-5)
    assert_near(grad, reference[0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp, tp", ((2, 4), (2, 2)))
def test_key_and_value_heads_that_several_devices_share(fsdp, tp):
    """tp larger than kv_heads, also under OLMo 2's norm over all heads and with Qwen 2's biases."""
    changes = dict(kv_heads=2, qk_norm="all", qkv_bias=True)
    grouped = models(dataclasses.replace(STUDENT, **changes), dataclasses.replace(TEACHER, kv_heads=1))
    grad, metrics = gradients(settings(), 1, 1, *grouped)
    found = gradients(settings(), fsdp, tp, *grouped)
    assert_near(found[1], metrics, 1e-5)
    assert_near(found[0], grad, 1e-5)


ANOTHER = settings(
    losses=LossConfig(
        alm=2.0,
        latents=0.5,
        chunks="space",
        debias=False,
        divergence="reverse_binary_kl",
        latents_norm="l1",
        balance="fixed",
    )
)


def another_models():
    """A tied student without expansion, as from subword to subword."""
    trained, fixed = models(dataclasses.replace(STUDENT, tied=True, expansion_size=None))
    assert trained.unembed is None and trained.expansion is None
    return trained, fixed


@pytest.fixture(scope="module")
def another():
    return gradients(ANOTHER, 1, 1, *another_models())


@pytest.mark.slow
def test_another_recipe_on_a_mesh(another):
    grad, metrics = gradients(ANOTHER, 2, 4, *another_models())
    assert_near(metrics, another[1], 1e-5)
    assert_near(grad, another[0], 1e-5)


def test_rematerialisation_does_not_change_gradients(reference):
    grad, metrics = gradients(settings(remat="none"), 1, 1, *models())
    assert_near(metrics, reference[1], 1e-6)
    assert_near(grad, reference[0], 1e-6)


@pytest.mark.parametrize("fsdp, tp, parts", (slow(1, 1, 4), slow(2, 4, 8), (4, 2, 2)))
def test_a_batch_in_parts_gives_the_same_losses_weights_and_gradients(reference, fsdp, tp, parts):
    """Balanced by the norms of the whole batch's gradients: row 0 is empty, so no two parts have the same counts."""
    grad, metrics = gradients(settings(accumulation=parts), fsdp, tp, *models())
    assert_near(metrics, reference[1], 1e-5)
    assert_near(grad, reference[0], 1e-5)


@pytest.mark.slow
def test_another_recipe_in_parts(another):
    grad, metrics = gradients(configs.change(ANOTHER, accumulation=4), 1, 1, *another_models())
    assert_near(metrics, another[1], 1e-5)
    assert_near(grad, another[0], 1e-5)


# --- balancing ----------------------------------------------------------------------------------------------------


def two_passes(forward, model, batch, config):
    """GradMag as it is defined: weights from the gradients of the last block; then the gradient of the weighted sum."""

    def values(model):
        return forward.tail(model, batch, forward.last_layer(model, forward.trunk(model, batch)))

    def of_last(last, number):
        return values(eqx.tree_at(lambda m: m.last, model, last))[0][number]

    if config.balance == "fixed":
        weights = jnp.array(config.weights, jnp.float32)
    else:
        each = [jax.grad(of_last)(model.last, number) for number in range(len(config.names))]
        inverse = jnp.stack(
            [
                preference / (jnp.sqrt(collectives.squared_norm(grad)) + 1e-8)
                for preference, grad in zip(config.weights, each)
            ]
        )
        weights = inverse / jnp.sum(inverse) if config.preserve_magnitude else inverse

    def total(model):
        found, auxiliary = values(model)
        return jnp.sum(jax.lax.stop_gradient(weights) * found), (found, auxiliary)

    grad, (found, auxiliary) = jax.grad(total, has_aux=True)(model)
    return grad, found, weights, auxiliary


def test_gradmag_is_its_definition(monkeypatch, reference):
    monkeypatch.setattr(gradmag, "balanced_grad", two_passes)
    grad, metrics = gradients(settings(), 1, 1, *models())
    assert_near(reference[1], metrics, 1e-6)
    assert_near(reference[0], grad, 1e-6)
    weights = [metrics[f"weight/{name}"] for name in settings().losses.names]
    np.testing.assert_allclose(sum(weights), 1.0, rtol=1e-6)
    assert min(weights) > 0.0


def test_fixed_weights_give_the_gradient_of_the_weighted_sum(monkeypatch, another):
    monkeypatch.setattr(gradmag, "balanced_grad", two_passes)
    grad, metrics = gradients(ANOTHER, 1, 1, *another_models())
    assert_near(another[1], metrics, 1e-6)
    assert_near(another[0], grad, 1e-6)
    found = {name: float(metrics[f"weight/{name}"]) for name in ANOTHER.losses.names}
    assert found == {"sft": 1.0, "alm": 2.0, "latents": 0.5}


@dataclasses.dataclass(frozen=True)
class WithMyLoss(LossConfig):
    mine: float = 0.0


def test_a_loss_is_added_in_one_place(monkeypatch):
    """A function, a weight and an entry: it is balanced, logged, checked, and makes the teacher needed."""
    loss = losses.Loss(
        lambda config, batch, teacher: total(batch.chunks.text_bytes),
        lambda config, rows, student, teacher, count: mean(jnp.abs(student.stats.boundary), rows.student.weight, count),
    )
    monkeypatch.setitem(losses.LOSSES, "mine", loss)
    config = configs.change(settings(), losses=WithMyLoss(sft=1.0, alm=0.0, mine=2.0))
    assert config.losses.names == ("sft", "mine") and config.losses.needs_teacher
    optimizer, (trained, frozen) = train.make_optimizer(config.optimizer), models()
    state = train.State(trained, optimizer.init(trained), jnp.zeros((), jnp.int32))
    step = functools.partial(train.train_step, config.losses, config.compute, optimizer, make_mesh(1, 1))
    _, metrics = jax.eval_shape(step, state, frozen, BATCH)
    assert {"loss/mine", "weight/mine", "loss/sft"} <= metrics.keys() and "loss/alm" not in metrics
    with pytest.raises(InputError, match="--losses.mine is -1.0: it must be a number of at least 0"):
        WithMyLoss(mine=-1.0).check()


# --- what the step computes, read from its program ----------------------------------------------------------------


def program(config: train.Config, trained, fixed, mesh=(1, 1)) -> Jaxpr:
    mesh = make_mesh(*mesh)
    optimizer = train.make_optimizer(config.optimizer)
    state = train.State(trained, optimizer.init(trained), jnp.zeros((), jnp.int32))
    return jax.make_jaxpr(functools.partial(train.train_step, config.losses, config.compute, optimizer, mesh))(
        state, fixed, BATCH
    ).jaxpr


def dense(jaxpr: Jaxpr) -> set[tuple[int, ...]]:
    """Shapes with a whole vocabulary axis next to a time axis, or to as many elements as a side has positions."""
    times = {STUDENT_TIME, TEACHER_TIME, ROWS_OF_BATCH * STUDENT_TIME, ROWS_OF_BATCH * TEACHER_TIME}
    shapes = {
        tuple(v.aval.shape) for e in equations(jaxpr) for v in (*e.invars, *e.outvars) if hasattr(v.aval, "shape")
    }
    found = set()
    for shape in shapes:
        for vocabulary in {STUDENT.vocab_size, TEACHER.vocab_size} & set(shape):
            others = list(shape)
            others.remove(vocabulary)
            if times & set(others) or math.prod(others) >= ROWS_OF_BATCH * TEACHER_TIME:
                found.add(shape)
    return found


@pytest.mark.parametrize("balance", ("gradmag", "fixed"))
def test_no_array_has_a_time_and_a_vocabulary_axis(monkeypatch, balance):
    monkeypatch.setattr(head, "BLOCK_ENTRIES", 13)
    monkeypatch.setattr(head, "BLOCK_ELEMENTS", 9 * 13)
    config = settings()
    config = configs.change(config, losses=dataclasses.replace(config.losses, balance=balance))
    jaxpr = program(config, *models())
    shapes = {tuple(v.aval.shape) for e in equations(jaxpr) for v in e.outvars if hasattr(v.aval, "shape")}
    assert {(13, 9), (13, 40), (60, 40)} <= shapes  # the walk sees the blocks of logits and the tables
    assert dense(jaxpr) == set()


def test_a_dense_head_would_be_found(monkeypatch):
    monkeypatch.setattr(head, "BLOCK_ELEMENTS", 10**9)
    found = dense(program(settings(), *models()))
    assert (60, ROWS_OF_BATCH * STUDENT_TIME) in found and (52, ROWS_OF_BATCH * TEACHER_TIME) in found

    def naive(hidden, table):
        return jax.lax.map(lambda x: jax.nn.log_softmax(x @ table.T), hidden)

    shapes = jnp.zeros((ROWS_OF_BATCH, STUDENT_TIME, 40)), jnp.zeros((60, 40))
    assert (ROWS_OF_BATCH, STUDENT_TIME, 60) in dense(jax.make_jaxpr(naive)(*shapes).jaxpr)


@pytest.mark.parametrize("balance", ("gradmag", "fixed"))
@pytest.mark.parametrize("remat", ("none", "full"))
def test_blocks_are_scanned_once_forward_and_once_backward(balance, remat):
    teacher = dataclasses.replace(TEACHER, layers=8, windows=(None,) * 8)
    student = dataclasses.replace(STUDENT, layers=6, windows=(None,) * 6)
    config = settings(losses=LossConfig(latents=1.0, balance=balance), remat=remat)
    scans = collections.Counter()
    for equation in equations(program(config, *models(student, teacher))):
        if equation.primitive.name == "scan":
            scans[equation.params["length"], equation.params["reverse"]] += 1
    assert scans[5, False] == 1 and scans[5, True] == 1  # the student's stacked blocks
    assert scans[7, False] == 1 and scans[7, True] == 0  # the teacher's


def test_without_teacher_losses_the_teacher_does_not_run():
    config = settings(losses=LossConfig(alm=0.0))
    teacher = dataclasses.replace(TEACHER, layers=8, windows=(None,) * 8)
    lengths = [
        e.params["length"] for e in equations(program(config, *models(teacher=teacher))) if e.primitive.name == "scan"
    ]
    assert lengths.count(3) == 2 and 7 not in lengths


# --- parameters on the mesh ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fsdp, tp", ((1, 1), (4, 2), (2, 4)))
def test_squared_norm_counts_every_element_once(fsdp, tp):
    model, mesh = parameters(STUDENT, 0), make_mesh(fsdp, tp)
    norm = shard_map(collectives.squared_norm, mesh=mesh, in_specs=(specs(model, mesh),), out_specs=P())
    expected = sum(np.sum(np.square(leaf.astype(np.float64))) for leaf in jax.device_get(jax.tree.leaves(model)))
    np.testing.assert_allclose(jax.jit(norm, compiler_options=QUICK)(shard(model, mesh)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, fsdp, tp, named",
    (
        ({}, 1, 8, "embed has a dimension of 60, which --mesh.tp 8"),
        (
            {"expansion_size": None, "heads": 12, "kv_heads": 4},
            1,
            6,
            "blocks.attention.k has a dimension of 4, which --mesh.tp 6",
        ),
        (
            {"vocab_size": 63, "expansion_size": None},
            1,
            3,
            "blocks.attention.q has a dimension of 8, which --mesh.tp 3",
        ),
        ({}, 3, 1, "embed has a dimension of 40, which --mesh.fsdp 3"),
        ({"expansion_size": 51}, 1, 2, "expansion has a dimension of 51, which --mesh.tp 2"),
        ({"mlp": 37}, 1, 4, "blocks.mlp.gate has a dimension of 37, which --mesh.tp 4"),
    ),
)
def test_a_mesh_that_does_not_divide_is_refused_by_name(changes, fsdp, tp, named):
    model = transformer.abstract(dataclasses.replace(STUDENT, **changes))
    with pytest.raises(InputError, match=f"^parameter {named.replace('.', '[.]')} does not divide: choose a mesh"):
        specs(model, make_mesh(fsdp, tp))


def test_a_mesh_of_too_many_devices_is_refused():
    with pytest.raises(InputError, match="^the mesh 4x4 needs 16 devices but there are 8: make "):
        make_mesh(4, 4)


def test_an_update_is_adamw_of_the_gradient_clipped_by_its_whole_norm(reference):
    config = settings(clip_norm=0.01, epsilon=1e-4, weight_decay=0.1)
    grad, metrics = reference
    norm = math.sqrt(sum(np.sum(np.square(leaf.astype(np.float64))) for leaf in grad.values()))
    assert norm > 0.02  # so that clipping acts
    trained, fixed = models()
    expected = {}
    for name, old in transformer.leaves(jax.device_get(trained)).items():
        clipped = grad[name].astype(np.float64) * 0.01 / norm
        decay = 0.0 if "norm" in name else 0.1
        update = clipped / (np.abs(clipped) + 1e-4) + decay * old  # the first step of Adam, bias-corrected
        expected[name] = old - 1e-2 * update
    mesh = make_mesh(4, 2)
    optimizer = train.make_optimizer(config.optimizer)
    placed = shard(trained, mesh)
    state = train.State(placed, optimizer.init(placed), jnp.zeros((), jnp.int32))
    step = jax.jit(
        functools.partial(train.train_step, config.losses, config.compute, optimizer, mesh), compiler_options=QUICK
    )
    with jax.default_matmul_precision("highest"):
        state, found = step(state, shard(fixed, mesh), shard_rows(BATCH, mesh))
    assert int(state.step) == 1
    np.testing.assert_allclose(found.pop("gradient_norm"), norm, rtol=1e-5)
    assert_near(jax.device_get(found), metrics, 1e-5)
    assert_near(transformer.leaves(jax.device_get(state.student)), expected, 1e-5)


def test_the_learning_rate_rises_and_falls():
    """No update is made at rate 0: the first is on the way up, and 0 would come after the last."""
    config = OptimizerConfig(steps=10, warmup_steps=4, learning_rate=2.0)
    expected = [0.5, 1.0, 1.5, 2.0, 2.0, 2 * 5 / 6, 2 * 4 / 6, 1.0, 2 * 2 / 6, 2 * 1 / 6, 0.0]
    np.testing.assert_allclose([learning_rate(config, done) for done in range(11)], expected, rtol=1e-6)
    on_device = [learning_rate(config, jnp.int32(done), jnp) for done in range(11)]
    np.testing.assert_allclose(on_device, expected, rtol=1e-6)
    for warmup_steps, expected in ((0, [3.0, 2.0, 1.0]), (3, [1.0, 2.0, 3.0]), (8, [1.0, 2.0, 3.0])):
        config = OptimizerConfig(steps=3, warmup_steps=warmup_steps, learning_rate=3.0)
        np.testing.assert_allclose([learning_rate(config, done) for done in range(3)], expected, rtol=1e-6)


def test_gradients_of_frequent_ids_survive_bfloat16():
    """A row that is read or predicted thousands of times gets the sum of all its gradients, as in float32."""
    mesh = make_mesh(1, 1)
    key = jax.random.key(0)
    table = jax.random.normal(key, (8, 16))
    ids = jnp.zeros((16, 1024), jnp.int32)
    pull = 1.0 + 0.1 * jax.random.normal(jax.random.key(1), (16, 1024, 16))
    entries = head.VocabularyMask(jnp.ones(8, bool), jnp.arange(8) < 4)

    def gradients(dtype):
        def read(table):
            return collectives.fsdp_sum(
                collectives.tp_sum(jnp.sum(collectives.lookup(table, ids, dtype).astype(jnp.float32) * pull))
            )

        def predicted(table):
            stats = head.token_stats(pull.astype(dtype), ids, table, entries, None)
            return collectives.fsdp_sum(jnp.sum(stats.logp))

        both = shard_map(
            lambda table: (jax.grad(read)(table), jax.grad(predicted)(table)),
            mesh=mesh,
            in_specs=P("tp", "fsdp"),
            out_specs=P("tp", "fsdp"),
        )
        return jax.jit(both)(table)

    for exact, rounded in zip(gradients(jnp.dtype("float32")), gradients(jnp.dtype("bfloat16")), strict=True):
        np.testing.assert_allclose(rounded[0], exact[0], rtol=0.01, atol=0.01 * float(jnp.abs(exact[0]).max()))

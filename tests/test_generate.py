"""Continuations against whole forward passes without a cache, and measures against plain recomputation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward import logits

from minalm.evaluation.bits_per_byte import measure
from minalm.evaluation.samples import PROMPT_CHARACTERS, beginning
from minalm.models.config import ModelConfig, Rope
from minalm.models.generate import generate, sample
from minalm.models.head import VocabularyMask
from minalm.models.transformer import Transformer, initialize
from minalm.parallel.mesh import ROWS, P, make_mesh, shard, shard_map, specs
from minalm.text.documents import Markup, Segment, Special
from minalm.types import AlignedChunks, Batch, Tokens

FLOAT32 = jnp.dtype(jnp.float32)
CONFIG = ModelConfig(
    vocab_size=44,
    embed=24,
    mlp=36,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=10,
    windows=(3, None, 4),
    rope=Rope(100.0),
    attention_softcap=5.0,
    final_softcap=30.0,
    norm_plus_one=True,
    post_norms=True,
    activation="gelu_tanh",
    embedding_scale=24**0.5,
    tied=False,
    expansion_size=28,
)
LONGEST, NEW = 7, 6
ENTRIES = VocabularyMask(np.arange(44) < 40, np.arange(44) % 5 == 2)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the time: XLA leaves out most optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    model = initialize(config, jax.random.key(seed))
    return jax.tree.map(lambda leaf: 12.0 * leaf if leaf.ndim > 1 and leaf.std() > 0 else leaf, model)


def suffixes(ids):
    """Any causal function of the ids."""
    before = np.pad(ids, ((0, 0), (1, 0)))[:, :-1]
    return ((3 * ids + 5 * before) % 28).astype(np.int32)


@functools.cache
def whole_pass(config: ModelConfig):
    """Logits at all positions of rows of fixed length, on one device, without a cache."""

    mesh = make_mesh(1, 1)
    layout = specs(initialize(config, jax.random.key(0)), mesh)
    mapped = shard_map(logits, mesh=mesh, in_specs=(layout, ROWS, ROWS), out_specs=P("fsdp", None, "tp"))
    return jax.jit(mapped)


def greedy(model, prompts, expanded):
    rows = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(NEW):
            padded = np.zeros((1, LONGEST + NEW), np.int32)
            padded[0, : len(ids)] = ids
            logits = whole_pass(model.config)(model, padded, suffixes(padded) if expanded else padded)[0, len(ids) - 1]
            ids.append(int(np.argmax(logits[:40])))  # rows from 40 on are padding
        rows.append(ids[len(prompt) :])
    return rows


PROMPTS = [np.array(ids, np.int32) for ids in ([5], [7, 1, 30, 2, 9, 11, 4], [39, 38, 3], [8, 8, 8, 8])]
assert max(map(len, PROMPTS)) == LONGEST


@pytest.mark.parametrize("expanded", (True, False))
@pytest.mark.parametrize("fsdp, tp", ((1, 1), (2, 2)))
def test_greedy_continuations_are_those_of_whole_passes(expanded, fsdp, tp):
    config = dataclasses.replace(CONFIG, expansion_size=28 if expanded else None)
    model = random_model(config)
    expected = greedy(model, PROMPTS, expanded)
    assert len({token for row in expected for token in row}) > 5
    mesh = make_mesh(fsdp, tp)
    found = generate(
        shard(model, mesh), shard(ENTRIES, mesh), suffixes if expanded else None, PROMPTS, NEW, None, mesh, FLOAT32
    )
    assert found == expected


def test_rows_are_independent_and_stop():
    """Prompts of unequal lengths together give what each gives alone; a number of rows that no mesh divides."""
    model, mesh = random_model(CONFIG), make_mesh(2, 2)
    arguments = shard(model, mesh), shard(ENTRIES, mesh), suffixes
    together = generate(*arguments, PROMPTS[:3], NEW, None, mesh, FLOAT32)
    alone = [generate(*arguments, [prompt], NEW, None, mesh, FLOAT32)[0] for prompt in PROMPTS[:2]]
    assert together[:2] == alone and len(together) == 3
    stop = together[1][2]
    stopped = generate(*arguments, PROMPTS[:3], NEW, stop, mesh, FLOAT32)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in together]
    assert len(stopped[1]) <= 2


def test_samples_follow_the_probabilities():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2, 0.0]]))
    drawn = [int(sample(logits, 1.0, key)[0]) for key in jax.random.split(jax.random.key(0), 600)]
    shares = np.bincount(drawn, minlength=4) / 600
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2, 0.0], atol=0.06)
    assert shares[3] == 0
    assert sample(logits, 0.0, jax.random.key(0)).tolist() == [0]
    cold = [int(sample(logits, 0.1, key)[0]) for key in jax.random.split(jax.random.key(1), 50)]
    assert np.mean(np.array(cold) == 0) > 0.9


def test_the_same_seed_gives_the_same_samples():
    model, mesh = random_model(CONFIG), make_mesh(1, 1)
    arguments = shard(model, mesh), shard(ENTRIES, mesh), suffixes, PROMPTS, NEW, None, mesh, FLOAT32
    first = generate(*arguments, temperature=1.0, seed=1)
    assert first == generate(*arguments, temperature=1.0, seed=1)
    assert first != generate(*arguments, temperature=1.0, seed=2)
    assert all(0 <= token < 40 for row in first for token in row)


# --- measures -----------------------------------------------------------------------------------------------------

TEACHER = dataclasses.replace(CONFIG, vocab_size=52, expansion_size=None, tied=True)
TEACHER_ENTRIES = VocabularyMask(np.arange(52) < 51, np.arange(52) % 5 == 2)
STUDENT_TIME = LONGEST + NEW
ROWS_OF_BATCH = 4


def random_batch(seed: int, teacher: bool = True) -> Batch:
    random = np.random.default_rng(seed)
    rows, time = ROWS_OF_BATCH, STUDENT_TIME

    def tokens(vocabulary, suffix):
        ids = random.integers(0, vocabulary, (rows, time + 1)).astype(np.int32)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        return Tokens(inputs, targets, np.ones((rows, time), np.float32), suffixes(inputs) if suffix else None)

    chunk = np.sort(random.integers(-1, 6, (2, rows, time)), axis=2).astype(np.int32)
    chunk_end = np.stack(
        [[[np.flatnonzero(np.append(row == n, True))[0] for n in range(6)] for row in c] for c in chunk]
    )
    chunk_end = np.minimum(chunk_end, time - 1).astype(np.int32)
    text_bytes = random.integers(0, 4, (rows, 6)).astype(np.int32)
    before = np.zeros((rows, 6), bool)
    chunks = AlignedChunks(chunk[0], chunk[1 if teacher else 0], chunk_end[0], chunk_end[1], before, text_bytes)
    left_out = np.zeros(rows, bool)
    return Batch(tokens(40, True), tokens(51, False) if teacher else None, chunks, left_out)


def plain_probabilities(model, entries, tokens):
    suffix = tokens.inputs if tokens.suffix is None else tokens.suffix
    logits = np.asarray(whole_pass(model.config)(model, tokens.inputs, suffix), np.float64)
    exponentials = np.exp(np.where(entries.exists, logits, -np.inf))
    return exponentials / exponentials.sum(-1, keepdims=True)


def plain_logp(model, entries, tokens):
    p = plain_probabilities(model, entries, tokens)
    return np.log(np.take_along_axis(p, tokens.targets[..., None].astype(int), -1)[..., 0])


def plain_calibration(model, entries, batches):
    """The expected calibration error of the boundary mass in 15 bins, one position after the other."""
    bins = np.zeros((15, 2))
    positions = 0
    for batch in batches:
        p = plain_probabilities(model, entries, batch.student)
        for place in np.argwhere(batch.student.weight > 0):
            mass = p[tuple(place)][entries.boundary].sum()
            bins[min(int(15 * mass), 14)] += mass, entries.boundary[batch.student.targets[tuple(place)]]
            positions += 1
    return np.abs(bins[:, 0] - bins[:, 1]).sum() / positions


@pytest.mark.parametrize("fsdp, tp", ((1, 1), (2, 2)))
def test_measures(fsdp, tp):
    student, teacher = random_model(CONFIG), random_model(TEACHER, 1)
    batches = [random_batch(seed) for seed in range(2)]
    mesh = make_mesh(fsdp, tp)
    placed = [shard(part, mesh) for part in (student, teacher, ENTRIES, TEACHER_ENTRIES)]
    found = measure(*placed, batches, mesh, FLOAT32)

    nats, size, differences = np.zeros(2), 0, []
    for batch in batches:
        chunks = batch.chunks
        logps = plain_logp(student, ENTRIES, batch.student), plain_logp(teacher, TEACHER_ENTRIES, batch.teacher)
        for row, chunk in np.ndindex(ROWS_OF_BATCH, 6):
            inside = [side[row] == chunk for side in (chunks.student_chunk, chunks.teacher_chunk)]
            if chunks.text_bytes[row, chunk] and all(mask.any() for mask in inside):
                pair = np.array([-logp[row][mask].sum() for logp, mask in zip(logps, inside)])
                nats += pair
                differences.append(abs(pair[0] - pair[1]))
                size += chunks.text_bytes[row, chunk]
    assert size > 20
    assert found.keys() == {"student", "teacher", "agreement", "calibration"}
    np.testing.assert_allclose(found["calibration"], plain_calibration(student, ENTRIES, batches), rtol=1e-4)
    np.testing.assert_allclose([found["student"], found["teacher"]], nats / size / math.log(2), rtol=1e-5)
    np.testing.assert_allclose(found["agreement"], np.mean(differences), rtol=1e-5)


def test_measures_without_a_teacher():
    student, mesh = random_model(CONFIG), make_mesh(1, 1)
    batch = random_batch(3, teacher=False)
    found = measure(shard(student, mesh), None, shard(ENTRIES, mesh), None, [batch], mesh, FLOAT32)
    logp = plain_logp(student, ENTRIES, batch.student)
    nats, size = 0.0, 0
    for row, chunk in np.ndindex(ROWS_OF_BATCH, 6):
        inside = batch.chunks.student_chunk[row] == chunk
        if inside.any() and batch.chunks.text_bytes[row, chunk]:
            nats, size = nats - logp[row][inside].sum(), size + batch.chunks.text_bytes[row, chunk]
    assert found.keys() == {"student", "calibration"}
    np.testing.assert_allclose(found["calibration"], plain_calibration(student, ENTRIES, [batch]), rtol=1e-4)
    np.testing.assert_allclose(found["student"], nats / size / math.log(2), rtol=1e-5)


def test_the_beginning_of_a_piece():
    bos, eos, turn = Segment(Special("bos")), Segment(Special("eos")), Segment(Markup(("<turn>",), ("<turn>",)))
    long = "ab" * PROMPT_CHARACTERS
    assert beginning((bos, Segment(long), eos)) == (bos, Segment(long[:PROMPT_CHARACTERS]))
    assert beginning((bos, Segment("short"), eos)) == (bos, Segment("short"))
    assert beginning((turn, Segment("user"), turn, Segment(long), turn)) == (
        *(turn, Segment("user"), turn),
        Segment(long[: PROMPT_CHARACTERS - 4]),
    )
    assert beginning((bos, Segment(""), eos)) == beginning(()) == (bos, Segment("\n"))

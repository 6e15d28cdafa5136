"""Continuations against whole forward passes without a cache, and measures against plain recomputation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import generator, greedy
from forward import logits
from real_models import real_model

from minalm.errors import InputError
from minalm.evaluation.bits_per_byte import measure
from minalm.evaluation.samples import PROMPT_CHARACTERS, beginning
from minalm.generation import engine
from minalm.generation.engine import Generator, Session
from minalm.generation.sampling import Sampling, SamplingConfig
from minalm.huggingface.loaded import LoadedModel
from minalm.models.config import ModelConfig, Rope
from minalm.models.head import VocabularyMask
from minalm.models.transformer import Transformer, initialize
from minalm.parallel.mesh import ROWS, P, make_mesh, shard, shard_map, specs
from minalm.text.documents import Markup, Segment, Special
from minalm.tokenization.suffixes import LongestSuffix, longest_suffix
from minalm.tokenization.vocabulary import Vocabulary, byte_vocabulary
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


# --- generation ---------------------------------------------------------------------------------------------------

BYTES = dataclasses.replace(CONFIG, vocab_size=264, windows=(20, None, 24), expansion_size=40)
BYTE_ENTRIES = VocabularyMask(np.arange(264) < 258, np.arange(264) == 32)
TIME = 352


@functools.cache
def byte_suffixes() -> LongestSuffix:
    """Of a small vocabulary in which most bytes end some token, two special tokens among the ids."""
    random = np.random.default_rng(0)
    tokens = dict.fromkeys(bytes(random.integers(0, 256, 1 + n % 3).astype(np.uint8)) for n in range(20))
    tokens |= dict.fromkeys(bytes(random.integers(97, 103, 1 + n % 4).astype(np.uint8)) for n in range(18))
    tokens = tuple(tokens)[:38]
    original = Vocabulary("original", None, None, {}, (*tokens, b"", b""), {"<a>": 38, "<b>": 39}, {})
    return longest_suffix(original, byte_vocabulary(original, ["<b>", "<a>"]))


def whole_logits(model: Transformer, ids: np.ndarray, search: LongestSuffix | None) -> np.ndarray:
    """Logits after each of the ids of one row, without a cache."""
    padded = np.zeros((1, TIME), np.int32)
    padded[0, : len(ids)] = ids
    suffix = padded if search is None else search(padded)
    with jax.default_matmul_precision("highest"):
        return np.asarray(whole_pass(model.config)(model, padded, suffix))[0, : len(ids)]


def assert_greedy(model, mask, search, prompts, continuations):
    """Each id is the most probable one of a whole pass; what nearly ties may be another."""
    for prompt, new in zip(prompts, continuations, strict=True):
        after = whole_logits(model, np.concatenate([prompt, new]), search)[len(prompt) - 1 : -1]
        after = np.where(mask.exists, after, -np.inf)
        assert np.all(after[np.arange(len(new)), new] >= after.max(-1) - 1e-4)


PROMPTS = [
    np.array(ids, np.int32)
    for ids in (
        [97],
        [99, 100, 256, 97, 98, 99, 101],
        [257, *range(97, 103)] * 20,
        [98] * 33,
    )
]


@pytest.mark.parametrize("expanded", (True, False))
@pytest.mark.parametrize("fsdp, tp", ((1, 1), (2, 2), pytest.param(1, 4, marks=pytest.mark.slow)))
def test_greedy_continuations_are_those_of_whole_passes(expanded, fsdp, tp):
    config = dataclasses.replace(BYTES, expansion_size=40 if expanded else None)
    model, search = random_model(config), byte_suffixes() if expanded else None
    found = greedy(model, BYTE_ENTRIES, search, PROMPTS, 40, make_mesh(fsdp, tp))
    assert [len(new) for new in found] == [40] * 4 and len({token for row in found for token in row}) > 5
    assert_greedy(model, BYTE_ENTRIES, search, PROMPTS, found)


def test_rows_are_independent_and_stop():
    """Prompts of unequal lengths together give what each gives alone; a number of rows that no mesh divides."""
    made = generator(random_model(BYTES), BYTE_ENTRIES, byte_suffixes(), make_mesh(2, 2))
    together = made.generate(PROMPTS[:3], SamplingConfig(), 40, ())
    alone = [made.generate([prompt], SamplingConfig(), 40, ())[0] for prompt in PROMPTS[:2]]
    assert together[:2] == alone and len(together) == 3
    stop = together[1][12]
    stopped = made.generate(PROMPTS[:3], SamplingConfig(), 40, {stop, 1000})
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in together]
    assert len(stopped[1]) <= 12


def test_logits_of_every_step_and_of_several_columns():
    """300 bytes, past the rings of the windowed layers and the first size of the cache: within 1e-4 of a whole pass."""
    model, mesh = random_model(BYTES), make_mesh(1, 1)
    made = generator(model, BYTE_ENTRIES, byte_suffixes(), mesh)
    ids = np.random.default_rng(1).choice([*range(97, 103), 0, 255, 256, 257], 300).astype(np.int32)
    expected = whole_logits(model, ids, byte_suffixes())

    @functools.partial(jax.jit, static_argnums=2)
    def read(members, state, count):
        return engine.read_columns(made, members, state, count, True)

    for counts in ([1] * 299, [5, 1, 17] * 13):
        session = Session(made, [[ids]], 0)
        start = session.column + 1 - len(ids)
        state, found = session.state, []
        state = dataclasses.replace(state, column=jnp.int32(start))
        with jax.default_matmul_precision("highest"):
            for count in counts:
                [each], state = read(made.members, state, count)
                found.append(np.asarray(each[0]))
        found = np.concatenate(found)[:300]
        np.testing.assert_allclose(found[:, :258], expected[: len(found), :258], rtol=0, atol=1e-4)
        assert np.isneginf(found[:, 258:]).all()


def test_nothing_is_compiled_for_the_next_prompt():
    """20 prompts of different lengths: one program for each size of the cache."""
    made = generator(random_model(BYTES), BYTE_ENTRIES, byte_suffixes(), make_mesh(1, 1))
    random = np.random.default_rng(0)
    for number in range(20):
        prompt = random.integers(97, 103, 5 + 45 * number).astype(np.int32)
        sampling = SamplingConfig(temperature=0.5 + number / 20, top_p=0.9)
        [new] = made.generate([prompt], sampling, 3 + number, range(number), seed=number)
        assert len(new) <= 3 + number
    assert made.compiled() <= 6


def test_samples_follow_the_probabilities():
    probabilities = jnp.array([[0.5, 0.3, 0.2, 0.0]])

    def drawn(count, seed, **settings):
        keys = jax.random.split(jax.random.key(seed), count)
        sampling = Sampling.of(SamplingConfig(**settings))
        adjusted = engine.adjusted(jnp.log(probabilities), sampling, None)
        return np.asarray(engine.choose(jnp.broadcast_to(adjusted, (count, 4)), sampling, keys))

    shares = np.bincount(drawn(600, 0, temperature=1.0), minlength=4) / 600
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2, 0.0], atol=0.06)
    assert shares[3] == 0
    assert drawn(1, 0).tolist() == [0]
    assert np.mean(drawn(50, 1, temperature=0.1) == 0) > 0.9
    assert set(drawn(200, 2, temperature=1.0, top_k=2)) == {0, 1}
    assert set(drawn(200, 3, temperature=1.0, top_p=0.4)) == {0}
    assert set(drawn(200, 4, temperature=1.0, min_p=0.5)) == {0, 1}


def test_the_same_seed_gives_the_same_samples():
    made = generator(random_model(BYTES), BYTE_ENTRIES, byte_suffixes(), make_mesh(1, 1))

    def sampled(seed, **more):
        return made.generate(PROMPTS, SamplingConfig(1.0), 20, (), seed=seed, **more)

    first, calls = sampled(1), []
    assert first == sampled(1) != sampled(2)
    assert first == sampled(1, on_tokens=lambda row, new: calls.append((row, new)))  # in calls of other sizes
    assert all(0 <= token < 258 for row in first for token in row)
    assert first == [[token for number, new in calls if number == row for token in new] for row in range(4)]


def test_what_cannot_be_continued_is_refused():
    made = generator(random_model(BYTES), BYTE_ENTRIES, byte_suffixes(), make_mesh(1, 1))
    with pytest.raises(InputError, match="prompt 2 is empty"):
        made.generate([PROMPTS[0], np.zeros(0, np.int32)], SamplingConfig(), 3, ())
    with pytest.raises(InputError, match="--stop is empty"):
        made.generate(PROMPTS, SamplingConfig(), 3, (), stop_strings=["a", ""])
    with pytest.raises(InputError, match="--top-p is 1.5"):
        made.generate(PROMPTS, SamplingConfig(1.0, top_p=1.5), 3, ())
    assert made.generate([], SamplingConfig(), 3, ()) == []
    assert made.generate(PROMPTS[:1], SamplingConfig(), 0, ()) == [[]]


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


# --- real weights -------------------------------------------------------------------------------------------------

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "Water boils at",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,",
    "Die Katze sitzt auf",
    "The three laws of thermodynamics are",
)


@pytest.mark.real
@pytest.mark.parametrize("name", ("smollm2", "gemma3"))
def test_greedy_text_is_that_of_transformers(name):
    """64 tokens behind 8 prompts, as a batch: each is the one that transformers finds most probable behind those before
    it, so its own greedy text is the same. A tie in float32 may go either way."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = real_model(name)
    loaded = LoadedModel.read(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bos = [Segment(Special("bos"))] if loaded.vocabulary.adds_bos else []
    prompts = [encoding.ids for encoding in loaded.vocabulary.encode([(*bos, Segment(text)) for text in TEXTS])]
    made = Generator.of([loaded], make_mesh(1, 1), FLOAT32)
    found = made.generate(prompts, SamplingConfig(), 64, ())
    ties = []
    for prompt, new in zip(prompts, found, strict=True):
        assert len(new) == 64
        with torch.no_grad():
            logits = theirs(torch.tensor([[*prompt.tolist(), *new[:-1]]])).logits[0, len(prompt) - 1 :].numpy()
        behind = logits.max(-1) - logits[np.arange(64), new]
        ties += behind[behind > 0].tolist()
    assert max(ties, default=0) < 1e-3 and len(ties) <= 2, ties

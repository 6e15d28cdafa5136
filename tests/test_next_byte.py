"""The next byte that a teacher implies, against an enumeration of all entries in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import equations
from small_tokenizers import vocabulary
from test_step import QUICK, TEACHER, assert_near, parameters, settings, slow

import train
from minalm.batches import Side, make_batch
from minalm.distill.losses import LossConfig
from minalm.errors import InputError
from minalm.models import head
from minalm.models.head import PrefixTree, VocabularyMask, byte_scores, byte_targets
from minalm.models.transformer import leaves
from minalm.parallel.mesh import ROWS, P, make_mesh, shard, shard_map, shard_rows, specs
from minalm.text.documents import Markup, Segment, Special
from minalm.tokenization import prefixes
from minalm.types import ByteTargets

EMBED = 8
CAP = 3.0


def plain(text):
    return Segment(Special("bos")), Segment(text), Segment(Special("eos"))


def special(*words):
    return Segment(Markup(words, words), False)


CHAT = (
    special("<bos>"),
    special("<start_of_turn>", "user\n"),
    Segment("the 日本 model?\n\n\n", False),
    special("<end_of_turn>", "\n", "<start_of_turn>", "model\n"),
    Segment("\n hello there"),
    Segment(Markup(("<end_of_turn>", "\n"), ("<end_of_turn>", "\n"))),
)
TEXTS = [
    "the user said to the model: hello there",
    " the  end. 日 本語 é\x00ü\n\n\n\n<eos>",
    "",
    "er",
    "\u2581a\u2581 the",
]
PIECES = [*map(plain, TEXTS), CHAT]
KINDS = ["gemma", "llama", "llama2", "metaspace", "qwen"]


def sides(kind, student_length=64, teacher_length=64, rows=None):
    teacher, student = vocabulary(kind), vocabulary(f"bytes of {kind}")
    rows = rows or -(-teacher.size // 8) * 8
    found = prefixes.find_prefixes(teacher, student, rows, -(-student.size // 8) * 8)
    return Side(student, None, student_length), Side(teacher, None, teacher_length, found)


def random_model(rows, scale=1.0, seed=0):
    """(states of the teacher for 8 rows of 64 positions, its table)."""
    random = np.random.default_rng(seed)
    hidden, table = random.normal(size=(8, 64, EMBED)), random.normal(size=(rows, EMBED))
    return hidden.astype(np.float32), (scale * table).astype(np.float32)


def symbols(vocab, ids):
    """What each token spells: bytes, or a word."""
    names = {i: word for word, i in vocab.special.items()}
    return [[names[i]] if i in names else list(vocab.token_bytes[i]) for i in ids]


def enumerated(piece, student, teacher, probabilities, outcomes):
    """{student's position: (known, open)} of one row, from sums over entries by `bytes.startswith`.

    `probabilities[t, v]`: of the entry v after the teacher's token t.
    """
    (our,), (their,) = student.encode([piece]), teacher.encode([piece], "teacher")
    if not (our.round_trips and their.round_trips):
        return {}
    read, tokens = [s for each in symbols(student, our.ids) for s in each], symbols(teacher, their.ids)
    names = {i: word for word, i in teacher.special.items()}

    def begins(t, u):
        return sum(p for p, token in zip(probabilities[t], teacher.token_bytes) if token and token.startswith(u))

    def equal(t, u):
        return sum(p for p, token in zip(probabilities[t], teacher.token_bytes) if token == u)

    def first(t):
        q = np.zeros(outcomes)
        for v, (p, token) in enumerate(zip(probabilities[t], teacher.token_bytes)):
            if token:
                q[token[0]] += p
            elif names.get(v) in student.special:
                q[student.special[names[v]]] += p
        return q

    found = {}
    place = 0  # in `tokens`
    offset = 0  # symbols of that token that have been read
    for position, symbol in enumerate(read):
        while True:
            # A token is left when all of it was read. A space that is not in the text counts as read.
            if place < len(tokens) and offset == len(tokens[place]):
                place, offset = place + 1, 0
                continue
            expected = tokens[place][offset] if place < len(tokens) else None
            if expected == symbol:
                offset += 1
                break
            assert expected == 32 and teacher.continuing is not None, "only a space that the tokenizer added"
            offset += 1
        # The space that is put before a text belongs to the position before the text.
        if place < len(tokens) and isinstance(symbol, str) and teacher.continuing is not None:
            following = tokens[place + 1] if place + 1 < len(tokens) else []
            upcoming = read[position + 1] if position + 1 < len(read) else None
            if following[:1] == [32] and upcoming is not None and upcoming != 32:
                place, offset = place + 1, 1
            elif following == [32] and upcoming == 32 and tokens[place + 2][:1] == [32]:
                place, offset = place + 1, 1
        token = tokens[place]
        if position + 1 == len(read) or (place == 0 and not isinstance(token[0], str)):
            continue
        known, open_share = np.zeros(outcomes), 0.0
        if isinstance(token[0], str):
            known = first(place)
        else:
            u = bytes(token[:offset])
            total = begins(place - 1, u)
            for byte in range(256):
                known[byte] = begins(place - 1, u + bytes([byte])) / total
            ended = equal(place - 1, u) / total
            if offset == len(token):
                known += ended * first(place)
            else:
                open_share = ended
        found[position] = known, open_share
    return found


def softmax(hidden, table, rows, cap=CAP):
    logits = hidden.astype(np.float64) @ table[:rows].astype(np.float64).T
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def implied(batch, teacher, hidden, table, fsdp=1, tp=1, cap=CAP):
    """`byte_targets` of a batch on a mesh."""
    mesh = make_mesh(fsdp, tp)
    mask = VocabularyMask(np.arange(len(table)) < teacher.vocabulary.size, np.zeros(len(table), bool))
    tree = PrefixTree.of(teacher.prefixes)

    def run(hidden, tokens, places, table, mask, tree):
        return byte_targets(hidden, tokens.targets, table, mask, cap, tree, places)

    layout = (ROWS, ROWS, ROWS, P("tp", "fsdp"), specs(mask, mesh), specs(tree, mesh))
    mapped = shard_map(run, mesh=mesh, in_specs=layout, out_specs=ROWS)
    arguments = hidden, batch.teacher, batch.bytes, table, shard(mask, mesh), shard(tree, mesh)
    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(mapped)(*arguments))


def padded(pieces):
    return [*pieces, *[()] * (8 - len(pieces))]


@pytest.mark.parametrize("window", [*(pytest.param(size, marks=pytest.mark.slow) for size in (1, 3)), 256])
@pytest.mark.parametrize("kind", KINDS)
def test_against_an_enumeration(kind, window, monkeypatch):
    monkeypatch.setattr(prefixes, "WINDOW", window)
    monkeypatch.setattr(head, "WINDOW", window)
    student, teacher = sides(kind)
    pieces = padded(PIECES if kind == "gemma" else PIECES[:-1])
    batch = make_batch(pieces, student, teacher)
    hidden, table = random_model(len(teacher.prefixes.slot))
    found = implied(batch, teacher, hidden, table)
    outcomes = found.known.shape[-1]
    compared = 0
    for row, piece in enumerate(pieces):
        if batch.left_out[row]:
            continue
        p = softmax(hidden[row], table, teacher.vocabulary.size)
        expected = enumerated(piece, student.vocabulary, teacher.vocabulary, p, outcomes)
        for position in range(64):
            if not found.counted[row, position]:
                continue
            known, open_share = expected[position]
            np.testing.assert_allclose(found.known[row, position], known, rtol=0, atol=1e-6)
            np.testing.assert_allclose(found.open[row, position], open_share, rtol=0, atol=1e-6)
            compared += 1
        if piece is not CHAT:
            assert set(np.flatnonzero(found.counted[row])) == set(expected)
    assert compared > 75


def test_small_masses_keep_their_digits():
    """A word of probability e^-60 among others: what follows inside of it is right to float32's digits."""
    student, teacher = sides("llama")
    batch = make_batch(padded([plain("the user")]), student, teacher)
    hidden, table = random_model(len(teacher.prefixes.slot))
    user = [i for i, token in enumerate(teacher.vocabulary.token_bytes) if token.startswith(b" u")]
    table[:, 0], hidden[..., 0] = 0.0, 60.0
    table[user, 0] = -1.0
    found = implied(batch, teacher, hidden, table, cap=None)
    p = softmax(hidden[0], table, teacher.vocabulary.size, None)
    expected = enumerated(plain("the user"), student.vocabulary, teacher.vocabulary, p, found.known.shape[-1])
    position = 5  # behind " u"
    assert found.counted[0, position] and p[1][user].sum() < 1e-20
    np.testing.assert_allclose(found.known[0, position], expected[position][0], rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def whole():
    return targets_of(1, 1)


def targets_of(fsdp, tp):
    student, teacher = sides("gemma")
    batch = make_batch(padded(PIECES), student, teacher)
    return jax.tree.leaves(implied(batch, teacher, *random_model(len(teacher.prefixes.slot)), fsdp, tp))


@pytest.mark.parametrize("fsdp, tp", [(4, 2), (2, 4)])
def test_targets_on_a_mesh(whole, fsdp, tp):
    for found, expected in zip(targets_of(fsdp, tp), whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("entries, elements, positions", [(7, 350, 64), (1000, 2**22, 128), (16, 64, 1)])
def test_blocks_do_not_change_the_targets(whole, monkeypatch, entries, elements, positions):
    monkeypatch.setattr(head, "BLOCK_ENTRIES", entries)
    monkeypatch.setattr(head, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(head, "BLOCK_POSITIONS", positions)
    for found, expected in zip(targets_of(1, 1), whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


OUTCOMES = 24


def score_arguments(scale=1.0):
    random = np.random.default_rng(3)
    hidden = scale * random.normal(size=(8, 12, EMBED))
    table = random.normal(size=(OUTCOMES, EMBED))
    known = random.dirichlet(np.full(OUTCOMES, 0.3), (8, 12)) * random.random((8, 12, 1))
    known[..., -3:] = 0.0  # rows of padding
    open_share = (1.0 - known.sum(-1)) * (random.random((8, 12)) < 0.5)
    targets = known.astype(np.float32), open_share.astype(np.float32), random.random((8, 12)) < 0.7
    weight = random.normal(size=(8, 12))
    return hidden.astype(np.float32), table.astype(np.float32), ByteTargets(*map(jnp.array, targets)), weight


def plain_scores(hidden, table, targets, cap):
    """Cross-entropy by the formula, for autodiff in float64."""
    logits = hidden @ table[:-3].T
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    logp = jax.nn.log_softmax(logits)
    known = targets.known[..., :-3].astype(jnp.float64)
    excess = jnp.maximum(jnp.exp(jax.lax.stop_gradient(logp)) - known, 0.0)
    q = known + targets.open[..., None].astype(jnp.float64) * excess / excess.sum(-1, keepdims=True)
    return -(q * logp).sum(-1), logp.argmax(-1) == known.argmax(-1)


def scores(hidden, table, targets, weight, cap, fsdp=1, tp=1):
    """(cross-entropy, greedy, gradients of the weighted sum) on a mesh."""
    mesh = make_mesh(fsdp, tp)
    mask = VocabularyMask(np.arange(OUTCOMES) < OUTCOMES - 3, np.zeros(OUTCOMES, bool))

    def run(hidden, table, targets, weight, mask):
        def value(hidden, table):
            found = byte_scores(hidden, table, mask, cap, targets)
            return jnp.sum(weight * found.cross_entropy), found

        gradient, found = jax.grad(value, (0, 1), has_aux=True)(hidden, table)
        return found, gradient

    layout = P("tp", "fsdp")
    mapped = shard_map(
        run, mesh, in_specs=(ROWS, layout, ROWS, ROWS, specs(mask, mesh)), out_specs=(ROWS, (ROWS, layout))
    )
    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(mapped)(hidden, table, targets, weight.astype(np.float32), shard(mask, mesh)))


@pytest.mark.parametrize("fsdp, tp", [(1, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("cap, elements", [(None, 2**22), (2.0, 50)])
def test_scores(cap, elements, fsdp, tp, monkeypatch):
    monkeypatch.setattr(head, "BLOCK_ELEMENTS", elements)
    tp = tp if OUTCOMES % tp == 0 else 1
    hidden, table, targets, weight = score_arguments()
    found, gradients = scores(hidden, table, targets, weight, cap, fsdp, tp)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        exact = [jnp.array(x, jnp.float64) for x in (hidden, table)]
        cross_entropy, greedy = plain_scores(*exact, targets, cap)
        expected = jax.grad(lambda h, t: jnp.sum(weight * plain_scores(h, t, targets, cap)[0]), (0, 1))(*exact)
        cross_entropy, greedy, expected = jax.device_get((cross_entropy, greedy, expected))
    np.testing.assert_allclose(found.cross_entropy, cross_entropy, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.greedy, greedy)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


# --- in a step ----------------------------------------------------------------------------------------------------

LOSSES = LossConfig(sft=0.5, alm=0.0, next_byte=1.0, latents=1.0)


@pytest.fixture(scope="module")
def run():
    """(what is trained, train.Frozen, batch) of a byte student and its teacher, both random."""
    student, teacher = sides("gemma", 48, 24)
    batch = make_batch(padded(PIECES), student, teacher)
    rows, outcomes = len(teacher.prefixes.slot), len(teacher.prefixes.outcomes)
    theirs = dataclasses.replace(TEACHER, vocab_size=rows)
    ours = dataclasses.replace(TEACHER, vocab_size=outcomes, tied=False)
    masks = [
        VocabularyMask(np.arange(size) < vocab.size, vocab.boundary_mask(size))
        for size, vocab in ((outcomes, student.vocabulary), (rows, teacher.vocabulary))
    ]
    trained = parameters(ours, 0)
    frozen = train.Frozen(
        jax.tree.map(lambda _: None, trained), parameters(theirs, 1), *masks, PrefixTree.of(teacher.prefixes)
    )
    return trained, frozen, batch


def gradients(run, fsdp=1, tp=1, **changes):
    trained, frozen, batch = run
    config = settings(losses=LOSSES, **changes)
    mesh = make_mesh(fsdp, tp)
    layout = specs(trained, mesh)
    mapped = shard_map(
        functools.partial(train.gradients, config.losses, config.compute),
        mesh=mesh,
        in_specs=(layout, specs(frozen, mesh), jax.tree.map(lambda _: ROWS, batch)),
        out_specs=(layout, P()),
    )
    with jax.default_matmul_precision("highest"):
        grad, metrics = jax.jit(mapped, compiler_options=QUICK)(
            shard(trained, mesh), shard(frozen, mesh), shard_rows(batch, mesh)
        )
    assert metrics.pop("left_out") == 0.0
    return jax.device_get((leaves(grad), metrics))


@pytest.fixture(scope="module")
def of_one_device(run):
    return gradients(run)


@pytest.mark.parametrize("fsdp, tp, parts", [slow(4, 2, 1), slow(2, 4, 1), slow(1, 1, 4), slow(2, 4, 2)])
def test_the_step_on_a_mesh_and_in_parts(run, of_one_device, fsdp, tp, parts):
    grad, metrics = gradients(run, fsdp, tp, accumulation=parts)
    assert 0.9 < metrics["taught"] <= 1.0
    assert metrics["loss/next_byte"] > 0.1 and metrics["weight/next_byte"] > 0.0
    assert_near(metrics, of_one_device[1], 1e-5)
    assert_near(grad, of_one_device[0], 1e-5)


def test_no_array_has_a_time_axis_and_the_teachers_vocabulary(run, monkeypatch):
    """Nor, next to a time axis, as many as a tenth of its entries: only the student's, and a window."""
    monkeypatch.setattr(head, "BLOCK_ENTRIES", 100)
    monkeypatch.setattr(head, "BLOCK_ELEMENTS", 100 * 40)
    trained, frozen, batch = run
    config = settings(losses=LOSSES)
    layout = specs(trained, make_mesh(1, 1))
    mapped = shard_map(
        functools.partial(train.gradients, config.losses, config.compute),
        mesh=make_mesh(1, 1),
        in_specs=(layout, specs(frozen, make_mesh(1, 1)), jax.tree.map(lambda _: ROWS, batch)),
        out_specs=(layout, P()),
    )
    rows = frozen.teacher_mask.exists.shape[0]
    shapes = {
        tuple(v.aval.shape)
        for e in equations(jax.make_jaxpr(mapped)(trained, frozen, batch).jaxpr)
        for v in e.outvars
        if hasattr(v.aval, "shape")
    }
    assert any(100 in shape for shape in shapes)
    assert not [shape for shape in shapes if rows in shape and set(shape) & {24, 48, 8 * 24, 8 * 48}]


def test_what_is_refused():
    with pytest.raises(InputError, match="is for byte students"):
        prefixes.find_prefixes(vocabulary("gemma"), vocabulary("llama"), 400, 400)
    nothing = dataclasses.replace(vocabulary("llama"), token_bytes=(b"",) * 10)
    with pytest.raises(InputError, match="spells no bytes"):
        prefixes.find_prefixes(nothing, vocabulary("bytes of llama"), 10, 264)
    with pytest.raises(InputError, match="--losses.tau is for alm, which has weight 0"):
        LossConfig(alm=0.0, next_byte=1.0, tau=5.0).check()
    with pytest.raises(InputError, match="--losses.latents-norm is for latents, which has weight 0"):
        LossConfig(latents_norm="l1").check()


def test_special_tokens_that_the_student_lacks_are_named():
    found = prefixes.find_prefixes(vocabulary("llama"), vocabulary("bytes of gemma"), 400, 264)
    assert "<|start_header_id|>" in found.missing and "<|eot_id|>" not in found.missing  # eos is paired with eos
    own = prefixes.find_prefixes(vocabulary("llama"), vocabulary("bytes of llama"), 400, 264)
    assert own.missing == ()

"""Several texts in a row read as each would alone: batches, losses and gradients; which texts a row gets."""

import dataclasses
import functools
import json
import random
import re

import configs
import equinox as eqx
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from test_next_byte import PIECES, plain, sides
from test_step import QUICK, TEACHER, assert_near, parameters, settings, slow
from test_train import DATE, TINY, make_files

import train
from minalm.batches import make_batch, make_packed_batch, sizes_of
from minalm.distill.losses import LossConfig
from minalm.errors import InputError
from minalm.huggingface.folder import GenerationConfig
from minalm.huggingface.loaded import LoadedModel
from minalm.models.config import BolmoConfig, ModelConfig
from minalm.models.head import PrefixTree, VocabularyMask
from minalm.models.kinds import abstract
from minalm.models.transformer import leaves
from minalm.packing import Sizes, pack, place
from minalm.parallel.mesh import ROWS, P, make_mesh, shard, shard_map, shard_rows, specs
from minalm.run.models import Models, load_models
from minalm.run.texts import DataConfig, check_packing, load_texts
from minalm.tokenization.suffixes import longest_suffix

TEXTS = [*PIECES[:2], plain("the user")[:2], plain("\u65e5 model")[:2], *PIECES[3:], plain(" end"), (), plain("two\n")]
STUDENT, TEACHER_SIDE = sides("gemma", 64, 30)
STUDENT = STUDENT._replace(suffixes=longest_suffix(TEACHER_SIDE.vocabulary, STUDENT.vocabulary))
PADS = STUDENT.vocabulary.pad_id, TEACHER_SIDE.vocabulary.pad_id
PACKED_ROWS = 4


@pytest.fixture(scope="module")
def both():
    """(one text a row, the same packed, where each text is)."""
    batch, sizes = make_batch(TEXTS, STUDENT, TEACHER_SIDE), sizes_of(TEXTS, STUDENT, TEACHER_SIDE)
    layout = place(sizes, (64, 30), PACKED_ROWS)
    assert max(map(len, layout)) >= 3 and sorted(sum(layout, [])) == [*range(10)][:8] + [9]
    return batch, pack(batch, sizes, layout, PADS), sizes, layout


# --- on the host --------------------------------------------------------------------------------------------------


def test_each_text_of_a_packed_batch_is_what_it_was_alone(both):
    batch, packed, sizes, layout = both
    assert [leaf.shape[1:] for leaf in jax.tree.leaves(batch.chunks)] == [
        leaf.shape[1:] for leaf in jax.tree.leaves(eqx.tree_at(lambda c: c.text_end, packed.chunks, None))
    ]
    for row, texts in enumerate(layout):
        ours = theirs = chunk = 0
        for number, text in enumerate(texts):
            n, m, k = sizes.student[text], sizes.teacher[text], sizes.chunks[text]
            for side, tokens, start, size in (
                (batch.student, packed.student, ours, n),
                (batch.teacher, packed.teacher, theirs, m),
            ):
                inside = np.s_[row, start : start + size]
                for name in ("inputs", "targets", "weight", "suffix"):
                    if getattr(side, name) is not None:
                        np.testing.assert_array_equal(getattr(tokens, name)[inside], getattr(side, name)[text, :size])
                assert (tokens.segments[inside] == number).all()
                assert tokens.weight[row, start + size - 1] == 0.0  # what follows is another text
            for found, alone, start, shift, size in (
                (packed.chunks.student_chunk, batch.chunks.student_chunk, ours, chunk, n),
                (packed.chunks.teacher_chunk, batch.chunks.teacher_chunk, theirs, chunk, m),
                (packed.chunks.student_chunk_end, batch.chunks.student_chunk_end, chunk, ours, k),
                (packed.chunks.teacher_chunk_end, batch.chunks.teacher_chunk_end, chunk, theirs, k),
                (packed.bytes.within, batch.bytes.within, ours, theirs, n),
                (packed.bytes.after, batch.bytes.after, ours, theirs, n),
            ):
                expected = np.where(alone[text, :size] < 0, -1, alone[text, :size] + shift)
                np.testing.assert_array_equal(found[row, start : start + size], expected)
            assert packed.chunks.text_end[row, chunk : chunk + k].tolist() == [False] * (k - 1) + [True]
            ours, theirs, chunk = ours + n, theirs + m, chunk + k
        assert (packed.student.weight[row, ours:] == 0).all() and (packed.chunks.student_chunk[row, ours:] == -1).all()
        assert (packed.student.segments[row, ours:] == -1).all()
    assert packed.student.weight.sum() == batch.student.weight.sum() > 0
    assert packed.chunks.text_bytes.sum() == batch.chunks.text_bytes.sum()
    whole = make_packed_batch(TEXTS, STUDENT, TEACHER_SIDE, PACKED_ROWS)
    for found, expected in zip(jax.tree.leaves(whole), jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_without_a_teacher():
    packed = make_packed_batch(TEXTS, STUDENT, None, 5)
    assert packed.teacher is None and packed.bytes is None and packed.left_out.sum() == 0
    np.testing.assert_array_equal(packed.chunks.student_chunk, packed.chunks.teacher_chunk)


@given(
    use=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10)), min_size=1, max_size=30),
    rows=st.integers(1, 5),
)
@examples(deadline=None, max_examples=60)
def test_places(use, rows):
    """Of the texts, a beginning of them as they come; each once, and in no row more than it holds."""
    ours, theirs = (np.array(column) for column in zip(*use))
    layout = place(Sizes(ours, theirs, ours), (20, 10), rows)
    assert len(layout) == rows
    placed = sorted(sum(layout, []))
    filled = [text for text in range(len(use)) if ours[text] or theirs[text]]
    assert placed == filled[: len(placed)]
    for texts in layout:
        assert ours[texts].sum() <= 20 and theirs[texts].sum() <= 10
    if len(placed) < len(filled):
        assert len(placed) >= min(rows, len(filled))  # at least one a row


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The text of a tiny run with packed rows, from documents of several lengths."""
    folder = tmp_path_factory.mktemp("packed")
    files = make_files(folder)
    draw = random.Random(0)
    lines = [json.dumps({"text": "the cat " * draw.randrange(1, 8)}) for _ in range(300)]
    (folder / "short.jsonl").write_text("\n".join(lines))
    config = configs.change(TINY, teacher=files.untied, data=(folder / "short.jsonl",), packing=True)
    models = load_models(config.student, 64, 0)
    return load_texts(config.data, models, 7, make_mesh(1, 1), DATE, config.losses)


def test_packed_batches_are_a_function_of_the_step(texts):
    batches = {step: texts.batch(step) for step in (5, 0, 5)}
    again = texts.batch(0)
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(batches[0]), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert batches[5].student.inputs.shape == (4, 64) and (batches[5].student.inputs != again.student.inputs).any()
    (note,) = [note for note in texts.notes if note.startswith("64 rows hold ")]
    used = [(texts.batch(step).student.segments >= 0).mean() for step in range(16)]
    said, unpacked = (int(share) for share in re.findall(r"(\d+)%", note)[:2])
    assert abs(said - 100 * np.mean(used)) < 3 and said > unpacked + 20 and min(used) > 0.6
    (held_out,) = {leaf.shape for leaf in jax.tree.leaves(texts.rows(texts.training.batch(0, 0, 4)).student.weight)}
    assert held_out == (4, 64)  # what is evaluated is not packed


def test_packed_rows_read_their_texts_in_their_order(texts):
    """16 steps have those of the permutation's next places, but for a few at their end that found no room."""
    count = texts.packer.count
    assert texts.places(17) == [texts.training.where(n) for n in texts.training.order(7, 1, count).tolist()]
    for group in range(3):
        pieces, found = texts.training.batch(7, group, count), []
        for step in range(16 * group, 16 * group + 16):
            batch = texts.batch(step)
            for row, segments in zip(batch.student.inputs, batch.student.segments):
                found += [
                    bytes(token for token in row[segments == number].tolist() if token < 256).decode()
                    for number in range(segments.max() + 1)
                ]
        assert 0.95 * count <= len(found) <= count
        assert sorted(found) == sorted(piece[1].content for piece in pieces[: len(found)])


def test_models_that_do_not_keep_texts_apart_are_refused():
    config = ModelConfig(52, 24, 36, 2, 4, 2, 6, (None, None))
    subwords = LoadedModel.of_shapes(abstract(config))
    bolmo = LoadedModel.of_shapes(abstract(BolmoConfig(260, 52, config, 2, 36)))
    trained = jax.tree.map(lambda _: True, subwords.model)
    data = DataConfig(packing=True)
    check_packing(data, Models(subwords, subwords, trained, GenerationConfig()))
    check_packing(DataConfig(), Models(bolmo, subwords, trained, GenerationConfig()))
    with pytest.raises(InputError, match="the student is a Bolmo, which would read the texts of a row as one"):
        check_packing(data, Models(bolmo, subwords, trained, GenerationConfig()))


# --- in a step ----------------------------------------------------------------------------------------------------

ALL = LossConfig(sft=0.5, alm=1.0, next_byte=1.0, latents=1.0, latents_layers="all", gamma=0.5)


@pytest.fixture(scope="module")
def models():
    """(what is trained, train.Frozen) of a byte student with an expansion and its teacher, both random."""
    rows, outcomes = len(TEACHER_SIDE.prefixes.slot), len(TEACHER_SIDE.prefixes.outcomes)
    theirs = dataclasses.replace(TEACHER, vocab_size=rows)
    ours = dataclasses.replace(TEACHER, vocab_size=outcomes, tied=False, expansion_size=rows)
    masks = [
        VocabularyMask(np.arange(size) < vocab.size, vocab.boundary_mask(size))
        for size, vocab in ((outcomes, STUDENT.vocabulary), (rows, TEACHER_SIDE.vocabulary))
    ]
    trained = parameters(ours, 0)
    none = jax.tree.map(lambda _: None, trained)
    return trained, train.Frozen(none, parameters(theirs, 1), *masks, PrefixTree.of(TEACHER_SIDE.prefixes))


@functools.lru_cache
def program(losses, fsdp, tp, parts, packed):
    config, mesh = settings(losses=losses, accumulation=parts), make_mesh(fsdp, tp)

    def run(trained, frozen, batch):
        mapped = shard_map(
            functools.partial(train.gradients, config.losses, config.compute),
            mesh=mesh,
            in_specs=(specs(trained, mesh), specs(frozen, mesh), jax.tree.map(lambda _: ROWS, batch)),
            out_specs=(specs(trained, mesh), P()),
        )
        return mapped(trained, frozen, batch)

    return mesh, jax.jit(run, compiler_options=QUICK)


def gradients(models, batch, losses=ALL, fsdp=1, tp=1, parts=1):
    """The gradient's leaves by name, and the metrics."""
    mesh, run = program(losses, fsdp, tp, parts, batch.student.segments is not None)
    trained, frozen = models
    with jax.default_matmul_precision("highest"):
        grad, metrics = run(shard(trained, mesh), shard(frozen, mesh), shard_rows(batch, mesh))
    return jax.device_get((leaves(grad), metrics))


def alone(batch, text):
    """The batch in which nothing counts but one text."""
    others = np.arange(len(TEXTS)) != text
    chunks, places = batch.chunks, batch.bytes

    def without(values, fill):
        return np.where(others[:, None], fill, values).astype(values.dtype)

    return eqx.tree_at(
        lambda b: (
            b.student.weight,
            *(b.chunks.student_chunk, b.chunks.teacher_chunk, b.chunks.student_chunk_end, b.chunks.teacher_chunk_end),
            *(b.chunks.text_bytes, b.bytes.within, b.bytes.after),
        ),
        batch,
        (
            without(batch.student.weight, 0),
            *(without(values, -1) for values in (chunks.student_chunk, chunks.teacher_chunk)),
            *(without(values, -1) for values in (chunks.student_chunk_end, chunks.teacher_chunk_end)),
            *(without(chunks.text_bytes, 0), without(places.within, -1), without(places.after, -1)),
        ),
    )


def assert_same(found, expected):
    (grad, metrics), (wanted, numbers) = found, expected
    assert_near(metrics | {"left_out": 1.0}, numbers | {"left_out": 1.0}, 1e-5)
    assert_near(grad, wanted, 1e-5)


def test_losses_and_gradients_are_those_of_unpacked_rows(both, models):
    batch, packed, _, _ = both
    expected = gradients(models, batch)
    assert_same(gradients(models, packed), expected)
    # It is the boundaries between texts that make it so.
    for name in ("segments", "text_end"):
        leaf = (
            (lambda b: (b.student.segments, b.teacher.segments)) if name == "segments" else lambda b: b.chunks.text_end
        )
        blind = jax.tree.map(np.zeros_like, leaf(packed))
        _, metrics = gradients(models, eqx.tree_at(leaf, packed, blind))
        assert abs(metrics["loss/alm"] - expected[1]["loss/alm"]) > 1e-3 * expected[1]["loss/alm"], name


@pytest.mark.parametrize("text", [slow(0), slow(4), slow(1), slow(2), slow(3), slow(5), slow(6), slow(7), slow(9)])
def test_each_text_gives_what_it_gives_alone(both, models, text):
    batch, _, sizes, layout = both
    if not batch.student.weight[text].any():
        pytest.skip("nothing counts in it")
    one = alone(batch, text)
    assert_same(gradients(models, pack(one, sizes, layout, PADS)), gradients(models, one))


@pytest.mark.parametrize("chunks", ("unconstrained", "space"))
@pytest.mark.slow
def test_chunkings(both, models, chunks):
    losses = LossConfig(sft=0.5, alm=1.0, latents=1.0, chunks=chunks)
    batch, packed, _, _ = both
    assert_same(gradients(models, packed, losses), gradients(models, batch, losses))


@pytest.mark.parametrize("fsdp, tp, parts", [slow(4, 2, 1), slow(2, 4, 1), slow(1, 1, 2)])
def test_packed_rows_on_a_mesh_and_in_parts(both, models, fsdp, tp, parts):
    _, packed, _, _ = both
    assert_same(gradients(models, packed, ALL, fsdp, tp, parts), gradients(models, packed))

"""Batches: rows, targets, chunks, what is left out; reading ahead."""

import json
import threading
import time

import jax
import numpy as np
import pytest
import small_tokenizers as small
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import vocabulary
from tokenizers import pre_tokenizers

from minalm.batches import Side, make_batch, read_ahead, why_left_out
from minalm.text.documents import Markup, Segment, Special
from minalm.tokenization.align import align
from minalm.tokenization.chats import ChatReader
from minalm.tokenization.suffixes import longest_suffix
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.vocabulary import byte_vocabulary


def plain(text):
    return (Segment(Special("bos")), Segment(text), Segment(Special("eos")))


def batch_of(pieces, student, teacher, suffixes, student_length, teacher_length):
    sides = Side(student, suffixes, student_length), Side(teacher, None, teacher_length)
    return make_batch(pieces, sides[0], None if teacher is None else sides[1])


def special(*words):
    return Segment(Markup(words, words), False)


def chat(question, answer):
    """As Gemma's template writes it, the answer alone counting."""
    opening = (
        special("<bos>"),
        special("<start_of_turn>"),
        Segment("user\n" + question, False),
        special("<end_of_turn>"),
    )
    middle = Segment("\n", False), special("<start_of_turn>"), Segment("model\n", False), Segment(answer)
    end = "<end_of_turn>"
    return *opening, *middle, Segment(Markup((end,), (end,))), Segment("\n")


PIECES = [plain("the user said"), chat("the 日本 model?\n\n\n", " hello"), (), plain("")]
BYTES = "bytes of gemma"


def test_rows_and_targets():
    student, teacher = vocabulary(BYTES), vocabulary("gemma")
    batch = batch_of(PIECES, student, teacher, longest_suffix(teacher, student), 40, 20)
    assert not batch.left_out.any()
    for tokens, side, length in ((batch.student, student, 40), (batch.teacher, teacher, 20)):
        for row, encoding in enumerate(side.encode(PIECES)):
            ids = encoding.ids[:length].tolist()
            padded = ids + [side.pad_id] * (length - len(ids))
            assert tokens.inputs[row].tolist() == padded
            assert tokens.targets[row].tolist() == [*padded[1:], side.pad_id]
            weight = encoding.loss_mask[1:length].astype(float).tolist()
            assert tokens.weight[row].tolist() == weight + [0.0] * (length - len(weight))
    np.testing.assert_array_equal(batch.student.suffix, longest_suffix(teacher, student)(batch.student.inputs))
    assert batch.teacher.suffix is None
    whole = batch_of(PIECES, student, teacher, None, 99, 99)
    assert whole.student.weight[1].sum() == 8  # " hello", end of turn, newline; the prompt does not count


def test_chunks_belong_to_targets():
    student, teacher = vocabulary(BYTES), vocabulary("gemma")
    chunks = batch_of(PIECES, student, teacher, None, 40, 20).chunks
    for row, (ours, theirs) in enumerate(zip(student.encode(PIECES), teacher.encode(PIECES), strict=True)):
        aligned = align(ours.cut(40), theirs.cut(20))
        used = len(aligned.student_chunk_end)
        for chunk, chunk_end, of_token, last in (
            (chunks.student_chunk, chunks.student_chunk_end, aligned.student_chunk, aligned.student_chunk_end),
            (chunks.teacher_chunk, chunks.teacher_chunk_end, aligned.teacher_chunk, aligned.teacher_chunk_end),
        ):
            assert chunk[row, : max(len(of_token) - 1, 0)].tolist() == of_token[1:].tolist()
            assert (chunk[row, max(len(of_token) - 1, 0) :] == -1).all()
            assert chunk_end[row, :used].tolist() == last.tolist() and (chunk_end[row, used:] == -1).all()
            for number in range(1, used):  # the distribution at `close` is the one after the chunk's last target
                assert np.flatnonzero(chunk[row] == number)[-1] + 1 == chunk_end[row, number]
    assert chunks.student_chunk_end[0, 0] == 0 and not (chunks.student_chunk[0] == 0).any()  # bos


def test_before_space_and_text_bytes():
    student, teacher = vocabulary(BYTES), vocabulary("gemma")
    chunks = batch_of([plain("the user\n\n\nmodel the")], student, teacher, None, 60, 60).chunks
    #         bos   "the"  " "    "user" "\n"*3 "model" " the" eos
    text_bytes = [0, 3, 1, 4, 3, 5, 4, 0]
    before = [True, True, False, False, False, True, False, True]
    assert chunks.text_bytes[0].tolist() == text_bytes + [0] * 52
    assert chunks.before_space[0].tolist() == before + [False] * 52
    # Where the row ends, what follows in the piece decides, not the padding.
    cut = batch_of([plain("the user\n\n\nmodel the")], student, teacher, None, 9, 60).chunks
    assert cut.before_space[0].tolist() == before[:4] + [False] * 5
    cut = batch_of([plain("the user\n\n\nmodel the")], student, teacher, None, 60, 5).chunks
    assert cut.before_space[0].tolist() == before[:5]
    # No space follows the last chunk of a piece.
    part = batch_of([plain("the user")[:2]], student, teacher, None, 60, 60).chunks
    assert part.before_space[0, :4].tolist() == [True, True, False, False]
    # It must hold on both sides: the student's next token is "s", where the teacher's would be " s".
    assert not batch_of([plain("ths")], student, teacher, None, 9, 9).chunks.before_space[0, 1]


def test_the_chunk_of_a_rows_first_token_has_no_targets():
    qwen, gemma = vocabulary("qwen"), vocabulary("gemma")  # Qwen starts with "the": no probability, where Gemma has one
    for student, teacher in ((qwen, gemma), (gemma, qwen)):
        chunks = batch_of([plain("the user")], student, teacher, None, 9, 9).chunks
        assert not (chunks.student_chunk == 0).any() and not (chunks.teacher_chunk == 0).any()
        the = len(qwen.encode([(Segment("the"),)])[0].ids)
        assert chunks.student_chunk_end[0, 0] == (the - 1 if student is qwen else 1)
        assert (chunks.student_chunk == 1).any() and (chunks.teacher_chunk == 1).any()


def test_what_a_side_cannot_spell_is_left_out(tmp_path):
    letters = set(pre_tokenizers.ByteLevel.alphabet()) - {chr(0xF4)}
    teacher = load_vocabulary(small.save(tmp_path / "teacher", small.byte_level(alphabet=letters), small.LLAMA))
    student = byte_vocabulary(teacher)
    pieces = [plain("the"), plain("a\U00100000b"), plain("end")]  # UTF-8: f4 80 80 80
    batch = batch_of(pieces, student, teacher, longest_suffix(teacher, student), 20, 10)
    assert batch.left_out.tolist() == [False, True, False]
    for tokens, side in ((batch.student, student), (batch.teacher, teacher)):
        assert (tokens.inputs[1] == side.pad_id).all() and (tokens.weight[1] == 0).all()
        assert (tokens.weight[[0, 2]] > 0).any(axis=1).all()
    assert (batch.chunks.student_chunk_end[1] == -1).all() and (batch.chunks.student_chunk[1] == -1).all()
    alone = batch_of([pieces[0], pieces[2]], student, teacher, None, 20, 10)
    np.testing.assert_array_equal(batch.chunks.teacher_chunk[[0, 2]], alone.chunks.teacher_chunk)


@pytest.mark.parametrize("prefix_space", (False, True))
def test_why_a_text_is_left_out(tmp_path, prefix_space):
    """The first place that differs, whether or not the tokenizer puts a space before a text."""
    path = small.save(tmp_path / "t", small.sentencepiece(prefix_space), ["<s>"], bos_token="<s>")
    spec = json.loads((path / "tokenizer.json").read_text())
    splits = {"type": "Split", "pattern": {"String": "x"}, "behavior": "Removed", "invert": False}
    (path / "tokenizer.json").write_text(json.dumps(spec | {"pre_tokenizer": splits}))
    side = Side(load_vocabulary(path), None, 20)
    whole = Side(byte_vocabulary(side.vocabulary), None, 20)
    for text, has, spell in (
        ("hello there, all the x world", ", all the x world", ", all the  world"),
        ("日本語日本語日本語日本語x日本", "語日本語日本語日本語x日本", "語日本語日本語日本語日本"),  # whole characters
        ("the end x", "the end x", "the end "),
    ):
        expected = f"where the text has {has!r}, the tokens of {path} spell {spell!r}"
        for student, teacher in ((side, None), (whole, side), (side, whole)):
            assert why_left_out(plain(text), student, teacher) == expected
    assert why_left_out(plain("hello there"), side, whole) == ""


def test_texts_are_normalised_for_both():
    pieces = [plain("caf" + "e\u0301")]
    for student, teacher in (("bytes of llama", "qwen"), ("qwen", "llama")):
        student, teacher = vocabulary(student), vocabulary(teacher)
        batch = batch_of(pieces, student, teacher, None, 20, 20)
        assert batch.left_out.tolist() == [False]
        for tokens, side in ((batch.student, student), (batch.teacher, teacher)):
            assert side.decode(tokens.inputs[0][tokens.inputs[0] < 256 + 64]) == "caf\u00e9"


def test_without_a_teacher():
    student = vocabulary(BYTES)
    batch = batch_of(PIECES, student, None, None, 12, 99)
    assert batch.teacher is None and batch.student.suffix is None
    assert batch.chunks.student_chunk_end.shape == (4, 12) and batch.chunks.teacher_chunk.shape == (4, 12)
    np.testing.assert_array_equal(batch.chunks.student_chunk, batch.chunks.teacher_chunk)
    assert batch.chunks.student_chunk[0].tolist() == [*range(1, 12), -1]
    assert batch.chunks.text_bytes[0].tolist() == [0] + [1] * 11


TEXTS = st.lists(st.sampled_from(["the", " ", "日本", "\n\n\n", "x", "user", "é"]), max_size=12).map("".join)


@given(texts=st.lists(TEXTS, min_size=1, max_size=4), lengths=st.tuples(st.integers(1, 30), st.integers(1, 20)))
@settings(max_examples=100, deadline=None)
def test_shapes_depend_on_lengths_only_and_indices_stay_inside(texts, lengths):
    student, teacher = vocabulary(BYTES), vocabulary("gemma")
    batch = batch_of([plain(text) for text in texts], student, teacher, longest_suffix(teacher, student), *lengths)
    rows, capacity = len(texts), min(lengths)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((batch.student, batch.teacher))]
    integer, real = np.dtype(np.int32), np.dtype(np.float32)
    assert shapes == [((rows, lengths[0]), kind) for kind in (integer, integer, real, integer)] + [
        ((rows, lengths[1]), kind) for kind in (integer, integer, real)
    ]
    chunks = batch.chunks
    assert chunks.student_chunk.shape == (rows, lengths[0]) and chunks.teacher_chunk.shape == (rows, lengths[1])
    for side, length in ((chunks.student_chunk_end, lengths[0]), (chunks.teacher_chunk_end, lengths[1])):
        assert side.shape == (rows, capacity) and side.max() < length and side.dtype == integer
    for row in range(rows):
        used = (chunks.student_chunk_end[row] >= 0).sum()
        assert used == (chunks.teacher_chunk_end[row] >= 0).sum()
        student_targets, teacher_targets = (
            set(c[row].tolist()) - {-1} for c in (chunks.student_chunk, chunks.teacher_chunk)
        )
        assert (
            student_targets == teacher_targets == set(range(1, used))
        )  # every chunk but bos has targets on both sides
        assert chunks.text_bytes[row, used:].sum() == 0 and not chunks.before_space[row, used:].any()


def test_a_batch_of_the_headline_runs_fits_in_2_megabytes():
    student, teacher = vocabulary(BYTES), vocabulary("gemma")
    batch = batch_of([plain("the user")] * 32, student, teacher, longest_suffix(teacher, student), 2048, 512)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(batch)) <= 2_000_000


def test_a_byte_student_of_a_longer_control_list():
    teacher = vocabulary("gemma")
    student = byte_vocabulary(teacher, [*teacher.template_special, "user", "model"])
    messages = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "model"}]
    piece = ChatReader(student, teacher, False, "2026-01-01")({"messages": messages})
    batch = batch_of([piece], student, teacher, longest_suffix(teacher, student), 30, 30)
    assert (batch.student.inputs == student.special["user"]).sum() == 1  # in the header only
    user = batch.student.inputs == student.special["user"]
    assert teacher.token_bytes[batch.student.suffix[user][0]] == b"user"


def test_read_ahead_is_in_order_and_ahead():
    made = []
    steps = read_ahead(lambda step: made.append(step) or step * step, start=3, ahead=2)
    assert [next(steps) for _ in range(4)] == [9, 16, 25, 36]
    deadline = time.monotonic() + 10
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [3, 4, 5, 6, 7, 8]  # two more than were asked for, and no third
    steps.close()


def test_read_ahead_works_while_the_caller_does():
    begun = threading.Event()

    def make(step):
        if step == 1:
            begun.set()
        return step

    steps = read_ahead(make, start=0, ahead=1)
    assert next(steps) == 0
    assert begun.wait(10)
    steps.close()


def test_read_ahead_raises_where_the_result_is_due():
    def make(step):
        if step == 2:
            raise RuntimeError("step two")
        return step

    steps = read_ahead(make, start=0, ahead=3)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(RuntimeError, match="step two"):
        next(steps)


def test_read_ahead_closes_its_thread():
    steps = read_ahead(lambda step: step, start=0)
    next(steps)
    assert any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
    steps.close()
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())

"""Alignment against a walk with two pointers, and cases that one can check by eye."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import vocabulary

from minalm.text.documents import Piece, Segment, Special
from minalm.tokenization.align import align
from minalm.tokenization.vocabulary import Encoding, Vocabulary, byte_vocabulary, with_special_tokens

PAIRS = {  # (student, teacher), of which some lack a part: Qwen has no bos, Llama 2 may have no pad
    "bytes": lambda: (vocabulary("bytes of llama"), vocabulary("llama")),
    "bytes, longer list": lambda: (byte_vocabulary(vocabulary("gemma"), ["<bos>", "user"]), vocabulary("gemma")),
    "other template": lambda: (vocabulary("gemma"), vocabulary("llama")),
    "no bos": lambda: (vocabulary("qwen"), vocabulary("gemma")),
    "no bos in the teacher": lambda: (vocabulary("llama"), vocabulary("qwen")),
    "foreign special": lambda: (with_special_tokens(vocabulary("qwen"), vocabulary("llama")), vocabulary("llama")),
    "itself": lambda: (vocabulary("gemma"), vocabulary("gemma")),
}
WORDS = ["the", " the", " user", "user", "\n\n\n", " ", "  ", "日本語", "日", "é", "<bos>", "model", "x", "y", "\u2581"]
PARTS = ("bos", "header_open", "system", "user", "assistant", "header_close", "end_of_turn", "eos")
SEGMENTS = st.builds(
    Segment,
    st.one_of(st.lists(st.sampled_from(WORDS), max_size=6).map("".join), st.sampled_from(PARTS).map(Special)),
    st.booleans() | st.just(True),
)
PIECES = st.lists(SEGMENTS, max_size=8).map(tuple)


def tokens_by_segment(side: Vocabulary, piece: Piece) -> list[list[bytes | None]]:
    """The bytes that each token of each segment spells; None for tokens of a special part."""
    rows = []
    for content, _ in piece:
        if isinstance(content, Special):
            rows.append([None] * len(side.part_ids(content.part)))
        else:
            rows.append([side.token_bytes[i] for i in side.encode([(Segment(content),)])[0].ids])
    return rows


def walk(piece: Piece, student: Vocabulary, teacher: Vocabulary, lengths: tuple[int, int]):
    """(chunk of each token, last token of each chunk) of both sides, found by walking along the two token lists."""
    rows = [tokens_by_segment(side, piece) for side in (student, teacher)]
    chunks = [[], []]
    closes = [[], []]
    left = list(lengths)  # tokens that still fit

    def emit(side, tokens, chunk):
        chunks[side] += [chunk] * min(tokens, left[side])
        left[side] -= min(tokens, left[side])

    for (content, loss_mask), ours, theirs in zip(piece, *rows, strict=True):
        number = len(closes[0])
        if not loss_mask or not ours or not theirs:
            emit(0, len(ours), -1)
            emit(1, len(theirs), -1)
        elif isinstance(content, Special):
            whole = left[0] >= len(ours) and left[1] >= len(theirs)
            emit(0, len(ours), number if whole else -1)
            emit(1, len(theirs), number if whole else -1)
            if whole:
                closes[0].append(len(chunks[0]) - 1)
                closes[1].append(len(chunks[1]) - 1)
        else:
            queues = [ours[: left[0]], theirs[: left[1]]]
            pending, places = [0, 0], [0, 0]  # tokens since the last common end, bytes since the start of the text
            while queues[0] or queues[1]:
                side = 0 if places[0] <= places[1] else 1
                if not queues[side]:
                    break
                places[side] += len(queues[side].pop(0))
                pending[side] += 1
                if places[0] == places[1]:
                    for side in (0, 1):
                        emit(side, pending[side], len(closes[0]) if side == 0 else len(closes[1]))
                        closes[side].append(len(chunks[side]) - 1)
                        pending[side] = 0
            for side in (0, 1):
                emit(side, pending[side] + len(queues[side]), -1)
    return chunks, closes


@given(pair=st.sampled_from(sorted(PAIRS)), piece=PIECES, lengths=st.tuples(st.integers(0, 60), st.integers(0, 30)))
@settings(max_examples=500, deadline=None)
def test_equals_a_walk_with_two_pointers(pair, piece, lengths):
    student, teacher = PAIRS[pair]()
    (ours,), (theirs,) = student.encode([piece]), teacher.encode([piece])
    assert ours.round_trips and theirs.round_trips
    aligned = align(ours.cut(lengths[0]), theirs.cut(lengths[1]))
    chunks, closes = walk(piece, student, teacher, lengths)
    assert [aligned.student_chunk.tolist(), aligned.teacher_chunk.tolist()] == chunks
    assert [aligned.student_chunk_end.tolist(), aligned.teacher_chunk_end.tolist()] == closes


@given(pieces=st.lists(PIECES, max_size=4), kind=st.sampled_from(["bytes of gemma", "llama", "llama2", "qwen"]))
@settings(max_examples=100, deadline=None)
def test_a_batch_is_encoded_as_its_pieces_are(pieces, kind):
    ours = vocabulary(kind)
    pieces = [
        tuple(s for s in piece if isinstance(s.content, str) or s.content.part in ours.template) for piece in pieces
    ]
    for alone, together in zip((ours.encode([piece])[0] for piece in pieces), ours.encode(pieces), strict=True):
        for field, expected, got in zip(Encoding._fields, alone, together, strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=field)


def encoding(ends: list[int], segment: list[int], loss_mask: list[bool] | None = None) -> Encoding:
    zeros = np.zeros(len(ends), np.int32)
    loss_mask = [True] * len(ends) if loss_mask is None else loss_mask
    return Encoding(
        zeros, np.array(ends, np.int32), zeros, np.array(segment, np.int32), np.array(loss_mask, bool), True
    )


def test_pictures():
    # the text  a b c d e f g h
    # student  |a b|c|d e|f g h|        teacher |a|b c|d e|f|g h|
    aligned = align(encoding([2, 3, 5, 8], [0] * 4), encoding([1, 3, 5, 6, 8], [0] * 5))
    assert aligned.student_chunk.tolist() == [0, 0, 1, 2]
    assert aligned.teacher_chunk.tolist() == [0, 0, 1, 2, 2]
    assert aligned.student_chunk_end.tolist() == [1, 2, 3] and aligned.teacher_chunk_end.tolist() == [1, 2, 4]
    # a special part of two tokens against one of three: only their last tokens end anywhere
    aligned = align(encoding([-1, 1], [0, 0]), encoding([-1, -1, 1], [0, 0, 0]))
    assert aligned.student_chunk.tolist() == [0, 0] and aligned.teacher_chunk.tolist() == [0, 0, 0]
    # bos that the student has not; then the same token
    aligned = align(encoding([3], [1]), encoding([1, 3], [0, 1]))
    assert aligned.student_chunk.tolist() == [0] and aligned.teacher_chunk.tolist() == [-1, 0]
    # tokens of the middle segment do not count
    aligned = align(*[encoding([2, 3, 5], [0, 1, 2], [True, False, True])] * 2)
    assert aligned.student_chunk.tolist() == [0, -1, 1] and aligned.student_chunk_end.tolist() == [0, 2]
    # nothing at all
    aligned = align(encoding([], []), encoding([1, 2], [0, 1]))
    assert aligned.teacher_chunk.tolist() == [-1, -1] and aligned.teacher_chunk_end.tolist() == []

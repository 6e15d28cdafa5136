"""Alignment against a walk with two pointers, and cases that one can check by eye."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import vocabulary

from minalm.text.documents import Markup, Piece, Segment, Special
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
MARKUPS = {  # special tokens and text on each side, one side that writes nothing, tokens that only one side knows
    "bytes": ["<|eot_id|>", "<|start_header_id|>", "user", "\n\n", ""],
    "bytes, longer list": ["<end_of_turn>", "user", "\n", "<bos>", ""],
    "other template": ["<end_of_turn>", "<|eot_id|>", "<start_of_turn>", "user", ""],
    "no bos": ["<|im_end|>", "<end_of_turn>", "\n", ""],
    "no bos in the teacher": ["<|im_end|>", "<|eot_id|>", "\n\n", ""],
    "foreign special": ["<|eot_id|>", "<|start_header_id|>", "user", ""],
    "itself": ["<end_of_turn>", "<start_of_turn>", "model\n", ""],
}


def pieces_of(pair: str) -> st.SearchStrategy[Piece]:
    words = st.lists(st.sampled_from(MARKUPS[pair]), max_size=3).map(lambda found: tuple(filter(None, found)))
    content = st.one_of(
        st.lists(st.sampled_from(WORDS), max_size=6).map("".join),
        st.sampled_from([Special("bos"), Special("eos")]),
        st.builds(Markup, words, words),
    )
    return st.lists(st.builds(Segment, content, st.booleans() | st.just(True)), max_size=8).map(tuple)


def spelled(side: Vocabulary, piece: Piece, name: str) -> list[tuple[int, int | None, bool]]:
    """For each token the segment and the place in which it ends, and whether a segment counts that it is part of."""
    tokens: list[tuple[int, int | None, bool]] = []
    run: list[tuple[str, int, int, bool]] = []  # texts side by side, with segment, place and whether all places count
    place = 0

    def flush():
        ends = []  # of each byte
        for text, segment, start, is_text in run:
            size = len(text.encode())
            inner = [start + 1 + n for n in range(size)] if is_text else [None] * (size - 1) + [start]
            ends += [(segment, end) for end in inner]
        (encoding,) = side.encode([(Segment("".join(text for text, *_ in run)),)])
        at = 0
        for i in encoding.ids.tolist():
            covered = ends[at : at + len(side.token_bytes[i])]
            at += len(side.token_bytes[i])
            tokens.append((*covered[-1], any(piece[segment].loss_mask for segment, _ in covered)))
        run.clear()

    for number, (content, counts) in enumerate(piece):
        if isinstance(content, str):
            if content:
                run.append((content, number, place, True))
            place += len(content.encode())
            continue
        place += 1
        if isinstance(content, Special):
            words = [word for word in [side.named(content.part)] if word]
        else:
            words = content.student if name == "student" else content.teacher
        for n, word in enumerate(words, start=1):
            end = place if n == len(words) else None
            if word in side.special:
                flush()
                tokens.append((number, end, counts))
            else:
                run.append((word, number, end, False))
    flush()
    return tokens


def writes(side: Vocabulary, content: str | Special | Markup, name: str) -> bool:
    if isinstance(content, Special):
        return side.named(content.part) is not None
    return isinstance(content, str) or bool(content.student if name == "student" else content.teacher)


def walk(piece: Piece, student: Vocabulary, teacher: Vocabulary, lengths: tuple[int, int]):
    """(chunk of each token, last token of each chunk) of both sides, found by walking along the two token lists."""
    sides = ((student, "student"), (teacher, "teacher"))
    rows = [spelled(side, piece, name)[:length] for (side, name), length in zip(sides, lengths)]
    others = [[writes(*sides[1 - k][:1], content, sides[1 - k][1]) for content, _ in piece] for k in (0, 1)]
    ends = [{end for segment, end, _ in row if other[segment]} - {None} for row, other in zip(rows, others)]
    chunks: list[list[int]] = [[], []]
    for k in (0, 1):
        number = 0
        for segment, end, _ in rows[k]:
            chunks[k].append(number if others[k][segment] else -1)
            number += others[k][segment] and end in ends[0] & ends[1]
        chunks[k] = [chunk if chunk < number else -1 for chunk in chunks[k]]
    counting = {chunk for k in (0, 1) for chunk, (*_, counts) in zip(chunks[k], rows[k]) if counts} - {-1}
    new = {chunk: number for number, chunk in enumerate(sorted(counting))}
    chunks = [[new.get(chunk, -1) for chunk in row] for row in chunks]
    return chunks, [[len(row) - 1 - row[::-1].index(chunk) for chunk in range(len(new))] for row in chunks]


@given(data=st.data(), pair=st.sampled_from(sorted(PAIRS)), lengths=st.tuples(st.integers(0, 60), st.integers(0, 30)))
@settings(max_examples=500, deadline=None)
def test_equals_a_walk_with_two_pointers(data, pair, lengths):
    student, teacher = PAIRS[pair]()
    piece = data.draw(pieces_of(pair))
    (ours,), (theirs,) = student.encode([piece], "student"), teacher.encode([piece], "teacher")
    assert ours.round_trips and theirs.round_trips
    aligned = align(ours.cut(lengths[0]), theirs.cut(lengths[1]))
    chunks, closes = walk(piece, student, teacher, lengths)
    assert [aligned.student_chunk.tolist(), aligned.teacher_chunk.tolist()] == chunks
    assert [aligned.student_chunk_end.tolist(), aligned.teacher_chunk_end.tolist()] == closes


@given(
    pieces=st.lists(pieces_of("other template"), max_size=4),
    kind=st.sampled_from(["bytes of gemma", "llama", "llama2", "qwen"]),
)
@settings(max_examples=100, deadline=None)
def test_a_batch_is_encoded_as_its_pieces_are(pieces, kind):
    ours = vocabulary(kind)
    for alone, together in zip((ours.encode([piece])[0] for piece in pieces), ours.encode(pieces), strict=True):
        for field, expected, got in zip(Encoding._fields, alone, together, strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=field)


def encoding(
    ends: list[int], segment: list[int], loss_mask: list[bool] | None = None, written: tuple[bool, ...] = (True,) * 3
) -> Encoding:
    zeros = np.zeros(len(ends), np.int32)
    loss_mask = [True] * len(ends) if loss_mask is None else loss_mask
    columns = np.array(ends, np.int32), zeros, np.array(segment, np.int32), np.array(loss_mask, bool)
    return Encoding(zeros, *columns, np.array(written, bool), True)


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
    aligned = align(encoding([3], [1], written=(False, True)), encoding([1, 3], [0, 1], written=(True, True)))
    assert aligned.student_chunk.tolist() == [0] and aligned.teacher_chunk.tolist() == [-1, 0]
    # tokens of the middle segment do not count
    aligned = align(*[encoding([2, 3, 5], [0, 1, 2], [True, False, True])] * 2)
    assert aligned.student_chunk.tolist() == [0, -1, 1] and aligned.student_chunk_end.tolist() == [0, 2]
    # nothing at all
    aligned = align(encoding([], []), encoding([1, 2], [0, 1]))
    assert aligned.teacher_chunk.tolist() == [-1, -1] and aligned.teacher_chunk_end.tolist() == []

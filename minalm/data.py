"""Pieces of text -> batches of fixed shape, numpy arrays on the host, prepared ahead of their use."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int64

from minalm.align import align
from minalm.ngrams import LongestSuffix
from minalm.text import Piece
from minalm.types import AlignedChunks, Batch, Tokens
from minalm.vocab import Encoding, Vocabulary

T = TypeVar("T")


class Side(NamedTuple):
    """How one side of a batch reads text."""

    vocabulary: Vocabulary
    ngrams: LongestSuffix | None  # of a model with an input expansion
    length: int  # tokens of a row


def make_batch(
    pieces: Sequence[Piece], student: Side, teacher: Side | None
) -> tuple[Batch, Bool[np.ndarray, " batch"]]:
    """One row for each piece, cut at each side's length, and which pieces were left out.

    A piece is left out if a tokenizer cannot spell its bytes: its row is empty, with weight 0 and no chunks. Texts are
    put through the teacher's and then the student's Unicode normaliser before either reads them. Without a teacher the
    student's tokens are aligned with themselves. A chunk that holds the first token of a row on either side has no
    log-probability there: it keeps its close, and no target belongs to it.
    """
    for side in (teacher, student):
        if side is not None and side.vocabulary.normalizer is not None:
            pieces = [_normalized(piece, side.vocabulary) for piece in pieces]
    ours = student.vocabulary.encode(pieces)
    theirs = ours if teacher is None else teacher.vocabulary.encode(pieces)
    usable = [our.spelled and their.spelled for our, their in zip(ours, theirs)]
    ours, theirs = ([row if use else row.cut(0) for row, use in zip(rows, usable)] for rows in (ours, theirs))
    return (
        Batch(
            student=_tokens(ours, student),
            teacher=None if teacher is None else _tokens(theirs, teacher),
            chunks=_chunks(ours, theirs, student, teacher or student),
        ),
        ~np.array(usable, bool),
    )


def read_ahead(make: Callable[[int], T], start: int, ahead: int = 2) -> Generator[T, None, None]:
    """make(start), make(start + 1), ... in order, up to `ahead` of them computed beforehand in a background thread.

    An exception in `make` is raised where its result is due. Closing the generator waits for the call that is going on
    and starts no other.
    """
    pool = ThreadPoolExecutor(1, "read-ahead")
    try:
        pending = deque(pool.submit(make, step) for step in range(start, start + ahead))
        for step in count(start + ahead):
            result = pending.popleft().result()
            pending.append(pool.submit(make, step))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _normalized(piece: Piece, vocabulary: Vocabulary) -> Piece:
    return tuple(
        segment._replace(content=vocabulary.normalize(segment.content)) if isinstance(segment.content, str) else segment
        for segment in piece
    )


def _tokens(rows: Sequence[Encoding], side: Side) -> Tokens:
    pad, length = side.vocabulary.pad_id, side.length
    inputs = np.full((len(rows), length), pad, np.int32)
    targets = np.full((len(rows), length), pad, np.int32)
    weight = np.zeros((len(rows), length), np.float32)
    for row, encoding in enumerate(rows):
        ids, following = encoding.ids[:length], encoding.ids[1:length]
        inputs[row, : len(ids)] = ids
        targets[row, : len(following)] = following
        weight[row, : len(following)] = encoding.counts[1:length]
    return Tokens(inputs, targets, weight, None if side.ngrams is None else side.ngrams(inputs))


def _chunks(ours: Sequence[Encoding], theirs: Sequence[Encoding], student: Side, teacher: Side) -> AlignedChunks:
    rows, capacity = len(ours), min(student.length, teacher.length)
    chunks = AlignedChunks(
        student_chunk=np.full((rows, student.length), -1, np.int32),
        teacher_chunk=np.full((rows, teacher.length), -1, np.int32),
        student_close=np.full((rows, capacity), -1, np.int32),
        teacher_close=np.full((rows, capacity), -1, np.int32),
        before_space=np.zeros((rows, capacity), bool),
        text_bytes=np.zeros((rows, capacity), np.int32),
    )
    for row, (our, their) in enumerate(zip(ours, theirs)):
        aligned = align(our.cut(student.length), their.cut(teacher.length))
        used = len(aligned.student_close)
        chunks.student_close[row, :used] = aligned.student_close
        chunks.teacher_close[row, :used] = aligned.teacher_close

        chunk = aligned.student_chunk
        text_bytes = np.bincount(chunk[chunk >= 0], our.text_bytes[: len(chunk)][chunk >= 0], used)
        follows = _space_follows(our, student.vocabulary, aligned.student_close)
        follows &= _space_follows(their, teacher.vocabulary, aligned.teacher_close)
        chunks.text_bytes[row, :used] = text_bytes
        chunks.before_space[row, :used] = follows | (text_bytes == 0)

        first_in_chunk = 0 in (*aligned.student_chunk[:1], *aligned.teacher_chunk[:1])  # then it is chunk 0
        for targets, chunk in (
            (chunks.student_chunk[row], aligned.student_chunk[1:]),
            (chunks.teacher_chunk[row], aligned.teacher_chunk[1:]),
        ):
            targets[: len(chunk)] = np.where(chunk == 0, -1, chunk) if first_in_chunk else chunk
    return chunks


def _space_follows(
    row: Encoding, vocabulary: Vocabulary, close: Int64[np.ndarray, " chunk"]
) -> Bool[np.ndarray, " chunk"]:
    """Whether the token after token `close` starts with a space; that of the last token does not."""
    following = np.minimum(close + 1, len(row.ids) - 1)
    return vocabulary.starts_with_space[row.ids[following]] & (close < len(row.ids) - 1)

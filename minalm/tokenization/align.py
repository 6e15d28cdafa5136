"""Two tokenizations of one text -> the chunks between the places where a token of each ends."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from minalm.text.documents import Piece
from minalm.tokenization.vocabulary import Encoding, Vocabulary


class Alignment(NamedTuple):
    """The chunks of one row, numbered from 0 in the order of the text."""

    student_chunk: Int32[np.ndarray, " student_time"]  # of each token; -1: in no chunk
    teacher_chunk: Int32[np.ndarray, " teacher_time"]
    student_chunk_end: Int64[np.ndarray, " chunk"]  # index of the chunk's last token
    teacher_chunk_end: Int64[np.ndarray, " chunk"]

    def text_bytes(self, student: Encoding) -> Int64[np.ndarray, " chunk"]:
        """The bytes of text in each chunk, by the student's tokens; 0: a special part."""
        inside = self.student_chunk >= 0
        counted = student.text_bytes[: len(inside)][inside]
        return np.bincount(self.student_chunk[inside], counted, len(self.student_chunk_end)).astype(np.int64)


def read_both(
    pieces: Sequence[Piece], student: Vocabulary, teacher: Vocabulary | None
) -> tuple[Sequence[Piece], list[Encoding], list[Encoding], Bool[np.ndarray, " pieces"]]:
    """(pieces after `normalized`, the student's tokens of each, the teacher's, whether both spell it exactly).

    Where one does not, both rows are empty. Without a teacher, the student's tokens stand for its.
    """
    pieces = normalized(pieces, student, teacher)
    ours = student.encode(pieces)
    theirs = ours if teacher is None else teacher.encode(pieces, "teacher")
    usable = [our.round_trips and their.round_trips for our, their in zip(ours, theirs)]
    ours, theirs = ([row if use else row.cut(0) for row, use in zip(rows, usable)] for rows in (ours, theirs))
    return pieces, ours, theirs, np.array(usable, bool)


def normalized(pieces: Sequence[Piece], student: Vocabulary, teacher: Vocabulary | None) -> Sequence[Piece]:
    """Pieces whose texts have passed through the teacher's Unicode normalizer and then the student's."""
    for vocabulary in (teacher, student):
        if vocabulary is not None and vocabulary.normalizer is not None:
            pieces = [_normalized(piece, vocabulary) for piece in pieces]
    return pieces


def _normalized(piece: Piece, vocabulary: Vocabulary) -> Piece:
    return tuple(
        segment._replace(content=vocabulary.normalize(segment.content)) if isinstance(segment.content, str) else segment
        for segment in piece
    )


def align(student: Encoding, teacher: Encoding) -> Alignment:
    """Aligns two encodings of one piece of text, each maybe cut short. Both must spell the text.

    A chunk ends where a token of each side ends, and counts if any of its tokens counts on either side. In no chunk
    are: tokens of a segment for which the other side writes nothing, and tokens after the last common end.
    """
    student_kept, teacher_kept = teacher.written[student.segment], student.written[teacher.segment]
    size = 2 + max(int(side.ends.max(initial=-1)) for side in (student, teacher))
    common = _places(student, student_kept, size) & _places(teacher, teacher_kept, size)
    student_chunk, student_chunk_end = _chunks(student, student_kept, common)
    teacher_chunk, teacher_chunk_end = _chunks(teacher, teacher_kept, common)

    counts = np.zeros(len(student_chunk_end) + 1, bool)  # the last place is that of no chunk
    for side, chunk in ((student, student_chunk), (teacher, teacher_chunk)):
        counts[chunk[side.loss_mask]] = True
    number = np.where(counts, np.cumsum(counts, dtype=np.int32) - 1, -1).astype(np.int32)
    counts, number[-1] = counts[:-1], -1
    return Alignment(number[student_chunk], number[teacher_chunk], student_chunk_end[counts], teacher_chunk_end[counts])


def joined(alignment: Alignment, kept: Bool[np.ndarray, " chunk"]) -> Alignment:
    """The alignment without the ends that are not kept: those chunks become one with the next. The last is kept."""
    number = np.append(np.cumsum(kept, dtype=np.int32) - kept, -1).astype(
        np.int32
    )  # the last place is that of no chunk
    return Alignment(
        number[alignment.student_chunk],
        number[alignment.teacher_chunk],
        alignment.student_chunk_end[kept],
        alignment.teacher_chunk_end[kept],
    )


def _places(side: Encoding, kept: Bool[np.ndarray, " time"], size: int) -> Bool[np.ndarray, " axis"]:
    """Where on the axis of `Encoding.ends` a kept token ends. The last place, which is that of -1, is False."""
    places = np.zeros(size, bool)
    places[side.ends[kept]] = True
    places[-1] = False
    return places


def _chunks(
    side: Encoding, kept: Bool[np.ndarray, " time"], common: Bool[np.ndarray, " axis"]
) -> tuple[Int32[np.ndarray, " time"], Int64[np.ndarray, " chunk"]]:
    """The chunk of each token, -1 where there is none, and the last token of each chunk."""
    closes = kept & common[side.ends]
    chunk = np.cumsum(closes, dtype=np.int32) - closes
    chunk_end = np.flatnonzero(closes)
    chunk[~kept | (chunk == len(chunk_end))] = -1
    return chunk, chunk_end

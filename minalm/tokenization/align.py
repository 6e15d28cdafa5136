"""Two tokenizations of one text -> the chunks between the places where a token of each ends."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from minalm.tokenization.vocabulary import Encoding


class Alignment(NamedTuple):
    """The chunks of one row, numbered from 0 in the order of the text."""

    student_chunk: Int32[np.ndarray, " student_time"]  # of each token; -1: in no chunk
    teacher_chunk: Int32[np.ndarray, " teacher_time"]
    student_chunk_end: Int64[np.ndarray, " chunk"]  # index of the chunk's last token
    teacher_chunk_end: Int64[np.ndarray, " chunk"]


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

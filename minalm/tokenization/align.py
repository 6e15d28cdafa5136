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

    A chunk ends where a token of each side ends. In no chunk are: tokens that do not count, tokens of a special part
    for which the other side has none, and tokens after the last common end.
    """
    student_kept, teacher_kept = _kept(student, teacher), _kept(teacher, student)
    size = 2 + max(int(side.ends.max(initial=-1)) for side in (student, teacher))
    common = _places(student, student_kept, size) & _places(teacher, teacher_kept, size)
    student_chunk, student_chunk_end = _chunks(student, student_kept, common)
    teacher_chunk, teacher_chunk_end = _chunks(teacher, teacher_kept, common)
    return Alignment(student_chunk, teacher_chunk, student_chunk_end, teacher_chunk_end)


def _kept(one: Encoding, other: Encoding) -> Bool[np.ndarray, " time"]:
    """Which tokens count and belong to a segment that the other side has tokens for."""
    has = np.zeros(1 + max(one.segment.max(initial=-1), other.segment.max(initial=-1)), bool)
    has[other.segment] = True
    return one.loss_mask & has[one.segment]


def _places(side: Encoding, kept: Bool[np.ndarray, " time"], size: int) -> Bool[np.ndarray, " axis"]:
    """Where on the axis of `Encoding.ends` a kept token ends. The last place, which is that of -1, is False."""
    places = np.zeros(size, bool)
    places[side.ends[kept]] = True
    places[-1] = False
    return places


def _chunks(
    side: Encoding, kept: Bool[np.ndarray, " time"], common: Bool[np.ndarray, " axis"]
) -> tuple[Int32[np.ndarray, " time"], Int64[np.ndarray, " chunk"]]:
    closes = kept & common[side.ends]
    chunk = np.cumsum(closes, dtype=np.int32) - closes
    chunk_end = np.flatnonzero(closes)
    chunk[~kept | (chunk == len(chunk_end))] = -1
    return chunk, chunk_end

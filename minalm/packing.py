"""Several texts in one row, so that less of a row is empty. Each reads as it would alone.

A batch of one text a row is made first (batches.py), then its rows are cut to what they use and laid into fewer rows. So
of each text all stays what it was, but for where it stands: attention is kept apart and positions begin anew by
`Tokens.segments`, groups of chunks end with their text by `AlignedChunks.text_end`, and what follows a text in its row is
no target.

A group of steps takes a fixed number of texts, so that a batch stays a function of (seed, step); those that find no room
wait for the next epoch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Shaped

from minalm.text.order import permute
from minalm.types import AlignedChunks, Batch, BytePlaces, Tokens


class Sizes(NamedTuple):
    """What the texts of a batch use of their rows; 0 of one that is left out."""

    student: Int64[np.ndarray, " texts"]  # tokens
    teacher: Int64[np.ndarray, " texts"]  # tokens; the student's where there is no teacher
    chunks: Int64[np.ndarray, " texts"]


def place(sizes: Sizes, lengths: tuple[int, int], rows: int) -> list[list[int]]:
    """The texts of each row: the most texts from the first one on that fit, where the largest are placed first, each in
    the fullest row that has room (best fit decreasing: Johnson 1974, "Fast algorithms for bin packing")."""
    use = np.stack([sizes.student, sizes.teacher], axis=1)
    count = int((np.cumsum(use, axis=0) <= rows * np.array(lengths)).all(axis=1).sum())  # no more could fit
    while (found := _fitted(use[:count], lengths, rows)) is None:
        count -= 1
    order = permute(np.arange(rows), rows, np.full(rows, count, np.uint64))  # the first rows have the longest texts
    return [found[row] for row in order.tolist()]


def packed_counts(sizes: Sizes, lengths: tuple[int, int], rows: int) -> list[int]:
    """How many texts find room in `rows` rows, those behind them in as many more, and so on."""
    counts: list[int] = []
    first = 0
    while first < len(sizes.student):
        layout = place(Sizes(*(size[first:] for size in sizes)), lengths, rows)
        count = 1 + max((text for texts in layout for text in texts), default=len(sizes.student) - first - 1)
        if counts and first + count >= len(sizes.student):  # there were no more
            break
        counts.append(count)
        first += count
    return counts


def _fitted(use: Int64[np.ndarray, "texts 2"], lengths: tuple[int, int], rows: int) -> list[list[int]] | None:
    """None: they do not fit."""
    share = use / np.array(lengths)
    room = np.ones((rows, 2)) + 1e-9  # as shares of the lengths
    found: list[list[int]] = [[] for _ in range(rows)]
    for text in np.argsort(-share.max(axis=1), kind="stable").tolist():
        if not use[text].any():  # it is left out
            continue
        left = room - share[text]
        fits = left.min(axis=1) >= 0.0
        if not fits.any():
            return None
        row = int(np.argmin(np.where(fits, left.sum(axis=1), np.inf)))
        room[row] = left[row]
        found[row].append(text)
    return found


def pack(batch: Batch, sizes: Sizes, layout: Sequence[Sequence[int]], pads: tuple[int, int]) -> Batch:
    """The texts of a batch, one a row, in the rows of `layout`. `pads` fill up the student's and the teacher's."""
    starts = Sizes(*(_starts(size, layout) for size in sizes))
    chunks, teacher = batch.chunks, batch.teacher

    def student_side(values, fill, offset=None):
        return _laid(values, sizes.student, layout, fill, offset)

    def teacher_side(values, fill, offset=None):
        return _laid(values, sizes.teacher, layout, fill, offset)

    def by_chunk(values, fill, offset=None):
        return _laid(values, sizes.chunks, layout, fill, offset)

    last = np.zeros(chunks.before_space.shape, bool)
    held = np.flatnonzero(sizes.chunks)
    last[held, sizes.chunks[held] - 1] = True
    packed = AlignedChunks(
        student_chunk=student_side(chunks.student_chunk, -1, starts.chunks),
        teacher_chunk=teacher_side(chunks.teacher_chunk, -1, starts.chunks),
        student_chunk_end=by_chunk(chunks.student_chunk_end, -1, starts.student),
        teacher_chunk_end=by_chunk(chunks.teacher_chunk_end, -1, starts.teacher),
        before_space=by_chunk(chunks.before_space, False),
        text_bytes=by_chunk(chunks.text_bytes, 0),
        unbiased=None if chunks.unbiased is None else by_chunk(chunks.unbiased, False),
        text_end=by_chunk(last, False),
    )
    places = None
    if batch.bytes is not None:
        places = BytePlaces(
            within=student_side(batch.bytes.within, -1, starts.teacher),
            node=student_side(batch.bytes.node, -1),
            after=student_side(batch.bytes.after, -1, starts.teacher),
        )
    left_out = np.zeros(len(layout), np.int32)
    left_out[0] = int(batch.left_out.sum())
    return Batch(
        student=_tokens(batch.student, sizes.student, layout, pads[0]),
        teacher=None if teacher is None else _tokens(teacher, sizes.teacher, layout, pads[1]),
        chunks=packed,
        left_out=left_out,
        bytes=places,
    )


def _starts(size: Int64[np.ndarray, " texts"], layout: Sequence[Sequence[int]]) -> Int64[np.ndarray, " texts"]:
    """Where in its row each text begins."""
    starts = np.zeros(len(size), np.int64)
    for texts in layout:
        starts[texts] = np.cumsum(size[texts]) - size[texts]
    return starts


def _laid(
    values: Shaped[np.ndarray, "texts length"],
    size: Int64[np.ndarray, " texts"],
    layout: Sequence[Sequence[int]],
    fill: int,
    offset: Int64[np.ndarray, " texts"] | None = None,
) -> Shaped[np.ndarray, "rows length"]:
    """The first `size` values of the texts of each row, side by side; with `offset`, added to those from 0 on."""
    laid = np.full((len(layout), values.shape[1]), fill, values.dtype)
    for row, texts in enumerate(layout):
        place = 0
        for text in texts:
            found = values[text, : size[text]]
            if offset is not None:
                found = np.where(found >= 0, found + offset[text], found)
            laid[row, place : place + len(found)] = found
            place += len(found)
    return laid


def _tokens(tokens: Tokens, size: Int64[np.ndarray, " texts"], layout: Sequence[Sequence[int]], pad: int) -> Tokens:
    numbers = np.zeros(tokens.inputs.shape, np.int32)
    for texts in layout:
        numbers[texts] = np.arange(len(texts), dtype=np.int32)[:, None]
    return Tokens(
        inputs=_laid(tokens.inputs, size, layout, pad),
        targets=_laid(tokens.targets, size, layout, pad),
        weight=_laid(tokens.weight, size, layout, 0),
        suffix=None if tokens.suffix is None else _laid(tokens.suffix, size, layout, 0),
        segments=_laid(numbers, size, layout, -1),
    )

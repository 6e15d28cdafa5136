"""Batches of fixed shape made from pieces of text: numpy arrays on the host, computed ahead of their use."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from os.path import commonprefix
from typing import NamedTuple, TypeVar
from zlib import crc32

import jax
import numpy as np
from jaxtyping import Bool, Int64

from minalm.packing import Sizes, pack, place
from minalm.text.documents import Piece
from minalm.tokenization.align import Alignment, align, joined, normalized, read_both
from minalm.tokenization.compression import Compression, kept_by_pairs, kept_by_space
from minalm.tokenization.pair_bias import UnbiasedEnds
from minalm.tokenization.prefixes import Prefixes, byte_places
from minalm.tokenization.suffixes import LongestSuffix
from minalm.tokenization.vocabulary import Encoding, Vocabulary
from minalm.types import AlignedChunks, Batch, BytePlaces, Tokens

T = TypeVar("T")

GROUP_ROWS = 64  # that are packed at once


class Side(NamedTuple):
    """How one model, student or teacher, reads text."""

    vocabulary: Vocabulary
    suffixes: LongestSuffix | None  # only for a model with an input expansion
    length: int  # tokens in a row
    prefixes: Prefixes | None = None  # only of a teacher whose next byte is asked for
    unbiased: UnbiasedEnds | None = None  # only of a teacher whose chunks are `unbiased`
    patches: bool = False  # only of a Bolmo student, which learns where the teacher's tokens end


def make_batch(pieces: Sequence[Piece], student: Side, teacher: Side | None) -> Batch:
    """One row for each piece, cut at the length of each side.

    A piece is left out if either tokenizer's tokens do not spell it exactly: its row is empty, with weight 0 and no
    chunks. Texts pass through the teacher's Unicode normalizer and then the student's before either tokenizer reads
    them. Without a teacher, the student's tokens are aligned with themselves. The first token of a row has no
    log-probability, and so neither has a chunk that contains it on either side: the chunk keeps its place in
    `student_chunk_end` and `teacher_chunk_end`, but no target belongs to it.
    """
    return _make(pieces, student, teacher)[0]


def make_packed_batch(pieces: Sequence[Piece], student: Side, teacher: Side | None, rows: int) -> Batch:
    """As many of the pieces, from the first one on, as find room in so many rows (packing.py)."""
    batch, sizes = _make(pieces, student, teacher)
    other = teacher or student
    layout = place(sizes, (student.length, other.length), rows)
    return pack(batch, sizes, layout, (student.vocabulary.pad_id, other.vocabulary.pad_id))


class Packer:
    """Batches of packed rows. Those of a few steps one after the other, a group of at least GROUP_ROWS rows, are packed
    at once, since of many texts nearly the same number fits every time; a group is kept until another is asked for."""

    def __init__(
        self, texts: Callable[[int], Sequence[Piece]], count: int, student: Side, teacher: Side | None, rows: int
    ):
        """`texts` gives the texts of a group by its number, `count` of them; `rows` are those of a batch."""
        self.texts, self.count, self.sides, self.rows = texts, count, (student, teacher), rows
        self.kept: tuple[int, Batch] | None = None

    def __call__(self, step: int) -> Batch:
        """The batch of a step."""
        group, place = divmod(step, steps_of_group(self.rows))
        if self.kept is None or self.kept[0] != group:
            rows = self.rows * steps_of_group(self.rows)
            self.kept = group, make_packed_batch(self.texts(group), *self.sides, rows)
        return jax.tree.map(lambda leaf: leaf[place * self.rows : (place + 1) * self.rows], self.kept[1])


def steps_of_group(rows: int) -> int:
    """How many batches of so many rows are packed at once."""
    return -(-GROUP_ROWS // rows)


def sizes_of(pieces: Sequence[Piece], student: Side, teacher: Side | None) -> Sizes:
    """What the pieces use of rows."""
    return _make(pieces, student, teacher)[1]


def _make(pieces: Sequence[Piece], student: Side, teacher: Side | None) -> tuple[Batch, Sizes]:
    pieces, ours, theirs, usable = read_both(pieces, student.vocabulary, teacher and teacher.vocabulary)
    tokens, chunks = _tokens(ours, student), _chunks(ours, theirs, student, teacher or student)
    batch = Batch(
        student=_with_patches(tokens, chunks) if student.patches else tokens,
        teacher=None if teacher is None else _tokens(theirs, teacher),
        chunks=chunks,
        bytes=_byte_places(pieces, ours, theirs, student, teacher),
        left_out=~usable,
    )
    sizes = Sizes(
        student=np.array([min(len(row.ids), student.length) for row in ours], np.int64),
        teacher=np.array([min(len(row.ids), (teacher or student).length) for row in theirs], np.int64),
        chunks=(batch.chunks.student_chunk_end >= 0).sum(axis=1),
    )
    return batch, sizes


def with_longer_patches(batch: Batch, kind: Compression, ratio: float, seed: int, step: int) -> Batch:
    """The batch of a Bolmo with fewer places where patches shall end, so that they have `ratio` bytes; chance depends on
    the seed, the step and the row's own tokens."""
    ends, chunks = batch.student.patch_ends.copy(), batch.chunks
    for row, used in enumerate((ends >= 0).sum(axis=1).tolist()):
        if used:
            ids = batch.teacher.inputs[row, chunks.teacher_chunk_end[row, :used]]
            random = np.random.default_rng([seed, step, crc32(ids.tobytes())])
            size = int(ends[row, used - 1]) + 1
            if kind == "bpe":
                kept = kept_by_pairs(ids, size, ratio, random)
            else:
                kept = kept_by_space(chunks.before_space[row, :used], size, ratio, random)
            left = ends[row, :used][kept]
            ends[row] = -1
            ends[row, : len(left)] = left
    return replace(batch, student=replace(batch.student, patch_ends=ends))


def why_left_out(piece: Piece, student: Side, teacher: Side | None) -> str:
    """Where the first of the two tokenizers that do not spell a piece exactly goes wrong; "" if both spell it."""
    (piece,) = normalized([piece], student.vocabulary, teacher and teacher.vocabulary)
    for side, name in ((student, "student"), (teacher, "teacher")):
        if side is not None and (found := side.vocabulary.misspelled(piece, name)) is not None:
            place = len(commonprefix(found))
            text, tokens = (each[max(0, place - 10) : place + 20] for each in found)
            return f"where the text has {text!r}, the tokens of {side.vocabulary.name} spell {tokens!r}"
    return ""


def read_ahead(make: Callable[[int], T], start: int, ahead: int = 4) -> Generator[T, None, None]:
    """Yield make(start), make(start + 1), ..., up to `ahead` of them computed in advance by a background thread.

    An exception in `make` is raised when its result is due. Closing the generator waits for the call in progress and
    starts no other.
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


def _tokens(rows: Sequence[Encoding], side: Side) -> Tokens:
    pad, length = side.vocabulary.pad_id, side.length
    inputs = np.full((len(rows), length), pad, np.int32)
    targets = np.full((len(rows), length), pad, np.int32)
    weight = np.zeros((len(rows), length), np.float32)
    for row, encoding in enumerate(rows):
        ids, following = encoding.ids[:length], encoding.ids[1:length]
        inputs[row, : len(ids)] = ids
        targets[row, : len(following)] = following
        weight[row, : len(following)] = encoding.loss_mask[1:length]
    return Tokens(inputs, targets, weight, None if side.suffixes is None else side.suffixes(inputs))


def _chunks(ours: Sequence[Encoding], theirs: Sequence[Encoding], student: Side, teacher: Side) -> AlignedChunks:
    rows, capacity = len(ours), min(student.length, teacher.length)
    chunks = AlignedChunks(
        student_chunk=np.full((rows, student.length), -1, np.int32),
        teacher_chunk=np.full((rows, teacher.length), -1, np.int32),
        student_chunk_end=np.full((rows, capacity), -1, np.int32),
        teacher_chunk_end=np.full((rows, capacity), -1, np.int32),
        before_space=np.zeros((rows, capacity), bool),
        text_bytes=np.zeros((rows, capacity), np.int32),
        unbiased=None if teacher.unbiased is None else np.zeros((rows, capacity), bool),
    )
    for row, (our, their) in enumerate(zip(ours, theirs)):
        aligned = align(our.cut(student.length), their.cut(teacher.length))
        if student.patches:
            aligned = _with_ends_of_documents(aligned, our, student.vocabulary.eos_id)
        used = len(aligned.student_chunk_end)
        chunks.student_chunk_end[row, :used] = aligned.student_chunk_end
        chunks.teacher_chunk_end[row, :used] = aligned.teacher_chunk_end

        text_bytes = aligned.text_bytes(our)
        follows = _space_follows(our, student.vocabulary, aligned.student_chunk_end)
        follows &= _space_follows(their, teacher.vocabulary, aligned.teacher_chunk_end)
        chunks.text_bytes[row, :used] = text_bytes
        chunks.before_space[row, :used] = follows | (text_bytes == 0)
        if teacher.unbiased is not None:
            last = their.ids[aligned.teacher_chunk_end], our.ids[aligned.student_chunk_end]
            chunks.unbiased[row, :used] = teacher.unbiased(*last) | (text_bytes == 0)

        first_in_chunk = 0 in (*aligned.student_chunk[:1], *aligned.teacher_chunk[:1])  # it can only be in chunk 0
        for targets, chunk in (
            (chunks.student_chunk[row], aligned.student_chunk[1:]),
            (chunks.teacher_chunk[row], aligned.teacher_chunk[1:]),
        ):
            targets[: len(chunk)] = np.where(chunk == 0, -1, chunk) if first_in_chunk else chunk
    return chunks


def _with_patches(tokens: Tokens, chunks: AlignedChunks) -> Tokens:
    """The tokens of a Bolmo, with the places where the teacher's tokens end. What the teacher's row has no place for
    does not count."""
    inside = np.where(chunks.student_chunk >= 0, tokens.weight, 0.0).astype(np.float32)
    return replace(tokens, weight=inside, patch_ends=chunks.student_chunk_end)


def _with_ends_of_documents(aligned: Alignment, our: Encoding, eos: int | None) -> Alignment:
    """The alignment in which a document's last token and its end are one chunk: a Bolmo makes a patch of both."""
    after = aligned.student_chunk_end[:-1] + 1
    kept = np.append(our.ids[after] != eos, True)[: len(aligned.student_chunk_end)]
    kept[:1] = True  # bos is a patch of its own
    return joined(aligned, kept)


def _byte_places(
    pieces: Sequence[Piece], ours: Sequence[Encoding], theirs: Sequence[Encoding], student: Side, teacher: Side | None
) -> BytePlaces | None:
    if teacher is None or teacher.prefixes is None:
        return None
    return BytePlaces(*byte_places(pieces, ours, theirs, student.length, teacher.length, teacher.prefixes))


def _space_follows(
    row: Encoding, vocabulary: Vocabulary, chunk_end: Int64[np.ndarray, " chunk"]
) -> Bool[np.ndarray, " chunk"]:
    """Whether the token after each chunk starts with a space; False where the row ends with the chunk."""
    following = np.minimum(chunk_end + 1, len(row.ids) - 1)
    return vocabulary.starts_with_space[row.ids[following]] & (chunk_end < len(row.ids) - 1)

"""Documents cut into pieces that fit a window, any of which can be read at any time, and their order in a run."""

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from minalm.errors import InputError
from minalm.text import sources
from minalm.text.cutting import SMALLEST_LIMIT, spans, stops
from minalm.text.documents import Markup, Piece, Segment, Special
from minalm.text.index import Index, TextFile, check_unchanged, hashes, index, text_files
from minalm.text.order import mix, permute
from minalm.text.rows import RowReader


@dataclass(frozen=True, eq=False)
class InMemory:
    """Texts in memory, cut into pieces. Positions are counted as in `Files`."""

    texts: tuple[bytes, ...]
    first: Int64[np.ndarray, " documents_and_end"]  # number of each document's first piece
    stop: Int64[np.ndarray, " pieces"]

    def __len__(self) -> int:
        return len(self.stop)

    def piece(self, number: int) -> Piece:
        """A piece, in the order of the documents."""
        document, start, stop = _bounds(self.first, self.stop, number)
        text = self.texts[document]
        return _text_piece(text[start:stop], ends=stop > len(text))

    def where(self, number: int) -> str:
        """Where a piece is, in words."""
        document, start, _ = _bounds(self.first, self.stop, number)
        return f"document {document + 1} from byte {start}"


NEWLINE = b"\n"


@dataclass(frozen=True, eq=False)
class Files:
    """Files of documents, cut into pieces. What is held of them is where they lie (text.index), mapped from disk.

    Positions in a document are counted in units: each byte of text is one unit, and so is each other segment. The first
    segment of a document (bos, or of a chat without it an empty text), which is repeated in each of its pieces, is not
    counted.
    """

    files: tuple[TextFile, ...]
    index: Index
    reader: RowReader

    def __len__(self) -> int:
        return len(self.index.stop)

    def piece(self, number: int) -> Piece:
        """A piece, in the order of the documents. Raises InputError if its file has changed since it was read."""
        index = self.index
        document, start, stop = _bounds(index.first, index.stop, number)
        place, size = int(index.place[document]), int(index.size[document])
        file = self.files[int(np.searchsorted(index.of_file, document, side="right")) - 1]
        try:
            with sources.open_regular(file.path) as opened:
                if size < 0:  # it is kept
                    start = start or -1 - size
                    with open(index.kept, "rb") as kept:
                        kept.seek(start)
                        text = kept.read(stop - start)
                elif file.label:
                    opened.seek(place)
                    text = opened.read(size)
                else:  # the document may be gigabytes: read no more than the piece
                    opened.seek(place + start)
                    text = opened.read(stop - start)
                check_unchanged(file.path, opened, file.stamp)
        except FileNotFoundError as error:
            raise InputError(f"{error.filename} is gone, which is in use: put it back and start again") from error
        if size < 0:
            return _read_piece(text)
        if not file.label:
            return _text_piece(text, ends=stop > size)
        return next(spans(self.reader.parse(text), [(start, stop)]))

    def where(self, number: int) -> str:
        """Where a piece is, in words."""
        document, start, _ = _bounds(self.index.first, self.index.stop, number)
        place = int(self.index.place[document])
        file = self.files[int(np.searchsorted(self.index.of_file, document, side="right")) - 1]
        if not file.label:
            return f"{file.name} from byte {place + start}"
        with open(file.path, "rb") as opened:
            blocks = (opened.read(min(1 << 20, place - first)) for first in range(0, place, 1 << 20))
            return f"{file.name}, {file.label} {1 + sum(block.count(NEWLINE) for block in blocks)}"


@dataclass(frozen=True, eq=False)
class Corpus:
    """The pieces of one or several sources, numbered in their order. Host only. Made by `read_corpus` and
    `text_corpus`."""

    sources: tuple[Files | InMemory, ...]
    fingerprint: str  # a hash of the contents of all files, in order, of the shares, and of how much was left out
    has_chats: bool
    notes: tuple[str, ...] = ()  # what a user should know of the texts
    chats: Mapping[str, int] | None = None  # what a user should know of the chats -> in how many
    shares: tuple[int, ...] | None = None  # rows of each source in `sum(shares)` rows of a run; None: all are one text

    @cached_property
    def first(self) -> list[int]:
        """The number of each source's first piece, then the number of pieces."""
        return list(accumulate(map(len, self.sources), initial=0))

    def __len__(self) -> int:
        """The number of pieces."""
        return self.first[-1]

    def piece(self, number: int) -> Piece:
        """Piece `number`. Raises InputError if its file has changed since it was read."""
        source = int(np.searchsorted(self.first, number, side="right")) - 1
        return self.sources[source].piece(number - self.first[source])

    def where(self, number: int) -> str:
        """Where piece `number` is, in words."""
        source = int(np.searchsorted(self.first, number, side="right")) - 1
        return self.sources[source].where(number - self.first[source])

    def order(self, seed: int, step: int, size: int) -> Int64[np.ndarray, " size"]:
        """Numbers of the pieces in batch `step`: a function of the arguments, `len(self)` and `shares` alone.

        Row r of the batch is row g = step * size + r of the run. Without shares it is place g % len(self) in epoch
        g // len(self), and each epoch visits all pieces in a random order that depends on (seed, epoch). With shares,
        each sum(shares) rows one after the other have exactly its share from each source, in a random order; and each
        source has epochs of its own, one after the other, whatever the others have.
        """
        return self.places(seed, step * size + np.arange(size))

    def places(self, seed: int, row: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        """Numbers of the pieces in these rows of a run."""
        # Mix the seed before adding the epoch: otherwise epoch e of seed + 1 would be epoch e + 1 of seed.
        key = mix(np.full(len(row), seed % 2**64, np.uint64))
        if self.shares is None:
            return _in_epochs(row, len(self), key)
        start = np.append(0, np.cumsum(self.shares))
        block, slot = np.divmod(row, start[-1])
        slot = permute(slot, int(start[-1]), mix(mix(key) + block.astype(np.uint64)))
        source = np.searchsorted(start, slot, side="right") - 1
        # Each block of rows has all slots of a source, so the rows before this one have this many blocks of its share.
        row = block * np.array(self.shares)[source] + slot - start[source]
        found = np.empty(len(row), np.int64)
        for number in range(len(self.sources)):
            held = source == number
            own = mix(key[held] + np.uint64(number + 1))
            found[held] = self.first[number] + _in_epochs(row[held], len(self.sources[number]), own)
        return found

    def batch(self, seed: int, step: int, size: int) -> list[Piece]:
        """The `size` pieces of batch `step`, as chosen by `order`."""
        return [self.piece(number) for number in self.order(seed, step, size).tolist()]


def _in_epochs(row: Int64[np.ndarray, " rows"], size: int, key: np.ndarray) -> Int64[np.ndarray, " rows"]:
    epoch, place = np.divmod(row, size)
    return permute(place, size, mix(key + epoch.astype(np.uint64)))


def read_corpus(
    names: Sequence[Path | str],
    limit: int,
    reader: RowReader = RowReader(),
    cache: Path | None = None,
    stdlib: Callable[[], Sequence[str]] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Corpus:
    """Cut the documents of sources (text.sources) into pieces of at most `limit` bytes. A Special takes
    cutting.SPECIAL_BYTES of it.

    A .txt file is one document. Rows become documents as `reader` says. Blank lines and documents without any text are
    ignored. A plain text becomes bos + text + eos. `stdlib` gives the documents for which the word "stdlib" stands.

    All text is read and checked, once: what is found is kept in the folder `cache`, or in one that is removed with the
    corpus. In memory is no more than one row and a block of a file. `say` hears what takes time. Raises InputError if
    the input is not as described.
    """
    folder = Path(tempfile.mkdtemp(prefix="minalm-")) if cache is None else cache
    try:
        given = [sources.parse_source(str(name)) for name in names]
        corpus = _read(given, limit, reader, folder, stdlib, say)
        if len(corpus) == 0:
            raise InputError(f"there is no text in {', '.join(map(str, names))}: give files that have some")
        for source, part in zip(given, corpus.sources):
            if corpus.shares is not None and len(part) == 0:
                raise InputError(f"there is no text in {source.name}: leave it out, or give files that have some")
    except BaseException:
        if cache is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if cache is None:
        weakref.finalize(corpus, shutil.rmtree, folder, ignore_errors=True)
    return corpus


def _read(
    given: Sequence[sources.Source],
    limit: int,
    reader: RowReader,
    cache: Path,
    stdlib: Callable[[], Sequence[str]] | None,
    say: Callable[[str], None],
) -> Corpus:
    parts: list[Files | InMemory] = []
    prints: list[str] = []
    notes: list[str] = []
    chats: dict[str, int] = {}
    shares = sources.shares(given)
    for source in given:
        if source.name == sources.STDLIB and stdlib is not None and not os.path.lexists(source.name):
            part = _texts(stdlib(), limit)
            prints += _hashes(part)
        else:
            found = sources.find_files(source.name)
            contents = hashes(found.files, cache)
            files = text_files(found, contents, reader.columns, cache, say)
            part = Files(tuple(files), index(files, contents, limit, reader, cache, say), reader)
            prints += contents
            notes += found.notes
            if part.index.left_out:
                named = "; ".join(part.index.named)
                more = " and others" if part.index.left_out > len(part.index.named) else ""
                notes.append(f"{part.index.left_out:,} rows of {source.name} are left out: {named}{more}")
            for note, count in part.index.notes.items():
                chats[note] = chats.get(note, 0) + count
        parts.append(part)
    indexes = [part.index for part in parts if isinstance(part, Files)]
    # Which rows are left out may depend on how long a template takes.
    kept = [len(each.place) for each in indexes] if any(each.left_out for each in indexes) else None
    has_chats = any(each.has_chats for each in indexes)
    return Corpus(tuple(parts), _fingerprint(prints, shares, kept), has_chats, tuple(notes), chats, shares)


def text_corpus(texts: Iterable[str], limit: int) -> Corpus:
    """Plain text documents held in memory, cut as `read_corpus` does. Raises InputError if there is no text."""
    part = _texts(texts, limit)
    if len(part) == 0:
        raise InputError("there is no text in the documents: give at least one that is not empty")
    return Corpus((part,), _fingerprint(_hashes(part)), has_chats=False)


def _texts(texts: Iterable[str], limit: int) -> InMemory:
    if limit < SMALLEST_LIMIT:
        raise InputError(f"pieces of {limit} bytes are too short: allow at least {SMALLEST_LIMIT}")
    encoded = tuple(text.encode() for text in texts if text)
    cut = [list(stops([text, Special("eos")], limit)) for text in encoded]
    first = np.append(0, np.cumsum([len(each) for each in cut], dtype=np.int64))
    return InMemory(encoded, first, np.array([stop for each in cut for stop in each], np.int64))


def _hashes(part: InMemory) -> list[str]:
    return [hashlib.sha256(text).hexdigest() for text in part.texts]


def _fingerprint(prints: Sequence[str], *others: object) -> str:
    """Of the hashes of contents, and of what else is not None."""
    digest = hashlib.sha256(b"".join(map(bytes.fromhex, prints)))
    for other in others:
        if other is not None:
            digest.update(str(other).encode())
    return digest.hexdigest()


def _bounds(first: np.ndarray, stop: np.ndarray, number: int) -> tuple[int, int, int]:
    """(the document of a piece, the units where the piece begins and ends)."""
    document = int(np.searchsorted(first, number, side="right")) - 1
    return document, int(stop[number - 1]) if number > first[document] else 0, int(stop[number])


def _text_piece(text: bytes, ends: bool) -> Piece:
    return Segment(Special("bos")), Segment(text.decode()), *((Segment(Special("eos")),) if ends else ())


def _read_piece(text: bytes) -> Piece:
    return tuple(
        Segment(content if isinstance(content, str) else _read_special(content), loss_mask)
        for content, loss_mask in json.loads(text)
    )


def _read_special(values: list) -> Special | Markup:
    return Special(*values) if isinstance(values[0], str) else Markup(*map(tuple, values))

"""Files of documents, cut into pieces that fit a window."""

import codecs
import hashlib
import json
import mmap
import os
import tempfile
import unicodedata
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64

from minalm.errors import InputError
from minalm.text.documents import Markup, Piece, Segment, Special
from minalm.text.order import mix, permute

# How many bytes of a piece's limit a Special or a Markup of one word counts as, whatever tokens stand for it: 14 is the
# most that a known tokenizer needs (TinyLlama's bytes for a header), and texts are between them. A Markup of several
# words counts as its text is long.
SPECIAL_BYTES = 4


# After the start, a header, one character and an end must fit: otherwise a piece might have no place to end.
SMALLEST_LIMIT = SPECIAL_BYTES + 3 * SPECIAL_BYTES + 4 + SPECIAL_BYTES

# A line of a .jsonl file longer than this is parsed only once: parsing it again for each piece would take time
# quadratic in its length.
LONG_LINE = 1 << 16  # bytes


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents cut into pieces of at most `limit` bytes. The text of files stays on disk. Host only.

    Positions in a document are counted in units: each byte of text is one unit, and so is each other segment. The first
    segment of a document (bos, or of a chat without it an empty text), which is repeated in each of its pieces, is not
    counted. Made by `read_corpus` and `text_corpus`.
    """

    sources: tuple[Path | bytes, ...]  # .txt or .jsonl files, or single documents as UTF-8
    stamps: tuple[tuple[int, int], ...]  # size in bytes and time of change in ns of each source, when read
    read_chat: Callable[[Mapping[str, Any]], Piece] | None  # the document of a row with `messages`
    documents: Int64[np.ndarray, "documents 3"]  # source; offset and length in bytes, of the line in a .jsonl file
    pieces: Int64[np.ndarray, "pieces 3"]  # document; first unit and the one after the last, or bytes of `long`
    has_chats: bool
    long: bytes | mmap.mmap = b""  # pieces of documents on lines longer than LONG_LINE, each as JSON

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the contents of all sources, in order."""
        digest = hashlib.sha256()
        for source in self.sources:
            if isinstance(source, bytes):
                digest.update(hashlib.sha256(source).digest())
            else:
                with open(source, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def __len__(self) -> int:
        """The number of pieces."""
        return len(self.pieces)

    def piece(self, index: int) -> Piece:
        """Piece `index`, in document order. Raises InputError if its file has changed since it was read."""
        document, start, stop = self.pieces[index].tolist()
        source, offset, length = self.documents[document].tolist()
        place = self.sources[source]
        if isinstance(place, bytes):
            return _text_piece(place[start:stop], ends=stop > length)
        with open(place, "rb") as file:
            if _stamp(file.fileno()) != self.stamps[source]:
                raise InputError(f"{place} changed while it was in use: leave it unchanged and start again")
            if place.suffix == ".txt":  # the document may be gigabytes: read no more than the piece
                file.seek(start)
                return _text_piece(file.read(stop - start), ends=stop > length)
            if length > LONG_LINE:
                return _read_piece(self.long[start:stop])
            file.seek(offset)
            return next(_spans(_parse(file.read(length), self.read_chat), [(start, stop)]))

    def order(self, seed: int, step: int, size: int) -> Int64[np.ndarray, " size"]:
        """Indices of the pieces in batch `step`: a function of the arguments and `len(self)` alone.

        Row r of the batch is row g = step * size + r of the run: place g % len(self) in epoch g // len(self). Each
        epoch visits all pieces in a random order that depends on (seed, epoch).
        """
        epoch, place = np.divmod(step * size + np.arange(size), len(self))
        # Mix the seed before adding the epoch: otherwise epoch e of seed + 1 would be epoch e + 1 of seed.
        key = mix(mix(np.full(size, seed % 2**64, np.uint64)) + epoch.astype(np.uint64))
        return permute(place, len(self), key)

    def batch(self, seed: int, step: int, size: int) -> list[Piece]:
        """The `size` pieces of batch `step`, as chosen by `order`."""
        return [self.piece(index) for index in self.order(seed, step, size).tolist()]


def read_corpus(
    paths: Sequence[Path], limit: int, read_chat: Callable[[Mapping[str, Any]], Piece] | None = None
) -> Corpus:
    """Cut the documents in files, and in all .txt and .jsonl files below folders, into pieces of at most `limit` bytes.

    A .txt file is one document. Each line of a .jsonl file is one document: an object with either `text`, a string, or
    `messages`, which `read_chat` makes a document of (tokenization.chats). Other keys, blank lines and documents
    without any text are ignored. A plain text becomes bos + text + eos. A Special takes SPECIAL_BYTES of `limit`.

    Everything is read and checked here, once. No more than one line of a .jsonl file is in memory at a time, and .txt
    files are only mapped. Pieces of documents on lines longer than LONG_LINE go to an unnamed temporary file. Raises
    InputError if the input is not as described, or if there is no room for that file.
    """
    files = tuple(_files(paths))
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files))
    documents = (document for source, path in enumerate(files) for document in _documents(source, path, read_chat))
    with tempfile.SpooledTemporaryFile(max_size=1) as store:  # makes no file unless something is written
        tables = _cut(documents, limit, store)
        long = mmap.mmap(store.fileno(), 0, access=mmap.ACCESS_READ) if store.tell() > 0 else b""
    corpus = Corpus(files, stamps, read_chat, *tables, long)
    if len(corpus) == 0:
        raise InputError(f"there is no text in {', '.join(map(str, paths))}: give .txt or .jsonl files that have some")
    return corpus


def text_corpus(texts: Iterable[str], limit: int) -> Corpus:
    """Plain text documents held in memory, cut as `read_corpus` does. Raises InputError if there is no text."""
    sources = tuple(text.encode() for text in texts)
    documents = ((index, 0, len(text), [text, Special("eos")], None) for index, text in enumerate(sources))
    corpus = Corpus(sources, ((0, 0),) * len(sources), None, *_cut(documents, limit))
    if len(corpus) == 0:
        raise InputError("there is no text in the documents: give at least one that is not empty")
    return corpus


# A document without its first segment: its texts as UTF-8 (the text of a .txt file is the mapped file) and the rest.
_Parts = list[bytes | mmap.mmap | Special | Markup]


# Source, offset, length, parts, and the parsed document if its line is longer than LONG_LINE.
_Document = tuple[int, int, int, _Parts, Piece | None]


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            # Sorted by path components, since the order must not depend on the system's path separator.
            found = [below for below in path.rglob("*") if below.suffix in (".txt", ".jsonl") and below.is_file()]
            found.sort(key=lambda below: below.parts)
            if not found:
                raise InputError(f"there is no .txt or .jsonl file below {path}: name another folder or a file")
            yield from found
        elif not path.exists():
            raise InputError(f"{path} does not exist: name a .txt or .jsonl file, or a folder of them")
        elif path.suffix not in (".txt", ".jsonl"):
            raise InputError(f"{path} is neither .txt nor .jsonl: convert it to one of them")
        else:
            yield path


def _documents(source: int, path: Path, read_chat: Callable | None) -> Iterator[_Document]:
    with open(path, "rb") as file:
        if path.suffix == ".txt":
            try:
                for _ in codecs.iterdecode(iter(lambda: file.read(1 << 20), b""), "utf-8"):
                    pass
            except UnicodeDecodeError as error:
                raise InputError(f"{path} is not UTF-8: convert it to UTF-8") from error
            if file.tell() > 0:  # an empty file cannot be mapped
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                    yield source, 0, len(text), [text, Special("eos")], None
            return
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    document = _parse(line, read_chat)
                except InputError as error:
                    raise InputError(f"{path}, line {number}: {error}") from error
                parts = [_encoded(segment) for segment in document[1:]]
                yield source, offset, len(line), parts, document if len(line) > LONG_LINE else None
            offset += len(line)


def _parse(line: bytes, read_chat: Callable[[Mapping[str, Any]], Piece] | None) -> Piece:
    """The document on one line of a .jsonl file, including its first segment."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8: convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error}): write one JSON object on each line") from error
    if not isinstance(row, dict) or ("text" in row) == ("messages" in row):
        raise InputError("not an object with either `text` or `messages`: write one with exactly one of these keys")
    if "text" in row:
        return Segment(Special("bos")), Segment(_checked(row["text"], "text")), Segment(Special("eos"))
    if read_chat is None:
        raise InputError("a chat, which cannot be read without a chat template: write `text`")
    return read_chat(row)


def _checked(text: object, key: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"`{key}` is not a string: write a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise InputError(f"`{key}` contains half of a surrogate pair, which is not valid text: remove it") from error
    return text


def _encoded(segment: Segment) -> bytes | Special | Markup:
    return segment.content.encode() if isinstance(segment.content, str) else segment.content


def _stamp(descriptor: int) -> tuple[int, int]:
    stat = os.fstat(descriptor)
    return stat.st_size, stat.st_mtime_ns


def _text_piece(text: bytes, ends: bool) -> Piece:
    return Segment(Special("bos")), Segment(text.decode()), *((Segment(Special("eos")),) if ends else ())


def _spans(document: Piece, bounds: Iterable[tuple[int, int]]) -> Iterator[Piece]:
    """For each (start, stop): the document's first segment, then what lies in its units [start, stop)."""
    parts = [_encoded(segment) for segment in document[1:]]
    units = _units(parts)
    for start, stop in bounds:
        segments = [document[0]]
        for part in range(bisect_right(units, start) - 1, bisect_left(units, stop)):
            content, segment = parts[part], document[1 + part]
            if isinstance(content, Special | Markup):
                segments.append(segment)
            elif text := content[max(start - units[part], 0) : stop - units[part]]:
                segments.append(segment._replace(content=text.decode()))
        yield tuple(segments)


def _units(parts: _Parts) -> list[int]:
    """The unit at which each part starts, then the number of units."""
    return list(accumulate((1 if isinstance(part, Special | Markup) else len(part) for part in parts), initial=0))


def _write_pieces(store: BinaryIO, pieces: Iterable[Piece]) -> Iterator[tuple[int, int]]:
    """Write each piece to `store`, and yield the bytes at which it begins and ends there."""
    try:
        for piece in pieces:
            start = store.tell()
            store.write(json.dumps(piece, ensure_ascii=False).encode())
            yield start, store.tell()
        store.flush()
    except OSError as error:
        raise InputError(f"no room for temporary files ({error}): set TMPDIR to a folder with room") from error


def _read_piece(text: bytes) -> Piece:
    return tuple(
        Segment(content if isinstance(content, str) else _read_special(content), loss_mask)
        for content, loss_mask in json.loads(text)
    )


def _read_special(values: list) -> Special | Markup:
    return Special(*values) if isinstance(values[0], str) else Markup(*map(tuple, values))


def _cut(
    documents: Iterable[_Document], limit: int, store: BinaryIO | None = None
) -> tuple[Int64[np.ndarray, "documents 3"], Int64[np.ndarray, "pieces 3"], bool]:
    """The tables of a Corpus, and whether there are chats. Pieces of long documents go to `store`."""
    if limit < SMALLEST_LIMIT:
        raise InputError(f"pieces of {limit} bytes are too short: allow at least {SMALLEST_LIMIT}")
    document_table, piece_table = array("q"), array("q")  # a tuple for each piece would take ten times the memory
    number, has_chats = 0, False
    for source, offset, length, parts, long in documents:
        has_chats = has_chats or Special("eos") not in parts
        if not any(len(part) for part in parts if not isinstance(part, Special | Markup)):
            continue
        document_table.extend((source, offset, length))
        bounds = pairwise(chain((0,), _stops(parts, limit - SPECIAL_BYTES)))
        for start, stop in bounds if long is None else _write_pieces(store, _spans(long, bounds)):
            piece_table.extend((number, start, stop))
        number += 1
    tables = (np.array(table, np.int64).reshape(-1, 3) for table in (document_table, piece_table))
    return next(tables), next(tables), has_chats


def _stops(parts: _Parts, room: int) -> Iterator[int]:
    """The unit after the last of each piece of a document, with `room` bytes for what follows a piece's first part."""
    units = _units(parts)
    part, place = 0, 0
    while (stop := _stop(parts, part, place, room)) is not None:
        part, place = stop
        yield units[part] + place
    yield units[-1]


def _stop(parts: _Parts, part: int, place: int, room: int) -> tuple[int, int] | None:
    """Where the piece that starts at byte `place` of parts[`part`] ends: (part, byte in it), or None for the end.

    A piece ends before the last message that begins in the second half of its room. If there is none it ends after the
    last line break there, or else before the last space, or else before the last message or between two characters.
    Otherwise it never ends beside what a tokenizer or a template writes: a header stays with the start of its text, and
    the end of a text with its eos.
    """
    message = line = space = character = None  # the last position of each kind so far
    first, spent = part, 0
    while part < len(parts):
        content = parts[part]
        if isinstance(content, Special | Markup):
            if spent and isinstance(content, Markup) and _begins_message(parts, part):
                character = part, 0
                message = character if 2 * spent >= room else message
            spent += _cost(content)
            if spent > room:
                break
        else:
            end = min(len(content), place + room - spent)
            half = place + max(1, (room + 1) // 2 - spent)
            high = min(end, len(content) - 1)
            if (found := content.rfind(b"\n", half - 1, high)) >= 0:
                line = part, found + 1
            if (found := content.rfind(b" ", half, high + 1)) >= 0:
                space = part, found
            if (found := _between_characters(content, half, high)) is not None:
                character = part, found
            spent += end - place
            if end < len(content):
                break
        part, place = part + 1, 0
    else:
        return None
    # A template may write more than a piece holds: that is a piece of its own.
    return message or line or space or character or _beyond(parts, max(part, first + 1))


def _beyond(parts: _Parts, part: int) -> tuple[int, int] | None:
    return (part, 0) if part < len(parts) else None


def _begins_message(parts: _Parts, part: int) -> bool:
    """Whether nothing but white space is between parts[`part`] and a Markup before it: there a message ends."""
    before = part - 1
    while before >= 0 and not isinstance(parts[before], Special | Markup) and not parts[before].strip():
        before -= 1
    return before >= 0 and isinstance(parts[before], Markup)


def _cost(content: Special | Markup) -> int:
    """How much of a piece's limit it takes."""
    if isinstance(content, Special) or max(map(len, content)) < 2:
        return SPECIAL_BYTES
    return max(SPECIAL_BYTES, *(len("".join(words).encode()) for words in content))


def _between_characters(text: bytes | mmap.mmap, low: int, high: int) -> int | None:
    """The last position in [low, high] between two characters that do not combine, or else between any two."""
    fallback = None
    for place in range(high, low - 1, -1):
        if text[place] & 0xC0 == 0x80:  # inside a character
            continue
        fallback = fallback or place
        following = text[place : place + 4].decode(errors="ignore")[0]
        joiner = "\u200d"
        if (
            not unicodedata.category(following).startswith("M")
            and following != joiner
            and text[max(place - 3, 0) : place] != joiner.encode()
        ):
            return place
    return fallback

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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64

from minalm.errors import InputError
from minalm.text.documents import ENDS, ROLES, Piece, Segment, Special, end_of
from minalm.text.order import mix, permute

# How many bytes of a piece's limit a special part counts as, whatever tokens stand for it. The most expensive known
# cases are byte students of TinyLlama and OLMo 2: 14 tokens for an assistant's header (3 parts) and 2 for an end. Every
# piece starts with bos or the start of a chat, and headers alternate with ends, so 4 for each part are enough. A
# template that says more around a message (OLMo 3 after a system message) may fill a window before its piece ends.
SPECIAL_BYTES = 4


# After the start, a header, one character and an end must fit: otherwise a piece might have no place to end.
SMALLEST_LIMIT = SPECIAL_BYTES + 3 * SPECIAL_BYTES + 4 + SPECIAL_BYTES

# A line of a .jsonl file longer than this is parsed only once: parsing it again for each piece would take time
# quadratic in its length.
LONG_LINE = 1 << 16  # bytes


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents cut into pieces of at most `limit` bytes. The text of files stays on disk. Host only.

    Positions in a document are counted in units: each byte of text is one unit, and so is each special part. The first
    part of a document (bos or the start of a chat), which is repeated in each of its pieces, is not counted. Made by
    `read_corpus` and `text_corpus`.
    """

    sources: tuple[Path | bytes, ...]  # .txt or .jsonl files, or single documents as UTF-8
    stamps: tuple[tuple[int, int], ...]  # size in bytes and time of change in ns of each source, when read
    mask_prompt: bool
    documents: Int64[np.ndarray, "documents 3"]  # source; offset and length in bytes, of the line in a .jsonl file
    pieces: Int64[np.ndarray, "pieces 3"]  # document; first unit and the one after the last, or bytes of `long`
    chat_parts: frozenset[str]  # special parts in the chats; not every tokenizer can write them all
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

    @property
    def has_chats(self) -> bool:
        """Whether any document is a chat."""
        return bool(self.chat_parts)

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
            return next(_spans(_parse(file.read(length), self.mask_prompt), [(start, stop)]))

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


def read_corpus(paths: Sequence[Path], limit: int, mask_prompt: bool = False) -> Corpus:
    """Cut the documents in files, and in all .txt and .jsonl files below folders, into pieces of at most `limit` bytes.

    A .txt file is one document. Each line of a .jsonl file is one document: an object with either `text`, a string, or
    `messages`, a list of objects with `role`, one of ROLES, and `content`, a string. Other keys, blank lines and
    documents without any text are ignored. A plain text becomes bos + text + eos, and a chat start_of_chat followed by
    (header_open, role, header_close, text, end) for each message. With `mask_prompt`, only the assistant's texts and
    their ends count in the losses of a chat. A special part takes SPECIAL_BYTES of `limit`.

    Everything is read and checked here, once. No more than one line of a .jsonl file is in memory at a time, and .txt
    files are only mapped. Pieces of documents on lines longer than LONG_LINE go to an unnamed temporary file. Raises
    InputError if the input is not as described, or if there is no room for that file.
    """
    files = tuple(_files(paths))
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files))
    documents = (document for source, path in enumerate(files) for document in _documents(source, path, mask_prompt))
    with tempfile.SpooledTemporaryFile(max_size=1) as store:  # makes no file unless something is written
        tables = _cut(documents, limit, store)
        long = mmap.mmap(store.fileno(), 0, access=mmap.ACCESS_READ) if store.tell() > 0 else b""
    corpus = Corpus(files, stamps, mask_prompt, *tables, long)
    if len(corpus) == 0:
        raise InputError(f"there is no text in {', '.join(map(str, paths))}: give .txt or .jsonl files that have some")
    return corpus


def text_corpus(texts: Iterable[str], limit: int) -> Corpus:
    """Plain text documents held in memory, cut as `read_corpus` does. Raises InputError if there is no text."""
    sources = tuple(text.encode() for text in texts)
    documents = ((index, 0, len(text), [text, Special("eos")], None) for index, text in enumerate(sources))
    corpus = Corpus(sources, ((0, 0),) * len(sources), False, *_cut(documents, limit))
    if len(corpus) == 0:
        raise InputError("there is no text in the documents: give at least one that is not empty")
    return corpus


# A document without its first part: its texts as UTF-8 (the text of a .txt file is the mapped file) and special parts.
_Parts = list[bytes | mmap.mmap | Special]


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


def _documents(source: int, path: Path, mask_prompt: bool) -> Iterator[_Document]:
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
                    document = _parse(line, mask_prompt)
                except InputError as error:
                    raise InputError(f"{path}, line {number}: {error}") from error
                parts = [_encoded(segment) for segment in document[1:]]
                yield source, offset, len(line), parts, document if len(line) > LONG_LINE else None
            offset += len(line)


def _parse(line: bytes, mask_prompt: bool) -> Piece:
    """The document on one line of a .jsonl file, including its first part."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8: convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error}): write one JSON object on each line") from error
    if not isinstance(row, dict) or ("text" in row) == ("messages" in row):
        raise InputError("not an object with either `text` or `messages`: write one with exactly one of these keys")
    if "text" in row:
        document = (Segment(Special("bos")), Segment(_checked(row["text"], "text")), Segment(Special("eos")))
    else:
        document = _chat(row["messages"], mask_prompt)
    return document


def _chat(messages: object, mask_prompt: bool) -> Piece:
    if not isinstance(messages, list) or not messages:
        raise InputError("`messages` is empty or not a list: write a list of objects with `role` and `content`")
    segments = [Segment(Special("start_of_chat"), not mask_prompt)]
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise InputError("a message lacks `role` or `content`: give it both")
        role = message["role"]
        if role not in ROLES:
            raise InputError(f"unknown role {role!r}: use one of {', '.join(ROLES)}")
        segments += [Segment(Special(part), not mask_prompt) for part in ("header_open", role, "header_close")]
        loss_mask = not mask_prompt or role == "assistant"
        end = end_of(role, last=number == len(messages))
        segments += [Segment(_checked(message["content"], "content"), loss_mask), Segment(end, loss_mask)]
    return tuple(segments)


def _checked(text: object, key: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"`{key}` is not a string: write a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise InputError(f"`{key}` contains half of a surrogate pair, which is not valid text: remove it") from error
    return text


def _encoded(segment: Segment) -> bytes | Special:
    return segment.content if isinstance(segment.content, Special) else segment.content.encode()


def _stamp(descriptor: int) -> tuple[int, int]:
    stat = os.fstat(descriptor)
    return stat.st_size, stat.st_mtime_ns


def _text_piece(text: bytes, ends: bool) -> Piece:
    return Segment(Special("bos")), Segment(text.decode()), *((Segment(Special("eos")),) if ends else ())


def _spans(document: Piece, bounds: Iterable[tuple[int, int]]) -> Iterator[Piece]:
    """For each (start, stop): the document's first part, then what lies in its units [start, stop)."""
    parts = [_encoded(segment) for segment in document[1:]]
    units = _units(parts)
    for start, stop in bounds:
        segments = [document[0]]
        for part in range(bisect_right(units, start) - 1, bisect_left(units, stop)):
            content, segment = parts[part], document[1 + part]
            if isinstance(content, Special):
                segments.append(segment)
            elif text := content[max(start - units[part], 0) : stop - units[part]]:
                segments.append(segment._replace(content=text.decode()))
        yield tuple(segments)


def _units(parts: _Parts) -> list[int]:
    """The unit at which each part starts, then the number of units."""
    return list(accumulate((1 if isinstance(part, Special) else len(part) for part in parts), initial=0))


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
        Segment(content if isinstance(content, str) else Special(*content), loss_mask)
        for content, loss_mask in json.loads(text)
    )


def _cut(
    documents: Iterable[_Document], limit: int, store: BinaryIO | None = None
) -> tuple[Int64[np.ndarray, "documents 3"], Int64[np.ndarray, "pieces 3"], frozenset[str]]:
    """The tables of a Corpus, and the special parts of its chats. Pieces of long documents go to `store`."""
    if limit < SMALLEST_LIMIT:
        raise InputError(f"pieces of {limit} bytes are too short: allow at least {SMALLEST_LIMIT}")
    document_table, piece_table = array("q"), array("q")  # a tuple for each piece would take ten times the memory
    number, chat_parts = 0, set()
    for source, offset, length, parts, long in documents:
        if Special("header_open") in parts:
            chat_parts |= {"start_of_chat", *(part.part for part in parts if isinstance(part, Special))}
        if not any(len(part) for part in parts if not isinstance(part, Special)):
            continue
        document_table.extend((source, offset, length))
        bounds = pairwise(chain((0,), _stops(parts, limit - SPECIAL_BYTES)))
        for start, stop in bounds if long is None else _write_pieces(store, _spans(long, bounds)):
            piece_table.extend((number, start, stop))
        number += 1
    tables = (np.array(table, np.int64).reshape(-1, 3) for table in (document_table, piece_table))
    return next(tables), next(tables), frozenset(chat_parts)


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

    A piece ends after the last line break or turn in the second half of its room. If there is none it ends before the
    last space there, or else after the last turn or between two characters. It never ends beside any other special
    part: a header stays with the start of its text, and the end of a text with its end part or eos.
    """
    line = space = character = None  # the last position of each kind so far
    spent = 0
    while part < len(parts):
        content = parts[part]
        if isinstance(content, Special):
            spent += SPECIAL_BYTES
            if spent > room:
                break
            if content in ENDS:
                character = part + 1, 0
                line = character if 2 * spent >= room else line
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
    return line or space or character


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

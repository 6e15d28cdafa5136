"""Text before any tokenizer: documents as segments, files of documents, pieces that fit a window, their order."""

import codecs
import json
import mmap
import os
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer, UInt64


class InputError(ValueError):
    """Bad input from the user. The message is one sentence that names the thing and says the remedy.

    `train.py` and `convert.py` print it and exit non-zero, without a traceback.
    """


class Control(NamedTuple):
    """A place in a document where each tokenizer writes control tokens of its own, a shared unit of alignment.

    `part` is "bos" or "eos" of a plain text, or a part of a chat: "start_of_chat"; for each message "header_open", its
    role, "header_close", and after its text an end (`end_of`), which some templates write in another way for each role.
    """

    part: str


# A document, or a piece of one: text and control parts in order, each with whether its tokens count in the losses.
class Segment(NamedTuple):
    content: str | Control
    counts: bool = True


Piece = tuple[Segment, ...]

ROLES = ("system", "user", "assistant")


def end_of(role: str, last: bool) -> Control:
    """The control part after the text of a message: "end_of_turn" is the assistant's, and "end_of_chat" its last one.

    A chat whose last message is not the assistant's has no "end_of_chat".
    """
    if role != "assistant":
        return Control(f"end_of_{role}")
    return Control("end_of_chat" if last else "end_of_turn")


# What a control part takes of a piece's byte limit, whatever the tokenizer writes there. The dearest known cases are
# byte students of TinyLlama and OLMo 2: 14 tokens for a header with "assistant" (3 parts), 2 for an end. Every piece
# starts with bos or a chat's start, and headers alternate with ends, so that 4 a part is never less than what is
# written there. A template that says more around a message (OLMo 3 after a system message) may fill a window earlier.
CONTROL_BYTES = 4

# After the start a header, one character and an end must fit, so that a piece can always end somewhere.
SMALLEST_LIMIT = CONTROL_BYTES + 3 * CONTROL_BYTES + 4 + CONTROL_BYTES


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents cut into pieces of at most `limit` bytes; text read from files stays there. Host only.

    Places in a document are counted in units: a byte of text is one unit, a control part is one, and the document's
    first part (bos, or a chat's start), which every piece of it starts with, is none. `read_corpus` and `text_corpus`
    make one.
    """

    sources: tuple[Path | bytes, ...]  # a .txt or .jsonl file, or the UTF-8 of one document held in memory
    stamps: tuple[tuple[int, int], ...]  # of each source, when it was cut: size in bytes, time of change in ns
    mask_prompt: bool
    documents: Int64[np.ndarray, "documents 3"]  # source; offset and length in bytes, of the line if it is .jsonl
    pieces: Int64[np.ndarray, "pieces 3"]  # document; first unit, and the unit after the last
    chat_parts: frozenset[str]  # control parts of chats in the documents, which not every tokenizer can write

    def __len__(self) -> int:
        """The number of pieces."""
        return len(self.pieces)

    @property
    def has_chats(self) -> bool:
        """Whether some document has turns."""
        return bool(self.chat_parts)

    def piece(self, index: int) -> Piece:
        """Piece `index`, in the order of the documents. Raises InputError if its file has changed meanwhile."""
        document, start, stop = self.pieces[index].tolist()
        source, offset, length = self.documents[document].tolist()
        place = self.sources[source]
        if isinstance(place, bytes):
            return _text_piece(place[start:stop], ends=stop > length)
        with open(place, "rb") as file:
            if _stamp(file.fileno()) != self.stamps[source]:
                raise InputError(f"{place} changed while it was in use: leave it as it is and start again")
            if place.suffix == ".txt":  # the document may be gigabytes: read no more than the piece
                file.seek(start)
                return _text_piece(file.read(stop - start), ends=stop > length)
            file.seek(offset)
            return _span(_parse(file.read(length), self.mask_prompt), start, stop)

    def order(self, seed: int, step: int, size: int) -> Int64[np.ndarray, " size"]:
        """Indices of the pieces that make up batch `step`: a function of the arguments and of `len(self)` only.

        Row r is row g = step * size + r of the run: place g % len(self) of epoch g // len(self). The order of an
        epoch is a permutation of all pieces, another one for each (seed, epoch).
        """
        epoch, place = np.divmod(step * size + np.arange(size), len(self))
        # The seed is mixed before the epoch is added: otherwise seed + 1 would give the epochs of seed, one later.
        key = _mix(_mix(np.full(size, seed % 2**64, np.uint64)) + epoch.astype(np.uint64))
        return permute(place, len(self), key)

    def batch(self, seed: int, step: int, size: int) -> list[Piece]:
        """The `size` pieces of batch `step`, see `order`."""
        return [self.piece(index) for index in self.order(seed, step, size).tolist()]


def read_corpus(paths: Sequence[Path], limit: int, mask_prompt: bool = False) -> Corpus:
    """The documents of files, and of all .txt and .jsonl files below folders, in pieces of at most `limit` bytes.

    A .txt file is one document. A line of a .jsonl file is one document: an object with `text`, a string, or with
    `messages`, a list of objects with `role`, one of ROLES, and `content`, a string. Other keys, blank lines and
    documents without any text are ignored. A plain text is bos + text + eos, a chat is start_of_chat + (header_open,
    role, header_close, text, end) for each message. With `mask_prompt` a chat's losses count only the assistant's texts
    and their ends. In `limit` a control part counts as CONTROL_BYTES.

    All of it is read and checked here, once. Of a .jsonl file no more than a line is in memory at a time, and of a
    .txt file nothing but what the system caches. Raises InputError for whatever is not as said above.
    """
    files = tuple(_files(paths))
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files))
    documents = (document for source, path in enumerate(files) for document in _documents(source, path, mask_prompt))
    corpus = Corpus(files, stamps, mask_prompt, *_cut(documents, limit))
    if len(corpus) == 0:
        raise InputError(f"there is no text in {', '.join(map(str, paths))}: give .txt or .jsonl files that hold some")
    return corpus


def text_corpus(texts: Iterable[str], limit: int) -> Corpus:
    """Plain text documents held in memory, cut as `read_corpus` does. Raises InputError if there is no text."""
    sources = tuple(text.encode() for text in texts)
    documents = ((index, 0, len(text), [text, Control("eos")]) for index, text in enumerate(sources))
    corpus = Corpus(sources, ((0, 0),) * len(sources), False, *_cut(documents, limit))
    if len(corpus) == 0:
        raise InputError("there is no text in the documents: give at least one that is not empty")
    return corpus


def permute(
    place: Integer[np.ndarray, " rows"], size: int, key: UInt64[np.ndarray, " rows"]
) -> Int64[np.ndarray, " rows"]:
    """Where the permutation of range(`size`) named by each row's key sends `place`: the same on every machine.

    A balanced Feistel network over the smallest even number of bits that hold `size`, walked along its cycle until the
    value falls below `size` (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"); no table is needed.
    """
    half = np.uint64(max(3, ((size - 1).bit_length() + 1) // 2))  # with fewer bits some orders are much likelier
    mask = (np.uint64(1) << half) - np.uint64(1)
    value = place.astype(np.uint64)
    outside = np.ones(len(value), bool)
    while outside.any():
        left, right, round_key = value[outside] >> half, value[outside] & mask, key[outside]
        for _ in range(8):
            round_key = _mix(round_key)
            left, right = right, left ^ (_mix(round_key ^ right) & mask)
        value[outside] = left << half | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


def _mix(x: UInt64[np.ndarray, " rows"]) -> UInt64[np.ndarray, " rows"]:
    """The output of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_ENDS = {end_of(role, last) for role in ROLES for last in (False, True)}

# What a document consists of after its first part: the UTF-8 of its texts (of a .txt file, the file itself) and control
# parts.
_Parts = list[bytes | mmap.mmap | Control]
_Document = tuple[int, int, int, _Parts]  # source, offset, length


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            # By path components: the order of two files must not depend on the separator of the system.
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
                    yield source, 0, len(text), [text, Control("eos")]
            return
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    document = _parse(line, mask_prompt)
                except InputError as error:
                    raise InputError(f"{path}, line {number}: {error}") from error
                yield source, offset, len(line), [_encoded(segment) for segment in document[1:]]
            offset += len(line)


def _parse(line: bytes, mask_prompt: bool) -> Piece:
    """The document of one line of a .jsonl file, its first part included."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8: convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error}): write one JSON object on each line") from error
    if not isinstance(row, dict) or ("text" in row) == ("messages" in row):
        raise InputError("neither `text` nor `messages` alone: write an object with exactly one of these keys")
    if "text" in row:
        document = (Segment(Control("bos")), Segment(_checked(row["text"], "text")), Segment(Control("eos")))
    else:
        document = _chat(row["messages"], mask_prompt)
    return document


def _chat(messages: object, mask_prompt: bool) -> Piece:
    if not isinstance(messages, list) or not messages:
        raise InputError("`messages` is not a list of messages: write a list of objects with `role` and `content`")
    segments = [Segment(Control("start_of_chat"), not mask_prompt)]
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise InputError("a message lacks `role` or `content`: give it both")
        role = message["role"]
        if role not in ROLES:
            raise InputError(f"unknown role {role!r}: use one of {', '.join(ROLES)}")
        segments += [Segment(Control(part), not mask_prompt) for part in ("header_open", role, "header_close")]
        counts = not mask_prompt or role == "assistant"
        end = end_of(role, last=number == len(messages))
        segments += [Segment(_checked(message["content"], "content"), counts), Segment(end, counts)]
    return tuple(segments)


def _checked(text: object, key: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"`{key}` is not a string: write a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise InputError(f"`{key}` holds half of a surrogate pair, which is no text: remove it") from error
    return text


def _encoded(segment: Segment) -> bytes | Control:
    return segment.content if isinstance(segment.content, Control) else segment.content.encode()


def _stamp(descriptor: int) -> tuple[int, int]:
    stat = os.fstat(descriptor)
    return stat.st_size, stat.st_mtime_ns


def _text_piece(text: bytes, ends: bool) -> Piece:
    return Segment(Control("bos")), Segment(text.decode()), *((Segment(Control("eos")),) if ends else ())


def _span(document: Piece, start: int, stop: int) -> Piece:
    """The first part and what lies in the units [start, stop) of the rest."""
    segments = [document[0]]
    unit = 0
    for content, counts in document[1:]:
        if isinstance(content, Control):
            if start <= unit < stop:
                segments.append(Segment(content, counts))
            unit += 1
        else:
            text = content.encode()
            part = text[max(start - unit, 0) : max(stop - unit, 0)]
            if part:
                segments.append(Segment(part.decode(), counts))
            unit += len(text)
    return tuple(segments)


def _cut(
    documents: Iterable[_Document], limit: int
) -> tuple[Int64[np.ndarray, "documents 3"], Int64[np.ndarray, "pieces 3"], frozenset[str]]:
    """The tables of a Corpus, and the control parts of its chats."""
    if limit < SMALLEST_LIMIT:
        raise InputError(f"pieces of {limit} bytes are too short: make room for at least {SMALLEST_LIMIT}")
    document_table, piece_table = array("q"), array("q")  # a tuple for each piece would take ten times the memory
    number, chat_parts = 0, set()
    for source, offset, length, parts in documents:
        if Control("header_open") in parts:
            chat_parts |= {"start_of_chat", *(part.part for part in parts if isinstance(part, Control))}
        if not any(len(part) for part in parts if not isinstance(part, Control)):
            continue
        document_table.extend((source, offset, length))
        start = 0
        for stop in _stops(parts, limit - CONTROL_BYTES):
            piece_table.extend((number, start, stop))
            start = stop
        number += 1
    tables = (np.array(table, np.int64).reshape(-1, 3) for table in (document_table, piece_table))
    return next(tables), next(tables), frozenset(chat_parts)


def _stops(parts: _Parts, room: int) -> Iterator[int]:
    """The unit after the last one of each piece of a document, if a piece has `room` bytes after its first part."""
    units = list(accumulate((1 if isinstance(part, Control) else len(part) for part in parts), initial=0))
    part, place = 0, 0
    while (stop := _stop(parts, part, place, room)) is not None:
        part, place = stop
        yield units[part] + place
    yield units[-1]


def _stop(parts: _Parts, part: int, place: int, room: int) -> tuple[int, int] | None:
    """Where the piece that starts at byte `place` of parts[`part`] ends, as (part, byte in it); None: at the end.

    A piece ends after a line break or a turn in the last half of the room, else before a space there, else after the
    last turn or between characters. It never ends next to another control part: a header stays with the start of its
    text, and the end of a text with its end or eos.
    """
    line = space = character = None  # the last place of each kind
    spent = 0
    while part < len(parts):
        content = parts[part]
        if isinstance(content, Control):
            spent += CONTROL_BYTES
            if spent > room:
                break
            if content in _ENDS:
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
    """The last place in [low, high] between two characters that do not combine, or if there is none, between any."""
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

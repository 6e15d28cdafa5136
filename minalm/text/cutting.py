"""Documents cut into pieces that fit a window, at places where a reader would."""

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import BinaryIO

from minalm.errors import InputError
from minalm.text.documents import Markup, Piece, Special

# How many bytes of a piece's limit a Special or a Markup of one word counts as, whatever tokens stand for it: 14 is the
# most that a known tokenizer needs (TinyLlama's bytes for a header), and texts are between them. A Markup of several
# words counts as its text is long.
SPECIAL_BYTES = 4


# After the start, a header, one character and an end must fit: otherwise a piece might have no place to end.
SMALLEST_LIMIT = SPECIAL_BYTES + 3 * SPECIAL_BYTES + 4 + SPECIAL_BYTES


class FileText:
    """The bytes of an open file from `start` on, for cutting: a block of it is in memory, however long it is.

    It is not mapped, since a mapped file that somebody makes shorter ends the process.
    """

    BLOCK = 1 << 18

    def __init__(self, file: BinaryIO, start: int, size: int):
        self.file, self.start, self.size = file, start, size
        self.first, self.block = 0, b""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int | slice) -> int | bytes:
        if isinstance(place, int):
            return self._read(place, place + 1)[0]
        start, stop, _ = place.indices(self.size)
        return self._read(start, max(start, stop))

    def rfind(self, part: bytes, start: int, stop: int) -> int:
        """As of bytes."""
        start, stop, _ = slice(start, stop).indices(self.size)
        found = self._read(start, max(start, stop)).rfind(part)
        return found if found < 0 else start + found

    def _read(self, start: int, stop: int) -> bytes:
        """Raises InputError if the file has become shorter."""
        if start < self.first or stop > self.first + len(self.block):
            self.file.seek(self.start + start)
            self.first, self.block = start, self.file.read(max(self.BLOCK, stop - start))
        if stop > self.first + len(self.block):
            raise InputError(f"{self.file.name} changed while it was read: leave it unchanged and start again")
        return self.block[start - self.first : stop - self.first]


# A document without its first segment: its texts as UTF-8, and the rest.
Parts = list[bytes | FileText | Special | Markup]


def parts_of(document: Piece) -> Parts:
    """What is cut of a document: all but its first segment, which stands in each of its pieces."""
    return [s.content.encode() if isinstance(s.content, str) else s.content for s in document[1:]]


def spans(document: Piece, bounds: Iterable[tuple[int, int]]) -> Iterator[Piece]:
    """For each (start, stop): the document's first segment, then what lies in its units [start, stop)."""
    parts = parts_of(document)
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


def _units(parts: Parts) -> list[int]:
    """The unit at which each part starts, then the number of units."""
    return list(accumulate((1 if isinstance(part, Special | Markup) else len(part) for part in parts), initial=0))


def stops(parts: Parts, limit: int) -> Iterator[int]:
    """The unit after the last of each piece of a document, of at most `limit` bytes with its first segment."""
    units, room = _units(parts), limit - SPECIAL_BYTES
    if units[-1] + sum(_cost(part) - 1 for part in parts if isinstance(part, Special | Markup)) <= room:
        yield units[-1]
        return
    part, place = 0, 0
    while (stop := _stop(parts, part, place, room)) is not None:
        part, place = stop
        yield units[part] + place
    yield units[-1]


def _stop(parts: Parts, part: int, place: int, room: int) -> tuple[int, int] | None:
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


def _beyond(parts: Parts, part: int) -> tuple[int, int] | None:
    return (part, 0) if part < len(parts) else None


def _begins_message(parts: Parts, part: int) -> bool:
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


def _between_characters(text: bytes | FileText, low: int, high: int) -> int | None:
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

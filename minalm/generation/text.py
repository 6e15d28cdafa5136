"""What is generated, as text: whole characters as they come, and where it ends."""

import codecs
from collections.abc import Collection, Sequence

from minalm.errors import InputError


class TextStream:
    """Bytes in pieces -> text in pieces. Never part of a character, and nothing of a stop string.

    Bytes that no byte can complete to a character become U+FFFD. What may be the beginning of a stop string is held back
    until it is known not to be. At `max_bytes` the text ends, with its last whole character.
    """

    def __init__(self, stops: Collection[bytes] = (), max_bytes: int | None = None) -> None:
        self.stops, self.left = tuple(stops), max_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = b""
        self.ended = False

    def add(self, new: bytes) -> str:
        """The text that is certain now."""
        if self.ended:
            return ""
        self.held += new
        if found := [place for stop in self.stops if (place := self.held.find(stop)) >= 0]:
            self.ended = True
            return self._decoded(self.held[: min(found)])
        kept = max((_beginning(self.held, stop) for stop in self.stops), default=0)
        certain, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return self._decoded(certain)

    def close(self) -> str:
        """The rest, when no more bytes come. A character that never was completed is U+FFFD, unless `max_bytes` cut it."""
        if not self.ended:
            rest = self._decoded(self.held)
            if not self.ended:
                self.ended = True
                return rest + self.decoder.decode(b"", final=True)
            return rest
        if self.left == 0:
            return ""
        return self.decoder.decode(b"", final=True)

    def _decoded(self, certain: bytes) -> str:
        if self.left is not None:
            certain = certain[: self.left]
            self.left -= len(certain)
            self.ended |= self.left == 0
        return self.decoder.decode(certain)


class Continuation:
    """The ids that a row goes on with, and whether it has ended, other than by the device's stop ids."""

    def __init__(
        self, token_bytes: Sequence[bytes] | None, stops: Collection[bytes], max_tokens: int, max_bytes: int | None
    ) -> None:
        self.token_bytes, self.stops = token_bytes, tuple(stops)
        self.max_tokens, self.max_bytes = max_tokens, max_bytes
        self.ids: list[int] = []
        self.tail = b""  # the newest bytes, in which a stop string may begin
        self.size = 0
        self.ended = max_tokens == 0

    def add(self, new: Sequence[int], stop_ids: Collection[int]) -> list[int]:
        """Takes new ids up to what ends the row; those that were taken."""
        taken = []
        for token in new:
            if self.ended:
                break
            if token in stop_ids:
                self.ended = True
                break
            self.ids.append(token)
            taken.append(token)
            self.ended = len(self.ids) >= self.max_tokens or self._ends_text(token)
        return taken

    def _ends_text(self, token: int) -> bool:
        if self.max_bytes is None and not self.stops:
            return False
        self.tail += self.token_bytes[token]
        self.size += len(self.token_bytes[token])
        if found := [place for stop in self.stops if (place := self.tail.find(stop)) >= 0]:
            behind = len(self.tail) - min(found)  # bytes that are not wanted: whole tokens are taken off
            while behind > 0:
                behind -= len(self.token_bytes[self.ids.pop()])
            return True
        longest = max((len(stop) for stop in self.stops), default=1)
        self.tail = self.tail[len(self.tail) - longest + 1 :] if longest > 1 else b""
        return self.max_bytes is not None and self.size >= self.max_bytes


def stop_bytes(stops: Collection[str]) -> tuple[bytes, ...]:
    """Stop strings as bytes. Raises InputError for one that is empty or no text."""
    for stop in stops:
        if not stop:
            raise InputError("a --stop is empty, and an empty string is everywhere: give a text, or leave it out")
        try:
            stop.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"--stop {stop!r} is no text: give one that UTF-8 can write") from error
    return tuple(stop.encode() for stop in stops)


def _beginning(text: bytes, stop: bytes) -> int:
    """How many of the last bytes of a text are the beginning of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)

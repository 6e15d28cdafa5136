"""Speculation: a draft proposes some tokens, and the model reads all of them at once (engine.verify). It changes nothing
but the time: greedy continuations are the same, and samples have the same distribution.

Whether it pays, and how long a draft should be, depends on how often drafts are right and on what they cost. Both are
measured as the text is written: where drafts do not pay, tokens are made one by one, with a trial now and then.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from minalm.errors import InputError
from minalm.generation.engine import DRAFTS, Generator, filled_up
from minalm.generation.sampling import Sampling, SamplingConfig
from minalm.generation.text import Continuation, stop_bytes
from minalm.text.documents import Markup, Segment
from minalm.tokenization.vocabulary import Vocabulary

LONGEST, SHORTEST = 8, 3  # tokens at the end of a text that are looked up in it
FORGETTING = 0.8  # of what was measured, how much counts after one more
SLOWER = 0.9  # the same of what drafts lose, which varies more
WITHOUT = 4  # tokens that are made one by one where nothing is proposed
LOSS = 0.02  # of the time, at most, that goes into trials where drafts do not pay


@runtime_checkable
class Draft(Protocol):
    """What proposes tokens."""

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow a text, a prompt and what was written after it."""


@dataclass
class Statistics:
    """What drafts were worth."""

    proposed: int = 0
    accepted: int = 0
    drafts: int = 0
    single: int = 0  # tokens made one by one

    def __str__(self) -> str:
        share = self.accepted / self.proposed if self.proposed else 0.0
        return (
            f"drafts {self.drafts:,}, {self.accepted:,} of {self.proposed:,} tokens accepted ({share:.0%}); "
            f"{self.single:,} tokens made one by one"
        )


class LookupDraft:
    """Proposes what followed when the last tokens occurred before (prompt lookup)."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.places: dict[tuple[int, ...], int] = {}  # the last tokens -> where the next one is

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """What followed the longest of the text's ends that occurred before."""
        if list(ids[: len(self.read)]) != self.read:
            self.read, self.places = [], {}
        for place in range(max(len(self.read), SHORTEST), len(ids)):
            for size in range(SHORTEST, min(LONGEST, place) + 1):
                self.places[tuple(ids[place - size : place])] = place
        self.read = list(ids)
        for size in range(min(LONGEST, len(ids)), SHORTEST - 1, -1):
            place = self.places.get(tuple(ids[-size:]))
            if place is not None:
                return self.read[place : place + count]
        return []


class ModelDraft:
    """Proposes the bytes of the words that a subword model finds most probable."""

    def __init__(self, generator: Generator, student: Vocabulary) -> None:
        """`student`: the byte vocabulary for which it proposes. Raises InputError if the draft reads other text."""
        self.generator, (self.vocabulary,) = generator, generator.vocabularies
        self.student = student
        if student.tokenizer is not None:
            raise InputError(f"{student.name} does not write bytes: --draft is for byte students")
        probe = "e\u0301 \ufb01 \u212b \u1e9b\u0323 \uff21"  # what NFC, NFD, NFKC and NFKD each change
        if self.vocabulary.normalize(probe) != student.normalize(probe):
            raise InputError(
                f"{self.vocabulary.name} normalizes text otherwise than {student.name}: "
                "draft with the model that the student came from"
            )

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """The draft's tokenization of the text, less its last token (which the next bytes may still change), goes on
        with its most probable tokens; what follows in them behind what was taken off is proposed. If they spell
        something else, the whole tokenization goes on."""
        words = 1 + -(-count // 4)
        for tokens, rest in self._cuts(ids):
            [new] = self.generator.generate(
                [tokens], SamplingConfig(), words, self.vocabulary.stop_ids, max_bytes=len(rest) + count
            )
            spelled = b"".join(self.vocabulary.token_bytes[i] for i in new)
            if spelled.startswith(rest) and len(spelled) > len(rest):
                return [*spelled[len(rest) : len(rest) + count]]
        return []

    def _cuts(self, ids: Sequence[int]) -> list[tuple[Int[np.ndarray, " time"], bytes]]:
        """The draft's ids of a text up to a token's border, and the bytes behind it: without the text's last token, and
        with it."""
        words = {i: word for word, i in self.student.special.items()}
        pieces, run = [], bytearray()
        for i in (*ids, None):
            if i is not None and i < 256:
                run.append(i)
                continue
            text = bytes(run).decode(errors="ignore") if i is not None else _whole(bytes(run))
            pieces += [Segment(text)] if text else []
            pieces += [] if i is None else [Segment(Markup((words[i],), (words[i],)))]
            left = bytes(run)[len(text.encode()) :] if i is None else b""
            run = bytearray()
        [encoding] = self.vocabulary.encode([tuple(pieces)])
        whole = encoding.ids
        cuts = [(whole, left)]
        if len(ids) and ids[-1] < 256 and len(whole) > 1:
            cuts.insert(0, (whole[:-1], self.vocabulary.token_bytes[whole[-1]] + left))
        return [cut for cut in cuts if len(cut[0])]


def _whole(text: bytes) -> str:
    """A text without the beginning of a character at its end."""
    for cut in range(4):
        try:
            return text[: len(text) - cut].decode()
        except UnicodeDecodeError:
            continue
    return text.decode(errors="ignore")


@dataclass
class Pace:
    """What a token takes with drafts and without, and which is faster. One serves many texts."""

    single: float | None = None  # seconds of a token made alone
    drafted: dict[int, float] = field(default_factory=dict)  # of drafts of a length: seconds, with their verification
    right: float = 2.0  # drafted tokens that were right, of late
    tried: float = 3.0  # those, and the first wrong one of each draft
    lost: float = 0.0  # seconds by which a draft, or the search for one, took longer than its tokens alone
    first: set[int] = field(default_factory=set)  # lengths (0: none) timed once: that time was compilation
    alone: int = 2  # tokens to make one by one before the next draft, in this text or the next

    def note_single(self, seconds: float | None, tokens: int) -> None:
        """Takes in a call that made tokens one by one; None: it also did something else."""
        self.alone = max(self.alone - tokens, 0)
        if seconds is not None and self._is_compiled(0):
            self.single = _mean(self.single, seconds / max(tokens, 1))

    def note_draft(self, length: int, seconds: float, proposed: int, accepted: int) -> None:
        """Takes in a draft for which `length` tokens were asked, from its making to its verification."""
        if self._is_compiled(length):
            self.drafted[length] = _mean(self.drafted.get(length), seconds)
            self._note_loss(min(seconds, 3 * self.drafted[length]), accepted + 1)
        self.right = FORGETTING * self.right + accepted
        self.tried = FORGETTING * self.tried + min(accepted + 1, proposed)

    def note_nothing(self, seconds: float) -> None:
        """Takes in that nothing was proposed."""
        self._note_loss(seconds, 0)

    def _note_loss(self, seconds, tokens):
        if self.single is not None:
            self.lost = SLOWER * self.lost + (1 - SLOWER) * (seconds - tokens * self.single)
            self.alone = self.wait()

    def wait(self) -> int:
        """How many tokens to make one by one before the next draft: 0 where drafts have been faster, and else so many
        that the next trial costs LOSS of their time."""
        return 0 if self.single is None else math.ceil(max(self.lost, 0.0) / (LOSS * self.single))

    def length(self) -> int:
        """The length of draft that is expected to make most tokens a second."""
        if self.single is None or not self.drafted:
            return DRAFTS[len(DRAFTS) // 2]
        return max(DRAFTS, key=lambda length: self._tokens(length) / self._seconds(length))

    def _tokens(self, length):
        """How many tokens a draft is expected to make, the one behind those that are right among them."""
        rate = min(self.right / self.tried, 1.0)
        return sum(rate**place for place in range(length + 1))

    def _seconds(self, length):
        """What a draft takes: as measured, or on the line through a single token and the nearest length measured."""
        nearest = min(self.drafted, key=lambda other: abs(other - length))
        more = max(self.drafted[nearest] - self.single, 0.0)
        return self.single + more * length / nearest

    def _is_compiled(self, length):
        found = length in self.first
        self.first.add(length)
        return found


def _mean(so_far, new):
    """A mean that forgets. A single outlier, a program that was compiled, hardly moves it."""
    return new if so_far is None else FORGETTING * so_far + (1 - FORGETTING) * min(new, 3 * so_far)


def speculate(
    generator: Generator,
    prompt: Int[np.ndarray, " _"],
    draft: Draft,
    sampling: SamplingConfig,
    max_tokens: int,
    stop_ids: Collection[int],
    stop_strings: Sequence[str] = (),
    seed: int = 0,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    max_bytes: int | None = None,
    pace: Pace | None = None,
) -> tuple[list[int], Statistics]:
    """The continuation of one prompt with a draft, and what the draft was worth. Arguments as of `Generator.generate`,
    and `pace`: what is known of the costs from other texts.

    Raises InputError for an ensemble, and as `Generator.generate` does.
    """
    if len(generator.members) > 1:
        raise InputError("an ensemble has no draft: leave out --draft and --lookup, or name one model")
    if not len(prompt):
        raise InputError("prompt 1 is empty: give at least one token to go on from")
    vocabulary = generator.vocabularies[0]
    token_bytes = None if vocabulary is None else vocabulary.token_bytes
    written = Continuation(token_bytes, stop_bytes(stop_strings), max_tokens, max_bytes)
    arrays, key, stops = Sampling.of(sampling), np.uint32(seed), filled_up(sorted(stop_ids))
    statistics, pace, done = Statistics(), Pace() if pace is None else pace, np.zeros(1, bool)
    session = None
    while not written.ended:
        if session is None or session.room() <= DRAFTS[-1]:
            text = np.append(prompt, np.array(written.ids, np.int32)).astype(np.int32)
            session = generator.session([[text]], max_tokens)
            pace.alone = max(pace.alone, 1)  # the text is read with the first
        proposed, began = [], time.perf_counter()
        if not pace.alone and session.room() > DRAFTS[-1]:
            length, left = pace.length(), max_tokens - len(written.ids)
            proposed = draft.propose([*prompt.tolist(), *written.ids], min(length, left))
            if not proposed:
                pace.note_nothing(time.perf_counter() - began)
        if proposed:
            new = session.verify(proposed, arrays, key)
            pace.note_draft(length, time.perf_counter() - began, len(proposed), len(new) - 1)
            statistics.drafts += 1
            statistics.proposed += len(proposed)
            statistics.accepted += len(new) - 1
        else:
            began, reads = time.perf_counter(), session.pieces > 0
            steps = min(pace.alone or WITHOUT, max_tokens - len(written.ids))
            [new] = session.advance(steps, done, arrays, key, stops).tolist()
            # A call that reads the prompt too does not say what a token takes.
            pace.note_single(None if reads else time.perf_counter() - began, len(new))
            statistics.single += len(new)
        taken = written.add(new, stop_ids)
        if taken and on_tokens is not None:
            on_tokens(0, taken)
    return written.ids, statistics

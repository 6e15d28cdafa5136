"""A tokenizer as ids <-> bytes, and text as its tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, UInt8
from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer

from minalm.errors import InputError
from minalm.text.documents import ROLES, Piece, Special

_STARTS = (Special("bos"), Special("start_of_chat"))


META = "\u2581"  # how SentencePiece vocabularies write a space


class Encoding(NamedTuple):
    """A piece of text as the tokens of one vocabulary.

    `ends` places the end of each token on an axis that all vocabularies share: a byte of text is one unit long, and so
    is a special part, whatever it is spelled with. Only the last token of a special part ends at a place of this axis;
    the others, and a token that is nothing but a dummy prefix space, have end -1.
    """

    ids: Int32[np.ndarray, "  time"]
    ends: Int32[np.ndarray, "  time"]
    text_bytes: Int32[np.ndarray, "  time"]  # bytes of text that the token spells; 0 in a special part
    segment: Int32[np.ndarray, "  time"]  # index in the piece of the segment that the token belongs to
    loss_mask: Bool[np.ndarray, "  time"]  # Segment.loss_mask of that segment
    round_trips: bool  # the tokens spell exactly the piece's texts; if not, `ends` and `text_bytes` mean nothing

    def cut(self, length: int) -> "Encoding":
        """The first `length` tokens."""
        return Encoding(*(array[:length] for array in self[:-1]), self.round_trips)


class _Spelling(NamedTuple):
    """The bytes of all tokens in one array: looking up thousands of bytes objects is ten times slower."""

    letters: UInt8[np.ndarray, " letters"]
    start: Int64[np.ndarray, " vocab"]
    length: Int32[np.ndarray, " vocab"]

    def write(self, ids: Int32[np.ndarray, " time"], length: Int32[np.ndarray, " time"]) -> bytes:
        """The first `length` bytes of each token, in a row."""
        before = np.cumsum(length) - length
        return self.letters[np.repeat(self.start[ids] - before, length) + np.arange(length.sum())].tobytes()


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Made by `load_vocabulary`, `byte_vocabulary` or `with_special_tokens`."""

    name: str  # what messages call it
    tokenizer: Tokenizer | None  # None: a text is its UTF-8 bytes
    normalizer: Normalizer | None  # what the tokenizer does to Unicode text before it looks for tokens
    fallback: Mapping[int, int]  # byte -> id of its token <0xNN>; not empty where a space is written as META
    token_bytes: tuple[bytes, ...]  # by id; b"" for special tokens and unused ids
    special: Mapping[str, int]  # ids that no text ever becomes; those that have bytes are words of a chat's header
    template: Mapping[str, tuple[str, ...]]  # special part, or "pad" -> special strings and words that spell it
    # The tokenizer without the space that it puts before a text; None if it puts none.
    continuing: Tokenizer | None = None
    adds_bos: bool = False  # a program that gives the tokenizer a text finds bos before it
    refusal: str = ""  # why there are no chats, if there might have been

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return len(self.token_bytes)

    @property
    def pad_id(self) -> int:
        """The id that fills rows up: pad, else eos, else 0."""
        return [*self._parts["pad"], *self._parts["eos"], 0][0]

    @property
    def eos_id(self) -> int | None:
        return self._parts["eos"][0] if self._parts["eos"] else None

    @cached_property
    def template_special(self) -> tuple[str, ...]:
        """The special tokens of the chat template with bos, eos and pad, in the template's order."""
        words = dict.fromkeys(word for part in self.template.values() for word in part if word in self.special)
        return tuple(word for word in words if not self.token_bytes[self.special[word]])

    @cached_property
    def id_of_bytes(self) -> dict[bytes, int]:
        """The id of each byte string that is a token of text. Of several, never a fallback token, then the lowest."""
        ids = {bytes([byte]): i for byte, i in self.fallback.items()}
        fallback = frozenset(self.fallback.values())
        return ids | {t: i for i, t in reversed([*enumerate(self.token_bytes)]) if t and i not in fallback}

    def part_ids(self, part: str, whole: bool = True) -> list[int]:
        """The tokens of a special part; if it is not whole, without a last space that is written with the text after it.

        Raises InputError where the vocabulary has no chat template, or none for it.
        """
        if not whole:
            return self._lending[part]
        if part not in self._parts and "header_open" in self._parts:
            raise InputError(
                f"the chat template of {self.name} has no messages of their own for the role {part!r}: "
                "leave them out of the chats, or give another tokenizer"
            )
        if part not in self._parts:
            raise InputError(
                self.refusal
                or f"{self.name} has the special tokens of no known chat template, so it cannot write {part!r}: "
                "give plain texts, or a tokenizer that has them"
            )
        return self._parts[part]

    @cached_property
    def boundary(self) -> Bool[np.ndarray, " vocab"]:
        """Entries that may follow the end of a word: first byte space, tab or newline, or `template_special`."""
        mask = np.array([token[:1] in (b" ", b"\t", b"\n") for token in self.token_bytes], bool)
        mask[[self.special[word] for word in self.template_special]] = True
        return mask

    @cached_property
    def starts_with_space(self) -> Bool[np.ndarray, " vocab"]:
        """Entries whose first byte is a space."""
        return np.array([token[:1] == b" " for token in self.token_bytes], bool)

    def boundary_mask(self, size: int) -> Bool[np.ndarray, " size"]:
        """`boundary` for a model whose table has `size` rows; those past the tokenizer are False.

        Raises InputError if ids are past the table, other than special tokens that no template uses (Gemma 3's image
        token).
        """
        if self.boundary[size:].any() or any(self.token_bytes[size:]):
            raise InputError(f"{self.name} has ids past the model's {size} rows: use the model's own tokenizer")
        mask = np.zeros(size, bool)
        mask[: self.size] = self.boundary[:size]
        return mask

    def normalize(self, text: str) -> str:
        """The text after the tokenizer's Unicode normalizer (NFC, NFKC, ...), if it has one.

        Only of texts that have been normalized by both do two vocabularies spell the same bytes.
        """
        return self.normalizer.normalize_str(text) if self.normalizer else text

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " time"]) -> str:
        """The text of tokens without the special tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")

    def encode(self, pieces: Sequence[Piece]) -> list[Encoding]:
        """Each text between two special parts is tokenized on its own, all of them in one call (threads in Rust).

        A part may be spelled by no token (Qwen has no bos). A tokenizer's own space before a text comes only before the
        first of a piece; in a chat, what is written is the template's, byte for byte. Raises InputError for a part of
        a chat that the vocabulary's template has not got.
        """
        contents = [content for piece in pieces for content, _ in piece]
        texts = [content.encode() if isinstance(content, str) else None for content in contents]
        spaces = [space for piece in pieces for space in self._spaces(piece)]
        before = [space for content, space in zip(contents, spaces, strict=True) if isinstance(content, str)]
        text_ids = iter(self._text_ids([content for content in contents if isinstance(content, str)], before))
        tokens = [
            next(text_ids) if isinstance(content, str) else self.part_ids(content.part, whole=space == "")
            for content, space in zip(contents, spaces, strict=True)
        ]

        # Arrays over the segments of the batch: which are texts, and where each starts and stops among the tokens, and
        # starts on the axis of `ends`.
        is_text = np.array([text is not None for text in texts], bool)
        width = np.array([1 if text is None else len(text) for text in texts], np.int64)
        count = np.array([len(ids) for ids in tokens], np.int64)
        stop = np.cumsum(count)
        first = stop - count
        segments = np.array([len(piece) for piece in pieces], np.int64)  # of each piece
        place = np.cumsum(width) - width
        place -= np.repeat(np.append(place, 0)[np.cumsum(segments) - segments], segments)

        # Arrays over the tokens of the batch.
        owner = np.repeat(np.arange(len(tokens)), count)
        ids = np.concatenate([np.zeros(0, np.int32), *tokens], dtype=np.int32, casting="unsafe")
        text_bytes = np.where(is_text[owner], self._spelling.length[ids], 0)
        spelled = np.append(0, np.cumsum(text_bytes))
        letters = self._spelling.write(ids, text_bytes)
        written = [letters[begin:end] for begin, end in zip(spelled[first], spelled[stop])]
        dummy = np.array([text is not None and got == b" " + text for got, text in zip(written, texts)], bool)
        text_bytes[first[dummy]] -= 1  # the space that the tokenizer put before the text
        spelled = np.append(0, np.cumsum(text_bytes))
        ends = (place - spelled[first])[owner] + spelled[1:]
        ends[text_bytes == 0] = -1
        closing = ~is_text & (count > 0)
        ends[stop[closing] - 1] = place[closing] + 1
        segment = np.array([number for piece in pieces for number in range(len(piece))], np.int32)[owner]
        loss_mask = np.array([loss_mask for piece in pieces for _, loss_mask in piece], bool)[owner]

        right = dummy | np.array([text is None or got == text for got, text in zip(written, texts)], bool)
        last = np.cumsum(segments)
        columns = (ids, ends.astype(np.int32), text_bytes, segment, loss_mask)
        rows = zip(*(np.split(column, np.append(0, stop)[last[:-1]]) for column in columns))
        return [Encoding(*row, bool(right[end - n : end].all())) for row, end, n in zip(rows, last, segments)]

    @cached_property
    def _parts(self) -> dict[str, list[int]]:
        return {part: [i for word in words for i in self._word_ids(word)] for part, words in self.template.items()}

    def _word_ids(self, word: str) -> list[int]:
        return [self.special[word]] if word in self.special else [int(i) for i in self._text_ids([word], [""])[0]]

    @cached_property
    def _lending(self) -> dict[str, list[int]]:
        """The parts before a text whose last space is written with it, as a tokenizer's own space is, without that.

        So a word after "[INST] " is the one token that it is at the start of a text.
        """
        if self.continuing is None:
            return {}
        parts = ("header_close",) if self.template.get("header_close") else ROLES
        last = {part: self.template[part][-1] for part in parts if self.template.get(part)}
        ends = [part for part, word in last.items() if word.endswith(" ") and word not in self.special]
        shorter = {part: (*self.template[part][:-1], last[part][:-1]) for part in ends}
        return {part: [i for word in words for i in self._word_ids(word)] for part, words in shorter.items()}

    def _spaces(self, piece: Piece) -> list[str | None]:
        """For each text what is put before it: None for what the tokenizer puts there, else a space, or nothing.

        For a special part: the space that it leaves to the text after it, or nothing.
        """
        spaces: list[str | None] = [""] * len(piece)
        last = None  # the segment before that is written at all
        for number, (content, _) in enumerate(piece):
            if isinstance(content, str):
                before = None if last is None else piece[last].content
                if before is None or before in _STARTS:
                    spaces[number] = None
                elif not isinstance(before, str) and before.part in self._lending:
                    spaces[number] = spaces[last] = " "
                last = number
            elif self.template.get(content.part):
                last = number
        return spaces

    @cached_property
    def _spelling(self) -> "_Spelling":
        length = np.array([len(token) for token in self.token_bytes], np.int32)
        return _Spelling(np.frombuffer(b"".join(self.token_bytes), np.uint8), np.cumsum(length) - length, length)

    def _text_ids(
        self, texts: Sequence[str], before: Sequence[str | None]
    ) -> list[list[int]] | list[Integer[np.ndarray, " bytes"]]:
        """The tokens of texts, each after a space, after nothing, or after what the tokenizer itself puts there (None)."""
        if self.tokenizer is None:
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]
        # A literal META in a text would be read as a space: it is spelled by its bytes.
        fragments = [text.split(META) if self.fallback else [text] for text in texts]
        starts, rests = [], []
        for parts, space in zip(fragments, before, strict=True):
            (starts if space is None else rests).append((space or "") + parts[0])
            rests += parts[1:]
        start_ids = iter(self.tokenizer.encode_batch_fast(starts, add_special_tokens=False))
        rest_ids = iter((self.continuing or self.tokenizer).encode_batch_fast(rests, add_special_tokens=False))
        ids = []
        for parts, space in zip(fragments, before, strict=True):
            ids.append(next(start_ids if space is None else rest_ids).ids)
            for _ in parts[1:]:
                ids[-1] += [self.fallback[byte] for byte in META.encode()] + next(rest_ids).ids
        return ids


def byte_vocabulary(source: Vocabulary, special: Sequence[str] | None = None) -> Vocabulary:
    """Ids 0 to 255 are the bytes; from 256 follow special strings, by default the sorted ones of the source's template.

    Released byte checkpoints have longer lists, which hold words of the template ("user", or a blank line) as well:
    give them as `special`, in the order of their ids. Such a word is written in headers only; no text becomes one.
    """
    single = tuple(bytes([byte]) for byte in range(256))
    plain = Vocabulary(f"bytes for {source.name}", None, None, {}, single, {}, {})
    return with_special_tokens(plain, source, sorted(source.template_special) if special is None else special)


def with_special_tokens(base: Vocabulary, source: Vocabulary, special: Sequence[str] | None = None) -> Vocabulary:
    """The ordinary tokens of `base` with the chat template and the special tokens of `source`.

    Special strings that `base` has not got yet (by default, those of the source's template) get ids from `base.size`.
    The other choice, special tokens and template of `base`, is `base` itself: `align` pairs the parts of any two.
    """
    new = [word for word in (source.template_special if special is None else special) if word not in base.special]
    return replace(
        base,
        token_bytes=base.token_bytes + tuple(b"" if word in source.special else word.encode() for word in new),
        special={**base.special, **{word: base.size + i for i, word in enumerate(new)}},
        template=source.template,
        adds_bos=source.adds_bos,
        refusal=source.refusal,
    )

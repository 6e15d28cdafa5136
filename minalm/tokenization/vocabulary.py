"""A tokenizer as ids <-> bytes, and text as its tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import commonprefix
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, UInt8
from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer

from minalm.errors import InputError
from minalm.text.documents import Markup, Piece, Special
from minalm.tokenization.chat_template import (
    ChatTemplate,
    SpecialTokens,
    answer_end,
    special_tokens_of,
    stop_tokens,
)

BOLMO_SPECIAL = ("<pad>", "<bos>", "<eos>", "<bpe_token_end>")  # the last two are in no text
META = "\u2581"  # how SentencePiece vocabularies write a space


class Encoding(NamedTuple):
    """A piece of text as the tokens of one vocabulary.

    `ends` places the end of each token on an axis that all vocabularies share: a byte of text is one unit long, and so
    is a Special or a Markup, whatever it is spelled with. A token that ends within one of these, or is nothing but a
    space that the tokenizer put before a text, has end -1.
    """

    ids: Int32[np.ndarray, "  time"]
    ends: Int32[np.ndarray, "  time"]
    text_bytes: Int32[np.ndarray, "  time"]  # bytes of texts that the token spells
    segment: Int32[np.ndarray, "  time"]  # index in the piece of the segment in which the token ends
    loss_mask: Bool[np.ndarray, "  time"]  # whether the token is part of a segment that counts
    written: Bool[np.ndarray, " segments"]  # whether this side writes anything in each segment
    round_trips: bool  # the tokens spell exactly the piece's texts; if not, `ends` and `text_bytes` mean nothing

    def cut(self, length: int) -> "Encoding":
        """The first `length` tokens."""
        return Encoding(*(array[:length] for array in self[:5]), *self[5:])


class _Spelling(NamedTuple):
    """The bytes of all tokens in one array: looking up thousands of bytes objects is ten times slower."""

    letters: UInt8[np.ndarray, " letters"]
    start: Int64[np.ndarray, " vocab"]
    length: Int32[np.ndarray, " vocab"]

    def write(self, ids: Int32[np.ndarray, " time"], length: Int32[np.ndarray, " time"]) -> bytes:
        """The first `length` bytes of each token, in a row."""
        before = np.cumsum(length) - length
        return self.letters[np.repeat(self.start[ids] - before, length) + np.arange(length.sum())].tobytes()


class _Atom(NamedTuple):
    """A text or a special token that is written for a segment."""

    segment: int  # index in the batch
    content: str | int
    is_text: bool  # a text of the document, not a template's
    closes: bool  # the last one of its segment


class _Item(NamedTuple):
    """A special token, or a text between two of them."""

    special: int
    text: str | None
    starts: bool  # the text is the first of its piece, but for bos
    start: int  # of its first byte among all


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Made by `load_vocabulary`, `byte_vocabulary` or `with_special_tokens`."""

    name: str  # what messages call it
    tokenizer: Tokenizer | None  # None: a text is its UTF-8 bytes
    normalizer: Normalizer | None  # what the tokenizer does to Unicode text before it looks for tokens
    fallback: Mapping[int, int]  # byte -> id of its token <0xNN>; not empty where a space is written as META
    token_bytes: tuple[bytes, ...]  # by id; b"" for special tokens and unused ids
    special: Mapping[str, int]  # ids that no text ever becomes; those that have bytes are words of a chat's header
    names: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token, pad_token, ... -> special token
    stops: tuple[str, ...] = ()  # special tokens that end what is generated, as the checkpoint says
    chat_template: ChatTemplate | None = None
    strips: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)  # special tokens that take spaces along
    # The tokenizer without the space that it puts before a text; None if it puts none.
    continuing: Tokenizer | None = None
    spaces_each: bool = False  # that space is put behind each special token too, not only at the start
    adds_bos: bool = False  # a program that gives the tokenizer a text finds bos before it
    notes: tuple[str, ...] = ()  # what a user should know of how it is read, a sentence each

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return len(self.token_bytes)

    def named(self, part: Literal["bos", "eos", "pad"]) -> str | None:
        """The special token for that, if there is one."""
        return self.names.get(f"{part}_token")

    def part_ids(self, part: Literal["bos", "eos", "pad"]) -> list[int]:
        """The id of that special token in a list, or an empty one."""
        word = self.named(part)
        return [] if word is None else [self.special[word]]

    @property
    def pad_id(self) -> int:
        """The id that fills rows up: pad, else eos, else 0."""
        return [*self.part_ids("pad"), *self.part_ids("eos"), 0][0]

    @property
    def eos_id(self) -> int | None:
        return self.special[self.names["eos_token"]] if "eos_token" in self.names else None

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """Finds this vocabulary's special tokens in what a chat template has written; no words of headers."""
        return SpecialTokens.of([w for w, i in self.special.items() if not self.token_bytes[i]], self.strips)

    @cached_property
    def stop_ids(self) -> list[int]:
        """The ids that end what is generated: eos, those that the checkpoint names, and what ends an answer in a
        chat."""
        answer = [] if self.chat_template is None else stop_tokens(self.chat_template, self.special_tokens)
        words = dict.fromkeys([*filter(None, [self.named("eos")]), *self.stops, *answer])
        return [self.special[word] for word in words if word in self.special]

    @cached_property
    def stop_strings(self) -> tuple[str, ...]:
        """The text that ends an answer in a chat, where no special token does: a Bolmo spells those of its source."""
        end = "" if self.chat_template is None else answer_end(self.chat_template, self.special_tokens)
        return (end,) if end else ()

    @cached_property
    def template_special(self) -> tuple[str, ...]:
        """The special tokens that are used: bos, those of the chat template in its order, eos, pad, the stops."""
        template = [] if self.chat_template is None else special_tokens_of(self.chat_template, self.special_tokens)
        words = [self.named("bos"), *template, self.named("eos"), self.named("pad"), *self.stops]
        return tuple(word for word in dict.fromkeys(words) if word in self.special)

    @cached_property
    def id_of_bytes(self) -> dict[bytes, int]:
        """The id of each byte string that is a token of text. Of several, never a fallback token, then the lowest."""
        ids = {bytes([byte]): i for byte, i in self.fallback.items()}
        fallback = frozenset(self.fallback.values())
        return ids | {t: i for i, t in reversed([*enumerate(self.token_bytes)]) if t and i not in fallback}

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
        beyond = [word for word in self.template_special if self.special[word] >= size]
        if beyond or any(self.token_bytes[size:]):
            which = f" ({beyond[0]!r} has {self.special[beyond[0]]})" if beyond else ""
            raise InputError(
                f"{self.name} has ids past the model's {size} rows{which}: use the model's own tokenizer, "
                "or give the model rows for them (resize_token_embeddings of transformers)"
            )
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

    def encode(self, pieces: Sequence[Piece], side: Literal["student", "teacher"] = "student") -> list[Encoding]:
        """The tokens of each piece; all texts are tokenized in one call (threads in Rust).

        What lies between two special tokens is one text to the tokenizer, as if it read all that is written. A Special
        may be spelled by no token (Qwen has no bos). A Markup is what `side` writes in its place.
        """
        segments = [segment for piece in pieces for segment in piece]
        sizes = np.array([len(piece) for piece in pieces], np.int64)
        atoms = [atom for number, segment in enumerate(segments) for atom in self._atoms(number, segment.content, side)]
        items = _items(atoms, np.cumsum(sizes), {n for n, s in enumerate(segments) if isinstance(s.content, Special)})
        texts = [item for item in items if item.text is not None]
        text_ids = iter(self._text_ids([item.text for item in texts], [self.spaces_each or i.starts for i in texts]))
        tokens = [[item.special] if item.text is None else next(text_ids) for item in items]

        # Where each segment starts on the axis of `ends`, counted from the start of its piece.
        width = np.array([len(s.content.encode()) if isinstance(s.content, str) else 1 for s in segments], np.int64)
        place = np.cumsum(width) - width
        place -= np.repeat(np.append(place, 0)[np.cumsum(sizes) - sizes], sizes)
        counts = np.array([segment.loss_mask for segment in segments], bool)

        # Arrays over the bytes of all items; a special token is one byte here.
        size = np.array([len(a.content.encode()) if isinstance(a.content, str) else 1 for a in atoms], np.int64)
        owner = np.repeat(np.arange(len(atoms)), size)
        of_segment = np.array([atom.segment for atom in atoms], np.int64)[owner]
        is_text = np.array([atom.is_text for atom in atoms], bool)[owner]
        end = np.where(is_text, place[of_segment] + np.arange(len(owner)) - (np.cumsum(size) - size)[owner] + 1, -1)
        closing = (np.cumsum(size) - 1)[np.array([atom.closes and not atom.is_text for atom in atoms], bool)]
        end[closing] = place[of_segment[closing]] + 1

        # Arrays over the tokens: which bytes each spells.
        count = np.array([len(ids) for ids in tokens], np.int64)
        first = np.cumsum(count) - count
        owner = np.repeat(np.arange(len(items)), count)
        ids = np.concatenate([np.zeros(0, np.int32), *tokens], dtype=np.int32, casting="unsafe")
        length = np.where(
            np.array([item.text is not None for item in items], bool)[owner], self._spelling.length[ids], 1
        )
        dummy, right = self._compare(items, ids, first, count)
        length[first[dummy]] -= 1  # the space that the tokenizer put before the text
        spelled = np.append(0, np.cumsum(length))
        start = np.array([item.start for item in items], np.int64)
        stop_byte = (start - spelled[first])[owner] + spelled[1:]
        limit = np.append(start, len(end))[1:][owner]  # only tokens that do not spell their text go beyond
        start_byte, stop_byte = np.minimum(stop_byte - length, limit - 1), np.minimum(stop_byte, limit)
        last_byte = np.maximum(stop_byte - 1, start_byte)
        so_far = np.append(0, np.cumsum(is_text)), np.append(0, np.cumsum(counts[of_segment]))
        number = np.concatenate([np.zeros(0, np.int32), *(np.arange(size, dtype=np.int32) for size in sizes)])
        columns = (
            ids,
            np.where(length > 0, end[last_byte], -1).astype(np.int32),
            (so_far[0][stop_byte] - so_far[0][start_byte]).clip(0).astype(np.int32),
            number[of_segment[last_byte]],
            so_far[1][last_byte + 1] - so_far[1][start_byte] > 0,
        )
        has = np.zeros(len(segments), bool)
        has[[n for n, segment in enumerate(segments) if isinstance(segment.content, str)]] = True
        has[of_segment] = True

        after = np.searchsorted(of_segment[start], np.cumsum(sizes)) if len(items) else np.zeros(len(sizes), np.int64)
        cuts = np.append(first, len(ids))[after[:-1]]
        rows = zip(*(np.split(column, cuts) for column in columns), np.split(has, np.cumsum(sizes)[:-1]))
        fits = (bool(each.all()) for each in np.split(right, after[:-1]))
        return [Encoding(*row, fit) for row, fit, _ in zip(rows, fits, pieces)]

    def misspelled(self, piece: Piece, side: Literal["student", "teacher"]) -> tuple[str, str] | None:
        """The first text of a piece that its tokens do not spell, and what they spell; None if there is none."""
        atoms = [atom for n, segment in enumerate(piece) for atom in self._atoms(n, segment.content, side)]
        special = {n for n, segment in enumerate(piece) if isinstance(segment.content, Special)}
        items = [item for item in _items(atoms, np.array([len(piece)]), special) if item.text is not None]
        tokens = self._text_ids([item.text for item in items], [self.spaces_each or item.starts for item in items])
        for item, ids in zip(items, tokens, strict=True):
            spelled = b"".join(self.token_bytes[i] for i in ids)
            if spelled not in (item.text.encode(), b" " + item.text.encode()):
                # The tokenizer may have put a space before the text: what is nearer is meant.
                whole, bare = (each.decode(errors="replace") for each in (spelled, spelled.removeprefix(b" ")))
                return item.text, max(whole, bare, key=lambda each: len(commonprefix([item.text, each])))
        return None

    def _atoms(self, number: int, content: str | Special | Markup, side: str) -> list[_Atom]:
        """What is written for a segment, the one of this number in the batch."""
        if isinstance(content, str):
            return [_Atom(number, content, True, True)] if content else []
        if isinstance(content, Special):
            found: list[str | int] = [*self.part_ids(content.part)]
        else:
            words = content.student if side == "student" else content.teacher
            found = [self.special.get(word, word) for word in words if word]
        return [_Atom(number, each, False, n == len(found)) for n, each in enumerate(found, start=1)]

    def _compare(
        self, items: Sequence[_Item], ids: Int32[np.ndarray, " time"], first: np.ndarray, count: np.ndarray
    ) -> tuple[Bool[np.ndarray, " items"], Bool[np.ndarray, " items"]]:
        """Of each item, whether its tokens spell its text with a space of the tokenizer before it, and whether they
        spell it at all."""
        dummy, right = np.zeros(len(items), bool), np.ones(len(items), bool)
        length = self._spelling.length[ids]
        letters = self._spelling.write(ids, length)
        spelled = np.append(0, np.cumsum(length)).tolist()
        for n, (item, begin, size) in enumerate(zip(items, first.tolist(), count.tolist())):
            if item.text is not None:
                got, text = letters[spelled[begin] : spelled[begin + size]], item.text.encode()
                dummy[n] = got == b" " + text
                right[n] = dummy[n] or got == text
        return dummy, right

    @cached_property
    def _spelling(self) -> "_Spelling":
        length = np.array([len(token) for token in self.token_bytes], np.int32)
        return _Spelling(np.frombuffer(b"".join(self.token_bytes), np.uint8), np.cumsum(length) - length, length)

    def _text_ids(self, texts: Sequence[str], own: Sequence[bool]) -> list:
        """The tokens of texts, as lists or arrays; `own`: after the space that the tokenizer puts before a text."""
        if self.tokenizer is None:
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]
        # A literal META in a text would be read as a space: it is spelled by its bytes.
        fragments = [text.split(META) if self.fallback else [text] for text in texts]
        starts, rests = [], []
        for parts, spaced in zip(fragments, own, strict=True):
            (starts if spaced else rests).append(parts[0])
            rests += parts[1:]
        start_ids = iter(self.tokenizer.encode_batch_fast(starts, add_special_tokens=False))
        rest_ids = iter((self.continuing or self.tokenizer).encode_batch_fast(rests, add_special_tokens=False))
        ids = []
        for parts, spaced in zip(fragments, own, strict=True):
            ids.append(next(start_ids if spaced else rest_ids).ids)
            for _ in parts[1:]:
                ids[-1] += [self.fallback[byte] for byte in META.encode()] + next(rest_ids).ids
        return ids


def _items(atoms: Sequence[_Atom], piece_ends: Int64[np.ndarray, " pieces"], plain: set[int]) -> list[_Item]:
    """Atoms with texts side by side joined. `piece_ends`: the segment after the last of each piece; `plain`: the
    segments that are a Special."""
    items: list[_Item] = []
    piece = np.searchsorted(piece_ends, [atom.segment for atom in atoms], side="right").tolist()
    place, before = 0, None  # the atom before, and its piece
    for atom, number in zip(atoms, piece):
        same = before is not None and before[1] == number
        if isinstance(atom.content, int):
            items.append(_Item(atom.content, None, False, place))
            place += 1
        else:
            if same and isinstance(before[0].content, str):
                items[-1] = items[-1]._replace(text=items[-1].text + atom.content)
            else:
                items.append(_Item(-1, atom.content, not same or before[0].segment in plain, place))
            place += len(atom.content.encode())
        before = atom, number
    return items


def byte_vocabulary(source: Vocabulary, special: Sequence[str] | None = None) -> Vocabulary:
    """Ids 0 to 255 are the bytes; from 256 follow special strings, by default the sorted ones of the source's template.

    Released byte checkpoints have longer lists, which hold words of the template ("user", or a blank line) as well:
    give them as `special`, in the order of their ids. Such a word is written in headers only; no text becomes one.
    """
    single = tuple(bytes([byte]) for byte in range(256))
    plain = Vocabulary(f"bytes for {source.name}", None, None, {}, single, {})
    return with_special_tokens(plain, source, sorted(source.template_special) if special is None else special)


def bolmo_vocabulary(source: Vocabulary) -> Vocabulary:
    """What a Bolmo reads: the bytes, then four special tokens of its own, of which bos also ends a document.

    All other special tokens of the source are spelled by the bytes of their names. Its folder may have a chat template.
    """
    single = tuple(bytes([byte]) for byte in range(256))
    return Vocabulary(
        name=f"bytes for {source.name}",
        tokenizer=None,
        normalizer=None,
        fallback={},
        token_bytes=single + (b"",) * len(BOLMO_SPECIAL),
        special={word: 256 + number for number, word in enumerate(BOLMO_SPECIAL)},
        names={"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<bos>"},
        adds_bos=True,
    )


def with_special_tokens(base: Vocabulary, source: Vocabulary, special: Sequence[str] | None = None) -> Vocabulary:
    """The ordinary tokens of `base` with the chat template and the special tokens of `source`.

    Special strings that `base` has not got yet (by default, those that the source's template uses) get ids from
    `base.size`. The other choice, special tokens and template of `base`, is `base` itself: chats.py pairs what any two
    write.
    """
    new = [word for word in (source.template_special if special is None else special) if word not in base.special]
    every = {**base.special, **{word: base.size + i for i, word in enumerate(new)}}
    return replace(
        base,
        token_bytes=base.token_bytes + tuple(b"" if word in source.special else word.encode() for word in new),
        special=every,
        names={name: word for name, word in source.names.items() if word in every},
        stops=tuple(word for word in source.stops if word in every),
        chat_template=source.chat_template,
        strips={**base.strips, **{word: strip for word, strip in source.strips.items() if word in every}},
        adds_bos=source.adds_bos,
    )

"""A tokenizer as ids <-> bytes: Hugging Face's tokenizer.json, or plain bytes, and control tokens of chat templates."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, UInt8
from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer

from minalm.chat import Parts, chat_parts, read_chat_template
from minalm.text import ROLES, Control, InputError, Piece, end_of

_STARTS = (Control("bos"), Control("start_of_chat"))

META = "\u2581"  # how SentencePiece vocabularies write a space


class Encoding(NamedTuple):
    """A piece of text as the tokens of one vocabulary.

    `ends` places the end of each token on an axis that all vocabularies share: a byte of text is one unit long, and so
    is a control part, whatever it is spelled with. Only the last token of a control part ends at a place of this axis;
    the others, and a token that is nothing but a dummy prefix space, have end -1.
    """

    ids: Int32[np.ndarray, "  time"]
    ends: Int32[np.ndarray, "  time"]
    text_bytes: Int32[np.ndarray, "  time"]  # bytes of text that the token spells; 0 in a control part
    segment: Int32[np.ndarray, "  time"]  # index in the piece of the segment that the token belongs to
    counts: Bool[np.ndarray, "  time"]  # Segment.counts of that segment
    spelled: bool  # the tokens spell exactly the piece's texts; if not, `ends` and `text_bytes` mean nothing

    def cut(self, length: int) -> "Encoding":
        """The first `length` tokens."""
        return Encoding(*(array[:length] for array in self[:-1]), self.spelled)


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
    """Made by `load_vocabulary`, `byte_vocabulary` or `with_control`."""

    name: str  # what messages call it
    tokenizer: Tokenizer | None  # None: a text is its UTF-8 bytes
    normalizer: Normalizer | None  # what the tokenizer does to Unicode text before it looks for tokens
    fallback: Mapping[int, int]  # byte -> id of its token <0xNN>; not empty where a space is written as META
    token_bytes: tuple[bytes, ...]  # by id; b"" for control tokens and unused ids
    control: Mapping[str, int]  # ids that no text ever becomes; those that have bytes are words of a chat's header
    template: Mapping[str, tuple[str, ...]]  # control part, or "pad" -> control strings and words that spell it
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
    def template_control(self) -> tuple[str, ...]:
        """The control tokens of the chat template with bos, eos and pad, in the template's order."""
        words = dict.fromkeys(word for part in self.template.values() for word in part if word in self.control)
        return tuple(word for word in words if not self.token_bytes[self.control[word]])

    @cached_property
    def id_of_bytes(self) -> dict[bytes, int]:
        """The id of each byte string that is a token of text. Of several, never a fallback token, then the lowest."""
        ids = {bytes([byte]): i for byte, i in self.fallback.items()}
        fallback = frozenset(self.fallback.values())
        return ids | {t: i for i, t in reversed([*enumerate(self.token_bytes)]) if t and i not in fallback}

    def part_ids(self, part: str, whole: bool = True) -> list[int]:
        """The tokens of a control part; if it is not whole, without a last space that is written with the text after it.

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
                or f"{self.name} has the control tokens of no known chat template, so it cannot write {part!r}: "
                "give plain texts, or a tokenizer that has them"
            )
        return self._parts[part]

    @cached_property
    def boundary(self) -> Bool[np.ndarray, " vocab"]:
        """Entries that may follow the end of a word: first byte space, tab or newline, or `template_control`."""
        mask = np.array([token[:1] in (b" ", b"\t", b"\n") for token in self.token_bytes], bool)
        mask[[self.control[word] for word in self.template_control]] = True
        return mask

    @cached_property
    def starts_with_space(self) -> Bool[np.ndarray, " vocab"]:
        """Entries whose first byte is a space."""
        return np.array([token[:1] == b" " for token in self.token_bytes], bool)

    def boundary_mask(self, size: int) -> Bool[np.ndarray, " size"]:
        """`boundary` for a model whose table has `size` rows; those past the tokenizer are False.

        Raises InputError if ids are past the table, other than control tokens that no template uses (Gemma 3's image
        token).
        """
        if self.boundary[size:].any() or any(self.token_bytes[size:]):
            raise InputError(f"{self.name} has ids past the model's {size} rows: use the model's own tokenizer")
        mask = np.zeros(size, bool)
        mask[: self.size] = self.boundary[:size]
        return mask

    def normalize(self, text: str) -> str:
        """The text after the tokenizer's Unicode normaliser (NFC, NFKC, ...), if it has one.

        Only of texts that have been normalised by both do two vocabularies spell the same bytes.
        """
        return self.normalizer.normalize_str(text) if self.normalizer else text

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " time"]) -> str:
        """The text of tokens without the control tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")

    def encode(self, pieces: Sequence[Piece]) -> list[Encoding]:
        """Each text between two control parts is tokenized on its own, all of them in one call (threads in Rust).

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
        counts = np.array([counts for piece in pieces for _, counts in piece], bool)[owner]

        right = dummy | np.array([text is None or got == text for got, text in zip(written, texts)], bool)
        last = np.cumsum(segments)
        columns = (ids, ends.astype(np.int32), text_bytes, segment, counts)
        rows = zip(*(np.split(column, np.append(0, stop)[last[:-1]]) for column in columns))
        return [Encoding(*row, bool(right[end - n : end].all())) for row, end, n in zip(rows, last, segments)]

    @cached_property
    def _parts(self) -> dict[str, list[int]]:
        return {part: [i for word in words for i in self._word_ids(word)] for part, words in self.template.items()}

    def _word_ids(self, word: str) -> list[int]:
        return [self.control[word]] if word in self.control else [int(i) for i in self._text_ids([word], [""])[0]]

    @cached_property
    def _lending(self) -> dict[str, list[int]]:
        """The parts before a text whose last space is written with it, as a tokenizer's own space is, without that.

        So a word after "[INST] " is the one token that it is at the start of a text.
        """
        if self.continuing is None:
            return {}
        parts = ("header_close",) if self.template.get("header_close") else ROLES
        last = {part: self.template[part][-1] for part in parts if self.template.get(part)}
        ends = [part for part, word in last.items() if word.endswith(" ") and word not in self.control]
        shorter = {part: (*self.template[part][:-1], last[part][:-1]) for part in ends}
        return {part: [i for word in words for i in self._word_ids(word)] for part, words in shorter.items()}

    def _spaces(self, piece: Piece) -> list[str | None]:
        """For each text what is put before it: None for what the tokenizer puts there, else a space, or nothing.

        For a control part: the space that it leaves to the text after it, or nothing.
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


def load_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json, or of its folder; tokenizer_config.json beside it names bos, eos and pad.

    Control tokens are the added tokens marked `special`; the others are ordinary text. The chat template is that of the
    family whose control tokens the tokenizer has (Llama 3, Gemma, Qwen, SmolLM2), unless the checkpoint brings one that
    writes turns in another way (OLMo has Qwen's control tokens); of other tokenizers it is what the checkpoint brings.
    One that cannot be read is no error before a chat is to be written: `refusal` says then what is wrong.

    Raises InputError if there is no such file, or if the tokenizer spells neither bytes (byte-level BPE) nor has
    `<0xNN>` tokens to fall back on.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist: name a folder that holds a tokenizer.json, or the file itself")
    try:
        spec = json.loads(file.read_text("utf-8"))
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(
            f"{file} cannot be read as a tokenizer.json ({error}): take it from the original model"
        ) from error
    if changed := _without_prefix_space(spec):
        continuing = Tokenizer.from_str(json.dumps(changed))
    else:
        continuing = None
    for each in filter(None, (tokenizer, continuing)):
        each.no_truncation()
        each.no_padding()
        each.encode_special_tokens = True  # text that looks like a control token stays text

    config_file = file.with_name("tokenizer_config.json")
    try:
        config = json.loads(config_file.read_text("utf-8")) if config_file.is_file() else {}
        names = {part: _token_name(config.get(f"{part}_token")) for part in ("bos", "eos", "pad")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{config_file} is no tokenizer configuration: take it from the original model") from error
    added_tokens = spec.get("added_tokens") or []
    added = {token["id"]: token["content"] for token in added_tokens}
    control = {token["content"]: token["id"] for token in added_tokens if token["special"]}
    byte_level = '"ByteLevel"' in json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
    fallback: dict[int, int] = {}

    vocab = tokenizer.get_vocab(with_added_tokens=True)
    token_bytes = [b""] * (1 + max(vocab.values()))
    for token, i in vocab.items():
        if byte_level and i not in added:
            token_bytes[i] = _from_byte_level(token)
        elif spec["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token) and i not in added:
            fallback[int(token[3:5], 16)] = i
            token_bytes[i] = bytes([int(token[3:5], 16)])
        else:
            token_bytes[i] = (token if byte_level else token.replace(META, " ")).encode()
    for word, i in control.items():
        if i >= len(token_bytes):  # the library closes holes, and gives the token another id than the file says
            raise InputError(f"{file}: the ids before {i}, that of {word!r}, have holes: use a tokenizer without")
        token_bytes[i] = b""
    if missing := _ORDINARY - {token for token in token_bytes if len(token) == 1}:
        raise InputError(
            f"{file} cannot spell every text (it has no token for byte 0x{min(missing).hex()}): "
            "use a byte-level tokenizer or one with byte fallback"
        )
    normalizer = _unicode_normalizer(spec.get("normalizer"))
    try:
        own, refusal = _own_parts(file.parent, names, control), ""
    except InputError as error:
        own, refusal = None, str(error)
    template = _template(control, names, own)
    asked = config.get("add_bos_token")  # where tokenizer_config.json says it, the post-processor does not matter
    adds_bos = asked if isinstance(asked, bool) else prefixes(spec)[:1] == list(template["bos"])
    values = str(path), tokenizer, normalizer, fallback, tuple(token_bytes), control, template
    return Vocabulary(*values, continuing, adds_bos and template["bos"] != (), refusal)


def prefixes(spec: Mapping[str, Any]) -> list[str]:
    """The control tokens that the post-processor of a tokenizer.json puts before a text."""
    steps = _steps(spec.get("post_processor"), "processors")
    parts = [part for step in steps if step["type"] == "TemplateProcessing" for part in step["single"]]
    return [part["SpecialToken"]["id"] for part in takewhile(lambda part: "SpecialToken" in part, parts)]


def byte_vocabulary(source: Vocabulary, control: Sequence[str] | None = None) -> Vocabulary:
    """Ids 0 to 255 are the bytes; from 256 follow control strings, by default the sorted ones of the source's template.

    Released byte checkpoints have longer lists, which hold words of the template ("user", or a blank line) as well:
    give them as `control`, in the order of their ids. Such a word is written in headers only; no text becomes one.
    """
    single = tuple(bytes([byte]) for byte in range(256))
    plain = Vocabulary(f"bytes for {source.name}", None, None, {}, single, {}, {})
    return with_control(plain, source, sorted(source.template_control) if control is None else control)


def with_control(base: Vocabulary, source: Vocabulary, control: Sequence[str] | None = None) -> Vocabulary:
    """The ordinary tokens of `base` with the chat template and the control tokens of `source`.

    Control strings that `base` has not got yet (by default, those of the source's template) get ids from `base.size`.
    The other choice, control tokens and template of `base`, is `base` itself: `align` pairs the parts of any two.
    """
    new = [word for word in (source.template_control if control is None else control) if word not in base.control]
    return replace(
        base,
        token_bytes=base.token_bytes + tuple(b"" if word in source.control else word.encode() for word in new),
        control={**base.control, **{word: base.size + i for i, word in enumerate(new)}},
        template=source.template,
        adds_bos=source.adds_bos,
        refusal=source.refusal,
    )


# A byte-level BPE writes each byte as one printable character: itself where it is printable, else one from U+0100 on
# (GPT-2's encoder.py, bytes_to_unicode).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_FROM_BYTE_LEVEL = {0x100 + i: byte for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}

# What a vocabulary must spell to be of use: the bytes of UTF-8 text without control characters and the rarer planes,
# which some vocabularies lack (SmolLM2). A text that has one of those is found not to be spelled.
_ORDINARY = {bytes([byte]) for byte in (0x09, 0x0A, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1))}


def _from_byte_level(token: str) -> bytes:
    try:
        return token.translate(_FROM_BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:  # not of that alphabet: no text becomes this token
        return b""


def _steps(spec: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, also where there is one, none, or lists in lists."""
    steps = [spec] if spec else []
    while any(step["type"] == "Sequence" for step in steps):
        steps = [part for step in steps for part in step.get(key, [step])]
    return steps


def _without_prefix_space(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """A tokenizer.json that puts no space before a text, but is the same otherwise; None if it is so already."""
    steps = _steps(spec.get("normalizer"), "normalizers")
    kept = [step for step in steps if step["type"] != "Prepend"]
    splits = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    bare = [step | _NO_SPACE.get(step["type"], {}) for step in splits]
    if kept == steps and bare == splits:
        return None
    normalizer = {"type": "Sequence", "normalizers": kept} if kept else None
    pre_tokenizer = {"type": "Sequence", "pretokenizers": bare} if bare else None
    return {**spec, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}


_NO_SPACE = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}


def _unicode_normalizer(spec: dict | None) -> Normalizer | None:
    """What of a tokenizer.json's normalizer acts on the text; the rest belongs to how tokens spell bytes."""
    steps = _steps(spec, "normalizers")
    spells = ("Prepend", "ByteLevel")
    steps = [s for s in steps if s["type"] not in spells and not (s["type"] == "Replace" and META in s["content"])]
    if not steps:
        return None
    model, normalizer = {"type": "BPE", "vocab": {}, "merges": []}, {"type": "Sequence", "normalizers": steps}
    return Tokenizer.from_str(json.dumps({"model": model, "normalizer": normalizer})).normalizer


def _token_name(token: str | dict | None) -> str | None:
    """tokenizer_config.json gives a control token as its string, or as an object that holds it."""
    name = token["content"] if isinstance(token, dict) else token
    if not isinstance(name, str | None):
        raise TypeError
    return name


def _own_parts(folder: Path, names: Mapping[str, str | None], control: Mapping[str, int]) -> Parts | None:
    """What the chat template in a checkpoint's folder writes, if there is one. Raises InputError if it is of no use."""
    found = read_chat_template(folder)
    known = {f"{part}_token": name for part, name in names.items() if name is not None}
    return None if found is None else chat_parts(found, known, control)


def _template(control: Mapping[str, int], names: Mapping[str, str | None], own: Parts | None) -> Parts:
    def named(part: str) -> tuple[str, ...]:
        return (names[part],) if names[part] in control else ()

    rows = [row for row in _TEMPLATES if all(word in control for part in _MARKERS for word in row[part][:1])]
    if own is not None and not (rows and _writes_alike(rows[0], own)):
        return {"bos": named("bos"), **own, "eos": named("eos"), "pad": named("pad")}
    if not rows:
        return {part: named(part) for part in ("bos", "eos", "pad")}
    row = next((row for row in rows if row["pad"] == named("pad")), rows[0])
    # A chat model's config names as eos what ends a turn; any other eos is what a base model ends a text with.
    base_eos = named("eos") if named("eos") != row["end_of_turn"][:1] else ()
    return {**row, "eos": base_eos or row["eos"], "pad": named("pad") or row["pad"]}


def _writes_alike(row: Parts, own: Parts) -> bool:
    """Whether two templates write a user's message and the end of the last answer alike, as all of a family do."""
    whole = [
        ["".join(parts[part]) for part in ("end_of_user", "end_of_chat")]
        + ["".join(word for part in ("header_open", "user", "header_close") for word in parts[part])]
        for parts in (row, own)
    ]
    return whole[0] == whole[1]


_PARTS = ("bos", "header_open", "system", "user", "assistant", "header_close", "end_of_turn", "eos", "pad")
_MARKERS = ("bos", "header_open", "end_of_turn", "eos", "pad")


def _row(*cells: str) -> Parts:
    """A template whose messages all end in the same way, and whose chats start as plain texts do."""
    row = {part: tuple(cell.split(" ")) if cell else () for part, cell in zip(_PARTS, cells, strict=True)}
    ends = {end_of(role, last).part: row["end_of_turn"] for role in ROLES for last in (False, True)}
    return {"bos": row["bos"], "start_of_chat": row["bos"], **row, **ends}


# A tokenizer is of the first family whose control tokens it has, and of the one that pads as it does if several fit.
_TEMPLATES = tuple(
    _row(*cells)
    for cells in (
        (  # Llama 3
            *("<|begin_of_text|>", "<|start_header_id|>", "system", "user", "assistant", "<|end_header_id|> \n\n"),
            *("<|eot_id|>", "<|eot_id|>", "<|end_of_text|>"),
        ),
        # Gemma 2 and 3
        ("<bos>", "<start_of_turn>", "user", "user", "model", "\n", "<end_of_turn> \n", "<eos>", "<pad>"),
        (  # Qwen 2 and 3
            *("", "<|im_start|>", "system", "user", "assistant", "\n", "<|im_end|> \n"),
            *("<|endoftext|>", "<|endoftext|>"),
        ),
        # SmolLM2
        ("", "<|im_start|>", "system", "user", "assistant", "\n", "<|im_end|> \n", "<|im_end|>", "<|im_end|>"),
    )
)

"""Input expansion of byte students: the longest token of the original vocabulary that ends at each byte."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64, Integer, Shaped, UInt64

from minalm.errors import InputError
from minalm.tokenization.vocabulary import Vocabulary

WINDOW = 16  # the most bytes of a token that is found, but by a Bolmo: two 64-bit words


@dataclass(frozen=True, eq=False)
class LongestSuffix:
    """Tokens of the original vocabulary, each read from its last byte to its first, in lexicographic order.

    The longest token that begins a string is either the last token not above the string, or the longest beginning of
    that token that begins the string too: whatever lies between a string and one of its beginnings begins like that as
    well. So one binary search finds it, and a climb from token to beginning. Made by `longest_suffix`.
    """

    keys: Shaped[np.ndarray, " tokens"]  # `window` bytes each, zeros after the end; the first is the empty token
    words: UInt64[np.ndarray, "tokens words"]  # their bytes, 8 at a time as a big-endian number
    length: Int64[np.ndarray, " tokens"]  # bytes without the zeros
    parent: Int64[np.ndarray, " tokens"]  # the longest other token that the token begins with
    original: Int32[np.ndarray, " tokens"]  # the token's id in the original vocabulary
    special: Int32[np.ndarray, " new"]  # the original id for each of the student's ids from 256 on
    unread: Mapping[tuple[int, ...], int]  # tokens, as student ids, that no text and no header ever spells

    @property
    def window(self) -> int:
        """The most bytes of a token that can be found."""
        return self.keys.dtype.itemsize

    def __call__(self, inputs: Integer[np.ndarray, "batch time"]) -> Int32[np.ndarray, "batch time"]:
        """Original ids for rows of a byte vocabulary's ids. Each depends on the ids up to its position only.

        No suffix reaches across a special token, whose own result is its original. Where no token ends, at a byte that
        the original vocabulary cannot spell, the result is 0.
        """
        batch, time = inputs.shape
        window, count = self.window, self.words.shape[1]
        is_byte = inputs < 256
        text = np.zeros((batch, window + time), np.uint8)
        text[:, window:] = np.where(is_byte, inputs, 0)
        # The 8 bytes that end at a position, the last one first, are the little-endian word that starts 7 before it.
        from_byte = np.lib.stride_tricks.sliding_window_view(text, 8, axis=1).view("<u8")[..., 0]
        place = (np.arange(batch)[:, None] * from_byte.shape[1] + np.arange(time) + window - 7).ravel()
        from_byte = from_byte.ravel()
        position = np.arange(time)
        run = position - np.maximum.accumulate(np.where(is_byte, -1, position), axis=1)  # bytes since a special token
        first = from_byte[place]
        order = np.argsort(first)  # searching for sorted values is twice as fast
        first, place, run = first[order], place[order], run.ravel()[order]

        token = np.searchsorted(self.words[:, 0], first, side="right") - 1
        long = np.flatnonzero(self.words[token, 0] == first)
        string = np.stack([from_byte[place[long] - 8 * number] for number in range(count)], axis=1)
        string = string.astype(">u8").view(self.keys.dtype)[:, 0]
        token[long] = np.searchsorted(self.keys, string, side="right") - 1

        agree = _leading_zero_bytes(self.words[token, 0] ^ first)
        for number in range(1, count):
            long = np.flatnonzero(agree == 8 * number)
            agree[long] += _leading_zero_bytes(self.words[token[long], number] ^ from_byte[place[long] - 8 * number])
        agree = np.minimum(agree, run)
        climbing = np.flatnonzero(self.length[token] > agree)
        while len(climbing):
            token[climbing] = self.parent[token[climbing]]
            climbing = climbing[self.length[token[climbing]] > agree[climbing]]

        suffix = np.empty(inputs.shape, np.int32)
        suffix.ravel()[order] = self.original[token]
        suffix[~is_byte] = self.special[inputs[~is_byte] - 256]
        return suffix


def longest_suffix(original: Vocabulary, student: Vocabulary) -> LongestSuffix:
    """For the inputs of a byte student, the tokens of `original` with at most WINDOW bytes.

    Raises InputError if the student reads no bytes, or has a special token that the original has not.
    """
    if student.tokenizer is not None:
        raise InputError(f"{student.name} is not a byte vocabulary: only a byte student's inputs can be expanded")
    special = []
    for word in sorted(student.special, key=student.special.__getitem__):
        if word in original.special:
            special.append(original.special[word])
        elif word.encode() in original.id_of_bytes:
            special.append(original.id_of_bytes[word.encode()])
        else:
            raise InputError(f"{original.name} has no token {word!r}: give the student special tokens of the original")
    tokens = {token: i for token, i in original.id_of_bytes.items() if len(token) <= WINDOW}
    return of_tokens(tokens, special)


def bolmo_suffixes(original: Vocabulary, student: Vocabulary) -> LongestSuffix:
    """For the inputs of a Bolmo student (vocabulary.bolmo_vocabulary), all tokens of `original`, however long.

    Its special tokens are found too, by the bytes of their names, which is how a Bolmo reads them. bos and pad are those
    of the original, eos for bos where both are; the two special tokens that no text holds have row 0.
    """
    tokens = {token: i for i, token in enumerate(original.token_bytes) if token}
    parts = {part: next(iter(original.part_ids(part)), 0) for part in ("bos", "eos", "pad")}
    tokens |= {word.encode(): i for word, i in original.special.items() if i not in parts.values()}
    special = [0] * len(student.special)
    special[student.part_ids("bos")[0] - 256] = parts["eos"] or parts["bos"]
    special[student.part_ids("pad")[0] - 256] = parts["pad"]
    return of_tokens(tokens, special)


def write_expansion(suffixes: LongestSuffix) -> list:
    """`expand_input_ids_dict` of config.json, in the layout of the published byte models: [map, ids of special tokens].

    A key of the map is the student's ids of a token, each plus one, the last one first, with commas; its value is the
    token's original id plus one. "" stands for no token.
    """
    letters = suffixes.keys.view(np.uint8).reshape(-1, suffixes.window).tolist()
    columns = zip(letters, suffixes.length.tolist(), suffixes.original.tolist())
    text = {tuple(reversed(row[:length])): i for row, length, i in columns if length}
    single = {(256 + number,): int(i) for number, i in enumerate(suffixes.special)}
    tokens = sorted((text | single | dict(suffixes.unread)).items(), key=lambda item: (item[1], item[0]))
    keys = {",".join(str(i + 1) for i in reversed(ids)): original + 1 for ids, original in tokens}
    return [{"": -1, **keys}, [256 + number for number in range(len(suffixes.special))]]


def read_expansion(place: str, values: object, student_size: int, original_size: int) -> LongestSuffix:
    """The inverse of `write_expansion`; the map is taken as it is.

    In the map of a published model, words of the chat template ("user") have ids of their own, and tokens that hold
    such a word are spelled with them. No text of ours is: they are kept for the way back, and never found. Raises
    InputError, naming `place`, for a map that is none.
    """

    def wrong(what: str) -> InputError:
        return InputError(f"{place}, 'expand_input_ids_dict': {what}: take the file from the original model")

    if not isinstance(values, list | tuple) or len(values) != 2 or not isinstance(values[0], dict):
        raise wrong("not a map and a list")
    tokens, special, unread = {}, [0] * (student_size - 256), {}
    for key, value in values[0].items():
        if not key:
            continue
        try:
            ids = tuple(int(part) - 1 for part in reversed(key.split(",")))
        except ValueError as error:
            raise wrong(f"the key {key!r} is not a list of ids") from error
        if len(ids) > WINDOW or not all(0 <= i < student_size for i in ids):
            raise wrong(f"the key {key!r} is not of 1 to {WINDOW} ids of the vocabulary's {student_size}")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= original_size:
            raise wrong(f"{key!r} has the value {value!r}, which is no row of {original_size}")
        if max(ids) < 256:
            tokens[bytes(ids)] = value - 1
        elif len(ids) == 1:
            special[ids[0] - 256] = value - 1
        else:
            unread[ids] = value - 1
    return of_tokens(tokens, special, unread)


def of_tokens(
    original: Mapping[bytes, int], special: list[int], unread: Mapping[tuple[int, ...], int] | None = None
) -> LongestSuffix:
    """The search for these tokens of text, by their bytes, and for special tokens of the student; see `LongestSuffix`."""
    ids = {token[::-1]: i for token, i in original.items()} | {b"": 0}
    tokens = sorted(ids)
    parent, path = [], [0]  # path: the beginnings of a token that are tokens themselves
    for i, token in enumerate(tokens):
        while not token.startswith(tokens[path[-1]]):
            path.pop()
        parent.append(path[-1])
        path.append(i)
    window = max(WINDOW, -(-max(map(len, tokens)) // 8) * 8)
    keys = np.array(tokens, f"S{window}")
    return LongestSuffix(
        keys=keys,
        words=keys.view(">u8").astype(np.uint64).reshape(len(keys), -1),
        length=np.array([len(token) for token in tokens], np.int64),
        parent=np.array(parent, np.int64),
        original=np.array([ids[token] for token in tokens], np.int32),
        special=np.array(special, np.int32),
        unread=unread or {},
    )


def _leading_zero_bytes(words: UInt64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    count = np.zeros(len(words), np.int64)
    for bits in range(0, 64, 8):
        count += words < np.uint64(1 << bits)
    return count

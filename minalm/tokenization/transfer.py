"""The first embedding rows of a new vocabulary, made of the rows of an old one."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from minalm.text.documents import Segment
from minalm.tokenization.chat_template import special_token_places
from minalm.tokenization.vocabulary import Vocabulary

_BLOCK = 4096  # rows averaged at a time: what is gathered for all rows at once would be several times the table


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """Which old rows each new row is the mean of. One plan serves the input and the output table of a model."""

    old_size: int  # ids of the old vocabulary; a table may have more rows, which mean nothing
    old_ids: Int64[np.ndarray, " entries"]
    start: Int64[np.ndarray, " starts"]  # new id i is the mean of old_ids[start[i]:start[i + 1]]; of none: it is drawn

    @property
    def copied(self) -> int:
        """The number of new ids that have one old id: the same bytes, or the counterpart of a special token."""
        return int((np.diff(self.start) == 1).sum())

    @property
    def averaged(self) -> int:
        """The number of new ids that are the mean of several old ones."""
        return int((np.diff(self.start) > 1).sum())

    @property
    def drawn(self) -> int:
        """The number of new ids that have nothing in the old vocabulary."""
        return int((np.diff(self.start) == 0).sum())


def plan_transfer(old: Vocabulary, new: Vocabulary) -> TransferPlan:
    """For every new id the old ids that it starts from: fast vocabulary transfer (Gee et al. 2022, arXiv 2402.09977).

    A token of text takes the old one of the same bytes (where a piece of text and a byte-fallback token have the same,
    the piece of text), or all that the old tokenizer splits it into. What it cannot be asked about, because the token
    is not UTF-8 or because the answer spells something else (a normalizer, a prefix space), is split from the left into
    the longest old tokens. A special token takes the one of the same string, else what stands in its place in a chat as
    the old template writes it. Ids that are left, such as reserved special tokens and bytes that the old vocabulary
    lacks, get none.
    """
    by_bytes = _text_ids(old)
    by_string = {word.encode(): i for word, i in old.special.items()}
    special = {i: word for word, i in new.special.items()}
    counterparts = _counterparts(old, new)
    rows: list[list[int]] = [[] for _ in range(new.size)]
    unknown = []
    for i, token in enumerate(new.token_bytes):
        string = special[i].encode() if i in special else token
        first, second = (by_string, by_bytes) if i in special else (by_bytes, by_string)
        same = first.get(string, second.get(string))
        if same is not None:
            rows[i] = [same]
        elif token:
            unknown.append(i)
        elif i in special:
            rows[i] = [old.special[counterparts[special[i]]]] if special[i] in counterparts else []
    for i, ids in zip(unknown, _split([new.token_bytes[i] for i in unknown], old, by_bytes), strict=True):
        rows[i] = ids
    start = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return TransferPlan(old.size, np.array([i for ids in rows for i in ids], np.int64), start)


def transfer_rows(
    plan: TransferPlan, table: Float[Any, "old embed"], rows: int, seed: int
) -> Float32[np.ndarray, "{rows} embed"]:
    """The new table: by new id, then zeros up to `rows`.

    The old table is a numpy array, or what reads one from a file when it is sliced (weights.LazyTensor); it is held as
    it is stored, and turned into float32 and float64 in blocks. Ids that have no old ids are drawn from the normal
    distribution of its mean and standard deviation, one for each channel. Give input and output table different seeds,
    or these rows will agree where they should not.
    """
    table = table[:]
    count = np.diff(plan.start)
    result = np.zeros((rows, table.shape[1]), np.float32)
    known = np.flatnonzero(count)
    for block in np.split(known, range(_BLOCK, len(known), _BLOCK)):
        if len(block):
            # The ids of a block are contiguous: the ones in between that are drawn have none.
            first, last = plan.start[block[0]], plan.start[block[-1] + 1]
            found = table[plan.old_ids[first:last]].astype(np.float32)
            sums = np.add.reduceat(found, plan.start[block] - first, axis=0)
            result[block] = sums / count[block, None].astype(np.float32)
    drawn = np.flatnonzero(count == 0)
    if len(drawn):
        mean, deviation = _moments(table[: plan.old_size])
        result[drawn] = mean + deviation * _normal(seed, len(drawn), table.shape[1])
    return result


def _moments(
    table: Float[np.ndarray, "rows embed"],
) -> tuple[Float64[np.ndarray, " embed"], Float64[np.ndarray, " embed"]]:
    """Mean and standard deviation of each channel."""
    blocks = range(0, len(table), _BLOCK)
    mean = sum(table[i : i + _BLOCK].astype(np.float64).sum(0) for i in blocks) / len(table)
    squares = sum(np.square(table[i : i + _BLOCK].astype(np.float64) - mean).sum(0) for i in blocks)
    return mean, np.sqrt(squares / len(table))


def _text_ids(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The id of each token of text by its bytes; a byte-fallback token `<0xNN>` only where no piece spells its byte."""
    special = set(vocabulary.special.values())
    ids: dict[bytes, int] = {}
    for i, token in enumerate(vocabulary.token_bytes):
        if token and i not in special and (token not in ids or _is_fallback(vocabulary, ids[token])):
            ids[token] = i
    return ids


def _is_fallback(vocabulary: Vocabulary, i: int) -> bool:
    token = vocabulary.token_bytes[i]
    return (
        len(token) == 1
        and vocabulary.tokenizer is not None
        and vocabulary.tokenizer.id_to_token(i) == f"<0x{token[0]:02X}>"
    )


def _counterparts(old: Vocabulary, new: Vocabulary) -> dict[str, str]:
    """What of the old special tokens does what a new one does: bos, eos, pad, or stands in its place in a chat."""
    pairs = {new.named(part): old.named(part) for part in ("pad", "eos", "bos") if old.named(part)}
    if old.chat_template is not None and new.chat_template is not None:
        ours, theirs = (special_token_places(side.chat_template, side.special_tokens) for side in (new, old))
        places = {word: theirs[place] for place, word in reversed(ours.items()) if place[0] and place in theirs}
        pairs = places | {word: places.get(word, other) for word, other in pairs.items()}
    return pairs


def _split(tokens: list[bytes], old: Vocabulary, by_bytes: dict[bytes, int]) -> list[list[int]]:
    """What the old vocabulary makes of each token; [] where it cannot spell it."""
    texts = [token.decode(errors="ignore") for token in tokens]
    answers = old.encode([(Segment(text),) for text in texts])
    longest = max(map(len, by_bytes))
    result = []
    for token, answer in zip(tokens, answers, strict=True):
        ids = answer.ids.tolist()
        if b"".join(old.token_bytes[i] for i in ids) != token:
            ids = _longest_first(token, by_bytes, longest)
        result.append(ids)
    return result


def _longest_first(token: bytes, by_bytes: dict[bytes, int], longest: int) -> list[int]:
    ids, place = [], 0
    while place < len(token):
        ends = range(min(len(token), place + longest), place, -1)
        end = next((end for end in ends if token[place:end] in by_bytes), None)
        if end is None:
            return []
        ids.append(by_bytes[token[place:end]])
        place = end
    return ids


def _normal(seed: int, rows: int, columns: int) -> Float64[np.ndarray, "{rows} {columns}"]:
    """Standard normal numbers by Box and Muller: numpy promises Philox's bits, not its normal numbers, for ever."""
    bits = np.random.Philox(seed).random_raw((2, rows, columns)) if rows else np.zeros((2, 0, columns), np.uint64)
    radius, angle = ((bits >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # both in (0, 1]
    return np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)

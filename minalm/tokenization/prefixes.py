"""The beginnings of a teacher's tokens, for the distribution of the next byte that the teacher implies.

Entries that spell bytes are sorted by them; an entry's place in that order is its *rank*. A *node* is a beginning u of
entries, and those that begin with u have the ranks from `low` to `high`. The probability of u is the sum over them.

Most nodes have few entries: their probabilities are sums over a window of WINDOW ranks, taken entry by entry. The few
nodes with more are *inner*: each of their children, and the entry that ends there, has a *slot* in which probability is
added up over the whole vocabulary. All sums are of positive numbers, so a small probability keeps its digits, which a
difference of two running sums would not.

For Gemma 2's 256,000 entries, 502,618 nodes, 400 of them inner: 23 MB on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from minalm.errors import InputError
from minalm.text.documents import Markup, Piece
from minalm.tokenization.vocabulary import Encoding, Vocabulary

WINDOW = 256  # entries of the largest node that is not inner
END = 256  # the child "an entry ends here", behind those of the 256 bytes


class Level(NamedTuple):
    """The slots of one depth of the tree, and the slot that each is added to."""

    child: Int32[np.ndarray, " slots"]
    parent: Int32[np.ndarray, " slots"]


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Made by `find_prefixes`."""

    rank: Int32[np.ndarray, " vocab"]  # of each id; -1: it spells nothing
    order: Int32[np.ndarray, " entries"]  # the id of each rank
    letters: UInt8[np.ndarray, " letters"]  # the bytes of all entries, by rank
    start: Int32[np.ndarray, " entries"]  # of each rank's bytes in `letters`
    length: Int32[np.ndarray, " entries"]
    node: Int32[np.ndarray, " letters"]  # of the beginning of an entry that ends with this letter
    low: Int32[np.ndarray, " nodes"]
    high: Int32[np.ndarray, " nodes"]
    depth: Int32[np.ndarray, " nodes"]  # bytes
    inner: Int32[np.ndarray, " nodes"]  # row of `children`; -1: not inner
    children: Int32[np.ndarray, "inner places"]  # slots; the last place is END
    slot: Int32[np.ndarray, " vocab"]  # to which the probability of each id is added first
    levels: tuple[Level, ...]  # the deepest first
    outcomes: Int32[np.ndarray, " outcomes"]  # slot of each of the student's entries, at the beginning of a token
    window: Int32[np.ndarray, " vocab"]  # the first rank of the window that holds all of an id's nodes that have one
    slots: int  # the last one stays empty
    missing: tuple[str, ...] = ()  # special tokens of the teacher's template that the student has not


def find_prefixes(teacher: Vocabulary, student: Vocabulary, teacher_rows: int, student_rows: int) -> Prefixes:
    """The nodes of the teacher's entries, and what a byte student's entries are at the beginning of a token.

    Special tokens are outcomes of their own where the student has the same one, or one for the same end (bos, eos,
    pad). Raises InputError if the teacher spells no bytes, or the student's tokens are not bytes.
    """
    if student.tokenizer is not None:
        raise InputError(
            f"next_byte is for byte students, and {student.name} is none: "
            "give --losses.next-byte 0, and --losses.alm 1 to learn from the teacher"
        )
    spelled = [i for i, token in enumerate(teacher.token_bytes[:teacher_rows]) if token]
    if not spelled:
        raise InputError(f"{teacher.name} spells no bytes: give --losses.next-byte 0")
    order = np.array(sorted(spelled, key=teacher.token_bytes.__getitem__), np.int32)
    tokens = [teacher.token_bytes[i] for i in order]
    letters = np.frombuffer(b"".join(tokens), np.uint8)
    length = np.array([len(token) for token in tokens], np.int32)
    start = (np.cumsum(length) - length).astype(np.int32)

    nodes = _nodes(letters, start, length)
    low, high, depths, parents, last_letter = nodes.low, nodes.high, nodes.depth, nodes.parent, nodes.letter
    at = nodes.of_rank

    # Slots: inner nodes, their other children, the entries that end at inner nodes, the student's special tokens, what
    # is nowhere, and an empty one.
    is_inner = high - low > WINDOW
    is_inner[0] = True
    inner = np.where(is_inner, np.cumsum(is_inner) - 1, -1)
    leaf = ~is_inner & is_inner[parents]
    size = int(is_inner.sum())
    slot_of_node = np.where(is_inner, inner, np.where(leaf, size + np.cumsum(leaf) - 1, -1))
    size += int(leaf.sum())
    ends = np.unique(at[is_inner[at]])
    end_slot = size + np.arange(len(ends))
    size += len(ends)
    special = _shared_special(teacher, student, teacher_rows)
    special_slot = size + np.arange(len(special))
    nowhere, empty = size + len(special), size + len(special) + 1

    children = np.full((int(is_inner.sum()), 257), empty, np.int32)
    below = np.flatnonzero(is_inner[parents])
    below = below[below > 0]
    children[inner[parents[below]], last_letter[below]] = slot_of_node[below]
    children[inner[ends], END] = end_slot
    child = np.concatenate([slot_of_node[below], end_slot])
    parent = np.concatenate([inner[parents[below]], inner[ends]])
    depth = np.concatenate([depths[below], depths[ends] + 1])
    levels = [Level(child[depth == d].astype(np.int32), parent[depth == d].astype(np.int32)) for d in np.unique(depth)]

    slot, window = np.full(teacher_rows, nowhere, np.int32), np.zeros(teacher_rows, np.int32)
    end_of_node = np.full(len(low), empty)
    end_of_node[ends] = end_slot
    slot[order], window[order] = _of_entries(nodes, leaf, slot_of_node, end_of_node)
    outcomes = np.full(student_rows, empty, np.int32)
    outcomes[:256] = children[0, :256]
    for (ours, theirs), place in zip(special.items(), special_slot):
        slot[theirs], outcomes[ours] = place, place
    rank = np.full(teacher_rows, -1, np.int32)
    rank[order] = np.arange(len(order))
    return Prefixes(
        rank=rank,
        order=order,
        letters=letters,
        start=start,
        length=length,
        node=nodes.node,
        low=low.astype(np.int32),
        high=high.astype(np.int32),
        depth=depths.astype(np.int32),
        inner=inner.astype(np.int32),
        children=children,
        slot=slot,
        levels=tuple(reversed(levels)),
        outcomes=outcomes,
        window=window,
        slots=empty + 1,
        missing=tuple(w for w in teacher.template_special if teacher.special[w] not in special.values()),
    )


class _Nodes(NamedTuple):
    """All beginnings of entries; number 0 is that of no bytes, and a parent comes before its children."""

    node: Int32[np.ndarray, " letters"]  # of the beginning of an entry that ends with this letter
    of_rank: Int32[np.ndarray, " entries"]  # that of all bytes of an entry
    low: Int64[np.ndarray, " nodes"]
    high: Int64[np.ndarray, " nodes"]
    depth: Int64[np.ndarray, " nodes"]
    parent: Int64[np.ndarray, " nodes"]  # -1: none
    letter: Int64[np.ndarray, " nodes"]  # the last one


def _nodes(
    letters: UInt8[np.ndarray, " letters"], start: Int32[np.ndarray, " entries"], length: Int32[np.ndarray, " entries"]
) -> _Nodes:
    """One depth after the other: in sorted order, entries that begin alike stand side by side."""
    node, at = np.zeros(len(letters), np.int32), np.zeros(len(start), np.int32)  # `at`: the node of the bytes so far
    columns = [[np.array([value])] for value in (0, len(start), 0, -1, 0)]
    count = 1
    for depth in range(1, int(length.max()) + 1):
        ranks = np.flatnonzero(length >= depth)
        letter, parent = letters[start[ranks] + depth - 1], at[ranks]
        new = np.append(True, (letter[1:] != letter[:-1]) | (parent[1:] != parent[:-1]))
        at[ranks] = node[start[ranks] + depth - 1] = count + np.cumsum(new) - 1
        first = np.flatnonzero(new)
        last = np.append(first[1:], len(ranks)) - 1
        found = ranks[first], ranks[last] + 1, np.full(len(first), depth), parent[first], letter[first]
        for column, values in zip(columns, found, strict=True):
            column.append(values.astype(np.int64))
        count += len(first)
    return _Nodes(node, at, *map(np.concatenate, columns))


def _of_entries(
    nodes: _Nodes,
    leaf: Bool[np.ndarray, " nodes"],
    slot_of_node: Int64[np.ndarray, " nodes"],
    end_of_node: Int64[np.ndarray, " nodes"],
) -> tuple[Int64[np.ndarray, " entries"], Int64[np.ndarray, " entries"]]:
    """`slot` and `window` of each rank: those of its shallowest beginning that is not inner, of which there is at most
    one; for an entry that is inner itself, the slot of what ends there."""
    leaves = np.flatnonzero(leaf)
    leaves = leaves[np.argsort(nodes.low[leaves])]
    ranks = np.arange(len(nodes.of_rank))
    leaf_of_rank = np.searchsorted(nodes.low[leaves], ranks, side="right") - 1
    held = (leaf_of_rank >= 0) & (ranks < nodes.high[leaves][leaf_of_rank])
    slot = np.where(held, slot_of_node[leaves][leaf_of_rank], end_of_node[nodes.of_rank])
    return slot, np.where(held, nodes.low[leaves][leaf_of_rank], 0)


def typical_prefixes(teacher_rows: int, student_rows: int) -> Prefixes:
    """The shapes for a vocabulary of this size that is not there, to compile for: those of Gemma 2's, in proportion."""

    def array(size: int, dtype: type = np.int32) -> np.ndarray:
        return np.zeros(size, dtype)

    inner, slots = max(1, teacher_rows // 640), teacher_rows // 21
    return Prefixes(
        rank=array(teacher_rows),
        order=array(teacher_rows),
        letters=array(8 * teacher_rows, np.uint8),
        start=array(teacher_rows),
        length=array(teacher_rows),
        node=array(8 * teacher_rows),
        low=array(2 * teacher_rows),
        high=array(2 * teacher_rows),
        depth=array(2 * teacher_rows),
        inner=array(2 * teacher_rows),
        children=array(inner * 257).reshape(inner, 257),
        slot=array(teacher_rows),
        levels=tuple(Level(array(slots // 5), array(slots // 5)) for _ in range(5)),
        outcomes=array(student_rows),
        window=array(teacher_rows),
        slots=slots,
    )


def _shared_special(teacher: Vocabulary, student: Vocabulary, teacher_rows: int) -> dict[int, int]:
    """The student's special tokens that the teacher has: ids -> ids."""
    words = {word: word for word in student.special}
    for part in ("bos", "eos", "pad"):
        ours, theirs = student.named(part), teacher.named(part)
        if ours is not None and ours not in teacher.special and theirs is not None:
            words[ours] = theirs
    found, taken = {}, set()
    for ours, theirs in words.items():
        number = teacher.special.get(theirs)
        if number is not None and number < teacher_rows and number not in taken and not teacher.token_bytes[number]:
            found[student.special[ours]] = number
            taken.add(number)
    return found


def byte_places(
    pieces: Sequence[Piece],
    ours: Sequence[Encoding],
    theirs: Sequence[Encoding],
    student_length: int,
    teacher_length: int,
    prefixes: Prefixes,
) -> Int32[np.ndarray, "3 batch student_time"]:
    """`within`, `node` and `after` (types.BytePlaces): for each of the student's tokens whose next one counts, where the
    teacher says what it is; elsewhere -1.

    Nothing is said inside a text that a template writes, of what follows such a text where the other side writes
    another, and of a text that is the first token of a row.
    """
    places = np.full((3, len(ours), student_length), -1, np.int32)
    within, node, after = places.reshape(3, -1)
    if not any(len(encoding.ids) for encoding in theirs):
        return places
    segments = [segment.content for piece in pieces for segment in piece]
    width = np.int32(1 + max(int(encoding.ends.max(initial=0)) for encoding in (*ours, *theirs)))

    here, place = _student_places(pieces, ours, student_length, width)

    # Of each of the teacher's tokens: whether it is of text, its bytes, and what is said behind it. A special token cannot
    # run on. A space that the tokenizer put before a text is a token that has been read where the text begins.
    their = _Tokens.of(theirs, teacher_length, pieces, width)
    rank = prefixes.rank[their.ids]
    length = np.where(rank >= 0, prefixes.length[rank], 0)
    letter = prefixes.start[rank]
    last, read, last_node = their.time.copy(), length.copy(), np.full(len(rank), -1, np.int32)
    spells = length > 0
    last_node[spells] = prefixes.node[(letter + length - 1)[spells]]
    follows = np.flatnonzero((their.ends[:-1] >= 0) & (their.ends[1:] < 0) & (length[1:] == 1)) + 1
    is_text = np.array([isinstance(content, str) for content in segments])
    dummy = follows[is_text[their.segment[follows]] & (their.text_bytes[follows] == 0) & (their.time[follows] > 0)]
    for array in (last, read, last_node):
        array[dummy - 1] = array[dummy]
    read[dummy - 1] = 1

    known = np.flatnonzero(their.ends >= 0)
    ends_here = np.bincount(their.ends[known], minlength=width * len(ours)) > 0
    following = np.cumsum(ends_here, dtype=np.int32)[place]  # of the known ones, the first that ends behind the place
    never = np.int32(2**31 - 1)
    of_text = (their.text_bytes > 0) & (their.time > 0)
    begins = np.append(np.where(of_text, their.ends - length, never)[known], never)
    inside = begins[following] < place
    to_letter = (letter + length - their.ends - 1)[known]  # a place -> the letter before it
    token, where = following[inside], here[inside]
    within[where] = (their.time - 1)[known][token]
    node[where] = prefixes.node[to_letter[token] + place[inside]]

    says = ((read == 0) | (last > 0))[known]
    behind = np.flatnonzero(~inside & ends_here[place])
    behind = behind[says[following[behind] - 1]]
    token, where = known[following[behind] - 1], here[behind]
    within[where] = np.where(read > 0, last - 1, -1)[token]
    node[where] = last_node[token]
    after[where] = last[token]
    return places


def _student_places(
    pieces: Sequence[Piece], ours: Sequence[Encoding], length: int, width: np.int32
) -> tuple[Int64[np.ndarray, " places"], Int32[np.ndarray, " places"]]:
    """(the student's tokens whose next one counts, as numbers in [row, time]; where they end: what ends in row n is at
    n * width and behind it)."""
    ends, counts = np.full((len(ours), length), -1, np.int32), np.zeros((len(ours), length), bool)
    for row, encoding in enumerate(ours):
        our = encoding.cut(length)
        if not (size := len(our.ids)):
            continue
        ends[row, :size] = np.where(our.ends >= 0, our.ends + width * row, -1)
        counts[row, : size - 1] = our.loss_mask[1:]
        differs = [isinstance(s.content, Markup) and s.content.student != s.content.teacher for s in pieces[row]]
        if any(differs):
            counts[row, : size - 1] &= ~np.array(differs)[our.segment[1:]]
    here = np.flatnonzero((ends >= 0) & counts)
    return here, ends.ravel()[here]


class _Tokens(NamedTuple):
    """The tokens of all rows of a batch in one array; the ends of row n begin at n * width."""

    ids: Int32[np.ndarray, " tokens"]
    time: Int32[np.ndarray, " tokens"]
    ends: Int32[np.ndarray, " tokens"]  # -1: nowhere
    segment: Int32[np.ndarray, " tokens"]  # among those of all pieces
    text_bytes: Int32[np.ndarray, " tokens"]

    @classmethod
    def of(cls, rows: Sequence[Encoding], length: int, pieces: Sequence[Piece], width: np.int32) -> "_Tokens":
        cut = [encoding.cut(length) for encoding in rows]
        ids, ends, text_bytes, segment = map(np.concatenate, zip(*(encoding[:4] for encoding in cut)))
        size = np.array([len(encoding.ids) for encoding in cut], np.int32)
        row = np.repeat(np.arange(len(cut), dtype=np.int32), size)
        segments = np.array([len(piece) for piece in pieces], np.int32)
        return cls(
            ids=ids,
            time=np.arange(len(ids), dtype=np.int32) - (np.cumsum(size, dtype=np.int32) - size)[row],
            ends=np.where(ends >= 0, ends + width * row, -1),
            segment=segment.astype(np.int32) + (np.cumsum(segments, dtype=np.int32) - segments)[row],
            text_bytes=text_bytes,
        )

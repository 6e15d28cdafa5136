"""What the ends of a teacher's and a student's token exclude, and one of them alone: values for the `unbiased` chunking.

That a token ended tells more than its bytes: the text does not go on in a way that the tokenizer would have written with
a longer token ("tokenization bias", Phan et al. 2024, arXiv 2410.09303). Where both sides exclude the same, what they
give to the text so far can be compared.

For a token of bytes x, a continuation r is *covered* if the last token of the encoding of x r begins within x and ends
with r; its weight is that token's share of all tokens of a corpus. For a teacher's token x and a student's token y,

    teacher_bias(x, y) = the sum of the teacher's weights of what x covers for the teacher and y not for the student,
    student_bias(x, y) = the sum of the student's weights of what y covers for the student and x not for the teacher,

and both are 1 where x or y is nothing but white space. A chunk may end behind a special part, or where both values of
(the teacher's last token, the student's last token) are at most a threshold. An encoding is that of the tokenizer's model
alone, without normalizer, pre-tokenizer and added tokens. A byte covers nothing: for a student on bytes, student_bias is
0, and teacher_bias is the share of the tokens that x is the beginning of, or that overlap it.

This is the definition of tokenkit, commit bcacdef (`compute_pair_bias` of scripts/compute_tokenizer_info.py,
`get_unbiased_alignments` of tokenkit/align.py), with these differences:

* tokenkit stores all pairs of entries of which one ends with the other. Here are those at which chunks of a corpus end,
  and an unknown pair ends no chunk; a run says how many there are. (In tokenkit an unstored pair counts as 0: it may.)
* tokenkit adds 1e-9 of all counts to each entry's. Here an entry that the corpus does not have weighs nothing, which
  changes a value by at most 1e-9 times the number of entries.
* tokenkit leaves out what is no UTF-8. Here byte-level tokenizers are read in bytes, so a token that ends within a
  character has its true value.
* Where its files are missing, tokenkit makes alignments of NaN, which as bool are all true, and refuses only a loss that
  has "unbiased" in its name. Here a missing file, or one of other tokenizers, is refused.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from minalm.errors import InputError
from minalm.text.documents import Piece
from minalm.tokenization.align import align, read_both
from minalm.tokenization.tokenizer_json import as_model_reads
from minalm.tokenization.vocabulary import Vocabulary

FORMAT = "minalm pair bias 1"
DTYPES = {"teacher": "I32", "student": "I32", "teacher_bias": "F64", "student_bias": "F64", "count": "I64"}
PIECES = 256  # that are read at a time
TOKENS = 64  # whose continuations are encoded at a time: one call for each would wait for threads


@dataclass(frozen=True, eq=False)
class PairBias:
    """The values of each pair, in the order of the teacher's id and then the student's."""

    teacher: Int32[np.ndarray, " pair"]  # id of the teacher's token
    student: Int32[np.ndarray, " pair"]  # id of the student's
    teacher_bias: Float64[np.ndarray, " pair"]  # shares of all tokens
    student_bias: Float64[np.ndarray, " pair"]
    count: Int64[np.ndarray, " pair"]  # chunks of the corpus that end with the pair

    @cached_property
    def keys(self) -> Int64[np.ndarray, " pair"]:
        """The two ids of each pair in one number, in ascending order."""
        return _keys(self.teacher, self.student)

    def find(self, teacher: Int32[np.ndarray, " end"], student: Int32[np.ndarray, " end"]) -> Int64[np.ndarray, " end"]:
        """The number of each of these pairs; -1: unknown."""
        keys = _keys(teacher, student)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[place] == keys, place, -1)

    def unbiased(self, threshold: float) -> Bool[np.ndarray, " pair"]:
        """Whether both values of a pair are at most `threshold`."""
        return np.maximum(self.teacher_bias, self.student_bias) <= threshold


@dataclass(frozen=True, eq=False)
class UnbiasedEnds:
    """Which ends of chunks are unbiased by a threshold."""

    pairs: PairBias
    threshold: float

    @cached_property
    def _unbiased(self) -> Bool[np.ndarray, " pair_and_unknown"]:
        return np.append(self.pairs.unbiased(self.threshold), False)

    def __call__(
        self, teacher: Int32[np.ndarray, " end"], student: Int32[np.ndarray, " end"]
    ) -> Bool[np.ndarray, " end"]:
        """Whether a chunk whose last tokens these are may end; not at a pair that is unknown."""
        return self._unbiased[self.pairs.find(teacher, student)]


def _keys(teacher: Int32[np.ndarray, " n"], student: Int32[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    return teacher.astype(np.int64) << 32 | student


# --- from text ----------------------------------------------------------------------------------------------------


class PairCounts(NamedTuple):
    """What of a corpus the values depend on. Special tokens and what templates write are not counted."""

    keys: Int64[np.ndarray, " pair"]  # the pairs at which chunks of text end
    count: Int64[np.ndarray, " pair"]
    teacher_tokens: Int64[np.ndarray, " teacher_vocab"]  # how often each entry is read
    student_tokens: Int64[np.ndarray, " student_vocab"]
    pieces: int
    left_out: int  # of the pieces, those that one of the tokenizers does not spell


def count_pairs(pieces: Iterable[Piece], student: Vocabulary, teacher: Vocabulary) -> PairCounts:
    """Reads pieces of text as `batches.make_batch` does, but to their ends. Raises InputError if no chunk ends in them."""
    totals = np.zeros(teacher.size, np.int64), np.zeros(student.size, np.int64)
    keys, counts, read, left_out = [], [], 0, 0
    pieces = iter(pieces)
    while batch := list(islice(pieces, PIECES)):
        _, ours, theirs, usable = read_both(batch, student, teacher)
        read, left_out = read + len(batch), left_out + int((~usable).sum())
        for total, rows in zip(totals, (theirs, ours), strict=True):
            total += np.bincount(np.concatenate([row.ids[row.text_bytes > 0] for row in rows]), minlength=len(total))
        ends = []
        for our, their in zip(ours, theirs, strict=True):
            aligned = align(our, their)
            text = aligned.text_bytes(our) > 0
            ends.append(_keys(their.ids[aligned.teacher_chunk_end[text]], our.ids[aligned.student_chunk_end[text]]))
        for each, found in zip((keys, counts), np.unique(np.concatenate(ends), return_counts=True), strict=True):
            each.append(found)
    if not sum(map(len, keys)):
        raise InputError(f"both tokenizers end together nowhere in {read} pieces of text: give other text")
    every, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    count = np.bincount(inverse, np.concatenate(counts)).astype(np.int64)
    return PairCounts(every, count, *totals, read, left_out)


def pair_bias(counts: PairCounts, student: Vocabulary, teacher: Vocabulary) -> PairBias:
    """The two values of each pair that was counted."""
    theirs, ours = (counts.keys >> 32).astype(np.int32), (counts.keys & 0xFFFFFFFF).astype(np.int32)
    blank = _are_blank(teacher, theirs) | _are_blank(student, ours)
    sides = _Entries(teacher, counts.teacher_tokens), _Entries(student, counts.student_tokens)
    teacher_bias, student_bias = np.ones(len(blank)), np.ones(len(blank))
    teacher_bias[~blank] = _excess(*sides, theirs[~blank], ours[~blank])
    student_bias[~blank] = _excess(*reversed(sides), ours[~blank], theirs[~blank])
    return PairBias(theirs, ours, teacher_bias, student_bias, counts.count)


def _are_blank(vocabulary: Vocabulary, ids: Int32[np.ndarray, " pair"]) -> Bool[np.ndarray, " pair"]:
    """Which of these tokens are nothing but white space."""
    return np.array([not vocabulary.decode([i]).strip() for i in ids.tolist()], bool)


def _excess(
    own: "_Entries", other: "_Entries", own_ids: Int32[np.ndarray, " pair"], other_ids: Int32[np.ndarray, " pair"]
) -> Float64[np.ndarray, " pair"]:
    """For each pair the weight of what the first token covers and the second does not."""
    values = np.zeros(len(own_ids))
    distinct, index = np.unique(own_ids, return_inverse=True)
    order = np.argsort(index, kind="stable")
    for first in range(0, len(distinct), TOKENS):
        covered = own.covered_by([own.vocabulary.token_bytes[i] for i in distinct[first : first + TOKENS]])
        pairs = order[slice(*np.searchsorted(index[order], (first, first + TOKENS)))]
        found = [covered[n] for n in index[pairs] - first]
        others = [other.vocabulary.token_bytes[i] for i in other_ids[pairs]]
        both = other.covers(others, [continuations for continuations, _ in found])
        values[pairs] = [weights[~too].sum() for (_, weights), too in zip(found, both, strict=True)]
    return values


class _Entries:
    """A vocabulary whose entries have weights, and the model within its tokenizer."""

    def __init__(self, vocabulary: Vocabulary, counts: Int64[np.ndarray, " vocab"]):
        self.vocabulary = vocabulary
        self.model = None if vocabulary.tokenizer is None else Tokenizer(vocabulary.tokenizer.model)
        self.share = counts / max(int(counts.sum()), 1)
        self.longest = max(map(len, vocabulary.token_bytes))
        read = sorted((vocabulary.token_bytes[i], i) for i in np.flatnonzero(counts).tolist())
        self.tokens, self.ids = [token for token, _ in read], [i for _, i in read]

    def covered_by(self, tokens: Sequence[bytes]) -> list[tuple[list[bytes], Float64[np.ndarray, " continuation"]]]:
        """For each token (the continuations that it covers, their weights), without those that weigh nothing."""
        texts, last, continuations, sizes = [], [], [], []
        for token in tokens:
            before = len(texts)
            for start in range(len(token)):
                rest = token[start:]
                stop = bisect_right(self.tokens, rest + b"\xff" * self.longest)
                for n in range(bisect_left(self.tokens, rest), stop):
                    if len(self.tokens[n]) > len(rest):
                        texts.append(token[:start] + self.tokens[n])
                        last.append(self.ids[n])
                        continuations.append(self.tokens[n][len(rest) :])
            sizes.append(len(texts) - before)
        last = np.array(last, np.int64)
        right = self._last(texts) == last
        covered, stop = [], 0
        for size in sizes:
            found = stop + np.flatnonzero(right[stop : stop + size])
            covered.append(([continuations[n] for n in found], self.share[last[found]]))
            stop += size
        return covered

    def covers(
        self, tokens: Sequence[bytes], continuations: Sequence[Sequence[bytes]]
    ) -> list[Bool[np.ndarray, " continuation"]]:
        """For each token whether it covers its continuations."""
        covered = [np.zeros(len(each), bool) for each in continuations]
        maybe = [
            (row, n)
            for row, (token, each) in enumerate(zip(tokens, continuations, strict=True))
            for n, continuation in enumerate(each)
            if self._has_entry(token, continuation)
        ]
        last = self._last([tokens[row] + continuations[row][n] for row, n in maybe])
        for (row, n), i in zip(maybe, last.tolist(), strict=True):
            covered[row][n] = i >= 0 and len(self.vocabulary.token_bytes[i]) > len(continuations[row][n])
        return covered

    def _has_entry(self, token: bytes, continuation: bytes) -> bool:
        """Whether there is an entry that begins within the token and ends with the continuation."""
        room = max(self.longest - len(continuation), 0)
        starts = range(max(len(token) - room, 0), len(token))
        return any(token[start:] + continuation in self.vocabulary.id_of_bytes for start in starts)

    def _last(self, texts: Sequence[bytes]) -> Int64[np.ndarray, " text"]:
        """The last token of each text; -1 where a tokenizer that reads characters cannot read it."""
        if self.model is None:
            return np.array([text[-1] for text in texts], np.int64)
        last = np.full(len(texts), -1, np.int64)
        readable, strings = [], []
        for n, text in enumerate(texts):
            try:
                strings.append(as_model_reads(self.vocabulary, text))
                readable.append(n)
            except UnicodeDecodeError:
                pass
        encodings = self.model.encode_batch_fast(strings, add_special_tokens=False)
        last[readable] = [encoding.ids[-1] for encoding in encodings]
        return last


# --- the file -----------------------------------------------------------------------------------------------------


def write_pair_bias(path: Path, pairs: PairBias, student: Vocabulary, teacher: Vocabulary) -> None:
    """Writes a safetensors file with the fields of PairBias and fingerprints of both vocabularies; whole or not at all."""
    prints = {"teacher": _fingerprint(teacher), "student": _fingerprint(student)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({name: getattr(pairs, name) for name in DTYPES}, partial, {"format": FORMAT, **prints})
    partial.replace(path)


def read_pair_bias(path: Path, student: Vocabulary, teacher: Vocabulary) -> PairBias:
    """The file that `write_pair_bias` wrote. Raises InputError if it is missing, damaged, or of other vocabularies."""
    again = "make it with `python convert.py pair-bias`"
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"{path} is not a file of pairs of tokens: {again}")
            for side, vocabulary in (("teacher", teacher), ("student", student)):
                if metadata.get(side) != _fingerprint(vocabulary):
                    raise InputError(f"{path} is of another {side}'s tokenizer than {vocabulary.name}: {again}")
            found = {name: file.get_slice(name).get_dtype() for name in file.keys()}
            columns = {name: file.get_tensor(name) for name in DTYPES} if found == DTYPES else None
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: {again}") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}): {again}") from error
    if columns is None or not _are_sound(columns, student.size, teacher.size):
        raise InputError(f"{path} does not hold the values of pairs of tokens: {again}")
    return PairBias(**columns)


def _are_sound(columns: Mapping[str, np.ndarray], student_size: int, teacher_size: int) -> bool:
    """Whether these columns, which have the right types, can be those of a PairBias."""
    teacher, student, *biases, count = (columns[name] for name in DTYPES)
    if teacher.ndim != 1 or not teacher.size or any(column.shape != teacher.shape for column in columns.values()):
        return False
    return bool(
        all(((0 <= ids) & (ids < size)).all() for ids, size in ((teacher, teacher_size), (student, student_size)))
        and (np.diff(_keys(teacher, student)) > 0).all()
        and all(((0.0 <= bias) & (bias < np.inf)).all() for bias in biases)
        and (count > 0).all()
    )


def _fingerprint(vocabulary: Vocabulary) -> str:
    """A hash of the tokens of text and their ids."""
    digest = hashlib.sha256()
    for i, token in enumerate(vocabulary.token_bytes):
        if token:
            digest.update(f"{i} {token.hex()}\n".encode())
    return digest.hexdigest()

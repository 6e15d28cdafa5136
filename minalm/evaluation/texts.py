"""Bits per byte of any text, so that models with different tokenizers can be compared.

A document is read in stretches of `window / 2` bytes. Each stretch is predicted after the one before it and a first
token (`first_id`); so every token has between half a window and a window of text before it, but at the start of a
document, and every model the same text, up to the part of a token where a stretch begins.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from minalm.errors import InputError
from minalm.evaluation.bolmo_scoring import BolmoScorer
from minalm.evaluation.scoring import Request, Scorer, first_id
from minalm.text.corpus import read_corpus
from minalm.text.documents import Segment
from minalm.tokenization.vocabulary import Vocabulary

SMALLEST_WINDOW = 16  # bytes


class BitsPerByte(NamedTuple):
    """Of all documents together."""

    value: float
    error: float | None  # its standard error, the documents taken for a sample; None: there is one document
    bytes: int
    documents: int


def read_documents(paths: Sequence[Path]) -> list[str]:
    """The texts of .txt files (one document each) and of rows of other files (text.rows). Raises InputError."""
    corpus = read_corpus(paths, limit=2**62)
    if corpus.shares is not None:
        raise InputError("texts that are evaluated have no weights: leave them out of their names")
    pieces = map(corpus.piece, range(len(corpus)))
    return ["".join(part.content for part in piece if isinstance(part.content, str)) for piece in pieces]


def bits_per_byte(
    scorer: Scorer | BolmoScorer, documents: Sequence[str], window: int, progress: Callable[[int], None] | None = None
) -> BitsPerByte:
    """What the model of a scorer takes to write the documents, their ends not counted; `window` is in bytes.

    The standard error is that of a ratio of two sums over documents (Cochran 1977, section 2.11). Raises InputError for
    a text that the tokenizer does not spell, or a window that is too small or larger than the model reads.
    """
    if window < SMALLEST_WINDOW or window % 2:
        raise InputError(f"--window is {window}: it must be an even number of at least {SMALLEST_WINDOW} bytes")
    if scorer.longest is not None and window > scorer.longest:
        raise InputError(f"--window {window} is more than the {scorer.longest} tokens that a model reads: lower it")
    vocabularies = [model.vocabulary for model in scorer.models]
    firsts = [first_id(vocabulary) for vocabulary in vocabularies]
    requests, owner, sizes = [], [], []
    for number, text in enumerate(documents):
        ids, ends = _tokens(vocabularies[0], text)
        sizes.append(len(text.encode()))
        for before, inside in _stretches(ends, window // 2):
            contexts = tuple(np.append(first, ids[before]).astype(np.int32) for first in firsts)
            requests.append(Request(contexts, ids[inside]))
            owner.append(number)
    nats = np.zeros(len(documents))
    for number, score in zip(owner, scorer(requests, progress), strict=True):
        nats[number] -= score.logp.sum(dtype=np.float64)
    bits, size = nats / math.log(2.0), np.array(sizes, np.float64)
    value, count = bits.sum() / size.sum(), len(documents)
    if count == 1:
        return BitsPerByte(float(value), None, int(size.sum()), 1)
    spread = np.square(bits - value * size).sum() * count / (count - 1)
    return BitsPerByte(float(value), float(math.sqrt(spread) / size.sum()), int(size.sum()), count)


def _tokens(vocabulary: Vocabulary, text: str) -> tuple[Int32[np.ndarray, " time"], Int32[np.ndarray, " time"]]:
    """The tokens of a text, and the byte at which each ends."""
    piece = (Segment(text),)
    (encoding,) = vocabulary.encode([piece])
    if not encoding.round_trips:
        start = (vocabulary.misspelled(piece, "student") or (text, ""))[0][:40]
        raise InputError(
            f"the tokenizer {vocabulary.name} does not spell the text that begins with {start!r} "
            "(it changes its Unicode, or lacks a byte): leave it out, or normalize it"
        )
    return encoding.ids, np.maximum.accumulate(encoding.ends)


def _stretches(ends: Int32[np.ndarray, " time"], size: int) -> list[tuple[slice, slice]]:
    """(tokens of the stretch before, tokens of the stretch) of all stretches of `size` bytes that end a token."""
    stop = int(ends[-1])
    cuts = [0, *np.searchsorted(ends, np.arange(size, stop, size), side="right").tolist(), len(ends)]
    cuts = list(dict.fromkeys(cuts))  # a token may be longer than a stretch
    return [(slice(cuts[max(n - 1, 0)], cuts[n]), slice(cuts[n], cuts[n + 1])) for n in range(len(cuts) - 1)]

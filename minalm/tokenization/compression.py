"""Fewer and longer patches for a Bolmo: which of the ends of a teacher's tokens stay ends of patches.

The predictor of a Bolmo learns the ends that are left. A curriculum raises the bytes per patch from step to step.
"""

from collections import Counter
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

Compression = Literal["none", "bpe", "space"]


def ratio_at(start: float, end: float, steps: int, done: int) -> float:
    """The bytes per patch that are wanted after `done` steps: from `start` straight to `end` within `steps`."""
    return start + (end - start) * min(1.0, done / max(steps, 1))


def kept_by_space(
    before_space: Bool[np.ndarray, " patch"], size: int, ratio: float, random: np.random.Generator
) -> Bool[np.ndarray, " patch"]:
    """Which patches keep their end so that `size` bytes have `ratio` bytes per patch: those in front of a space, and
    others by chance. Words are not joined: there may be fewer bytes per patch."""
    others = np.flatnonzero(~before_space[1:-1]) + 1  # bos is a patch of its own, and the last has no next one
    dropped = min(max(0, len(before_space) - int(size / ratio)), len(others))
    kept = np.ones(len(before_space), bool)
    kept[random.permutation(others)[:dropped]] = False
    return kept


def kept_by_pairs(
    ids: Int[np.ndarray, " patch"], size: int, ratio: float, random: np.random.Generator
) -> Bool[np.ndarray, " patch"]:
    """The same by byte-pair encoding of the row's own tokens: the most frequent pair of neighbours becomes one patch
    wherever it is, from the left; then the most frequent pair of what there is now. Of equally frequent pairs, one by
    chance. Stops where the ratio is reached, within the places of a pair too."""
    kept = np.ones(len(ids), bool)
    left = len(ids) - int(size / ratio)  # how many ends to drop
    symbols, ends = ids[1:].tolist(), list(range(1, len(ids)))  # bos is a patch of its own
    new = int(ids.max(initial=0)) + 1
    while left > 0 and len(symbols) > 1:
        counts = Counter(pairwise(symbols))
        most = max(counts.values())
        pairs = [pair for pair, count in counts.items() if count == most]
        chosen = pairs[random.integers(len(pairs))]
        joined, joined_ends, place = [], [], 0
        while place < len(symbols):
            if left > 0 and tuple(symbols[place : place + 2]) == chosen:
                kept[ends[place]] = False
                left -= 1
                place += 1
                joined.append(new)
            else:
                joined.append(symbols[place])
            joined_ends.append(ends[place])
            place += 1
        symbols, ends, new = joined, joined_ends, new + 1
    return kept

"""The order of pieces: a keyed permutation that needs no table."""

import numpy as np
from jaxtyping import Int64, Integer, UInt64


def permute(
    place: Integer[np.ndarray, " rows"], size: int, key: UInt64[np.ndarray, " rows"]
) -> Int64[np.ndarray, " rows"]:
    """Each row's `place`, permuted within range(`size`) by the permutation that its key selects. Same on every machine.

    A balanced Feistel network over the smallest even number of bits that can hold `size`, applied again until the
    value is below `size` (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(3, ((size - 1).bit_length() + 1) // 2))  # with fewer bits some orders are much likelier
    mask = (np.uint64(1) << half) - np.uint64(1)
    value = place.astype(np.uint64)
    outside = np.ones(len(value), bool)
    while outside.any():
        left, right, round_key = value[outside] >> half, value[outside] & mask, key[outside]
        for _ in range(8):
            round_key = mix(round_key)
            left, right = right, left ^ (mix(round_key ^ right) & mask)
        value[outside] = left << half | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


def mix(x: UInt64[np.ndarray, " rows"]) -> UInt64[np.ndarray, " rows"]:
    """The output of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

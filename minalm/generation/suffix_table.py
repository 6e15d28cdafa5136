"""The longest original token that ends at a byte, found on the device in time that depends on nothing.

The same function as tokenization/suffixes.py, which searches on the host. All original tokens are in a hash table with
two places for each (cuckoo hashing: Pagh and Rodler 2004), so each of the possible lengths takes two look-ups, all at
once. There is no state from byte to byte: what a position reads depends on the ids of the last `window` positions alone,
so a draft that is refused leaves nothing to undo.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, UInt32

from minalm.parallel.mesh import param
from minalm.tokenization.suffixes import LongestSuffix

LOAD = 0.4  # most of the table that is filled: with two places for each key, at half of it none are found any more
ROUNDS = 200  # of moving tokens to their other place, before other hash functions are tried


class SuffixTable(eqx.Module):
    """Made by `suffix_table`."""

    tokens: UInt32[Array | np.ndarray, "places key"] = param(None, None)  # bytes, the last one first, and their number
    originals: Int32[Array | np.ndarray, " places"] = param(None)  # original ids; 0 where there is no token
    factors: UInt32[Array | np.ndarray, "2 key"] = param(None, None)  # of the two hash functions
    special: Int32[Array | np.ndarray, " special"] = param(None)  # original id of each of the student's from 256 on

    @property
    def window(self) -> int:
        """The most bytes of a token that is found."""
        return 4 * (self.tokens.shape[1] - 1)

    def __call__(self, ids: Int[Array, "*rows window"]) -> Int32[Array, "*rows"]:
        """The original id for the last of each `window` of ids; before the text stands -1."""
        sizes, kept = np.arange(1, self.window + 1, dtype=np.int32), _kept(self.window)
        is_byte = (ids >= 0) & (ids < 256)
        run = jnp.sum(jnp.cumprod(is_byte[..., ::-1].astype(jnp.int32), axis=-1), axis=-1)  # since a special token
        newest_first = jnp.where(is_byte, ids, 0)[..., ::-1].astype(jnp.uint32)
        parts = newest_first.reshape(*run.shape, self.window // 4, 4) << jnp.arange(0, 32, 8, dtype=jnp.uint32)
        words = jnp.sum(parts, axis=-1, dtype=jnp.uint32)[..., None, :] & kept
        lengths = jnp.broadcast_to(sizes[:, None].astype(np.uint32), (*words.shape[:-1], 1))
        keys = jnp.concatenate([words, lengths], axis=-1)  # of all suffixes
        length, original = 0, 0
        for factors in self.factors:
            place = _place(jnp, keys, factors, len(self.originals))
            found = jnp.all(self.tokens[place] == keys, axis=-1) & (sizes <= run[..., None])
            # The longest is found last: both parts of one number would not fit in 32 bits.
            longest = jnp.max(jnp.where(found, sizes, 0), axis=-1)
            chosen = jnp.take_along_axis(place, jnp.maximum(longest - 1, 0)[..., None], axis=-1)[..., 0]
            original = jnp.where(longest > length, self.originals[chosen], original)
            length = jnp.maximum(longest, length)
        last = ids[..., -1]
        if not len(self.special):
            return original
        return jnp.where(last >= 256, self.special[jnp.maximum(last - 256, 0)], original)


def suffix_table(suffixes: LongestSuffix) -> SuffixTable:
    """The table of a search. Host only."""
    text = suffixes.length > 0
    letters = suffixes.keys[text].view(np.uint8).reshape(-1, suffixes.window)
    keys = np.concatenate(
        [letters.view("<u4").astype(np.uint32), suffixes.length[text, None].astype(np.uint32)], axis=1
    )
    places = 1 << int(np.ceil(np.log2(max(len(keys), 1) / LOAD)))
    random = np.random.default_rng(0)
    while True:
        factors = random.integers(1, 2**32, (2, keys.shape[1]), dtype=np.uint32) | np.uint32(1)
        owner = _settle(np.stack([_place(np, keys, each, places) for each in factors]), places)
        if owner is not None:
            break
    filled = owner >= 0
    tokens, originals = np.zeros((places, keys.shape[1]), np.uint32), np.zeros(places, np.int32)
    tokens[filled], originals[filled] = keys[owner[filled]], suffixes.original[text][owner[filled]]
    return SuffixTable(tokens, originals, factors, suffixes.special)


def _place(numpy, keys, factors, places):
    """The place of each key, by one of the hash functions: multiplications, and shifts that mix high bits into low."""
    mixed = keys * factors
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x2C1B3C6D)
    total = numpy.sum(mixed ^ (mixed >> 12), axis=-1, dtype=np.uint32)
    return ((total ^ (total >> 16)) & np.uint32(places - 1)).astype(np.int32)


def _settle(choices: Int[np.ndarray, "2 key"], places: int) -> Int[np.ndarray, " place"] | None:
    """Which key (or -1) stands in each place; None if none was found.

    All keys are put in their first place at once. Those that are pushed out move to their other place, and so on.
    """
    owner = np.full(places, -1)
    moving, choice = np.arange(choices.shape[1]), np.zeros(choices.shape[1], np.int64)
    for _ in range(ROUNDS):
        wanted = choices[choice[moving], moving]
        pushed_out = np.unique(owner[wanted])
        owner[wanted] = moving  # of several the last one stays
        moving = np.concatenate([moving[owner[wanted] != moving], pushed_out[pushed_out >= 0]])
        if not len(moving):
            return owner
        choice[moving] ^= 1
    return None


def _kept(window: int) -> UInt32[np.ndarray, "size word"]:
    """Which bits of a key's words are those of its bytes, for each number of bytes."""
    kept = np.arange(window) < np.arange(1, window + 1)[:, None]
    return np.where(kept, np.uint8(255), np.uint8(0)).view("<u4").astype(np.uint32)

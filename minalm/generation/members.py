"""What the members of an ensemble have in common: the entries over which their distributions are combined."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from minalm.errors import InputError
from minalm.tokenization.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class SharedEntries:
    """The entries that all members have: their tokens of text, and as the last one "the end".

    Members of different families have special tokens of their own, which mean nothing to the others: they are left out.
    But all of them end what they write, each by its own stop ids. Their probabilities are added up.
    """

    text: Int[np.ndarray, " entry"]  # ids, the same in all members
    ends: tuple[tuple[int, ...], ...]  # of each member

    def of_member(self, number: int, logits: Float32[Array, "batch vocab"]) -> Float32[Array, "batch entry"]:
        """A member's logits of the shared entries."""
        end = jax.nn.logsumexp(logits[:, np.array(self.ends[number])], axis=-1, keepdims=True)
        return jnp.concatenate([logits[:, self.text], end], axis=-1)

    def ids(self, number: int) -> Int[np.ndarray, " entry"]:
        """The entries as a member's ids."""
        return np.append(self.text, self.ends[number][0]).astype(np.int32)


def shared_entries(vocabularies: Sequence[Vocabulary]) -> SharedEntries | None:
    """None where all vocabularies are the same, and nothing is left out. Raises InputError where their texts are not
    written in the same tokens."""
    first, *others = vocabularies
    for other in others:
        if _text(other) != _text(first):
            raise InputError(
                f"{other.name} writes text in other tokens than {first.name}: an ensemble needs models of one vocabulary, "
                "so put all of them on bytes, or on the same tokenizer"
            )
    if all((other.token_bytes, dict(other.special)) == (first.token_bytes, dict(first.special)) for other in others):
        return None
    for vocabulary in vocabularies:
        if not vocabulary.stop_ids:
            raise InputError(f"{vocabulary.name} has no token that ends a text, which the others could share")
    text = np.array(sorted(_text(first)), np.int32)
    return SharedEntries(text, tuple(tuple(vocabulary.stop_ids) for vocabulary in vocabularies))


def _text(vocabulary: Vocabulary) -> dict[int, bytes]:
    special = set(vocabulary.special.values())
    return {i: token for i, token in enumerate(vocabulary.token_bytes) if token and i not in special}

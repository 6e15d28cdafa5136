"""What several models can all write, so that they can be combined at each step."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from minalm.errors import InputError
from minalm.huggingface.loaded import LoadedModel
from minalm.tokenization.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class SharedVocabulary:
    """The outcomes of a step that all members of an ensemble have.

    Of members with one and the same vocabulary they are its ids. Where only the ids of text are the same (byte students
    of different families: 0 to 255), they are the `text_ids` in their order, and last the end: any of the special
    tokens that end what a member generates.
    """

    size: int  # outcomes
    text_ids: Int[np.ndarray, " text"]  # of every member
    stop_ids: tuple[tuple[int, ...], ...] | None  # of each member; None: the vocabularies are the same

    @property
    def end(self) -> int | None:
        """The outcome that ends a text where the members' special tokens differ."""
        return None if self.stop_ids is None else self.size - 1

    def outcomes(self, logits: Float[Array, "*rows vocab"], member: int) -> Float32[Array, "*rows outcome"]:
        """A member's logits of the outcomes; its table may have rows past its vocabulary. Special tokens that are no
        outcome are left out, so that what remains is the member's distribution given that it writes none of them."""
        logits = logits.astype(jnp.float32)
        if self.stop_ids is None:
            return logits[..., : self.size]
        text, stops = logits[..., self.text_ids], self.stop_ids[member]
        if not stops:
            end = jnp.full_like(text[..., :1], -jnp.inf)
        else:
            end = jax.nn.logsumexp(logits[..., np.array(stops)], axis=-1, keepdims=True)
        return jnp.concatenate([text, end], axis=-1)


def text_ids(vocabulary: Vocabulary) -> Int[np.ndarray, " text"]:
    """The ids that spell text, in their order."""
    special = {*vocabulary.special.values()}
    return np.array([i for i, token in enumerate(vocabulary.token_bytes) if token and i not in special], np.int32)


def shared_vocabulary(models: Sequence[LoadedModel]) -> SharedVocabulary:
    """What all of the models can write. Raises InputError unless every id of text spells the same bytes in each."""
    first, *others = (model.vocabulary for model in models)
    ids = text_ids(first)
    for other in others:
        theirs = text_ids(other)
        same = np.array_equal(ids, theirs)
        if not same or any(first.token_bytes[i] != other.token_bytes[i] for i in ids.tolist()):
            raise InputError(
                f"{first.name} and {other.name} do not share a vocabulary ({describe(first)}; {describe(other)}): "
                "combine models of one tokenizer, or put them on bytes with train.py"
            )
    if all(first.token_bytes == other.token_bytes and first.special == other.special for other in others):
        return SharedVocabulary(first.size, ids, None)
    stops = tuple(tuple(vocabulary.stop_ids) for vocabulary in (first, *others))
    return SharedVocabulary(len(ids) + 1, ids, stops)


def describe(vocabulary: Vocabulary) -> str:
    """A few words on a vocabulary, for messages."""
    kind = "bytes" if vocabulary.tokenizer is None else "subwords"
    return f"{kind}, {len(text_ids(vocabulary)):,} tokens of text"

"""How a student goes on with held-out text."""

import jax.numpy as jnp
from jax.sharding import Mesh

from minalm.batches import Side
from minalm.models.generate import generate
from minalm.models.head import VocabularyMask
from minalm.models.transformer import Transformer
from minalm.text.corpus import Corpus
from minalm.text.documents import Segment, Special

PROMPT_CHARACTERS, NEW_TOKENS, TEMPERATURE = 120, 160, 0.5


def continue_texts(
    model: Transformer,
    mask: VocabularyMask,
    side: Side,
    held_out: Corpus,
    count: int,
    mesh: Mesh,
    dtype: jnp.dtype,
    seed: int,
) -> list[tuple[str, str]]:
    """(prompt, continuation) pairs: the first characters of held-out pieces, and what the model writes after them."""
    pieces = held_out.batch(1, 0, count)
    texts = [[part.content for part in piece if isinstance(part.content, str)] for piece in pieces]
    prompts = ["".join(parts)[:PROMPT_CHARACTERS] or "\n" for parts in texts]
    vocabulary = side.vocabulary
    encodings = vocabulary.encode([(Segment(Special("bos")), Segment(prompt)) for prompt in prompts])
    continued = generate(
        model,
        mask,
        side.suffixes,
        [encoding.ids for encoding in encodings],
        new_tokens=NEW_TOKENS,
        stop=vocabulary.eos_id,
        mesh=mesh,
        dtype=dtype,
        temperature=TEMPERATURE,
        seed=seed,
    )
    return [(prompt, vocabulary.decode(ids)) for prompt, ids in zip(prompts, continued, strict=True)]

"""How a student goes on with held-out text."""

import jax.numpy as jnp
from jax.sharding import Mesh

from minalm.batches import Side
from minalm.generation.kinds import generator_of
from minalm.generation.sampling import SamplingConfig
from minalm.huggingface.loaded import LoadedModel
from minalm.models.head import VocabularyMask
from minalm.models.transformer import Transformer
from minalm.text.corpus import Corpus
from minalm.text.documents import Piece, Segment, Special

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
    prompts = [beginning(piece) for piece in held_out.batch(1, 0, count)]
    vocabulary = side.vocabulary
    encodings = vocabulary.encode(prompts)
    generator = generator_of([LoadedModel(model, vocabulary, side.suffixes, mask)], mesh, dtype)
    continued = generator.generate(
        [encoding.ids for encoding in encodings],
        SamplingConfig(TEMPERATURE),
        max_tokens=NEW_TOKENS,
        stop_ids=[] if vocabulary.eos_id is None else [vocabulary.eos_id],
        seed=seed,
    )
    texts = ["".join(content for content, _ in prompt if isinstance(content, str)) for prompt in prompts]
    return [(text, vocabulary.decode(ids)) for text, ids in zip(texts, continued, strict=True)]


def beginning(piece: Piece) -> Piece:
    """A piece up to PROMPT_CHARACTERS of its text, without what stands behind the text; of one without text, a line
    break."""
    prompt, kept, left = [], 0, PROMPT_CHARACTERS
    for segment in piece:
        if isinstance(segment.content, str) and left:
            segment = segment._replace(content=segment.content[:left])
            left -= len(segment.content)
            kept = len(prompt) + 1 if segment.content else kept
        prompt.append(segment)
    return tuple(prompt[:kept]) or (Segment(Special("bos")), Segment("\n"))

"""How probable texts are to a Bolmo. Requests and scores are those of scoring.py.

A text has a probability for each way of cutting it into patches, and there are too many of these to add up. Two numbers
can be had:

* `causal`: the bytes are read one by one. Each costs the probability of its two ids together, the one that ends a patch
  and the one that does not; then the decoder says, by the larger of the two, whether it does. Nothing is known of what
  comes behind, so these are the log-likelihoods of a model of bytes: the one that cuts its patches like this, as in
  generation. Of the context, the encoder's predictor says where patches end, again as in generation.
* `two-sided`: all bytes are read at once, and the predictor says where patches end in the continuation too. It looks one
  byte ahead, at the very byte that is to be predicted, and what that tells is not paid for. So this is no likelihood, and
  mostly too high; but it takes a small part of the time.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int

from minalm.errors import InputError
from minalm.evaluation.scoring import FEWEST, SHORTEST, Request, Score, padded
from minalm.generation.bolmo import BolmoGenerator, BolmoSession, decoder_reads, head
from minalm.generation.bolmo_decoder import BolmoDecoder
from minalm.generation.engine import placed, power_of_two
from minalm.huggingface.loaded import LoadedModel
from minalm.parallel.mesh import shardings

Likelihood = Literal["causal", "two-sided"]
SAID = (
    "log-likelihoods are two-sided: where patches end was predicted from the byte that follows, which was not paid for, so "
    "they are mostly too high; --likelihood causal has proper ones"
)


class BolmoScorer:
    """A Bolmo on a mesh, which scores. In the place of a `Scorer`."""

    def __init__(
        self, loaded: LoadedModel, mesh: Mesh, dtype: jnp.dtype, batch_size: int = 8, likelihood: Likelihood = "causal"
    ) -> None:
        """`batch_size`: rows that are read at once, rounded up to what the mesh divides. Raises InputError as
        `BolmoGenerator` does."""
        if batch_size < 1:
            raise InputError(f"--batch-size is {batch_size}: it must be at least 1")
        self.models, self.longest, self.cut, self.likelihood = (loaded,), None, 0, likelihood
        self.batch_size = batch_size + -batch_size % mesh.shape["fsdp"]
        self.generator = BolmoGenerator(loaded, mesh, dtype)
        self._two_sided = jax.jit(self._whole, static_argnums=6, out_shardings=shardings(P(), mesh))

    def __call__(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Score]:
        """The scores of requests, in their order. `progress` hears after each batch how many more requests are done.
        Raises InputError for an empty continuation."""
        for request in requests:
            if not len(request.continuation):
                raise InputError("there is nothing to score in an empty continuation: give a text")
        # Rows of a batch should end together: in stepping the longest continuation counts, else the longest text.
        size = [
            (len(request.continuation), len(request.contexts[0]))
            if self.likelihood == "causal"
            else (len(request.contexts[0]) + len(request.continuation), 0)
            for request in requests
        ]
        order = sorted(range(len(requests)), key=lambda number: size[number], reverse=True)
        scores: list[Score | None] = [None] * len(requests)
        score = self._causal if self.likelihood == "causal" else self._at_once
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            for number, found in zip(numbers, score([requests[number] for number in numbers]), strict=True):
                scores[number] = Score(*found)
            if progress is not None:
                progress(len(numbers))
        return scores

    def _causal(self, requests):
        session = BolmoSession(self.generator, [request.contexts[0] for request in requests])
        return session.score([request.continuation for request in requests])

    def _at_once(self, requests):
        generator, mesh = self.generator, self.generator.mesh
        texts = [np.append(request.contexts[0], request.continuation).astype(np.int32) for request in requests]
        counts = [len(request.continuation) for request in requests]
        height = power_of_two(len(texts))
        height += -height % mesh.shape["fsdp"]
        ids = np.zeros((height, padded(max(map(len, texts)), SHORTEST)), np.int32)
        places = np.zeros((height, padded(max(counts), FEWEST)), np.int32)
        length = np.ones(height, np.int32)
        for number, (text, count) in enumerate(zip(texts, counts)):
            ids[number, : len(text)], length[number] = text, len(text)
            places[number, :count] = np.arange(len(text) - count - 1, len(text) - 1)
        targets = np.take_along_axis(ids, np.minimum(places + 1, ids.shape[1] - 1), axis=1)
        arrays = [placed(each, generator.rows) for each in (ids, generator.suffixes(ids), length)]
        h, _, ends = generator._encode(generator.decoder, *arrays)
        slots = power_of_two(int(np.asarray(jax.device_get(ends)).sum(axis=1).max()))
        picked = [placed(each, generator.rows) for each in (places, targets)]
        found = self._two_sided(generator.decoder, h, ends, arrays[2], *picked, slots)
        logp, greedy = (np.asarray(each) for each in jax.device_get(found))
        return [(logp[number, :count], greedy[number, :count]) for number, count in enumerate(counts)]

    def _whole(
        self,
        decoder: BolmoDecoder,
        h: Float[Array, "row time embed"],
        ends: Bool[Array, "row time"],
        length: Int[Array, " row"],
        places: Int[Array, "row slot"],
        targets: Int[Array, "row slot"],
        slots: int,
    ) -> tuple[Float32[Array, "row slot"], Bool[Array, "row slot"]]:
        """(log p of the targets, whether they are the most probable) of texts that are read at once."""
        generator = self.generator
        present = jnp.arange(h.shape[1]) < length[:, None] - 1
        x, _ = decoder_reads(generator, decoder, generator.empty(len(h), slots), h, ends, present, slots)
        logits = head(generator, decoder, jnp.take_along_axis(x, places[..., None], axis=1))
        both = jax.nn.log_softmax(logits, axis=-1).reshape(*places.shape, 2, generator.size)
        either = jnp.logaddexp(both[..., 0, :], both[..., 1, :])
        logp = jnp.take_along_axis(either, targets[..., None], axis=-1)[..., 0]
        return logp, jnp.argmax(either, axis=-1) == targets

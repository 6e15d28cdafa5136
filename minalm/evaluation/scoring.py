"""How probable texts are to a model, or to an ensemble: log-likelihoods of continuations of given contexts.

Rows are read whole, padded at their ends to one of a few sizes, so that few programs are compiled. Only the positions
that predict a continuation reach the head, and it takes them in blocks: no array has both a time axis and a vocabulary
axis of more than BLOCK_ELEMENTS numbers. Requests that read the same tokens (the letters of a multiple choice) share a
row. No row depends on another, so results are those of each request alone, up to rounding in float32.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int, Integer

from minalm.errors import InputError
from minalm.generation.members import shared_entries
from minalm.huggingface.loaded import LoadedModel
from minalm.models.config import LongRopeScaling
from minalm.models.ensemble import Mean, combine, normalized_weights
from minalm.models.head import VocabularyMask, block_logits
from minalm.models.transformer import Transformer, pick
from minalm.parallel.collectives import gather_channels
from minalm.parallel.mesh import ROWS, shard, shard_map, shard_rows, specs
from minalm.tokenization.vocabulary import Vocabulary
from minalm.types import Tokens

BLOCK_ELEMENTS = 2**24  # logits of one block, of one model: 64 MiB in float32
SHORTEST = 32  # inputs of a padded row
FEWEST = 4  # scored positions of a padded row


class Request(NamedTuple):
    """What is to be scored. Each member of an ensemble reads the context in its own way (its own special tokens)."""

    contexts: tuple[Integer[np.ndarray, " _"], ...]  # of each model, not empty
    continuation: Integer[np.ndarray, " time"]  # ids that the models share


class Score(NamedTuple):
    """What a model says of a continuation, token by token."""

    logp: Float32[np.ndarray, " time"]  # natural logarithms
    greedy: Bool[np.ndarray, " time"]  # whether the token is the most probable one


class Scorer:
    """Models on a mesh, with the programs that score: one model, or several as one."""

    def __init__(
        self,
        models: Sequence[LoadedModel],
        mesh: Mesh,
        dtype: jnp.dtype,
        weights: Sequence[float] | None = None,
        mean: Mean = "probability",
        batch_size: int = 8,
        longest: int | None = None,
    ) -> None:
        """`longest`: inputs that a row may have; None: as many as it needs. `batch_size`: rows that are read at once,
        rounded up to what the mesh divides.

        Raises InputError if the models share no vocabulary, for weights that fit no models, or if the mesh does not
        divide a model.
        """
        if batch_size < 1:
            raise InputError(f"--batch-size is {batch_size}: it must be at least 1")
        self.models, self.mesh, self.longest = tuple(models), mesh, longest
        self.batch_size = batch_size + -batch_size % mesh.shape["fsdp"]
        self.cut = 0  # requests whose context was cut so far
        # With LongRoPE, what a position means depends on whether the whole array is longer than the original length.
        ropes = [rope for each in models for rope in each.model.config.ropes if rope is not None]
        scalings = [rope.scaling for rope in ropes if isinstance(rope.scaling, LongRopeScaling)]
        self._limits = sorted({scaling.original_length for scaling in scalings})
        self._arrays = tuple((shard(each.model, mesh, dtype), shard(each.mask, mesh)) for each in models)
        vocabularies = [each.vocabulary for each in models]
        shared = shared_entries(vocabularies) if len(models) > 1 else None
        size = min(each.model.config.vocab_size for each in models)  # of tables, some of which may be padded
        ids = np.arange(size) if shared is None else shared.text
        self._entry = np.full(max(size, *(each.size for each in vocabularies)), -1, np.int32)  # of each id
        self._entry[ids] = np.arange(len(ids))
        settings = {"weights": normalized_weights(weights, len(models)), "mean": mean, "dtype": dtype}
        self._program = jax.jit(functools.partial(_scores, shared=shared, size=size, mesh=mesh, **settings))

    def __call__(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Score]:
        """The scores of requests, in their order. `progress` hears after each batch how many more requests are done.

        A context that is too long for `longest` loses its beginning, which `cut` counts. Raises InputError for a
        continuation that alone is too long, or that holds what the models do not share.
        """
        scores: list[Score | None] = [None] * len(requests)
        for batch in self._batches(self._rows(requests)):
            logp, greedy = self._read(batch)
            for place, row in enumerate(batch):
                for number, slots in row.slots:
                    scores[number] = Score(logp[place, slots], greedy[place, slots])
            if progress is not None:
                progress(sum(len(row.slots) for row in batch))
        return scores

    def _rows(self, requests: Sequence[Request]) -> list["_Row"]:
        """Requests with the same inputs together; the longest first, so that a batch too large for the memory fails at
        once."""
        rows: dict[tuple[bytes, ...], _Row] = {}
        for number, request in enumerate(requests):
            if len(request.contexts) != len(self.models) or min(map(len, request.contexts)) == 0:
                raise ValueError("a request has one context for each model, of at least one token")
            continuation = np.asarray(request.continuation, np.int32)
            count = len(continuation)
            if count == 0:
                raise InputError("there is nothing to score in an empty continuation: give a text")
            targets = self._entry[continuation]
            if (targets < 0).any():
                raise InputError("a continuation holds a special token, which members of an ensemble do not share")
            if self.longest is not None and count > self.longest:
                raise InputError(
                    f"a continuation of {count} tokens is longer than the {self.longest} that the model reads: "
                    "score it in parts (loglikelihood_rolling)"
                )
            inputs = [np.append(context, continuation[:-1]).astype(np.int32) for context in request.contexts]
            if self.longest is not None and max(map(len, inputs)) > self.longest:
                self.cut += 1
                inputs = [ids[-self.longest :] for ids in inputs]
            key = tuple(ids.tobytes() for ids in inputs)
            row = rows.setdefault(key, _Row(tuple(inputs), [], [], []))
            first = len(row.targets)
            row.back.extend(range(count - 1, -1, -1))
            row.targets.extend(targets.tolist())
            row.slots.append((number, slice(first, first + count)))
        return sorted(rows.values(), key=lambda row: (-row.length, -len(row.targets)))

    def _batches(self, rows: Sequence["_Row"]) -> Iterator[Sequence["_Row"]]:
        """Rows that are read together, never on both sides of one of `limits`."""
        for _, alike in itertools.groupby(rows, lambda row: [row.length > limit for limit in self._limits]):
            group = list(alike)
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _read(self, rows: Sequence["_Row"]) -> tuple[Float32[np.ndarray, "row slot"], Bool[np.ndarray, "row slot"]]:
        time = padded(longest := max(row.length for row in rows), SHORTEST)
        time = min([time, *(limit for limit in self._limits if limit >= longest)])
        count = padded(max(len(row.targets) for row in rows), FEWEST)
        height = min(self.batch_size, 1 << (len(rows) - 1).bit_length())  # of the last batch, which may be a small one
        height += -height % self.mesh.shape["fsdp"]
        targets = np.zeros((height, count), np.int32)
        members = []
        for number, model in enumerate(self.models):
            inputs = np.zeros((height, time), np.int32)
            places = np.zeros((height, count), np.int32)
            for place, row in enumerate(rows):
                ids = row.inputs[number]
                inputs[place, : len(ids)] = ids
                places[place, : len(row.back)] = len(ids) - 1 - np.array(row.back)
                targets[place, : len(row.targets)] = row.targets
            suffix = None if model.suffixes is None else model.suffixes(inputs)
            members.append(_Member(inputs, suffix, places))
        found = self._program(self._arrays, shard_rows((tuple(members), targets), self.mesh))
        return tuple(map(np.asarray, jax.device_get(found)))


class _Row(NamedTuple):
    """Inputs to read once, and all that is asked of them."""

    inputs: tuple[Integer[np.ndarray, " _"], ...]  # of each model
    back: list[int]  # for each slot, how many inputs before the last one it lies
    targets: list[int]  # for each slot, the entry that is asked for
    slots: list[tuple[int, slice]]  # of each request of this row, its number and its slots

    @property
    def length(self) -> int:
        return max(map(len, self.inputs))


class _Member(NamedTuple):
    """A batch for one model."""

    inputs: Int[Array | np.ndarray, "row time"]
    suffix: Int[Array | np.ndarray, "row time"] | None
    places: Int[Array | np.ndarray, "row slot"]


def first_id(vocabulary: Vocabulary) -> int:
    """What stands before a text that has nothing before it: bos, and where there is none eos, as the harness' `hf`
    model does it. A bos that opens a chat's messages too (SmolLM2's) counts. Raises InputError if there is neither."""
    template = vocabulary.chat_template
    names = {**(template.names if template is not None else {}), **vocabulary.names}
    for name in ("bos_token", "eos_token"):
        if names.get(name) in vocabulary.special:
            return vocabulary.special[names[name]]
    raise InputError(f"{vocabulary.name} has neither bos_token nor eos_token: name one in tokenizer_config.json")


def padded(size: int, least: int) -> int:
    """The least of `least` times 1, 1.5, 2, 3, 4, 6, 8, ... that is at least `size`."""
    power = least << max(0, math.ceil(math.log2(size / least)))
    return power * 3 // 4 if size <= power * 3 // 4 and power > least else power


def _scores(arrays, batch, shared, size, mesh, weights, mean, dtype):
    """(log p of the targets, whether they are the most probable), [row, slot]."""
    members, targets = batch
    rows, slots = targets.shape
    widest = max(model.config.vocab_size for model, _ in arrays)
    at_once = max(1, min(slots, BLOCK_ELEMENTS // (rows * widest)))
    blocks = -(-slots // at_once)

    def in_blocks(x):
        x = jnp.pad(x, ((0, 0), (0, blocks * at_once - slots), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(rows, blocks, at_once, *x.shape[2:]), 1, 0)

    states = [_states(model, member, mesh, dtype) for (model, _), member in zip(arrays, members, strict=True)]

    def of_block(block):
        *hidden, targets = block
        logits = [_logits(model, mask, each, mesh, dtype) for (model, mask), each in zip(arrays, hidden, strict=True)]
        if shared is None:
            logits = [each[:, :size] for each in logits]
        else:
            logits = [shared.of_member(number, each) for number, each in enumerate(logits)]
        logp = combine(logits, weights, mean)
        flat = targets.reshape(-1)
        found = jnp.take_along_axis(logp, flat[:, None], axis=-1)[:, 0], jnp.argmax(logp, axis=-1) == flat
        return tuple(each.reshape(targets.shape) for each in found)

    outputs = jax.lax.map(of_block, tuple(map(in_blocks, (*states, targets))))
    return tuple(jnp.moveaxis(each, 0, 1).reshape(rows, -1)[:, :slots] for each in outputs)


def _states(model: Transformer, member: _Member, mesh: Mesh, dtype: jnp.dtype) -> Float[Array, "row slot embed"]:
    """What the head reads at the places."""

    def read(model, member):
        tokens = Tokens(member.inputs, member.inputs, jnp.zeros(member.inputs.shape), member.suffix)
        x = model.last_layer(model.trunk(tokens, dtype)).x
        return model.before_head(model.final_norm(pick(x, member.places)))

    layout = specs(model, mesh), jax.tree.map(lambda _: ROWS, member)
    return shard_map(read, mesh, in_specs=layout, out_specs=ROWS)(model, member)


def _logits(
    model: Transformer, mask: VocabularyMask, hidden: Float[Array, "row slot embed"], mesh: Mesh, dtype: jnp.dtype
) -> Float32[Array, "row_x_slot vocab"]:
    """Logits of all entries, of one row after the other; -inf where no entry exists."""

    def head(model, mask, hidden):
        table = gather_channels(model.unembedding, dtype)
        return block_logits(hidden.reshape(-1, hidden.shape[-1]), table, mask.exists, model.config.final_softcap)

    layout = *specs((model, mask), mesh), ROWS
    return shard_map(head, mesh, in_specs=layout, out_specs=P("fsdp", "tp"))(model, mask, hidden)

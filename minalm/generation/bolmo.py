"""Generation with a Bolmo: bytes are read and written one by one, and the subword model steps only where a patch ends.

Rows come to the ends of their patches at different times. A row that has come to one waits, until at least half of the
rows that still write wait too; then the subword model takes one step for these. If it stepped for each row as it comes, it
would read its weights for nearly every byte of a large batch; if it waited for the last row, all others would stand still.
With patches whose lengths are geometrically distributed, half of the rows costs little more than the better of both,
whether the subword model's step takes as long as one of the byte parts or many times as long. No row depends on another.

Where a patch ends: in a prompt, the encoder's predictor says it, which looks one byte ahead; of the prompt's last byte,
behind which there is nothing yet, the decoder does, by which of the byte's two ids it finds more probable. In what is
written the decoder has chosen the ids, and with them the ends of patches: the predictor is not asked.
"""

import functools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

from minalm.errors import InputError
from minalm.generation import bolmo_decoder
from minalm.generation.bolmo_decoder import BolmoDecoder, Memory
from minalm.generation.decoder import Cache
from minalm.generation.engine import MOST_STEPS, Generator, placed, power_of_two
from minalm.generation.sampling import Sampling, adjusted, choose
from minalm.generation.suffix_table import SuffixTable, suffix_table
from minalm.huggingface.loaded import LoadedModel
from minalm.models.config import LongRopeScaling
from minalm.parallel.mesh import ROWS, layouts, param, shard, shard_map, shardings

FEWEST_PATCHES = 64  # of the smallest cache
SHORTEST = 32  # bytes of a padded prompt
PIECE = 128  # patches of a prompt that the subword model reads at once


class State(eqx.Module):
    """Rows in the making."""

    encoder: tuple[Memory, ...]
    decoder: tuple[Memory, ...]
    caches: tuple[Cache, ...]
    recent: Int[Array, "batch window"] = param("fsdp", None)  # the newest bytes that were read; -1 before a text
    length: Int[Array, " batch"] = param("fsdp")  # bytes that were read
    patches: Int[Array, " batch"] = param("fsdp")  # patches that the subword model has read
    h: Float[Array, "batch embed"] = param("fsdp", None)  # what the encoder makes of the newest byte
    patch: Float[Array, "batch embed"] = param("fsdp", None)  # what the decoder reads of the newest patch
    seen: Bool[Array, "batch byte"] = param("fsdp", None)  # bytes that have occurred
    pending: Int[Array, " batch"] = param("fsdp")  # the id to be read next, of either half; -1: none
    waiting: Bool[Array, " batch"] = param("fsdp")  # the newest byte has ended a patch, which is not read yet
    ready: Bool[Array, " batch"] = param("fsdp")  # all is read: the decoder may say what comes next


class BolmoGenerator(Generator):
    """A Bolmo on a mesh, with its compiled programs. `Generator.generate` is the loop around it."""

    def __init__(self, loaded: LoadedModel, mesh: Mesh, dtype: jnp.dtype) -> None:
        """Lays the model out. Raises InputError for a trunk whose rotary embedding depends on the length of a text."""
        config = loaded.model.config
        if any(rope is not None and isinstance(rope.scaling, LongRopeScaling) for rope in config.blocks.ropes):
            raise InputError("the trunk has LongRoPE, with which a Bolmo cannot be read step by step: use another one")
        there = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.model))  # in training, it is
        model = loaded.model if there else shard(loaded.model, mesh, dtype)
        mask = loaded.mask if there else shard(loaded.mask, mesh)
        self.decoder: BolmoDecoder = bolmo_decoder.lay_out(model, mask, mesh, dtype)
        self.table: SuffixTable = shard(suffix_table(loaded.suffixes), mesh)
        self.suffixes, self.mesh, self.dtype = loaded.suffixes, mesh, dtype
        self.vocabularies, self.shared, self.members = [loaded.vocabulary], None, (self.decoder,)
        self.size = config.vocab_size
        state = jax.eval_shape(lambda: self.empty(1, 1))
        memory, state, whole = (shardings(each, mesh) for each in (layouts(state.encoder), layouts(state), P()))
        self.rows = shardings(ROWS, mesh)
        self._empty = jax.jit(self.empty, static_argnums=(0, 1), out_shardings=state)
        self._encode = jax.jit(functools.partial(encode, self), out_shardings=(self.rows, memory, whole))
        self._prefill = jax.jit(
            functools.partial(prefill, self), static_argnums=4, donate_argnums=1, out_shardings=state
        )
        self._advance = jax.jit(functools.partial(advance, self), donate_argnums=2, out_shardings=(state, whole, whole))
        self._score = jax.jit(functools.partial(score, self), donate_argnums=2, out_shardings=(state, whole, whole))
        self._grow = jax.jit(self._grown, static_argnums=1, out_shardings=state)

    def empty(self, batch: int, capacity: int) -> State:
        """So many rows that have read nothing, with room for so many patches."""
        config, blocks = self.decoder.config, self.decoder.config.blocks
        heads = batch, max(blocks.kv_heads, self.mesh.shape["tp"])
        cache = Cache(
            jnp.zeros((*heads, blocks.head_dim, capacity), self.dtype),
            jnp.zeros((*heads, capacity, blocks.head_dim), self.dtype),
        )
        row, vector = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, config.embed), self.dtype)
        return State(
            encoder=bolmo_decoder.no_memory(config, batch, config.encoder_layers),
            decoder=bolmo_decoder.no_memory(config, batch, config.decoder_layers),
            caches=(cache,) * blocks.layers,
            recent=jnp.full((batch, self.table.window), -1, jnp.int32),
            length=row,
            patches=row,
            h=vector,
            patch=vector,
            seen=jnp.zeros((batch, config.vocab_size), bool),
            pending=row - 1,
            waiting=row > 0,
            ready=row > 0,
        )

    def _grown(self, state: State, capacity: int) -> State:
        def longer(array, axis):
            pads = [(0, capacity - size if n == axis else 0) for n, size in enumerate(array.shape)]
            return jnp.pad(array, pads)

        caches = tuple(Cache(longer(cache.k, 3), longer(cache.v, 2)) for cache in state.caches)
        return eqx.tree_at(lambda s: s.caches, state, caches)

    def session(self, rows: Sequence[Sequence[Int[np.ndarray, " _"]]], expected: int) -> "BolmoSession":
        """The rows on the device, read up to their last byte."""
        return BolmoSession(self, [row[0] for row in rows])

    def compiled(self) -> int:
        """How many programs have been compiled."""
        programs = self._empty, self._encode, self._prefill, self._advance, self._score, self._grow
        return sum(program._cache_size() for program in programs)


class BolmoSession:
    """Some rows on the device, whose prompts have been read."""

    def __init__(self, generator: BolmoGenerator, prompts: Sequence[Int[np.ndarray, " _"]]) -> None:
        self.generator, self.rows = generator, len(prompts)
        batch = power_of_two(len(prompts))
        self.batch = batch + -batch % generator.mesh.shape["fsdp"]
        time = max(SHORTEST, power_of_two(max(map(len, prompts))))
        ids, length = np.zeros((self.batch, time), np.int32), np.ones(self.batch, np.int32)
        for number, prompt in enumerate(prompts):
            ids[number, : len(prompt)], length[number] = prompt, len(prompt)
        ids, suffix, length = (placed(each, generator.rows) for each in (ids, generator.suffixes(ids), length))
        h, memories, ends = generator._encode(generator.decoder, ids, suffix, length)
        most = int(np.asarray(jax.device_get(ends)).sum(axis=1).max()) + 1
        self.most = most  # patches of any row
        self.capacity = max(FEWEST_PATCHES, power_of_two(most + MOST_STEPS))
        slots = power_of_two(max(most, 1))
        state = generator._empty(self.batch, self.capacity)
        self.state = generator._prefill(generator.decoder, state, (h, memories, ids, length), ends, slots)

    def room(self) -> int:
        """Bytes that can be written before some row has to be read anew: there is no such limit."""
        return 2**30

    def advance(
        self,
        steps: int,
        done: Bool[np.ndarray, " row"],
        sampling: Sampling,
        seed: np.uint32,
        stops: Int[np.ndarray, " stops"],
    ) -> list[Int[np.ndarray, " _"]]:
        """Up to `steps` new bytes of each row."""
        steps = min(steps, MOST_STEPS)
        self.make_room(steps)
        everyone = np.concatenate([done, np.ones(self.batch - self.rows, bool)])
        generator = self.generator
        arguments = np.int32(steps), everyone, sampling, seed, stops
        self.state, ids, made = generator._advance(generator.decoder, generator.table, self.state, *arguments)
        ids, made = jax.device_get((ids, made))
        self.most += steps
        return [row[:count] % generator.size for row, count in zip(ids[: self.rows], made)]

    def score(
        self, continuations: Sequence[Int[np.ndarray, " _"]]
    ) -> list[tuple[Float32[np.ndarray, " _"], Bool[np.ndarray, " _"]]]:
        """Of each row's next bytes, log p and whether each is the most probable. Where patches end the decoder says, by
        which id of a byte it finds more probable, and knows nothing of what comes behind the byte."""
        generator, parts = self.generator, [[] for _ in continuations]
        for start in range(0, max(map(len, continuations)), MOST_STEPS):
            self.make_room(MOST_STEPS)
            ids = np.full((self.batch, MOST_STEPS), -1, np.int32)
            for number, row in enumerate(continuations):
                piece = row[start : start + MOST_STEPS]
                ids[number, : len(piece)] = piece
            self.state, *found = generator._score(
                generator.decoder, generator.table, self.state, placed(ids, generator.rows)
            )
            logp, greedy = jax.device_get(found)
            for number, row in enumerate(continuations):
                count = max(0, min(len(row) - start, MOST_STEPS))
                parts[number].append((np.asarray(logp)[number, :count], np.asarray(greedy)[number, :count]))
            self.most += MOST_STEPS
        return [tuple(np.concatenate(each) for each in zip(*row)) for row in parts]

    def make_room(self, patches: int) -> None:
        """Lets the cache grow until so many more patches can be read."""
        if self.most + patches > self.capacity:
            self.capacity = power_of_two(self.most + patches)
            self.state = self.generator._grow(self.state, self.capacity)


def encode(
    generator: BolmoGenerator,
    decoder: BolmoDecoder,
    ids: Int[Array, "batch time"],
    suffix: Int[Array, "batch time"],
    length: Int[Array, " batch"],
) -> tuple[Float[Array, "batch time embed"], tuple[Memory, ...], Bool[Array, "batch time"]]:
    """Prompts, padded at their ends: what the encoder makes of each byte, its memories behind the last ones, and where
    patches end before the last byte."""
    config = decoder.config
    memories = bolmo_decoder.no_memory(config, len(ids), config.encoder_layers)

    def read(decoder, ids, suffix, length, memories):
        place = jnp.arange(ids.shape[1])
        h, memories = bolmo_decoder.encode(decoder, ids, suffix, memories, place < length[:, None])
        return h, memories, bolmo_decoder.predicted(decoder, h) & (place < length[:, None] - 1)

    layout = layouts(decoder), ROWS, ROWS, ROWS, layouts(memories)
    mapped = shard_map(read, generator.mesh, in_specs=layout, out_specs=(ROWS, layouts(memories), ROWS))
    return mapped(decoder, ids, suffix, length, memories)


def prefill(
    generator: BolmoGenerator,
    decoder: BolmoDecoder,
    state: State,
    encoded: tuple,
    ends: Bool[Array, "batch time"],
    slots: int,
) -> State:
    """Rows that have read nothing -> rows that have read prompts, of which `encode` gives the rest. `slots`: at least the
    number of patches of any row."""
    h, memories, ids, length = encoded
    place = jnp.arange(ids.shape[1])
    last = (length - 1)[:, None]
    number = jnp.sum(ends, axis=1)
    x, state = decoder_reads(generator, decoder, state, h, ends, place < last, slots)

    # What the decoder says of the last byte: of a single one, that it ends a patch, as bos always does.
    before = jnp.take_along_axis(x, jnp.maximum(last - 1, 0)[..., None], axis=1)
    found = head(generator, decoder, before)[:, 0]
    newest = jnp.take_along_axis(ids, last, axis=1)
    plain, fused = (jnp.take_along_axis(found, newest + half, axis=1) for half in (0, generator.size))
    flag = ((fused > plain) | (last == 0))[:, 0]

    window = generator.table.window
    backwards = last - window + 1 + jnp.arange(window)
    recent = jnp.where(backwards >= 0, jnp.take_along_axis(ids, jnp.maximum(backwards, 0), axis=1), -1)
    rows = jnp.arange(len(ids))[:, None]
    seen = state.seen.at[rows, jnp.where(place <= last, ids, generator.size)].set(True, mode="drop")
    changes = {
        "encoder": memories,
        "recent": recent,
        "length": length,
        "patches": number.astype(jnp.int32),
        "h": jnp.take_along_axis(h, last[..., None], axis=1)[:, 0],
        "seen": seen,
        "waiting": flag,
        "ready": ~flag,
    }
    return eqx.tree_at(lambda s: [getattr(s, name) for name in changes], state, list(changes.values()))


def decoder_reads(
    generator: BolmoGenerator,
    decoder: BolmoDecoder,
    state: State,
    h: Float[Array, "batch time embed"],
    ends: Bool[Array, "batch time"],
    present: Bool[Array, "batch time"],
    slots: int,
) -> tuple[Float[Array, "batch time embed"], State]:
    """What the head reads at the bytes of texts that nothing was read of, whose patches end at `ends`; and the state with
    the caches, the decoder's memories and the last patch behind those that are `present`."""
    ordinal = jnp.where(ends, jnp.cumsum(ends, axis=1) - 1, slots)
    rows, place = jnp.arange(len(h))[:, None], jnp.arange(h.shape[1])
    at = jnp.zeros((len(h), slots), jnp.int32).at[rows, ordinal].set(place[None], mode="drop")
    count = jnp.sum(ends, axis=1).astype(jnp.int32)
    piece = min(PIECE, slots)

    def read(decoder, caches, h, at, count, ends, memories, present):
        g = jnp.take_along_axis(h, at[..., None], axis=1)

        def read_piece(number, carry):
            caches, patches = carry
            start = number * piece
            part = jax.lax.dynamic_slice_in_dim(g, start, piece, axis=1)
            left = jnp.clip(count - start, 0, piece)
            found, caches = bolmo_decoder.read_patches(decoder, caches, part, jnp.full_like(count, start), left)
            return caches, jax.lax.dynamic_update_slice_in_dim(patches, found, start, axis=1)

        caches, patches = jax.lax.fori_loop(0, slots // piece, read_piece, (caches, jnp.zeros_like(g)))
        number = jnp.maximum(jnp.cumsum(ends, axis=1) - 1, 0)
        of_byte = jnp.take_along_axis(patches, number[..., None], axis=1)
        x, memories = bolmo_decoder.decode(decoder, h, of_byte, memories, present)
        return x, caches, memories, of_byte[:, -1]

    caches, memory = layouts(state.caches), layouts(state.decoder)
    mapped = shard_map(
        read,
        generator.mesh,
        in_specs=(layouts(decoder), caches, ROWS, ROWS, ROWS, ROWS, memory, ROWS),
        out_specs=(ROWS, caches, memory, ROWS),
    )
    x, *new = mapped(decoder, state.caches, h, at, count, ends, state.decoder, present)
    return x, eqx.tree_at(lambda s: [s.caches, s.decoder, s.patch], state, new)


def head(
    generator: BolmoGenerator, decoder: BolmoDecoder, x: Float[Array, "batch time embed"]
) -> Float32[Array, "batch time ids"]:
    """Logits of all ids."""
    layout = P("fsdp", None, "tp")
    mapped = shard_map(bolmo_decoder.logits, generator.mesh, in_specs=(layouts(decoder), ROWS), out_specs=layout)
    return mapped(decoder, x)


def turn(
    generator: BolmoGenerator, decoder: BolmoDecoder, table: SuffixTable, state: State, live: Bool[Array, " batch"]
) -> tuple[State, Float32[Array, "batch ids"], Bool[Array, " batch"]]:
    """As much as can be done at once for the rows that are live: their pending bytes are read, the subword model takes a
    step if half of them wait for it, and the decoder goes on where it may: the logits, and in which rows they are new."""
    mesh, rows = generator.mesh, jnp.arange(len(live))
    reads = live & (state.pending >= 0)
    byte = jnp.maximum(state.pending, 0) % generator.size
    fused = state.pending >= generator.size
    recent = jnp.where(reads[:, None], jnp.concatenate([state.recent[:, 1:], byte[:, None]], axis=1), state.recent)
    suffix = table(recent)

    def read_byte(decoder, ids, suffix, memories):
        h, memories = bolmo_decoder.encode(decoder, ids[:, None], suffix[:, None], memories, None)
        return h[:, 0], memories

    def read_patch(decoder, caches, h, start, count):
        found, caches = bolmo_decoder.read_patches(decoder, caches, h[:, None], start, count)
        return found[:, 0], caches

    def write(decoder, h, patch, memories):
        x, memories = bolmo_decoder.decode(decoder, h[:, None], patch[:, None], memories, None)
        return bolmo_decoder.logits(decoder, x)[:, 0], memories

    whole, caches = layouts(decoder), layouts(state.caches)
    encoder, memory = layouts(state.encoder), layouts(state.decoder)
    new_h, new = shard_map(read_byte, mesh, in_specs=(whole, ROWS, ROWS, encoder), out_specs=(ROWS, encoder))(
        decoder, byte, suffix, state.encoder
    )
    h = jnp.where(reads[:, None], new_h, state.h)
    encoder_memories = tuple(old.where(reads, each) for old, each in zip(state.encoder, new, strict=True))
    waiting, ready = state.waiting | (reads & fused), state.ready | (reads & ~fused)

    waits = waiting & live
    goes = waits & (2 * jnp.sum(waits) >= jnp.sum(live))
    step = shard_map(read_patch, mesh, in_specs=(whole, caches, ROWS, ROWS, ROWS), out_specs=(ROWS, caches))

    def with_step():
        found, caches = step(decoder, state.caches, h, state.patches, goes.astype(jnp.int32))
        return jnp.where(goes[:, None], found, state.patch), caches

    patch, caches = jax.lax.cond(jnp.any(goes), with_step, lambda: (state.patch, state.caches))
    writes = live & (ready | goes)
    logits, new = shard_map(write, mesh, in_specs=(whole, ROWS, ROWS, memory), out_specs=(P("fsdp", "tp"), memory))(
        decoder, h, patch, state.decoder
    )
    state = State(
        encoder=encoder_memories,
        decoder=tuple(old.where(writes, each) for old, each in zip(state.decoder, new, strict=True)),
        caches=caches,
        recent=recent,
        length=state.length + reads.astype(jnp.int32),
        patches=state.patches + goes.astype(jnp.int32),
        h=h,
        patch=patch,
        seen=state.seen.at[rows, jnp.where(reads, byte, generator.size)].set(True, mode="drop"),
        pending=jnp.where(reads, -1, state.pending),
        waiting=waiting & ~goes,
        ready=ready & ~writes,
    )
    return state, logits, writes


def advance(
    generator: BolmoGenerator,
    decoder: BolmoDecoder,
    table: SuffixTable,
    state: State,
    steps: Int[Array, ""],
    done: Bool[Array, " batch"],
    sampling: Sampling,
    seed: UInt32[Array, ""],
    stops: Int[Array, " stops"],
) -> tuple[State, Int[Array, "batch most_steps"], Int[Array, " batch"]]:
    """Writes up to `steps` bytes of each row: their ids, of either half, and how many."""
    key, rows = jax.random.key(seed), jnp.arange(done.shape[0])

    def go_on(carry):
        state, ids, made, done = carry
        state, logits, writes = turn(generator, decoder, table, state, ~done & (made < steps))
        keys = jax.vmap(lambda row, place: jax.random.fold_in(jax.random.fold_in(key, row), place))(
            rows, state.length - 1
        )
        seen = jnp.tile(state.seen, (1, 2)) if sampling.repetition_penalty is not None else None
        chosen = choose(adjusted(logits, sampling, seen), sampling, keys).astype(jnp.int32)
        ids = ids.at[rows, jnp.where(writes, made, MOST_STEPS)].set(chosen, mode="drop")
        pending = jnp.where(writes, chosen, state.pending)
        state = eqx.tree_at(lambda s: s.pending, state, pending)
        ended = jnp.any((chosen % generator.size)[:, None] == stops, axis=-1)
        return state, ids, made + writes.astype(jnp.int32), done | (writes & ended)

    def some_go_on(carry):
        _, _, made, done = carry
        return jnp.any(~done & (made < steps))

    ids = jnp.zeros((done.shape[0], MOST_STEPS), jnp.int32)
    state, ids, made, _ = jax.lax.while_loop(some_go_on, go_on, (state, ids, jnp.zeros_like(rows), done))
    return state, ids, made


def score(
    generator: BolmoGenerator,
    decoder: BolmoDecoder,
    table: SuffixTable,
    state: State,
    ids: Int[Array, "batch most_steps"],
) -> tuple[State, Float32[Array, "batch most_steps"], Bool[Array, "batch most_steps"]]:
    """Reads given bytes (-1 behind the last one of a row): log p of each, whether or not it ends a patch, and whether it is
    the most probable one. The last one is left pending."""
    rows, counts = jnp.arange(len(ids)), jnp.sum(ids >= 0, axis=1)

    def go_on(carry):
        state, logp, greedy, made = carry
        state, logits, writes = turn(generator, decoder, table, state, made < counts)
        both = jax.nn.log_softmax(logits, axis=-1).reshape(len(ids), 2, generator.size)
        either = jnp.logaddexp(both[:, 0], both[:, 1])
        byte = jnp.take_along_axis(ids, jnp.minimum(made, ids.shape[1] - 1)[:, None], axis=1)[:, 0]
        byte = jnp.maximum(byte, 0)
        place = jnp.where(writes, made, ids.shape[1])
        logp = logp.at[rows, place].set(either[rows, byte], mode="drop")
        greedy = greedy.at[rows, place].set(jnp.argmax(either, axis=-1) == byte, mode="drop")
        fused = both[rows, 1, byte] > both[rows, 0, byte]
        pending = jnp.where(writes, jnp.where(fused, byte + generator.size, byte), state.pending)
        return eqx.tree_at(lambda s: s.pending, state, pending), logp, greedy, made + writes.astype(jnp.int32)

    none = jnp.zeros(ids.shape, jnp.float32)
    carry = state, none, none > 0, jnp.zeros_like(rows)
    state, logp, greedy, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[3] < counts), go_on, carry)
    return state, logp, greedy

"""Generation: a compiled program that reads prompts and writes many tokens a call, and the loop around it.

The program serves all prompts. It is compiled once for each number of rows (a power of two) and each capacity of the
cache (another): prompts are read in pieces of a fixed size, and then tokens are chosen one by one on the device until
all rows have met a stop id or the asked number is there. The last token of a prompt is read by the first of these steps.
Text, stop strings and streaming are the host's (text.py).
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float32, Int, UInt32

from minalm.errors import InputError
from minalm.generation.decoder import Cache, Decoder, cache_lengths, lay_out, logits, read
from minalm.generation.members import SharedEntries, shared_entries
from minalm.generation.sampling import Sampling, SamplingConfig, adjusted, choose
from minalm.generation.suffix_table import SuffixTable, suffix_table
from minalm.generation.text import Continuation, stop_bytes
from minalm.huggingface.loaded import LoadedModel
from minalm.models.config import LongRopeScaling, ModelConfig
from minalm.models.ensemble import combine, normalized_weights
from minalm.parallel.mesh import layouts, param, shard, shard_map, shardings
from minalm.tokenization.suffixes import WINDOW

SMALLEST = 256  # columns of the smallest cache
PIECE = {"cpu": 32}  # columns of a prompt that are read at a time
PIECE_ELSEWHERE = 256
MOST_STEPS = 64  # tokens a row that one call writes
SECONDS = 0.1  # that a call should take if somebody is waiting for what it writes
DRAFTS = (4, 8, 16)  # tokens of a draft that are checked at once; each length is a program of its own
MARGIN = WINDOW - 1  # columns before the first, for the bytes before the first byte
STOPS = 16  # stop ids are filled up to a multiple of it, so that their number compiles nothing

Prompt = Int[np.ndarray, " _"] | tuple[Int[np.ndarray, " _"], ...]  # ids; or of each member its own


class MemberState(eqx.Module):
    """What one member has read."""

    caches: tuple[Cache, ...]
    ids: Int[Array, "batch margin_and_columns"] = param("fsdp", None)  # -1 where there is no token
    offset: Int[Array, " batch"] = param("fsdp")  # the column of each row's first token
    long: Bool[Array, " batch"] = param("fsdp")  # LongRoPE: the row is longer than the original length


class State(eqx.Module):
    """Rows in the making. Columns before `column` have been read."""

    members: tuple[MemberState, ...]
    column: Int[Array, ""] = param()


class Member(eqx.Module):
    """A model on the mesh."""

    decoder: Decoder
    table: SuffixTable | None


class Generator:
    """Models on a mesh, with their compiled programs. Several models are an ensemble."""

    def __init__(
        self,
        members: tuple[Member, ...],
        loaded: Sequence[LoadedModel],
        shared: SharedEntries | None,
        mesh: Mesh,
        weights: tuple[float, ...],
        mean: Literal["probability", "log"],
    ) -> None:
        self.members, self.mesh = members, mesh
        self.vocabularies = [model.vocabulary for model in loaded]
        self.shared, self.weights, self.mean = shared, weights, mean
        self.configs, self.dtype = [member.decoder.config for member in members], members[0].decoder.dtype
        self.piece = PIECE.get(mesh.devices.flat[0].platform, PIECE_ELSEWHERE)
        self.kept: Session | None = None
        state = layouts(self._state(1, SMALLEST))
        self._advance = jax.jit(
            functools.partial(advance, self),
            in_shardings=shardings((layouts(members), state, *[P()] * 6), mesh),
            out_shardings=shardings((state, P(), P()), mesh),
            donate_argnums=1,
        )
        self._verify = jax.jit(
            functools.partial(verify, self),
            in_shardings=shardings((layouts(members), state, *[P()] * 3), mesh),
            out_shardings=shardings((state, P(), P()), mesh),
            donate_argnums=1,
        )
        self._grow = jax.jit(self._grown, static_argnums=1, out_shardings=shardings(state, mesh))

    @classmethod
    def of(
        cls,
        models: Sequence[LoadedModel],
        mesh: Mesh,
        dtype: jnp.dtype,
        weights: Sequence[float] | None = None,
        mean: Literal["probability", "log"] = "probability",
    ) -> "Generator":
        """Lays models out on a mesh, in the compute dtype. `weights` and `mean` are those of an ensemble (ensemble.py).

        Raises InputError for members whose texts are not written in the same tokens, or a mesh that does not divide one.
        """
        shared = shared_entries([model.vocabulary for model in models]) if len(models) > 1 else None
        weights = normalized_weights(weights, len(models))

        def on_mesh(tree, dtype=None):  # unless it is in training, and there already
            there = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))
            return tree if there else shard(tree, mesh, dtype)

        def member(loaded):
            decoder = lay_out(on_mesh(loaded.model, dtype), on_mesh(loaded.mask), mesh, dtype)
            table = None if loaded.suffixes is None else shard(suffix_table(loaded.suffixes), mesh)
            return Member(decoder, table)

        return cls(tuple(map(member, models)), models, shared, mesh, weights, mean)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        max_tokens: int,
        stop_ids: Collection[int],
        stop_strings: Sequence[str] = (),
        seed: int = 0,
        on_tokens: Callable[[int, list[int]], None] | None = None,
        max_bytes: int | None = None,
    ) -> list[list[int]]:
        """Continuations of prompts of any lengths: the ids of each, without what ended it.

        A prompt is an array of ids, or one for each member of an ensemble. A row ends at one of `stop_ids`, before a stop
        string (with the last token that holds nothing of it), after `max_tokens`, or with the token that completes
        `max_bytes` of text. `on_tokens` is called with the number of a row and its new ids as they come, among them those
        that may begin a stop string. Rows with the same number and `seed` draw the same. Raises InputError for a prompt
        without a token and an empty stop string.
        """
        rows = [prompt if isinstance(prompt, tuple) else (prompt,) * len(self.members) for prompt in prompts]
        for number, row in enumerate(rows):
            if not all(len(ids) for ids in row):
                raise InputError(f"prompt {number + 1} is empty: give at least one token to go on from")
        if not rows:
            return []
        vocabulary = self.vocabularies[0]
        token_bytes = None if vocabulary is None else vocabulary.token_bytes
        stops = stop_bytes(stop_strings)
        written = [Continuation(token_bytes, stops, max_tokens, max_bytes) for _ in rows]
        padded_stops = filled_up(sorted(stop_ids))
        sampling, key = Sampling.of(sampling), np.uint32(seed)
        waits = on_tokens is not None or stops or max_bytes is not None
        session, steps = None, 1 if waits else MOST_STEPS
        while not all(row.ended for row in written):
            if session is None or not session.room():  # LongRoPE: a row has become long, and all its keys change
                session = self.session([self._so_far(row, made.ids) for row, made in zip(rows, written)], max_tokens)
            done = np.array([row.ended for row in written])
            left = max(row.max_tokens - len(row.ids) for row in written if not row.ended)
            began = time.perf_counter()
            tokens = session.advance(min(steps, left), done, sampling, key, padded_stops)
            for number, (row, new) in enumerate(zip(written, tokens)):
                taken = row.add(new.tolist(), stop_ids)
                if taken and on_tokens is not None:
                    on_tokens(number, taken)
            if waits:
                of_step = (time.perf_counter() - began) / max(*map(len, tokens), 1)
                steps = int(np.clip(SECONDS / of_step, 1, min(2 * steps, MOST_STEPS)))
        return [row.ids for row in written]

    def session(self, rows: Sequence[Sequence[Int[np.ndarray, " _"]]], expected: int) -> "Session":
        """The rows on the device, of each row each member's ids. What the last session has read of a single row is kept:
        the next turn of a chat reads what is new."""
        if self.kept is None or not self.kept.change(rows, expected):
            self.kept = None  # before there is memory for the next
            self.kept = Session(self, rows, expected)
        return self.kept

    def compiled(self) -> int:
        """How many programs have been compiled: one for each number of rows and capacity, and one to grow a cache."""
        return sum(program._cache_size() for program in (self._advance, self._verify, self._grow))

    def _so_far(self, row, new):
        """A row's prompts and what was written, as each member reads it."""
        if self.shared is None:
            return [np.append(ids, np.array(new, np.int32)).astype(np.int32) for ids in row]
        ours, entries = self.shared.ids(0), np.array(new, np.int64)
        entries = np.array([int(np.flatnonzero(ours == token)[0]) for token in new], np.int64)
        return [np.append(ids, self.shared.ids(m)[entries]).astype(np.int32) for m, ids in enumerate(row)]

    def _state(self, batch: int, capacity: int) -> State:
        """A state's shapes, for so many rows and columns."""

        def member(config):
            kv_heads = max(config.kv_heads, self.mesh.shape["tp"])  # one that several devices share is held by each
            heads, channels = (batch, kv_heads), config.head_dim
            caches = tuple(
                Cache(
                    jnp.zeros((*heads, channels, slots), self.dtype), jnp.zeros((*heads, slots, channels), self.dtype)
                )
                for slots in cache_lengths(config, capacity, self.piece)
            )
            ids, row = jnp.zeros((batch, MARGIN + capacity), jnp.int32), jnp.zeros(batch, jnp.int32)
            return MemberState(caches, ids, row, row > 0)

        return jax.eval_shape(lambda: State(tuple(map(member, self.configs)), jnp.int32(0)))

    def _grown(self, state: State, capacity: int) -> State:
        """The same with room for more columns. Caches that are shorter than their final ring have not begun anew yet."""

        def longer(array, axis, length, fill):
            pads = [(0, length - size if n == axis else 0) for n, size in enumerate(array.shape)]
            return jnp.pad(array, pads, constant_values=fill)

        def member(config, state):
            lengths = cache_lengths(config, capacity, self.piece)
            caches = tuple(
                Cache(longer(cache.k, 3, length, 0), longer(cache.v, 2, length, 0))
                for cache, length in zip(state.caches, lengths, strict=True)
            )
            ids = longer(state.ids, 1, MARGIN + capacity, -1)
            return MemberState(caches, ids, state.offset, state.long)

        return State(tuple(map(member, self.configs, state.members)), state.column)


class Session:
    """Some rows on the device."""

    def __init__(self, generator: Generator, rows: Sequence[Sequence[Int[np.ndarray, " _"]]], expected: int) -> None:
        """`rows`: of each row each member's ids. `expected`: tokens that will be written, at most."""
        self.generator, self.rows = generator, len(rows)
        mesh, piece = generator.mesh, generator.piece
        self.batch = max(power_of_two(len(rows)), 1)
        self.batch += -self.batch % mesh.shape["fsdp"]
        longest = max(len(ids) for row in rows for ids in row)
        self.pieces = -(-(longest - 1) // piece)
        self.column = self.pieces * piece  # of the last token of each row
        self.capacity = max(SMALLEST, power_of_two(self.column + 1 + min(expected, MOST_STEPS)))
        self.newest = self.column  # column that was written
        self.text, self.first = rows[0][0].tolist(), self.column  # of a single row: its ids, and the column of the last
        self.limits = []  # of each row, the first column that it may not read before it is read anew
        texts = [self._text(config, [row[n] for row in rows]) for n, config in enumerate(generator.configs)]
        shapes = generator._state(self.batch, self.capacity)
        state = jax.tree.map(lambda array: np.broadcast_to(np.zeros((), array.dtype), array.shape), shapes)
        places = lambda state: [array for m in state.members for array in (m.ids, m.offset, m.long)]  # noqa: E731
        state = eqx.tree_at(places, state, [array for text in texts for array in text])
        self.state = jax.tree.map(placed, state, shardings(layouts(shapes), mesh))

    def _text(self, config: ModelConfig, rows: Sequence[Int[np.ndarray, " _"]]) -> tuple[np.ndarray, ...]:
        """A member's ids, offset and long."""
        batch = self.batch
        ids = np.full((batch, MARGIN + self.capacity), -1, np.int32)
        offset = np.full(batch, self.column, np.int32)  # rows that nobody asked for have one token
        for number, row in enumerate(rows):
            offset[number] = self.column + 1 - len(row)
            ids[number, MARGIN + offset[number] : MARGIN + self.column + 1] = row
        ids[len(rows) :, MARGIN + self.column] = 0
        scalings = [rope.scaling for rope in config.ropes if rope is not None]
        limits = [scaling.original_length for scaling in scalings if isinstance(scaling, LongRopeScaling)]
        long = np.zeros(batch, bool)
        if limits:
            long = self.column + 1 - offset > limits[0]
            self.limits.append(np.where(long, np.iinfo(np.int32).max, offset + limits[0])[: self.rows])
        return ids, offset, long

    def change(self, rows: Sequence[Sequence[Int[np.ndarray, " _"]]], expected: int) -> bool:
        """Goes over to another text, of a single row and member, and reads only what it does not begin with already.

        False where that cannot be: nothing has changed then.
        """
        if len(rows) > 1 or self.rows > 1 or len(rows[0]) > 1 or self.limits:
            return False
        (ids,), piece = rows[0], self.generator.piece
        offset = self.first + 1 - len(self.text)  # of the row's first token
        shorter = min(len(ids), len(self.text))
        differ = np.flatnonzero(ids[:shorter] != np.array(self.text[:shorter], np.int32))
        known = min(int(differ[0]) if len(differ) else shorter, self.column - offset)
        last = offset + len(ids) - 1
        pieces = max(-(-(last - offset - known) // piece), 0)
        start = last - pieces * piece
        # Rings hold a window and a piece: what was written behind must not have taken the place of what is read.
        if start < 0 or not known or self.newest - start > piece:
            return False
        self.column, self.pieces, self.text, self.first = last, pieces, ids.tolist(), last
        self.make_room(min(expected, MOST_STEPS))
        new = np.full((1, MARGIN + self.capacity), -1, np.int32)
        new[0, MARGIN + offset : MARGIN + last + 1] = ids
        (member,) = self.state.members
        member = dataclasses.replace(member, ids=placed(new, member.ids.sharding))
        self.state = State((member,), placed(np.int32(start), self.state.column.sharding))
        return True

    def room(self) -> int:
        """Columns that can be read before some row has to be read anew."""
        return min((int(limit.min()) - self.column for limit in self.limits), default=2**30)

    def make_room(self, columns: int) -> None:
        """Lets the cache grow until so many columns can be read, and as many tokens written."""
        while self.column + columns >= self.capacity:
            self.capacity *= 2
            self.state = self.generator._grow(self.state, self.capacity)

    def advance(
        self,
        steps: int,
        done: Bool[np.ndarray, " row"],
        sampling: Sampling,
        seed: np.uint32,
        stops: Int[np.ndarray, " stops"],
    ) -> Int[np.ndarray, "row step"]:
        """Up to `steps` new tokens of each row."""
        with self._dropped_if_interrupted():
            return self._advance(steps, done, sampling, seed, stops)

    def _advance(self, steps, done, sampling, seed, stops):
        self.make_room(1)
        steps = min(steps, self.capacity - 1 - self.column, self.room(), MOST_STEPS)
        everyone = np.concatenate([done, np.ones(self.batch - self.rows, bool)])
        arguments = np.int32(self.pieces), np.int32(steps), everyone, sampling, seed, stops
        self.state, tokens, made = self.generator._advance(self.generator.members, self.state, *arguments)
        tokens, made = jax.device_get((tokens, made))
        self._moved(tokens[0, : int(made)], int(made))
        return tokens[: self.rows, : int(made)]

    def verify(self, draft: Sequence[int], sampling: Sampling, seed: np.uint32) -> list[int]:
        """The tokens of a draft that are right for the single row, and one more. All of its text has to be read."""
        with self._dropped_if_interrupted():
            return self._verify(draft, sampling, seed)

    def _verify(self, draft, sampling, seed):
        length = min(length for length in DRAFTS if len(draft) <= length)
        self.make_room(length + 1)
        padded = np.array([*draft, *[-1] * (length - len(draft))], np.int32)
        self.state, tokens, made = self.generator._verify(self.generator.members, self.state, padded, sampling, seed)
        tokens, made = jax.device_get((tokens, made))
        newest = self.column + length
        self._moved(tokens[: int(made)], int(made))
        self.newest = max(self.newest, newest)
        return tokens[: int(made)].tolist()

    @contextlib.contextmanager
    def _dropped_if_interrupted(self):
        """Ctrl-C may come where the device is ahead of what is known here: the next text begins anew."""
        try:
            yield
        except BaseException:
            self.generator.kept = None
            raise

    def _moved(self, new, count):
        self.pieces = 0
        self.column += count
        self.newest = max(self.newest, self.column)
        if self.rows == 1 and len(self.generator.members) == 1:
            self.text += new.tolist()
            self.first = self.column


def advance(
    generator: Generator,
    members: tuple[Member, ...],
    state: State,
    pieces: Int[Array, ""],
    steps: Int[Array, ""],
    done: Bool[Array, " batch"],
    sampling: Sampling,
    seed: UInt32[Array, ""],
    stops: Int[Array, " stops"],
) -> tuple[State, Int[Array, "batch most_steps"], Int[Array, ""]]:
    """Reads so many pieces of the rows' prompts, and writes up to `steps` tokens: the ids (member 0's), how many."""
    piece = generator.piece
    state = jax.lax.fori_loop(
        0, pieces, lambda _, state: read_columns(generator, members, state, piece, False)[1], state
    )
    key, rows = jax.random.key(seed), jnp.arange(done.shape[0])

    def step(carry):
        state, tokens, number, done = carry
        each, state = read_columns(generator, members, state, 1, True)
        logits = combined(generator, [logits[:, 0] for logits in each])
        first, column = state.members[0], state.column - 1
        position = column - first.offset
        keys = jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))(
            rows, position
        )
        seen = occurred(generator, first.ids, logits.shape[1]) if sampling.repetition_penalty is not None else None
        entry = choose(adjusted(logits, sampling, seen), sampling, keys).astype(jnp.int32)
        own = [
            entry if generator.shared is None else jnp.asarray(generator.shared.ids(m))[entry]
            for m in range(len(members))
        ]
        written = tuple(
            eqx.tree_at(lambda m: m.ids, member, member.ids.at[:, MARGIN + column + 1].set(new))
            for member, new in zip(state.members, own)
        )
        tokens = tokens.at[:, number].set(own[0])
        done = done | jnp.any(own[0][:, None] == stops, axis=-1)
        return State(written, state.column), tokens, number + 1, done

    def goes_on(carry):
        _, _, number, done = carry
        return (number < steps) & ~jnp.all(done)

    tokens = jnp.zeros((done.shape[0], MOST_STEPS), jnp.int32)
    state, tokens, made, done = jax.lax.while_loop(goes_on, step, (state, tokens, jnp.int32(0), done))
    return state, tokens, made


def verify(
    generator: Generator,
    members: tuple[Member, ...],
    state: State,
    draft: Int[Array, " draft"],
    sampling: Sampling,
    seed: UInt32[Array, ""],
) -> tuple[State, Int[Array, " draft_and_one"], Int[Array, ""]]:
    """Reads a draft (-1 behind its end) of the next tokens of the first row: the tokens that follow, and how many.

    These are the draft's first ones, as far as they are what would have been chosen, and then one more. A draft
    proposes one token, so the rejection sampling of Leviathan et al. (2023, arXiv 2211.17192, algorithm 1) is: keep it
    with the probability p that the model gives it, and else sample from p without it. What follows has the distribution
    of sampling token by token; where the most probable one is taken, it is the same. The other rows are padding.
    """
    count, column = draft.shape[0], state.column
    ids = state.members[0].ids
    proposed = jax.lax.dynamic_update_slice(
        ids, jnp.broadcast_to(draft, (ids.shape[0], count)), (0, MARGIN + column + 1)
    )
    member = dataclasses.replace(state.members[0], ids=proposed)
    [found], state = read_columns(generator, members, State((member,), column), count + 1, True)
    position = column - member.offset[0] + jnp.arange(count + 1)
    keys = jax.vmap(lambda place: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), place))(position)
    logits, seen = found[0], None
    if sampling.repetition_penalty is not None:
        known = jnp.arange(ids.shape[1]) <= MARGIN + column + jnp.arange(count + 1)[:, None]
        seen = occurred(generator, jnp.where(known, proposed[0], -1), logits.shape[1])
    logits = adjusted(logits, sampling, seen)
    asked = jnp.append(draft, -1)
    is_asked = jnp.arange(logits.shape[1]) == asked[:, None]
    if sampling.temperature is None:
        chosen = choose(logits, sampling, keys).astype(jnp.int32)
        right = chosen == asked
    else:
        p = jnp.sum(jnp.where(is_asked, jax.nn.softmax(logits, axis=-1), 0.0), axis=-1)
        kept, other = jax.vmap(jax.random.split, out_axes=1)(keys)
        right = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(kept) < p
        chosen = choose(jnp.where(is_asked, -jnp.inf, logits), sampling, other).astype(jnp.int32)
    accepted = jnp.sum(jnp.cumprod(right.astype(jnp.int32)))
    tokens = jnp.where(jnp.arange(count + 1) < accepted, asked, chosen[accepted])
    tokens = jnp.where(jnp.arange(count + 1) <= accepted, tokens, -1)
    written = jnp.broadcast_to(tokens, (ids.shape[0], count + 1))
    member = dataclasses.replace(
        state.members[0], ids=jax.lax.dynamic_update_slice(ids, written, (0, MARGIN + column + 1))
    )
    return State((member,), column + accepted + 1), tokens, accepted + 1


def read_columns(
    generator: Generator, members: tuple[Member, ...], state: State, count: int, with_logits: bool
) -> tuple[list[Float32[Array, "batch time vocab"]], State]:
    """Reads the next `count` columns: each member's logits there (none if not wanted), and the state behind them."""
    mesh = generator.mesh

    def of_member(member, state, column):
        ids = jax.lax.dynamic_slice_in_dim(state.ids, column, MARGIN + count, axis=1)
        suffix = None
        if member.table is not None:
            suffix = member.table(jnp.stack([ids[:, n : n + count] for n in range(WINDOW)], axis=-1))
        inputs = jnp.maximum(ids[:, MARGIN:], 0)
        hidden, caches = read(member.decoder, state.caches, inputs, suffix, column, state.offset, state.long)
        return (logits(member.decoder, hidden) if with_logits else None), caches

    found, states = [], []
    for member, own in zip(members, state.members, strict=True):
        layout = layouts(own)
        mapped = shard_map(
            of_member,
            mesh,
            in_specs=(layouts(member), layout, P()),
            out_specs=(P("fsdp", None, "tp") if with_logits else None, layout.caches),
        )
        each, caches = mapped(member, own, state.column)
        found += [each] if with_logits else []
        states.append(MemberState(caches, own.ids, own.offset, own.long))
    return found, State(tuple(states), state.column + count)


def combined(generator: Generator, each: Sequence[Float32[Array, "batch vocab"]]) -> Float32[Array, "batch entry"]:
    """One model's logits as they are; of an ensemble, normalized log-probabilities of what the members share."""
    if len(each) == 1:
        return each[0]
    if generator.shared is not None:
        each = [generator.shared.of_member(number, logits) for number, logits in enumerate(each)]
    smallest = min(logits.shape[1] for logits in each)  # tables of one vocabulary may be padded differently
    return combine([logits[:, :smallest] for logits in each], generator.weights, generator.mean)


def occurred(generator: Generator, ids: Int[Array, "batch columns"], entries: int) -> Bool[Array, "batch entry"]:
    """Which entries are among a row's tokens."""
    if generator.shared is not None:
        place = np.full(int(generator.shared.ids(0).max()) + 1, entries, np.int32)
        place[generator.shared.ids(0)] = np.arange(entries)
        ids = jnp.where((ids >= 0) & (ids < len(place)), jnp.asarray(place)[jnp.clip(ids, 0, len(place) - 1)], -1)
    ids = jnp.where(ids < 0, entries, ids)
    rows = jnp.arange(ids.shape[0])[:, None]
    return jnp.zeros((ids.shape[0], entries), bool).at[rows, ids].set(True, mode="drop")


def placed(array: np.ndarray | np.generic, sharding: NamedSharding) -> jax.Array:
    """A host's array, which all processes have, on the mesh. Nothing is compiled for it."""
    return jax.make_array_from_callback(np.shape(array), sharding, lambda index: np.asarray(array)[index])


def filled_up(stops: Sequence[int]) -> Int[np.ndarray, " stops"]:
    """Stop ids as the compiled programs take them."""
    return np.array([*stops, *[-1] * (-len(stops) % STOPS or (0 if stops else STOPS))], np.int32)


def power_of_two(number: int) -> int:
    """The smallest that is not below a number."""
    return 1 << (max(number, 1) - 1).bit_length()

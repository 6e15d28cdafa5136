"""The Bolmo model: its shapes, where patches end, patches as events, and what may see what."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minalm.distill.chunks import sum_by
from minalm.models import bolmo
from minalm.models.bolmo import Bolmo
from minalm.models.config import BolmoConfig, ModelConfig, Rope
from minalm.models.contract import Model, read
from minalm.models.head import VocabularyMask
from minalm.models.kinds import abstract, parameter_counts
from minalm.models.transformer import leaves
from minalm.parallel.mesh import P, make_mesh, shard_map
from minalm.run.estimate import byte_flops
from minalm.types import Guide, Tokens

OLMO = dict(norm_eps=1e-6, rope=Rope(500_000.0), pre_norms=False, post_norms=True, qk_norm="all", tied=False)


def published(embed: int, mlp: int, layers: int, heads: int, local_mlp: int) -> BolmoConfig:
    blocks = ModelConfig(100_352, embed, mlp, layers, heads, heads, 128, (None,) * layers, **OLMO)
    return BolmoConfig(260, 100_278, blocks, 16, local_mlp)


@pytest.mark.parametrize(
    "config, blocks, local, total",
    (
        (published(2048, 8192, 16, 16, 2816), 1_073_872_896, 170_752_160, 1_468_911_776),
        (published(4096, 11008, 32, 32, 5504), 6_476_529_664, 674_427_040, 7_633_084_576),
    ),
)
def test_parameter_counts_are_those_of_the_published_models(config, blocks, local, total):
    sizes = {name: leaf.size for name, leaf in leaves(abstract(config)).items()}

    def of(*parts):
        return sum(size for name, size in sizes.items() if name.startswith(parts))

    assert of("patches.") == blocks
    assert of("encoder.", "decoder.", "last.") == local
    assert of("boundary.") == 2 * config.embed**2
    assert of("pool.") == of("depool.") == config.embed**2 + config.embed
    assert parameter_counts(config)["expansion"] == 100_278 * config.embed
    assert parameter_counts(config)["all"] == total


def test_flops_of_bytes_are_two_for_each_weight():
    config = published(2048, 8192, 16, 16, 2816)
    sizes = {name: leaf.size for name, leaf in leaves(abstract(config)).items()}
    norms_and_biases = ("norm", "bias")
    blocks = sum(
        size
        for name, size in sizes.items()
        if name.startswith(("encoder.", "decoder.", "last.")) and not name.endswith(norms_and_biases)
    )
    flops = byte_flops(config, batch=3, time=7)
    assert flops["byte blocks"] == 2 * 21 * blocks
    around = sizes["boundary.q"] + sizes["boundary.k"] + sizes["depool.weight"] + sizes["unembed"]
    assert flops["predictor, projection, head"] == 2 * 21 * around
    assert flops["cells"] == 21 * 5 * 16 * (2 * 64 * 128 + 2 * 64 * 128)  # a product is added, and one is read


# --- where patches end --------------------------------------------------------------------------------------------


@given(rows=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=2, max_size=2), slots=st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_patches_are_numbered_as_a_loop_does(rows, slots):
    ends, of = (np.asarray(x) for x in _patches(jnp.asarray(rows), slots))
    for row, marks in enumerate(rows):
        places = [place for place, mark in enumerate(marks) if mark]
        assert ends[row].tolist() == (places[:slots] + [-1] * slots)[:slots]
        for place in range(9):
            ended = sum(marks[: place + 1])
            assert of[row, place] == min(max(ended - 1, 0), slots - 1)


@functools.partial(jax.jit, static_argnums=1)
def _patches(ends, slots):
    return bolmo.patch_ends(ends, slots), bolmo.patch_of(ends, slots)


def test_fused_targets_name_the_next_byte_and_its_end():
    targets = jnp.asarray([[5, 6, 7, 0]])
    ends = jnp.asarray([[1.0, 0.0, 1.0, 1.0]])
    assert bolmo.fused_targets(targets, ends, 260).tolist() == [[5, 266, 267, 0]]


# --- a tiny one ---------------------------------------------------------------------------------------------------

BLOCKS = ModelConfig(9, 16, 12, 2, 2, 2, 8, (None,) * 2, **OLMO)
TINY = BolmoConfig(4, 9, BLOCKS, heads=2, mlp=10, encoder_layers=1, decoder_layers=2)
TIME, SLOTS = 7, 6


@functools.cache
def tiny() -> Bolmo:
    random = np.random.default_rng(0)

    def draw(path, leaf):
        value = 0.4 * random.normal(size=leaf.shape).astype(np.float32)
        return 1.0 + value if "norm" in path[-1].name else value

    return jax.tree_util.tree_map_with_path(draw, abstract(TINY))


@jax.jit
def outputs(model, tokens):
    """(log-probabilities of the fused targets, log-probabilities of boundaries, boundaries)."""
    mask = VocabularyMask(np.ones(8, bool), np.zeros(8, bool))

    def forward(model, tokens):
        found = read(model, mask, tokens, jnp.dtype("float32"))
        return found.stats.logp, found.patches.boundary, found.patches.ends

    return shard_map(forward, make_mesh(1, 1), in_specs=P(), out_specs=P())(model, tokens)


def guided(ids, ends, states=None) -> Tokens:
    """Rows of ids whose patches end at `ends`, a list of positions for each; `states` stand for the patches."""
    ids = np.asarray(ids, np.int32)
    places = np.full((len(ids), SLOTS), -1, np.int32)
    for row, own in enumerate(ends):
        places[row, : len(own)] = own
    if states is None:
        states = np.random.default_rng(1).normal(size=(1, SLOTS, 16)).repeat(len(ids), 0)
    states, targets = jnp.asarray(states, jnp.float32), np.pad(ids[:, 1:], ((0, 0), (0, 1)))
    return Tokens(ids, targets, np.ones(ids.shape, np.float32), ids + 1, places, guide=Guide(states, states, 1))


def test_it_keeps_the_contract():
    assert isinstance(tiny(), Model)


def test_patches_as_events_are_disjoint_and_sum_to_1_less_what_never_ends():
    """Exact distillation: over all strings of bytes, the probabilities that the next patch is exactly that string, each
    the product of its fused bytes', and the probability that no patch has ended after LONGEST bytes."""
    longest, alphabet = 4, range(4)
    strings = [string for size in range(1, longest + 1) for string in itertools.product(alphabet, repeat=size)]
    rows = [(0, *string) + (0,) * (TIME - 1 - len(string)) for string in strings]
    tokens = guided(rows, [[0, len(string)] for string in strings])
    chunk = np.full((len(rows), TIME), -1)
    for row, string in enumerate(strings):
        chunk[row, : len(string)] = 1
    path, _, _ = outputs(tiny(), tokens)
    patch = np.exp(np.asarray(sum_by(path, jnp.asarray(chunk), SLOTS))[:, 1], dtype=np.float64)

    never = [string for string in strings if len(string) == longest]
    unfinished, _, _ = outputs(tiny(), guided([(0, *string, 0, 0) for string in never], [[0]] * len(never)))
    left = np.exp(np.asarray(unfinished, np.float64)[:, :longest].sum(axis=1)).sum()
    assert 0.0 < left < 1.0 and len(strings) == 340
    np.testing.assert_allclose(patch.sum() + left, 1.0, rtol=1e-5)
    # The same by steps: a string is at most as probable as its beginning is as a beginning.
    assert patch.sum() <= 1.0


def test_a_byte_sees_what_is_before_it_and_its_boundary_one_byte_more():
    random = np.random.default_rng(2)
    ids = random.integers(0, 4, TIME)
    ends, last = [0, 2, 3, 6], TIME - 1
    logp, boundary, _ = (np.asarray(x)[0] for x in outputs(tiny(), guided([ids], [ends])))
    for place in range(1, TIME):
        changed = ids.copy()
        changed[place] = (changed[place] + 1) % 4
        other, other_boundary, _ = (np.asarray(x)[0] for x in outputs(tiny(), guided([changed], [ends])))
        assert np.array_equal(other[: place - 1], logp[: place - 1])  # the target at place - 1 is another byte
        assert np.array_equal(other_boundary[: place - 1], boundary[: place - 1])
        if place <= last - 1:
            assert other_boundary[place - 1] != boundary[place - 1] or place == 1
            assert other[place] != logp[place]


def test_without_a_guide_the_predictor_decides():
    """The first position ends a patch, the last byte of a row too; padding ends none."""
    random = np.random.default_rng(3)
    ids = random.integers(0, 4, (3, TIME))
    tokens = guided(ids, [[0, 4], [0, 6], [0]])
    tokens = Tokens(tokens.inputs, tokens.targets, tokens.weight, tokens.suffix, tokens.patch_ends)
    _, boundary, ends = (np.asarray(x) for x in outputs(tiny(), tokens))
    for row, last in enumerate((4, 6, 0)):
        assert ends[row, :last].tolist() == (boundary[row, :last] > np.log(0.5)).tolist()
        assert ends[row, last] == 1 and not ends[row, last + 1 :].any() and ends[row, 0] == 1
    assert 0 < ends[:2, 1:].sum() < 10

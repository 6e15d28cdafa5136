"""The models against logits that transformers computed (tests/fixtures, see make_fixtures.py), and switch by switch."""

import dataclasses
from functools import cache
from pathlib import Path

import equinox as eqx
import forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import attend, generator, greedy
from jax.sharding import PartitionSpec as P
from programs import equations

from minalm.generation.engine import Session, read_columns
from minalm.huggingface import weights as hf
from minalm.models import layers, transformer
from minalm.models.config import LinearScaling, LongRopeScaling, ModelConfig, Rope, YarnScaling
from minalm.models.head import VocabularyMask
from minalm.models.transformer import Transformer
from minalm.parallel.mesh import ROWS, make_mesh, shard, shard_map, specs

FIXTURES = Path(__file__).parent / "fixtures"
FLOAT32 = jnp.dtype(jnp.float32)
NAMES = tuple(sorted(path.name for path in FIXTURES.iterdir()))


@cache
def load(name: str) -> tuple[Transformer, np.ndarray, np.ndarray]:
    """Model, tokens [2, 11], logits of transformers."""
    stored = np.load(FIXTURES / name / "logits.npz")
    return jax.tree.map(jnp.asarray, hf.load(FIXTURES / name, np.float32)), stored["tokens"], stored["logits"]


@cache
def compiled(config: ModelConfig, fsdp: int, tp: int, remat: str):
    """Placing a model on the mesh, and its logits [batch, time, vocab] in float32."""
    mesh = make_mesh(fsdp, tp)

    def run(model, tokens):
        return forward.logits(model, tokens, remat=remat)

    layout = specs(transformer.abstract(config), mesh)
    run = shard_map(run, mesh=mesh, in_specs=(layout, ROWS), out_specs=P("fsdp", None, "tp"))
    return lambda model: shard(model, mesh), jax.jit(run)


def compute(model: Transformer, tokens: np.ndarray, fsdp: int = 1, tp: int = 1, remat: str = "none") -> np.ndarray:
    on_mesh, run = compiled(model.config, fsdp, tp, remat)
    with jax.default_matmul_precision("highest"):
        return np.asarray(run(on_mesh(model), tokens))


def longrope(original_length: int, **settings) -> LongRopeScaling:
    """That of the fixtures, with other settings."""
    attention_factor = float(1.0 + np.log(64 / original_length) / np.log(original_length)) ** 0.5
    scaling = LongRopeScaling((1.0, 1.3, 2.0), (1.5, 3.0, 8.0), attention_factor, 64 / original_length, original_length)
    return dataclasses.replace(scaling, **settings)


def change(model: Transformer, **settings) -> Transformer:
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **settings))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    model, tokens, expected = load(name)
    tied = ("llama3_tied", "gemma2", "gemma3", "gemma3_seeing", "qwen3", "smollm3")
    assert expected.std() > 0.5 and model.config.tied == (name in tied)
    np.testing.assert_allclose(compute(model, tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ("llama3", "gemma2", "gemma3", "qwen2", "olmo3"))
@pytest.mark.parametrize(
    "fsdp, tp", (pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(1, 2, marks=pytest.mark.slow), (2, 2))
)
def test_logits_on_a_mesh(name, fsdp, tp):
    model, tokens, expected = load(name)
    np.testing.assert_allclose(compute(model, tokens, fsdp, tp), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ("llama3_biased", "smollm3", "phi3", "granite"))
def test_logits_of_more_families_on_a_mesh(name):
    test_logits_on_a_mesh(name, 2, 2)


@pytest.mark.parametrize("remat", ("dots", "full"))
def test_rematerialisation_does_not_change_the_logits(remat):
    model, tokens, expected = load("gemma2")
    np.testing.assert_allclose(compute(model, tokens, remat=remat), expected, rtol=0, atol=1e-5)


SETTINGS = (
    ("llama3", {"rope": Rope(100.0)}),
    ("llama3", {"rope": Rope(10_000.0, load("llama3")[0].config.rope.scaling)}),
    ("llama3", {"query_scale": 1 / 24**0.5}),
    ("llama3", {"norm_eps": 1e-2}),
    ("llama3", {"norm_plus_one": True}),
    ("llama3", {"activation": "gelu_tanh"}),
    ("llama3", {"embedding_scale": 24**0.5}),
    ("llama3", {"windows": (3, None, 3)}),
    ("gemma2", {"rope": Rope(10_000.0)}),
    ("gemma2", {"query_scale": None}),
    ("gemma2", {"attention_softcap": None}),
    ("gemma2", {"final_softcap": None}),
    ("gemma2", {"norm_plus_one": False}),
    ("gemma2", {"activation": "silu"}),
    ("gemma2", {"embedding_scale": 1.0}),
    ("gemma2", {"windows": (None, None, None)}),
    ("gemma2", {"windows": (None, 3, None)}),
    ("gemma2", {"windows": (3, None, 4)}),  # one too wide, in the last block
    ("gemma2", {"windows": (4, None, 3)}),  # and in the first
    ("gemma3", {"rope": Rope(100.0)}),
    ("gemma3", {"rope": Rope(1_000.0, LinearScaling(4.0))}),
    ("gemma3", {"rope": Rope(100.0, LinearScaling(2.0))}),
    ("gemma3", {"local_rope": None}),
    ("gemma3", {"local_rope": Rope(100.0)}),
    ("gemma3", {"windows": (3, None, 4)}),
    ("gemma3", {"query_scale": None}),
    ("gemma3", {"norm_plus_one": False}),
    ("gemma3", {"embedding_scale": 1.0}),
    ("mistral", {"windows": (3, None, 3)}),
    ("mistral", {"windows": (None, 3, 3)}),
    ("qwen2", {"windows": (None, None, 3)}),
    ("qwen2_yarn", {"rope": Rope(100.0)}),
    ("qwen2_yarn", {"rope": Rope(100.0, YarnScaling(4.0, 1.2079441541679836, 2.0, 0.1, 16, False))}),
    ("qwen2_yarn", {"rope": Rope(100.0, YarnScaling(8.0, 1.0, 2.0, 0.1, 16, False))}),
    ("qwen2_yarn", {"rope": Rope(100.0, YarnScaling(8.0, 1.2079441541679836, 4.0, 0.1, 16, False))}),
    ("qwen2_yarn", {"rope": Rope(100.0, YarnScaling(8.0, 1.2079441541679836, 2.0, 0.2, 16, False))}),
    ("qwen2_yarn", {"rope": Rope(100.0, YarnScaling(8.0, 1.2079441541679836, 2.0, 0.1, 32, False))}),
    ("qwen2_yarn", {"rope": Rope(100.0, YarnScaling(8.0, 1.2079441541679836, 2.0, 0.1, 16, True))}),
    ("qwen3", {"norm_eps": 1e-2}),
    ("olmo2", {"norm_eps": 1e-2}),
    ("olmo3", {"rope": Rope(100.0)}),
    ("olmo3", {"local_rope": None}),
    ("olmo3", {"windows": (3, None, 4)}),
    ("smollm3", {"unrotated_layers": ()}),
    ("smollm3", {"unrotated_layers": (2,)}),
    ("smollm3", {"unrotated_layers": (0,)}),  # the last block is rotated
    ("smollm3", {"unrotated_layers": (0, 1, 2)}),
    ("smollm3", {"windows": (None, None, 3)}),
    ("phi3", {"windows": (4, 5, 5)}),
    ("phi3", {"rope": Rope(100.0, share=0.75)}),
    ("phi3", {"rope": Rope(100.0, longrope(16, short_factors=(1.0, 1.3, 2.0, 3.0)))}),
    ("phi3", {"rope": Rope(1_000.0, longrope(16), 0.75)}),
    ("phi3", {"rope": Rope(100.0, longrope(16, attention_factor=1.0), 0.75)}),
    ("phi3", {"rope": Rope(100.0, longrope(16, short_factors=(1.1, 2.0, 4.0)), 0.75)}),
    ("phi3", {"rope": Rope(100.0, longrope(10, attention_factor=1.5**0.5), 0.75)}),  # the long factors
    ("phi3_long", {"rope": Rope(100.0, longrope(8, long_factors=(1.1, 2.0, 4.0)), 0.75)}),
    ("phi3_long", {"rope": Rope(100.0, longrope(11, attention_factor=2**0.5), 0.75)}),  # the short ones
    ("granite", {"embedding_scale": 1.0}),
    ("granite", {"residual_scale": 1.0}),
    ("granite", {"query_scale": None}),
    ("granite", {"logits_divisor": 1.0}),
)
SLOW = ("smollm3", "phi3", "phi3_long", "granite")


@pytest.mark.parametrize(
    "name, settings",
    [pytest.param(*case, marks=pytest.mark.slow if case[0] in SLOW else ()) for case in SETTINGS],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_every_setting_moves_the_logits(name, settings):
    model, tokens, expected = load(name)
    assert np.abs(compute(change(model, **settings), tokens) - expected).max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_moves_the_logits(name):
    """Norms, biases and norms of queries and keys among them; of the stacked blocks the first one alone."""
    model, tokens, expected = load(name)
    random = np.random.default_rng(0)
    for leaf, array in transformer.leaves(model).items():
        first = (slice(None),) if not leaf.startswith("blocks.") else (0,)
        changed = np.array(array)
        changed[first] += random.normal(size=changed[first].shape).astype(np.float32)
        changed = transformer.from_leaves(model.config, transformer.leaves(model) | {leaf: jnp.asarray(changed)})
        assert np.abs(compute(changed, tokens) - expected).max() > 1e-2, leaf


IN_SHORT = ("llama3", "gemma2", "gemma3", "qwen3", "olmo2", "phi3_long")  # the others are slow


@pytest.mark.parametrize(
    "name", [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_decoding_with_a_cache_is_the_whole_pass(name):
    """300 tokens one by one: the logits after each of them, past windows, rings and the first piece of a prompt."""
    model, _, _ = load(name)
    mesh, mask = make_mesh(1, 1), VocabularyMask(*np.ones((2, 58), bool))
    ids = np.random.default_rng(0).integers(0, 58, 300).astype(np.int32)
    made = generator(model, mask, None, mesh)
    session = Session(made, [[ids]], 0)
    state = dataclasses.replace(session.state, column=jnp.int32(session.column + 1 - len(ids)))

    def step(state, _):
        [found], state = read_columns(made, made.members, state, 1, True)
        return state, found[0, 0]

    with jax.default_matmul_precision("highest"):
        _, found = jax.jit(lambda state: jax.lax.scan(step, state, length=300))(state)
    np.testing.assert_allclose(found, compute(model, ids[None])[0], rtol=0, atol=1e-4)


def test_a_text_that_grows_past_the_length_of_short_factors_is_read_anew():
    """From 9 and 15 tokens to 18, as if there were no cache; 16 is the last length of short factors."""
    model, tokens, _ = load("phi3")
    mesh, mask = make_mesh(1, 1), VocabularyMask(*np.ones((2, 58), bool))
    prompts = [tokens[0, :9], np.concatenate([tokens[1], tokens[0, :4]])]
    with jax.default_matmul_precision("highest"):
        found = greedy(model, mask, None, prompts, 9, mesh)
    texts = [np.concatenate([prompt, new]).astype(np.int32) for prompt, new in zip(prompts, found)]
    for length in (16, 17):
        logits = compute(model, np.stack([text[:length] for text in texts]))[:, -1]
        assert logits.argmax(-1).tolist() == [text[length] for text in texts]
    assert [len(new) for new in found] == [9, 9]


@pytest.mark.slow
def test_gradients_on_a_mesh():
    """Each leaf's, of a weighted sum of logits: those of biases are summed over the devices that share them, once."""
    model, tokens, _ = load("llama3_biased")

    def gradients(fsdp, tp):
        mesh = make_mesh(fsdp, tp)
        layout = specs(model, mesh)

        def of(model, tokens):
            def total(model):
                logits = forward.logits(model, tokens)
                return jnp.sum(logits * jnp.sin(jnp.arange(logits.shape[1]))[:, None] * jnp.sign(logits))

            return jax.grad(total)(model)

        mapped = shard_map(of, mesh=mesh, in_specs=(layout, ROWS), out_specs=layout)
        with jax.default_matmul_precision("highest"):
            return transformer.leaves(jax.tree.map(np.asarray, jax.jit(mapped)(shard(model, mesh), tokens)))

    one, many = gradients(1, 1), gradients(2, 2)
    for leaf, gradient in one.items():
        np.testing.assert_allclose(many[leaf], gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max(), err_msg=leaf)
        assert np.abs(gradient).max() > 0 or leaf.endswith("k_bias"), leaf


def test_a_norm_over_all_heads_is_not_one_of_each_head():
    model, tokens, expected = load("olmo2")
    split = change(model, qk_norm="head")
    one = jax.tree.map(jnp.ones_like, (split.blocks.attention, split.last.attention))
    for part, ones in zip(("blocks", "last"), one):
        for norm in ("q_norm", "k_norm"):
            split = eqx.tree_at(
                lambda model: getattr(getattr(model, part).attention, norm), split, getattr(ones, norm)[..., :10]
            )
    assert np.abs(compute(split, tokens) - expected).max() > 1e-2


@pytest.mark.parametrize("scaling", ("factor", "low_freq_factor", "high_freq_factor", "original_length"))
def test_each_number_of_rope_scaling_moves_the_logits(scaling):
    model, tokens, expected = load("llama3")
    old = model.config.rope.scaling
    changed = dataclasses.replace(old, **{scaling: 2 * getattr(old, scaling)})
    assert np.abs(compute(change(model, rope=Rope(100.0, changed)), tokens) - expected).max() > 1e-2


def test_rope_scaling_in_its_three_bands():
    """Against the definition of the Llama 3.1 release: by wavelength, and a straight line in between."""
    config = load("llama3")[0].config
    scaling = config.rope.scaling
    bands = set()
    for channel, found in enumerate(config.rope.inverse_frequencies(config.head_dim)):
        frequency = config.rope.theta ** (-2 * channel / config.head_dim)
        wavelength = 2 * np.pi / frequency
        if wavelength < scaling.original_length / scaling.high_freq_factor:
            expected, band = frequency, "kept"
        elif wavelength > scaling.original_length / scaling.low_freq_factor:
            expected, band = frequency / scaling.factor, "stretched"
        else:
            share = (scaling.original_length / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            expected, band = (1 - share) * frequency / scaling.factor + share * frequency, "between"
        bands.add(band)
        assert found == pytest.approx(expected, rel=1e-6)
    assert bands == {"kept", "between", "stretched"}


@pytest.mark.parametrize(
    "name, windows, reach",
    (("llama3", (None, None, None), 11), ("gemma2_untied", (3, None, 3), 11), ("gemma2_untied", (3, 2, 3), 6)),
)
def test_a_position_depends_on_those_it_may_see_and_on_no_other(name, windows, reach):
    """By gradient. Three layers of windows 3, 2, 3 see 1 + 2 + 1 + 2 positions."""
    model = change(load(name)[0], windows=windows)
    mesh = make_mesh(1, 1)
    tokens = jnp.arange(20, 31)[None]  # all differ: row 20 + i of the table is position i's alone

    def state(embed, model, position):
        model = eqx.tree_at(lambda model: model.embed, model, embed)
        return jnp.sum(forward.final_states(model, tokens)[0, position] * jnp.arange(1.0, 25.0))

    layout = specs(model, mesh)
    gradient = shard_map(
        jax.vmap(jax.grad(state), in_axes=(None, None, 0)),
        mesh=mesh,
        in_specs=(layout.embed, layout, P()),
        out_specs=P(None, *layout.embed),
    )
    found = np.abs(jax.jit(gradient)(model.embed, model, jnp.arange(11))[:, 20:31]).max(-1) > 0
    distance = np.arange(11)[:, None] - np.arange(11)
    np.testing.assert_array_equal(found, (distance >= 0) & (distance < reach))


@pytest.mark.parametrize(
    "window, start, picture",
    (
        (10**9, 0, "#..... ##.... ###... ####.. #####. ######"),
        (3, 0, "#..... ##.... ###... .###.. ..###. ...###"),
        (1, 0, "#..... .#.... ..#... ...#.. ....#. .....#"),
        (2, 3, "..##.. ...##. ....##"),  # queries at positions 3, 4, 5 of a cache
    ),
)
def test_what_a_query_sees(window, start, picture):
    rows = picture.split()
    q = jax.random.normal(jax.random.key(0), (1, len(rows), 1, 6))
    k = jax.random.normal(jax.random.key(1), (1, 6, 1, 6))
    one_hot = jnp.eye(6)[None, :, None]
    positions = start + jnp.arange(len(rows))[None]
    weights = np.asarray(attend(q, k, one_hot, positions, jnp.array(window), 1.0, None))[0, :, 0]
    assert ["".join(".#"[int(weight > 0)] for weight in row) for row in weights] == rows
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_attention_against_loops():
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(2, 7, heads, 4)) for heads in (6, 2, 2))
    expected = np.zeros_like(q)
    for row in range(2):
        for time in range(7):
            for head in range(6):
                seen = range(max(0, time - 2), time + 1)
                scores = np.array([0.7 * q[row, time, head] @ k[row, key, head // 3] for key in seen])
                weights = np.exp(1.5 * np.tanh(scores / 1.5))
                expected[row, time, head] = sum(
                    weight * v[row, key, head // 3] for weight, key in zip(weights / weights.sum(), seen)
                )
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):
        found = attend(q, k, v, jnp.arange(7)[None], jnp.array(3), 0.7, 1.5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_rope_against_loops():
    """Channel pair (i, i + half) as a complex number, turned by position * frequency."""
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = random.integers(0, 50, (2, 5)).astype(np.int32)
    frequencies = np.array([1.0, 0.3, 0.1, 0.02], np.float32)
    expected = np.zeros_like(x)
    for row, time, head, pair in np.ndindex(2, 5, 3, 4):
        angle = float(positions[row, time]) * float(frequencies[pair])
        turned = complex(x[row, time, head, pair], x[row, time, head, pair + 4]) * np.exp(1j * angle)
        expected[row, time, head, pair], expected[row, time, head, pair + 4] = turned.real, turned.imag
    rotation = layers.rotation(jnp.asarray(positions), frequencies, 1.5, FLOAT32)
    found = layers.rotate(jnp.asarray(x), rotation)
    np.testing.assert_allclose(found, 1.5 * expected, atol=1e-5)


@pytest.mark.parametrize("name", ("llama3", "gemma3"))
def test_sines_are_computed_before_the_layers(name):
    """Once for each distinct rotary embedding, in the trunk and again in the tail; not in the scan over the blocks."""
    model = load(name)[0]
    layout = specs(model, make_mesh(1, 1))
    mapped = shard_map(forward.logits, make_mesh(1, 1), in_specs=(layout, ROWS), out_specs=P("fsdp", None, "tp"))
    program = jax.make_jaxpr(mapped)(model, np.zeros((2, 11), np.int32)).jaxpr
    inside = [
        e for scan in equations(program) if scan.primitive.name == "scan" for e in equations(scan.params["jaxpr"].jaxpr)
    ]
    assert {"mul", "dot_general"} <= {e.primitive.name for e in inside}  # the walk sees the blocks
    assert "sin" not in {e.primitive.name for e in inside}
    sines = sum(e.primitive.name == "sin" for e in equations(program))
    assert sines == 2 * len(model.config.ropes) == {"llama3": 2, "gemma3": 4}[name]


def on_one_device(function, *arguments):
    """`function` inside a `shard_map` of one device."""
    mapped = shard_map(function, make_mesh(1, 1), in_specs=tuple(P() for _ in arguments), out_specs=P())
    return mapped(*arguments)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_a_projection_and_its_gradients_are_rounded_once(dtype):
    random = np.random.default_rng(0)
    x, weight, pull = (
        jnp.asarray(random.normal(size=size), dtype) for size in ((2, 50, 40), (40, 3, 20), (2, 50, 3, 20))
    )

    def both(x, weight, pull):
        out, back = jax.vjp(layers.project, x, weight)
        return out, *back(pull)

    with jax.default_matmul_precision("highest"):
        found = on_one_device(both, x, weight, pull)
    wide = [np.asarray(value.astype(jnp.float32), np.float64) for value in (x, weight, pull)]
    expected = [
        np.einsum(pattern, left, right)
        for pattern, left, right in (
            ("bte,ehd->bthd", wide[0], wide[1]),
            ("bthd,ehd->bte", wide[2], wide[1]),
            ("bte,bthd->ehd", wide[0], wide[2]),
        )
    ]
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == dtype
        rtol, atol = (2**-8, 1e-5) if dtype == jnp.bfloat16 else (1e-5, 1e-5)
        np.testing.assert_allclose(value.astype(jnp.float32), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_what_is_saved_is_not_computed_again(dtype):
    """Three products of a projection under remat "dots", four under "full".

    Those for a CPU give float32 numbers. One of bfloat16 stands in the program once more, for other platforms.
    """

    def products(remat):
        def loss(x, weight):
            body = transformer.checkpointed(lambda x: jnp.sin(layers.project(x, weight)), remat)
            return jnp.sum(body(x).astype(jnp.float32))

        x, weight = jnp.ones((1, 5, 4), dtype), jnp.ones((4, 3), dtype)
        gradient = jax.grad(loss, argnums=(0, 1))
        program = jax.make_jaxpr(lambda *arguments: on_one_device(gradient, *arguments))(x, weight)
        found = [e.outvars[0].aval.dtype for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
        assert set(found) == {jnp.dtype(jnp.float32), jnp.dtype(dtype)}
        assert len(set(map(found.count, found))) == 1
        return found.count(jnp.float32)

    assert (products("dots"), products("full")) == (3, 4)


@pytest.mark.parametrize("plus_one", (False, True))
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_rms_norm_against_loops(plus_one, dtype):
    random = np.random.default_rng(0)
    x, weight = (jnp.asarray(3 * random.normal(size=size), dtype) for size in ((2, 3, 6), (6,)))
    found = layers.rms_norm(x, weight, 0.1, plus_one)
    assert found.dtype == dtype
    for row, time in np.ndindex(2, 3):
        values = [float(value) for value in x[row, time]]
        root = (sum(value * value for value in values) / 6 + 0.1) ** 0.5
        expected = [value / root * (float(w) + plus_one) for value, w in zip(values, weight)]
        rtol = 1e-6 if dtype == jnp.float32 else 2**-8  # float32 inside: one rounding at the end
        np.testing.assert_allclose(found[row, time].astype(jnp.float32), expected, rtol=rtol)


def test_softcap():
    x = jnp.array([-1e3, -1.0, 0.0, 0.5, 1e3])
    np.testing.assert_allclose(layers.softcap(x, 2.0), 2 * np.tanh(np.asarray(x) / 2), rtol=1e-6)
    assert layers.softcap(x, None) is x

"""Costs against counts by hand, by XLA, and of the programs that they are said of."""

import dataclasses
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward import tokens_of
from jax import lax
from jax.experimental import pallas as pl

import train
from benchmarks import roofline
from minalm import batches
from minalm.errors import InputError
from minalm.huggingface.configs import known_config
from minalm.models import attention, transformer
from minalm.models.config import Llama3Scaling, ModelConfig, Rope
from minalm.models.contract import read
from minalm.models.head import PrefixTree, VocabularyMask
from minalm.parallel.mesh import ROWS, P, make_mesh, shard_map, shard_shapes, specs
from minalm.run import console, estimate
from minalm.run import models as run_models
from minalm.run.models import load_models, model_shapes, with_prefixes
from minalm.tokenization.pair_bias import PairBias, UnbiasedEnds

WINDOWED = ModelConfig(
    vocab_size=60, embed=40, mlp=36, layers=3, heads=8, kv_heads=4, head_dim=6, windows=(3, None, 3), tied=False
)
TEACHER = dataclasses.replace(WINDOWED, vocab_size=64, layers=2, windows=(None, None), tied=True)


def shaped(*shape: int, dtype: type = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def flops_of(function, *arguments, platform: str = "cpu") -> float:
    return estimate.product_flops(jax.make_jaxpr(function)(*arguments).jaxpr, platform)


# --- chips --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, count",
    [
        ("v4:2x2x4", 3),  # a corner: one neighbour along each dimension
        ("v4:4x4x4", 6),
        ("v5p:4x4x8", 6),
        ("v5p:2x4x4", 3),  # not of whole cubes: rows, no rings
        ("v4:2x2x1", 2),
        ("v4:1x1x1", 0),
        ("v5e:4x4", 2),
        ("v5e:4x16", 3),
        ("v6e:16x16", 4),
    ],
)
def test_links_of_the_chip_that_has_the_fewest(name, count):
    assert sum(roofline.links(estimate.parse_topology(name))) == count


@pytest.mark.parametrize(
    "name", ["", "v4", "v4:", "v4:2x2", "v5e:2x2x4", "v9:2x2", "cpu", "cpu:2x2", "cpu:0", "v4:axb"]
)
def test_unknown_topologies_are_one_sentence(name):
    with pytest.raises(InputError, match="give one like v4:2x2x4") as error:
        estimate.parse_topology(name)
    assert f"--compile-only {name} is no topology" in str(error.value)


# --- the model's own FLOPs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, parameters, flops", [
    ("gemma2-2b-it-byte", 2_614_341_888, 9.26e14),
    ("llama3.2-3b-it-byte", 3_212_749_824, 1.285e15),
    ("smollm2-135m-byte", 134_515_008, None),
])  # fmt: skip
def test_headline_models(preset, parameters, flops):
    config = train.PRESETS[preset][1]
    models = model_shapes(config.student, 2048, 0)
    student, teacher = models.student.model, models.teacher.model
    assert sum(leaf.size for leaf in jax.tree.leaves(teacher)) == parameters
    assert student.config.vocab_size == 320 and student.expansion.shape == teacher.embed.shape
    if flops is not None:
        found = estimate.model_flops(student.config, teacher.config, 32, 2048, 512)
        assert found == pytest.approx(flops, rel=1e-3)


PUBLISHED = {  # of models on the hub, as their config.json has them
    "google/gemma-2-2b-it": ModelConfig(
        vocab_size=256_000,
        embed=2304,
        mlp=9216,
        layers=26,
        heads=8,
        kv_heads=4,
        head_dim=256,
        windows=(4096, None) * 13,
        query_scale=256**-0.5,
        attention_softcap=50.0,
        final_softcap=30.0,
        norm_eps=1e-6,
        norm_plus_one=True,
        post_norms=True,
        activation="gelu_tanh",
        embedding_scale=math.sqrt(2304),
        model_type="gemma2",
    ),
    "meta-llama/Llama-3.2-3B-Instruct": ModelConfig(
        vocab_size=128_256,
        embed=3072,
        mlp=8192,
        layers=28,
        heads=24,
        kv_heads=8,
        head_dim=128,
        windows=(None,) * 28,
        rope=Rope(500_000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
        model_type="llama",
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ModelConfig(
        vocab_size=49_152,
        embed=576,
        mlp=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        windows=(None,) * 30,
        rope=Rope(100_000.0),
        model_type="llama",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_configs(name):
    assert known_config(name) == PUBLISHED[name]
    assert known_config(f"{name}-other") is None


def test_forward_flops_by_counting_every_product():
    config, batch, time = WINDOWED, 2, 11
    multiplications = 0
    for window in config.windows:
        for query in range(time):
            for out in (config.heads, config.kv_heads, config.kv_heads):
                multiplications += config.embed * out * config.head_dim
            seen = [key for key in range(time) if key <= query and query - key < (window or time)]
            multiplications += 2 * len(seen) * config.heads * config.head_dim
            multiplications += config.heads * config.head_dim * config.embed + 3 * config.embed * config.mlp
    multiplications += time * config.embed * config.vocab_size
    assert estimate.forward_flops(config, batch, time) == 2 * batch * multiplications


def test_forward_flops_are_those_of_the_model():
    """The model's plain attention computes what the mask hides too; all else is equal."""
    batch, time, mesh = 4, 11, make_mesh(2, 2)

    def forward(model, inputs, mask):
        return read(model, mask, tokens_of(inputs), jnp.dtype(jnp.float32)).stats.logp

    model = transformer.abstract(WINDOWED)
    mask = VocabularyMask(np.ones(60, bool), np.ones(60, bool))
    mapped = shard_map(forward, mesh=mesh, in_specs=(specs(model, mesh), ROWS, specs(mask, mesh)), out_specs=ROWS)
    found = 4 * flops_of(mapped, model, shaped(batch, time, dtype=jnp.int32), mask)
    pairs = sum(sum(min(query + 1, window or time) for query in range(time)) for window in WINDOWED.windows)
    hidden = 4 * batch * WINDOWED.heads * WINDOWED.head_dim * (3 * time * time - pairs)
    assert found == estimate.forward_flops(WINDOWED, batch, time) + hidden


# --- FLOPs of a jaxpr ---------------------------------------------------------------------------------------------

PRODUCT = 2 * 4 * 8 * 8  # [4, 8] by [8, 8]


def test_products_in_loops_conditions_and_recomputation():
    x, w = shaped(4, 8), shaped(8, 8)

    def scanned(x, w):
        return lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    def nested(x, w):
        return lax.map(lambda _: scanned(x, w), jnp.arange(3))

    def branches(x, w):
        return lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    def recomputed(x, w):
        layer = jax.checkpoint(lambda x: jnp.sin(x @ w) @ w, policy=jax.checkpoint_policies.nothing_saveable)
        return lax.scan(lambda x, _: (layer(x), None), x, length=5)[0].sum()

    assert flops_of(lambda x, w: x @ w, x, w) == PRODUCT
    assert flops_of(jax.jit(scanned), x, w) == 5 * PRODUCT
    assert flops_of(nested, x, w) == 15 * PRODUCT
    assert flops_of(branches, x, w) == 2 * PRODUCT
    # two products forward, one of them again, and two for each backward; the last product is not needed again
    assert flops_of(jax.grad(recomputed, (0, 1)), x, w) == 5 * (2 + 1 + 4) * PRODUCT
    assert flops_of(lambda x: jnp.einsum("bqd,bkd->bqk", x, x), shaped(3, 5, 7)) == 2 * 3 * 5 * 5 * 7


def test_products_on_each_device():
    mesh = make_mesh(4, 2)
    product = shard_map(
        lambda x, w: lax.psum(x @ w, "tp"), mesh=mesh, in_specs=(P("fsdp", "tp"), P("tp")), out_specs=P("fsdp")
    )
    assert flops_of(jax.jit(product), shaped(16, 8), shaped(8, 8)) == 2 * (16 / 4) * (8 / 2) * 8


def test_products_of_a_platform_and_of_a_kernel():
    x, w = shaped(4, 8), shaped(8, 8)

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def tiled(x, w):
        row = pl.BlockSpec((1, 8), lambda i: (i, 0))
        whole = pl.BlockSpec((8, 8), lambda i: (0, 0))
        return pl.pallas_call(
            kernel, grid=(4,), in_specs=[row, whole], out_specs=row, out_shape=shaped(4, 8), interpret=True
        )(x, w)

    def by_platform(x, w):
        return lax.platform_dependent(x, w, tpu=tiled, default=lambda x, w: x @ w @ w @ w)

    def trained(x, w):
        def body(x, _):
            return lax.platform_dependent(x, tpu=lambda x: x @ w, default=lambda x: jnp.sin(x @ w) @ w), None

        return lax.scan(jax.checkpoint(body), x, length=5)[0].sum()

    assert flops_of(tiled, x, w) == PRODUCT
    assert flops_of(by_platform, x, w, platform="tpu") == PRODUCT
    assert flops_of(by_platform, x, w, platform="cpu") == 3 * PRODUCT
    assert flops_of(jax.grad(trained, (0, 1)), x, w, platform="tpu") == 5 * 3 * PRODUCT
    assert flops_of(jax.grad(trained, (0, 1)), x, w, platform="cpu") == 5 * (2 + 1 + 4) * PRODUCT


@pytest.mark.parametrize("time, window", ((512, None), (2048, None), (2048, 4096)))
def test_products_of_the_attention_kernel(time, window):
    def loss(q, k, v):
        out = attention.self_attention(
            q, k, v, np.array(2**30, np.int32), (window, None), 1.0, 50.0, None, "kernel_interpreted"
        )
        return jnp.sum(out.astype(jnp.float32))

    q, k = (shaped(2, time, heads, 64, dtype=jnp.bfloat16) for heads in (4, 2))
    forward, backward = attention.kernel_flops(2, time, 4, 64, window)
    row_sums = 2 * q.size  # of the output times its gradient, outside of the kernel
    assert flops_of(loss, q, k, k, platform="tpu") == forward
    assert flops_of(jax.grad(loss, (0, 1, 2)), q, k, k, platform="tpu") == forward + backward + row_sums


def test_products_in_a_loop_of_unknown_length():
    with pytest.raises(ValueError, match="not known"):
        flops_of(lambda x: lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x), shaped(8, 8))


def test_products_are_what_xla_counts_in_an_unrolled_program():
    def loss(x, ws, unroll):
        return lax.scan(lambda x, w: (x @ w, None), x, ws, unroll=unroll)[0].sum()

    arguments = shaped(64, 96), shaped(6, 96, 96)
    compiled = jax.jit(jax.value_and_grad(lambda x, ws: loss(x, ws, 6), (0, 1))).lower(*arguments).compile()
    found = flops_of(jax.grad(lambda x, ws: loss(x, ws, 1), (0, 1)), *arguments)
    assert found == pytest.approx(compiled.cost_analysis()["flops"], rel=0.01)
    assert found == 2 * 64 * 96 * 96 * (6 + 12)


# --- compiled programs --------------------------------------------------------------------------------------------

ROUNDS = 5


@pytest.mark.parametrize(
    "kind, axis, function, factor",
    [
        ("all-gather", "fsdp", lambda x: lax.all_gather(x, "fsdp", tiled=True)[: x.shape[0]], 3),
        ("all-gather", "tp", lambda x: lax.all_gather(x, "tp", tiled=True)[: x.shape[0]], 1),
        ("reduce-scatter", "fsdp", lambda x: jnp.tile(lax.psum_scatter(x, "fsdp", tiled=True), (4, 1)), 3 / 4),
        ("all-reduce", "fsdp", lambda x: lax.psum(x, "fsdp"), 2 * 3 / 4),
        ("all-reduce", "tp", lambda x: lax.psum(x, "tp"), 2 * 1 / 2),
        ("all-to-all", "fsdp", lambda x: lax.all_to_all(x, "fsdp", 0, 0, tiled=True), 3 / 4),
        ("collective-permute", "fsdp", lambda x: lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), 1),
    ],
)
def test_messages_in_a_loop(kind, axis, function, factor):
    """Each sends on 4 x 2 devices, of 16 x 32 float32, what a ring over its axis sends; once outside of the loop too."""

    def looped(x):
        def once(x):
            return jnp.sin(function(x)) * x

        return lax.scan(lambda x, _: (once(x), None), once(x), length=ROUNDS)[0]

    mapped = jax.shard_map(
        looped, mesh=make_mesh(4, 2), in_specs=P("fsdp", "tp"), out_specs=P("fsdp", "tp"), check_vma=False
    )
    program = roofline.parse_program(jax.jit(mapped).lower(shaped(64, 64)).compile().as_text())
    sent = {name: size for name, size in roofline.traffic(program).sent.items() if size}
    assert sent == {kind: (ROUNDS + 1) * factor * 16 * 32 * 4}
    assert roofline.traffic(program, trips=False).sent[kind] == 2 * factor * 16 * 32 * 4


def layers(rounds: int) -> tuple[roofline.Program, float]:
    """Forward and backward of some layers, fsdp x tp, and the compiler's own count of the bytes."""

    def loss(x, ws):
        def body(x, w):
            up, down = (lax.all_gather(part, "fsdp", axis=axis, tiled=True) for axis, part in enumerate(w))
            return x + lax.psum(jnp.tanh(x @ up) @ down, "tp"), None

        return lax.psum(lax.scan(body, x, ws)[0].sum(), "fsdp")

    weights = (P(None, "fsdp", "tp"), P(None, "tp", "fsdp"))
    mapped = shard_map(
        jax.grad(loss, argnums=1), mesh=make_mesh(4, 2), in_specs=(P("fsdp"), weights), out_specs=weights
    )
    shapes = shaped(64, 64), (shaped(rounds, 64, 128), shaped(rounds, 128, 64))
    compiled = jax.jit(mapped).lower(*shapes).compile()
    return roofline.parse_program(compiled.as_text()), compiled.cost_analysis()["bytes accessed"]


def test_memory_is_what_xla_counts_when_loops_count_once():
    program, counted = layers(6)
    assert roofline.traffic(program, trips=False, fast=True).memory == pytest.approx(counted, rel=0.03)


def test_memory_and_messages_grow_with_the_rounds():
    of = {rounds: roofline.traffic(layers(rounds)[0]) for rounds in (4, 6, 8)}
    assert of[8].memory - of[6].memory == pytest.approx(of[6].memory - of[4].memory, rel=1e-3)
    assert of[6].memory > 1.3 * of[4].memory
    for rounds, found in of.items():
        one = 64 * 64 * 4  # a matrix on a device, whole over fsdp
        assert found.sent["all-gather"] == rounds * 2 * 3 / 4 * one  # forward; scan keeps them for the backward pass
        assert found.sent["reduce-scatter"] == rounds * 2 * 3 / 4 * one


def test_a_loop_that_reads_slices_reads_the_whole_once():
    size = 64 * 1024
    function = jax.jit(lambda xs: lax.scan(lambda total, x: (total + jnp.sin(x), None), jnp.zeros(1024), xs)[0])
    program = roofline.parse_program(function.lower(shaped(64, 1024)).compile().as_text())
    assert 4 * size < roofline.traffic(program).memory < 4 * 6 * size


HAND_WRITTEN = """\
HloModule step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%reduced (p: bf16[128,256]) -> bf16[16,256] {
  %p.1 = bf16[128,256]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[128,256]{1,0:T(8,128)(2,1)} all-reduce(%p.1), replica_groups=[1,8]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = bf16[16,256]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={16,256}
}

%condition (c: (s32[], bf16[128,256])) -> pred[] {
  %c = (s32[], bf16[128,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %last = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%i, %last), direction=LT
}

%body (d: (s32[], bf16[128,256])) -> (s32[], bf16[128,256]) {
  %d = (s32[], bf16[128,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %j = s32[] get-tuple-element(%d), index=0
  %x = bf16[128,256]{1,0:T(8,128)(2,1)} get-tuple-element(%d), index=1
  %all-gather-start.1 = (bf16[16,256]{1,0}, bf16[128,256]{1,0}) all-gather-start(%fused), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={op_name="a (b) {c}"}
  %all-gather-done.1 = bf16[128,256]{1,0} all-gather-done(%all-gather-start.1)
  %fused = bf16[16,256]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%reduced, backend_config={"name":"all-reduce-scatter"}
  %quick = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %next = (s32[], bf16[128,256]{1,0}) tuple(%j, %all-gather-done.1)
}

ENTRY %main (q: bf16[128,256]) -> bf16[128,256] {
  %q = bf16[128,256]{1,0:T(8,128)(2,1)} parameter(0)
  %copy-start = (bf16[128,256]{1,0:T(8,128)(2,1)S(1)}, bf16[128,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%q)
  %copy-done = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %start = s32[] constant(0)
  %state = (s32[], bf16[128,256]{1,0}) tuple(%start, %copy-done)
  %loop = (s32[], bf16[128,256]{1,0:T(8,128)(2,1)}) while(%state), condition=%condition, body=%body
  ROOT %result = bf16[128,256]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_the_forms_of_a_tpu_program():
    """Rounds from a condition, pairs of start and done, a reduce-scatter inside of a fusion, fast memory, padding."""
    whole, part = 128 * 256 * 2, 16 * 256 * 2
    text = HAND_WRITTEN.replace("%fused = ", "%all-reduce-scatter.3 = ").replace("(%fused)", "(%all-reduce-scatter.3)")
    found = roofline.traffic(roofline.parse_program(text))
    sent = {name: size for name, size in found.sent.items() if size}
    assert sent == {"all-gather": 7 * 3 * part, "reduce-scatter": 7 * whole * 7 / 8}
    # the copy reads what is in HBM; a round reads and writes in the fusion, and in the gather
    assert found.memory == pytest.approx(whole + 7 * (whole + part + part + whole), rel=0.01)
    plain = roofline.traffic(roofline.parse_program(HAND_WRITTEN))
    assert plain.sent["all-reduce"] == 7 * 2 * whole * 7 / 8 and plain.sent["reduce-scatter"] == 0
    fast = roofline.traffic(roofline.parse_program(text), fast=True)
    assert fast.memory - found.memory == whole

    narrow = "ROOT %result = f32[10,100]{1,0:T(8,128)} copy(%q.1)\n"
    narrow = f"ENTRY %main (q: f32[10,100]) -> f32[10,100] {{\n  %q.1 = f32[10,100]{{1,0}} parameter(0)\n  {narrow}}}\n"
    found = roofline.traffic(roofline.parse_program("HloModule one\n\n" + narrow))
    assert found.memory == 4 * (10 * 100 + 16 * 128)

    with pytest.raises(ValueError, match="%loop does not say"):
        roofline.traffic(roofline.parse_program(text.replace("constant(7)", "parameter(1)")))
    with pytest.raises(ValueError, match="not the text"):
        roofline.parse_program("HloModule nothing\n")


def test_memory_counts_donated_arrays_once():
    mesh = make_mesh(4, 2)
    x, y = (shard_shapes(Table(shaped(64, 32)), mesh) for _ in range(2))
    step = jax.jit(lambda x, y: jax.tree.map(lambda x, y: x + y, x, y), donate_argnums=0)
    found = estimate.memory({"one": x, "two": y}, step.lower(x, y).compile().memory_analysis())
    assert found["one"] == found["two"] == 64 * 32 * 4 / 8
    assert found["padding and results"] == 0 and sum(found.values()) < 3 * 64 * 32 * 4 / 8


def test_groups_of_devices():
    def groups(text: str) -> roofline.Groups:
        program = roofline.Program({}, {}, "%main", 4)
        return roofline._groups(program, roofline.Instruction("%a", (), "all-reduce", (), None, text))

    assert groups("replica_groups={{0,2},{1,3}}, dimensions={0}") == ((0, 2), (1, 3))
    assert groups("source_target_pairs={{0,1},{1,0}}") == ((0, 1), (1, 0))
    assert groups("replica_groups=[2,2]<=[4]") == ((0, 1), (2, 3))
    assert groups("replica_groups=[2,2]<=[2,2]T(1,0)") == ((0, 2), (1, 3))
    assert groups("replica_groups=mesh['fsdp'=2,'tp'=2] {'fsdp'}, dimensions={0}") == ((0, 2), (1, 3))
    assert groups("replica_groups=mesh['fsdp'=2,'tp'=2] {'tp'}") == ((0, 1), (2, 3))
    assert groups("replica_groups=mesh['fsdp'=2,'tp'=2] {'fsdp','tp'}") == ((0, 1, 2, 3),)
    with pytest.raises(ValueError, match="unknown form"):
        groups("replica_groups=something")
    assert groups("dimensions={0}") == ((0, 1, 2, 3),)


def test_the_network_bound_is_per_axis():
    """On 2 x 2 x 4 chips of one link along each axis, x is used by tp alone: it cannot lend its bytes to other links."""
    topology, rate = estimate.parse_topology("v4:2x2x4"), 4.5e10
    coordinates = [(x, y, z) for z in range(4) for y in range(2) for x in range(2)]
    tp = tuple((i, i + 1) for i in range(0, 16, 2))
    fsdp = (tuple(range(0, 16, 2)), tuple(range(1, 16, 2)))
    everything = (tuple(range(16)),)
    assert [sorted(roofline.spanned(g, coordinates)) for g in (tp, fsdp, everything)] == [[0], [1, 2], [0, 1, 2]]

    def bound(**sent: float) -> float:
        who = {"tp": tp, "fsdp": fsdp, "everything": everything}
        messages = {("all-reduce", who[name]): size for name, size in sent.items()}
        return roofline.network_bound(roofline.Traffic(0.0, messages), topology, coordinates)

    assert bound() == 0.0
    assert bound(tp=4.77e9, fsdp=8e9) == pytest.approx(4.77e9 / rate)
    assert bound(tp=1e9, fsdp=8e9) == pytest.approx(8e9 / (2 * rate))
    assert bound(tp=1e9, fsdp=2e9, everything=6e9) == pytest.approx(9e9 / (3 * rate))


# --- what fsdp x tp must send -------------------------------------------------------------------------------------


def test_least_messages_by_hand():
    student = dataclasses.replace(WINDOWED, expansion_size=64)
    model, teacher, mesh = transformer.abstract(student), transformer.abstract(TEACHER), make_mesh(4, 2)
    trained = train.eqx.tree_at(lambda model: model.expansion, model, None)
    found = roofline.least_sent(model, trained, teacher, mesh, 8, 16, 12, tail_gradients=3, width=2)

    layer = (40 * 8 * 6 * 2 + 40 * 4 * 6 * 2 + 3 * 40 * 36) // 2  # on one of two devices of tp
    gathered = (2 * 2 + 1) * layer + 60 * 40 // 2 + 2 * layer + 64 * 40 // 2
    ids = 2 * 16 * 2 + 2 * 12  # rows of a device, times tokens, times tables
    assert found["all-gather"] == pytest.approx(3 / 4 * 2 * gathered + 3 * 4 * ids)
    assert found["reduce-scatter"] == pytest.approx(3 / 4 * 2 * ((2 + 3) * layer + 60 * 40 // 2))
    assert found["all-to-all"] == pytest.approx(3 / 4 * 2 * 40 * (2 * 16 * 3 + 2 * 12))
    activation = 2 * 40 * 2
    reduces = activation * (16 * (3 * 2 + 2 * 2 + 3 * 3 + 2) + 12 * (2 * 2 + 1))
    norms = (3 * 2 + 1) * 40 * 2 * 2 * 7 / 8
    assert found["all-reduce"] == pytest.approx(reduces + norms)


# --- the program --------------------------------------------------------------------------------------------------


class Table(train.eqx.Module):
    rows: jax.Array | jax.ShapeDtypeStruct = train.eqx.field(metadata={"layout": ("fsdp", "tp")})


SMALL = ["--batch-size", "8", "--student-length", "64", "--teacher-length", "32", "--piece-bytes", "64"]


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as error:
        train.cli([*words])
    assert isinstance(error.value.code, str) and error.value.code.startswith("error: ")
    assert capsys.readouterr().out == "" and error.value.code.count("\n") == 0
    return error.value.code


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """The program in a process of its own, without the devices of these tests."""
    settings = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | environment
    program = Path(train.__file__)
    return subprocess.run(
        [sys.executable, program, *words],
        cwd=folder,
        env=settings | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )


@pytest.mark.slow
def test_compilation_for_cpu_devices(tmp_path):
    done = run(tmp_path, "quickstart", "--compile-only", "cpu:8", "--mesh.fsdp", "4", "--mesh.tp", "1", *SMALL)
    assert (done.returncode, done.stderr) == (0, "") and list(tmp_path.iterdir()) == []
    for row in ("4 x 1", "trained parameters", "optimizer", "batch", "temporaries", "FLOPs"):
        assert row in done.stdout
    assert "bound by" not in done.stdout and "cpu:8" in done.stdout


def test_shapes_are_those_of_a_run(monkeypatch):
    config = train.PRESETS["quickstart"][1]
    data, mesh = dataclasses.replace(config.data, batch_size=8), make_mesh(4, 1)
    models = load_models(config.student, data.student_length, 0)
    monkeypatch.setattr(run_models, "known_config", {"org/name": models.teacher.model.config}.get)
    by_name = model_shapes(dataclasses.replace(config.student, teacher=Path("org/name")), data.student_length, 0)
    for ours, theirs in ((by_name.student.model, models.student.model), (by_name.teacher.model, models.teacher.model)):
        assert ours.config == theirs.config
        assert jax.tree.map(lambda leaf: leaf.shape, ours) == jax.tree.map(lambda leaf: leaf.shape, theirs)
    sides = [
        batches.Side(model.vocabulary, model.suffixes, length)
        for model, length in ((models.student, data.student_length), (models.teacher, data.teacher_length))
    ]
    nothing = np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1), np.zeros(1), np.ones(1, np.int64)
    unbiased = sides[1]._replace(unbiased=UnbiasedEnds(PairBias(*nothing), 0.0))
    without = dataclasses.replace(models, teacher=None)
    for teacher, loaded in ((sides[1], models), (unbiased, models), (None, without)):
        batch = batches.make_batch([()] * 8, sides[0], teacher)
        shapes = estimate.batch_shapes(data, loaded, mesh, teacher is unbiased)
        described = [jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype)), tree) for tree in (batch, shapes)]
        assert described[0] == described[1]


def test_unbiased_chunks_are_compiled_without_their_file(monkeypatch):
    traced = []
    monkeypatch.setattr(estimate, "topology_devices", lambda topology: jax.devices())
    monkeypatch.setattr(estimate, "estimate", lambda step, arguments, *others: traced.append(step.trace(*arguments)))
    monkeypatch.setattr(console, "show_estimate", lambda found: None)
    losses = ["--losses.next-byte", "0", "--losses.alm", "1", "--losses.chunks", "unbiased"]
    train.cli(["quickstart", *SMALL, "--mesh.fsdp", "8", "--compile-only", "v4:2x2x2", *losses])
    assert len(traced) == 1


def bytes_on_a_device(model, devices: int) -> float:
    """Of float32 parameters of which all but norms are divided over the devices."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return sum(4 * leaf.size / (1 if "norm" in jax.tree_util.keystr(path) else devices) for path, leaf in leaves)


def test_an_estimate_of_a_step(monkeypatch, capsys):
    """A small run on the 8 devices of these tests, which are said to be chips; then chips that are too small for it."""
    topology, shown = estimate.parse_topology("v4:2x2x2"), []
    monkeypatch.setattr(estimate, "topology_devices", lambda topology: jax.devices())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "show_estimate", shown.append)
        mesh = ["--mesh.fsdp", "8", "--mesh.tp", "1", "--remat", "dots"]
        train.cli(["quickstart", *SMALL, *mesh, "--compile-only", "v4:2x2x2"])
    (found,) = shown
    assert found.topology == topology and dict(found.mesh.shape) == {"fsdp": 8, "tp": 1} and found.steps == 1500
    config = train.PRESETS["quickstart"][1].student
    models = model_shapes(config, 64, 0)
    student, teacher = models.student.model, models.teacher.model
    assert found.memory["trained parameters"] == bytes_on_a_device(student, 8)  # the expansion is trained too
    assert found.memory["optimizer"] == 2 * bytes_on_a_device(student, 8) + 2 * 4  # and two counts of steps
    losses = train.PRESETS["quickstart"][1].losses
    tree = PrefixTree.of(with_prefixes(models, losses).prefixes)  # whole on each device
    entries = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert found.memory["teacher and other frozen"] == pytest.approx(bytes_on_a_device(teacher, 8) + entries, rel=0.05)
    assert 1.0 < 8 * found.flops / found.model_flops < 2.0
    assert found.compute_bound == found.flops / 275e12
    moved = roofline.traffic(roofline.parse_program(found.compiled.as_text()))
    least = roofline.least_sent(student, student, teacher, found.mesh, 8, 64, 32, tail_gradients=2, width=4)
    for kind in ("all-gather", "all-to-all"):
        assert moved.sent[kind] == pytest.approx(least[kind], rel=0.1)
    console.show_estimate(found)
    assert "bound by compute" in capsys.readouterr().out

    chip = dataclasses.replace(topology.chip, memory=sum(found.memory.values()) - 1)
    too_small = dataclasses.replace(found, topology=dataclasses.replace(topology, chip=chip))
    with pytest.raises(InputError, match=r"does not fit v4:2x2x2 as 8x1 \(a chip would need .*\): .* --batch-size"):
        too_small.check()


class OutOfMemory(jax.errors.JaxRuntimeError):
    error_code_string = "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize("kind, expected", [(OutOfMemory, InputError), (jax.errors.JaxRuntimeError,) * 2])
def test_a_compiler_that_runs_out_of_memory_is_one_sentence(kind, expected):
    class Step:
        def trace(self, *arguments):
            return self

        def lower(self):
            raise kind("RESOURCE_EXHAUSTED: Used 41.52G of 30.75G hbm.\nmore")

    topology = estimate.parse_topology("v4:2x2x2")
    nothing = train.State((), (), ()), (), ()
    with pytest.raises(expected) as error:
        estimate.estimate(Step(), nothing, topology, make_mesh(8, 1), 1.0, 1)
    if expected is InputError:
        start = "the run does not fit v4:2x2x2 as 8x1 (RESOURCE_EXHAUSTED: Used 41.52G of 30.75G hbm): use more chips"
        assert str(error.value).startswith(start) and "\n" not in str(error.value)


def test_bad_requests_are_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "v4:9 is no topology" in refused(capsys, "quickstart", "--compile-only", "v4:9")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'minalm[tpu]'" in refused(capsys, "quickstart", "--compile-only", "v4:2x2x4")
    monkeypatch.setattr(estimate, "topology_devices", lambda topology: jax.devices())
    words = ["gemma2-2b-it-byte", "--compile-only", "v4:2x2x2", "--mesh.fsdp", "4", "--mesh.tp", "2"]
    assert "without org/name the shapes" in refused(capsys, *words, "--teacher", "org/name")
    assert "name the folder" in refused(capsys, *words, "--student-tokenizer", "other")
    assert "needs 16 devices but there are 8" in refused(capsys, *words, "--mesh.fsdp", "8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real
def test_compilation_for_tpus(tmp_path):
    pytest.importorskip("libtpu")
    small = [*SMALL, "--batch-size", "16", "--mesh.fsdp", "8", "--mesh.tp", "1", "--compute-dtype", "bfloat16"]
    done = run(tmp_path, "quickstart", "--compile-only", "v4:2x2x4", *small)
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []
    for row in ("TPU v4", "30.75 GiB", "bound by compute", "1,500 steps"):
        assert row in done.stdout
    long = ["--batch-size", "2048", "--student-length", "2048", "--teacher-length", "512"]
    full = run(tmp_path, "quickstart", "--compile-only", "v5e:2x2", *long, "--mesh.fsdp", "4")
    assert full.returncode == 1 and re.match(
        r"error: the run does not fit v5e:2x2 as 4x1 \(RESOURCE_EXHAUSTED: .*15\.75G\)+: use more chips",
        full.stderr.splitlines()[-1],
    )
    parts = ["--batch-size", "16", "--accumulation", "2", "--compute-dtype", "bfloat16"]
    assert run(tmp_path, "quickstart-bolmo", "--compile-only", "v4:2x2x2", *parts).returncode == 0
    refusing = run(tmp_path, "quickstart", "--compile-only", "v4:3x3x3")
    assert refusing.returncode == 1 and "compiler refuses it" in refusing.stderr.splitlines()[-1]

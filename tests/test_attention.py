"""Attention of whole sequences: every form is the plain one in values and gradients, on a mesh too; none holds an array
of all queries and all keys; what a policy saves is not computed again; and the kernel compiles for a TPU."""

import functools
import math

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward import final_states, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import AxisType
from programs import equations

from minalm.models import attention, transformer
from minalm.models.attention import kernel_block, kernel_flops, self_attention
from minalm.models.config import ModelConfig
from minalm.parallel.collectives import fsdp_sum
from minalm.parallel.mesh import P, make_mesh, shard_map, specs

SCALE, CAP = 0.4, 5.0
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
    """cuDNN's form is tested though it is off."""
    monkeypatch.setattr(attention, "USE_CUDNN", True)


def plain(q, k, v, window, scale, cap, segments):
    """Attention by its definition, one query head at a time, with all scores at once."""
    time, group = q.shape[1], q.shape[2] // k.shape[2]
    at = np.arange(time)
    visible = (at[:, None] >= at) & (at[:, None] - at < window)
    visible = jnp.broadcast_to(visible, (q.shape[0], time, time))
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    mixed = []
    for head in range(q.shape[2]):
        keys, values = k[:, :, head // group], v[:, :, head // group]
        scores = scale * jnp.einsum("btd,bsd->bts", q[:, :, head], keys)
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        mixed.append(jnp.einsum("bts,bsd->btd", weights, values))
    return jnp.stack(mixed, axis=2)


def arrays(batch, time, heads, kv_heads, head_dim, segmented, seed=0):
    """q, k, v, a cotangent of the output, and segment ids (None: one segment). Scores are large enough for the cap."""
    random = np.random.default_rng(seed)
    q, k, v, out_grad = (
        jnp.asarray(random.normal(size=(batch, time, count, head_dim)), jnp.float32)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    segments = jnp.cumsum(random.random((batch, time)) < 4 / time, axis=1, dtype=jnp.int32) if segmented else None
    return 2.0 * q, 2.0 * k, v, out_grad, segments


def with_gradients(attend, q, k, v, out_grad):
    """(output, gradients of q, k, v)."""
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(out_grad)


def expected(q, k, v, out_grad, segments, window, cap):
    with jax.default_matmul_precision("highest"):
        return jax.jit(
            lambda *x: with_gradients(lambda *qkv: plain(*qkv, window, SCALE, cap, segments), *x),
            compiler_options=QUICK,
        )(q, k, v, out_grad)


def assert_near(found, wanted, tolerance=1e-5):
    """Differences relative to the largest magnitude."""
    for name, one, other in zip(("out", "q", "k", "v"), found, wanted, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert one.shape == other.shape and np.isfinite(one).all() and np.abs(other).max() > 0.1, name
        difference = np.abs(one - other).max() / np.abs(other).max()
        assert difference <= tolerance, (name, difference)


# --- each form is the plain one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("segmented", (False, True))
@pytest.mark.parametrize("form", ("kernel_interpreted", "blocks", None))
def test_every_form_on_a_mesh_is_the_plain_one(form, segmented):
    """Rows over `fsdp` and heads over `tp`; one window of a set, given as an array, so that the kernel switches."""
    *inputs, segments = arrays(2, 256, 4, 2, 16, segmented)
    rows, heads = P("fsdp"), P("fsdp", None, "tp")

    def on_device(q, k, v, out_grad, window, segments):
        attend = functools.partial(
            self_attention, window=window, windows=(100, None, 70), scale=SCALE, cap=CAP, segments=segments, form=form
        )
        return with_gradients(attend, q, k, v, out_grad)

    mapped = shard_map(
        on_device, mesh=make_mesh(2, 2), in_specs=(heads, heads, heads, heads, P(), rows), out_specs=heads
    )
    with jax.default_matmul_precision("highest"):
        found = jax.jit(mapped, compiler_options=QUICK)(*inputs, np.array(100, np.int32), segments)
    assert_near(found, expected(*inputs, segments, 100, CAP))


@pytest.mark.parametrize("form", ("kernel_interpreted", "blocks"))
def test_heads_over_tp_may_share_keys(form):
    """Where keys and values are the same on all devices of `tp`, their gradients are sums over these."""
    *inputs, segments = arrays(2, 128, 2, 1, 8, True)
    rows, heads = P("fsdp"), P("fsdp", None, "tp")

    def on_device(q, k, v, out_grad, segments):
        attend = functools.partial(
            self_attention,
            window=np.array(40, np.int32),
            windows=(40,),
            scale=SCALE,
            cap=None,
            segments=segments,
            form=form,
        )
        return with_gradients(attend, q, k, v, out_grad)

    mapped = shard_map(
        on_device,
        mesh=make_mesh(2, 2),
        in_specs=(heads, rows, rows, heads, rows),
        out_specs=(heads, heads, rows, rows),
    )
    with jax.default_matmul_precision("highest"):
        found = jax.jit(mapped, compiler_options=QUICK)(*inputs, segments)
    assert_near(found, expected(*inputs, segments, 40, None))


@pytest.mark.parametrize("form", ("kernel_interpreted", "blocks"))
def test_windows_that_vary_under_a_scan_over_layers(form):
    q, k, v, out_grad, _ = arrays(2, 256, 4, 2, 8, False)
    windows = (None, 30, 200, 30)

    def through_layers(attend):
        def stacked(q, k, v):
            return jax.lax.scan(lambda x, window: (attend(x, k, v, window), None), q, sizes)[0]

        return jax.jit(functools.partial(with_gradients, stacked), compiler_options=QUICK)(q, k, v, out_grad)

    sizes = np.array([2**30, 30, 200, 30], np.int32)
    with jax.default_matmul_precision("highest"):
        found = through_layers(lambda q, k, v, window: self_attention(q, k, v, window, windows, SCALE, CAP, None, form))
        wanted = through_layers(lambda q, k, v, window: plain(q, k, v, window, SCALE, CAP, None))
    assert_near(found, wanted)


@pytest.mark.parametrize("time", (1, 7, 129, 300, 1100))
def test_blocks_of_odd_lengths(time):
    """129 positions are 2 blocks with one row to fill up, 1100 are 9 blocks in 5 spans, the last of one block."""
    *inputs, segments = arrays(1, time, 2, 1, 4, time > 7)
    window = max(1, time // 2)
    attend = functools.partial(
        self_attention, window=np.array(window, np.int32), windows=(window,), scale=SCALE, cap=CAP, segments=segments
    )
    with jax.default_matmul_precision("highest"):
        found = jax.jit(functools.partial(with_gradients, attend), compiler_options=QUICK)(*inputs)
    wanted = expected(*inputs, segments, window, CAP)
    if time == 1:  # one position sees itself alone: no gradient reaches its query and its key
        assert not found[1].any() and not found[2].any()
        found, wanted = (*found[:1], inputs[0], inputs[1], found[3]), (*wanted[:1], inputs[0], inputs[1], wanted[3])
    assert_near(found, wanted)


@settings(max_examples=6, deadline=None)
@given(
    time=st.sampled_from((2, 5, 16, 131)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    window=st.integers(1, 140),
    segmented=st.booleans(),
    cap=st.sampled_from((None, 2.0)),
)
def test_blocks_of_any_shape(time, kv_heads, group, window, segmented, cap):
    *inputs, segments = arrays(2, time, kv_heads * group, kv_heads, 4, segmented)
    inputs[3] = 1.0 + inputs[3]
    attend = functools.partial(
        self_attention,
        window=jnp.array(window, jnp.int32),
        windows=(3, window),
        scale=SCALE,
        cap=cap,
        segments=segments,
    )
    with jax.default_matmul_precision("highest"):
        found = jax.jit(functools.partial(with_gradients, attend), compiler_options=QUICK)(*inputs)
    for one, other in zip(found, expected(*inputs, segments, window, cap), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(other).max())))


def test_one_block_is_what_decoding_computes():
    """`layers.attend`, which decoding keeps, is the same function."""
    q, k, v, *_ = arrays(2, 50, 4, 2, 8, False)
    found = jax.jit(lambda: self_attention(q, k, v, np.array(9, np.int32), (9,), SCALE, CAP))()
    wanted = decoding.attend(q, k, v, jnp.arange(50)[None], np.array(9, np.int32), SCALE, CAP)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ("kernel_interpreted", "blocks"))
def test_bfloat16_differs_by_its_rounding(form):
    """Inputs are exact in bfloat16. Its unit of rounding is 2^-8; weights, gradients of scores and results are each
    rounded once, and of each sum the rounding of single terms is a small part."""
    *inputs, _ = arrays(1, 256, 4, 2, 16, False)
    inputs = [x.astype(jnp.bfloat16) for x in inputs]
    attend = functools.partial(
        self_attention, window=np.array(90, np.int32), windows=(90,), scale=0.5, cap=CAP, segments=None, form=form
    )
    found = jax.jit(functools.partial(with_gradients, attend), compiler_options=QUICK)(*inputs)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    wide = [x.astype(jnp.float32) for x in inputs]
    wanted = with_gradients(lambda q, k, v: plain(q, k, v, 90, 0.5, CAP, None), *wide)
    assert_near(found, wanted, 2.0**-7)


# --- what the programs hold and compute ---------------------------------------------------------------------------


def largest(attend, time: int) -> int:
    """Elements of the largest array in the program of output and gradients."""
    q = jnp.zeros((1, time, 2, 2))
    jaxpr = jax.make_jaxpr(functools.partial(with_gradients, attend))(q, q[:, :, :1], q[:, :, :1], q).jaxpr
    return max(math.prod(v.aval.shape) for e in equations(jaxpr) for v in e.outvars)


def test_no_array_of_all_queries_and_keys():
    for time in (2048, 4096, 8192):
        found = largest(
            lambda q, k, v: self_attention(q, k, v, np.array(9, np.int32), (9,), SCALE, CAP, None, "blocks"), time
        )
        assert found == 2 * 128 * time  # scores of a block of queries of two heads against all keys
    positions = jnp.arange(2048)[None]
    found = largest(lambda q, k, v: decoding.attend(q, k, v, positions, np.array(9, np.int32), SCALE, CAP), 2048)
    assert found == 2 * 2048**2


def test_memory_grows_with_the_length():
    """Also of the compiled program: the loops over blocks run one after the other."""

    def temporary(time):
        attend = functools.partial(
            self_attention,
            window=np.array(9, np.int32),
            windows=(9,),
            scale=1.0,
            cap=None,
            segments=None,
            form="blocks",
        )
        shape = jax.ShapeDtypeStruct((1, time, 1, 2), jnp.float32)
        program = jax.jit(functools.partial(with_gradients, attend), compiler_options=QUICK).lower(*[shape] * 4)
        return program.compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.2 * temporary(4096)
    assert temporary(8192) < 8192**2  # a quarter of one array of scores


def forward_kernels(remat: str) -> int:
    """How often the forward kernel stands in the gradient's program of a model of stacked blocks and a last one."""
    config = ModelConfig(
        vocab_size=8, embed=4, mlp=4, layers=3, heads=2, kv_heads=1, head_dim=2, windows=(None, 2000, None)
    )
    model = transformer.abstract(config)
    ids = jnp.zeros((1, 128), jnp.int32)

    def gradient(model):
        return jax.grad(lambda m: m.trunk(tokens_of(ids), jnp.dtype("float32"), remat).x.sum(), allow_int=True)(model)

    layout = specs(model, make_mesh(1, 1))
    mapped = shard_map(gradient, mesh=make_mesh(1, 1), in_specs=(layout,), out_specs=layout)
    kernels = [e.params["name"] for e in equations(jax.make_jaxpr(mapped)(model).jaxpr) if "name" in e.params]
    assert sum("dkv" in name for name in kernels if isinstance(name, str)) == 1
    return sum("fwd" in name for name in kernels if isinstance(name, str))


@pytest.mark.parametrize("remat, times", (("none", 1), ("dots", 1), ("full", 2)))
def test_what_is_saved_of_attention_is_not_computed_again(remat, times):
    assert forward_kernels(remat) == times


# --- the kernel ---------------------------------------------------------------------------------------------------


def test_blocks_of_the_kernel():
    assert {time: kernel_block(time) for time in (1, 100, 128, 256, 384, 512, 640, 1024, 2048, 2049)} == {
        1: None, 100: None, 128: 128, 256: 128, 384: 128, 512: 256, 640: 128, 1024: 512, 2048: 512, 2049: None
    }  # fmt: skip


@pytest.mark.parametrize("window", (None, 1, 128, 129, 130, 300))
def test_operations_of_the_kernel_are_those_of_the_blocks_it_visits(window):
    """Counted by hand from the mask, and as the kernel's own description of its blocks has them."""
    time, block = 768, kernel_block(768)
    at = np.arange(time)
    mask = (at[:, None] >= at) & (at[:, None] - at < (window or time))
    visited = mask.reshape(time // block, block, time // block, block).any(axis=(1, 3)).sum()
    product = 2 * block * block * 16 * 3 * 5 * visited  # of all rows and heads
    assert kernel_flops(5, time, 3, 16, window) == (2 * product, 5 * product)
    kernel = attention._kernel(attention.Setting((time,), None, (), None), time, 3, window or time)
    for info in (kernel.fwd_mask_info, kernel.dkv_mask_info):
        assert np.count_nonzero(info.block_mask) == visited


def tpu_mesh(monkeypatch, fsdp: int, tp: int):
    """The 16 chips of a v4-32, to compile for. Skips where the compiler is not installed."""
    pytest.importorskip("libtpu", reason="the compiler for TPUs, which the package libtpu holds, is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name="v4:2x2x4",
        chip_config_name="megacore",
        chips_per_host_bounds=(2, 2, 1),
        num_slices=1,
    )
    return jax.make_mesh((fsdp, tp), ("fsdp", "tp"), (AxisType.Auto,) * 2, devices=topology.devices)


def kernel_calls(program) -> dict[str, int]:
    """How often each phase of the kernel is called in a compiled program."""
    calls = [line for line in program.compile().as_text().splitlines() if "tpu_custom_call" in line]
    return {phase: sum(f"splash_mha_{phase}" in line for line in calls) for phase in ("fwd", "dkv")}


@pytest.mark.real
@pytest.mark.parametrize("segmented", (False, True))
@pytest.mark.parametrize(
    "time, heads, kv_heads, head_dim, cap, windows, tp",
    (
        (2048, 8, 4, 256, 50.0, (4096, None), 1),
        (2048, 8, 4, 256, 50.0, (1024, None), 4),
        (512, 8, 4, 256, 50.0, (4096, None), 4),
        (2048, 24, 8, 128, None, (None,), 1),
        (512, 24, 8, 128, None, (None,), 4),
        (512, 9, 3, 64, None, (None,), 1),
        (2048, 4, 1, 256, None, (512, None), 1),
    ),
)
def test_the_kernel_compiles_for_a_tpu(monkeypatch, time, heads, kv_heads, head_dim, cap, windows, tp, segmented):
    """Forward and backward, ahead of time for the 16 chips of a v4-32, from this machine's CPU."""
    mesh = tpu_mesh(monkeypatch, 16 // tp, tp)

    def on_device(q, k, v, out_grad, window, segments):
        attend = functools.partial(
            self_attention, window=window, windows=windows, scale=0.1, cap=cap, segments=segments
        )
        return with_gradients(attend, q, k, v, out_grad)

    def array(layout, dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, layout))

    layout, rows = P("fsdp", None, "tp"), 16 // tp
    q, k = (array(layout, jnp.bfloat16, rows, time, count, head_dim) for count in (heads, kv_heads))
    segments = array(P("fsdp"), jnp.int32, rows, time) if segmented else None
    mapped = shard_map(on_device, mesh=mesh, in_specs=(layout,) * 4 + (P(), P("fsdp")), out_specs=layout)
    program = jax.jit(mapped).lower(q, k, k, q, array(P(), jnp.int32), segments)
    kernels = len({time if size is None else min(size, time) for size in windows})
    assert kernel_calls(program) == {"fwd": kernels, "dkv": kernels}


@pytest.mark.real
@pytest.mark.parametrize("remat, forward", (("dots", 3), ("full", 6)))
def test_a_model_compiles_for_a_tpu(monkeypatch, remat, forward):
    """Scanned blocks of two windows have a kernel for each, the last block has one; only "full" runs them all again in
    the backward pass."""
    mesh = tpu_mesh(monkeypatch, 4, 4)
    config = ModelConfig(
        vocab_size=64, embed=64, mlp=64, layers=4, heads=8, kv_heads=4, head_dim=64, windows=(100, None, 100, None)
    )
    model = transformer.abstract(config)
    layout = specs(model, mesh)
    arguments = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec)),
        (model, jax.ShapeDtypeStruct((4, 256), jnp.int32)),
        (layout, P("fsdp")),
    )

    def gradient(model, ids):
        def loss(model):
            states = final_states(model, ids, None, jnp.dtype("bfloat16"), remat)
            return fsdp_sum(jnp.sum(states.astype(jnp.float32)))

        return jax.grad(loss)(model)

    mapped = shard_map(gradient, mesh=mesh, in_specs=(layout, P("fsdp")), out_specs=layout)
    assert kernel_calls(jax.jit(mapped).lower(*arguments)) == {"fwd": forward, "dkv": 3}


# --- cuDNN --------------------------------------------------------------------------------------------------------


def with_cudnn(mesh, windows, head_dim=64):
    """Output and gradients in bfloat16, traced for a mesh: function and abstract arguments."""

    def on_device(q, k, v, out_grad):
        attend = functools.partial(
            self_attention, window=jnp.array(100, jnp.int32), windows=windows, scale=0.125, cap=None
        )
        return with_gradients(attend, q, k, v, out_grad)

    heads = P("fsdp", None, "tp")
    mapped = shard_map(on_device, mesh=mesh, in_specs=(heads,) * 4, out_specs=heads)
    return mapped, [jax.ShapeDtypeStruct((2, 256, count, head_dim), jnp.bfloat16) for count in (4, 2, 2, 4)]


@pytest.mark.parametrize("windows", ((100,), (100, None)))
def test_cudnn_is_in_a_program_for_a_gpu(monkeypatch, windows):
    """Lowered here, where neither a GPU nor cuDNN need be. The backward pass runs the forward pass again."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    mapped, arguments = with_cudnn(make_mesh(1, 1), windows)
    traced = jax.jit(mapped).trace(*arguments)
    on_gpu, on_cpu = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "cpu"))
    calls = {"fmhaSoftmax(": 2 * len(windows), "fmhaSoftmaxBackward(": len(windows)}
    assert {name: on_gpu.count(f"@__cudnn${name}") for name in calls} == calls
    assert "cudnn" not in on_cpu


def test_without_cudnn_a_gpu_has_the_blocks(monkeypatch):
    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", missing)
    mapped, arguments = with_cudnn(make_mesh(1, 1), (100, None))
    text = jax.jit(mapped).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn" not in text and "while" in text


def test_what_cudnn_takes(monkeypatch):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)

    def takes(dtype, head_dim):
        q, k = (jnp.zeros((2, 16, heads, head_dim), dtype) for heads in (4, 2))
        return attention.cudnn_takes(q, k)

    assert takes(jnp.bfloat16, 64) and takes(jnp.float16, 128)
    assert not takes(jnp.float32, 64) and not takes(jnp.bfloat16, 12) and not takes(jnp.bfloat16, 512)


@pytest.mark.parametrize("windows", ((100,), (100, None)))
def test_bfloat16_in_the_form_of_the_platform(windows):
    """As `test_bfloat16_differs_by_its_rounding`, which says the bound. On a GPU the form is cuDNN's.

    Elsewhere it is the blocks, so that the test is known to ask nothing that rounding forbids. For that the scale must be
    exact in bfloat16. A window that is one too long or too short makes differences of more than 0.2.
    """
    *inputs, _ = arrays(2, 256, 4, 2, 64, False)
    inputs = [x.astype(jnp.bfloat16) for x in inputs]
    mapped, _ = with_cudnn(make_mesh(1, 1), windows)
    compiled = jax.jit(mapped).lower(*inputs).compile()
    assert ("fmha" in compiled.as_text()) == (jax.default_backend() == "gpu")
    wide = [x.astype(jnp.float32) for x in inputs]
    wanted = with_gradients(lambda q, k, v: plain(q, k, v, 100, 0.125, None, None), *wide)
    assert_near(compiled(*inputs), wanted, 2.0**-7)

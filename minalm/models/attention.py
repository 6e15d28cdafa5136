"""Self-attention of whole sequences, in memory that grows with the length and not with its square.

There are three forms. On a TPU it is JAX's splash attention kernel, on an NVIDIA GPU cuDNN's attention, and elsewhere,
or where these two cannot serve, a loop over blocks of queries. The choice is made where the program is lowered. So a
program that is compiled on a CPU for a TPU has the kernel. One backward pass serves all three: it reads the output and
the logarithm of each query's sum of exponentials. Decoding with a cache, a few queries at a time, is `layers.attend`.

Axes: batch, time (queries and keys), heads, kv_heads, head_dim; group: the query heads that share a key head.
"""

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from minalm.models.layers import softcap
from minalm.parallel.collectives import vary_like

SAVED = "attention"  # the name under which a rematerialisation policy finds what the backward pass needs


Form = Literal["kernel_interpreted", "blocks"]

# Off until the test of its numbers has passed on a GPU (docs/performance.md).
USE_CUDNN = False

# Of the blocks. On a CPU, 128 queries were the fastest of 64 to 512. All blocks of a span read the keys up to the end
# of the span: with 8 spans, 9/16 of the square of queries and keys are computed in long sequences. Causality asks for
# 1/2. The program has 8 loops whatever the length.
QUERY_BLOCK = 128
SPANS = 8

# Of the TPU kernel. Blocks of 512 keep the matrix unit busy. At head_dim 256, forward and backward fit the 16 MiB of
# vector memory that a v4 gives a kernel. Blocks of 1024 do not, and would visit 3/4 of the square at length 2048, not
# 5/8.
LANES = 128
KERNEL_BLOCK = 512
KERNEL_HEAD_DIM = 256  # the largest tried


class Setting(NamedTuple):
    """What is known when the program is traced."""

    windows: tuple[int, ...]  # the distinct windows, ascending, none longer than the sequence
    cap: float | None
    platforms: tuple[str, ...]  # those that have a form of their own
    form: Form | None  # None: the platform's


class Saved(NamedTuple):
    """What the backward pass reads. `q` is scaled."""

    q: Float[Array, "batch time heads head_dim"]
    k: Float[Array, "batch time kv_heads head_dim"]
    v: Float[Array, "batch time kv_heads head_dim"]
    window: Int[Array | np.ndarray, ""]
    segments: Int[Array | np.ndarray, "batch time"] | None
    out: Float[Array, "batch time heads head_dim"]
    logsumexp: Float32[Array, "batch time heads"]


def self_attention(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch time kv_heads head_dim"],
    v: Float[Array, "batch time kv_heads head_dim"],
    window: Int[Array | np.ndarray, ""],
    windows: tuple[int | None, ...],
    scale: float,
    cap: float | None,
    segments: Int[Array | np.ndarray, "batch time"] | None = None,
    form: Form | None = None,
) -> Float[Array, "batch time heads head_dim"]:
    """Causal attention with grouped heads; a query sees the last `window` positions, and of those its own segment.

    `window` may be traced (layers are scanned); `windows` names every value it can take, None: all positions. Scores
    are capped before the mask (Gemma 2, section 2) and normalised in float32. `form` is for tests: None is the
    platform's, "kernel_interpreted" the TPU kernel on any platform.
    """
    time, head_dim = q.shape[1], q.shape[3]
    known = isinstance(window, np.ndarray)  # as of the last block, which is not scanned: one kernel is enough
    distinct = tuple(sorted({min(size or time, time) for size in ([int(window)] if known else windows)}))
    platforms = ("tpu",) if kernel_block(time) is not None and head_dim <= KERNEL_HEAD_DIM else ()
    platforms += ("cuda",) if USE_CUDNN and cap is None and segments is None and cudnn_takes(q, k) else ()
    q = q * jnp.asarray(scale, q.dtype)
    # All vary over the same axes of the mesh from here on. Where k and v did not (heads over `tp` that share keys), the
    # transpose of this line sums their gradients.
    q, k, v = vary_like((q, k, v), (q, k, v, window, segments))
    return _attention(Setting(distinct, cap, platforms, form), q, k, v, window, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(setting, q, k, v, window, segments):
    return _attention_forward(setting, q, k, v, window, segments)[0]


def _attention_forward(setting, q, k, v, window, segments):
    arguments = (q, k, v, window, segments)
    out, logsumexp = _choose(FORWARD, setting, arguments)
    # Named outside of all branches: a policy that keeps both leaves nothing of the forward pass to compute again.
    out, logsumexp = checkpoint_name(out, SAVED), checkpoint_name(logsumexp, SAVED)
    return out, Saved(q, k, v, window, segments, out, logsumexp)


def _attention_backward(setting, saved, out_grad):
    return *_choose(BACKWARD, setting, (saved, out_grad)), None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _choose(passes, setting, arguments):
    """The pass in the form that `setting` names or, where the program is lowered, in that of the platform."""
    if setting.form is not None:
        return passes["default" if setting.form == "blocks" else "tpu"](setting, *arguments)
    chosen = {platform: functools.partial(passes[platform], setting) for platform in (*setting.platforms, "default")}
    return jax.lax.platform_dependent(*arguments, **chosen)


def _by_window(of_window, setting, window, arguments):
    """`of_window(size, *arguments)` for this layer's window, one branch per distinct size.

    Kernels do not declare over which axes of the mesh their results vary, which `check_vma` refuses. So they are traced
    in a `shard_map` without that check. All axes are divided already, hence it divides nothing. What it returns is
    typed by hand as varying over the axes of q. That is what the check would find: a kernel speaks to no other device,
    so its results vary over the axes of its arguments and no others, and `self_attention` made q vary over all of
    those. No derivative depends on types inside: it is ours.
    """

    def of_any(window, arguments):
        branches = [functools.partial(of_window, size) for size in setting.windows]
        number = jnp.sum(jnp.asarray(setting.windows[:-1], jnp.int32) < window)
        return branches[0](*arguments) if len(branches) == 1 else jax.lax.switch(number, branches, *arguments)

    q = arguments[0]
    if jax.sharding.get_abstract_mesh().manual_axes:
        of_any = jax.shard_map(of_any, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    return vary_like(tuple(of_any(window, arguments)), q)


# --- on a TPU: the splash attention kernel ------------------------------------------------------------------------


def _splash() -> tuple[ModuleType, ModuleType]:
    """JAX's kernel and its masks, imported where a program is traced: `--help` is there sooner without them."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    return splash_attention_kernel, splash_attention_mask


def kernel_block(time: int) -> int | None:
    """Queries, and keys, of a block of the kernel; None for lengths that it cannot take.

    The largest multiple of 128 up to 512 that divides the sequence into at least two blocks, since one block would be
    computed whole, its upper triangle included.
    """
    sizes = range(KERNEL_BLOCK, 0, -LANES)
    return next((size for size in sizes if time % size == 0 and (size < time or size == LANES)), None)


def kernel_flops(batch: int, time: int, heads: int, head_dim: int, window: int | None) -> tuple[int, int]:
    """Floating-point operations of the kernel's matrix products, forward and backward.

    A block of queries visits the blocks of keys that hold a key it sees, each computed whole: 2 products forward
    (scores, mixed values) and 5 backward (scores again, and the gradients of weights, values, queries and keys).
    Raises TypeError for lengths that the kernel cannot take.
    """
    block = kernel_block(time)
    first_keys = [max(0, start - (window or time) + 1) // block for start in range(0, time, block)]
    visited = sum(number - first + 1 for number, first in enumerate(first_keys))
    product = 2 * block * block * head_dim * visited * heads * batch
    return 2 * product, 5 * product


def _kernel(setting, time, heads, window):
    """The kernel for a window that is known when the program is traced."""
    splash, masks = _splash()
    block = kernel_block(time)
    # A window that no query fills is plain causality, whose mask is cheaper.
    shape = (time, time)
    mask = masks.CausalMask(shape) if window == time else masks.LocalMask(shape, (window - 1, 0), 0)
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        # The fused backward kernel computes scores once for all gradients: 5 products instead of 7.
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
        ),
        save_residuals=True,
        attn_logits_soft_cap=setting.cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=setting.form == "kernel_interpreted",
    )


def _kernel_forward(setting, q, k, v, window, segments):
    splash, _ = _splash()

    def of_window(size, *arguments):
        kernel = _kernel(setting, *q.shape[1:3], size)

        def of_row(q, k, v, segments):
            ids = None if segments is None else splash.SegmentIds(segments, segments)
            out, (logsumexp,) = kernel(q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1), ids)
            return out.swapaxes(0, 1), logsumexp.swapaxes(0, 1)

        return jax.vmap(of_row)(*arguments)

    return _by_window(of_window, setting, window, (q, k, v, segments))


def _kernel_backward(setting, saved, out_grad):
    splash, _ = _splash()

    def of_window(size, *arguments):
        kernel = _kernel(setting, *out_grad.shape[1:3], size)
        own = kernel.kwargs

        def of_row(q, k, v, segments, out, logsumexp, out_grad):
            ids = None if segments is None else splash.SegmentIds(segments, segments)
            q, k, v, out, logsumexp, out_grad = (x.swapaxes(0, 1) for x in (q, k, v, out, logsumexp, out_grad))
            # The one private name of JAX in this package. The public way, `jax.vjp` of the kernel, would run the
            # forward pass again: it does not take what was saved.
            _, _, _, *grads, _, _ = splash._splash_attention_bwd(
                save_residuals=False,
                mask_value=own["mask_value"],
                is_mqa=False,
                block_sizes=own["block_sizes"],
                residual_checkpoint_name=None,
                mask_function=own["mask_function"],
                attn_logits_soft_cap=own["attn_logits_soft_cap"],
                interpret=own["interpret"],
                res=(q, k, v, ids, None, out, logsumexp, None, kernel.dkv_mask_info),
                do=out_grad,
            )
            return tuple(grad.swapaxes(0, 1) for grad in grads)

        return jax.vmap(of_row)(*arguments)

    q, k, v, window, segments, out, logsumexp = saved
    return _by_window(of_window, setting, window, (q, k, v, segments, out, logsumexp, out_grad))


# --- on an NVIDIA GPU: cuDNN --------------------------------------------------------------------------------------


def cudnn_takes(q: Float[Array, "batch time heads head_dim"], k: Float[Array, "batch time kv_heads head_dim"]) -> bool:
    """Whether cuDNN's attention takes arrays of these shapes and types, as far as can be known here.

    No if cuDNN is not installed, whatever the program is lowered for, or if the GPU is older than compute capability 8.
    JAX refuses the rest where it traces: other types, and head_dim that is no multiple of 8 or too large for the GPU.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, k))
    try:
        jax.eval_shape(lambda *qkv: jax.vjp(functools.partial(_cudnn, q.shape[1]), *qkv)[0], *shapes)
    except (RuntimeError, NotImplementedError):  # not installed; not supported
        return False
    return jax.default_backend() != "gpu" or float(jax.devices()[0].compute_capability) >= 8.0


def _cudnn(window, q, k, v):
    local = None if window == q.shape[1] else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=1.0, is_causal=True, local_window_size=local, implementation="cudnn"
    )


def _cudnn_forward(setting, q, k, v, window, segments):
    def of_window(size, q, k, v):
        # JAX gives the logarithm rounded to the type of q, and no public backward pass takes it.
        return _cudnn(size, q, k, v), jnp.zeros(q.shape[:3], jnp.float32)

    return _by_window(of_window, setting, window, (q, k, v))


def _cudnn_backward(setting, saved, out_grad):
    """Runs the forward pass again: 2 matrix products beside the 5 of the backward pass."""

    def of_window(size, q, k, v, out_grad):
        return jax.vjp(functools.partial(_cudnn, size), q, k, v)[1](out_grad)

    return _by_window(of_window, setting, saved.window, (saved.q, saved.k, saved.v, out_grad))


# --- elsewhere: blocks of queries ---------------------------------------------------------------------------------


def _blocks_forward(setting, q, k, v, window, segments):
    time, kv_heads = k.shape[1:3]
    block = _query_block(time)
    queries, keys, values = _fold(q, kv_heads, block), _fold_keys(k, block), _fold_keys(v, block)
    results = []
    for span, stop in _spans(time, block):

        def of_block(at):
            q, number = at
            _, scores = _scores(setting, q, keys[:, :, :stop], number, block, window, segments)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            mixed = _product("bkqs,bksd->bkqd", weights.astype(v.dtype), values[:, :, :stop])
            return (mixed / total).astype(v.dtype), (top + jnp.log(total))[..., 0]

        results.append(jax.lax.map(of_block, (queries[span], _numbers(span))))
    out, logsumexp = jax.tree.map(lambda *parts: _unfold(jnp.concatenate(parts), q.shape), *results)
    return out, logsumexp


def _blocks_backward(setting, saved, out_grad):
    q, k, v, window, segments, out, logsumexp = saved
    time, kv_heads = k.shape[1:3]
    block = _query_block(time)
    # What the softmax's normalisation takes off the gradient of each weight of a query.
    shift = jnp.sum(out.astype(jnp.float32) * out_grad.astype(jnp.float32), axis=-1)
    rows = tuple(_fold(x, kv_heads, block) for x in (q, out_grad, shift, logsumexp))
    keys, values = _fold_keys(k, block), _fold_keys(v, block)
    grads = vary_like((jnp.zeros(keys.shape, jnp.float32), jnp.zeros(keys.shape, jnp.float32)), q)  # over all queries
    q_grads = []
    for span, stop in _spans(time, block):

        def of_block(grads, at):
            (q, out_grad, shift, logsumexp), number = at
            k_grad, v_grad = grads
            seen_keys, seen_values = keys[:, :, :stop], values[:, :, :stop]
            capped, scores = _scores(setting, q, seen_keys, number, block, window, segments)
            weights = jnp.exp(scores - logsumexp[..., None])
            scores_grad = weights * (_product("bkqd,bksd->bkqs", out_grad, seen_values) - shift[..., None])
            if setting.cap is not None:
                scores_grad = scores_grad * (1.0 - jnp.square(capped / setting.cap))
            scores_grad = scores_grad.astype(q.dtype)
            k_grad = k_grad.at[:, :, :stop].add(_product("bkqs,bkqd->bksd", scores_grad, q))
            v_grad = v_grad.at[:, :, :stop].add(_product("bkqs,bkqd->bksd", weights.astype(v.dtype), out_grad))
            return (k_grad, v_grad), _product("bkqs,bksd->bkqd", scores_grad, seen_keys).astype(q.dtype)

        grads, q_grad = jax.lax.scan(of_block, grads, (tuple(x[span] for x in rows), _numbers(span)))
        q_grads.append(q_grad)
    k_grad, v_grad = (grad[:, :, :time].swapaxes(1, 2).astype(k.dtype) for grad in grads)
    return _unfold(jnp.concatenate(q_grads), q.shape), k_grad, v_grad


def _query_block(time: int) -> int:
    """As few blocks of equal size as there can be, so that little is filled up."""
    return -(-time // -(-time // QUERY_BLOCK))


def _spans(time: int, block: int) -> Iterator[tuple[slice, int]]:
    """Spans of blocks of queries, and for each the end of the keys that they read."""
    blocks = -(-time // block)
    for first in range(0, blocks, -(-blocks // SPANS)):
        last = min(first + -(-blocks // SPANS), blocks)
        yield slice(first, last), last * block


def _numbers(span: slice) -> Int[np.ndarray, " block"]:
    return np.arange(span.start, span.stop, dtype=np.int32)


def _scores(setting, q, k, number, block, window, segments):
    """Capped scores [batch, kv_heads, group * query, key] of a block of queries, without and with the mask."""
    scores = softcap(_product("bkqd,bksd->bkqs", q, k), setting.cap)
    keys = jnp.arange(k.shape[2])
    queries = number * block + jnp.arange(q.shape[2]) % block
    distance = queries[:, None] - keys
    visible = (distance >= 0) & (distance < window)
    if segments is not None:
        padded = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % block)))
        visible = (visible & (padded[:, queries, None] == padded[:, None, : k.shape[2]]))[:, None]
    return scores, jnp.where(visible, scores, jnp.finfo(jnp.float32).min)


def _product(dimensions, left, right):
    return jnp.einsum(dimensions, left, right, preferred_element_type=jnp.float32)


def _fold(x, kv_heads, block):
    """[batch, time, heads, ...] -> [block number, batch, kv_heads, group * query, ...]: the query heads of a group
    become rows of one matrix, for fewer, larger products. The last block is filled up with zeros, which as keys come
    after all queries, and as queries are dropped."""
    batch, time, heads, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -time % block), *((0, 0) for _ in x.shape[2:])))
    x = x.reshape(batch, -1, block, kv_heads, heads // kv_heads, *rest)
    x = jnp.moveaxis(x, (1, 3, 4, 2), (0, 2, 3, 4))
    return x.reshape(-1, batch, kv_heads, heads // kv_heads * block, *rest)


def _unfold(x, shape):
    """The way back, to [batch, time, heads, ...]; `shape` is that of q."""
    batch, time, heads = shape[:3]
    blocks, _, kv_heads, rows, *rest = x.shape
    group = heads // kv_heads
    x = x.reshape(blocks, batch, kv_heads, group, rows // group, *rest)
    x = jnp.moveaxis(x, (0, 2, 3, 4), (1, 3, 4, 2))
    return x.reshape(batch, -1, heads, *rest)[:, :time]


def _fold_keys(x, block):
    """[batch, time, kv_heads, head_dim] -> [batch, kv_heads, time filled up to whole blocks, head_dim]."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))).swapaxes(1, 2)


FORWARD: dict[str, Callable] = {"tpu": _kernel_forward, "cuda": _cudnn_forward, "default": _blocks_forward}
BACKWARD: dict[str, Callable] = {"tpu": _kernel_backward, "cuda": _cudnn_backward, "default": _blocks_backward}

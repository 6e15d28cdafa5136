"""Messages between devices in a step: the only file that issues them.

All of it runs inside `mesh.shard_map`. There the transpose of a gather is the reduce-scatter of the gradient, and the
gradient of a replicated parameter is summed, so gradients are complete where `shard_map` ends. Collectives over an axis
of one device are left out: XLA would keep them, on CPU with two transposed copies of every gathered array.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree, Shaped

from minalm.parallel.mesh import layouts

GATHERED = "gathered"  # the name under which a rematerialisation policy finds what `gather` gives


def _all_gather(x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    return x if jax.lax.axis_size("fsdp") == 1 else jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True)


def gather(module: PyTree, dtype: jnp.dtype) -> PyTree:
    """The module's parameters whole along `fsdp`, in the compute dtype; cast first, so that fewer bytes travel."""

    def whole(leaf, spec):
        leaf = leaf.astype(dtype)
        for axis, name in enumerate(spec):
            if name == "fsdp":
                leaf = _all_gather(leaf, axis)
        return checkpoint_name(leaf, GATHERED)

    return jax.tree.map(whole, module, layouts(module))


def gather_channels(table: Float[Array, "vocab slice"], dtype: jnp.dtype) -> Float[Array, "vocab embed"]:
    """A table's rows with all their channels; its entries stay divided over `tp`."""
    return _all_gather(table.astype(dtype), 1)


def lookup(
    table: Float[Array, "vocab slice"], ids: Int[Array, "batch time"], dtype: jnp.dtype
) -> Float[Array, "batch time embed"]:
    """Rows of a table divided over `tp` by entries and over `fsdp` by channels.

    The ids travel to the table's slices and the found channels travel back, so that the table itself, much larger than
    both, is never gathered. Rows are cast to the compute dtype once they are found: the gradient of a row is a sum over
    all its occurrences, thousands for a frequent byte, which bfloat16 could not add up.
    """
    local = _all_gather(ids, 0) - tp_offset(table.shape[0])
    held = (local >= 0) & (local < table.shape[0])
    rows = tp_sum(jnp.where(held[..., None], table[jnp.where(held, local, 0)].astype(dtype), 0))
    if jax.lax.axis_size("fsdp") == 1:
        return rows
    return jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=2, tiled=True)


def vary_like(tree: PyTree, other: PyTree) -> PyTree:
    """The arrays of a tree, typed as varying over all axes of the mesh that any of the other tree varies over, for
    loops that begin with a constant. The transpose of this sums the gradients of the devices."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(other)))

    def vary(x):
        return jax.lax.pcast(x, tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying)), to="varying")

    return jax.tree.map(vary, tree)


def tp_size() -> int:
    """How many devices divide heads, hidden units and entries."""
    return jax.lax.axis_size("tp")


def tp_sum(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """The sum over `tp`: completes a product whose contracted dimension is divided."""
    return x if tp_size() == 1 else jax.lax.psum(x, "tp")


def tp_max(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """The maximum over `tp`, without gradient."""
    x = jax.lax.stop_gradient(x)
    return x if tp_size() == 1 else jax.lax.pmax(x, "tp")


def tp_offset(size: int) -> Int[Array, ""] | int:
    """Where this device's slice of a dimension divided over `tp` begins, for slices of `size`."""
    return 0 if tp_size() == 1 else jax.lax.axis_index("tp") * size


def tp_share(x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
    """This device's part of a dimension that is stored whole but used in parts over `tp`; of one that is shorter than
    `tp`, the one element that this device shares with its neighbours."""
    if tp_size() == 1:
        return x
    size = x.shape[axis]
    start = jax.lax.axis_index("tp") * size // tp_size()
    return jax.lax.dynamic_slice_in_dim(x, start, max(size // tp_size(), 1), axis)


def fsdp_sum(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """The sum over the devices that hold different rows of the batch: local sums become sums over the whole batch."""
    return x if jax.lax.axis_size("fsdp") == 1 else jax.lax.psum(x, "fsdp")


def squared_norm(module: PyTree) -> Float[Array, ""]:
    """The sum of squares over all elements of a module of parameters or gradients, each counted once: summed over the
    axes of the mesh that a leaf differs over."""

    def of_leaf(leaf):
        axes = tuple(sorted(jax.typeof(leaf).manual_axis_type.varying))
        return jax.lax.psum(jnp.sum(jnp.square(leaf)), axes) if axes else jnp.sum(jnp.square(leaf))

    return sum(map(of_leaf, jax.tree.leaves(module)))

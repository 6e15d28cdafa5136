"""The device mesh and how arrays lie on it: the only file that issues collectives.

Two axes. Over `fsdp` the rows of a batch are divided, and every large parameter is stored in slices that are gathered
just before use. Over `tp` heads, hidden units of the MLP and vocabulary entries are divided. All functions that issue a
collective run inside `on_mesh`, which is `jax.shard_map(..., check_vma=True)`: there the transpose of a gather is the
reduce-scatter of the gradient, and the gradient of a replicated parameter is summed, so gradients are complete where
`shard_map` ends.

An axis of one device divides nothing: no layout names it, and collectives over it are left out. XLA would keep them, on
CPU with two transposed copies of every gathered array.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from minalm.text import InputError

ROWS = P("fsdp")  # the layout of every array of a batch
REPLICATED = P()
GATHERED = "gathered"  # the name under which a rematerialisation policy finds what `gather` gives
TP_OR_WHOLE = "tp or whole"  # of key and value heads: divided over tp; or, where tp is a multiple of them, not at all


def make_mesh(fsdp: int, tp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first `fsdp * tp` of the devices (None: those of this run). Raises InputError when there are fewer,
    or a process of the run has none of them."""
    of_this_run = devices is None
    devices = jax.devices() if of_this_run else devices
    if min(fsdp, tp) < 1:
        raise InputError(f"the mesh {fsdp}x{tp} has no devices: give --mesh.fsdp and --mesh.tp at least 1")
    if fsdp * tp > len(devices):
        raise InputError(
            f"the mesh {fsdp}x{tp} needs {fsdp * tp} devices but there are {len(devices)}: "
            "make --mesh.fsdp times --mesh.tp at most that"
        )
    devices = devices[: fsdp * tp]
    processes = range(jax.process_count() if of_this_run else 0)
    if idle := set(processes) - {device.process_index for device in devices}:
        raise InputError(
            f"the mesh {fsdp}x{tp} has no device of process {min(idle)}: make --mesh.fsdp times --mesh.tp "
            f"{jax.device_count()}, and --batch-size a multiple of --mesh.fsdp"
        )
    return jax.make_mesh((fsdp, tp), ("fsdp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def param(*layout: str | None):
    """A field that holds a parameter; `layout` names the mesh axis that divides each dimension.

    Dimensions in front of those named (the layer axis of stacked blocks) are not divided.
    """
    return eqx.field(metadata={"layout": layout})


def _layouts(tree: PyTree) -> PyTree:
    """A tree like `tree` with the declared layout (a PartitionSpec) in the place of each array."""

    def layout_of(path, leaf):
        owner = tree
        for key in path[:-1]:
            owner = owner[key.idx] if isinstance(key, jax.tree_util.SequenceKey) else getattr(owner, key.name)
        declared = {field.name: field for field in dataclasses.fields(owner)}[path[-1].name].metadata["layout"]
        return P(*(None,) * (leaf.ndim - len(declared)), *declared)

    return jax.tree_util.tree_map_with_path(layout_of, tree)


def specs(tree: PyTree, mesh: Mesh) -> PyTree:
    """The PartitionSpec of every array of a tree of modules. Raises InputError where an axis does not divide."""

    def checked(path, size, axis):
        if axis == TP_OR_WHOLE:
            axis = None if mesh.shape["tp"] % size == 0 and mesh.shape["tp"] > size else "tp"
        if axis is None or mesh.shape[axis] == 1:
            return None
        if size % mesh.shape[axis]:
            raise InputError(
                f"parameter {jax.tree_util.keystr(path, simple=True, separator='.')} has a dimension of {size}, "
                f"which --mesh.{axis} {mesh.shape[axis]} does not divide: choose a mesh that does"
            )
        return axis

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, spec: P(*(checked(path, size, axis) for size, axis in zip(leaf.shape, spec))),
        tree,
        _layouts(tree),
    )


def _divided(spec_tree: PyTree, mesh: Mesh) -> PyTree:
    """PartitionSpecs without the axes that have one device."""

    def divided(spec):
        return P(*(None if axis is None or mesh.shape[axis] == 1 else axis for axis in spec))

    return jax.tree.map(divided, spec_tree, is_leaf=lambda x: isinstance(x, P))


def shardings(spec_tree: PyTree, mesh: Mesh) -> PyTree:
    """PartitionSpecs as the NamedShardings that `jax.device_put` and `jax.jit` want."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), _divided(spec_tree, mesh), is_leaf=lambda x: isinstance(x, P)
    )


def on_mesh(function: Callable, mesh: Mesh, in_specs: PyTree, out_specs: PyTree) -> Callable:
    """`jax.shard_map` of a function whose collectives are those of this file."""
    in_specs, out_specs = _divided(in_specs, mesh), _divided(out_specs, mesh)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)


def place(tree: PyTree, mesh: Mesh, dtype: DTypeLike | None = None) -> PyTree:
    """A tree of modules laid out on the mesh as its fields declare, in `dtype` (None: each leaf in its own).

    A leaf is an array, or what reads slices of one from a file (hf.Stored). The host holds one device's slice of one
    leaf at a time, and of several processes each cuts the slices of its own devices alone.
    """

    def placed(leaf, sharding):
        own = leaf.dtype if dtype is None else dtype
        if isinstance(leaf, jax.Array) and sharding.is_fully_addressable:
            return jax.device_put(leaf.astype(own), sharding)
        owners = {}  # the devices that hold the same slice
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
            spans = tuple(cut.indices(size)[:2] for cut, size in zip(index, leaf.shape, strict=True))
            owners.setdefault(spans, []).append(device)
        parts = []
        for spans, devices in owners.items():
            part = np.asarray(leaf[tuple(slice(*span) for span in spans)]).astype(own, copy=False)
            parts += jax.block_until_ready([jax.device_put(part, device) for device in devices])
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)

    return jax.tree.map(placed, tree, shardings(specs(tree, mesh), mesh))


def place_shapes(tree: PyTree, mesh: Mesh, dtype: DTypeLike | None = None) -> PyTree:
    """What `place` would give, as shapes: to compile for devices that are not there."""

    def placed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else dtype, sharding=sharding)

    return jax.tree.map(placed, tree, shardings(specs(tree, mesh), mesh))


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which of a batch's `rows` lie on this process's devices: all where there is one process.

    Processes whose devices differ in `tp` alone hold the same rows.
    """
    cuts = shardings(ROWS, mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (cut,) in cuts for row in range(rows)[cut]})


def place_rows(batch: PyTree, mesh: Mesh) -> PyTree:
    """A batch laid out on the mesh: rows divided over `fsdp`. Each process gives its `local_rows`; none travel."""
    sharding, count = shardings(ROWS, mesh), mesh.shape["fsdp"]
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    held = local_rows(mesh, count)  # of the rows in `count` equal parts, the parts that are here

    def placed(leaf):
        parts = dict(zip(held, np.split(leaf, len(held)), strict=True))
        size = len(leaf) // len(held)
        shape = (size * count, *leaf.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: parts[(index[0].start or 0) // size])

    return jax.tree.map(placed, batch)


def count_rows(marked: Bool[np.ndarray, " local"], mesh: Mesh) -> Int[Array, ""]:
    """How many rows of a batch are marked, of all processes' `local_rows`, each counted once. Does not wait for it."""
    return _count(place_rows(marked, mesh), mesh)


@functools.partial(jax.jit, static_argnames="mesh")
def _count(marked: Bool[Array, " batch"], mesh: Mesh) -> Int[Array, ""]:
    count = jnp.sum(marked, dtype=jnp.int32)
    return jax.lax.with_sharding_constraint(count, shardings(REPLICATED, mesh))


# --- inside on_mesh -----------------------------------------------------------------------------------------------


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

    return jax.tree.map(whole, module, _layouts(module))


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
    """The arrays of a tree, typed as varying over all axes of the mesh that any of the other tree varies over, for loops
    that begin with a constant. The transpose of this sums the gradients of the devices."""
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


def rows_sum(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """The sum over the devices that hold different rows of the batch: local sums become sums over the whole batch."""
    return x if jax.lax.axis_size("fsdp") == 1 else jax.lax.psum(x, "fsdp")


def squared_norm(module: PyTree) -> Float[Array, ""]:
    """The sum of squares over all elements of a module of parameters or gradients, each counted once: summed over the
    axes of the mesh that a leaf differs over."""

    def of_leaf(leaf):
        axes = tuple(sorted(jax.typeof(leaf).manual_axis_type.varying))
        return jax.lax.psum(jnp.sum(jnp.square(leaf)), axes) if axes else jnp.sum(jnp.square(leaf))

    return sum(map(of_leaf, jax.tree.leaves(module)))

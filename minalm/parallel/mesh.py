"""The device mesh, and how arrays lie on it.

Two axes. Over `fsdp` the rows of a batch are divided, and every large parameter is stored in slices that are gathered
just before use. Over `tp` heads, hidden units of the MLP and vocabulary entries are divided. An axis of one device
divides nothing: no layout names it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import PyTree

from minalm.errors import InputError

ROWS = P("fsdp")  # the layout of every array of a batch
REPLICATED = P()
TP_OR_WHOLE = "tp or whole"  # of key and value heads: divided over tp; or, where tp is a multiple of them, not at all


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged."""

    fsdp: int | None = None
    """Devices that divide the rows of a batch and the storage of parameters. Default: as many as there are, divided by
    --mesh.tp, and as the batch can be divided over."""
    tp: int = 1
    """Devices that divide heads, MLP and vocabulary."""


def run_mesh(
    config: MeshConfig, batch_size: int, accumulation: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of a run, on `devices` (default: all devices of this run).

    Raises InputError if there are too few devices, or if the mesh does not divide the batch into `accumulation` parts.
    """
    available = len(jax.devices() if devices is None else devices)
    fsdp = config.fsdp
    if fsdp is None:
        fsdp = math.gcd(batch_size // accumulation, max(1, available // max(1, config.tp)))
    mesh = make_mesh(fsdp, config.tp, devices)
    if batch_size % fsdp:
        raise InputError(f"--batch-size {batch_size} rows do not divide over --mesh.fsdp {fsdp}: change one")
    if batch_size // fsdp % accumulation:
        raise InputError(
            f"--accumulation {accumulation} does not divide the {batch_size // fsdp} rows of each of "
            f"--mesh.fsdp {fsdp}: change one, or --batch-size"
        )
    return mesh


def make_mesh(fsdp: int, tp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first `fsdp * tp` of the devices (None: those of this run). Raises InputError when there are
    fewer, or a process of the run has none of them."""
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


def layouts(tree: PyTree) -> PyTree:
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
        layouts(tree),
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


def shard_map(function: Callable, mesh: Mesh, in_specs: PyTree, out_specs: PyTree) -> Callable:
    """`jax.shard_map` of a function whose collectives are those of collectives.py."""
    in_specs, out_specs = _divided(in_specs, mesh), _divided(out_specs, mesh)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)


def shard(tree: PyTree, mesh: Mesh, dtype: DTypeLike | None = None) -> PyTree:
    """A tree of modules laid out on the mesh as its fields declare, in `dtype` (None: each leaf in its own).

    A leaf is an array, or what reads slices of one from a file (weights.LazyTensor). The host holds one device's slice
    of one leaf at a time, and of several processes each cuts the slices of its own devices alone.
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


def shard_shapes(tree: PyTree, mesh: Mesh, dtype: DTypeLike | None = None) -> PyTree:
    """What `shard` would give, as shapes: to compile for devices that are not there."""

    def placed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else dtype, sharding=sharding)

    return jax.tree.map(placed, tree, shardings(specs(tree, mesh), mesh))


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which of a batch's `rows` lie on this process's devices: all where there is one process.

    Processes whose devices differ in `tp` alone hold the same rows.
    """
    cuts = shardings(ROWS, mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (cut,) in cuts for row in range(rows)[cut]})


def shard_rows(batch: PyTree, mesh: Mesh) -> PyTree:
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

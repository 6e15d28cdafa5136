"""Training state on disk, through Orbax: saved as it lies on the mesh, restored onto any mesh.

A checkpoint holds what training changes (trained parameters, optimiser state, step). The teacher and what stays frozen
come from the run's own inputs again, and the data are a function of (seed, step), so nothing else is needed to go on.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from minalm.text import InputError

KEPT = 2  # checkpoints kept, the newest


def _manager(folder: Path, create: bool = False, processes: set[int] | None = None):
    """`processes`: those that take part, None: all."""
    import orbax.checkpoint as ocp  # a second of import time that --help need not pay

    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT,
        create=create,
        enable_async_checkpointing=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=0, active_processes=processes),
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(folder: Path, step: int, items: Mapping[str, PyTree]) -> None:
    """Writes the state after `step` steps; a checkpoint not written to the end does not exist for `restore`.

    All processes call it, and each writes what lies on its devices.
    """
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()})
    with _manager(folder, create=True) as manager:
        manager.save(step, args=args, force=True)


def latest(folder: Path) -> int | None:
    """The number of steps after which the newest checkpoint was written; None if there is none."""
    if not folder.is_dir():
        return None
    with _manager(folder) as manager:
        return manager.latest_step()


def restore(
    folder: Path, like: Mapping[str, PyTree], step: int | None = None, *, alone: bool = False
) -> dict[str, PyTree]:
    """Items of a checkpoint, by default the newest, with the structure, shapes and layouts of `like`.

    All processes call it, or with `alone` the first, for numpy arrays: leaves of `like` that are such come as such.
    Raises InputError if there is no such checkpoint, or if it was written by a run of another shape.
    """
    import orbax.checkpoint as ocp

    def abstract(x):
        if isinstance(x, np.ndarray):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    args = {name: ocp.args.StandardRestore(jax.tree.map(abstract, item)) for name, item in like.items()}
    with _manager(folder, processes={0} if alone else None) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise InputError(f"there is no checkpoint in {folder}: train until the first is written")
        if step is not None and step not in steps:
            raise InputError(f"{folder} has no checkpoint {step}: name one of {', '.join(map(str, steps))}")
        step = steps[-1] if step is None else step
        try:
            return dict(manager.restore(step, args=ocp.args.Composite(**args)))
        except Exception as error:  # Orbax raises whatever its parts raise, at the length of a page
            raise InputError(
                f"the checkpoint {folder / str(step)} is damaged or of another run: "
                "remove it, or start under another --out"
            ) from error

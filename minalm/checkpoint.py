"""Training state on disk, through Orbax: saved as it lies on the mesh, restored onto any mesh.

A checkpoint holds what training changes (trained parameters, optimiser state, step). The teacher and what stays frozen
come from the run's own inputs again, and the data are a function of (seed, step), so nothing else is needed to go on.
"""

from pathlib import Path

import jax
from jaxtyping import PyTree

from minalm.text import InputError

KEPT = 2  # checkpoints kept, the newest


def _manager(folder: Path):
    import orbax.checkpoint as ocp  # a second of import time that --help need not pay

    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(folder: Path, step: int, state: PyTree) -> None:
    """Writes the state after `step` steps; a checkpoint not written to the end does not exist for `restore`."""
    import orbax.checkpoint as ocp

    with _manager(folder) as manager:
        manager.save(step, args=ocp.args.StandardSave(state), force=True)


def latest(folder: Path) -> int | None:
    """The number of steps after which the newest checkpoint was written; None if there is none."""
    if not folder.is_dir():
        return None
    with _manager(folder) as manager:
        return manager.latest_step()


def restore(folder: Path, like: PyTree) -> PyTree:
    """The newest checkpoint, with the structure, shapes and layouts of `like`.

    Raises InputError if there is no checkpoint, or if it was written by a run of another shape.
    """
    import orbax.checkpoint as ocp

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(f"there is no checkpoint in {folder}: start without --resume")
        try:
            return manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax raises whatever its parts raise, at the length of a page
            raise InputError(
                f"the checkpoint {folder / str(step)} is damaged or of another run: "
                "remove it, or start under another --out"
            ) from error

"""Training state on disk, through Orbax: saved as it lies on the mesh, restored onto any mesh.

A checkpoint holds what training changes (trained parameters, optimizer state, step). The teacher and what stays frozen
come from the run's inputs or its folder again, and the data are a function of (seed, step), so nothing else is needed
to go on.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from minalm.errors import InputError

KEPT = 2  # checkpoints kept, the newest


def _manager(folder: Path, *, together: bool = False):
    """`together`: all processes call this, and wait for each other. Otherwise each reads for itself."""
    import orbax.checkpoint as ocp  # a second of import time that --help need not pay

    own = jax.process_index()
    processes = ocp.options.MultiprocessingOptions(
        primary_host=0 if together else own, active_processes=None if together else {own}
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT, create=together, enable_async_checkpointing=False, multiprocessing_options=processes
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(folder: Path, step: int, items: Mapping[str, PyTree]) -> None:
    """Writes the state after `step` steps; a checkpoint not written to the end does not exist for `restore`.

    All processes call it, and each writes what lies on its devices. Raises InputError for numbers that are not finite:
    the checkpoint before stays the newest.
    """
    import orbax.checkpoint as ocp

    if not _all_finite(items):
        raise InputError(
            f"step {step} left parameters that are not finite, so they are not saved: "
            "start again with a lower --learning-rate or with --clip-norm"
        )

    args = ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()})
    with _manager(folder, together=True) as manager:
        manager.save(step, args=args, force=True)


@jax.jit
def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, finite, jnp.array(True))


def latest(folder: Path) -> int | None:
    """The number of steps after which the newest checkpoint was written; None if there is none."""
    if not folder.is_dir():
        return None
    with _manager(folder) as manager:
        return manager.latest_step()


def restore(folder: Path, like: Mapping[str, PyTree], step: int | None = None) -> dict[str, PyTree]:
    """Items of a checkpoint, by default the newest, with the structure, shapes and layouts of `like`.

    Each process reads what lies on its devices, and waits for no other, so that one that fails leaves none waiting.
    Leaves that are numpy arrays in `like` are restored as numpy arrays. Raises InputError if there is no such
    checkpoint, or if it is damaged or of a run of another shape.
    """
    import orbax.checkpoint as ocp

    def abstract(x):
        if isinstance(x, np.ndarray):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    args = {name: ocp.args.StandardRestore(jax.tree.map(abstract, item)) for name, item in like.items()}
    with _manager(folder) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise InputError(f"there is no checkpoint in {folder}: train until the first is written")
        if step is not None and step not in steps:
            raise InputError(f"{folder} has no checkpoint {step}: name one of {', '.join(map(str, steps))}")
        step = steps[-1] if step is None else step
        try:
            with _late_reads_are_silent():
                return dict(manager.restore(step, args=ocp.args.Composite(**args)))
        except Exception as error:  # Orbax raises whatever its parts raise, at the length of a page
            raise InputError(
                f"the checkpoint {folder / str(step)} is damaged or of another run: "
                "remove it, or start under another --out"
            ) from error


@contextlib.contextmanager
def _late_reads_are_silent() -> Iterator[None]:
    """Where a read fails, TensorStore's threads go on with the others, and each finds the event loop closed in which
    Orbax waited. Python shows that at `sys.unraisablehook`: a traceback for each, around the sentence that says why. Of
    reads that fail too, asyncio logs that nobody asked for their errors.

    After an error this lasts, as the threads do: nobody can wait for them. It begins before the reads, for the first
    thread may be faster than the error.
    """
    show, logger = sys.unraisablehook, logging.getLogger("asyncio")

    def hook(raised: Any) -> None:
        if not (raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"):
            show(raised)

    was_disabled = logger.disabled
    sys.unraisablehook, logger.disabled = hook, True
    yield
    sys.unraisablehook, logger.disabled = show, was_disabled

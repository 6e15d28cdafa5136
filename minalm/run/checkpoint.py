"""Training state on disk, through Orbax: saved as it lies on the mesh, restored onto any mesh.

A checkpoint holds what training changes (trained parameters, optimizer state, step). The teacher and what stays frozen
come from the run's inputs or its folder again, and the data are a function of (seed, step), so nothing else is needed
to go on.

It is written while training goes on, to a folder beside its place, and gets its name when all of it is on disk: last
comes manifest.json, with the hashes of all files. What is read again is compared with it. A checkpoint that is not as
it was written is set aside, never removed.
"""

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from minalm.errors import InputError
from minalm.files import digests, first_changed, read_record, sync, write_record
from minalm.parallel.distributed import is_first

MANIFEST = "manifest.json"
CLOCK = "_CHECKPOINT_METADATA"  # when Orbax wrote what: it adds to that last, and nothing here depends on it
BESIDE = ".orbax-checkpoint-tmp"  # ends the names of Orbax's folders until they are whole


def steps(folder: Path) -> list[int]:
    """The numbers of steps after which checkpoints were written, rising."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name))


def damage(folder: Path, step: int) -> str | None:
    """Why a checkpoint cannot be used; None if every file is as it was written. Reads all of it."""
    place = folder / str(step)
    try:
        return first_changed(place, manifest(folder, step)["files"])
    except FileNotFoundError:
        return f"{place / MANIFEST} is missing"
    except InputError:
        return f"{place / MANIFEST} is damaged"


def manifest(folder: Path, step: int) -> dict[str, Any]:
    """What was noted as a checkpoint was written: `progress` and `logs` are what `Checkpoints.save` got."""
    return read_record(folder / str(step) / MANIFEST)


def check_whole(folder: Path, step: int | None = None) -> int:
    """The number of a checkpoint, by default the newest. Raises InputError if it is not there or not as it was
    written."""
    there = steps(folder)
    if not there:
        raise InputError(f"there is no checkpoint in {folder}: train until the first is written")
    if step is not None and step not in there:
        raise InputError(f"{folder} has no checkpoint {step}: name one of {', '.join(map(str, there))}")
    step = there[-1] if step is None else step
    if (why := damage(folder, step)) is not None:
        others = ", ".join(str(other) for other in there if other != step)
        remedy = f"use that after step {others}" if others else "restore it from a copy, or start again"
        raise InputError(f"the checkpoint {folder / str(step)} is damaged ({why}): {remedy}")
    return step


def newest_whole(folder: Path) -> tuple[int | None, list[str]]:
    """The newest checkpoint that is as it was written, and a sentence for each newer one, which is set aside.

    Raises InputError if there are checkpoints and all are damaged, or if one cannot be read: nothing is changed then.
    """
    found = steps(folder)
    damaged = {}
    for step in reversed(found):
        why = damage(folder, step)
        if why is None:
            break
        damaged[step] = why
    if found and len(damaged) == len(found):
        raise InputError(
            f"no checkpoint in {folder} is as it was written ({damaged[found[-1]]}): restore one from a copy, "
            "or start again under another --out"
        )
    notes = [
        f"the checkpoint after step {step} is damaged ({why}) and set aside as {set_aside(folder, step, 'damaged').name}"
        for step, why in damaged.items()
    ]
    return next((step for step in reversed(found) if step not in damaged), None), notes


def set_aside(folder: Path, step: int, why: str) -> Path:
    """Gives a checkpoint a name under which it is no checkpoint any more."""
    place = folder / f"{why}-{step}"
    number = 1
    while place.exists():
        number += 1
        place = folder / f"{why}-{step}-{number}"
    (folder / str(step)).rename(place)
    sync(folder)
    return place


@dataclasses.dataclass
class _Kept:
    """Which checkpoints Orbax leaves on disk when a new one is written."""

    newest: int
    every: int | None
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint in the order of steps whether it stays. Called by Orbax."""
        there = [checkpoint.step for checkpoint in checkpoints]
        kept = {*there[-self.newest :], self.best()}
        return [step in kept or (self.every is not None and step % self.every == 0) for step in there]


class Checkpoints:
    """The checkpoints of a run that is going on. All processes of a run make it, and wait for each other.

    The `newest` are kept, and of the others those after each `every` steps, and the one that `best` names. Those of
    earlier parts of the run count.
    """

    def __init__(
        self,
        folder: Path,
        newest: int = 2,
        every: int | None = None,
        best: Callable[[], int | None] = lambda: None,
    ):
        import orbax.checkpoint as ocp  # a second of import time that --help need not pay

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what Orbax logs of an error it raises here, too
        self.folder, self._saving, self._manifest = folder.absolute(), None, {}
        self._silence = _late_errors_are_silent()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Kept(newest, every, best),
                async_options=ocp.AsyncOptions(timeout_secs=600, post_finalization_callback=self._write_manifest),
            ),
        )

    def save(
        self, step: int, items: Mapping[str, PyTree], progress: Mapping[str, Any], logs: Mapping[str, Any]
    ) -> None:
        """Begins to write the state after `step` steps, and returns when `items` may change again. A checkpoint that is
        not written to the end does not exist.

        All processes call it, and each writes what lies on its devices. Raises InputError if this one or the one before
        could not be written.
        """
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()})
        self.wait()
        self._manifest = {"step": step, "progress": dict(progress), "logs": dict(logs)}
        with self._sentence(step):
            self._saving = step
            self._manager.save(step, args=args, force=True)

    def check(self) -> None:
        """Raises InputError if a checkpoint could not be written. Takes no time."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is on disk. Raises InputError if it could not be written."""
        if self._saving is not None:
            with self._sentence(self._saving):
                self._manager.wait_until_finished()
            self._saving = None
            if is_first():
                sync(self.folder)

    def __enter__(self) -> "Checkpoints":
        self._silence.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            if error is not None:  # that is what the user should see
                stack.enter_context(contextlib.suppress(InputError))
            self.wait()
        if error is None:
            self._silence.__exit__(None, None, None)
        with contextlib.suppress(Exception):  # the last error again
            self._manager.close()

    def _write_manifest(self) -> None:
        """What Orbax calls on the first process when all is written, before the folder gets its name."""
        (place,) = self.folder.glob(f"{self._manifest['step']}{BESIDE}*")
        files = {name: found for name, found in digests(place).items() if name != CLOCK}
        write_record(place / MANIFEST, {**self._manifest, "files": files})

    @contextlib.contextmanager
    def _sentence(self, step: int) -> Iterator[None]:
        """Orbax and TensorStore raise whatever their parts raise, at the length of pages."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            self._saving = None
            if is_first():  # makes room
                for path in self.folder.glob(f"{step}{BESIDE}*"):
                    shutil.rmtree(path, ignore_errors=True)
            before = max((other for other in steps(self.folder) if other != step), default=None)
            stands = "nothing is saved" if before is None else f"the run stands after step {before}"
            raise InputError(
                f"{self.folder / str(step)} could not be written ({_cause(error)}), and {stands}: "
                "change that and go on with --resume"
            ) from error


def _cause(error: BaseException | None) -> str:
    """What the system said, from the errors of libraries, and of which file."""
    last = ""
    while error is not None:
        text = last = " ".join(str(error).split())
        said = [words for words in map(os.strerror, errno.errorcode) if words in text]
        if isinstance(error, OSError) and error.strerror:
            said = [error.strerror]
        if said:
            files = (
                [error.filename] if isinstance(error, OSError) and error.filename else re.findall('"(/[^"]*)"', text)
            )
            return f"{max(said, key=len)}: {files[-1]}" if files else max(said, key=len)
        error = error.__cause__ or error.__context__
    return last[:200]


@jax.jit
def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, finite, jnp.array(True))


def all_finite(tree: PyTree) -> bool:
    """Whether all numbers of a tree are finite. Of several processes all call it."""
    return bool(_all_finite(tree))


def restore(folder: Path, like: Mapping[str, PyTree], step: int) -> dict[str, PyTree]:
    """Items of a checkpoint, with the structure, shapes and layouts of `like`.

    Each process reads what lies on its devices, and waits for no other, so that one that fails leaves none waiting.
    Leaves that are numpy arrays in `like` are restored as numpy arrays. Raises InputError if the checkpoint cannot be
    read or is of a run of another shape; `check_whole` and `newest_whole` find out whether it is as it was written.
    """
    import orbax.checkpoint as ocp

    def abstract(x):
        if isinstance(x, np.ndarray):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    args = {name: ocp.args.StandardRestore(jax.tree.map(abstract, item)) for name, item in like.items()}
    own = jax.process_index()
    options = ocp.CheckpointManagerOptions(
        create=False,
        enable_async_checkpointing=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own}),
    )
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        try:
            with _late_errors_are_silent():
                return dict(manager.restore(step, args=ocp.args.Composite(**args)))
        except Exception as error:  # Orbax raises whatever its parts raise, at the length of a page
            check_whole(folder, step)
            raise InputError(
                f"the checkpoint {folder / str(step)} is as it was written, but cannot be read ({_cause(error)}): "
                "use the run that wrote it, or more memory"
            ) from error


@contextlib.contextmanager
def _late_errors_are_silent() -> Iterator[None]:
    """Where a read or a write fails, TensorStore's threads go on with the others, and each finds the event loop closed in
    which Orbax waited. Python shows that at `sys.unraisablehook`: a traceback for each, around the sentence that says why.
    Of those that fail too, asyncio logs that nobody asked for their errors.

    After an error this lasts, as the threads do: nobody can wait for them. It begins before the first read, for a thread
    may be faster than the error.
    """
    show, logger = sys.unraisablehook, logging.getLogger("asyncio")

    def hook(raised: Any) -> None:
        if not (raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"):
            show(raised)

    was_disabled = logger.disabled
    sys.unraisablehook, logger.disabled = hook, True
    yield
    sys.unraisablehook, logger.disabled = show, was_disabled

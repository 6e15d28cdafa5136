"""The processes of a run, one for the devices of each host: joining, and ending together.

With one process nothing here costs anything. Bad input ends a run with one sentence on stderr and exit code 1. Where
all processes find the same error, the first says it. Where one fails before a `barrier`, all end there, and the first
that failed says why. A process that fails alone elsewhere says so itself, and JAX ends the others.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from minalm.errors import InputError

SETTINGS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")  # JAX itself reads the first of them


def join() -> None:
    """Makes this process one of several where there is a cluster, before JAX is used. Raises InputError if that fails.

    JAX finds TPU pods, SLURM and Open MPI by itself. Elsewhere the environment describes the cluster: `SETTINGS`.
    """
    address, count, number = map(os.environ.get, SETTINGS)
    jax.config.update("jax_enable_preemption_service", False)  # so that SIGTERM ends a process, as it does a single one
    try:
        jax.distributed.initialize(
            num_processes=None if count is None else int(count),
            process_id=None if number is None else int(number),
            shutdown_timeout_seconds=60,  # how long a process that fails alone waits before JAX ends the others
        )
    except Exception as error:  # what finds the cluster and what connects raise whatever they raise
        if (address, count, number) == (None,) * 3 and isinstance(error, ValueError):
            return  # no address is known: there is no cluster
        raise InputError(
            f"this process could not join the others ({' '.join(str(error).split())[:300]}): start the program on all "
            f"hosts at once, and where JAX does not find the cluster set {', '.join(SETTINGS)}"
        ) from error


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def of_first(number: int) -> int:
    """The first process' number. All must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if jax.distributed.is_initialized() else number


def failed_processes(failed: bool) -> list[int]:
    """The numbers of the processes where `failed` is true. All must call it; none returns before all have."""
    return np.flatnonzero(multihost_utils.process_allgather(np.array(failed))).tolist()


def all_reached(seconds: int) -> bool:
    """Whether all processes call this within some seconds: if all fail alike they do, and one that fails alone times
    out."""
    if not jax.distributed.is_initialized():
        return True
    from orbax.checkpoint import multihost  # a second of import time

    try:
        multihost.get_barrier_sync_fn()(key="all_reached", timeout_ms=1000 * seconds)
    except jax.errors.JaxRuntimeError:  # its time is over
        return False
    return True


def sentence(error: InputError | OSError) -> str:
    """Why the program ends, in one line."""
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename or 'the system'}: {error.strerror or error}: fix this and start again"
    return f"error: {' '.join(text.splitlines())}"


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Bad input, or a system that refuses, ends the program with one sentence."""
    try:
        yield
    except (InputError, OSError) as error:
        alone = not all_reached(seconds=10)
        sys.exit(sentence(error) if alone or is_first() else 1)


@contextlib.contextmanager
def barrier() -> Iterator[None]:
    """What all processes finish before any goes on. Where one fails, all end."""
    error = None
    try:
        yield
    except (InputError, OSError) as found:
        if not jax.distributed.is_initialized():
            raise
        error = found
    if jax.distributed.is_initialized() and (failed := failed_processes(error is not None)):
        sys.exit(sentence(error) if failed[0] == jax.process_index() else 1)

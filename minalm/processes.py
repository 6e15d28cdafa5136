"""The processes of a run, one for the devices of each host. Where there is one, nothing here costs anything."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from minalm.text import InputError

SETTINGS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")  # JAX itself reads the first of them


def join() -> None:
    """Makes this process one of several where there is a cluster, before JAX is used. Raises InputError if that fails.

    JAX finds TPU pods, SLURM and Open MPI by itself. Elsewhere the environment says what there is: `SETTINGS`.
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
        if (address, count, number) == (None,) * 3 and str(error) == "coordinator_address should be defined.":
            return  # there is no cluster
        raise InputError(
            f"this process could not join the others ({' '.join(str(error).split())[:300]}): start the program on all "
            f"hosts at once, and where JAX does not find the cluster set {', '.join(SETTINGS)}"
        ) from error


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def which(here: bool) -> list[int]:
    """The numbers of the processes where `here` is true. All must call it; none returns before all have."""
    return np.flatnonzero(multihost_utils.process_allgather(np.array(here))).tolist()


def all_come_here(seconds: int) -> bool:
    """Whether all processes call this within some seconds. Of two that fail alike both do, of one that fails alone none."""
    if not jax.distributed.is_initialized():
        return True
    from orbax.checkpoint import multihost  # a second of import time

    try:
        multihost.get_barrier_sync_fn()(key="all_come_here", timeout_ms=1000 * seconds)
    except jax.errors.JaxRuntimeError:  # its time is over
        return False
    return True

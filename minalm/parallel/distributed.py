"""The processes of a run, one for the devices of each host: joining, and ending together.

With one process nothing here costs anything. Bad input ends a run with one sentence on stderr and exit code 1. Where
all processes find the same error, the first says it. Where one fails before a `barrier`, all end there, and the first
that failed says why. A process that fails alone elsewhere says so itself, and JAX ends the others, as it does where one
is killed: at once if that was the first, else within `HEARTBEAT` seconds.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minalm.errors import InputError
from minalm.parallel import last_words

# Errors of XLA, which begin with the name of a status, about the other processes.
LOST = re.compile(
    r"(?=[A-Z_]+: )(?is:.*)(?i:gloo|connection|coordination|unavailable|peer|preempted|distributed service|heartbeat)"
)
HEARTBEAT = 40  # seconds after which a process that is not heard of counts as dead
JOINING = 60  # seconds in which all processes must come
SETTINGS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")  # JAX itself reads the first of them


def join() -> None:
    """Makes this process one of several where there is a cluster, before JAX is used. Raises InputError if that fails.

    JAX finds TPU pods, SLURM and Open MPI by itself. Elsewhere the environment describes the cluster: `SETTINGS`.
    """
    address, count, number = map(os.environ.get, SETTINGS)
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is heard by run.stop
    waiting = threading.Timer(JOINING, _give_up)  # JAX would abort this process instead of raising an error
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            num_processes=None if count is None else int(count),
            process_id=None if number is None else int(number),
            initialization_timeout=10 * JOINING,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=30,  # how long a process that fails alone waits before JAX ends the others
        )
    except Exception as error:  # what finds the cluster and what connects raise whatever they raise
        if (address, count, number) == (None,) * 3 and isinstance(error, ValueError):
            return  # no address is known: there is no cluster
        raise InputError(_not_joined(" ".join(str(error).split())[:300])) from error
    finally:
        waiting.cancel()
    _end_in_one_sentence()


def _not_joined(reason: str) -> str:
    return (
        f"this process could not join the others ({reason}): start the program on all hosts at once, and where JAX does "
        f"not find the cluster set {', '.join(SETTINGS)}"
    )


def _give_up() -> None:
    """Ends this process, which waits for the others within JAX."""
    print(f"error: {_not_joined(f'not all came within {JOINING} seconds')}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_in_one_sentence() -> None:
    """Where another process dies, JAX aborts this one from a thread of C++ and writes a page of its own: standard error
    goes through `last_words`, and the abort becomes an exit."""
    if sys.platform != "linux":
        return
    read, write = os.pipe()
    program = Path(__file__).with_name("last_words.py")
    subprocess.Popen([sys.executable, "-S", program], stdin=read, start_new_session=True)
    sys.stderr.flush()
    os.dup2(write, 2)
    os.close(read)
    os.close(write)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc._exit, ctypes.c_void_p))  # with the signal's number as exit code


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def of_first(number: int) -> int:
    """The first process' number. All must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if jax.distributed.is_initialized() else number


def differences(values: Mapping[str, str]) -> list[tuple[str, int, str | None, str | None]]:
    """Where a process has another value than the first: the name, the process, and the values of both. All must call
    it, and all get the same answer."""
    if not jax.distributed.is_initialized():
        return []
    own = json.dumps(dict(values)).encode()
    hashes = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(own).digest(), np.uint8))
    if (hashes == hashes[0]).all():
        return []
    size = int(multihost_utils.process_allgather(np.int32(len(own))).max())
    padded = np.frombuffer(own.ljust(size), np.uint8)
    first, *others = (json.loads(each.tobytes()) for each in multihost_utils.process_allgather(padded))
    return [
        (name, number, other.get(name), first.get(name))
        for number, other in enumerate(others, 1)
        for name in (first | other)
        if other.get(name) != first.get(name)
    ]


class AnyProcess:
    """Whether any process raises a flag. All must call it, equally often; the answer is that of the call before.

    So nobody waits: what travels with one step is there when the next has been dispatched. JAX's own preemption service
    agrees on a step too, but knows SIGTERM alone.
    """

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        if jax.distributed.is_initialized():
            devices = {device.process_index: device for device in reversed(jax.devices())}
            mesh = Mesh([devices[number] for number in range(jax.process_count())], "process")
            self._layout = NamedSharding(mesh, P("process"))
            self._any = jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, P()))

    def __call__(self, flag: bool) -> bool:
        """Raises the flag of this process, or not."""
        if not jax.distributed.is_initialized():
            return flag
        before, flags = self._pending, np.array([flag])
        self._pending = self._any(jax.make_array_from_process_local_data(self._layout, flags))
        return before is not None and bool(before.addressable_data(0))


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
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # JAX raises one or the other
        if not jax.distributed.is_initialized() or not LOST.match(str(error)):
            raise
        print(last_words.SENTENCE.decode(), end="", file=sys.stderr, flush=True)
        os._exit(1)  # JAX would wait for the others


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

"""Ctrl-C and SIGTERM: the run ends its step, saves, and says where it stands. A second signal ends it at once.

Python calls a handler between two of its own instructions, and XLA may compile for minutes without one. So signals are
also written to a pipe as they come (signal.set_wakeup_fd), and a thread reads it.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

from minalm.parallel.distributed import AnyProcess, is_first
from minalm.run import console
from minalm.run.checkpoint import steps

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE = 0.1  # seconds in which signals count as one: launchers pass on what the terminal has sent already


def where(out: Path) -> str | None:
    """Where the run in `out` stands and how it goes on; None if nothing is saved."""
    saved = max(steps(out / "checkpoints"), default=None)
    if saved is None:
        return None
    return f"The run in {out} stands after step {saved:,}, which is saved: the same command with --resume goes on."


class StopSignals:
    """While this is open, the first signal ends the run in `out` with a sentence and the exit code 0 if something is
    saved; in a loop that looks at it, when the loop has ended its step. A second signal ends the process at once, with
    the exit code 130 or 143.

    In another thread than the main one, which alone gets signals, it does nothing.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._asked: int | None = None
        self._in_loop = False

    def __enter__(self) -> "StopSignals":
        self._before: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
            self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before:
            signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(self._write)
            self._watcher.join()
            os.close(self._read)
        if kind is KeyboardInterrupt and self._asked is not None:
            self.say_where()
            sys.exit(0 if where(self._out) else 128 + self._asked)

    def say_where(self) -> None:
        """Says where the run stands, on the first process."""
        if is_first():
            console.say(where(self._out) or "Ended before a step was saved: start again.")

    @contextlib.contextmanager
    def in_loop(self) -> Iterator[Callable[[], bool]]:
        """A loop that asks, after each step, whether it should end there. Of several processes all ask, and all hear the
        same one step later."""
        any_process = AnyProcess()
        self._in_loop = True
        try:
            yield lambda: any_process(self._asked is not None)
        finally:
            self._in_loop = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or number
        if not self._in_loop:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        first = None
        while number := os.read(self._read, 1):
            if number[0] not in SIGNALS:
                continue
            name = signal.Signals(number[0]).name
            if first is None:
                first, self._asked = time.monotonic(), self._asked or number[0]
                what = "ends its step and saves" if self._in_loop else "ends"
                _tell(f"{name}: the run {what}; a second signal ends it at once.")
            elif time.monotonic() - first > ONE:
                _tell(f"{CURSOR if sys.stdout.isatty() else ''}{name}: ended at once.")
                os._exit(128 + number[0])


CURSOR = "\x1b[?25h"  # shows it: a progress bar hides it


def _tell(text: str) -> None:
    """A line on stderr, whatever other threads hold."""
    with contextlib.suppress(OSError):  # nobody may read it any more
        os.write(2, f"{text}\n".encode())

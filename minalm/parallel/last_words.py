"""What stands between a process of several and its standard error, as a process of its own: see `distributed.join`.

It passes on what it reads, line by line. Where the process dies because another one did, JAX writes a page of C++, which
nobody can stop from within: one sentence takes its place. Imports nothing of this package.
"""

import os
import signal

OF_JAX = (b"coordination_service_agent.cc", b"Terminating process because the JAX distributed service")
SENTENCE = (
    b"error: another process of this run has ended or cannot be reached, so this one ends too: see what the others say, "
    b"and start all of them again\n"
)


def main() -> None:
    """Reads until the process has ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # of a terminal or a scheduler, to all processes
        signal.signal(number, signal.SIG_IGN)
    rest, ended = b"", False
    while block := os.read(0, 1 << 16):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if ended:
                continue
            dies = any(words in line for words in OF_JAX)
            os.write(2, SENTENCE if dies else line + b"\n")
            ended = dies or line.startswith(b"error: ")  # it has said why
    if rest and not ended:
        os.write(2, rest)


if __name__ == "__main__":
    main()

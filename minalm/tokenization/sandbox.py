"""The process that renders chat templates. It imports nothing of this package, and is started by `chat.Renderer`.

A template comes from strangers. Jinja's immutable sandbox keeps it from everything but its arguments; that it runs in a
process with little memory, which is ended when it takes too long, keeps it from filling the memory and from never
ending. A request and its answer are JSON: each render is the text that the template wrote, or why it did not.
"""

import contextlib
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

MEMORY = 1 << 30  # bytes of address space
LONGEST = 1 << 24  # characters that a template may write


class Refusal(Exception):
    """What a template says when it refuses a chat."""


class Generation(Extension):
    """`{% generation %}`: its text is what the assistant generates. It is written between two marks, if there are
    any."""

    tags = {"generation"}
    marks = ("", "")

    def parse(self, parser: Parser) -> nodes.Node:
        """What Jinja calls at the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body, lineno=line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return caller().join(Generation.marks)


class PlainNamespace(Namespace):
    """A namespace without names that begin with an underscore: those reach into Python."""

    def __init__(*arguments: Any, **values: Any):
        self, *rest = arguments
        values = dict(*rest, **values)
        if any(str(name).startswith("_") for name in values):
            raise SecurityError("a namespace's name begins with an underscore")
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError("a namespace's name begins with an underscore")
        super().__setitem__(name, value)


@lru_cache(64)
def compiled(source: str, date: str) -> Any:
    """The template, with what transformers gives to chat templates. Its clock stands still at `date`."""

    def raise_exception(message: str) -> None:
        raise Refusal(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson  # Jinja's own writes < and > for HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.fromisoformat(date).strftime
    environment.globals["namespace"] = PlainNamespace
    return environment.from_string(source)


def render(source: str, date: str, values: dict[str, Any], marks: Sequence[str]) -> tuple[str | None, str]:
    """(what the template writes, "") or (None, why it writes nothing)."""
    Generation.marks = marks
    try:
        size, blocks = 0, []
        for block in compiled(source, date).generate(**values):
            size += len(block)
            blocks.append(block)
            if size > LONGEST:
                raise OverflowError("it writes without end")
        return "".join(blocks), ""
    except Refusal as error:
        return None, " ".join(str(error).split())[:300]
    except MemoryError:
        return None, "it takes more than a gigabyte of memory"
    except BaseException as error:  # of a syntax error in it, and of what it does
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:300]


def main(read: int, write: int) -> None:
    """Answers requests until their pipe is closed. `read` and `write` are descriptors of pipes."""
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    requests, answers = Connection(read, writable=False), Connection(write, readable=False)
    while True:
        try:
            request = json.loads(requests.recv_bytes())
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = math.ceil(used.ru_utime + used.ru_stime + request["seconds"])
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))  # SIGXCPU then ends this process
        found = [render(date=request["date"], **each) for each in request["renders"]]
        answers.send_bytes(json.dumps(found).encode())


if __name__ == "__main__":
    sys.setrecursionlimit(2000)
    main(*map(int, sys.argv[1:]))
    os._exit(0)

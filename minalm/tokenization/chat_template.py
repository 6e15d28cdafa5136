"""The chat template of a checkpoint, and what it writes. It is rendered in a process of its own (sandbox.py)."""

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from multiprocessing.connection import Connection
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

from minalm.errors import InputError
from minalm.tokenization.files import read_bytes

SECONDS = 10.0  # of a processor, that a template may take
PATIENCE = 3.0  # times as long it may take by the clock, on a machine that has other things to do
LONGEST_SOURCE = 1 << 20  # characters; known ones have up to 30,000
TOO_SLOW = "it takes more than ten seconds"
TOO_LARGE = "it takes more than a gigabyte of memory"
CLOCK = "2026-01-01"  # for renderings whose date does not matter


class Family(NamedTuple):
    """Tokenizers whose special tokens say how they write chats and what they are for, where no file does."""

    needed: tuple[str, ...]  # the special tokens that its template takes
    names: Mapping[str, str]


FAMILIES = {  # by the name of the file in templates/
    "llama3": Family(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"},
    ),
    "gemma": Family(
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    ),
    "chatml": Family(
        ("<|im_start|>", "<|im_end|>"),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
}
PRIVATE = [chr(code) for code in range(0xE000, 0xE100)]  # characters without a meaning
PROBE = {"user": "\ue0f0", "assistant": "\ue0f1", "system": "\ue0f2"}  # contents that can be told from all else


class ChatTemplate(NamedTuple):
    """A Jinja template, where it stands, and the special tokens that it knows by name."""

    file: str  # what messages call it
    sources: Mapping[str, str]  # "default"; some checkpoints have one more for chats with tools, "tool_use"
    names: Mapping[str, str]  # bos_token, eos_token, ... -> the token

    def source(self, tools: object = None) -> str:
        """The template for a chat, as transformers chooses it."""
        return self.sources["tool_use" if tools is not None and "tool_use" in self.sources else "default"]

    @property
    def used_names(self) -> dict[str, str]:
        """Those names that the template mentions."""
        return {n: word for n, word in self.names.items() if any(n in source for source in self.sources.values())}


def read_chat_template(folder: Path, names: Mapping[str, str], special: Collection[str]) -> ChatTemplate | None:
    """The template of a tokenizer: that of its folder (chat_template.jinja, else in tokenizer_config.json), or where it
    brings none, that of the first of FAMILIES whose special tokens it has, or none.

    Raises InputError where it is no text.
    """
    file = folder / "chat_template.jinja"
    try:
        if file.exists():
            sources = {"default": read_bytes(file).decode()}  # every line break as it is
            others = sorted(folder.glob("additional_chat_templates/*.jinja"))
            sources |= {other.stem: read_bytes(other).decode() for other in others}
        else:
            file = folder / "tokenizer_config.json"
            found = json.loads(read_bytes(file)).get("chat_template") if file.exists() else None
            if isinstance(found, list):  # several, with names
                found = {item["name"]: item["template"] for item in found}
            sources = found if isinstance(found, dict) else {} if found is None else {"default": found}
        if not all(isinstance(source, str) for source in sources.values()) or (sources and "default" not in sources):
            raise TypeError
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} holds no chat template as text: take it from the original model") from error
    if (length := sum(map(len, sources.values()))) > LONGEST_SOURCE:
        raise InputError(
            f"{file} holds a chat template of {length:,} characters, where none has more than {LONGEST_SOURCE:,}: "
            "take it from the original model"
        )
    if sources:
        return ChatTemplate(str(file), sources, names)
    if (name := family(special)) is None:
        return None
    path = Path(__file__).with_name("templates") / f"{name}.jinja"
    return ChatTemplate(str(path), {"default": path.read_text("utf-8")}, names)


def family(special: Collection[str]) -> str | None:
    """The first of FAMILIES that a tokenizer with these special tokens belongs to."""
    return next((name for name, family in FAMILIES.items() if set(family.needed) <= set(special)), None)


# --- special tokens -----------------------------------------------------------------------------------------------


class SpecialTokens(NamedTuple):
    """Finds special tokens in a text as the tokenizer would: of those that begin in one place the longest."""

    words: frozenset[str]
    pattern: re.Pattern

    @classmethod
    def of(cls, words: Collection[str], strips: Mapping[str, tuple[bool, bool]]) -> "SpecialTokens":
        """`strips`: tokens that take the white space before and after them along."""
        spaces = {word: [r"\s*" * strip for strip in strips.get(word, (False, False))] for word in words}
        longest_first = sorted(filter(None, words), key=len, reverse=True)
        each = [f"{spaces[word][0]}{re.escape(word)}{spaces[word][1]}" for word in longest_first]
        return cls(frozenset(words), re.compile(f"({'|'.join(each) or '(?!)'})"))

    def split(self, text: str) -> list[str]:
        """The text before, between and after special tokens, in turn with these: the odd items."""
        parts = self.pattern.split(text)
        parts[1::2] = map(self.word, parts[1::2])
        return parts

    def word(self, found: str) -> str:
        """The special token in a match of `pattern`."""
        return found if found in self.words else found.strip()


def special_tokens_of(template: ChatTemplate, special: SpecialTokens) -> list[str]:
    """The special tokens that a template writes, as far as a few chats show, in their order, and its source."""
    literal = sorted(word for word in special.words if any(word in source for source in template.sources.values()))
    return list(dict.fromkeys([*(w for written in probe(template) for w in special.split(written)[1::2]), *literal]))


def repeats(template: ChatTemplate, word: str, special: SpecialTokens) -> bool:
    """Whether a chat holds a special token more than once."""
    return any(special.split(written)[1::2].count(word) > 1 for written in probe(template))


def stop_tokens(template: ChatTemplate, special: SpecialTokens) -> list[str]:
    """The special tokens that end an answer: within a chat, and at its end."""
    found = []
    for written in probe(template):
        behind = [special.split(part)[:2] for part in written.split(PROBE["assistant"])[1:]]
        found += [parts[1] for parts in behind if len(parts) == 2 and not parts[0].strip()]
    return list(dict.fromkeys(found))


def answer_end(template: ChatTemplate, special: SpecialTokens) -> str:
    """The plain text that ends every answer, without white space around it; "" where a special token does it."""
    behind = [part for written in probe(template) for part in written.split(PROBE["assistant"])[1:]]
    return special.split(commonprefix(behind))[0].strip()


def special_token_places(template: ChatTemplate, special: SpecialTokens) -> dict[tuple[int, int], str]:
    """(gap between two messages' texts, number within) -> the special token there, for a chat of four messages."""
    chats = [written for written in probe(template) if written.count(PROBE["assistant"]) == 2]
    gaps = re.split("|".join(PROBE.values()), chats[0])[1:] if chats else []
    return {(gap, n): word for gap, text in enumerate(gaps) for n, word in enumerate(special.split(text)[1::2])}


def probe(template: ChatTemplate) -> tuple[str, ...]:
    """What the template writes for a few chats with the contents PROBE; fewer if it refuses some, or is given up. That
    is waited for once."""
    return _probe(template.file, tuple(template.sources.items()), tuple(template.names.items()))


@lru_cache
def _probe(file: str, sources: tuple[tuple[str, str], ...], names: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    template = ChatTemplate(file, dict(sources), dict(names))
    user, assistant, system = ({"role": role, "content": content} for role, content in PROBE.items())
    chats = [[user, assistant] * 2, [user, assistant], [system, user, assistant], [user]]
    renders = [Render(template, chat, add_generation_prompt=len(chat) == 1) for chat in chats]
    return tuple(written for written, _ in render(renders, CLOCK) if written is not None)


# --- rendering ----------------------------------------------------------------------------------------------------


class Render(NamedTuple):
    """One rendering: what transformers.apply_chat_template takes."""

    template: ChatTemplate
    messages: Sequence[Mapping[str, Any]]
    tools: Any = None
    documents: Any = None
    keywords: Mapping[str, Any] = {}  # further ones, of the column `chat_template_kwargs`
    add_generation_prompt: bool = False
    marks: tuple[str, str] = ("", "")  # written around `{% generation %}`


def render(renders: Sequence[Render], date: str) -> list[tuple[str | None, str]]:
    """For each, the text and "", or None and why there is none. `date` (ISO 8601) is the template's clock.

    Templates come from strangers: what one can read is its arguments, and it has SECONDS and sandbox.MEMORY bytes.
    """
    request = [
        {
            "source": one.template.source(one.tools),
            "values": {
                "messages": one.messages,
                "tools": one.tools,
                "documents": one.documents,
                "add_generation_prompt": one.add_generation_prompt,
                **one.template.names,
                **one.keywords,
            },
            "marks": one.marks,
        }
        for one in renders
    ]
    return [tuple(found) for found in _worker.ask({"date": date, "renders": request}, len(renders))]


class _Worker:
    """The process of sandbox.py, started when it is needed."""

    def __init__(self) -> None:
        self.lock, self.process = threading.Lock(), None

    def start(self) -> None:
        (read, requests), (answers, write) = os.pipe(), os.pipe()
        command = [sys.executable, "-P", str(Path(__file__).with_name("sandbox.py")), str(read), str(write)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(read, write), start_new_session=True
        )
        os.close(read)
        os.close(write)
        self.requests, self.answers = Connection(requests, readable=False), Connection(answers, writable=False)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.requests.close()
            self.answers.close()
            self.process = None

    def ask(self, request: Any, count: int) -> list:
        """The answer to each of the `count` renders of a request: [text or None, why there is none]."""
        with self.lock:
            if self.process is None:
                self.start()
            try:
                self.requests.send_bytes(json.dumps({**request, "seconds": SECONDS}).encode())
                if self.answers.poll(PATIENCE * SECONDS):
                    return json.loads(self.answers.recv_bytes())
                why = TOO_SLOW
            except (EOFError, OSError):
                why = TOO_SLOW if self.process.wait() == -signal.SIGXCPU else TOO_LARGE
            self.close()
            return [[None, why]] * count


_worker = _Worker()
atexit.register(_worker.close)


def private_characters(count: int, values: Any) -> list[str]:
    """Characters without a meaning that appear nowhere in some JSON values, not even escaped. Raises InputError."""
    text = json.dumps(values)  # which escapes them
    free = list(islice((mark for mark in PRIVATE if json.dumps(mark)[1:-1] not in text), count))
    if len(free) < count:
        raise InputError("a chat uses all of Unicode's first private characters (U+E000 to U+E0FF): leave it out")
    return free

"""The chat template of a checkpoint: rendered in a sandbox, and taken apart into what it writes around each message."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment, SecurityError

from minalm.errors import InputError
from minalm.text.documents import ROLES, end_of

Parts = dict[str, tuple[str, ...]]  # a special part, or "pad" -> the special strings and words that spell it


class ChatTemplate(NamedTuple):
    """A Jinja template and the file that it stands in, which messages name."""

    file: Path
    source: str


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The template in a model's folder: chat_template.jinja, or the default one of tokenizer_config.json, or none.

    Raises InputError where there is one that is no text.
    """
    file = folder / "chat_template.jinja"
    try:
        if file.is_file():
            return ChatTemplate(file, file.read_bytes().decode())  # every line break as it is
        file = folder / "tokenizer_config.json"
        source = json.loads(file.read_text("utf-8")).get("chat_template") if file.is_file() else None
        if isinstance(source, list):  # several, with names
            source = {item["name"]: item["template"] for item in source}.get("default")
        if not isinstance(source, str | None):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file} holds no chat template as text: take it from the original model") from error
    return None if source is None else ChatTemplate(file, source)


def render(template: ChatTemplate, messages: Sequence[Mapping[str, str]], names: Mapping[str, str]) -> str:
    """What the template writes for messages with `role` and `content`, as transformers would have it.

    `names` are the tokens that the template may ask for, such as `bos_token`. The template comes from strangers: it can
    read nothing but its arguments, cannot count on for ever, and whatever it raises becomes an InputError.
    """
    try:
        environment = _environment()
        values = {"messages": [dict(message) for message in messages], "add_generation_prompt": False, **names}
        return environment.from_string(template.source).render(tools=None, documents=None, **values)
    except Exception as error:  # of a syntax error in it, and of what it does
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"{template.file}: the chat template cannot be rendered ({reason}): "
            "give plain texts, or correct the template"
        ) from error


def chat_parts(template: ChatTemplate, names: Mapping[str, str], special: Mapping[str, int]) -> Parts:
    """What a template writes for each part of a chat, as special tokens and words of text in between.

    It is found by rendering chats whose texts can be told from all else, and what is found writes exactly these chats.
    A default system message, which a template adds where a chat has none, is left out. A role "system" that the
    template refuses, or writes into another message, is none of the parts. Raises InputError where the template cannot
    be rendered, or does not write a user's and an assistant's messages in the same way wherever they stand.
    """
    bos = names.get("bos_token", "")
    named = {role[0]: role for role in ROLES}  # a chat is given by the initials of its roles

    def gaps(chat: str) -> list[str]:
        """What stands before, between and after the texts of a chat."""
        texts = [f"Zq{number}qZ" for number in range(len(chat))]
        messages = [{"role": named[initial], "content": text} for initial, text in zip(chat, texts, strict=True)]
        rendered = render(template, messages, names)
        if re.findall(r"Zq\d+qZ", rendered) != texts:
            raise _strange(template)
        return re.split(r"Zq\d+qZ", rendered)

    def written(chat: str, before: str) -> bool:
        """Whether the parts, put together after `before`, are what the template writes."""
        roles = [named[initial] for initial in chat]
        after = [ends[end_of(role, number == len(chat)).part] for number, role in enumerate(roles, start=1)]
        following = [*(headers[role] for role in roles[1:]), ""]
        together = [end + header for end, header in zip(after, following, strict=True)]
        return gaps(chat) == [before + headers[roles[0]], *together]

    (opening, user_end), (_, to_answer, to_question, _, chat_end) = gaps("u"), gaps("uaua")
    # A name of bos that stands before other messages as well is no bos (SmolLM2).
    start = bos if opening.startswith(bos) and bos not in to_answer else ""
    cut = len(to_question) - len(_common_end(to_question, opening[len(start) :]))
    for turn_end in (user_end, chat_end, to_question[:cut]):  # the likeliest first: the others may end elsewhere
        header = to_question.removeprefix(turn_end)
        if to_question.startswith(turn_end) and opening[len(start) :].endswith(header):
            break
    if not to_answer.startswith(user_end):
        raise _strange(template)
    headers = {"user": header, "assistant": to_answer.removeprefix(user_end)}
    ends = {"end_of_user": user_end, "end_of_turn": turn_end, "end_of_chat": chat_end}
    before = opening.removesuffix(header)
    if all(word in special for word in _words(before, special)):
        start = before  # else a default system message
    if not all(written(chat, before) for chat in ("u", "ua", "uau", "uaua")):
        raise _strange(template)
    try:
        system, to_question, _ = gaps("su")
        headers["system"], ends["end_of_system"] = system.removeprefix(start), to_question.removesuffix(header)
        has_system = all(written(chat, start) for chat in ("su", "sua", "suau", "suaua"))
    except InputError:
        has_system = False
    if not has_system:
        headers.pop("system", None)
        ends.pop("end_of_system", None)
    split = {part: _words(text, special) for part, text in ends.items()}
    return {"start_of_chat": _words(start, special), **_header_parts(headers, special), **split}


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers renders chat templates in, and a limit on the numbers that one rendering counts through."""
    left = MAX_RANGE

    def bounded_range(start: int, stop: int | None = None, step: int = 1) -> range:
        nonlocal left
        numbers = range(start) if stop is None else range(start, stop, step)
        left -= len(numbers)
        if left < 0:
            raise OverflowError("it counts for too long")
        return numbers

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson  # Jinja's own writes < and > for HTML
    environment.globals["range"] = bounded_range
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which numbers alone are multiplied, and none is raised to a power: either could fill the memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not all(
            isinstance(value, int | float) and abs(value) < 2**63 for value in (left, right)
        ):
            raise SecurityError(f"{operator} of {type(left).__name__} and {type(right).__name__}")
        return left * right


def _strange(template: ChatTemplate) -> InputError:
    return InputError(
        f"{template.file}: the chat template does not write each message's text once, in order and in the same way "
        "wherever it stands: give plain texts, or another template"
    )


def _common_end(left: str, right: str) -> str:
    pairs = zip(reversed(left), reversed(right))
    return left[len(left) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) :]


def _words(text: str, special: Mapping[str, int]) -> tuple[str, ...]:
    """A text cut at special tokens, which are words of their own."""
    tokens = "|".join(map(re.escape, sorted(filter(None, special), key=len, reverse=True)))
    return tuple(filter(None, re.split(f"({tokens})", text))) if tokens else tuple(filter(None, [text]))


def _header_parts(headers: Mapping[str, str], special: Mapping[str, int]) -> Parts:
    """Headers as an opening and a closing that all roles share and what is between, as Llama 3's is taken apart.

    Where they share none (TinyLlama), all of a header is the role's: words are not cut where the tokenizer would not.
    """
    words = {role: _words(header, special) for role, header in headers.items()}
    shared = takewhile(lambda column: len(set(column)) == 1 and column[0] in special, zip(*words.values()))
    opening = tuple(column[0] for column in shared)
    rest = {role: "".join(row[len(opening) :]) for role, row in words.items()}
    names = {role: re.match("[A-Za-z]*", text)[0] for role, text in rest.items()}
    closings = {text[len(names[role]) :] for role, text in rest.items()}
    closing = _words(min(closings), special)
    if all(names.values()) and len(closings) == 1 and closing and (closing[0] in special or closing[0][0] == "\n"):
        return {"header_open": opening, **{role: (name,) for role, name in names.items()}, "header_close": closing}
    return {"header_open": opening, **{role: _words(text, special) for role, text in rest.items()}, "header_close": ()}

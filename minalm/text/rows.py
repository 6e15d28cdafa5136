"""Rows of data -> documents. A row is a JSON object, in whatever file it stands.

The columns that are known, of which a row has one set (a null is none):

    text                             a text
    messages                         a chat: objects with `role` and `content`
    conversations                    a chat as ShareGPT has it: `from` and `value`
    prompt, completion               two texts that are one, or two lists of messages that are one chat
    instruction, (input), output     a question and its answer, as Alpaca has them, as a chat; `system` may stand before

What else a chat's template takes (`tools`, `documents`, `chat_template_kwargs`) goes along. Other columns are ignored.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from minalm.errors import InputError
from minalm.text.documents import Piece, Segment, Special

FORMS = (
    ("text",),
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "output"),
)
BESIDE = ("input", "system", "tools", "documents", "chat_template_kwargs")  # columns that go along
KNOWN = ", ".join(" with ".join(f"`{name}`" for name in form) for form in FORMS)
ROLES = {  # of ShareGPT's `from`
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}


class ReadChat(Protocol):
    """What makes a document of a row with `messages` (tokenization.chats)."""

    notes: dict[str, int]  # what a user should know -> in how many chats

    @property
    def key(self) -> str:
        """A hash of all that the documents depend on, beside the rows."""

    def __call__(self, row: Mapping[str, Any]) -> Piece:
        """The document; () if nothing is said. Raises InputError."""


class RowReader(NamedTuple):
    """How rows are read."""

    read_chat: ReadChat | None = None  # None: chats are refused
    text_column: str | None = None  # the column that is the text, in place of the known ones
    mask_prompt: bool = False  # a `prompt` does not count in the losses
    skip_bad: bool = False  # rows that cannot be read are left out, and counted

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are looked at."""
        if self.text_column is not None:
            return (self.text_column,)
        return (*(name for form in FORMS for name in form), *BESIDE)

    def parse(self, line: bytes) -> Piece:
        """The document on a line, its first segment included; () if there is none. Raises InputError, with the keys
        of the row."""
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise InputError("not UTF-8: convert the file to UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON ({error}): write one JSON object on each line") from error
        if not isinstance(row, dict):
            raise InputError(f"not an object with one of {KNOWN}: write one JSON object on each line")
        try:
            return self.document(row)
        except InputError as error:
            raise InputError(f"{error} (the row has {_listed(row)})") from error

    def document(self, row: Mapping[str, Any]) -> Piece:
        """The document of a row, its first segment included; () if there is none. Raises InputError."""
        if self.text_column is not None:
            if row.get(self.text_column) is None:
                raise InputError(f"there is no `{self.text_column}`: name another --text-column, or write one")
            return _text_document(checked_text(row[self.text_column], self.text_column))
        found = [form for form in FORMS if row.get(form[0]) is not None and row.get(form[-1]) is not None]
        if len(found) != 1:
            which = f"{' and '.join(f'`{form[0]}`' for form in found)}, of which one is wanted" if found else "none"
            raise InputError(f"it has of {KNOWN} {which}: write exactly one, or name the text with --text-column")
        (form,) = found
        if form == ("text",):
            return _text_document(checked_text(row["text"], "text"))
        if form == ("prompt", "completion") and isinstance(row["prompt"], str):
            return self._completed(row)
        if self.read_chat is None:
            raise InputError("a chat, which cannot be read without a chat template: write `text`")
        return self.read_chat({**{name: row.get(name) for name in BESIDE[2:]}, "messages": self._messages(row, form)})

    def _completed(self, row: Mapping[str, Any]) -> Piece:
        """A text of two parts, one text to a tokenizer."""
        prompt = Segment(checked_text(row["prompt"], "prompt"), not self.mask_prompt)
        completion = Segment(checked_text(row["completion"], "completion"))
        texts = (segment for segment in (prompt, completion) if segment.content)
        return Segment(Special("bos"), not self.mask_prompt), *texts, Segment(Special("eos"))

    def _messages(self, row: Mapping[str, Any], form: tuple[str, ...]) -> Any:
        if form == ("messages",):
            return row["messages"]
        if form == ("conversations",):
            return _from_sharegpt(row)
        if form == ("instruction", "output"):
            return _from_alpaca(row)
        prompt, completion = row["prompt"], row["completion"]
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise InputError("`prompt` and `completion` are not both texts or both lists of messages: write one kind")
        if self.mask_prompt:  # the answers in the prompt are part of it
            answers = [isinstance(message, dict) and message.get("role") == "assistant" for message in prompt]
            prompt = [{**message, "weight": 0} if answer else message for message, answer in zip(prompt, answers)]
        return prompt + completion


def checked_text(text: object, column: str) -> str:
    """The text of a column. Raises InputError if it is none."""
    if not isinstance(text, str):
        raise InputError(f"`{column}` is not a string: write a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise InputError(f"`{column}` contains half of a surrogate pair, which is not valid text: remove it") from error
    return text


def _text_document(text: str) -> Piece:
    return Segment(Special("bos")), Segment(text), Segment(Special("eos"))


def _from_sharegpt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError("`conversations` is not a list of objects: write objects with `from` and `value`")
    messages = _system(row)
    for turn in turns:
        if "role" in turn and turn.get("from") is None:  # some call them by the names of `messages`
            messages.append(turn)
            continue
        if turn.get("from") not in ROLES:
            raise InputError(f"`from` is {turn.get('from')!r} in `conversations`: write one of {', '.join(ROLES)}")
        kept = {name: value for name, value in turn.items() if name not in ("from", "value")}
        messages.append({**kept, "role": ROLES[turn["from"]], "content": turn.get("value")})
    return messages


def _from_alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts = [checked_text(row[name], name) for name in ("instruction", "input") if row.get(name)]
    return [
        *_system(row),
        {"role": "user", "content": "\n\n".join(parts)},
        {"role": "assistant", "content": checked_text(row["output"], "output")},
    ]


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _listed(row: Mapping[str, Any]) -> str:
    """Its keys, for a message."""
    names = [str(name)[:40] for name in row]
    return f"the keys {', '.join(names[:20])}{' and more' if len(names) > 20 else ''}" if names else "no keys"

"""Chats as documents: what the templates of both sides write, special tokens told from text, and what counts.

A chat is rendered whole. What looks like a special token in its messages is made unrecognisable first, so all that is
found in the result is the template's own; then the messages are restored. Where student and teacher have one template,
both read the same text. Where not, the texts of the messages are shared, and what stands between them is a Markup.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from minalm.errors import InputError
from minalm.text.documents import Markup, Piece, Segment
from minalm.tokenization.chat_template import ChatTemplate, Render, SpecialTokens, private_characters, render
from minalm.tokenization.vocabulary import Vocabulary

# Keys of a message that hold what it says, beside `content`. Names in a row mean the same.
REASONING = ("reasoning_content", "thinking", "reasoning")
CALLS = ("tool_calls", "function_call", "function_calls", "tool_plan", "refusal", "audio")
ANSWERS = (REASONING, *((name,) for name in CALLS))
SAID = ("content", *(name for names in ANSWERS for name in names))
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class _Chat(NamedTuple):
    """A row of a file, checked, with what looks like a special token made unrecognisable."""

    messages: list[dict[str, Any]]
    tools: Any
    documents: Any
    keywords: dict[str, Any]
    mark: str  # the character that makes it so

    def render(self, template: ChatTemplate, messages: list | None = None, **options: Any) -> Render:
        """The request for this chat, or for other messages in its place."""
        messages = self.messages if messages is None else messages
        return Render(template, messages, self.tools, self.documents, self.keywords, **options)

    def restored(self, text: str) -> str:
        """A text without the marks."""
        return text.replace(self.mark, "").replace(json.dumps(self.mark)[1:-1], "")


@dataclass(frozen=True, eq=False)
class ChatReader:
    """Reads rows with `messages` for two sides; of a run without a teacher, `teacher` is the student's vocabulary."""

    student: Vocabulary
    teacher: Vocabulary
    mask_prompt: bool  # only what the assistant says counts in the losses
    date: str  # ISO 8601; what templates take for today
    notes: dict[str, int] = field(default_factory=dict)  # what a user should know -> in how many chats
    _checked: set[str] = field(default_factory=set)  # shapes of chats whose messages were found in what was written

    @cached_property
    def key(self) -> str:
        """A hash of all that a chat's document depends on, beside the chat."""
        parts: list[Any] = [self.mask_prompt, self._is_shared]
        for side in (self.student, self.teacher):
            template = side.chat_template
            written = None if template is None else (dict(template.sources), dict(template.names))
            header = [side.token_bytes[number].hex() for number in side.special.values()]
            parts.append((dict(side.special), header, dict(side.names), dict(side.strips), written))
            if template is not None and any("strftime_now" in source for source in template.sources.values()):
                parts.append(self.date)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __call__(self, row: Mapping[str, Any], add_generation_prompt: bool = False) -> Piece:
        """The document of a row; () if nothing is said. With `add_generation_prompt` an answer may follow it.

        Raises InputError, in the template's own words where it refuses the chat.
        """
        template = _template(self.teacher)
        chat, hidden = _checked_chat(row, self._lookalikes)
        if not any(message.get(key) for message in chat.messages for key in SAID):
            return ()
        if hidden:
            self._note("hold what looks like a special token, which is read as text")
        source = template.source(chat.tools)
        for message in chat.messages:
            _check_keys(message, source, template.file)
        request = chat.render(template, add_generation_prompt=add_generation_prompt)
        text = _needed(render([request], self.date)[0], template)
        if not add_generation_prompt:
            self._check_written(chat, template, text)
        counts = self._counts(chat, template, text)
        if self._is_shared:
            return self._shared(chat, text, counts)
        return self._matched(chat, text, counts)

    @cached_property
    def _lookalikes(self) -> re.Pattern:
        """Finds special tokens of either side."""
        return SpecialTokens.of(self.teacher.special_tokens.words | self.student.special_tokens.words, {}).pattern

    @property
    def _is_shared(self) -> bool:
        """Whether both sides write chats alike."""
        ours, theirs = self.student.chat_template, self.teacher.chat_template
        if ours is None or theirs is None:
            return False
        return (ours.sources, ours.used_names) == (theirs.sources, theirs.used_names)

    def _note(self, text: str) -> None:
        self.notes[text] = self.notes.get(text, 0) + 1

    # --- what counts --------------------------------------------------------------------------------------------------

    def _counts(self, chat: _Chat, template: ChatTemplate, text: str) -> Bool[np.ndarray, " characters"]:
        """Which characters of the rendered chat count: all, or the assistant's; never those of messages of weight 0."""
        counts = np.full(len(text), not self.mask_prompt)
        silent = [n for n, message in enumerate(chat.messages) if message.get("weight") == 0]
        spoken = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant" and n not in silent]
        tagged = self.mask_prompt and GENERATION.search(template.source(chat.tools)) is not None
        if tagged:
            for start, stop in self._generated(chat, template, text):
                counts[start:stop] = True
        for n in [*(spoken if self.mask_prompt and not tagged else []), *silent]:
            start, stop = self._span(chat, template, text, n)
            counts[start:stop] = n not in silent
        return counts

    def _generated(self, chat: _Chat, template: ChatTemplate, text: str) -> list[tuple[int, int]]:
        """Where the text of `{% generation %}` lies."""
        marks = tuple(private_characters(2, (text, chat)))
        marked = _needed(render([chat.render(template, marks=marks)], self.date)[0], template)
        parts = re.split(f"[{marks[0]}{marks[1]}]", marked)
        if "".join(parts) != text or len(parts) % 2 == 0:
            raise InputError(
                f"{template.file}: what stands between {{% generation %}} and its end cannot be told from the rest: "
                "leave out --mask-prompt, or correct the template"
            )
        ends = np.cumsum([len(part) for part in parts]).tolist()
        return list(zip(ends[:-1:2], ends[1::2]))

    def _span(self, chat: _Chat, template: ChatTemplate, text: str, n: int) -> tuple[int, int]:
        """Where in the rendered chat message `n` lies, with the special token that ends it.

        It is what changes when the message says something else. An answer begins where the chat up to it, rendered with
        `add_generation_prompt`, ends: so a think block that the template writes before it is part of it. It ends before
        the next message at the latest: a template may write the answers of tools into a call.
        """
        message, (other,) = chat.messages[n], private_characters(1, (text, chat))
        before, after = chat.messages[:n], chat.messages[n + 1 :]
        variants = [
            [*before, {"role": message["role"], "content": other}, *after],
            [*before, _saying(message, other), *after],
            [*before, message, *(_saying(m, other) if k == 0 else m for k, m in enumerate(after))],
            [*before, message],
        ]
        prompt = chat.render(template, before, add_generation_prompt=True)
        prompt, *rendered = render([prompt, *(chat.render(template, messages) for messages in variants)], self.date)
        changed, kept, next_changed, prefix = (written for written, _ in rendered)
        changed = kept if changed is None else changed
        if changed is None:
            raise InputError(
                f"{template.file}: which text is message {n + 1}'s cannot be told, since the template refuses the chat "
                f"with another text in its place ({rendered[1][1]}): leave out --mask-prompt and `weight`"
            )
        start = _common_start(text, changed)
        stop = len(text) - _common_start(text[start:][::-1], changed[start:][::-1])
        if after and next_changed is not None:
            stop = min(stop, _common_start(text, next_changed))
        if prefix is not None and text.startswith(prefix) and len(prefix) > start:
            stop = min(stop, len(prefix))
        tokens = [match.span(1) for match in self.teacher.special_tokens.pattern.finditer(text)]
        for begin, end in tokens:  # none is cut
            start = begin if begin < start < end else start
            stop = end if begin < stop < end else stop
        prompts = message["role"] == "assistant" and "add_generation_prompt" in template.source(chat.tools)
        if prompts and prompt[0] is not None and text.startswith(prompt[0]):
            start = len(prompt[0])
        stop = max(start, stop)
        ended = any(end == stop > start for _, end in tokens)
        behind = next((token for token in tokens if token[0] >= stop), None)
        if behind is not None and not ended and not text[stop : behind[0]].strip():
            stop = behind[1]
        return start, stop

    def _check_written(self, chat: _Chat, template: ChatTemplate, text: str) -> None:
        """Raises InputError unless what an assistant says is written; notes where other messages are not.

        It depends on the shape of a chat, so one of each is tried.
        """
        shape = tuple((m["role"], *sorted((key, type(m[key])) for key in m if m[key])) for m in chat.messages)
        shape = str((shape, bool(chat.tools)))
        if shape in self._checked:
            return
        self._checked.add(shape)
        (other,) = private_characters(1, (text, chat))
        tried = [(n, "content", _saying(m, other)) for n, m in enumerate(chat.messages) if m.get("content")]
        for n, message in enumerate(chat.messages):
            for key in (key for key in CALLS if message.get(key)):
                tried.append((n, key, {k: value for k, value in message.items() if k != key}))
        variants = [[*chat.messages[:n], message, *chat.messages[n + 1 :]] for n, _, message in tried]
        for (n, key, _), (written, _) in zip(tried, render([chat.render(template, v) for v in variants], self.date)):
            message = chat.messages[n]
            if written == text and (message["role"] == "assistant" or key != "content"):
                raise InputError(
                    f"{template.file}: the chat template does not write `{key}` of message {n + 1}, an answer: "
                    "leave the chat out, or write it otherwise"
                )
            if written == text:
                self._note(f"have a message of role {message['role']!r} that the chat template does not write")
            code = rf"""['"]text['"]\s*:\s*['"]({other}|{re.escape(json.dumps(other)[1:-1])})"""
            if written is not None and isinstance(message.get("content"), list) and re.search(code, written):
                raise InputError(
                    f"{template.file}: the chat template writes a `content` that is a list of parts as program code: "
                    "write a string"
                )

    # --- documents ----------------------------------------------------------------------------------------------------

    def _shared(self, chat: _Chat, text: str, counts: Bool[np.ndarray, " characters"]) -> Piece:
        """The document of a chat that both sides write alike. Its first segment is bos, or empty."""
        segments, place = [], 0
        special = self.teacher.special_tokens
        for match in special.pattern.finditer(text):
            segments += self._text(chat, text, counts, place, match.start(1), bool(segments))
            word, place = special.word(match[1]), match.end(1)
            if word not in self.student.special:
                raise InputError(
                    f"the chat holds the special token {word!r}, which {self.student.name} does not have: "
                    "leave out the chats in which the template writes it"
                )
            segments.append(Segment(Markup((word,), (word,)), bool(counts[match.start(1) : place].any())))
        segments += self._text(chat, text, counts, place, len(text), bool(segments))
        bos = self.teacher.named("bos")
        starts = segments and segments[0].content == Markup((bos,), (bos,))
        return tuple(segments) if starts else (Segment("", bool(counts[:1].all())), *segments)

    def _text(self, chat: _Chat, text: str, counts: np.ndarray, start: int, stop: int, inside: bool) -> list[Segment]:
        """text[start:stop] as segments, one for each stretch that counts or does not.

        Byte vocabularies of published models have words of the templates' headers as tokens: where a text behind a
        special token (`inside`) begins with one, it is a Markup.
        """
        found = []
        for word in self._header_words if inside else ():
            if text.startswith(word, start, stop):
                found.append(Segment(Markup((word,), (word,)), bool(counts[start])))
                start += len(word)
                break
        return found + _stretches(chat, text, counts, start, stop)

    @cached_property
    def _header_words(self) -> list[str]:
        words = [word for word, i in self.student.special.items() if self.student.token_bytes[i]]
        return sorted(words, key=len, reverse=True)

    def _matched(self, chat: _Chat, text: str, counts: Bool[np.ndarray, " characters"]) -> Piece:
        """The document of a chat that the two sides write differently: the texts of the messages are shared."""
        contents = [message.get("content") for message in chat.messages]
        others = [key for message in chat.messages for key in message if any(key in names for names in ANSWERS)]
        if others or not all(isinstance(content, str) for content in contents) or chat.tools:
            raise InputError(
                "student and teacher have chat templates of their own, and messages with more than a text "
                f"({others[0] if others else 'tools or parts'}) cannot be matched: "
                "leave them out, or give both one template"
            )
        template = _template(self.student)
        texts = _needed(render([chat.render(template)], self.date)[0], template), text
        sides = self.student, self.teacher
        spans = [self._spans(chat, side, written) for side, written in zip(sides, texts)]
        return tuple(_joined(chat, texts, spans, sides, counts))

    def _spans(self, chat: _Chat, side: Vocabulary, text: str) -> list[tuple[int, int]]:
        """Where the text of each message lies in what a side writes, without white space around it."""
        template = side.chat_template
        marks = private_characters(len(chat.messages), (text, chat))
        messages = [message | {"content": mark} for message, mark in zip(chat.messages, marks)]
        written = _needed(render([chat.render(template, messages)], self.date)[0], template)
        found = re.findall(f"[{''.join(marks)}]", written)
        gaps = re.split(f"[{''.join(marks)}]", written)
        match = re.fullmatch("(.*?)".join(map(re.escape, gaps)), text, re.DOTALL)
        if found != marks or match is None:
            raise InputError(
                f"{template.file}: the chat template does not write each message's text once and in order, which it "
                "must where student and teacher have templates of their own: leave the chat out, or give both one"
            )
        spans = []
        for number, inner in enumerate(match.groups(), start=1):
            start = match.start(number) + len(inner) - len(inner.lstrip())
            spans.append((start, start + len(inner.strip())))
        return spans


def _template(vocabulary: Vocabulary) -> ChatTemplate:
    if vocabulary.chat_template is None:
        raise InputError(
            f"{vocabulary.name} has no chat template, so it cannot write chats: "
            "give plain texts, or a tokenizer with one"
        )
    return vocabulary.chat_template


def _checked_chat(row: Mapping[str, Any], lookalikes: re.Pattern) -> tuple[_Chat, bool]:
    """The chat of a row, and whether its texts hold what looks like a special token. Raises InputError."""
    messages, tools = row.get("messages"), row.get("tools")
    if not isinstance(messages, list) or not messages:
        raise InputError("`messages` is empty or not a list: write a list of objects with `role` and `content`")
    if isinstance(tools, str):  # as tables of data keep them
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError("`tools` is a string that is not JSON: write a list of tools") from error
    if not isinstance(tools, list | None) or not all(isinstance(tool, dict) for tool in tools or []):
        raise InputError("`tools` is not a list of objects: write one object for each tool")
    keywords = row.get("chat_template_kwargs") or {}
    if not isinstance(keywords, dict):
        raise InputError("`chat_template_kwargs` is not an object: write the names and values of its settings")
    messages = [_checked_message(message) for message in messages]
    values = messages, tools, row.get("documents"), keywords
    _check_text(values)
    (mark,) = private_characters(1, values)

    def hide(value: Any) -> Any:
        if isinstance(value, str):
            return lookalikes.sub(lambda match: f"{match[1][0]}{mark}{match[1][1:]}", value)
        if isinstance(value, list):
            return [hide(item) for item in value]
        if isinstance(value, dict):
            return {hide(key): item if key == "role" else hide(item) for key, item in value.items()}
        return value

    hidden = [hide(value) for value in values]
    return _Chat(*hidden, mark), hidden != list(values)


def _checked_message(message: object) -> dict[str, Any]:
    """A message as transformers gives it to templates: without nulls, the reasoning under all of its names."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError("a message lacks `role`, or it is not a string: write who speaks")
    message = {key: value for key, value in message.items() if value is not None}
    said = [key for names in ANSWERS for key in names if message.get(key)]
    content = message.get("content")
    if content is None and not said:
        raise InputError("a message lacks `content`: write what is said")
    if not isinstance(content, str | list | None):
        raise InputError("`content` is not a string: write a string, or a list of text parts")
    for part in content if isinstance(content, list) else []:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InputError("`content` has a part that is no text: only {'type': 'text', 'text': ...} can be read")
    if message.get("weight", 1) not in (0, 1):
        raise InputError(f"`weight` is {message['weight']!r}: write 0 or 1")
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _check_text(values: Any) -> None:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise InputError("a message contains half of a surrogate pair, which is not valid text: remove it") from error


def _check_keys(message: Mapping[str, Any], source: str, file: str) -> None:
    """Raises InputError for what a message says in a way that the template does not write."""
    for names in ANSWERS:
        held = [name for name in names if message.get(name)]
        if held and not any(re.search(rf"\b{name}\b", source) for name in names):
            raise InputError(
                f"{file}: the chat template does not write {' or '.join(f'`{name}`' for name in names)}, "
                "which a message holds: "
                "leave the chat out, or write its text into `content`"
            )


def _saying(message: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The message with another text, in the same form."""
    parts = isinstance(message.get("content"), list)
    return {**message, "content": [{"type": "text", "text": text}] if parts else text}


def _needed(written: tuple[str | None, str], template: ChatTemplate) -> str:
    """The text of a rendering. Raises InputError where there is none, in the template's words."""
    text, why = written
    if text is None:
        raise InputError(
            f"{template.file}: the chat template refuses this chat ({why}): change the chat or leave it out"
        )
    return text


def _common_start(one: str, other: str) -> int:
    """How many characters two texts share at their start."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    low, high = 0, size  # one[:low] is shared, one[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


# --- two templates ------------------------------------------------------------------------------------------------


def _joined(
    chat: _Chat,
    texts: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    sides: Sequence[Vocabulary],
    counts: Bool[np.ndarray, " characters"],
) -> list[Segment]:
    """The document of a chat whose texts lie at `spans` in what the student and the teacher write.

    Between two texts each side writes the end of one message and the header of the next, or both in one: they are
    Markups of their own, so that the end of an answer is compared with the end of an answer. What one side writes
    before the first header (a system message of its own) is compared with nothing.
    """
    segments: list[Segment] = []
    places = [0, 0]
    for number in range(len(spans[0]) + 1):
        last = number == len(spans[0])
        stops = [len(text) if last else span[number][0] for text, span in zip(texts, spans)]
        gaps = [
            _turns(side.special_tokens.split(chat.restored(text[place:stop])))
            for side, text, place, stop in zip(sides, texts, places, stops)
        ]
        if number == 0:
            rows = _opening(gaps, [side.named("bos") for side in sides])
        else:
            rows = [tuple(gap[0] for gap in gaps), tuple(sum(gap[1:], ()) for gap in gaps)]
        place = places[1]
        for row in rows:
            if any(row) or not segments:  # the first one stands in every piece of the document
                segments.append(Segment(Markup(*row), bool(counts[place : place + 1].all())))
            place = min(place + len("".join(row[1])), stops[1])
        if not last:
            ours, theirs = (text[slice(*span[number])] for text, span in zip(texts, spans))
            if ours != theirs:
                raise InputError(
                    f"the chat templates of {sides[0].name} and {sides[1].name} write the text of message {number + 1} "
                    "differently: leave the chat out, or give both one template"
                )
            start, stop = spans[1][number]
            segments += _stretches(chat, text=texts[1], counts=counts, start=start, stop=stop)
            places = [span[number][1] for span in spans]
    return segments


def _stretches(chat: _Chat, text: str, counts: Bool[np.ndarray, " characters"], start: int, stop: int) -> list[Segment]:
    """text[start:stop] as segments, one for each stretch that counts or does not."""
    inner = counts[start:stop]
    if inner.all() or not inner.any():
        content = chat.restored(text[start:stop])
        return [Segment(content, bool(inner.all()))] if content else []
    cuts = [start, *(np.flatnonzero(np.diff(counts[start:stop])) + start + 1).tolist(), stop]
    found = [Segment(chat.restored(text[a:b]), bool(counts[a])) for a, b in zip(cuts, cuts[1:]) if a < b]
    return [segment for segment in found if segment.content]


def _turns(parts: Sequence[str]) -> list[tuple[str, ...]]:
    """What is written between two texts (`SpecialTokens.split`), cut before each special token that follows another
    one, for there a message begins."""
    turns: list[tuple[str, ...]] = [()]
    for n, part in enumerate(parts):
        if n % 2 and n > 1 and not parts[n - 1].strip():
            turns.append(())
        turns[-1] += (part,) if part else ()
    return turns


def _opening(gaps: Sequence[Sequence[tuple[str, ...]]], bos: Sequence[str | None]) -> list[tuple]:
    """What two sides write before the first text, in rows of what is compared: bos, what only one has, the header."""
    begins = [gap[0][:1] == (word,) for gap, word in zip(gaps, bos)]
    rest = [[gap[0][begin:], *gap[1:]] for gap, begin in zip(gaps, begins)]
    (ours, theirs), headers = [sum(turns[:-1], ()) for turns in rest], tuple(turns[-1] for turns in rest)
    return [tuple((word,) if begin else () for word, begin in zip(bos, begins)), (ours, ()), ((), theirs), headers]

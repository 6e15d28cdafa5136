"""Chat templates: taken apart, each family's chats byte for byte, and templates that do harm."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import real_tokenizer
from small_tokenizers import CHATML, CHATS, GEMMA, LLAMA, OLMO, byte_level, make, save, vocabulary

from minalm.align import align
from minalm.chat import ChatTemplate, chat_parts, read_chat_template, render
from minalm.text import Control, InputError, Piece, Segment, read_corpus
from minalm.vocab import Vocabulary, byte_vocabulary, load_vocabulary, with_control

ROLES = ("system", "user", "assistant")
# What each family writes, by hand: before all; before each role's text and after it; after the assistant's last text.
CHATML_TURN = {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ROLES}
LLAMA_TURN = {role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>") for role in ROLES}
EXPECTED = {
    "llama": ("<|begin_of_text|>", LLAMA_TURN, "<|eot_id|>"),
    "gemma": (
        "<bos>",
        {r: (f"<start_of_turn>{n}\n", "<end_of_turn>\n") for r, n in (("user", "user"), ("assistant", "model"))},
        "<end_of_turn>\n",
    ),
    "qwen": ("", CHATML_TURN, "<|im_end|>\n"),
    "smollm": ("", CHATML_TURN, "<|im_end|>\n"),
    "tinyllama": ("", {role: (f"<|{role}|>\n", "</s>\n") for role in ROLES}, "</s>\n"),
    "mistral1": ("<s>", {"user": ("[INST] ", " [/INST]"), "assistant": ("", "</s>")}, "</s>"),
    "mistral3": ("<s>", {"user": ("[INST] ", "[/INST]"), "assistant": (" ", "</s>")}, "</s>"),
    "tekken": ("<s>", {"user": ("[INST]", "[/INST]"), "assistant": ("", "</s>")}, "</s>"),
    "olmo2": (
        "<|endoftext|>",
        {
            "system": ("<|system|>\n", "\n"),
            "user": ("<|user|>\n", "\n"),
            "assistant": ("<|assistant|>\n", "<|endoftext|>\n"),
        },
        "<|endoftext|>",
    ),
    "olmo3": (
        "",
        {**CHATML_TURN, "system": ("<|im_start|>system\n", " No functions. <functions></functions><|im_end|>\n")},
        "<|endoftext|>",
    ),
}
DEFAULT = {"qwen", "smollm", "olmo3"}  # what these templates say by themselves is no part of a chat
BAD = (
    "</s>",
    "[INST]",
    "[/INST]",
    *LLAMA,
    *GEMMA,
    *CHATML,
    "<|user|>",
    "\u2581",
    " ",
    "",
)  # contents that could mislead
TEXTS = st.lists(st.sampled_from(["the", " the", "user", "\n", "é", "日本語", "x", *BAD]), max_size=6).map("".join)


@pytest.fixture(scope="module")
def owned(tmp_path_factory):
    """The vocabulary of a family whose checkpoint brings a template."""
    folder = tmp_path_factory.mktemp("owned")
    return cache(lambda kind: make(kind, folder / kind, CHATS[kind]))


def chat(roles: str, texts: list[str]) -> list[dict[str, str]]:
    names = {role[0]: role for role in ROLES}
    return [{"role": names[initial], "content": text} for initial, text in zip(roles, texts)]


def by_hand(kind: str, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
    """What the family writes, in stretches, each with whether it is a message's text."""
    start, turns, chat_end = EXPECTED[kind]
    stretches = [(start, False)]
    for number, message in enumerate(messages, start=1):
        header, end = turns[message["role"]]
        last = message["role"] == "assistant" and number == len(messages)
        stretches += [(header, False), (message["content"], True), (chat_end if last else end, False)]
    return stretches


def piece_of(messages: list[dict[str, str]], folder: Path) -> Piece:
    (folder / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    corpus = read_corpus([folder / "chat.jsonl"], limit=100_000)
    assert len(corpus) == 1
    return corpus.piece(0)


def units(stretches: list[tuple[str, bool]], ours: Vocabulary) -> list[bytes | str]:
    """Control tokens as strings, and the bytes between them in one: a text holds no control token."""
    tokens = "|".join(map(re.escape, sorted(ours.control, key=len, reverse=True)))
    found: list[bytes | str] = [b""]
    for text, is_text in stretches:
        for number, word in enumerate([text] if is_text else re.split(f"({tokens})", text)):
            if number % 2:
                found += [word, b""]
            else:
                found[-1] += word.encode()
    return found


def written(ours: Vocabulary, piece: Piece) -> list[bytes | str]:
    """What the ids of a chat spell, as `units` has it."""
    (encoding,) = ours.encode([piece])
    assert encoding.spelled
    words = {i: word for word, i in ours.control.items()}
    found: list[bytes | str] = [b""]
    for i in encoding.ids.tolist():
        if i in words:
            found += [words[i], b""]
        else:
            found[-1] += ours.token_bytes[i]
    return found


CASES = [
    (kind, roles)
    for kind in CHATS
    for roles in ("u", "ua", "uau", "uaua", "su", "sua", "suaua")
    if roles[0] == "u" or "system" in EXPECTED[kind][1]
]


@pytest.mark.parametrize("kind, roles", CASES)
def test_a_chat_is_what_the_template_writes(owned, tmp_path, kind, roles):
    ours = owned(kind)
    messages = chat(roles, ["the user", "é 日本語\n\nthe end", " hi", "", "x"])
    stretches = by_hand(
        kind, [m | {"content": m["content"].strip()} for m in messages] if kind == "gemma" else messages
    )
    # The expectation is what Jinja makes of the template, but for a default system message.
    names = {"bos_token": "<s>", "eos_token": "</s>"} if "mistral" in kind or kind in ("tekken", "tinyllama") else {}
    names |= {"bos_token": OLMO[0], "eos_token": OLMO[0]} if "olmo" in kind else {}
    names |= {"bos_token": {"llama": LLAMA[0], "gemma": "<bos>"}[kind]} if kind in ("llama", "gemma") else {}
    rendered = render(ChatTemplate(Path("t"), CHATS[kind]), messages, names)
    default = "<|im_start|>system\nBe good.<|im_end|>\n" if kind in DEFAULT and roles[0] != "s" else ""
    assert default + "".join(text for text, _ in stretches) == rendered
    for side in (ours, byte_vocabulary(ours)):
        stretches = by_hand(kind, messages)
        assert written(side, piece_of(messages, tmp_path)) == units(stretches, side)
    side = byte_vocabulary(ours)
    assert side.size == 256 + len(side.control) and list(side.control) == sorted(side.control)
    ids = [i for unit in units(stretches, side) for i in ([side.control[unit]] if isinstance(unit, str) else unit)]
    assert side.encode([piece_of(messages, tmp_path)])[0].ids.tolist() == ids


@pytest.mark.parametrize("kind", CHATS)
@given(texts=st.lists(TEXTS, min_size=4, max_size=4).filter(any))
@settings(max_examples=40, deadline=None)
def test_texts_of_chats_are_spelled_and_never_become_control(owned, tmp_path_factory, kind, texts):
    ours = owned(kind)
    messages = chat("uaua", texts)
    piece = piece_of(messages, tmp_path_factory.getbasetemp())
    for side in (ours, byte_vocabulary(ours)):
        assert written(side, piece) == units(by_hand(kind, messages), side)
        (encoding,) = side.encode([piece])
        for number, (content, _) in enumerate(piece):
            if isinstance(content, str):
                inside = (encoding.segment == number) & (encoding.ends >= 0)
                assert encoding.text_bytes[encoding.segment == number].sum() == len(content.encode())
                assert not content or inside.any()
        assert (np.diff(encoding.ends[encoding.ends >= 0]) > 0).all()


def test_control_of_bytes_is_what_the_template_needs(owned):
    needed = {
        "llama": LLAMA,
        "gemma": GEMMA,
        "qwen": CHATML,
        "smollm": CHATML[1:],
        "tinyllama": ("<s>", "</s>"),
        "mistral1": ("<s>", "</s>"),
        "mistral3": ("<s>", "</s>", "[INST]", "[/INST]"),
        "tekken": ("<s>", "</s>", "[INST]", "[/INST]", "<pad>"),
        "olmo2": ("<|endoftext|>", "<|pad|>"),
        "olmo3": OLMO,
    }
    for kind, control in needed.items():
        assert list(byte_vocabulary(owned(kind)).control.items()) == list(zip(sorted(control), range(256, 270)))


@pytest.mark.parametrize("kind", ("llama", "gemma", "qwen", "smollm"))
def test_the_four_families_stay_as_they_are_with_a_template_of_their_own(owned, kind):
    assert owned(kind).template == vocabulary(kind).template


@pytest.mark.parametrize("kind", ("llama", "gemma", "qwen"))
def test_a_template_is_taken_apart_as_the_table_does_it(kind):
    """Not asked for where the table serves, but the same parts are aligned whichever it comes from."""
    ours = vocabulary(kind)
    names = {"bos_token": "".join(ours.template["bos"])}
    found = chat_parts(ChatTemplate(Path("t"), CHATS[kind]), names, ours.control)
    assert found == {part: ours.template[part] for part in found}
    assert set(ours.template) - set(found) - {"bos", "eos", "pad"} == (
        {"system", "end_of_system"} if kind == "gemma" else set()
    )


def test_parts_of_the_other_families(owned):
    mistral = owned("mistral3").template
    assert (mistral["start_of_chat"], mistral["header_open"], mistral["header_close"]) == (("<s>",), (), ())
    assert mistral["user"] == ("[INST]", " ") and mistral["end_of_user"] == ("[/INST]",)
    assert mistral["assistant"] == (" ",) and mistral["end_of_turn"] == mistral["end_of_chat"] == ("</s>",)
    olmo2, olmo3 = owned("olmo2").template, owned("olmo3").template
    assert (olmo2["end_of_turn"], olmo2["end_of_chat"]) == (("<|endoftext|>", "\n"), ("<|endoftext|>",))
    assert olmo2["user"] == ("<|user|>\n",) and olmo2["end_of_user"] == ("\n",)
    assert (olmo3["header_open"], olmo3["user"], olmo3["header_close"]) == (("<|im_start|>",), ("user",), ("\n",))
    tiny = owned("tinyllama").template  # its texts start with bos, its chats do not
    assert (tiny["bos"], tiny["start_of_chat"]) == (("<s>",), ())


def test_a_word_after_a_literal_space_is_the_token_that_it_is_in_text(owned):
    """Where a tokenizer puts a space before a text, the header's last space takes its place."""
    ours = owned("mistral3")
    piece = (Segment(Control("start_of_chat")), Segment(Control("user")), Segment("the the"))
    (encoding,) = ours.encode([piece])
    tokens = [ours.token_bytes[i] for i in encoding.ids]
    assert tokens == [b"", b"", b" the", b" the"] and encoding.text_bytes.tolist() == [0, 0, 3, 4]
    assert encoding.ends.tolist() == [1, 2, 5, 9]
    piece = (Segment(Control("end_of_turn")), Segment(Control("user")), Segment(" the"))
    (encoding,) = ours.encode([piece])
    assert [ours.token_bytes[i] for i in encoding.ids] == [b"", b"", b" ", b" the"] or [
        ours.token_bytes[i] for i in encoding.ids
    ] == [b"", b"", b"  ", b"the"]
    assert encoding.spelled and encoding.text_bytes.sum() == 4


@pytest.mark.parametrize("kind", ("gemma", "mistral1", "mistral3", "tekken"))
def test_a_role_that_the_template_refuses(owned, kind):
    if kind == "gemma":  # the table has it: Gemma's system message is a user's
        assert owned(kind).part_ids("system") == owned(kind).part_ids("user")
        return
    for part in ("system", "end_of_system"):
        with pytest.raises(InputError, match=f"{kind} has no messages of their own for the role '{part}'"):
            owned(kind).part_ids(part)


FOLDED = """{%- for m in messages -%}{%- if m.role == 'user' -%}[INST] {% if messages[0].role == 'system' and loop.index0
 == 1 %}{{ messages[0].content ~ '\\n' }}{% endif %}{{ m.content }}[/INST]{%- elif m.role == 'assistant' -%}{{ m.content }}
{%- endif -%}{%- endfor -%}"""
HARM = {
    "syntax": ("{% for m in messages %}", "TemplateSyntaxError"),
    "refusal": ("{{ raise_exception('never') }}", "never"),
    "a file": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ raise_exception.__globals__['os'].system('true') }}", "SecurityError|Undefined"),
    "change": ("{% set _ = messages.append(1) %}", "SecurityError"),
    "include": ("{% include '/etc/passwd' %}", "TypeError|no loader"),
    "long": ("{% for i in range(10 ** 9) %}{% endfor %}", "SecurityError"),
    "longer": ("{% for i in range(1000000000) %}{% endfor %}", "OverflowError"),
    "nested": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "OverflowError"),
    "endless": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "large": ("{{ 'a' * 100000000000 }}", "SecurityError"),
    "no texts": ("{{ bos_token }}", "each message's text once"),
    "twice": ("{% for m in messages %}{{ m.content ~ m.content }}{% endfor %}", "each message's text once"),
    "by place": ("{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}", "in the same way"),
    "backwards": ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "in order"),
}


@pytest.mark.parametrize("what", HARM)
@pytest.mark.parametrize("file", ("chat_template.jinja", "tokenizer_config.json"))
def test_a_template_of_no_use_is_an_error_where_chats_are_needed(tmp_path, what, file):
    template, reason = HARM[what]
    path = save(tmp_path / "t", byte_level(), ["<s>"], bos_token="<s>")
    if file == "chat_template.jinja":
        (path / file).write_text(template)
    else:
        (path / file).write_text(json.dumps({"bos_token": "<s>", "chat_template": template}))
    ours = load_vocabulary(path)  # texts are of use without it
    assert ours.encode([(Segment(Control("bos")), Segment("a"))])[0].ids.tolist() == [*ours.part_ids("bos"), 64 + 1]
    with pytest.raises(InputError, match=reason) as caught:
        ours.part_ids("header_open")
    assert str(caught.value).startswith(str(path / file)) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match=reason):
        byte_vocabulary(ours).part_ids("header_open")


def test_a_template_of_no_use_does_not_matter_where_the_table_serves(tmp_path):
    path = save(tmp_path / "t", byte_level(), LLAMA)
    (path / "chat_template.jinja").write_text("{{ broken")
    assert load_vocabulary(path).template == vocabulary("llama").template


def test_a_system_message_within_a_users_is_none_of_the_parts(tmp_path):
    path = save(tmp_path / "t", byte_level(), ["<s>"], bos_token="<s>")
    (path / "chat_template.jinja").write_text(FOLDED)
    ours = load_vocabulary(path)
    assert ours.template["user"] == ("[INST] ",) and "system" not in ours.template


@pytest.mark.parametrize(
    "config", ([], 3, {"chat_template": 3}, {"chat_template": ["a"]}, {"chat_template": [{"name": "default"}]})
)
def test_a_template_that_is_no_text(tmp_path, config):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="tokenizer_config.json holds no chat template"):
        read_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="chat_template.jinja holds no chat template"):
        read_chat_template(tmp_path)


def test_what_templates_may_use():
    template = ChatTemplate(
        Path("t"),
        "{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n{{ {'a': '<é'} | tojson }}\n"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}{{ range(3) | list }}{{ add_generation_prompt }}{{ 2 * 3 }}"
        "{% endfor %}",
    )
    assert render(template, chat("ua", ["", ""]), {}) == '{"a": "<é"}\n4True[0, 1, 2]False6'


PAIRS = {  # student, teacher: the control parts of a chat that one of them does not write
    ("qwen", "gemma"): {"start_of_chat"},
    ("llama", "mistral1"): {"header_open", "header_close", "assistant"},
    ("llama", "mistral3"): {"header_open", "header_close", "assistant"},
    ("llama", "tekken"): {"header_open", "header_close", "assistant"},
    ("gemma", "olmo2"): {"header_open", "header_close"},
    ("qwen", "olmo3"): set(),
}


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("swapped", (False, True))
def test_the_parts_of_two_templates_are_paired(owned, tmp_path, kinds, swapped):
    """A student with the control tokens and the template of its own tokenizer, not the teacher's."""
    student, teacher = (owned(kind) for kind in (kinds[::-1] if swapped else kinds))
    piece = piece_of(chat("uaua", ["the", "é", "日本語 the", "x"]), tmp_path)
    (ours,), (theirs,) = student.encode([piece]), teacher.encode([piece])
    aligned = align(ours, theirs)
    alone = set()
    for number, (content, _) in enumerate(piece):
        chunks = [
            set(chunk[side.segment == number].tolist())
            for side, chunk in ((ours, aligned.student_chunk), (theirs, aligned.teacher_chunk))
        ]
        if isinstance(content, str):
            assert chunks[0] == chunks[1] and -1 not in chunks[0]
        elif set() in chunks:  # what one side lacks is in no chunk of the other
            alone.add(content.part)
            assert chunks[0] | chunks[1] <= {-1}
        else:  # one chunk, which nothing else is in
            assert chunks[0] == chunks[1] and len(chunks[0]) == 1 and chunks[0] != {-1}
            (chunk,) = chunks[0]
            assert set(ours.segment[aligned.student_chunk == chunk].tolist()) == {number}
            assert set(theirs.segment[aligned.teacher_chunk == chunk].tolist()) == {number}
    assert alone == PAIRS[kinds]


def test_the_teachers_control_tokens_on_another_tokenizer(owned, tmp_path):
    messages = chat("uaua", ["the", "é", "the user", "x"])
    for base, source in (("qwen", "mistral3"), ("tinyllama", "olmo2"), ("mistral3", "gemma"), ("mistral1", "tekken")):
        ours = with_control(owned(base), owned(source))
        assert written(ours, piece_of(messages, tmp_path)) == units(by_hand(source, messages), ours)


def test_plain_texts_start_as_before(owned):
    piece = (Segment(Control("bos")), Segment("the"), Segment(Control("eos")))
    for kind in ("tinyllama", "mistral1"):
        ours = owned(kind)
        (encoding,) = ours.encode([piece])
        assert [ours.token_bytes[i] for i in encoding.ids] == [b"", b" the", b""]
        assert encoding.ids[0] == ours.control["<s>"] and encoding.ids[2] == ours.control["</s>"]


@pytest.mark.real
@pytest.mark.parametrize(
    "tokenizer, kind", [("llama3", "llama"), ("gemma2", "gemma"), ("gemma3", "gemma"), ("qwen3", "qwen")]
)
@pytest.mark.parametrize("roles", ("u", "ua", "uaua", "sua"))
def test_real_tokenizers_write_what_the_template_writes(tmp_path, tokenizer, kind, roles):
    if roles[0] == "s" and kind == "gemma":
        pytest.skip("Gemma's template refuses system messages")
    ours = load_vocabulary(real_tokenizer(tokenizer))
    messages = chat(roles, ["the user", "é 日本語\n\nthe </s> [INST] <bos> <|eot_id|> end", "hi", "x"])
    for side in (ours, byte_vocabulary(ours)):
        assert written(side, piece_of(messages, tmp_path)) == units(by_hand(kind, messages), side)


@pytest.mark.real
@pytest.mark.parametrize("kind", CHATS)
def test_templates_render_as_in_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    make(kind, tmp_path / "t", CHATS[kind])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    messages = chat("uaua", ["the <b>", " é ", "x\n", "y"])
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    names = {key: config[key] for key in ("bos_token", "eos_token") if key in config}
    ours = render(ChatTemplate(Path("t"), CHATS[kind]), messages, names)
    assert theirs.apply_chat_template(messages, tokenize=False) == ours

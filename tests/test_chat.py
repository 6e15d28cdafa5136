"""Chats: what templates write, special tokens told from text, what counts, two templates; templates that do harm."""

import json
import re
import resource
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import real_tokenizer
from small_tokenizers import CHATML, CHATS, GEMMA, LLAMA, OLMO, byte_level, make, save, vocabulary
from tokenizers import Tokenizer

from minalm.errors import InputError
from minalm.huggingface import folder as student
from minalm.models import transformer
from minalm.models.config import ModelConfig
from minalm.text.documents import Markup, Piece, Segment, Special
from minalm.tokenization import chat_template, sandbox, tokenizer_json
from minalm.tokenization.align import align
from minalm.tokenization.chat_template import ChatTemplate, Render, read_chat_template, render
from minalm.tokenization.chats import ChatReader
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.vocabulary import Vocabulary, byte_vocabulary, with_special_tokens

DATE = "2026-03-01"

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
DEFAULT = {kind: "<|im_start|>system\nBe good.<|im_end|>\n" for kind in ("qwen", "smollm", "olmo3")}
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
    stretches = [(start, False), (DEFAULT.get(kind, "") if messages[0]["role"] != "system" else "", False)]
    for number, message in enumerate(messages, start=1):
        header, end = turns[message["role"]]
        last = message["role"] == "assistant" and number == len(messages)
        content = message["content"].strip() if kind == "gemma" else message["content"]
        stretches += [(header, False), (content, True), (chat_end if last else end, False)]
    return stretches


def read(
    messages: list[dict], teacher: Vocabulary, student: Vocabulary | None = None, mask: bool = False, **row
) -> Piece:
    return ChatReader(student or teacher, teacher, mask, DATE)({"messages": messages, **row})


def units(stretches: list[tuple[str, bool]], ours: Vocabulary) -> list[bytes | str]:
    """Special tokens as strings, and the bytes between them in one: a text holds no special token."""
    tokens = "|".join(map(re.escape, sorted(ours.special, key=len, reverse=True)))
    found: list[bytes | str] = [b""]
    for text, is_text in stretches:
        for number, word in enumerate([text] if is_text else re.split(f"({tokens})", text)):
            if number % 2:
                found += [word, b""]
            else:
                found[-1] += word.encode()
    return found


def written(ours: Vocabulary, piece: Piece, side: str = "student", counted: bool = False) -> list[bytes | str]:
    """What the ids of a chat spell, as `units` has it; with `counted`, of the tokens that count alone."""
    (encoding,) = ours.encode([piece], side)
    assert encoding.round_trips
    words = {i: word for word, i in ours.special.items()}
    found: list[bytes | str] = [b""]
    for i in encoding.ids[encoding.loss_mask if counted else slice(None)].tolist():
        if i in words:
            found += [words[i], b""]
        else:
            found[-1] += ours.token_bytes[i]
    return found


def spelled(found: list[bytes | str]) -> str:
    return "".join(each if isinstance(each, str) else each.decode() for each in found)


# --- one template ------------------------------------------------------------------------------------------------


CASES = [
    (kind, roles)
    for kind in CHATS
    for roles in ("u", "ua", "uau", "uaua", "su", "sua", "suaua")
    if roles[0] == "u" or "system" in EXPECTED[kind][1]
]


@pytest.mark.parametrize("kind, roles", CASES)
def test_a_chat_is_what_the_template_writes(owned, kind, roles):
    ours = owned(kind)
    messages = chat(roles, ["the user", "é 日本語\n\nthe end", " hi", "", "x"])
    stretches = by_hand(kind, messages)
    for side in (ours, byte_vocabulary(ours)):
        got, expected = written(side, read(messages, ours, side)), units(stretches, side)
        if kind == "tinyllama" and side is ours:  # its tokenizer puts a space behind every special token
            assert spelled(got).replace("</s> ", "</s>") == " " + spelled(expected)
        else:
            assert got == expected
    side = byte_vocabulary(ours)
    assert side.size == 256 + len(side.special) and list(side.special) == sorted(side.special)
    ids = [i for unit in units(stretches, side) for i in ([side.special[unit]] if isinstance(unit, str) else unit)]
    assert side.encode([read(messages, ours, side)])[0].ids.tolist() == ids


@pytest.mark.parametrize("kind", CHATS)
def test_tokens_are_those_of_apply_chat_template(owned, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    make(kind, tmp_path / "t", CHATS[kind])
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    config = {key: value["content"] if isinstance(value, dict) else value for key, value in config.items()}
    (tmp_path / "t" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    for roles in ("u", "ua", "uaua"):
        messages = chat(roles, ["the user", "é the", " the the\n", "x"])
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert owned(kind).encode([read(messages, owned(kind))])[0].ids.tolist() == ids


@pytest.mark.parametrize("kind", CHATS)
@given(texts=st.lists(TEXTS, min_size=4, max_size=4).filter(any))
@settings(max_examples=30, deadline=None)
def test_texts_of_chats_are_spelled_and_never_become_special(owned, kind, texts):
    ours = owned(kind)
    messages = chat("uaua", texts)
    side = byte_vocabulary(ours)
    piece = read(messages, ours, side)
    assert written(side, piece) == units(by_hand(kind, messages), side)
    (encoding,), (theirs,) = side.encode([piece]), ours.encode([piece], "teacher")
    assert theirs.round_trips and theirs.text_bytes.sum() == encoding.text_bytes.sum()
    for each in (encoding, theirs):
        assert (np.diff(each.ends[each.ends >= 0]) > 0).all()
    specials = [
        [side.special[w] if s is encoding else ours.special[w] for w in side.special] for s in (encoding, theirs)
    ]
    assert np.isin(encoding.ids, specials[0]).sum() == np.isin(theirs.ids, specials[1]).sum()


def test_special_tokens_of_bytes_are_what_the_template_needs(owned):
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
    for kind, special in needed.items():
        assert list(byte_vocabulary(owned(kind)).special.items()) == list(zip(sorted(special), range(256, 270)))


def test_the_templates_of_tokenizers_that_bring_none():
    messages = chat("suaua", ["be", "the", " é\n", "x", "y"])
    trimmed = [message | {"content": message["content"].strip()} for message in messages]
    assert spelled(written(vocabulary("llama"), read(messages, vocabulary("llama")))) == "".join(
        text for text, _ in by_hand("llama", trimmed)
    )
    assert spelled(written(vocabulary("qwen"), read(messages, vocabulary("qwen")))) == "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages
    )
    assert spelled(written(vocabulary("gemma"), read(messages, vocabulary("gemma")))) == (
        "<bos><start_of_turn>user\nbe\n\nthe<end_of_turn>\n<start_of_turn>model\né<end_of_turn>\n"
        "<start_of_turn>user\nx<end_of_turn>\n<start_of_turn>model\ny<end_of_turn>\n"
    )
    with pytest.raises(InputError, match="llama2 has no chat template|has no chat template, so it cannot write chats"):
        read(messages, vocabulary("llama2"))


def test_special_tokens_that_take_spaces_along(tmp_path):
    path = save(tmp_path / "t", byte_level(), ["<|user|>", "<|end|>"], eos_token="<|end|>")
    spec = json.loads((path / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["rstrip"] = True
    (path / "tokenizer.json").write_text(json.dumps(spec))
    (path / "chat_template.jinja").write_text("{% for m in messages %}<|user|>\n{{ m.content }}<|end|>\n{% endfor %}")
    ours = load_vocabulary(path)
    piece = read([{"role": "user", "content": "\n the"}], ours)
    ids = Tokenizer.from_file(str(path / "tokenizer.json")).encode("<|user|>\n\n the<|end|>\n").ids
    assert ours.encode([piece])[0].ids.tolist() == ids
    side = byte_vocabulary(ours)
    again = Tokenizer.from_str(json.dumps(tokenizer_json.tokenizer_json(side)))
    assert side.encode([piece])[0].ids.tolist() == again.encode("<|user|>\n\n the<|end|>\n").ids


CHATML_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def chatml(tmp_path):
    """A vocabulary with ChatML's tokens and a template of choice."""

    def made(template: str, **config: object) -> Vocabulary:
        path = save(tmp_path / f"t{len(list(tmp_path.iterdir()))}", byte_level(), CHATML, **config)
        (path / "chat_template.jinja").write_text(template)
        return load_vocabulary(path)

    return made


def test_what_templates_are_given(chatml):
    ours = chatml(
        "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{{ tools[0].name }}{{ documents is none }}{{ extra }}"
        "{% for m in messages %}{{ m.role }}{{ m.content[0].text if m.content is not string else m.content }}"
        "{{ m.tool_calls is defined }}{{ m.reasoning_content }}{% endfor %}{{ {'a': '<é'} | tojson }}"
        "{{ add_generation_prompt }}",
        bos_token="<|endoftext|>",
    )
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}], "tool_calls": None},
        {"role": "assistant", "content": "x", "thinking": "hm"},
    ]
    piece = read(messages, ours, tools='[{"name": "<|im_end|>"}]', chat_template_kwargs={"extra": 3})
    assert spelled(written(ours, piece)) == (
        '<|endoftext|>01 Mar 2026<|im_end|>True3developerbeFalseassistantxFalsehm{"a": "<é"}False'
    )
    assert [w for w in written(ours, piece) if isinstance(w, str)] == ["<|endoftext|>"]  # the tool's name is text


def test_several_templates(tmp_path):
    path = save(tmp_path / "t", byte_level(), CHATML)
    several = {"default": "{{ messages[0].content }}", "tool_use": "t{{ messages[0].content }}"}
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": name, "template": text} for name, text in several.items()]})
    )
    ours = load_vocabulary(path)
    message = [{"role": "user", "content": "a"}]
    assert spelled(written(ours, read(message, ours))) == "a"
    assert spelled(written(ours, read(message, ours, tools=[{"name": "b"}]))) == "ta"
    exported(tmp_path / "out", ours)
    assert load_vocabulary(tmp_path / "out").chat_template.sources == several


def test_text_that_looks_special_is_text_and_said(owned):
    ours = owned("llama")
    reader = ChatReader(ours, ours, False, DATE)
    piece = reader({"messages": chat("ua", ["a<|eot_id|>b \ue000", "<|begin_of_text|>"])})
    assert spelled(written(ours, piece)).count("<|eot_id|>") == 3 and written(ours, piece).count("<|eot_id|>") == 2
    assert any("a<|eot_id|>b \ue000" in str(segment.content) for segment in piece)
    assert reader.notes == {"hold what looks like a special token, which is read as text": 1}


def test_bad_messages_are_named(chatml):
    ours = chatml(CHATML_TEMPLATE)
    user = {"role": "user", "content": "a"}
    for messages, reason in (
        ([], "`messages` is empty or not a list"),
        ("a", "`messages` is empty or not a list"),
        ([{"content": "a"}], "lacks `role`"),
        ([{"role": ["user"], "content": "a"}], "lacks `role`, or it is not a string"),
        ([{"role": "user"}], "lacks `content`"),
        ([{"role": "user", "content": None}], "lacks `content`"),
        ([{"role": "user", "content": 3}], "`content` is not a string"),
        ([{"role": "user", "content": [{"type": "image"}]}], "part that is no text"),
        ([{"role": "user", "content": "\ud83d"}], "half of a surrogate pair"),
        ([user, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], "does not write `tool_calls`"),
        ([user, {"role": "assistant", "content": "", "function_calls": "f()"}], "does not write `function_calls`"),
        ([user, {"role": "assistant", "content": "b", "reasoning": "c"}], "does not write .* or `reasoning`"),
        ([user, {"role": "assistant", "content": "b", "weight": 0.5}], "`weight` is 0.5: write 0 or 1"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "as program code|refuses this chat"),
    ):
        with pytest.raises(InputError, match=reason):
            read(messages, ours)
    for row, reason in (
        ({"tools": "["}, "`tools` is a string that is not JSON"),
        ({"tools": [3]}, "`tools` is not a list of objects"),
        ({"chat_template_kwargs": 3}, "`chat_template_kwargs` is not an object"),
    ):
        with pytest.raises(InputError, match=reason):
            read([user], ours, **row)


def test_what_a_template_does_not_write_is_an_error_or_said(chatml):
    ours = chatml(
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% elif m.role == 'assistant' and m.tool_calls %}"
        "<call>{% elif m.role == 'assistant' and not loop.first %}{{ m.content }}{% endif %}{% endfor %}"
    )
    reader = ChatReader(ours, ours, False, DATE)
    reader({"messages": [{"role": "critic", "content": "a"}, {"role": "user", "content": "a"}]})
    assert reader.notes == {"have a message of role 'critic' that the chat template does not write": 1}
    with pytest.raises(InputError, match="does not write `content` of message 1, an answer"):
        reader({"messages": chat("au", ["a", "b"])})
    with pytest.raises(InputError, match="does not write `content` of message 2, an answer"):
        reader({"messages": [*chat("u", ["a"]), {"role": "assistant", "content": "b", "tool_calls": [{}]}]})


def test_a_chat_in_which_nothing_is_said_is_no_document(chatml):
    assert read(chat("ua", ["", ""]), chatml(CHATML_TEMPLATE)) == ()


# --- what counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHATS)
def test_answers_and_their_ends_count(owned, kind):
    ours = owned(kind)
    side = byte_vocabulary(ours)
    messages = chat("uaua", ["the user", " é the\n", " the the", "x"])
    piece = read(messages, ours, side, mask=True)
    answers = [m["content"].strip() if kind == "gemma" else m["content"] for m in messages[1::2]]
    end = {"llama": "<|eot_id|>", "gemma": "<end_of_turn>", "olmo2": "<|endoftext|>"}
    end |= dict.fromkeys(("qwen", "smollm", "olmo3"), "<|im_end|>")
    ends = [end.get(kind, "</s>"), "<|endoftext|>" if kind == "olmo3" else end.get(kind, "</s>")]
    space = " " if kind == "mistral3" else ""  # the template's
    got = spelled(written(side, piece, counted=True))
    assert got in ("".join(a + e for a, e in zip(answers, ends)), "".join(space + a + e for a, e in zip(answers, ends)))
    # A token that is in part of an answer counts, on either side.
    theirs = spelled(written(ours, piece, "teacher", counted=True))
    assert all(answer.strip() in theirs for answer in answers) and "user" not in theirs


TAGGED = """{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}"""


def test_the_tag_of_generation(chatml):
    ours = chatml(TAGGED)
    messages = chat("uaua", ["a", "b", "c", "d"])
    assert spelled(written(ours, read(messages, ours))) == "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>{'' if m['role'] == 'assistant' else chr(10)}"
        for m in messages
    )
    assert spelled(written(ours, read(messages, ours, mask=True), counted=True)) == "b<|im_end|>d<|im_end|>"
    broken = chatml(
        TAGGED.replace("{{ m.content }}<|im_end|>{% endgen", "{{ m.content }}{% endgen", 1).replace(
            "{% for", "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x | length }}{% for"
        )
    )
    with pytest.raises(InputError, match="generation.* cannot be told from the rest"):
        read(messages, broken, mask=True)


QWEN3 = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_think_block_before_the_last_answer(chatml):
    ours = chatml(QWEN3)
    messages = chat("uaua", ["a", "<think>c</think>b", "c", "d"])
    assert spelled(written(ours, read(messages, ours, mask=True), counted=True)) == (
        "b<|im_end|><think>\n\n</think>\n\nd<|im_end|>"
    )


def test_a_call_of_a_tool_counts_and_its_answer_does_not(chatml):
    ours = chatml(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.name }}({{ c.arguments | tojson }}){% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"city": "Oslo"}}]}
    messages = [*chat("u", ["a"]), call, {"role": "tool", "content": "cold"}, *chat("a", ["brr"])]
    assert spelled(written(ours, read(messages, ours, mask=True), counted=True)) == (
        'f({"city": "Oslo"})<|im_end|>brr<|im_end|>'
    )


def test_a_message_of_weight_0_does_not_count(chatml):
    for template in (CHATML_TEMPLATE, TAGGED):
        ours = chatml(template)
        messages = chat("uaua", ["a", "b", "c", "d"])
        messages[1] |= {"weight": 0}
        messages[3] |= {"weight": 1}
        assert spelled(written(ours, read(messages, ours, mask=True), counted=True)).strip() == "d<|im_end|>"
        whole = spelled(written(ours, read(messages, ours), counted=True))
        assert "b<|im_end|>" not in whole and "d<|im_end|>" in whole and "a<|im_end|>" in whole


# --- two templates -----------------------------------------------------------------------------------------------


PAIRS = (("qwen", "gemma"), ("llama", "mistral1"), ("llama", "mistral3"), ("llama", "tekken"), ("gemma", "olmo2"))
PAIRS += (("qwen", "olmo3"), ("tinyllama", "llama"), ("llama", "gemma"))


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("swapped", (False, True))
@pytest.mark.parametrize("mask", (False, True))
def test_two_templates_are_matched_by_the_texts(owned, kinds, swapped, mask):
    """A student with the special tokens and the template of its own tokenizer, not the teacher's."""
    student, teacher = (owned(kind) for kind in (kinds[::-1] if swapped else kinds))
    messages = chat("uaua", ["the", "é", "日本語 the", "x"])
    piece = read(messages, teacher, student, mask)
    (ours,), (theirs,) = student.encode([piece], "student"), teacher.encode([piece], "teacher")
    assert ours.round_trips and theirs.round_trips
    for side, name in ((student, "student"), (teacher, "teacher")):
        alone = read(messages, side)  # each side reads what its own template writes
        ids = side.encode([alone])[0].ids.tolist()
        assert side.encode([piece], name)[0].ids.tolist() == ids
    aligned = align(ours, theirs)
    for number, (content, counts) in enumerate(piece):
        if isinstance(content, str):
            assert content in [m["content"] for m in messages] and counts == (not mask or content in ("é", "x"))
            chunks = {*aligned.student_chunk[ours.segment == number].tolist()}
            other = {*aligned.teacher_chunk[theirs.segment == number].tolist()}
            assert chunks & other - {-1} if counts else True
    after = next(n for n, (content, _) in enumerate(piece) if content == "é") + 1
    end = piece[after]
    assert isinstance(end.content, Markup) and end.loss_mask and all(end.content)
    assert (
        aligned.student_chunk[ours.segment == after].tolist()[-1:]
        == aligned.teacher_chunk[theirs.segment == after].tolist()[-1:]
    )


def test_texts_that_two_templates_write_differently(chatml, owned):
    ours, upper = chatml(CHATML_TEMPLATE), chatml(CHATML_TEMPLATE.replace("m.content", "m.content | upper"))
    with pytest.raises(InputError, match="write the text of message 1 differently"):
        read(chat("ua", ["a", "b"]), ours, upper)
    twice = chatml(CHATML_TEMPLATE.replace("m.content", "m.content ~ m.content"))
    with pytest.raises(InputError, match="does not write each message's text once and in order"):
        read(chat("ua", ["a", "b"]), ours, twice)
    call = [*chat("u", ["a"]), {"role": "assistant", "content": "b", "tool_calls": [{}]}]
    calls = chatml(CHATML_TEMPLATE.replace("m.content", "m.content ~ m.tool_calls"))
    with pytest.raises(InputError, match="with more than a text .tool_calls. cannot be matched"):
        read(call, calls, ours)
    spaced = read(chat("ua", [" a ", "b\n"]), ours, owned("gemma"))  # what Gemma trims belongs to what is around
    assert [content for content, _ in spaced if isinstance(content, str)] == ["a", "b"]


def test_the_teachers_special_tokens_on_another_tokenizer(owned):
    messages = chat("uaua", ["the", "é", "the user", "x"])
    for base, source in (("qwen", "mistral3"), ("tinyllama", "olmo2"), ("mistral3", "gemma"), ("mistral1", "tekken")):
        ours = with_special_tokens(owned(base), owned(source))
        piece = read(messages, owned(source), ours)
        expected = units(by_hand(source, messages), ours)
        got = written(ours, piece)
        if base == "tinyllama":  # a space behind every special token
            assert spelled(got).replace("> ", ">") == spelled(expected)
        else:
            assert got == expected


def test_a_special_token_that_the_student_lacks(chatml):
    ours = chatml("{{ '<|im_st' ~ 'art|>' if messages[0].role == 'x' }}{{ messages[0].content }}")
    side = byte_vocabulary(ours)
    assert "<|im_start|>" not in side.special
    with pytest.raises(InputError, match="holds the special token '<.im_start.>', which bytes for .* does not have"):
        read([{"role": "x", "content": "a"}], ours, side)


# --- templates that do harm --------------------------------------------------------------------------------------


HARM = {
    "syntax": ("{% for m in messages %}", "TemplateSyntaxError"),
    "refusal": ("{{ raise_exception('never') }}", r"refuses this chat .never."),
    "a file": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ raise_exception.__globals__['os'].system('true') }}", "SecurityError|Undefined"),
    "a namespace": ("{% set n = namespace(__class__=1) %}", "SecurityError"),
    "format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "SecurityError"),
    "change": ("{% set _ = messages.append(1) %}", "SecurityError"),
    "include": ("{% include '/etc/passwd' %}", "TypeError|no loader"),
    "import": ("{% import '/etc/passwd' as p %}", "TypeError|no loader"),
    "long": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError|SecurityError"),
    "endless": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "large": ("{{ 'a' * 100000000000 }}", "MemoryError|memory"),
    "power": ("{{ 9 ** (9 ** 9) }}", "MemoryError|memory|seconds"),
    "nested": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
    "writes": ("{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}", "without end|memory"),
    "pads": ("{{ '%9999999999d' % 1 }}", "MemoryError|memory|OverflowError"),
}


@pytest.mark.parametrize("what", HARM)
def test_a_template_of_no_use_is_an_error_where_chats_are_needed(tmp_path, monkeypatch, what):
    template, reason = HARM[what]
    monkeypatch.setattr(chat_template, "SECONDS", 2.0)
    path = save(tmp_path / "t", byte_level(), ["<s>"], bos_token="<s>")
    (path / "chat_template.jinja").write_text(template)
    began = time.monotonic()
    ours = load_vocabulary(path)  # texts are of use without it
    (encoding,) = ours.encode([(Segment(Special("bos")), Segment("a"))])
    assert encoding.ids.tolist() == [*ours.part_ids("bos"), ours.id_of_bytes[b"a"]]
    with pytest.raises(InputError, match=reason) as caught:
        read([{"role": "user", "content": "a"}], ours)
    assert str(caught.value).startswith(str(path / "chat_template.jinja")) and "\n" not in str(caught.value)
    assert time.monotonic() - began < 20
    # The process that renders is as good as new.
    assert render([Render(ChatTemplate("t", {"default": "a"}, {}), [])], DATE) == [("a", "")]
    # A process that is forked counts as large as its parent, which after many tests is the larger of the two.
    parent, children = (
        1024 * resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    assert children < max(2 * sandbox.MEMORY, 1.1 * parent)


@pytest.mark.parametrize(
    "config", ([], 3, {"chat_template": 3}, {"chat_template": ["a"]}, {"chat_template": [{"name": "default"}]})
)
def test_a_template_that_is_no_text(tmp_path, config):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="tokenizer_config.json holds no chat template"):
        read_chat_template(tmp_path, {}, ())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="chat_template.jinja holds no chat template"):
        read_chat_template(tmp_path, {}, ())


def test_plain_texts_start_as_before(owned):
    piece = (Segment(Special("bos")), Segment("the"), Segment(Special("eos")))
    for kind in ("tinyllama", "mistral1"):
        ours = owned(kind)
        (encoding,) = ours.encode([piece])
        assert [ours.token_bytes[i] for i in encoding.ids] == [b"", b" the", b""]
        assert encoding.ids[0] == ours.special["<s>"] and encoding.ids[2] == ours.special["</s>"]


# --- What a student's folder says of chats ---------------------------------------------------------------------------


def exported(folder: Path, ours: Vocabulary, sampling: dict | None = None) -> Path:
    config = ModelConfig(ours.size, embed=2, mlp=2, layers=1, heads=1, kv_heads=1, head_dim=2, windows=(None,))
    shapes = transformer.leaves(transformer.abstract(config))
    model = transformer.from_leaves(config, {leaf: np.zeros(shape.shape, np.float32) for leaf, shape in shapes.items()})
    student.save(folder, model, ours, None, "float32", student.GenerationConfig(sampling=sampling or {}))
    return folder


@pytest.mark.parametrize("kind", CHATS)
def test_a_byte_student_keeps_the_template(owned, tmp_path, kind):
    ours = byte_vocabulary(owned(kind))
    found, _ = student.load_vocabularies(exported(tmp_path / "student", ours))
    assert found.chat_template.sources == {"default": CHATS[kind]}
    for field in ("token_bytes", "special", "names", "adds_bos", "stop_ids"):
        assert getattr(found, field) == getattr(ours, field), field
    messages = chat("uaua", ["the", "é", "the user", "x"])
    assert written(found, read(messages, found)) == units(by_hand(kind, messages), ours)


def test_an_exported_student_shares_its_teachers_template(tmp_path):
    """Though it has no unk, which the teacher's tokenizer_config.json names and the template does not use."""
    make("gemma", tmp_path / "t", CHATS["gemma"])
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))
    teacher = load_vocabulary(tmp_path / "t")
    found, _ = student.load_vocabularies(exported(tmp_path / "student", byte_vocabulary(teacher)))
    assert "unk_token" in teacher.names and "unk_token" not in found.names
    messages = chat("ua", ["the", "x"])
    assert read(messages, teacher, found) == read(messages, teacher, byte_vocabulary(teacher))


def with_bos(folder: Path, kind: str, word: str, **config: object) -> Vocabulary:
    """A vocabulary whose tokenizer puts a special token before a text."""
    make(kind, folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    bos, text = {"SpecialToken": {"id": word, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    tokens = {word: {"id": word, "ids": [ids[word]], "tokens": [word]}}
    other = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    processor = {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text], "special_tokens": tokens}
    spec["post_processor"] = {"type": "Sequence", "processors": [other, processor]}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | config))
    return load_vocabulary(folder)


def test_an_exported_tokenizer_puts_bos_where_the_original_does(tmp_path):
    llama = with_bos(tmp_path / "llama", "llama", LLAMA[0])
    cases = {
        "bytes": (byte_vocabulary(llama), [LLAMA[0]]),
        "itself": (llama, [LLAMA[0]]),
        "not asked for": (byte_vocabulary(with_bos(tmp_path / "no", "llama", LLAMA[0], add_bos_token=False)), []),
        "no processor": (byte_vocabulary(vocabulary("llama")), []),
        "no bos": (byte_vocabulary(vocabulary("qwen")), []),
        "by configuration": (byte_vocabulary(vocabulary("tinyllama")), ["<s>"]),
        "Qwen's tokens": (with_special_tokens(vocabulary("qwen"), llama), [LLAMA[0]]),
        "Gemma's special": (with_special_tokens(llama, vocabulary("gemma")), []),
        "Gemma's special, with its bos": (
            with_special_tokens(llama, with_bos(tmp_path / "gemma", "gemma", "<bos>")),
            ["<bos>"],
        ),
    }
    for name, (ours, bos) in cases.items():
        tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json.tokenizer_json(ours)))
        text = text_ids(ours, "the é")
        assert tokenizer.encode("the é").ids == [ours.special[word] for word in bos] + text, name
        assert tokenizer.encode("the é", add_special_tokens=False).ids == text, name
        pair = [*(ours.special[word] for word in bos), *text]
        if ours.tokenizer is None:
            assert tokenizer.encode("the é", "the é").ids == pair * 2, name
        assert load_vocabulary(exported(tmp_path / f"student {name}", ours)).adds_bos == bool(bos)


def text_ids(ours: Vocabulary, text: str) -> list[int]:
    return ours.encode([(Segment(text),)])[0].ids.tolist()


@pytest.mark.real
@pytest.mark.parametrize("name", ("llama3", "gemma2", "gemma3", "qwen3"))
def test_real_byte_students_put_bos_where_the_original_does(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    original = load_vocabulary(real_tokenizer(name))
    ours = byte_vocabulary(original)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported(tmp_path / "student", ours))
    theirs = transformers.AutoTokenizer.from_pretrained(real_tokenizer(name))
    bos = theirs("the é").input_ids[: 1 if name != "qwen3" else 0]
    assert bos == original.part_ids("bos")
    assert tokenizer("the é").input_ids == ours.part_ids("bos") + list("the é".encode())
    assert theirs("the é").input_ids == original.part_ids("bos") + text_ids(original, "the é")


@pytest.mark.parametrize(
    "kind, stops",
    {
        "llama": ["<|eot_id|>"],
        "gemma": ["<eos>", "<end_of_turn>"],
        "qwen": ["<|im_end|>"],
        "mistral3": ["</s>"],
        "olmo2": ["<|endoftext|>"],
        "olmo3": ["<|endoftext|>", "<|im_end|>"],
    }.items(),
)
def test_generation_config(owned, tmp_path, kind, stops):
    ours = byte_vocabulary(owned(kind))
    source = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "do_sample": True, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(
        json.dumps({**source, "eos_token_id": 128009, "max_length": 9, "temperature": 0.7})
    )
    (tmp_path / "config.json").write_text("{}")
    sampling = student.read_generation_config(tmp_path).sampling
    assert sampling == source | {"temperature": 0.7}
    folder = exported(tmp_path / "student", ours, sampling)
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": next(iter(ours.part_ids("bos")), None),
        "eos_token_id": [ours.special[word] for word in stops],
        "pad_token_id": next(iter(ours.part_ids("pad")), None),
        "max_new_tokens": student.NEW_BYTES,
        **sampling,
    }


@pytest.mark.parametrize(
    "content, message",
    (
        ("[1]", "is not a JSON object"),
        ("{", "is not JSON"),
        ('{"top_k": "50"}', "top_k is '50': write a number"),
        ('{"temperature": true}', "temperature is True: write a number"),
        ('{"do_sample": 1}', "do_sample is 1: write true or false"),
    ),
)
def test_sampling_that_is_none(tmp_path, content, message):
    (tmp_path / "config.json").write_text("{}")
    assert student.read_generation_config(tmp_path) == student.GenerationConfig()
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=f"generation_config.json.*{message}"):
        student.read_generation_config(tmp_path)

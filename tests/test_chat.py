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
from tokenizers import Tokenizer

from minalm.errors import InputError
from minalm.huggingface import folder as student
from minalm.models import transformer
from minalm.models.config import ModelConfig
from minalm.text.corpus import read_corpus
from minalm.text.documents import Piece, Segment, Special
from minalm.tokenization import tokenizer_json
from minalm.tokenization.align import align
from minalm.tokenization.chat import ChatTemplate, chat_parts, read_chat_template, render
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.vocabulary import Vocabulary, byte_vocabulary, with_special_tokens

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


def written(ours: Vocabulary, piece: Piece) -> list[bytes | str]:
    """What the ids of a chat spell, as `units` has it."""
    (encoding,) = ours.encode([piece])
    assert encoding.round_trips
    words = {i: word for word, i in ours.special.items()}
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
    assert side.size == 256 + len(side.special) and list(side.special) == sorted(side.special)
    ids = [i for unit in units(stretches, side) for i in ([side.special[unit]] if isinstance(unit, str) else unit)]
    assert side.encode([piece_of(messages, tmp_path)])[0].ids.tolist() == ids


@pytest.mark.parametrize("kind", CHATS)
@given(texts=st.lists(TEXTS, min_size=4, max_size=4).filter(any))
@settings(max_examples=40, deadline=None)
def test_texts_of_chats_are_spelled_and_never_become_special(owned, tmp_path_factory, kind, texts):
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
    for kind, special in needed.items():
        assert list(byte_vocabulary(owned(kind)).special.items()) == list(zip(sorted(special), range(256, 270)))


@pytest.mark.parametrize("kind", ("llama", "gemma", "qwen", "smollm"))
def test_the_four_families_stay_as_they_are_with_a_template_of_their_own(owned, kind):
    assert owned(kind).template == vocabulary(kind).template


@pytest.mark.parametrize("kind", ("llama", "gemma", "qwen"))
def test_a_template_is_taken_apart_as_the_table_does_it(kind):
    """Not asked for where the table serves, but the same parts are aligned whichever it comes from."""
    ours = vocabulary(kind)
    names = {"bos_token": "".join(ours.template["bos"])}
    found = chat_parts(ChatTemplate(Path("t"), CHATS[kind]), names, ours.special)
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
    piece = (Segment(Special("start_of_chat")), Segment(Special("user")), Segment("the the"))
    (encoding,) = ours.encode([piece])
    tokens = [ours.token_bytes[i] for i in encoding.ids]
    assert tokens == [b"", b"", b" the", b" the"] and encoding.text_bytes.tolist() == [0, 0, 3, 4]
    assert encoding.ends.tolist() == [1, 2, 5, 9]
    piece = (Segment(Special("end_of_turn")), Segment(Special("user")), Segment(" the"))
    (encoding,) = ours.encode([piece])
    assert [ours.token_bytes[i] for i in encoding.ids] == [b"", b"", b" ", b" the"]
    assert encoding.round_trips and encoding.text_bytes.sum() == 4


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
    assert ours.encode([(Segment(Special("bos")), Segment("a"))])[0].ids.tolist() == [
        *ours.part_ids("bos"),
        ours.id_of_bytes[b"a"],
    ]
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


PAIRS = {  # student, teacher: the special parts of a chat that one of them does not write
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
    """A student with the special tokens and the template of its own tokenizer, not the teacher's."""
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
        elif not chunks[0] and not chunks[1]:  # neither writes it
            assert not student.part_ids(content.part) and not teacher.part_ids(content.part)
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
        ours = with_special_tokens(owned(base), owned(source))
        assert written(ours, piece_of(messages, tmp_path)) == units(by_hand(source, messages), ours)


@pytest.mark.parametrize("kind", [kind for kind in CHATS if kind not in ("tinyllama", "llama")])
def test_tokens_are_those_of_the_whole_chat(tmp_path, kind):
    """What is tokenized part by part becomes the tokens that the rendered chat has when it is read at once.

    Not TinyLlama's: its tokenizer writes one more space after every special token, which the template does not. Nor
    this small Llama's, which divides text as GPT-2 does and cuts the two line breaks of a header (the real one does not).
    """
    ours = make(kind, tmp_path / "t", CHATS[kind])
    messages = chat("uaua", ["the user", "é the", "the the", "x"])
    whole = Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    ids = whole.encode("".join(text for text, _ in by_hand(kind, messages)), add_special_tokens=False).ids
    assert ours.encode([piece_of(messages, tmp_path)])[0].ids.tolist() == ids


def test_plain_texts_start_as_before(owned):
    piece = (Segment(Special("bos")), Segment("the"), Segment(Special("eos")))
    for kind in ("tinyllama", "mistral1"):
        ours = owned(kind)
        (encoding,) = ours.encode([piece])
        assert [ours.token_bytes[i] for i in encoding.ids] == [b"", b" the", b""]
        assert encoding.ids[0] == ours.special["<s>"] and encoding.ids[2] == ours.special["</s>"]


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
    messages = chat(roles, ["the user", "é 日本語\n\nthe end", "hi", "x"])
    whole = Tokenizer.from_file(str(real_tokenizer(tokenizer) / "tokenizer.json"))
    ids = whole.encode("".join(text for text, _ in by_hand(kind, messages)), add_special_tokens=False).ids
    assert ours.encode([piece_of(messages, tmp_path)])[0].ids.tolist() == ids


@pytest.mark.real
@pytest.mark.parametrize("kind", CHATS)
def test_templates_render_as_in_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    make(kind, tmp_path / "t", CHATS[kind])
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    config = {key: value["content"] if isinstance(value, dict) else value for key, value in config.items()}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    messages = chat("uaua", ["the <b>", " é ", "x\n", "y"])
    names = {key: config[key] for key in ("bos_token", "eos_token") if key in config}
    ours = render(ChatTemplate(Path("t"), CHATS[kind]), messages, names)
    assert theirs.apply_chat_template(messages, tokenize=False) == ours


# --- What a student's folder says of chats ---------------------------------------------------------------------------


def exported(folder: Path, ours: Vocabulary, template: str | None, sampling: dict | None = None) -> Path:
    config = ModelConfig(ours.size, embed=2, mlp=2, layers=1, heads=1, kv_heads=1, head_dim=2, windows=(None,))
    shapes = transformer.leaves(transformer.abstract(config))
    model = transformer.from_leaves(config, {leaf: np.zeros(shape.shape, np.float32) for leaf, shape in shapes.items()})
    student.save(folder, model, ours, None, "float32", student.GenerationConfig(template, sampling=sampling or {}))
    return folder


@pytest.mark.parametrize("kind", CHATS)
def test_a_byte_student_keeps_the_template(owned, tmp_path, kind):
    ours = byte_vocabulary(owned(kind))
    found, _ = student.load_vocabularies(exported(tmp_path / "student", ours, CHATS[kind]))
    assert student.read_template(tmp_path / "student") == CHATS[kind]
    for field in ("token_bytes", "special", "template", "adds_bos"):
        assert getattr(found, field) == getattr(ours, field), field
    messages = chat("uaua", ["the", "é", "the user", "x"])
    assert written(found, piece_of(messages, tmp_path)) == units(by_hand(kind, messages), ours)


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
        assert load_vocabulary(exported(tmp_path / f"student {name}", ours, None)).adds_bos == bool(bos)


def text_ids(ours: Vocabulary, text: str) -> list[int]:
    return ours.encode([(Segment(text),)])[0].ids.tolist()


@pytest.mark.real
@pytest.mark.parametrize("name", ("llama3", "gemma2", "gemma3", "qwen3"))
def test_real_byte_students_put_bos_where_the_original_does(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    original = load_vocabulary(real_tokenizer(name))
    ours = byte_vocabulary(original)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported(tmp_path / "student", ours, None))
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
        "qwen": ["<|endoftext|>", "<|im_end|>"],
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
    folder = exported(tmp_path / "student", ours, CHATS[kind], sampling)
    bos, pad = (ours.template[part] for part in ("bos", "pad"))
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": ours.special[bos[0]] if bos else None,
        "eos_token_id": [ours.special[word] for word in stops],
        "pad_token_id": ours.special[pad[0]] if pad else None,
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

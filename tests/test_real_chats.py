"""Chats on real templates and tokenizers against transformers, and hostile texts."""

import json
import random
import re
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from real_models import real_model
from real_tokenizers import trl_templates, with_own_configuration
from small_tokenizers import byte_level, save

from minalm.batches import Side, make_batch
from minalm.errors import InputError
from minalm.text.documents import Segment
from minalm.tokenization.chats import ChatReader
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.vocabulary import Vocabulary, byte_vocabulary

pytestmark = pytest.mark.real
transformers = pytest.importorskip("transformers")


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
RESULT = {"role": "tool", "content": "Cold.", "tool_call_id": "abcdefghi", "name": "weather"}
PROPERTIES = {"city": {"type": "string", "description": "where"}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["city"]}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "What it is like.", "parameters": PARAMETERS},
}
THOUGHT = "<think>\nhm\n</think>\n\n"
SHAPES = {
    "a question": {"messages": [user("Hi there")]},
    "an answer": {"messages": [user("Hi there"), answer("Hello.")]},
    "a system message": {"messages": [system("Be brief."), user("Hi"), answer(" Hello.\n")]},
    "two turns": {"messages": [user("Hi "), answer("Hello."), user("\nHow?"), answer("Well.")]},
    "system, two turns": {
        "messages": [system("Be brief."), user("Hi"), answer("Hello."), user("How?"), answer("Well.")]
    },
    "thoughts": {"messages": [user("Hi"), answer(f"{THOUGHT}Hello."), user("And?"), answer(f"{THOUGHT}Well.")]},
    "reasoning": {"messages": [user("Hi"), answer("Hello.", reasoning_content="Greet.")]},
    "tools": {"messages": [user("Oslo?"), answer("", tool_calls=[CALL]), RESULT, answer("Cold.")], "tools": [TOOL]},
    "parts": {"messages": [user([{"type": "text", "text": "Hi"}]), answer([{"type": "text", "text": "Hello."}])]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, user("Hi"), answer("Hello.")]},
    "Unicode": {"messages": [user("é 日本語 😀\r\n\tx"), answer("« ok »\n\n```py\nx = 1\n```")]},
    "two answers": {"messages": [user("a"), answer("b"), answer("c")]},
}
SPECIAL = re.compile(
    r"<\|[^|>'\" ]+\|?>|<｜[^｜]+｜>|</?s>|<bos>|<eos>|</?start_of_turn>|<end_of_turn>|\[/?INST\]|<[A-Z_]+>"
    r"|<end_of_utterance>|\[gMASK\]|<sop>"
)
USUAL = {"<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|tool|>"}
# Why we refuse what transformers writes: the text of an answer would be missing, or a list be written as program code.
REFUSED = re.compile("does not write `|as program code")


def theirs(tokenizer, row: dict, **options) -> list[int] | None:
    try:
        return tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools"), tokenize=True, **{"return_dict": False, **options}
        )
    except Exception:  # jinja2 and templates raise whatever they raise
        return None


def ours(vocabulary: Vocabulary, row: dict, mask: bool = False) -> tuple[list[int] | None, list[int] | None, str]:
    """Ids, which of them count, and why there are none."""
    try:
        piece = ChatReader(vocabulary, vocabulary, mask, date.today().isoformat())(row)
    except InputError as error:
        return None, None, str(error)
    (encoding,) = vocabulary.encode([piece])
    assert encoding.round_trips
    return encoding.ids.tolist(), encoding.loss_mask.astype(int).tolist(), ""


@pytest.fixture(scope="module")
def templates():
    return sorted(trl_templates().glob("*.jinja"))


def test_every_template_of_trl(templates, tmp_path, capsys):
    equal = both = masks = 0
    refused = []
    for file in templates:
        source = file.read_text("utf-8")
        special = sorted(USUAL | set(SPECIAL.findall(source)))
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
        path = save(tmp_path / file.stem, byte_level(), special, tokenizer_class="PreTrainedTokenizerFast", **names)
        (path / "chat_template.jinja").write_text(source)
        vocabulary, tokenizer = load_vocabulary(path), transformers.AutoTokenizer.from_pretrained(path)
        tagged = re.search(r"\{%-?\s*generation", source)
        for shape, row in SHAPES.items():
            expected, (ids, _, why) = theirs(tokenizer, row), ours(vocabulary, row)
            if ids is None:
                both += expected is None
                assert expected is None or REFUSED.search(why), (file.name, shape, why)
                refused += [f"{file.name}, {shape}: {why.partition(': ')[2]}"] if expected is not None else []
                continue
            assert ids == expected, (file.name, shape)
            equal += 1
            if tagged:
                found = theirs(tokenizer, row, return_dict=True, return_assistant_tokens_mask=True)
                assert ours(vocabulary, row, mask=True)[1] == found["assistant_masks"], (file.name, shape)
                masks += 1
    with capsys.disabled():
        print(f"\n{len(templates)} templates: {equal} chats equal, {both} refused by both, {len(refused)} by us alone:")
        print("\n".join(refused))
        print(f"{masks} masks equal")
    assert equal > 600 and masks > 300 and equal + both + len(refused) == len(templates) * len(SHAPES)


REAL = ("smollm2", "gemma2", "gemma3", "llama3", "qwen3")


@cache
def folder(name: str, root: Path) -> Path:
    if name == "smollm2":
        return real_model(name)
    path = with_own_configuration(name, root / name)
    if name == "llama3":  # 3.1's: the package has that of 3
        config = json.loads((path / "tokenizer_config.json").read_text())
        config["chat_template"] = (trl_templates() / "llama3_1.jinja").read_text("utf-8")
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    return lambda name: folder(name, root)


WORDS = (
    "the",
    " user",
    "model",
    "assistant",
    "\n",
    "\n\n",
    " ",
    "é",
    "日本語",
    "😀",
    "\t",
    "1234",
    "x = 1",
    "'s",
    "<b>",
)


def random_chat(draw: random.Random, thinking: bool) -> dict:
    def text():
        return "".join(draw.choices(WORDS, k=draw.randint(1, 12)))

    messages = [system(text())] * draw.randint(0, 1)
    for _ in range(draw.randint(1, 3)):
        said = f"<think>\n{text()}\n</think>\n\n{text()}" if thinking and draw.random() < 0.5 else text()
        messages += [user(text()), answer(said)]
        if thinking and draw.random() < 0.3:
            messages[-1] = answer(text(), reasoning_content=text())
    return {"messages": messages[: len(messages) - draw.randint(0, 1)]}


@pytest.mark.parametrize("name", REAL)
def test_200_random_chats(real, name):
    vocabulary, tokenizer = load_vocabulary(real(name)), transformers.AutoTokenizer.from_pretrained(real(name))
    draw, equal = random.Random(0), 0
    for _ in range(200):
        row = random_chat(draw, name == "qwen3")
        expected, (ids, _, why) = theirs(tokenizer, row), ours(vocabulary, row)
        assert ids == expected, (row, why)
        equal += ids is not None
    assert equal >= (90 if name == "gemma2" else 200)  # Gemma 2's template refuses system messages


def hostile(draw: random.Random, special: list[str]) -> str:
    kind = draw.randrange(8)
    if kind == 0:  # all planes
        points = (draw.choice((draw.randrange(0x3000), draw.randrange(0x110000))) for _ in range(draw.randint(1, 30)))
        return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
    if kind == 1:  # control characters
        return "".join(chr(draw.randrange(0xA0)) for _ in range(draw.randint(1, 30)))
    if kind == 2:
        return "".join(draw.choices([*special, *WORDS], k=draw.randint(1, 8)))
    if kind == 3:  # look-alikes
        word = draw.choice(special)
        return draw.choice((word[:-1], word[1:], word.upper(), f"{word[0]} {word[1:]}", f"{word}{word[:3]}", word * 3))
    if kind == 4:
        return "".join(draw.choices(("\u2581", "<0x41>", "<0x0A>", "\u2581the", " ", "Ġ", "Ċ"), k=draw.randint(1, 12)))
    if kind == 5:
        return "".join(
            draw.choices(("\r\n", "\r", "\n", "\u2028", "\u0085", "a", "\x0b", "\x0c"), k=draw.randint(1, 20))
        )
    if kind == 6:
        return draw.choice((" ", "\n", "a", "é", "\u0301", "\t", "=", "\u200d", "0")) * draw.randint(1, 400)
    return "".join(
        draw.choices(("\ufeff", "\u200b", "\u202e", "e\u0301", "\ue000", "\\ue000", "👩‍👩‍👧", "ﬁ", "Å"), k=9)
    )


@pytest.mark.parametrize("name", REAL)
def test_10_000_hostile_texts(real, name):
    teacher = load_vocabulary(real(name))
    student = byte_vocabulary(teacher)
    special = [word for word, i in teacher.special.items()][:50] + list(student.special) + ["<s>", "</s>", "[INST]"]
    draw = random.Random(1)
    texts = [hostile(draw, special) for _ in range(10_000)]
    read = ChatReader(student, teacher, True, "2026-01-01")
    left_out = 0
    for start in range(0, len(texts), 100):
        some = texts[start : start + 100]
        plain = [(Segment(text),) for text in some[:50]]
        chats = [read({"messages": [user(f"{text}x"), answer(f"y{text}")]}) for text in some[50:]]
        markup = [sum(not isinstance(content, str) for content, _ in chat) for chat in chats]
        for side, name_of_side in ((student, "student"), (teacher, "teacher")):
            ids = np.array(sorted(side.special.values()))
            for n, encoding in enumerate(side.encode([*plain, *chats], name_of_side)):
                expected = 0 if n < len(plain) else markup[n - len(plain)]
                assert np.isin(encoding.ids, ids).sum() == expected  # none arises from a user's text
        batch = make_batch([*plain, *chats], Side(student, None, 4096), Side(teacher, None, 4096))
        left_out += int(batch.left_out.sum())
        for row, piece in enumerate([*plain, *chats]):
            kept = batch.student.inputs[row][batch.student.inputs[row] != student.pad_id]
            if not batch.left_out[row]:
                text = "".join(content for content, _ in piece if isinstance(content, str))
                assert student.decode(kept) == teacher.normalize(text)
    print(f"{name}: {left_out} of {len(texts)} left out")
    assert left_out < 0.25 * len(texts)

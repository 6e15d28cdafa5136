"""Tokens, chunks and expanded ids of real tokenizers against numbers recorded from another implementation.

Those numbers bear that implementation's defects. DIFFERENT lists every value of ours that is not theirs, with the
reason; for all texts, listed or not, ours are compared with plain implementations as well.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest
from real_tokenizers import real_tokenizer
from test_align import walk
from test_suffixes import search

from minalm.text.documents import Markup, Piece, Segment, Special
from minalm.tokenization.align import align
from minalm.tokenization.suffixes import longest_suffix
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.vocabulary import Vocabulary, byte_vocabulary, with_special_tokens

pytestmark = pytest.mark.real

GOLDEN = json.loads((Path(__file__).parent / "golden" / "align.json").read_text("utf-8"))
TEXTS = {text["name"]: text for text in GOLDEN["texts"]}
GEMMA, LLAMA, QWEN = "gemma2->byte", "llama3->byte", "llama3->qwen_as_llama3"

IDS = {"teacher ids", "teacher chunks", "student chunks"}
LONG = "a token of more than 16 bytes was found by its last 16: ours are the tokens of at most 16 bytes"
BREAKS = "a newline, which spells a special part of Gemma, was split off runs of newlines: ours are Gemma's own tokens"
BLANK = "a blank line, which spells a special part of Llama 3, became one token of the byte vocabulary: ours are bytes"
SPECIAL = "text that looks like a special token, or like a word of the template, became one: ours stays text"
COMPOSED = "Qwen's normalizer (NFC) was left out: ours acts on the text that both sides read"
JOINED = "the text of a message was read apart from its header: ours are the tokens of the whole chat"
DIFFERENT = {
    (GEMMA, "leading_spaces_long"): ({"expanded"}, LONG),
    (GEMMA, "code_indent_runs"): ({"expanded"}, LONG),
    (GEMMA, "lf_runs"): (IDS, BREAKS),
    (GEMMA, "japanese_prose"): (IDS | {"expanded"}, f"{BREAKS}; {LONG}"),
    (GEMMA, "russian_prose"): (IDS | {"expanded"}, f"{BREAKS}; {LONG}"),
    (GEMMA, "looks_special"): (IDS | {"student ids", "expanded"}, SPECIAL),
    (LLAMA, "leading_spaces_long"): ({"expanded"}, LONG),
    (LLAMA, "code_indent_runs"): ({"expanded"}, LONG),
    (LLAMA, "lf_runs"): ({"student ids", "student chunks", "expanded"}, BLANK),
    (LLAMA, "japanese_prose"): ({"student ids", "student chunks", "expanded"}, f"{BLANK}; {LONG}"),
    (LLAMA, "russian_prose"): ({"student ids", "student chunks", "expanded"}, f"{BLANK}; {LONG}"),
    (LLAMA, "looks_special"): (IDS | {"student ids", "expanded"}, SPECIAL),
    (GEMMA, "chat_leading_space_content"): (IDS, JOINED),
    (LLAMA, "chat_leading_space_content"): (IDS, JOINED),
    (QWEN, "chat_leading_space_content"): (IDS | {"student ids"}, JOINED),
    (QWEN, "looks_special"): (IDS | {"student ids"}, SPECIAL),
    (QWEN, "combining"): (IDS | {"student ids"}, COMPOSED),
}
MARKUP = {  # what Gemma and Llama 3 write for each recorded part of a chat
    "start_header": (("<start_of_turn>",), ("<|start_header_id|>",)),
    "end_header": (("\n",), ("<|end_header_id|>", "\n\n")),
    "eot": (("<end_of_turn>", "\n"), ("<|eot_id|>",)),
    "user_name": (("user",), ("user",)),
    "assistant_name": (("model",), ("assistant",)),
}


@cache
def loaded(name: str) -> Vocabulary:
    return load_vocabulary(real_tokenizer(name))


def vocabularies(pair: str) -> tuple[Vocabulary, Vocabulary]:
    """(student, teacher). The recorded byte vocabularies have the words of the template after the special tokens."""
    teacher = loaded("gemma2" if pair == GEMMA else "llama3")
    if pair == QWEN:
        return with_special_tokens(loaded("qwen3"), teacher), teacher
    listed = GOLDEN["byte_vocabularies"]["gemma2_byte" if pair == GEMMA else "llama3_byte"]
    words = ["model", "user"] if pair == GEMMA else ["assistant", "system", "user", "\n\n"]
    student = byte_vocabulary(teacher, [*sorted(listed["special_tokens"]), *words])
    assert [student.special[token] for token in listed["special_tokens"]] == listed["special_ids"]
    assert student.size == listed["size"] and student.pad_id == listed["pad"] and student.eos_id == listed["eos"]
    return student, teacher


def read(prompt: str, teacher: Vocabulary, student: Vocabulary) -> Piece:
    """The piece that a recorded prompt such as "<|<bos>|>text<|<eos>|>" stands for."""
    kind = "<start_of_turn>" not in teacher.special
    segments = []
    for index, part in enumerate(re.split(r"<\|<(\w+)>\|>", prompt)):
        if index % 2:
            segments.append(Segment(Markup(*[MARKUP[part][kind]] * 2) if part in MARKUP else Special(part)))
        elif part:
            for side in (teacher, student):
                part = side.normalize(part)
            segments.append(Segment(part))
    return tuple(segments)


def unroll(runs: list[int]) -> list[int]:
    return [value for value, times in zip(runs[::2], runs[1::2], strict=True) for _ in range(times)]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("pair", GOLDEN["pairs"])
def test_recorded_alignment(pair, name):
    student, teacher = vocabularies(pair)
    (golden,) = (row for row in GOLDEN["pairs"][pair] if row["name"] == name)
    lengths = golden["smax"], golden["tmax"]
    piece = read(TEXTS[name]["prompt"], teacher, student)
    (ours,), (theirs,) = student.encode([piece], "student"), teacher.encode([piece], "teacher")
    assert ours.round_trips and theirs.round_trips
    ours, theirs = ours.cut(lengths[0]), theirs.cut(lengths[1])
    aligned = align(ours, theirs)

    values = {
        "teacher ids": (theirs.ids.tolist(), golden["t"]),
        "student ids": (ours.ids.tolist(), golden["s"]),
        "teacher chunks": (aligned.teacher_chunk.tolist(), unroll(golden["unc_chunk_t"])),
        "student chunks": (aligned.student_chunk.tolist(), unroll(golden["unc_chunk_s"])),
    }
    if pair != QWEN:
        values["expanded"] = expansion(pair)(ours.ids[None])[0].tolist(), golden["expanded"]
    differing, _ = DIFFERENT.get((pair, name), (set(), ""))
    assert {key for key, (got, recorded) in values.items() if got != recorded} == differing

    for side, encoding in ((student, ours), (teacher, theirs)):
        assert encoding.ids.tolist() == alone(side, piece)[: len(encoding.ids)]
    chunks, closes = walk(piece, student, teacher, lengths)
    assert [aligned.student_chunk.tolist(), aligned.teacher_chunk.tolist()] == chunks
    assert [aligned.student_chunk_end.tolist(), aligned.teacher_chunk_end.tolist()] == closes
    if pair != QWEN:
        original = {token: i for token, i in teacher.id_of_bytes.items() if len(token) <= 16}
        assert values["expanded"][0] == search(ours.ids.tolist(), original, original_special(student, teacher))


@cache
def expansion(pair: str):
    student, teacher = vocabularies(pair)
    return longest_suffix(teacher, student)


def original_special(student: Vocabulary, teacher: Vocabulary) -> dict[int, int]:
    ids = {**{word: i for word, i in teacher.special.items()}}
    return {i: ids.get(word, teacher.id_of_bytes.get(word.encode())) for word, i in student.special.items()}


def alone(side: Vocabulary, piece: Piece) -> list[int]:
    """What the tokenizer itself gives for each text on its own, and the special tokens between."""
    ids, run = [], ""
    words = [
        word
        for content, _ in piece
        for word in (
            [(content, False)]
            if isinstance(content, str)
            else [(side.named(content.part) or "", True)]
            if isinstance(content, Special)
            else [(word, word in side.special) for word in content.teacher]
        )
    ]
    for word, special in [*words, ("", True)]:
        if not special:
            run += word
            continue
        ids += run.encode() if side.tokenizer is None else side.tokenizer.encode(run, add_special_tokens=False).ids
        ids += [side.special[word]] if word else []
        run = ""
    return ids


def test_differences_are_of_recorded_texts():
    assert {name for _, name in DIFFERENT} <= set(TEXTS) and {pair for pair, _ in DIFFERENT} <= set(GOLDEN["pairs"])


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama3", "qwen3"])
def test_every_real_tokenizer_spells_every_recorded_text(name):
    ours = loaded(name)
    texts = [ours.normalize(text["text"]) for text in TEXTS.values()] + [
        "\u2581 a\u2581\u2581b <bos>",
        "\0\x04\U0010ffff",
    ]
    for text, encoding in zip(texts, ours.encode([(Segment(text),) for text in texts]), strict=True):
        assert encoding.round_trips
        assert ours.decode(encoding.ids) == text
        assert not set(encoding.ids.tolist()) & set(ours.special.values())

"""Values of pairs of tokens and the chunks that they let end: by enumeration, from text, in batches, in files."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import small_tokenizers as small
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from small_tokenizers import TEXT, vocabulary
from tokenizers import pre_tokenizers

from minalm.batches import Side, make_batch
from minalm.errors import InputError
from minalm.text.documents import Markup, Segment, Special
from minalm.tokenization.pair_bias import (
    DTYPES,
    FORMAT,
    PairBias,
    UnbiasedEnds,
    count_pairs,
    pair_bias,
    read_pair_bias,
    write_pair_bias,
)
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.vocabulary import Vocabulary


def plain(text):
    return (Segment(Special("bos")), Segment(text), Segment(Special("eos")))


PIECES = [plain(text) for text in (TEXT[:90], "the user said", "thé 日本 modeler\n\n\n they", "ers 語日\tusers", "")]
KINDS = (
    ("bytes of llama", "llama"),
    ("bytes of gemma", "gemma"),
    ("qwen", "llama"),
    ("gemma", "qwen"),
    ("llama", "gemma"),
    ("bytes of gemma", "llama2"),
    ("gemma", "bytes of llama"),
)


# --- by enumeration -----------------------------------------------------------------------------------------------


def plain_bpe(side: Vocabulary):
    """bytes -> ids by merging the pair of the lowest rank again and again, or None where a character is needed."""
    if side.tokenizer is None:
        return list
    spec = json.loads(side.tokenizer.to_str())["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in spec["merges"]]
    rank = {tuple(merge): n for n, merge in enumerate(merges)}
    of_byte = {side.token_bytes[i][0]: word for word, i in spec["vocab"].items() if len(side.token_bytes[i]) == 1}

    def encode(text: bytes) -> list[int] | None:
        if side.fallback:
            try:
                characters = text.decode().replace(" ", "\u2581")
            except UnicodeDecodeError:
                return None
            symbols = []
            for character in characters:
                known = character in spec["vocab"]
                symbols += [character] if known else [f"<0x{byte:02X}>" for byte in character.encode()]
        else:
            symbols = [of_byte[byte] for byte in text]
        while pairs := [(rank[pair], n) for n, pair in enumerate(zip(symbols, symbols[1:])) if pair in rank]:
            _, n = min(pairs)
            symbols[n : n + 2] = [symbols[n] + symbols[n + 1]]
        return [spec["vocab"][symbol] for symbol in symbols]

    return encode


def plain_cover(side: Vocabulary, token: bytes) -> dict[bytes, int]:
    """continuation -> the last token of the encoding that covers it, trying every entry behind every beginning."""
    encode, found = plain_bpe(side), {}
    for start in range(len(token)):
        before = encode(token[:start])
        for i, entry in enumerate(side.token_bytes):
            whole = token[:start] + entry
            goes_on = len(whole) > len(token) and whole.startswith(token)
            if goes_on and before is not None and encode(whole) == [*before, i]:
                found[whole[len(token) :]] = i
    return found


def plain_values(student: Vocabulary, teacher: Vocabulary, x: int, y: int, shares) -> tuple[float, float]:
    tokens = teacher.token_bytes[x], student.token_bytes[y]
    if any(not token.decode(errors="replace").strip() for token in tokens):
        return 1.0, 1.0
    theirs, ours = plain_cover(teacher, tokens[0]), plain_cover(student, tokens[1])
    return (
        sum(shares[0][i] for r, i in theirs.items() if r not in ours),
        sum(shares[1][i] for r, i in ours.items() if r not in theirs),
    )


@pytest.mark.parametrize("kinds", KINDS)
def test_values_by_enumeration(kinds):
    student, teacher = map(vocabulary, kinds)
    counts = count_pairs(PIECES, student, teacher)
    pairs = pair_bias(counts, student, teacher)
    shares = counts.teacher_tokens / counts.teacher_tokens.sum(), counts.student_tokens / counts.student_tokens.sum()
    for row, (x, y) in enumerate(zip(pairs.teacher.tolist(), pairs.student.tolist(), strict=True)):
        expected = plain_values(student, teacher, x, y, shares)
        found = pairs.teacher_bias[row], pairs.student_bias[row]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12, err_msg=str((x, y)))
    values = np.concatenate([pairs.teacher_bias, pairs.student_bias])
    assert (values == 1.0).any() and (values == 0.0).any()
    assert ((values > 0.0) & (values < 1.0)).any()


def test_a_value_that_one_can_see():
    """The teacher reads "the" in one token, so that "th" at an end excludes "the"; a byte excludes nothing."""
    student, teacher = vocabulary("bytes of gemma"), vocabulary("gemma")
    counts = count_pairs([plain("the the the tha")], student, teacher)
    pairs = pair_bias(counts, student, teacher)
    tokens = [b"the", b" ", b"the", b" ", b"the", b" ", b"th", b"a"]
    assert counts.teacher_tokens.sum() == len(tokens) - 2  # " the" is one
    row = pairs.find(np.array([teacher.id_of_bytes[b"th"]], np.int32), np.array([ord("h")], np.int32))
    assert pairs.teacher_bias[row] == 1 / 6 and pairs.student_bias[row] == 0.0 and pairs.count[row] == 1
    row = pairs.find(np.array([teacher.id_of_bytes[b"the"]], np.int32), np.array([ord("e")], np.int32))
    assert pairs.teacher_bias[row] == 0.0  # no longer token begins with it


def plain_counts(pieces, student, teacher):
    """(pairs, tokens of the teacher, of the student), text by text, by the bytes at which tokens end."""
    pairs, tokens = Counter(), (Counter(), Counter())
    for _, (text, _), _ in pieces:
        ends = []
        for side, counter in ((teacher, tokens[0]), (student, tokens[1])):
            place, found = 0, {}
            for i in side.encode([(Segment(text),)])[0].ids.tolist():
                counter[i] += 1
                place += len(side.token_bytes[i])
                found[place] = i
            ends.append(found)
        pairs.update((ends[0][place], ends[1][place]) for place in ends[0].keys() & ends[1].keys())
    return pairs, *tokens


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("the user日本é\n.lo", max_size=12).map(plain), min_size=1, max_size=6), st.data())
def test_counts_and_bounds_of_any_text(pieces, data):
    """The kinds here put no space before a text."""
    student, teacher = map(vocabulary, data.draw(st.sampled_from(KINDS[:5])))
    expected = plain_counts(pieces, student, teacher)
    if not expected[0]:
        with pytest.raises(InputError, match="both tokenizers end together nowhere in"):
            count_pairs(pieces, student, teacher)
        return
    counts = count_pairs(pieces, student, teacher)
    pairs = pair_bias(counts, student, teacher)
    assert dict(zip(zip(pairs.teacher.tolist(), pairs.student.tolist()), pairs.count.tolist())) == expected[0]
    for found, counter in zip((counts.teacher_tokens, counts.student_tokens), expected[1:], strict=True):
        assert {i: n for i, n in enumerate(found.tolist()) if n} == counter
    assert (counts.pieces, counts.left_out) == (len(pieces), 0)
    for bias in (pairs.teacher_bias, pairs.student_bias):
        assert ((bias >= 0.0) & (bias <= 1.0 + 1e-12)).all()
    assert (pairs.unbiased(0.01) <= pairs.unbiased(0.1)).all() and pairs.unbiased(1.0 + 1e-9).all()
    if student.tokenizer is None:
        assert set(pairs.student_bias.tolist()) <= {0.0, 1.0}
    # Read by two like sides, nothing but white space is biased.
    same = pair_bias(count_pairs(pieces, teacher, teacher), teacher, teacher)
    blank = np.array([not teacher.token_bytes[i].decode(errors="replace").strip() for i in same.teacher])
    np.testing.assert_array_equal(same.teacher_bias, blank)
    np.testing.assert_array_equal(same.student_bias, blank)


def test_what_is_not_counted(tmp_path):
    student, teacher = vocabulary("bytes of gemma"), vocabulary("gemma")
    turn = Segment(Markup(("<end_of_turn>",), ("<end_of_turn>",)))
    with_turn = count_pairs([(*plain("the user")[:2], turn)], student, teacher)
    without = count_pairs([plain("the user")], student, teacher)
    for found, expected in zip(with_turn, without, strict=True):  # special tokens count nowhere
        np.testing.assert_array_equal(found, expected)
    losing = small.byte_level()
    splits = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    losing.pre_tokenizer = pre_tokenizers.Sequence(splits)  # it does not spell spaces
    lost = load_vocabulary(small.save(tmp_path / "losing", losing, ["<s>"], bos_token="<s>"))
    some = count_pairs([plain("user"), plain("the user")], student, lost)
    for found, expected in zip(some[:4], count_pairs([plain("user")], student, lost)[:4], strict=True):
        np.testing.assert_array_equal(found, expected)
    assert (some.pieces, some.left_out) == (2, 1)
    with pytest.raises(InputError, match="nowhere in 2 pieces of text"):
        count_pairs([plain("the user"), plain("the end")], student, lost)


# --- in batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("threshold", (0.0, 0.02, 2.0))
def test_unbiased_ends_of_a_batch(kinds, threshold):
    student, teacher = map(vocabulary, kinds)
    counts = count_pairs(PIECES[:1], student, teacher)  # so that there are unknown pairs
    pairs = pair_bias(counts, student, teacher)
    table = {
        (int(x), int(y)): max(values) <= threshold
        for x, y, *values in zip(pairs.teacher, pairs.student, pairs.teacher_bias, pairs.student_bias, strict=True)
    }
    sides = Side(student, None, 120), Side(teacher, None, 90, None, UnbiasedEnds(pairs, threshold))
    batch = make_batch([*PIECES, ()], *sides)
    chunks, seen = batch.chunks, Counter()
    for row in range(len(PIECES) + 1):
        for chunk in range(chunks.unbiased.shape[1]):
            ends = chunks.teacher_chunk_end[row, chunk], chunks.student_chunk_end[row, chunk]
            if ends[0] < 0:
                assert not chunks.unbiased[row, chunk]
                continue
            last = int(batch.teacher.inputs[row, ends[0]]), int(batch.student.inputs[row, ends[1]])
            special = chunks.text_bytes[row, chunk] == 0
            assert chunks.unbiased[row, chunk] == (special or table.get(last, False))
            seen["special" if special else table.get(last, "unknown")] += 1
    assert seen["special"] and seen["unknown"] and (seen[True] or threshold == 0.0)
    assert make_batch(PIECES, sides[0], sides[1]._replace(unbiased=None)).chunks.unbiased is None


# --- the file -----------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path) -> tuple[Path, PairBias]:
    student, teacher = vocabulary("qwen"), vocabulary("llama")
    pairs = pair_bias(count_pairs(PIECES, student, teacher), student, teacher)
    path = tmp_path / "new" / "pairs.safetensors"
    write_pair_bias(path, pairs, student, teacher)
    return path, pairs


def test_a_file_is_read_as_it_was_written(written):
    path, pairs = written
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    found = read_pair_bias(path, vocabulary("qwen"), vocabulary("llama"))
    for name in DTYPES:
        np.testing.assert_array_equal(getattr(found, name), getattr(pairs, name))
        assert getattr(found, name).dtype == getattr(pairs, name).dtype


def test_other_files_are_refused(written, tmp_path):
    path, pairs = written
    student, teacher = vocabulary("qwen"), vocabulary("llama")

    def refused(file, student=student, teacher=teacher):
        with pytest.raises(InputError) as error:
            read_pair_bias(file, student, teacher)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).endswith("make it with `python convert.py pair-bias`")
        return str(error.value)

    assert "does not exist" in refused(tmp_path / "none")
    assert "cannot be read" in refused(tmp_path)
    content = path.read_bytes()
    for size in (0, 7, 100, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:size])
        assert "cannot be read as safetensors" in refused(tmp_path / "cut")
    assert "of another teacher's tokenizer" in refused(path, teacher=vocabulary("gemma"))
    assert "of another student's tokenizer" in refused(path, student=vocabulary("bytes of llama"))
    assert "of another teacher's tokenizer" in refused(path, teacher, student)  # the other way round
    with pytest.raises(InputError, match="another"):
        read_pair_bias(path, vocabulary("llama"), vocabulary("llama"))

    columns, other = load_file(path), tmp_path / "other"
    save_file(columns, other)
    assert "is not a file of pairs of tokens" in refused(other)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header["__metadata__"]
    assert metadata["format"] == FORMAT
    reverse = {name: column[::-1].copy() for name, column in columns.items()}
    empty = {name: column[:0] for name, column in columns.items()}
    half = {**columns, "count": columns["count"][: len(pairs.count) // 2]}
    missing = {name: column for name, column in columns.items() if name != "count"}
    changed = [
        {**columns, name: value * np.ones_like(columns[name])}
        for name, value in (("teacher", np.int32(10_000)), ("student", np.int32(-1)), ("count", np.int64(0)))
    ]
    changed += [{**columns, "teacher_bias": columns["teacher_bias"] + value} for value in (np.nan, -2.0, np.inf)]
    changed += [{**columns, "student_bias": columns["student_bias"].astype(np.float32)}]
    for wrong in (reverse, empty, half, missing, *changed, {**columns, "more": columns["count"]}):
        save_file(wrong, other, metadata)
        assert "does not hold the values of pairs of tokens" in refused(other)
    save_file(columns, other, metadata)
    read_pair_bias(other, student, teacher)

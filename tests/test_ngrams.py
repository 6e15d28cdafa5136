"""The longest original token that ends at each byte, against a search through all lengths."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import GEMMA, vocabulary

from minalm.ngrams import longest_suffix
from minalm.text import Control, InputError, Segment
from minalm.vocab import Vocabulary, byte_vocabulary


def search(ids: list[int], original: Mapping[bytes, int], control: Mapping[int, int]) -> list[int]:
    found = []
    for position, last in enumerate(ids):
        if last >= 256:
            found.append(control[last])
            continue
        suffixes = [ids[start : position + 1] for start in range(max(0, position - 15), position + 1)]
        known = [original[bytes(s)] for s in suffixes if max(s) < 256 and bytes(s) in original]
        found.append(known[0] if known else 0)
    return found


# Few byte values, zeros among them, so that tokens are often each other's suffixes; lengths around the words' 8 bytes.
BYTES = st.sampled_from([0, 1, 97, 255])
TOKENS = st.lists(
    st.one_of(st.binary(min_size=1, max_size=2), st.lists(BYTES, min_size=1, max_size=18).map(bytes)), max_size=60
)


@given(tokens=TOKENS, data=st.data())
@settings(max_examples=300, deadline=None)
def test_equals_a_search_through_all_lengths(tokens, data):
    control = {"<a>": len(tokens), "<b>": len(tokens) + 1}
    original = Vocabulary("original", None, None, {}, (*tokens, b"", b""), control, {})
    student = byte_vocabulary(original, ["<b>", "<a>"])
    runs = st.lists(
        st.one_of(BYTES, st.sampled_from([256, 257]), st.sampled_from(tokens or [b"a"]).map(list)), max_size=20
    )
    rows = data.draw(st.lists(runs, min_size=1, max_size=3))
    rows = [[i for part in row for i in (part if isinstance(part, list) else [part])] for row in rows]
    time = max(map(len, rows))
    rows = [row + [256] * (time - len(row)) for row in rows]
    ids = {token: i for i, token in reversed([*enumerate(tokens)])}
    expected = [search(row, ids, {256: control["<b>"], 257: control["<a>"]}) for row in rows]
    got = longest_suffix(original, student)(np.array(rows, np.int32).reshape(len(rows), time))
    assert got.dtype == np.int32
    assert got.tolist() == expected


def test_real_kinds_of_tokens():
    gemma = vocabulary("gemma")
    student = byte_vocabulary(gemma)
    piece = (Segment(Control("bos")), Segment("the\n\n\n the"), Segment(Control("eos")), Segment("the"))
    (encoding,) = student.encode([piece])
    (ngram,) = longest_suffix(gemma, student)(encoding.ids[None])
    got = [gemma.token_bytes[i] for i in ngram]
    text = [b"t", b"th", b"the", b"\n", b"\n\n", b"\n\n\n", b" ", b"t", b"th", b" the"]
    assert got == [b"", *text, b"", b"t", b"th", b"the"]
    assert ngram[0] == gemma.control["<bos>"] and ngram[11] == gemma.control["<eos>"]
    assert ngram[1] == gemma.tokenizer.token_to_id("t")  # not the byte-fallback token


def test_causal():
    gemma = vocabulary("gemma")
    student = byte_vocabulary(gemma)
    ngrams = longest_suffix(gemma, student)
    ids = np.random.default_rng(0).choice(np.frombuffer(b"the \n user", np.uint8), (2, 50)).astype(np.int32)
    whole = ngrams(ids)
    for time in (1, 7, 8, 30):
        np.testing.assert_array_equal(ngrams(ids[:, :time]), whole[:, :time])


def test_words_of_a_longer_control_list_are_single():
    gemma = vocabulary("gemma")
    student = byte_vocabulary(gemma, [*sorted(GEMMA), "user"])
    ngrams = longest_suffix(gemma, student)
    row = np.array([[*b"\n", student.control["user"], *b"er"]], np.int32)
    assert [gemma.token_bytes[i] for i in ngrams(row)[0]] == [b"\n", b"user", b"e", b"er"]


def test_what_cannot_be_expanded():
    gemma = vocabulary("gemma")
    with pytest.raises(InputError, match="not a byte vocabulary"):
        longest_suffix(gemma, vocabulary("llama"))
    with pytest.raises(InputError, match="<|eot_id|>"):
        longest_suffix(gemma, vocabulary("bytes of llama"))

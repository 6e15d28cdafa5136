"""The longest original token that ends at each byte, against a search through all lengths."""

import json
from collections.abc import Mapping

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import GEMMA, vocabulary

from minalm.errors import InputError
from minalm.generation.suffix_table import suffix_table
from minalm.text.documents import Segment, Special
from minalm.tokenization.suffixes import longest_suffix, read_expansion, write_expansion
from minalm.tokenization.vocabulary import Vocabulary, byte_vocabulary


def search(ids: list[int], original: Mapping[bytes, int], special: Mapping[int, int]) -> list[int]:
    found = []
    for position, last in enumerate(ids):
        if last >= 256:
            found.append(special[last])
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
    special = {"<a>": len(tokens), "<b>": len(tokens) + 1}
    original = Vocabulary("original", None, None, {}, (*tokens, b"", b""), special, {})
    student = byte_vocabulary(original, ["<b>", "<a>"])
    runs = st.lists(
        st.one_of(BYTES, st.sampled_from([256, 257]), st.sampled_from(tokens or [b"a"]).map(list)), max_size=20
    )
    rows = data.draw(st.lists(runs, min_size=1, max_size=3))
    rows = [[i for part in row for i in (part if isinstance(part, list) else [part])] for row in rows]
    time = max(map(len, rows))
    rows = [row + [256] * (time - len(row)) for row in rows]
    ids = {token: i for i, token in reversed([*enumerate(tokens)])}
    expected = [search(row, ids, {256: special["<b>"], 257: special["<a>"]}) for row in rows]
    got = longest_suffix(original, student)(np.array(rows, np.int32).reshape(len(rows), time))
    assert got.dtype == np.int32
    assert got.tolist() == expected


on_device = jax.jit(lambda table, windows: table(windows))


@given(tokens=TOKENS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_table_on_the_device_finds_the_same(tokens, data):
    """Of rows that are filled up with -1 before their first id."""
    special = {"<a>": len(tokens), "<b>": len(tokens) + 1}
    original = Vocabulary("original", None, None, {}, (*tokens, b"", b""), special, {})
    search = longest_suffix(original, byte_vocabulary(original, ["<b>", "<a>"]))
    runs = st.lists(
        st.one_of(BYTES, st.sampled_from([256, 257]), st.sampled_from(tokens or [b"a"]).map(list)), max_size=20
    )
    ids = [i for part in data.draw(runs) for i in (part if isinstance(part, list) else [part])][:80]
    padded = np.full(15 + 80, -1, np.int32)
    padded[95 - len(ids) :] = ids
    found = on_device(suffix_table(search), np.lib.stride_tricks.sliding_window_view(padded, 16)[None])
    assert (
        np.asarray(found)[0, 80 - len(ids) :].tolist() == search(np.array([ids], np.int32).reshape(1, -1))[0].tolist()
    )


def test_tables_of_many_tokens():
    """Nearly all places that can be filled are, and tokens that differ in their first byte, their length or zeros."""
    random = np.random.default_rng(0)
    tokens = {bytes(random.integers(0, 3, random.integers(1, 17)).astype(np.uint8)) for _ in range(40_000)}
    original = Vocabulary("original", None, None, {}, (*tokens, b""), {"<a>": len(tokens)}, {})
    search = longest_suffix(original, byte_vocabulary(original, ["<a>"]))
    ids = random.integers(0, 3, (1, 3000)).astype(np.int32)
    ids[random.random(ids.shape) < 0.01] = 256
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(ids, ((0, 0), (15, 0)), constant_values=-1), 16, axis=1)
    assert np.array_equal(on_device(suffix_table(search), windows), search(ids))


def test_real_kinds_of_tokens():
    gemma = vocabulary("gemma")
    student = byte_vocabulary(gemma)
    piece = (Segment(Special("bos")), Segment("the\n\n\n the"), Segment(Special("eos")), Segment("the"))
    (encoding,) = student.encode([piece])
    (suffix,) = longest_suffix(gemma, student)(encoding.ids[None])
    got = [gemma.token_bytes[i] for i in suffix]
    text = [b"t", b"th", b"the", b"\n", b"\n\n", b"\n\n\n", b" ", b"t", b"th", b" the"]
    assert got == [b"", *text, b"", b"t", b"th", b"the"]
    assert suffix[0] == gemma.special["<bos>"] and suffix[11] == gemma.special["<eos>"]
    assert suffix[1] == gemma.tokenizer.token_to_id("t")  # not the byte-fallback token


def test_causal():
    gemma = vocabulary("gemma")
    student = byte_vocabulary(gemma)
    suffixes = longest_suffix(gemma, student)
    ids = np.random.default_rng(0).choice(np.frombuffer(b"the \n user", np.uint8), (2, 50)).astype(np.int32)
    whole = suffixes(ids)
    for time in (1, 7, 8, 30):
        np.testing.assert_array_equal(suffixes(ids[:, :time]), whole[:, :time])


def test_words_of_a_longer_control_list_are_single():
    gemma = vocabulary("gemma")
    student = byte_vocabulary(gemma, [*sorted(GEMMA), "user"])
    suffixes = longest_suffix(gemma, student)
    row = np.array([[*b"\n", student.special["user"], *b"er"]], np.int32)
    assert [gemma.token_bytes[i] for i in suffixes(row)[0]] == [b"\n", b"user", b"e", b"er"]


@given(tokens=TOKENS)
@settings(max_examples=100, deadline=None)
def test_a_map_comes_out_of_config_json_again(tokens):
    special = {"<a>": len(tokens), "<b>": len(tokens) + 1}
    original = Vocabulary("original", None, None, {}, (*tokens, b"", b""), special, {})
    suffixes = longest_suffix(original, byte_vocabulary(original, ["<b>", "<a>"]))
    written = write_expansion(suffixes)
    found = read_expansion("config.json", json.loads(json.dumps(written)), 258, len(tokens) + 2)
    for field in ("keys", "length", "original", "special", "parent"):
        np.testing.assert_array_equal(getattr(found, field), getattr(suffixes, field))
    assert write_expansion(found) == written
    ids = {token: i for i, token in reversed([*enumerate(tokens)]) if len(token) <= 16}
    keys = {",".join(str(byte + 1) for byte in token[::-1]): i + 1 for token, i in ids.items()}
    assert written == [{"": -1, "257": special["<b>"] + 1, "258": special["<a>"] + 1, **keys}, [256, 257]]


def published_search(ids: list[int], table: Mapping[tuple[int, ...], int]) -> list[int]:
    """The rule of the published models: the longest key of the map, over ids plus one from the last to the first."""
    found = []
    for position in range(len(ids)):
        last = [i + 1 for i in ids[max(0, position - 15) : position + 1]][::-1]
        lengths = [length for length in range(len(last), 0, -1) if tuple(last[:length]) in table]
        found.append(table[tuple(last[: lengths[0]])] - 1 if lengths else 0)
    return found


def test_the_map_of_a_published_model_is_used_as_it_is():
    """With "user" as an id of its own, within other tokens too, and a long token that is keyed by its last 16 bytes."""
    tokens = {(256,): 7, (257,): 8, tuple(b"a"): 3, tuple(b"\n"): 4, tuple(b"sa"): 5, (257, 115): 6, (32, 257): 9}
    tokens |= {(32,) * 16: 2, tuple(b"u"): 10}
    table = {",".join(str(i + 1) for i in ids[::-1]): original + 1 for ids, original in tokens.items()}
    values = [{"": -1, **table}, [256]]
    suffixes = read_expansion("config.json", values, 258, 11)
    assert write_expansion(suffixes)[0] == values[0]
    table = {tuple(int(i) for i in key.split(",")): value for key, value in table.items()}
    for row in ([256, 257, 10, 97, 115, 97], [256, *b"users", 256, *b"sa"], [*b" " * 20, 256, 257, 10], [*b"xyz"]):
        assert suffixes(np.array([row], np.int32))[0].tolist() == published_search(row, table)


@pytest.mark.parametrize(
    "values, message",
    (
        (None, "not a map and a list"),
        ({"98": 1}, "not a map and a list"),
        ([["98"], []], "not a map and a list"),
        ([{"98,x": 1}, []], "'98,x' is not a list of ids"),
        ([{"300": 1}, []], "'300' is not of 1 to 16 ids of the vocabulary's 258"),
        ([{"0": 1}, []], "'0' is not of"),
        ([{",".join(["98"] * 17): 1}, []], "is not of 1 to 16 ids"),
        ([{"98": 0}, []], "'98' has the value 0, which is no row of 9"),
        ([{"98": 10}, []], "'98' has the value 10"),
        ([{"98": "1"}, []], "'98' has the value '1'"),
    ),
)
def test_a_map_that_is_none(values, message):
    with pytest.raises(InputError, match=f"^config.json, 'expand_input_ids_dict': .*{message}"):
        read_expansion("config.json", values, 258, 9)


def test_what_cannot_be_expanded():
    gemma = vocabulary("gemma")
    with pytest.raises(InputError, match="not a byte vocabulary"):
        longest_suffix(gemma, vocabulary("llama"))
    with pytest.raises(InputError, match="<|eot_id|>"):
        longest_suffix(gemma, vocabulary("bytes of llama"))

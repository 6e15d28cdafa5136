from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from minalm.tokenization import transfer
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.transfer import TransferPlan, plan_transfer, transfer_rows
from minalm.tokenization.vocabulary import Vocabulary, byte_vocabulary

GEMMA = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>", "<|other|>"]


def save(tokenizer: Tokenizer, special: list[str], folder: Path) -> Vocabulary:
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_vocabulary(folder)


def sentencepiece(folder: Path, prefix: bool = False) -> Vocabulary:
    """As Gemma's: special tokens, byte-fallback tokens, then pieces of text; a newline has a piece before its byte."""
    pieces = ["▁", *"abcdeé", "ab", "▁a", "▁ab", "cde", "de"]
    words = [*GEMMA, "\n", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("d", "e"), ("c", "de")]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<pad>"))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    return save(tokenizer, GEMMA, folder)


def byte_level(folder: Path, tokens: list[bytes], special: list[str] = LLAMA) -> Vocabulary:
    """The 256 bytes in the order of their characters, then `tokens` (that nothing is ever merged to), then special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = {i: char for i, char in enumerate(alphabet)}
    plain = save_alphabet(folder / "alphabet", alphabet)
    character = {plain.token_bytes[i][0]: shown[i] for i in range(256)}
    words = alphabet + ["".join(character[byte] for byte in token) for token in tokens]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return save(tokenizer, special, folder / "tokens")


def save_alphabet(folder: Path, alphabet: list[str]) -> Vocabulary:
    folder.parent.mkdir()
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return save(tokenizer, [], folder)


def sources(plan: TransferPlan, old: Vocabulary, new: Vocabulary, token: bytes | str) -> list[str]:
    """The old tokens that a new one (a string: a special token) is made of, as the old tokenizer writes them."""
    i = new.special[token] if isinstance(token, str) else new.token_bytes.index(token)
    return [old.tokenizer.id_to_token(int(j)) for j in plan.old_ids[plan.start[i] : plan.start[i + 1]]]


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (b"a", ["a"]),  # not <0x61>, whose id is lower
        (b"\n", ["\n"]),  # not <0x0A>, whose id is higher
        (b"\xc3", ["<0xC3>"]),
        (b" ab", ["▁ab"]),
        (b"abcde", ["ab", "cde"]),  # as the old tokenizer splits it
        (b" abz\xc3\xa9", ["▁ab", "<0x7A>", "é"]),
        (b"cde\xc3", ["cde", "<0xC3>"]),  # no UTF-8: the longest from the left
        (b"\xa9 a\xa9", ["<0xA9>", "▁a", "<0xA9>"]),
    ],
)
def test_text_comes_from_the_same_bytes(tmp_path: Path, token: bytes, expected: list[str]) -> None:
    old, new = sentencepiece(tmp_path / "old"), byte_level(tmp_path / "new", [token] if len(token) > 1 else [])
    assert sources(plan_transfer(old, new), old, new, token) == expected


def test_a_prefix_space_is_no_part_of_a_token(tmp_path: Path) -> None:
    old, new = sentencepiece(tmp_path / "old", prefix=True), byte_level(tmp_path / "new", [b"abcde", b" abc"])
    plan = plan_transfer(old, new)
    assert sources(plan, old, new, b"abcde") == ["ab", "cde"]
    assert sources(plan, old, new, b" abc") == ["▁ab", "c"]


def test_control_tokens_have_counterparts(tmp_path: Path) -> None:
    gemma, llama = sentencepiece(tmp_path / "gemma"), byte_level(tmp_path / "llama", [])
    plan = plan_transfer(gemma, llama)
    assert [sources(plan, gemma, llama, word) for word in LLAMA] == [
        ["<bos>"],
        ["<start_of_turn>"],
        [],  # what Gemma writes there is no special token
        ["<end_of_turn>"],
        ["<pad>"],
        [],
    ]
    plan = plan_transfer(llama, gemma)
    assert [sources(plan, llama, gemma, word) for word in GEMMA] == [
        ["<|end_of_text|>"],
        ["<|eot_id|>"],
        ["<|begin_of_text|>"],
        ["<|start_header_id|>"],
        ["<|eot_id|>"],
    ]


def test_control_tokens_of_the_same_string_come_first(tmp_path: Path) -> None:
    old = byte_level(tmp_path / "old", [b"<think>"])
    new = byte_level(tmp_path / "new", [], [*reversed(LLAMA), "<think>"])
    plan = plan_transfer(old, new)
    assert all(sources(plan, old, new, word) == [word] for word in new.special)
    assert (plan.copied, plan.averaged, plan.drawn) == (new.size, 0, 0)
    # The other way round the string is a special token in the old vocabulary, and text in the new one.
    assert sources(plan_transfer(new, old), new, old, b"<think>") == ["<think>"]
    # Here it is both in both.
    both = byte_level(tmp_path / "both", [b"<a b>"], ["<a b>"])
    assert plan_transfer(both, both).old_ids.tolist() == list(range(256 + 2))


def test_bytes_are_all_copied(tmp_path: Path) -> None:
    old = sentencepiece(tmp_path / "old")
    new = byte_vocabulary(old)
    plan = plan_transfer(old, new)
    assert (plan.copied, plan.averaged, plan.drawn) == (new.size, 0, 0)
    assert [old.token_bytes[i] for i in plan.old_ids[:256]] == [bytes([byte]) for byte in range(256)]


def test_bytes_make_subwords(tmp_path: Path) -> None:
    new = byte_level(tmp_path / "new", [b"abc", b"\xc3\xa9\xc3"])
    plan = plan_transfer(byte_vocabulary(new), new)
    assert (plan.copied, plan.averaged, plan.drawn) == (256 + 5, 2, 1)
    assert plan.old_ids[256:262].tolist() == [*b"abc", *b"\xc3\xa9\xc3"]


def test_what_the_old_vocabulary_cannot_spell_is_drawn(tmp_path: Path) -> None:
    alphabet = [char for char in sorted(pre_tokenizers.ByteLevel.alphabet()) if char != "ÿ"]
    old, new = save_alphabet(tmp_path / "old/a", alphabet), byte_level(tmp_path / "new", [b"a\xff", b"a\xfe"], [])
    plan = plan_transfer(old, new)
    assert (plan.copied, plan.averaged, plan.drawn) == (255, 1, 2)


plans = st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=12)


@given(rows=plans, block=st.integers(1, 5), padding=st.integers(0, 3))
@settings(deadline=None)
def test_rows_are_means(rows: list[list[int]], block: int, padding: int) -> None:
    table = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    start = np.cumsum([0, *map(len, rows)])
    plan = TransferPlan(10, np.array([i for ids in rows for i in ids], np.int64), start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "_BLOCK", block)
        result = transfer_rows(plan, table, len(rows) + padding, seed=0)
    assert result.dtype == np.float32
    for ids, row in zip(rows, result):
        if len(ids) == 1:
            assert np.array_equal(row, table[ids[0]])  # copies are exact
        elif ids:
            np.testing.assert_allclose(row, table[ids].astype(np.float64).mean(0), rtol=1e-5, atol=1e-6)
    assert np.all(result[len(rows) :] == 0)
    drawn = [i for i, ids in enumerate(rows) if not ids]
    assert len(np.unique(result[drawn])) == 3 * len(drawn)


def test_drawn_rows_have_the_spread_of_the_old_ones() -> None:
    table = np.random.default_rng(0).standard_normal((500, 4)) * [1, 2, 3, 0.1] + [0, 5, -1, 2]
    table = np.concatenate([table, np.full((9, 4), 1e6)]).astype(np.float32)  # rows past the vocabulary are not counted
    plan = TransferPlan(500, np.zeros(0, np.int64), np.zeros(20_001, np.int64))
    rows = transfer_rows(plan, table, 20_000, seed=3)
    np.testing.assert_allclose(rows.mean(0), table[:500].mean(0), atol=0.07)
    np.testing.assert_allclose(rows.std(0), table[:500].std(0), rtol=0.03)
    z = (rows - rows.mean(0)) / rows.std(0)
    np.testing.assert_allclose((z**4).mean(0), 3, atol=0.2)  # of a normal distribution
    np.testing.assert_allclose(z.T @ z / len(z), np.eye(4), atol=0.03)
    assert not np.any(rows == transfer_rows(plan, table, 20_000, seed=4))


class Sliced:
    """A table in a file: slices of it can be read, and nothing else."""

    def __init__(self, table: np.ndarray):
        self.table, self.shape, self.dtype = table, table.shape, table.dtype

    def __getitem__(self, index: slice) -> np.ndarray:
        assert isinstance(index, slice)
        return self.table[index]


@pytest.mark.parametrize("dtype", (ml_dtypes.bfloat16, np.float16, np.float32))
@pytest.mark.parametrize("block", (1, 7, 4096))
def test_tables_of_any_dtype_in_blocks(monkeypatch: pytest.MonkeyPatch, dtype: type, block: int) -> None:
    monkeypatch.setattr(transfer, "_BLOCK", block)
    random = np.random.default_rng(0)
    table = (random.standard_normal((60, 5)) * [1, 20, 0.1, 3, 1e-3] + [0, 50, -1, 2, 1]).astype(dtype)
    ids = [random.integers(0, 50, size) for size in (1, 3, 0, 2, 0, 0, 9, 1, 0)]
    plan = TransferPlan(50, np.concatenate(ids).astype(np.int64), np.cumsum([0, *map(len, ids)]))
    rows = transfer_rows(plan, table, 11, seed=5)
    assert rows.dtype == np.float32
    wide = table.astype(np.float64)
    for row, sources in zip(rows, ids):
        if len(sources):
            np.testing.assert_allclose(row, wide[sources].mean(0), rtol=1e-6, atol=1e-6)
    drawn = [i for i, sources in enumerate(ids) if not len(sources)]
    expected = wide[:50].mean(0) + wide[:50].std(0) * transfer._normal(5, len(drawn), 5)
    np.testing.assert_allclose(rows[drawn], expected, rtol=1e-6)
    assert np.array_equal(transfer_rows(plan, Sliced(table), 11, seed=5), rows)


def test_draws_are_pinned() -> None:
    # The same seed must give the same model on every machine.
    assert transfer._normal(0, 1, 4)[0].tolist() == pytest.approx(
        [2.895186732576724, -0.0629293013820274, 1.127092434817253, 0.8045521075252335], rel=1e-12
    )

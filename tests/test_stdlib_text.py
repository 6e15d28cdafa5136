import json
import sys
import sysconfig
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from minalm.errors import InputError
from minalm.text import stdlib
from minalm.text.stdlib import stdlib_documents
from minalm.tokenization import train_bpe as bpe
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.train_bpe import train_bpe

SOURCE = 'def spam(self, eggs=None):\n    """Über 12."""\n\treturn eggs or 305\n\n\n'


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of 400 small modules."""
    for number in range(400):
        (tmp_path / f"m{number}.py").write_bytes(f"# module {number}\r\n".encode())
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_this_library_is_split_and_not_small() -> None:
    training, held_out = stdlib_documents("training"), stdlib_documents("held_out")
    sizes = [sum(len(text.encode()) for text in split) for split in (training, held_out)]
    assert sum(sizes) > 5_000_000
    assert 0.02 < sizes[1] / sum(sizes) < 0.12


@pytest.mark.parametrize(
    ("name", "held_out"),
    [("pydoc_data/topics.py", False), ("argparse.py", False), ("html/parser.py", True), ("inspect.py", True)],
)
def test_sides_are_pinned(name: str, held_out: bool) -> None:
    assert (stdlib._places(name)[0] < stdlib.HELD_OUT) == held_out


def test_a_file_stays_on_its_side_whatever_it_holds(library: Path) -> None:
    held_out = stdlib_documents("held_out")
    assert 8 < len(held_out) < 40
    assert set(held_out).isdisjoint(stdlib_documents("training"))
    for path in library.iterdir():
        path.write_text("new " + path.read_text("utf-8"), "utf-8")
    assert stdlib_documents("held_out") == ["new " + text for text in held_out]


def test_all_sources_but_tests_and_tables_are_read_in_order(library: Path) -> None:
    for name in ("test/a.py", "x/tests/a.py", "encodings/a.py", "site-packages/a/a.py", "_sysconfigdata_x.py", "a.txt"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text("# skipped")
    (library / "latin.py").write_bytes(b"# -*- coding: latin-1 -*- \xe9")
    (library / "m1").mkdir()
    (library / "m1" / "deep.py").write_text("# deep")
    documents = {split: stdlib_documents(split) for split in ("training", "held_out")}
    names = sorted([*(f"m{number}.py" for number in range(400)), "m1/deep.py"], key=lambda name: name.split("/"))
    texts = ["# deep" if name == "m1/deep.py" else f"# module {name[1:-3]}\n" for name in names]
    assert sorted(documents["training"] + documents["held_out"]) == sorted(texts)
    assert documents["training"] == [text for text in texts if text in documents["training"]]


def test_fractions_are_nested_shares(library: Path) -> None:
    shares = [stdlib_documents("training", fraction) for fraction in (0.1, 0.5, 1.0)]
    assert 20 < len(shares[0]) < 60
    assert 150 < len(shares[1]) < 230
    assert set(shares[0]) < set(shares[1]) < set(shares[2])
    assert 0 < len(stdlib_documents("held_out", 0.5)) < len(stdlib_documents("held_out"))
    with pytest.raises(InputError, match="no sources of the training split"):
        stdlib_documents("training", 0.0)


def test_bpe_spells_every_text(tmp_path: Path) -> None:
    train_bpe([SOURCE * 3, "other words, " * 5], 300, tmp_path / "a")
    train_bpe([SOURCE * 3, "other words, " * 5], 300, tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "a/tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|begin_of_text|>", "<|end_of_text|>")
    tokenizer = Tokenizer.from_file(str(tmp_path / "a/tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.encode("").ids == [0]  # transformers writes bos before a text
    text = SOURCE + "日本語 \x00\u0301 \r\n \t x\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    vocabulary = load_vocabulary(tmp_path / "a")
    assert set(vocabulary.token_bytes) >= {bytes([byte]) for byte in range(256)}
    assert (vocabulary.special["<|begin_of_text|>"], vocabulary.eos_id, vocabulary.pad_id) == (0, 1, 1)
    assert not any(sum(48 <= byte < 58 for byte in token) > 1 for token in vocabulary.token_bytes)


def test_words_keep_their_space_and_indentation_the_rest(tmp_path: Path) -> None:
    train_bpe(["\n        if self._eggs(spam, 42):\n\n\tx \n" * 9], 270, tmp_path / "a")
    tokenizer = Tokenizer.from_file(str(tmp_path / "a/tokenizer.json"))
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("\n        if self._eggs(spam, 42):\n\tx  y")]
    shown = [word.replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t") for word in words]
    assert shown == [
        "\n       ",
        " if",
        " self",
        "._",
        "eggs",
        "(spam",
        ",",
        " ",
        "4",
        "2",
        "):",
        "\n\t",
        "x",
        " ",
        " y",
    ]


def test_bpe_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path} exists: name a folder that does not"):
        train_bpe([SOURCE], 300, tmp_path)
    with pytest.raises(InputError, match="give at least 258"):
        train_bpe([SOURCE], 257, tmp_path / "a")
    with pytest.raises(InputError, match="the documents give only 258 tokens, not 300: give more text"):
        train_bpe(["a"], 300, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_command_line(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stdlib_text", "--bpe", "259", str(tmp_path / "new/out")])
    bpe.tyro.cli(bpe.main)
    assert (tmp_path / "new/out/tokenizer.json").is_file()
    with pytest.raises(SystemExit, match="^error: .*out exists"):
        bpe.tyro.cli(bpe.main)

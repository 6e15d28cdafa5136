"""Every form of data, folders, weights, what is refused, the cache of indexes, and what changes while it is read."""

import bz2
import codecs
import gzip
import json
import os
import random
import socket
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from chats import Chats
from hypothesis import given, settings
from hypothesis import strategies as st

from minalm.errors import InputError
from minalm.text import copies, sources
from minalm.text import index as index_module
from minalm.text.corpus import Corpus, read_corpus, text_corpus
from minalm.text.documents import Markup, Segment, Special
from minalm.text.rows import RowReader

TEXTS = ["one\n", "tw\u00f6 \u65e5\u672c", "", "three " * 50, "\ufeffmarked"]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def read_chat(row):
    """A chat as a template might write it: each message on a line; those of weight 0 do not count."""
    lines = [Segment(f"{m['role']}: {m['content']}\n", m.get("weight", 1) != 0) for m in row["messages"]]
    return Segment(Markup(("<bos>",), ("<bos>",))), *lines, Segment(Markup(("<end>",), ("<end>",)))


def texts_of(corpus: Corpus) -> list[str]:
    pieces = map(corpus.piece, range(len(corpus)))
    return ["".join(content for content, _ in piece if isinstance(content, str)) for piece in pieces]


def reading(*names, limit=1000, cache=None, **how) -> Corpus:
    return read_corpus(names, limit, RowReader(Chats(read_chat), **how), cache)


# --- forms --------------------------------------------------------------------------------------------------------


def as_lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstandard_of(data: bytes) -> bytes:
    module = pytest.importorskip("zstandard")
    half = len(data) // 2
    return b"".join(module.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))  # two frames


def parquet_of(rows, **how) -> bytes:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **how)
    return sink.getvalue().to_pybytes()


ROWS = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
FORMS = {
    "a.jsonl": lambda: as_lines(ROWS),
    "a.JSONL": lambda: as_lines(ROWS),
    "a.jsonl.gz": lambda: gzip.compress(as_lines(ROWS)),
    "a.jsonl.zst": lambda: zstandard_of(as_lines(ROWS)),
    "list.json": lambda: json.dumps(ROWS).encode(),
    "indented.json": lambda: json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "lines.json": lambda: as_lines(ROWS),
    "indented lines.json": lambda: "\r\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "a.json.gz": lambda: gzip.compress(json.dumps(ROWS).encode()),
    "a.parquet": lambda: parquet_of(ROWS, row_group_size=2),
    "a.parquet.gz": lambda: gzip.compress(parquet_of(ROWS)),
    "marked.jsonl": lambda: codecs.BOM_UTF8 + as_lines(ROWS),
    "utf-16.jsonl": lambda: codecs.BOM_UTF16_LE + as_lines(ROWS).decode().encode("utf-16-le"),
    "utf-32.json": lambda: codecs.BOM_UTF32_BE + json.dumps(ROWS, ensure_ascii=False).encode("utf-32-be"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_texts(tmp_path, name, monkeypatch):
    monkeypatch.setattr(copies, "BLOCK", 16)  # so that every border is met
    (tmp_path / name).write_bytes(FORMS[name]())
    assert texts_of(reading(tmp_path / name)) == [text for text in TEXTS if text]


@pytest.mark.parametrize("mark", ["", "utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_texts_with_byte_order_marks(tmp_path, mark, packed):
    text = "caf\u00e9 \u65e5\u672c and more words\n" * 20
    data = {name: sign for sign, name in copies.MARKS}.get(mark, b"") + text.encode(mark or "utf-8")
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(gzip.compress(data) if packed else data)
    corpus = reading(path, limit=100)
    pieces = [corpus.piece(n) for n in range(len(corpus))]
    plain = text_corpus([text], 100)
    assert pieces == [plain.piece(n) for n in range(len(plain))] and len(pieces) > 4


def test_a_folder_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "table", num_shards=2)
    assert texts_of(reading(tmp_path / "table")) == [text for text in TEXTS if text]
    chosen = table.select([3, 0])  # kept as row numbers beside the whole table
    datasets.DatasetDict({"train": chosen, "test_sft": table}).save_to_disk(tmp_path / "splits")
    assert texts_of(reading(tmp_path / "splits")) == [TEXTS[3], TEXTS[0]]
    assert texts_of(reading(f"{tmp_path}/splits#test_sft:2")) == [text for text in TEXTS if text]
    with pytest.raises(InputError, match="has no split 'dev': name one as .*#SPLIT, of test_sft, train"):
        reading(f"{tmp_path}/splits#dev")
    with pytest.raises(InputError, match="has no splits: leave out #train"):
        reading(f"{tmp_path}/table#train")
    state = tmp_path / "table" / "state.json"
    state.write_text("{")
    with pytest.raises(InputError, match="`datasets` does not load it"):
        reading(tmp_path / "table")


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    """What `datasets` is asked for, and that its files are what the run has read."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "kept")
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        if name == "org/none":
            raise FileNotFoundError("no such\ndataset")
        return datasets.load_from_disk(str(tmp_path / "kept"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    corpus = reading("org/name:2", "org/name/config#train_sft")
    assert texts_of(corpus) == 2 * [text for text in TEXTS if text] and corpus.shares == (2, 1)
    assert {*asked} == {("org/name", None, "train"), ("org/name", "config", "train_sft")}
    with pytest.raises(InputError, match=r"org/none is no file .* \(FileNotFoundError: no such dataset\)"):
        reading("org/none")


def test_extras_that_are_absent_are_named(tmp_path, monkeypatch):
    for package in ("pyarrow", "zstandard", "compression", "datasets"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    for name, extra in (("a.parquet", "data"), ("a.txt.zst", "data")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match=rf"not installed: pip install 'minalm\[{extra}\]'"):
            reading(tmp_path / name)
    with pytest.raises(InputError, match=r"is not installed: pip install 'minalm\[hub\]'"):
        reading("org/name")


# --- rows ---------------------------------------------------------------------------------------------------------

QUESTION = "user: q\nassistant: a\n"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "x", "messages": None, "other": 1}, "x"),
        ({"messages": MESSAGES, "source": "s", "prompt": "q"}, QUESTION),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QUESTION),
        ({"conversations": MESSAGES}, QUESTION),
        ({"conversations": [{"from": "tool", "value": "t"}], "system": "s"}, "system: s\ntool: t\n"),
        ({"prompt": "Q: x ", "completion": "A"}, "Q: x A"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, QUESTION),
        ({"instruction": "q", "output": "a"}, QUESTION),
        ({"instruction": "q", "input": "", "output": "a"}, QUESTION),
        ({"instruction": "q", "input": "i", "output": "a", "system": "s"}, "system: s\nuser: q\n\ni\nassistant: a\n"),
    ],
)
def test_columns(tmp_path, row, text):
    (tmp_path / "a.jsonl").write_bytes(as_lines([row]))
    assert texts_of(reading(tmp_path / "a.jsonl")) == [text]
    (tmp_path / "a.parquet").write_bytes(parquet_of([row]))
    assert texts_of(reading(tmp_path / "a.parquet")) == [text]


def test_what_of_prompts_counts(tmp_path):
    rows = [
        {"prompt": "Q ", "completion": "A"},
        {"prompt": [*MESSAGES, MESSAGES[0]], "completion": MESSAGES[1:]},
    ]
    (tmp_path / "a.jsonl").write_bytes(as_lines(rows))
    for mask_prompt in (False, True):
        corpus = reading(tmp_path / "a.jsonl", mask_prompt=mask_prompt)
        plain, chat = corpus.piece(0), corpus.piece(1)
        assert plain == (
            Segment(Special("bos"), not mask_prompt),
            Segment("Q ", not mask_prompt),
            Segment("A"),
            Segment(Special("eos")),
        )
        assert [mask for content, mask in chat[1:5]] == [True, not mask_prompt, True, True]  # its answer in the prompt


def test_a_text_column(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_lines([{"text": "no", "body": "yes"}, {"body": "too"}]))
    assert texts_of(reading(tmp_path / "a.jsonl", text_column="body")) == ["yes", "too"]
    with pytest.raises(InputError, match=r"line 2: there is no `text`: .*\(the row has the keys body\)"):
        reading(tmp_path / "a.jsonl", text_column="text")
    (tmp_path / "a.parquet").write_bytes(parquet_of([{"body": "yes", "title": b"\x00"}]))
    assert texts_of(reading(tmp_path / "a.parquet", text_column="body")) == ["yes"]
    with pytest.raises(
        InputError, match=r"a.parquet has none of the columns text, .* but body, title: .*--text-column"
    ):
        reading(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="a.parquet has bytes in a column that is read: store texts as strings"):
        reading(tmp_path / "a.parquet", text_column="title")


BAD = [
    ({"conversations": [{"from": "nobody", "value": "x"}]}, "`from` is 'nobody' in `conversations`: write one of"),
    ({"conversations": "x"}, "`conversations` is not a list of objects"),
    ({"prompt": "x", "completion": MESSAGES}, "`completion` is not a string"),
    ({"prompt": MESSAGES, "completion": "x"}, "not both texts or both lists of messages"),
    ({"prompt": "x"}, "it has of .* none"),
    ({"instruction": ["x"], "output": "x"}, "`instruction` is not a string"),
    ({"text": "\ud83d"}, "half of a surrogate pair"),
    ({}, "the row has no keys"),
    ([], "not an object with one of"),
]


@pytest.mark.parametrize(("row", "why"), BAD)
def test_bad_rows_are_named_with_their_keys(tmp_path, row, why):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "good"}, row]))
    with pytest.raises(InputError, match=f"a.json, element 2: .*{why}") as caught:
        reading(tmp_path / "a.json")
    for key in row:
        assert key in str(caught.value)


def test_bad_rows_are_left_out_and_counted(tmp_path):
    rows = [row for pair in BAD for row in ({"text": "good"}, pair[0])]
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines(rows) + b"\xe9\n{\n")
    for _ in range(2):  # as found, and as kept
        corpus = reading(path, skip_bad=True, cache=tmp_path / "cache")
        assert texts_of(corpus) == ["good"] * len(BAD)
        (note,) = corpus.notes
        assert note.startswith(f"{len(BAD) + 2} rows of {path} are left out: {path}, line 2: `from` is 'nobody'")
        assert note.endswith("and others") and note.count(str(path)) == 1 + index_module.NAMED
    path.write_bytes(as_lines([{}]))
    with pytest.raises(InputError, match="there is no text in"):
        reading(path, skip_bad=True)


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.json", b'[{"text": "a"}, {"text": "b"}', "element 3: not JSON"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "element 2: not JSON .*Expecting ',' delimiter"),
        ("a.json", b'[{"text": "a"}] x', "goes on behind the end of its list"),
        ("a.json", b'[{"text": "a"}, {"text": "b}]', "element 2: not JSON .*Unterminated"),
        ("a.json", b"[" * 100_000, "element 1: not JSON"),
        ("a.json", b'[{"text": "\xe9"}]', "a.json is not UTF-8"),
        ("a.json", b"nonsense", "element 1: not JSON"),
        ("a.json", b"[1]", "element 1: not an object"),
        ("a.json", b"", "there is no text in"),
        ("a.json", b"[]", "there is no text in"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz is damaged or not .gz"),
        ("a.jsonl.gz", gzip.compress(as_lines(ROWS) * 99)[:-20], "a.jsonl.gz is damaged or not .gz"),
        ("a.parquet", b"PAR1 nonsense", "a.parquet is damaged or not .parquet"),
        ("a.parquet.gz", b"PAR1", "a.parquet.gz is damaged or not .gz"),
        ("a.txt", b"\xff\xfea", "a.txt is not utf-16-le, as its byte order mark says"),
        ("a.txt.bz2", bz2.compress(b"x"), "a.txt.bz2 is none of .txt, .jsonl"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, data, why):
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=why):
        reading(tmp_path / name)


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_damaged_zstandard_and_parquet(tmp_path, cut):
    for name, data in (("a.jsonl.zst", zstandard_of(as_lines(ROWS) * 99)), ("a.parquet", parquet_of(ROWS * 99))):
        (tmp_path / name).write_bytes(data[: int(cut * len(data))])
        with pytest.raises(InputError, match=f"{name} is damaged|{name}, line|there is no text"):
            reading(tmp_path / name)


# --- names and folders --------------------------------------------------------------------------------------------


def test_names_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b:2.txt", "c.txt:3"):
        Path(name).write_text("x")
    found = [
        sources.parse_source(text) for text in ("a.txt", "a.txt:2", "a.txt:0.5", "b:2.txt", "c.txt:3", "c.txt:3:.5")
    ]
    assert found == [
        ("a.txt", None),
        ("a.txt", Fraction(2)),
        ("a.txt", Fraction(1, 2)),
        ("b:2.txt", None),
        ("c.txt:3", None),
        ("c.txt:3", Fraction(1, 2)),
    ]
    assert sources.parse_source("a.txt:x") == ("a.txt:x", None) and sources.parse_source("a:nan") == ("a:nan", None)
    for text in ("a.txt:0", "a.txt:0.00"):
        with pytest.raises(InputError, match="the weight of .* is 0"):
            sources.parse_source(text)


def test_shares_are_the_least_whole_numbers():
    def of(*weights):
        return sources.shares([sources.Source("", weight and Fraction(weight)) for weight in weights])

    assert of(None, None) is None
    assert of("2", None) == (2, 1) and of("0.5", "0.25") == (2, 1) and of("0.7", "0.2", "0.1") == (7, 2, 1)
    assert of("6", "4") == (3, 2) and of("5") == (1,)
    with pytest.raises(InputError, match="in no simple ratio"):
        of("0.123456789012", "1")


def test_folders_are_read_whole_or_refused(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "inner").mkdir(parents=True), elsewhere.mkdir()
    (data / "inner" / "b.txt").write_text("b"), (elsewhere / "c.txt").write_text("c")
    (data / "a.txt").write_text("a"), (data / "notes.md").write_text("no")
    (data / "linked").symlink_to(elsewhere)
    (data / "z.txt").symlink_to(elsewhere / "c.txt")
    corpus = reading(data)
    assert texts_of(corpus) == ["a", "b", "c", "c"]
    assert corpus.notes == (f"1 files below {data} are left out, being none of {sources.FORMS}",)

    (data / "inner" / "up").symlink_to(data)
    with pytest.raises(InputError, match="up is a link to a folder that it is in: remove the link"):
        reading(data)
    (data / "inner" / "up").unlink()
    (data / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="gone.txt is a link to nothing"):
        reading(data)
    (data / "gone.txt").unlink()
    os.mkfifo(data / "pipe.jsonl")
    with pytest.raises(InputError, match="pipe.jsonl is a pipe, not a file"):
        reading(data)


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a"), (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refusing(path):  # for the superuser nothing is locked
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"locked cannot be read \(Permission denied\)"):
        reading(tmp_path)


def test_pipes_sockets_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket.txt"))
    listening.close()
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a pipe"), ("socket", "a socket"), ("device", "a device")):
        with pytest.raises(InputError, match=f"{name}.txt is {kind}, not a file"):
            reading(tmp_path / f"{name}.txt")


# --- the cache ----------------------------------------------------------------------------------------------------


def test_an_index_is_made_once(tmp_path, monkeypatch):
    path, cache = tmp_path / "a.jsonl.gz", tmp_path / "cache"
    path.write_bytes(gzip.compress(as_lines(ROWS)))
    expected = texts_of(read_corpus([path], 30, cache=cache))
    built = []
    for name in ("_build", "write_copy", "_hash"):
        was = getattr(index_module, name)
        monkeypatch.setattr(index_module, name, lambda *a, name=name, was=was: built.append(name) or was(*a))

    def again(*names, limit=30, **how):
        built.clear()
        assert texts_of(read_corpus(names or [path], limit, RowReader(**how), cache)) == expected
        return Counter(built)

    assert again() == {}
    assert again(limit=31) == {"_build": 1}  # the same copy
    assert again(mask_prompt=True) == {"_build": 1}
    (tmp_path / "b.jsonl.gz").write_bytes(path.read_bytes())
    assert again(tmp_path / "b.jsonl.gz") == {"_hash": 1}  # the same content
    (copy,) = (cache / "copies").glob("*.jsonl")
    copy.write_bytes(copy.read_bytes().replace(b"one", b"two"))
    assert again() == {"write_copy": 1}  # a copy that somebody changed
    for table in cache.glob("indexes/*/stop.npy"):
        table.write_bytes(table.read_bytes()[:-1] + b"\x01")
    assert again() == {"_build": 1}  # damaged
    for place in cache.glob("indexes/*/index.json"):
        place.unlink()
    assert again() == {"_build": 1}
    for kept in cache.glob("hashes/*"):
        kept.write_text("{")
    assert again() == {"_hash": 1}
    assert not [*cache.rglob(".*")]
    left = [cache / "indexes" / f".{place.parent.name}.1-00" for place in cache.glob("indexes/*/index.json")]
    for folder in left:  # of processes that were killed
        folder.mkdir()
    os.utime(left[0], (0, 0))
    for place in cache.glob("indexes/*/index.json"):
        place.unlink()
    again(), again(limit=31), again(mask_prompt=True)
    assert not left[0].exists() and all(folder.exists() for folder in left[1:])  # the others may be at work


def test_a_changed_file_is_read_anew(tmp_path):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_text('{"text": "before"}')
    first = read_corpus([path], 100, cache=cache)
    stat = path.stat()
    path.write_text('{"text": "after_"}')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time
    second = read_corpus([path], 100, cache=cache)
    assert texts_of(second) == ["after_"] and first.fingerprint != second.fingerprint
    with pytest.raises(InputError, match="a.jsonl changed while it was in use"):
        first.piece(0)
    path.unlink()
    with pytest.raises(InputError, match="a.jsonl is gone, which is in use"):
        second.piece(0)
    os.mkfifo(path)
    with pytest.raises(InputError, match="a.jsonl is a pipe"):
        second.piece(0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_file_that_changes_while_it_is_indexed(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_text('{"text": "many words"}\n' * 1000)
    stops = index_module.stops

    def growing(*arguments):
        with path.open("a") as file:
            file.write('{"text": "one more"}\n')
        return stops(*arguments)

    monkeypatch.setattr(index_module, "stops", growing)
    with pytest.raises(InputError, match="changed while it was in use"):
        reading(path)


def test_a_text_that_is_made_shorter_while_it_is_cut(tmp_path, monkeypatch):
    """A mapped file would end the process."""
    path = tmp_path / "a.txt"
    path.write_text("many words\n" * 100_000)
    stops = index_module.stops
    monkeypatch.setattr(index_module, "stops", lambda *a: os.truncate(path, 10) or stops(*a))
    with pytest.raises(InputError, match="changed while it was"):
        reading(path)


def test_no_room_for_the_cache(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(as_lines(ROWS))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no room for indexes .* --data-cache"):
        read_corpus([tmp_path / "a.jsonl"], 100, cache=tmp_path / "file")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    cache = tmp_path / "cache"
    monkeypatch.setattr(index_module, "_build", full)
    with pytest.raises(InputError, match="no room for indexes .*No space left on device"):
        read_corpus([tmp_path / "a.jsonl"], 100, cache=cache)
    assert [*cache.glob("indexes/*")] == []


# --- mixtures -----------------------------------------------------------------------------------------------------


def mixture(sizes, weights) -> Corpus:
    parts = [text_corpus([f"{n} {k}" for k in range(size)], 100).sources[0] for n, size in enumerate(sizes)]
    shares = sources.shares([sources.Source("", Fraction(weight)) for weight in weights])
    return Corpus(tuple(parts), "", False, shares=shares)


@given(
    parts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=4),
    seed=st.integers(-(2**70), 2**70),
    size=st.integers(1, 7),
)
@settings(deadline=None, max_examples=20)
def test_a_mixture_has_its_shares_and_each_source_its_epochs(parts, seed, size):
    sizes, weights = zip(*parts)
    corpus = mixture(sizes, weights)
    total = sum(corpus.shares)
    steps = -(-(total * 2 * max(sizes)) // size) + 3
    rows = np.concatenate([corpus.order(seed, step, size) for step in reversed(range(steps))][::-1])
    source = np.searchsorted(corpus.first, rows, side="right") - 1
    for block in range(0, len(rows) - total + 1, total):  # exactly the shares in each block
        assert [*np.bincount(source[block : block + total], minlength=len(sizes))] == [*corpus.shares]
    for number, count in enumerate(sizes):
        # Within a block a source's rows come in any order, so whole epochs end where a block does.
        own = rows[source == number][: count * corpus.shares[number]] - corpus.first[number]
        assert [*np.bincount(own, minlength=count)] == [corpus.shares[number]] * count
    assert [corpus.piece(n)[1].content for n in rows[:3].tolist()] == [p[1].content for p in corpus.batch(seed, 0, 3)]


def test_mixtures_depend_on_seed_and_are_pinned():
    """A resumed run must go on with the batches that the interrupted one would have had."""
    corpus = mixture([5, 3, 7], ["2", "1", "0.5"])
    assert corpus.shares == (4, 2, 1)
    orders = {seed: corpus.order(seed, 3, 8).tolist() for seed in (0, 1)}
    assert orders[0] != orders[1]
    assert orders[0] == [2, 2, 7, 0, 1, 0, 9, 4]


def test_a_mixture_of_files(tmp_path):
    for name, count in (("a", 3), ("b", 40)):
        (tmp_path / f"{name}.jsonl").write_bytes(as_lines([{"text": f"{name}{n}"} for n in range(count)]))
    corpus = read_corpus([f"{tmp_path}/a.jsonl:3", tmp_path / "b.jsonl", "stdlib:0.5"], 100, stdlib=lambda: ["library"])
    assert corpus.shares == (6, 2, 1) and len(corpus) == 44
    found = Counter(piece[1].content[0] for step in range(9) for piece in corpus.batch(0, step, 10))
    assert found == {"a": 60, "b": 20, "l": 10}
    plain = read_corpus([tmp_path / "a.jsonl", tmp_path / "b.jsonl", "stdlib"], 100, stdlib=lambda: ["library"])
    assert plain.shares is None and plain.fingerprint != corpus.fingerprint
    (tmp_path / "c.jsonl").write_bytes(b"\n")
    with pytest.raises(InputError, match="there is no text in .*c.jsonl"):
        read_corpus([f"{tmp_path}/a.jsonl:3", tmp_path / "c.jsonl"], 100)


def test_elements_of_any_json_file_are_found_at_any_border(tmp_path):
    """Against `json.loads`, with values that blocks cut anywhere."""
    draw = random.Random(0)
    values = [
        {"text": draw.choice(["a", "\\", '"', "\u65e5", "\n]", "}{", ","]) * draw.randrange(9), "n": [1.5, {"x": []}]}
        for _ in range(60)
    ]
    (tmp_path / "a.json").write_text(json.dumps(values, indent=draw.choice([None, 1]), ensure_ascii=False))
    for block in (1, 2, 3, 7, 64, 1 << 20):
        with pytest.MonkeyPatch.context() as patch, (tmp_path / "out").open("wb") as target:
            patch.setattr(copies, "BLOCK", block)
            copies.write_copy(tmp_path / "a.json", sources.Form(".json", ""), (), target)
        assert [json.loads(line) for line in (tmp_path / "out").read_bytes().splitlines()] == values

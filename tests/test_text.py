import functools
import json
import os
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import Chats
from hypothesis import given, settings
from hypothesis import strategies as st

from minalm.errors import InputError
from minalm.text import index as index_module
from minalm.text.corpus import read_corpus, text_corpus
from minalm.text.cutting import SMALLEST_LIMIT, SPECIAL_BYTES
from minalm.text.documents import Markup, Piece, Segment, Special
from minalm.text.index import LONG_LINE
from minalm.text.order import permute
from minalm.text.rows import RowReader

# Few different characters, so that line breaks, spaces, wide and combining characters meet at every border.
texts = st.text(st.sampled_from("ab \n\réЖ漢😀\u0301\u200d\x00"), max_size=200)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}),
    min_size=1,
    max_size=6,
)
limits = st.integers(SMALLEST_LIMIT, 90)


def special(part: str, loss_mask: bool = True) -> Segment:
    return Segment(Special(part), loss_mask)


def markup(*words: str, loss_mask: bool = True) -> Segment:
    return Segment(Markup(words, words), loss_mask)


def read_chat(row: Mapping[str, Any], mask_prompt: bool = False) -> Piece:
    """A chat as a template might write it, with headers that are text."""
    segments = [markup("<bos>", loss_mask=not mask_prompt)]
    for message in row["messages"]:
        counts = not mask_prompt or message["role"] == "assistant"
        header = [markup("<turn>", loss_mask=not mask_prompt), Segment(message["role"], not mask_prompt)]
        end = [markup("<end>", loss_mask=counts), Segment("\n", counts)]
        segments += header + [Segment(message["content"], counts)] + end
    return tuple(segment for segment in segments if segment.content)


def cost(piece: Piece) -> int:
    return sum(len(content.encode()) if isinstance(content, str) else SPECIAL_BYTES for content, loss_mask in piece)


def joined(pieces: list[Piece]) -> list[Segment]:
    """The document that the pieces make without the first part of all but one; one text segment a stretch."""
    segments: list[Segment] = [pieces[0][0]]
    for piece in pieces:
        assert piece[0].content in (Special("bos"), markup("<bos>").content) and piece[0] == pieces[0][0]
        for number, segment in enumerate(piece[1:]):
            previous, texts = segments[-1], isinstance(segment.content, str) and isinstance(segments[-1].content, str)
            if number == 0 and texts and previous.loss_mask == segment.loss_mask:
                segments[-1] = Segment(previous.content + segment.content, segment.loss_mask)
            else:
                segments.append(segment)
    return segments


@given(documents=st.lists(texts, min_size=1, max_size=5), limit=limits)
@settings(deadline=None)
def test_pieces_of_plain_text_spell_it_and_fit(documents: list[str], limit: int) -> None:
    documents = [*documents, "x"]
    corpus = text_corpus(documents, limit)
    pieces = [corpus.piece(index) for index in range(len(corpus))]
    assert max(map(cost, pieces)) <= limit
    ends = [index for index, piece in enumerate(pieces) if piece[-1] == special("eos")]
    spelled = [joined(pieces[a + 1 : b + 1]) for a, b in pairwise([-1, *ends])]
    assert spelled == [[special("bos"), Segment(text), special("eos")] for text in documents if text]


@given(chats=st.lists(messages, min_size=1, max_size=3), limit=limits, mask_prompt=st.booleans())
@settings(deadline=None)
def test_pieces_of_chats_spell_them_and_fit(chats: list, limit: int, mask_prompt: bool) -> None:
    chats = [*chats, [{"role": "user", "content": "x"}]]
    read = functools.partial(read_chat, mask_prompt=mask_prompt)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "chats.jsonl")
        path.write_bytes(b"".join(json.dumps({"messages": chat}).encode() + b"\n" for chat in chats))
        corpus = read_corpus([path], limit, RowReader(Chats(read)))
        pieces = [corpus.piece(index) for index in range(len(corpus))]
    assert max(map(cost, pieces)) <= limit and corpus.has_chats
    for piece in pieces[:-1]:  # a piece ends in a text, or where a message does
        assert isinstance(piece[-1].content, str) or piece[-1] == piece[-1]._replace(content=markup("<end>").content)
    (files,) = corpus.sources
    documents = [pieces[a:b] for a, b in pairwise(files.index.first.tolist())]
    got = [joined(joined_texts(document)) for document in documents]
    assert got == [joined(joined_texts([read({"messages": chat})])) for chat in chats]


def joined_texts(pieces: list[Piece]) -> list[Piece]:
    """The pieces with texts side by side as one, if they count alike."""
    found = []
    for piece in pieces:
        segments: list[Segment] = []
        for segment in piece:
            last = segments[-1] if segments else None
            if last is not None and all(isinstance(s.content, str) for s in (last, segment)) and last[1] == segment[1]:
                segments[-1] = Segment(last.content + segment.content, last.loss_mask)
            else:
                segments.append(segment)
        found.append(tuple(segments))
    return found


@given(documents=st.lists(texts | messages, min_size=1, max_size=4), limit=limits, mask_prompt=st.booleans())
@settings(deadline=None)
def test_long_lines_give_the_pieces_of_short_ones(documents: list, limit: int, mask_prompt: bool) -> None:
    rows = [{"text" if isinstance(document, str) else "messages": document} for document in [*documents, "x"]]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder, "lines.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        read = functools.partial(read_chat, mask_prompt=mask_prompt)
        short = read_corpus([path], limit, RowReader(Chats(read)))
        pieces = [short.piece(index) for index in range(len(short))]
        bound = len('{"text": "x"}\n')  # the last line is a short one, and most others are longer
        patch.setattr(index_module, "LONG_LINE", bound)
        long = read_corpus([path], limit, RowReader(Chats(read)))
        assert [long.piece(index) for index in range(len(long))] == pieces
        assert long.has_chats == short.has_chats
        (files,) = long.sources
        assert (files.index.kept.stat().st_size > 0) == (files.index.size < 0).any()
        assert (files.index.size <= bound).all()


@pytest.mark.parametrize(
    "row", [{"text": "word " * 20_000}, {"messages": [{"role": "user", "content": "ab " * 99}] * 400}]
)
def test_a_long_line_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(row) + '\n{"text": "short"}\n')
    assert len(json.dumps(row)) > LONG_LINE
    parsed = []

    class Counted(RowReader):
        def parse(self, line: bytes) -> Piece:
            parsed.append(len(line))
            return super().parse(line)

    corpus = read_corpus([path], 1000, Counted(Chats(read_chat)))
    assert len(corpus) > 100
    for index in range(len(corpus)):
        corpus.piece(index)
    assert [length > LONG_LINE for length in parsed] == [True, False, False]  # both at the start, then the short one


def test_a_chat_is_rendered_once(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(CHAT * 3 + json.dumps({"messages": [{"role": "user", "content": "ab " * 99}] * 4}) + "\n")
    rendered = []
    corpus = read_corpus([path], 200, RowReader(Chats(lambda row: rendered.append(row) or read_chat(row))))
    pieces = [corpus.piece(index) for index in range(len(corpus))]
    assert len(rendered) == 4 < len(pieces)
    assert pieces[0] == read_chat(json.loads(CHAT)) and sum(map(len, pieces[3:])) > 4
    assert [corpus.where(index) for index in (1, 2, len(corpus) - 1)] == [f"{path}, line {n}" for n in (2, 3, 4)]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("aaaa bbbb cccc\ndddd eeee ffff", "aaaa bbbb cccc\n"),  # after a line break in the last half
        ("aaaa bbbb cccc dddd eeee", "aaaa bbbb cccc dddd"),  # before a space there
        ("aaa\nbbb cccc dddd eeee", "aaa\nbbb cccc dddd"),  # a line break in the first half does not count,
        ("aa bbb\n" + "c" * 20, "aa bbb\n" + "c" * 13),  # nor does a space
        ("a" * 9 + "\n" + "b" * 20, "a" * 9 + "\n"),  # the last half starts here
        ("a" * 8 + "\n" + "b" * 20, "a" * 8 + "\n" + "b" * 11),
        ("a" * 10 + " " + "b" * 20, "a" * 10),
        ("a" * 9 + " " + "b" * 20, "a" * 9 + " " + "b" * 10),
        ("a" * 19 + "\nb", "a" * 19 + "\n"),  # and ends here
        ("a" * 15 + " " + "a" * 4 + " b", "a" * 15 + " " + "a" * 4),
        ("a" * 19 + "éaa", "a" * 19),  # not inside a character,
        ("a" * 18 + "e\u0301\u0302aa", "a" * 18),  # nor before what combines with the one before,
        ("a" * 12 + "👩\u200d👩aaa", "a" * 12),  # nor beside a joiner,
        ("be" + "\u0301" * 20, "be" + "\u0301" * 9),  # unless there is no other place in the last half
        ("a" * 20, "a" * 19),  # eos does not fit: the end of the text stays with it
    ],
)
def test_places_of_cuts(text: str, first: str) -> None:
    assert text_corpus([text], limit=SPECIAL_BYTES + 20).piece(0) == (special("bos"), Segment(first))


def test_a_full_window_is_one_piece() -> None:
    assert len(text_corpus(["a" * 16], limit=SPECIAL_BYTES + 20)) == 1
    assert len(text_corpus(["a" * 17], limit=SPECIAL_BYTES + 20)) == 2


def test_files_are_cut_as_texts_in_memory(tmp_path: Path) -> None:
    lines = "".join(f"{number}: Ж漢😀 and\r\n other words\n" for number in range(99))
    (tmp_path / "lines.txt").write_bytes(lines.encode())
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": lines}))
    corpora = [text_corpus([lines], 90), *(read_corpus([tmp_path / f"lines.{kind}"], 90) for kind in ("txt", "jsonl"))]
    pieces = [[corpus.piece(index) for index in range(len(corpus))] for corpus in corpora]
    assert len(pieces[0]) > 30
    assert pieces[0] == pieces[1] == pieces[2]


def test_a_message_begins_a_piece(tmp_path: Path) -> None:
    rows = [{"role": "user", "content": "a\n" * 20}, {"role": "assistant", "content": "b c d" * 9}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": rows}))
    corpus = read_corpus([tmp_path / "chat.jsonl"], 4 + 4 + 4 + 40 + 4 + 1 + 30, RowReader(Chats(read_chat)))
    assert corpus.piece(0)[-2:] == (markup("<end>"), Segment("\n"))
    assert corpus.piece(1)[:2] == (markup("<bos>"), markup("<turn>"))
    assert len(corpus) == 2


def test_a_template_may_write_more_than_a_piece_holds(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"messages": []}')
    document = markup("<bos>"), markup("<turn>", "b" * 99), Segment("cc"), markup("<end>", "d" * 99)
    corpus = read_corpus([tmp_path / "chat.jsonl"], 40, RowReader(Chats(lambda row: document)))
    pieces = [corpus.piece(index) for index in range(len(corpus))]
    assert [segment for piece in pieces for segment in piece[1:]] == list(document[1:])
    assert all(piece[0] == document[0] for piece in pieces) and len(pieces) > 1


def test_files_of_folders_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.jsonl").write_bytes(
        b'{"text": "one", "other": 1}\n\n \r\n{"text": ""}\r\n{"text": "tw\\u00f6"}\r\n'
        b'{"messages": [{"role": "user", "content": "three"}]}'
    )
    (tmp_path / "b.txt").write_bytes("vi\u00e8r\r\n".encode())
    (tmp_path / "b" / "empty.txt").touch()
    (tmp_path / "b" / "ignored.md").write_text("no")
    (tmp_path / "a.txt").write_text("zero")
    corpus = read_corpus([tmp_path, tmp_path / "b.txt"], 100, RowReader(Chats(read_chat)))
    spelled = ["".join(content for content, _ in corpus.piece(i) if isinstance(content, str)) for i in range(6)]
    assert spelled == ["zero", "one", "twö", "userthree\n", "vièr\r\n", "vièr\r\n"]
    assert len(corpus) == 6


def test_chats_are_known_before_a_piece_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"text": "plain"}')
    assert (
        read_corpus([tmp_path], 200, RowReader(Chats(read_chat))).has_chats
        and not text_corpus(["plain"], limit=100).has_chats
    )
    with pytest.raises(InputError, match="x.jsonl, line 1: a chat, which cannot be read without a chat template"):
        read_corpus([tmp_path], limit=200)


CHAT = '{"messages": [{"role": "user", "content": "good"}]}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", CHAT + '{"text": "no end}\n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", CHAT + "[" * 100_000, "a.jsonl, line 2: not JSON"),
        ("a.jsonl", CHAT + "\n[1]", "a.jsonl, line 3: not an object with one of `text`, `messages`"),
        ("a.jsonl", '{"txt": "a"}', "line 1: it has of `text`, .* none: .* .the row has the keys txt."),
        (
            "a.jsonl",
            '{"text": "a", "messages": []}',
            "line 1: it has of .* `text` and `messages`, of which one .* keys text, messages.",
        ),
        ("a.jsonl", '{"text": 3}', "`text` is not a string"),
        ("a.jsonl", '{"text": "\\ud83d"}', "half of a surrogate pair"),
        ("a.jsonl", b'{"text": "\xe9"}', "a.jsonl, line 1: not UTF-8"),
        ("a.txt", b"\xe9", "a.txt is not UTF-8"),
        ("a.txt", b"a" * (1 << 20) + b"\xc3", "a.txt is not UTF-8"),
        ("a.txt", "", "there is no text in"),
        ("a.jsonl", '{"text": ""}', "there is no text in"),
        ("a.csv", "a", "a.csv is none of .txt, .jsonl"),
    ],
)
def test_bad_files_are_named_at_the_start(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_corpus([path], 100, RowReader(Chats(read_chat)))


def test_missing_files_and_small_windows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.txt does not exist"):
        read_corpus([tmp_path / "nowhere.txt"], limit=100)
    with pytest.raises(InputError, match=r"no file below"):
        read_corpus([tmp_path], limit=100)
    with pytest.raises(InputError, match=r"no text in the documents"):
        text_corpus([""], limit=100)
    with pytest.raises(InputError, match=f"at least {SMALLEST_LIMIT}"):
        text_corpus(["a"], limit=SMALLEST_LIMIT - 1)


@pytest.mark.parametrize(("name", "spaces"), [("a.txt", 0), ("a.jsonl", 0), ("a.jsonl", LONG_LINE)])
def test_a_changed_file_is_noticed(tmp_path: Path, name: str, spaces: int) -> None:
    path = tmp_path / name
    path.write_text('{"text": "before"}' + " " * spaces)
    corpus = read_corpus([path], limit=100)
    path.write_text('{"text": "after_"}')
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputError, match="changed while it was in use"):
        corpus.piece(0)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    places = permute(np.arange(size), size, np.full(size, key, np.uint64))
    assert np.array_equal(np.sort(places), np.arange(size))


def test_permutation_is_pinned() -> None:
    # A resumed run must go on with the batches that the interrupted one would have had, on any machine and numpy.
    assert permute(np.arange(10), 10, np.zeros(10, np.uint64)).tolist() == [8, 1, 2, 6, 5, 3, 0, 4, 7, 9]
    large = permute(np.arange(4), 10**12, np.full(4, 2**64 - 1, np.uint64))
    assert large.tolist() == [206807255669, 991937756932, 379276330496, 250822893387]
    corpus = text_corpus(["a"] * 7, limit=100)
    assert corpus.order(seed=0, step=0, size=8).tolist() == [3, 5, 0, 4, 1, 6, 2, 4]
    assert corpus.order(seed=-1, step=5, size=3).tolist() == [2, 4, 0]


def test_permutations_look_random() -> None:
    keys = np.arange(60_000, dtype=np.uint64)
    orders = np.stack([permute(np.full(len(keys), place), 5, keys) for place in range(5)])
    counts = np.unique(orders, axis=1, return_counts=True)[1]
    # All 120 orders, 500 times each: chi-square of 119 degrees of freedom is below 190 but for one in 30,000.
    assert len(counts) == 120
    assert ((counts - 500.0) ** 2 / 500).sum() < 190
    first, second = (permute(np.arange(10_000), 10_000, np.full(10_000, key, np.uint64)) for key in (1, 2))
    assert abs(np.corrcoef(np.arange(10_000), first)[0, 1]) < 0.04
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.04


@given(pieces=st.integers(1, 40), size=st.integers(1, 12), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_batches_visit_every_piece_once_an_epoch(pieces: int, size: int, seed: int, epoch: int) -> None:
    corpus = text_corpus([str(index) for index in range(pieces)], limit=100)
    steps = range(epoch * pieces // size, (epoch + 1) * pieces // size + 1)
    # Backwards: a batch is a function of (seed, step), whatever was asked for before.
    rows = np.concatenate([corpus.order(seed, step, size) for step in reversed(steps)][::-1])
    visited = rows[epoch * pieces - steps[0] * size :][:pieces]
    assert np.array_equal(np.sort(visited), np.arange(pieces))
    assert [piece[1].content for piece in corpus.batch(seed, steps[0], size)] == list(map(str, rows[:size]))


def test_epochs_and_seeds_differ() -> None:
    corpus = text_corpus(["a"] * 100, limit=100)
    orders = [tuple(corpus.order(seed, epoch, 100)) for seed in range(8) for epoch in range(8)]
    assert len(set(orders)) == 64


def test_fingerprints_are_of_the_contents(tmp_path: Path) -> None:
    """Names and places do not enter; contents and their order do."""
    one, two, moved = tmp_path / "one.txt", tmp_path / "two.txt", tmp_path / "moved.txt"
    one.write_text("first"), two.write_text("second"), moved.write_text("first")

    def found(*paths: Path) -> str:
        return read_corpus(paths, 100).fingerprint

    assert found(one, two) == found(moved, two) == text_corpus(["first", "second"], 100).fingerprint
    assert len({found(one), found(two), found(one, two), found(two, one)}) == 4

"""Where the pieces of files lie: tables in a cache folder, so that text of any size is read once and starts at once.

    hashes/NAME.json      of files by their names: what tells a file that was changed, and the SHA-256 of its content
    copies/HASH.jsonl     copies of files that cannot be read from the middle (copies.py)
    indexes/KEY/          of the contents of files and the way they were read: the tables of an `Index`

A key holds all that an index depends on, the code that makes it included. What is here may be removed whenever no
program reads it; it is then made again.
"""

import codecs
import contextlib
import hashlib
import json
import os
import shutil
import time
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int64

from minalm.errors import InputError
from minalm.text.copies import LABELS, byte_order, needs_copy, write_copy, write_table
from minalm.text.cutting import SMALLEST_LIMIT, FileText, Parts, parts_of, spans, stops
from minalm.text.documents import Markup, Piece, Special
from minalm.text.rows import RowReader
from minalm.text.sources import Form, Found, form_of, open_regular

# A line longer than this is parsed only once: parsing it again for each piece would take time quadratic in its length. So
# is a chat: rendering it takes longer than all else, and more than that while the machine has other things to do.
LONG_LINE = 1 << 16  # bytes

NAMED = 5  # rows that are left out and named; others are counted alone
TABLES = ("of_file", "place", "size", "first", "stop")

Stamp = tuple[int, int, int, int]
Say = Callable[[str], None]


class TextFile(NamedTuple):
    """A .txt or .jsonl file from the middle of which can be read."""

    path: Path  # the file, or its copy
    name: str  # what messages call it
    label: str  # what messages call a line of it; "" of a .txt file, which is one document
    stamp: Stamp


class Index(NamedTuple):
    """The documents and pieces of some files. Units are those of a document (text.corpus)."""

    of_file: Int64[np.ndarray, " files_and_end"]  # number of the first document of each file
    place: np.ndarray  # [document] byte of its file at which it begins
    size: np.ndarray  # [document] bytes there; of one that is kept, -1 less the byte of `kept` at which it begins
    first: np.ndarray  # [document + 1] number of its first piece
    stop: np.ndarray  # [piece] the unit after its last; of a document that is kept, the byte of `kept`
    kept: Path  # pieces, each as JSON: of chats, and of documents on lines longer than LONG_LINE
    has_chats: bool
    notes: dict[str, int]  # what a user should know -> in how many chats
    left_out: int  # rows that could not be read
    named: list[str]  # which, of the first


# --- files --------------------------------------------------------------------------------------------------------


def stamp_of(descriptor: int | Path) -> Stamp:
    """What changes when a file does: its size, times of change in ns of its content and its state, its number."""
    stat = os.stat(descriptor)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def hashes(files: Sequence[Path], folder: Path) -> list[str]:
    """The SHA-256 of each file's content; of files that did not change since, as kept in the cache. Raises InputError
    for a file that changes meanwhile."""
    names = [os.path.abspath(file) for file in files]
    kept = folder / "hashes" / f"{_key(names)}.json"
    before = {}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        before = {tuple(stamp): value for stamp, value in json.loads(kept.read_bytes())}
    stamps = [stamp_of(file) for file in files]
    found = [before.get(stamp) or _hash(file, stamp) for file, stamp in zip(files, stamps)]
    if any(stamp not in before for stamp in stamps):
        with _replaced(kept) as file:
            file.write(json.dumps(list(zip(stamps, found))).encode())
    return found


def _hash(path: Path, stamp: Stamp) -> str:
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        check_unchanged(path, file, stamp)
    return digest


def check_unchanged(path: Path, file: BinaryIO, stamp: Stamp) -> None:
    """Raises InputError if an open file is not what it was."""
    if stamp_of(file.fileno()) != stamp:
        raise InputError(f"{path} changed while it was in use: leave it unchanged and start again")


def text_files(found: Found, prints: Sequence[str], columns: Sequence[str], folder: Path, say: Say) -> list[TextFile]:
    """The files of a source as such that can be read from the middle. Raises InputError."""
    if found.table is not None:
        copy = folder / "copies" / f"{_key(['.arrow', found.table.rpartition('#')[2], *columns, *prints])}.jsonl"
        if not _is_whole(copy):
            say(f"Copying {found.table} to {copy}")
            with _replaced(copy, stamped=True) as target:
                write_table(found.table, columns, target)
        return [TextFile(copy, found.table, LABELS[".arrow"], stamp_of(copy))]
    files = []
    for path, content in zip(found.files, prints):
        form = form_of(path) or Form(".txt", "")
        if not needs_copy(path, form):
            files.append(TextFile(path, str(path), LABELS[form.kind], stamp_of(path)))
            continue
        parts = [*form, content, *(columns if form.kind == ".parquet" else ())]
        copy = folder / "copies" / f"{_key(parts)}{'.txt' if form.kind == '.txt' else '.jsonl'}"
        if not _is_whole(copy):
            say(f"Copying {path} to {copy}")
            stamp = stamp_of(path)
            with _replaced(copy, stamped=True) as target:
                write_copy(path, form, columns, target)
                with open_regular(path) as file:
                    check_unchanged(path, file, stamp)
        files.append(TextFile(copy, str(path), LABELS[form.kind], stamp_of(copy)))
    return files


def _is_whole(copy: Path) -> bool:
    """Whether a copy is as it was written."""
    try:
        return json.loads(copy.with_suffix(".stamp").read_bytes()) == list(stamp_of(copy))
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _replaced(path: Path, stamped: bool = False) -> Iterator[BinaryIO]:
    """A file to write that stands at `path` when it is whole; `stamped`: its stamp stands beside it. Raises InputError
    where there is no room."""
    partial = _unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_old(path)
        with open(partial, "wb") as file:
            yield file
        partial.replace(path)
        if stamped:
            with _replaced(path.with_suffix(".stamp")) as file:
                file.write(json.dumps(stamp_of(path)).encode())
    except OSError as error:
        if error.filename not in (None, str(partial), str(path.parent)):
            raise
        raise no_room(path.parent, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _unfinished(path: Path) -> Path:
    """Where something is made that will stand at `path`; of its own for each process, on other hosts too."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")


def _clear_old(path: Path) -> None:
    """Removes what processes that were killed have left of `path` more than a day ago."""
    for left in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - 86_400:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def no_room(folder: Path, error: OSError) -> InputError:
    """The sentence about a cache that cannot be written."""
    return InputError(
        f"no room for indexes and copies of texts in {folder} ({error.strerror or error}): "
        "name another folder with --data-cache"
    )


# --- indexes ------------------------------------------------------------------------------------------------------


def index(
    files: Sequence[TextFile], prints: Sequence[str], limit: int, reader: RowReader, folder: Path, say: Say
) -> Index:
    """The index of files with the hashes `prints`, from the cache if it is there. Raises InputError for text that cannot
    be read."""
    if limit < SMALLEST_LIMIT:
        raise InputError(f"pieces of {limit} bytes are too short: allow at least {SMALLEST_LIMIT}")
    place = folder / "indexes" / _index_key(files, prints, limit, reader)
    if (found := _load(place)) is not None:
        return found
    building = _unfinished(place)
    try:
        building.mkdir(parents=True)
        _clear_old(place)
        _build(files, limit, reader, building, say)
        shutil.rmtree(place, ignore_errors=True)  # it is damaged
        with contextlib.suppress(OSError):  # another process was faster
            building.rename(place)
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(folder)):
            raise
        raise no_room(folder, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if (found := _load(place)) is None:
        raise InputError(f"{place} does not hold what was written there: name another folder with --data-cache")
    return found


def _index_key(files: Sequence[TextFile], prints: Sequence[str], limit: int, reader: RowReader) -> str:
    """A hash of all that an index depends on."""
    chats = "none" if reader.read_chat is None else reader.read_chat.key
    settings = [limit, LONG_LINE, reader.text_column, reader.mask_prompt, reader.skip_bad, chats, _code()]
    # The names are in the sentences about what is left out.
    names = [file.name for file in files] if reader.skip_bad else []
    return _key([*map(str, settings), *names, *prints])


@cache
def _code() -> str:
    """A hash of the code that reads and cuts, and of what it stands on."""
    modules = [*Path(__file__).parent.glob("*.py"), *Path(__file__).parents[1].glob("tokenization/*.py")]
    return _key([unicodedata.unidata_version, *(module.read_text("utf-8") for module in sorted(modules))])


def _key(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:40]


def _load(place: Path) -> Index | None:
    """The index in a folder; None if there is none, or it is damaged."""
    try:
        about = json.loads((place / "index.json").read_bytes())
        for name in TABLES:
            with open(place / f"{name}.npy", "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != about["tables"][name]:
                    return None
        if (place / "kept").stat().st_size != about["kept"]:
            return None
        tables = [np.load(place / f"{name}.npy", mmap_mode="r") for name in TABLES]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Index(*tables, place / "kept", about["has_chats"], about["notes"], about["left_out"], about["named"])


class _Document(NamedTuple):
    """A document as it is found in a file."""

    place: int  # byte of the file at which it begins
    size: int  # bytes
    parts: Parts
    kept: Piece | None  # the document, if its pieces are kept


def _build(files: Sequence[TextFile], limit: int, reader: RowReader, folder: Path, say: Say) -> None:
    """Reads and checks all text once, and writes the index to a folder. Raises InputError, at the first row that cannot
    be read unless `reader.skip_bad`."""
    of_file, place, size, first, stop = (array("q") for _ in TABLES)
    left_out, named, has_chats, shown = 0, [], False, time.monotonic()
    notes = {} if reader.read_chat is None else reader.read_chat.notes
    before = dict(notes)
    with open(folder / "kept", "wb") as kept:
        for file in files:
            of_file.append(len(place))
            for number, document in _documents(file, reader):
                if time.monotonic() > shown + 10.0:
                    say(f"Reading {file.name}: {len(place):,} texts so far")
                    shown = time.monotonic()
                if isinstance(document, InputError):
                    left_out += 1
                    if len(named) < NAMED:
                        named.append(f"{file.name}, {file.label} {number}: {document}")
                    continue
                parts = document.parts
                if not any(len(part) for part in parts if not isinstance(part, Special | Markup)):
                    continue
                has_chats = has_chats or _is_chat(parts)
                first.append(len(stop))
                place.append(document.place)
                if document.kept is None:
                    size.append(document.size)
                    stop.extend(stops(parts, limit))
                else:
                    size.append(-1 - kept.tell())
                    bounds = pairwise(chain((0,), stops(parts, limit)))
                    for piece in spans(document.kept, bounds):
                        kept.write(json.dumps(piece, ensure_ascii=False).encode())
                        stop.append(kept.tell())
        length = kept.tell()
    of_file.append(len(place))
    first.append(len(stop))
    digests = {}
    for name, table in zip(TABLES, (of_file, place, size, first, stop)):
        values = np.frombuffer(table, np.int64) if table else np.zeros(0, np.int64)
        if name in ("size", "stop") and 0 <= values.min(initial=0) and values.max(initial=0) < 2**32:
            values = values.astype(np.uint32)
        np.save(folder / f"{name}.npy", values)
        with open(folder / f"{name}.npy", "rb") as written:
            digests[name] = hashlib.file_digest(written, "sha256").hexdigest()
    about = {
        "tables": digests,
        "kept": length,
        "has_chats": has_chats,
        "notes": {note: count - before.get(note, 0) for note, count in notes.items() if count > before.get(note, 0)},
        "left_out": left_out,
        "named": named,
    }
    (folder / "index.json").write_text(json.dumps(about))


def _is_chat(parts: Parts) -> bool:
    return Special("eos") not in parts


def _documents(file: TextFile, reader: RowReader) -> Iterator[tuple[int, _Document | InputError]]:
    """The documents of a file with the numbers of their lines, and, if `reader.skip_bad`, why a line is none."""
    with open_regular(file.path) as opened:
        check_unchanged(file.path, opened, file.stamp)
        mark, _ = byte_order(opened.read(4))
        opened.seek(mark)
        if not file.label:
            try:
                for _ in codecs.iterdecode(iter(lambda: opened.read(1 << 20), b""), "utf-8"):
                    pass
            except UnicodeDecodeError as error:
                raise InputError(f"{file.name} is not UTF-8: convert it to UTF-8") from error
            size = opened.tell() - mark
            yield 1, _Document(mark, size, [FileText(opened, mark, size), Special("eos")], None)
        else:
            place = mark
            for number, line in enumerate(opened, start=1):
                if place + len(line) > file.stamp[0]:  # it may grow without end
                    check_unchanged(file.path, opened, file.stamp)
                if line.strip():
                    try:
                        document = reader.parse(line)
                        if document:
                            parts = parts_of(document)
                            kept = document if len(line) > LONG_LINE or _is_chat(parts) else None
                            yield number, _Document(place, len(line), parts, kept)
                    except InputError as error:
                        check_unchanged(file.path, opened, file.stamp)
                        if not reader.skip_bad:
                            raise InputError(f"{file.name}, {file.label} {number}: {error}") from error
                        yield number, error
                place += len(line)
        check_unchanged(file.path, opened, file.stamp)

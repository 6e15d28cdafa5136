"""Copies of files that cannot be read from the middle, as lines: what is compressed, .json, .parquet and Arrow tables.

A copy is made once, in a cache folder under the hash of what it was made of. It needs the room of the text. The
alternatives were weighed: a compressed stream has to be read from its start for each piece; a row of a Parquet file
takes the decoding of its row group, 10 to 200 MB in most files, for each piece.
"""

import codecs
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from minalm.errors import InputError
from minalm.text.sources import Form, load_table, open_regular

BLOCK = 1 << 20  # bytes that are read at once
ROWS = 1024  # rows of a table that are read at once
MARKS = (  # byte order marks; the longer of two that begin alike comes first
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
LABELS = {".txt": "", ".jsonl": "line", ".json": "element", ".parquet": "row", ".arrow": "row"}


def byte_order(start: bytes) -> tuple[int, str]:
    """(bytes of the byte order mark, the encoding that it says), from the start of a text; (0, "utf-8") without one."""
    return next(((len(mark), name) for mark, name in MARKS if start.startswith(mark)), (0, "utf-8"))


def needs_copy(path: Path, form: Form) -> bool:
    """Whether pieces cannot be read from the file as it is."""
    if form.packed or form.kind not in (".txt", ".jsonl"):
        return True
    with open_regular(path) as file:
        return byte_order(file.read(4))[1] != "utf-8"


def write_copy(path: Path, form: Form, columns: Sequence[str], target: BinaryIO) -> None:
    """Writes the text of a .txt file, the lines of a .jsonl file, or the rows of another as lines of JSON, with these
    columns alone if it is a table. Raises InputError for what is damaged or of another form."""
    with open_regular(path) as file:
        if form.kind == ".parquet":
            if not form.packed:
                return _copy_parquet(path, file, columns, target)
            with tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(_unpacked(path, form, file), unpacked, BLOCK)
                unpacked.seek(0)
                return _copy_parquet(path, unpacked, columns, target)
        stream = _text_stream(path, _unpacked(path, form, file))
        if form.kind == ".json":
            _copy_json(path, stream, target)
        else:
            shutil.copyfileobj(stream, target, BLOCK)


def write_table(name: str, columns: Sequence[str], target: BinaryIO) -> None:
    """Writes the rows of a dataset (sources.load_table) as lines of JSON, with these columns alone. Raises InputError."""
    table = load_table(name)
    wanted = _wanted(name, table.column_names, columns)
    for batch in table.select_columns(wanted).with_format(None).iter(ROWS):
        for values in zip(*(batch[column] for column in wanted)):
            _write_row(name, dict(zip(wanted, values)), target)


# --- compression and encodings ------------------------------------------------------------------------------------


class _Stream(io.RawIOBase):
    """Bytes that a function gives, a block at a time; b"" at the end."""

    def __init__(self, read: Callable[[], bytes]):
        self.next, self.rest = read, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            self.rest = self.next()
            if not self.rest:
                return 0
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def _unpacked(path: Path, form: Form, file: io.BufferedReader) -> io.BufferedReader:
    """What a file holds, of a compressed one the contents."""
    if not form.packed:
        return file
    stream = gzip.GzipFile(fileobj=file) if form.packed == ".gz" else _zstd(path, file)

    def read() -> bytes:
        try:
            return stream.read(BLOCK)
        except (OSError, EOFError, zlib.error, ValueError, *_zstd_errors(form)) as error:
            raise InputError(f"{path} is damaged or not {form.packed} ({error}): get the file again") from error

    return io.BufferedReader(_Stream(read), BLOCK)


def _zstd(path: Path, file: io.BufferedReader) -> Any:
    """A reader of all frames of a file: Python's own from 3.14 on, else that of the package `zstandard`."""
    try:
        from compression import zstd
    except ImportError:
        try:
            import zstandard
        except ImportError as error:
            raise InputError(
                f"{path} is compressed with Zstandard, which this Python reads with a package that is not installed: "
                "pip install 'minalm[data]'"
            ) from error
        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return zstd.ZstdFile(file)


def _zstd_errors(form: Form) -> tuple[type[Exception], ...]:
    if form.packed != ".zst":
        return ()
    try:
        from compression import zstd
    except ImportError:
        import zstandard

        return (zstandard.ZstdError,)
    return (zstd.ZstdError,)


def _text_stream(path: Path, stream: io.BufferedReader) -> io.BufferedReader:
    """The text as UTF-8, without a byte order mark."""
    size, encoding = byte_order(stream.peek(4)[:4])
    stream.read(size)
    if encoding == "utf-8":
        return stream
    decoder = codecs.getincrementaldecoder(encoding)()

    def read() -> bytes:
        try:
            while block := stream.read(BLOCK):
                if text := decoder.decode(block):
                    return text.encode()
            decoder.decode(b"", final=True)
        except UnicodeError as error:
            raise InputError(f"{path} is not {encoding}, as its byte order mark says: convert it to UTF-8") from error
        return b""

    return io.BufferedReader(_Stream(read), BLOCK)


# --- rows ---------------------------------------------------------------------------------------------------------


def _copy_json(path: Path, stream: io.BufferedReader, target: BinaryIO) -> None:
    """The elements of a list, or values one after the other, each on a line of its own. What is in memory is a block
    and the value under way."""
    reader, space = codecs.getreader("utf-8")(stream), re.compile(r"[ \t\r\n]*")
    scan, text, place, number = json.JSONDecoder().raw_decode, "", 0, 0
    in_list, closed, ended, error = None, False, False, None
    while True:
        place = space.match(text, place).end()
        if in_list is None and text:
            in_list = text[place : place + 1] == "["
            place += in_list
            continue
        if closed and place < len(text):
            raise InputError(f"{path} goes on behind the end of its list: write one list of objects, or .jsonl")
        if in_list and text[place : place + 1] == "]":
            place, closed = place + 1, True
            continue
        if place < len(text) and not closed:
            start = space.match(text, place + 1).end() if in_list and number and text[place] == "," else place
            try:
                if in_list and number and start == place:
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
                _, stop = scan(text, start)
                if stop < len(text) or ended:  # a number may go on
                    target.write(text[start:stop].replace("\r", " ").replace("\n", " ").encode() + b"\n")
                    place, number, error = stop, number + 1, None
                    continue
            except (ValueError, RecursionError) as found:
                error = found
        if ended or (error is not None and not _is_cut_short(error, text)):
            if error is None and (closed or not in_list):
                return
            raise InputError(
                f"{path}, element {number + 1}: not JSON ({error or 'the list does not end'}): "
                "write a list of objects, or one object on each line of a .jsonl file"
            )
        try:
            block = reader.read(max(BLOCK, len(text) - place))  # twice as much each time, for a long value
        except UnicodeDecodeError as found:
            raise InputError(f"{path} is not UTF-8: convert it to UTF-8") from found
        text, place, ended = text[place:] + block, 0, not block


def _is_cut_short(error: Exception, text: str) -> bool:
    """Whether more text may make a JSON value of what is none."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - 16


def _copy_parquet(path: Path, file: io.BufferedIOBase, columns: Sequence[str], target: BinaryIO) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{path} is read with `pyarrow`, which is not installed: pip install 'minalm[data]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            wanted = _wanted(str(path), table.schema_arrow.names, columns)
            for batch in table.iter_batches(ROWS, columns=wanted):
                for row in batch.to_pylist():
                    _write_row(str(path), row, target)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{path} is damaged or not .parquet ({error}): get the file again") from error


def _wanted(name: str, found: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Those of the columns that a table has. Raises InputError if there is none."""
    wanted = [column for column in found if column in columns]
    if not wanted:
        raise InputError(
            f"{name} has none of the columns {', '.join(columns)} but {', '.join(found)[:300]}: "
            "name the text with --text-column"
        )
    return wanted


def _write_row(name: str, row: dict[str, Any], target: BinaryIO) -> None:
    def refuse(value: Any) -> None:
        raise InputError(f"{name} has {type(value).__name__} in a column that is read: store texts as strings")

    try:
        line = json.dumps(row, ensure_ascii=False, default=refuse).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which is found where rows are read
        line = json.dumps(row, default=refuse).encode()
    target.write(line + b"\n")

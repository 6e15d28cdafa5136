"""Files that are whole at any time, and known again: written beside their place, synced to disk, with their hash."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from minalm.errors import InputError

Digest = list[int | str]  # size in bytes, and SHA-256 as hex


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_below(folder: Path) -> None:
    """Waits until a folder and all that is in it are on disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def replace(file: Path, content: str | bytes) -> None:
    """Writes a file that is whole at any time, on disk too."""
    partial = file.with_name(file.name + ".partial")
    try:
        with partial.open("wb") as out:
            out.write(content if isinstance(content, bytes) else content.encode())
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from error  # a write alone names no file
    sync(file.parent)


def digest(file: Path, size: int | None = None) -> Digest:
    """Size and hash of a file, or of its first `size` bytes; what is hashed is on disk afterwards."""
    found, left = hashlib.sha256(), size
    with file.open("rb") as opened:
        while block := opened.read(1 << 20 if left is None else min(left, 1 << 20)):
            found.update(block)
            left = None if left is None else left - len(block)
        os.fsync(opened.fileno())
        return [opened.tell(), found.hexdigest()]


def digests(folder: Path) -> dict[str, Digest]:
    """Size and hash of each file below a folder, by its relative path. All of it is on disk afterwards."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(8) as pool:  # a hash needs no interpreter
        found = dict(zip([str(path.relative_to(folder)) for path in files], pool.map(digest, files), strict=True))
    sync_below(folder)
    return found


def first_changed(folder: Path, expected: Mapping[str, Digest]) -> str | None:
    """What is wrong with the first file below `folder` that is not as expected; None if all are."""

    def wrong(name: str) -> str | None:
        file, (size, _) = folder / name, expected[name]
        try:
            found = file.stat().st_size
        except FileNotFoundError:
            return f"{file} is missing"
        if found != size:
            return f"{file} has {found} bytes instead of {size}"
        return None if digest(file) == expected[name] else f"{file} has other contents than were written"

    with ThreadPoolExecutor(8) as pool:
        return next((found for found in pool.map(wrong, expected) if found is not None), None)


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Writes an object as JSON together with its hash, for `read_record`."""
    replace(file, json.dumps({**record, "sha256": _own_hash(record)}, indent=2) + "\n")


def read_record(file: Path) -> dict[str, Any]:
    """The inverse of `write_record`. Raises InputError if the file is not as it was written."""
    try:
        record = json.loads(file.read_bytes())
        if record.pop("sha256") == _own_hash(record):
            return record
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        pass
    raise InputError(f"{file} is damaged: it is not as this program wrote it; restore it, or name another folder")


def _own_hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

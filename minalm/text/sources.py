"""What is named as data: files, folders of them, folders that `datasets` saved, datasets of its hub, and their weights."""

import io
import os
import re
import stat
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from minalm.errors import InputError

KINDS = (".txt", ".jsonl", ".json", ".parquet")
PACKED = (".gz", ".zst")
FORMS = ".txt, .jsonl, .json or .parquet, each also as .gz or .zst"
STDLIB = "stdlib"  # the word for the sources of Python's library (text/stdlib.py)
LARGEST_SUM = 10**9  # of weights as whole numbers


class Source(NamedTuple):
    """One of the names given as data."""

    name: str
    weight: Fraction | None  # None: none was given


def parse_source(text: str) -> Source:
    """`NAME` or `NAME:WEIGHT`. What exists under the whole text is that; so a weight behind any name can be told from a
    colon in it. Raises InputError for a weight of 0."""
    name, colon, weight = text.rpartition(":")
    if not colon or not re.fullmatch(r"\d+(\.\d+)?|\.\d+", weight) or os.path.lexists(text):
        return Source(text, None)
    if Fraction(weight) == 0:
        raise InputError(f"the weight of {text} is 0: give a number above 0, or leave it out")
    return Source(name, Fraction(weight))


def shares(sources: Sequence[Source]) -> tuple[int, ...] | None:
    """How many of `sum(shares)` rows each source has: the least whole numbers in proportion to the weights, 1 where none
    is given. None: no source has a weight, all are one text. Raises InputError for weights with too many digits."""
    if all(source.weight is None for source in sources):
        return None
    weights = [source.weight or Fraction(1) for source in sources]
    unit = min(weights)
    for weight in weights:  # the largest number that all are whole multiples of
        while weight:
            unit, weight = weight, unit % weight
    whole = tuple(int(weight / unit) for weight in weights)
    if sum(whole) > LARGEST_SUM:
        raise InputError(f"the weights {', '.join(map(str, map(float, weights)))} are in no simple ratio: round them")
    return whole


class Form(NamedTuple):
    """What the end of a file's name says."""

    kind: str  # one of KINDS, or ".arrow": a table of `datasets`
    packed: str  # one of PACKED, or ""


def form_of(path: Path) -> Form | None:
    """None: not a form that can be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ""
    return Form(suffixes[-1], packed) if suffixes and suffixes[-1] in KINDS else None


class Found(NamedTuple):
    """The files of a source, in order."""

    files: tuple[Path, ...]
    table: str | None = (
        None  # what `datasets` calls the files, all of one table: "folder" or "org/name", with its split
    )
    notes: tuple[str, ...] = ()  # what a user should know


def find_files(name: str) -> Found:
    """The files that a source's name stands for; a dataset of the hub is fetched. Raises InputError, OSError."""
    path = Path(name)
    if os.path.lexists(path):
        if path.is_dir():
            return _saved_table(name, None) if _is_saved_table(path) else _below(path)
        check_regular(path)
        if form_of(path) is None:
            raise InputError(f"{path} is none of {FORMS}: convert it to one of them")
        return Found((path,))
    before, _, split = name.rpartition("#")
    if before and Path(before).is_dir() and _is_saved_table(Path(before)):
        return _saved_table(before, split)
    if _on_hub(name) and form_of(path) is None:
        return _hub_table(name)
    raise InputError(
        f"{path} does not exist: name a file ({FORMS}), a folder of them, or a dataset of the hub as org/name"
    )


def check_regular(path: Path) -> None:
    """Raises InputError for what is no file: reading it might never end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise InputError(f"{path} is a link to nothing: correct or remove it") from error
    _check_mode(path, mode)


def _check_mode(path: Path, mode: int) -> None:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    if not stat.S_ISREG(mode):
        kind = kinds.get(stat.S_IFMT(mode), "a folder")
        raise InputError(f"{path} is {kind}, not a file, which is read again and again: write its text to a file")


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a file for reading; raises InputError for what is none, and never waits for a pipe's other end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    try:
        _check_mode(path, os.fstat(file.fileno()).st_mode)
    except InputError:
        file.close()
        raise
    return file


# --- folders ------------------------------------------------------------------------------------------------------


def _below(folder: Path) -> Found:
    """All files of known forms below a folder, those below linked folders included."""
    found, others = [], 0

    def refuse(error: OSError) -> None:
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}): allow it, or name the other folders and files"
        ) from error

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        above = {os.path.realpath(parent) for parent in (Path(place), *Path(place).parents)}
        for inner in folders:
            path = Path(place, inner)
            if path.is_symlink() and os.path.realpath(path) in above:
                raise InputError(f"{path} is a link to a folder that it is in: remove the link")
        for name in files:
            path = Path(place, name)
            if form_of(path) is None:
                others += 1
                continue
            check_regular(path)
            found.append(path)
    # Sorted by path components, since the order must not depend on the system's path separator.
    found.sort(key=lambda below: below.parts)
    if not found:
        raise InputError(f"there is no file below {folder} that is {FORMS}: name another folder or a file")
    notes = (f"{others:,} files below {folder} are left out, being none of {FORMS}",) if others else ()
    return Found(tuple(found), notes=notes)


# --- tables of `datasets` -----------------------------------------------------------------------------------------


def _is_saved_table(path: Path) -> bool:
    """Whether `datasets` wrote this folder, by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def _saved_table(folder: str, split: str | None) -> Found:
    path = Path(folder)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(below.name for below in path.iterdir() if _is_saved_table(below))
        split = split or "train"
        if split not in splits:
            raise InputError(f"{folder} has no split {split!r}: name one as {folder}#SPLIT, of {', '.join(splits)}")
        path = path / split
    elif split is not None:
        raise InputError(f"{folder} has no splits: leave out #{split}")
    files = sorted([*path.glob("*.arrow"), path / "dataset_info.json", path / "state.json"])
    for file in files:
        check_regular(file)
    return Found(tuple(files), str(path))


def _on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(#[\w.\[\]:%+-]+)?", name) is not None and name[0] not in "./"


def _hub_table(name: str) -> Found:
    """Fetches a dataset, or finds it in the cache of `datasets`; its files are those that are kept there."""
    table = load_table(name)
    files = sorted(Path(each["filename"]) for each in table.cache_files)
    if not files:
        raise InputError(f"{name}: `datasets` keeps no files of it: save it with save_to_disk and name the folder")
    return Found(tuple(files), name)


def load_table(name: str) -> Any:
    """The `datasets.Dataset` of a saved folder or of the hub's org/name, org/name/CONFIGURATION, each with #SPLIT.
    Raises InputError."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{name} is no file or folder of files here, and `datasets`, which reads the hub's and its own, is not "
            "installed: pip install 'minalm[hub]', or correct the name"
        ) from error
    try:
        if Path(name).is_dir():
            return datasets.load_from_disk(name)
        repository, _, split = name.partition("#")
        parts = repository.split("/")
        configuration = parts[2] if len(parts) > 2 else None
        return datasets.load_dataset("/".join(parts[:2]), configuration, split=split or "train")
    except Exception as error:  # it raises whatever its parts raise
        why = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise InputError(
            f"{name} is no file or folder here, and `datasets` does not load it ({why}): "
            "correct the name (org/name, org/name/CONFIGURATION, each with #SPLIT), or the folder"
        ) from error

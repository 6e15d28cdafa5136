"""Reading the files of a model, which strangers wrote: what is no file is refused, and what is larger than such files are."""

import stat
from pathlib import Path

from minalm.errors import InputError

LARGEST = 1 << 26  # bytes: twice the largest tokenizer.json that is known (Gemma 3's)


def read_bytes(file: Path) -> bytes:
    """What a file holds. Raises InputError for a pipe, a device or a folder, and for a file of more than LARGEST bytes;
    OSError where there is none, or the system refuses it."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{file} is a folder, a pipe or a device, and no file: take the file of the original model")
    if found.st_size > LARGEST:
        raise InputError(
            f"{file} has {found.st_size:,} bytes, where no such file has more than {LARGEST:,}: "
            "take it from the original model"
        )
    return file.read_bytes()


def shortened(value: object) -> str:
    """A value of JSON as Python writes it, with its middle left out if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"

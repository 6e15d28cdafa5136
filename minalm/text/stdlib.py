"""Text that comes with every Python: the sources and documentation of its standard library."""

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

from minalm.errors import InputError

HELD_OUT = 0.05  # share of the documents


# Tests, tables of encodings, and packages that are installed beside the library.
_SKIPPED = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}


def stdlib_documents(split: Literal["training", "held_out"], fraction: float = 1.0) -> list[str]:
    """The .py files of this Python's standard library, in order of their paths, one document each.

    A `fraction` is a share of the documents, from 0 to 1, and contains all smaller fractions. Whether a file belongs to
    a split and to a fraction depends only on its path in the library, so no version of Python trains on a file that
    another holds out. The largest training file is `pydoc_data/topics.py`, the language reference. Raises InputError if
    no file is left.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).parts):
        name = path.relative_to(library)
        if _SKIPPED.intersection(name.parts) or name.name.startswith("_sysconfigdata"):  # it has local paths
            continue
        place, share = _places(name.as_posix())
        if (place < HELD_OUT) == (split == "held_out") and share < fraction:
            try:
                documents.append(path.read_text("utf-8"))
            except UnicodeDecodeError:
                continue  # an old source in another encoding
    if not documents:
        raise InputError(f"{library} has no sources of the {split} split: use a Python that has its standard library")
    return documents


def _places(name: str) -> tuple[float, float]:
    """Two numbers in [0, 1), spread evenly over names. A change to them moves files between the splits."""
    # This prefix puts the language reference, a fifteenth of all text, into training, and makes a share of the
    # documents nearly the same share of the bytes.
    digest = hashlib.sha256(f"minalm 4:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:16], "big") / 2**64

"""Fingerprints of models: a run that goes on finds out whether it reads what it began with."""

import hashlib
from pathlib import Path

BLOCK = 1 << 20
KINDS = (".json", ".safetensors", ".jinja", ".model", ".txt")  # of the files that models and tokenizers are read from
WHOLE = 64 * BLOCK  # the largest file of which everything is read


def model_fingerprint(path: Path) -> str:
    """A hash of a model's folder, or of a file: of the names and contents of its files of `KINDS`.

    Of a file above 64 MiB it reads the size, the beginning, which of safetensors describes all tensors, and 63 further
    MiB at equal distances: weights that were trained further differ everywhere, and a large model is read in a second.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in KINDS)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            if size <= WHOLE:
                digest.update(opened.read())
            else:
                for block in range(WHOLE // BLOCK):
                    opened.seek(block * (size - BLOCK) // (WHOLE // BLOCK - 1))
                    digest.update(opened.read(BLOCK))
    return digest.hexdigest()

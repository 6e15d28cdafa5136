"""Fingerprints of models and texts: a run that goes on finds out whether it reads what it began with."""

import hashlib
from pathlib import Path

from minalm.distill.losses import LossConfig
from minalm.huggingface.loaded import model_folder
from minalm.run.models import StudentConfig
from minalm.run.texts import Texts

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


def fingerprints(student: StudentConfig, texts: Texts, losses: LossConfig) -> dict[str, str]:
    """What a run reads -> a hash of it. The text of the standard library is included, so that another Python version is
    detected."""
    found = {"the training text": texts.training.fingerprint}
    if texts.held_out is not None:
        found["the held-out text"] = texts.held_out.fingerprint
    for name, path in (("teacher", student.teacher), ("student", student.student)):
        if path is not None:
            found[f"the model of --{name}"] = model_fingerprint(model_folder(path))
    if isinstance(student.student_tokenizer, Path):
        found["the tokenizer of --student-tokenizer"] = model_fingerprint(student.student_tokenizer)
    if losses.pair_bias is not None:
        found["the file of --losses.pair-bias"] = model_fingerprint(losses.pair_bias)
    return found

"""The student of a run as a Hugging Face folder."""

import shutil
from pathlib import Path
from typing import Literal

from jaxtyping import PyTree

from minalm.huggingface.folder import save
from minalm.run.checkpoint import check_whole, restore
from minalm.run.folder import RunFolder


def export(
    run: RunFolder,
    out: Path,
    dtype: Literal["bfloat16", "float32"],
    step: int | None = None,
    trained: PyTree | None = None,
    replace: bool = False,
) -> None:
    """Writes the student of a run to the folder `out`, on one process, by what the run's folder holds alone.

    `trained` are its trained parameters; None: those of the checkpoint after `step` steps, by default the newest, read
    to the host. Raises InputError if there is no such checkpoint, or if `out` exists,
    unless `replace`.
    """
    start = run.start
    if trained is None:
        step = check_whole(run.checkpoints, step)
        trained = restore(run.checkpoints, {"student": start.trained()}, step)["student"]
    if replace:
        shutil.rmtree(out, ignore_errors=True)
    save(out, start.model(trained), start.vocabulary, start.suffixes, dtype, start.generation_config)

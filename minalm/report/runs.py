"""What a run's folder says of how it went."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any

from minalm.errors import InputError
from minalm.run.folder import RunFolder, is_run

MOST_POINTS = 800  # of a curve; those of a longer run are means over equal numbers of rows


@dataclass(frozen=True)
class RunData:
    """The settings and logs of a run."""

    name: str  # what the page calls it
    folder: RunFolder
    settings: dict[str, Any]  # by the names of their flags
    metrics: list[dict[str, int | float]]  # at most MOST_POINTS rows
    averaged: int  # how many logged steps a row of `metrics` is the mean of
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any] | None  # None: it has not ended
    notes: list[str] = field(default_factory=list)


def short_names(paths: Sequence[Path]) -> list[str]:
    """The paths without the folders at their beginning that all share."""
    parts = [path.resolve().parts for path in paths]
    shared = min(len(commonprefix(parts)), *(len(one) - 1 for one in parts))
    return ["/".join(one[shared:]) for one in parts]


def read_run(path: Path, name: str) -> RunData:
    """The logs of a run, which may be going on. Raises InputError for a folder that is no run, or damaged."""
    if not is_run(path):
        raise InputError(f"{path} is no run of train.py: name the folder that --out named")
    folder = RunFolder(path)
    logs = {name: folder.log(name).rows for name in ("metrics", "evaluations", "samples")}
    file = path / "summary.json"
    try:
        summary = json.loads(file.read_bytes()) if file.is_file() else None
    except ValueError as error:
        raise InputError(f"{file} is not as train.py wrote it: remove it") from error
    metrics, averaged = thinned(logs["metrics"])
    return RunData(name, folder, folder.settings, metrics, averaged, logs["evaluations"], logs["samples"], summary)


def thinned(rows: list[dict[str, int | float]]) -> tuple[list[dict[str, int | float]], int]:
    """At most MOST_POINTS rows, each the mean of as many as it stands for (the last may be of fewer), and that number.

    Where a row stands, its step, seconds and bytes, is that of the last of those that it is the mean of.
    """
    size = -(-len(rows) // MOST_POINTS) or 1
    if size == 1:
        return rows, 1
    found = []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        means = {name: sum(row.get(name, 0.0) for row in part) / len(part) for name in part[-1]}
        found.append(
            means | {name: part[-1][name] for name in ("step", "seconds", "bytes", "dropped") if name in means}
        )
    return found, size

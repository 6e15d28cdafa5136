"""A run's folder, which alone is enough to go on with the run, export its student, and see how far it came.

    config.yaml        the settings
    run.json           when the run began, fingerprints of texts and models that it read, what changed when it went on
    student/           the student without what training changes (huggingface.folder.write_start)
    lock               held by the process that writes here
    metrics.jsonl, evaluations.jsonl, samples.jsonl, summary.json    run.recorder
    checkpoints/       run.checkpoint
    hf/                the student as transformers loads it (run.export)

A folder is made beside its place and moved there whole. So a run that is killed as it starts leaves nothing there, and
of two runs that start at once one is refused. What is replaced is moved aside first: nothing that appears in between is
ever removed.
"""

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import IO, Any

import jax
import yaml

from minalm.errors import InputError, check_at_least, flag
from minalm.huggingface.folder import Start, read_start
from minalm.parallel.distributed import is_first, of_first
from minalm.run.checkpoint import latest
from minalm.run.settings import flat

FORMAT = "minalm run 1"
MAY_CHANGE = (  # settings that may differ when a run is resumed; of texts, what they hold is compared, not their names
    *("data", "held_out", "data_cache"),
    *("config", "out", "resume", "overwrite", "accept_changes", "compilation_cache", "log_interval", "save_interval"),
    *(
        "tensorboard",
        "wandb",
        "evaluation_interval",
        "samples",
        "mesh",
        "steps",
        "remat",
        "accumulation",
        "compute_dtype",
    ),
)
REPORTED = ("steps", "remat", "accumulation", "compute_dtype", "mesh.fsdp", "mesh.tp")  # what changes the numbers


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a run is kept, and how often."""

    out: Path
    """Folder of the run: settings, logs, checkpoints/, summary.json, and hf/ with the student."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    overwrite: bool = False
    """Replace the run that is in --out."""
    accept_changes: bool = False
    """Go on though the text, a model or Python's library is not what the run began with."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    save_interval: int = 1000
    """Steps between checkpoints; the newest two are kept."""
    compilation_cache: Path | None = None
    """Folder in which JAX keeps compiled programs for the next start."""

    def check(self) -> None:
        """Raises InputError for values that make no sense."""
        check_at_least(self, {"log_interval": 1, "save_interval": 1})
        if self.resume and self.overwrite:
            raise InputError("--resume goes on with a run and --overwrite removes it: choose one")

    def use_compilation_cache(self) -> None:
        """Lets JAX keep what it compiles, if there is a folder for that."""
        if self.compilation_cache is not None:
            jax.config.update("jax_compilation_cache_dir", str(self.compilation_cache))


def is_run(path: Path) -> bool:
    """Whether train.py made this folder."""
    try:
        return json.loads((path / "run.json").read_bytes())["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError):
        return False


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run on disk. Of several processes the first alone writes."""

    path: Path
    lock: IO | None = None  # held as long as the run goes on

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def exported(self) -> Path:
        """The student as transformers loads it."""
        return self.path / "hf"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by the names of their flags. Raises InputError if config.yaml is not as it was written."""
        try:
            settings = yaml.safe_load((self.path / "config.yaml").read_text("utf-8"))
            if not isinstance(settings, dict):
                raise TypeError
            return flat(settings)
        except (yaml.YAMLError, RecursionError, TypeError, AttributeError, UnicodeDecodeError, OSError) as error:
            raise InputError(
                f"{self.path / 'config.yaml'} does not hold the settings of a run as this program writes them: "
                "name another folder"
            ) from error

    @property
    def start(self) -> Start:
        """The student without what training changes. Raises InputError if it is damaged."""
        return read_start(self.path / "student")

    def close(self) -> None:
        """Lets other processes write here."""
        if self.lock is not None:
            self.lock.close()

    def log(self, name: str, step: int | None = None) -> "JsonLines":
        """Opens a log. With `step`, the step that the run resumes from, later rows are dropped."""
        return JsonLines(self.path / f"{name}.jsonl", step)

    def check_seen(self, process: int) -> None:
        """Raises InputError on a process that does not see what the first has written."""
        if not (self.path / "config.yaml").is_file():
            raise InputError(f"process {process} does not see {self.path}: name an --out on a file system of all hosts")


def check_out(config: RunConfig, inputs: Sequence[Path]) -> None:
    """Raises InputError unless --out is free, or holds a run and the settings say what to do with it.

    `inputs` are the files and folders that the run reads: what is replaced may hold none of them.
    """
    out = config.out.resolve()
    if config.resume:
        if not is_run(out):
            raise InputError(f"there is no run in {config.out} to go on with: start it without --resume")
    elif not os.path.lexists(config.out):
        return
    elif not config.overwrite:
        raise InputError(
            f"{config.out} exists: go on with --resume, replace it with --overwrite, or name another --out"
        )
    elif not is_run(out):
        raise InputError(
            f"{config.out} is not a run of this program, so --overwrite leaves it alone: name another --out"
        )
    elif Path.cwd().is_relative_to(out):
        raise InputError(
            f"you are in {config.out}, so --overwrite leaves it alone: change the folder, or name another --out"
        )
    else:
        for path in inputs:
            if path.exists() and path.resolve().is_relative_to(out):
                raise InputError(
                    f"the run reads {path}, which --overwrite would remove with {config.out}: "
                    "move it, or name another --out"
                )


def open_run(
    config: RunConfig,
    inputs: Sequence[Path],
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    date: str,
    write_student: Callable[[Path], None],
) -> tuple["RunFolder", list[str]]:
    """Starts or resumes the run in --out. Also returns one sentence for each change since it began.

    Raises InputError as `start_run` and `resume_run` do.
    """
    if config.resume:
        return resume_run(config, settings, defaults, fingerprints)
    return start_run(config, inputs, settings, fingerprints, date, write_student), []


def run_date(config: RunConfig) -> str:
    """The day on which the run began, in ISO 8601, by the first process' clock: today, unless it is resumed."""
    today = datetime.now(UTC).date().toordinal()
    if config.resume and is_run(config.out):
        began = json.loads((config.out / "run.json").read_bytes()).get("date")
        today = today if began is None else date.fromisoformat(began).toordinal()
    return date.fromordinal(of_first(today)).isoformat()


def start_run(
    config: RunConfig,
    inputs: Sequence[Path],
    settings: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    date: str,
    write_student: Callable[[Path], None],
) -> RunFolder:
    """Makes --out, in place of the run that is there if `config.overwrite` says so; it appears whole or not at all.

    `settings` are those of config.yaml, `write_student` makes student/. Raises InputError as `check_out` does, and
    where another process is writing in --out.
    """
    out = config.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    new, old = (out.with_name(f".{out.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    new.mkdir()
    run = RunFolder(config.out, _locked(new))
    try:
        _write_settings(new, settings)
        write_student(new / "student")
        _write_json(new / "run.json", {"format": FORMAT, "date": date, "read": dict(fingerprints), "changes": []})
        check_out(config, inputs)
        if config.overwrite and out.exists():
            with _locked(out):
                out.rename(old)
        try:
            new.rename(out)
        except OSError as error:  # it is there again
            kept = f" (the run that was there is now {old})" if old.exists() else ""
            raise InputError(f"{config.out} was made by another program meanwhile{kept}: name another --out") from error
    except BaseException:
        run.close()
        shutil.rmtree(new)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return run


def resume_run(
    config: RunConfig,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    fingerprints: Mapping[str, str],
) -> tuple[RunFolder, list[str]]:
    """Opens the run in --out to resume it. Also returns one sentence for each change.

    A setting that is missing from the config.yaml of an older version is taken to be at its default. Raises InputError
    for settings that must not change, for unknown ones, where the run reads other texts or models than before unless
    `config.accept_changes`, and where another process is writing in --out.
    """
    run = RunFolder(config.out, _locked(config.out.resolve()))
    try:
        step = latest(run.checkpoints) or 0
        changes = changed_settings(config.out, run.settings, flat(settings), flat(defaults))
        if settings["steps"] < step:
            raise InputError(
                f"--steps is {settings['steps']} but the run in {config.out} has done {step}: give at least that"
            )
        record = json.loads((run.path / "run.json").read_bytes())
        names = dict.fromkeys([*fingerprints, *record["read"]])
        for name in (name for name in names if record["read"].get(name) != fingerprints.get(name)):
            if not config.accept_changes:
                raise InputError(
                    f"{name} is not what the run in {config.out} has read so far: give the same, "
                    "or go on with what there is by --accept-changes"
                )
            changes.append(f"{name} is not what the run has read so far")
        if changes:
            record["read"] = dict(fingerprints)
            record["changes"].append({"step": step, "changes": changes})
            _write_json(run.path / "run.json", record)
        _write_settings(run.path, settings)
    except BaseException:
        run.close()
        raise
    return run, changes


def changed_settings(
    out: Path, before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """One sentence for each changed setting that affects the numbers. Raises InputError as `resume_run` does."""
    for name in before.keys() - now.keys():
        raise InputError(
            f"{out / 'config.yaml'} has the setting {name!r}, which this version does not know: "
            "go on with the version that began the run, or start another"
        )
    changes = []
    for name, value in now.items():
        was = before.get(name, defaults.get(name))
        if value != was and name.split(".")[0] not in MAY_CHANGE:
            raise InputError(
                f"{flag(name)} is {value} but the run in {out} has {was}: give the same settings, or another --out"
            )
        if value != was and name in REPORTED:
            schedule = "; the learning rate now falls to the new last step" if name == "steps" else ""
            changes.append(f"{flag(name)} is {value} from here on and was {was}{schedule}")
    return changes


class JsonLines:
    """A file with one JSON object a line, each with its `step`.

    A run that goes on first drops what lies behind its checkpoint, after `step` steps. All processes know the rows, and
    the first writes them. Raises InputError for another file.
    """

    def __init__(self, path: Path, step: int | None = None):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        try:
            rows = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last may have been cut off
        except ValueError:
            rows = [None]
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise InputError(f"{path} is not as this program wrote it: remove it, or name another folder")
        self.path, self.rows = path, [row for row in rows if step is None or row["step"] <= step]
        if step is not None and is_first():
            _replace(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def at(self, step: int) -> dict[str, Any] | None:
        """The row of a step, if there is one."""
        return next((row for row in self.rows if row["step"] == step), None)

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        if is_first():
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.rows.append(row)


def _locked(folder: Path) -> IO:
    """An open file by which this process alone may write in a run's folder, until it is closed or the process ends."""
    file = (folder / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(f"a run is going on in {folder}: wait for its end, or name another --out") from error
    return file


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    _replace(folder / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def _write_json(file: Path, value: Any) -> None:
    _replace(file, json.dumps(value, indent=2) + "\n")


def _replace(file: Path, text: str) -> None:
    """Writes a file that is whole at any time."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, "utf-8")
    partial.replace(file)

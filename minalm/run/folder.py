"""A run's folder, which alone is enough to go on with the run, export its student, and see how far it came.

    config.yaml        the settings, with a hash of them
    run.json           when the run began, fingerprints of texts and models that it read, what changed when it went on,
                       hashes of student/ and, when the run is finished, of hf/ and summary.json
    student/           the student without what training changes (huggingface.folder.write_start)
    lock               held by the process that writes here
    metrics.jsonl, evaluations.jsonl, samples.jsonl, summary.json    run.recorder
    checkpoints/       run.checkpoint
    hf/                the student as transformers loads it (run.export)

A folder is made beside its place and moved there whole. So a run that is killed as it starts leaves nothing there, and
of two runs that start at once one is refused. What is replaced is moved aside first: nothing that appears in between is
ever removed. All that is read again to go on has a hash: a damaged file is named, never believed.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import IO, Any

import jax
import yaml

from minalm.errors import InputError, check_at_least, flag
from minalm.files import Digest, digest, digests, first_changed, read_record, replace, write_record
from minalm.huggingface.folder import Start, read_start
from minalm.parallel.distributed import is_first, of_first
from minalm.run.checkpoint import BESIDE, manifest, newest_whole
from minalm.run.settings import flat

FORMAT = "minalm run 2"
FINISHED = -1  # in the place of the step from which a run goes on
MAY_CHANGE = (  # settings that may differ when a run is resumed; of texts, what they hold is compared, not their names
    *("data", "held_out", "data_cache"),
    *("config", "out", "resume", "overwrite", "accept_changes", "compilation_cache", "log_interval", "save_interval"),
    *("keep", "keep_every", "best", "skip_bad_steps", "tensorboard", "wandb"),
    *("evaluation_interval", "samples", "mesh", "steps", "remat", "accumulation", "compute_dtype"),
)
AFTER_BAD_NUMBERS = ("learning_rate", "warmup_steps", "clip_norm")  # and these, if numbers were not finite
REPORTED = (  # what changes the numbers
    *("steps", "remat", "accumulation", "compute_dtype", "mesh.fsdp", "mesh.tp", "skip_bad_steps"),
    *AFTER_BAD_NUMBERS,
)
LOGS = ("metrics", "evaluations", "samples")


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
    """Steps between checkpoints. There is one after the first step too, which shows that the disk can be written."""
    keep: int = 2
    """How many of the newest checkpoints are kept."""
    keep_every: int | None = None
    """Also keep the checkpoints after each so many steps, of those that are saved."""
    best: bool = False
    """Also keep the checkpoint of the lowest bits per byte on held-out text, saved when it is found, and write hf/ from
    it. Needs --evaluation-interval."""
    compilation_cache: Path | None = None
    """Folder in which JAX keeps compiled programs for the next start."""

    def check(self) -> None:
        """Raises InputError for values that make no sense."""
        check_at_least(self, {"log_interval": 1, "save_interval": 1, "keep": 1, "keep_every": 1})
        check_name(self.out)
        if self.resume and self.overwrite:
            raise InputError("--resume goes on with a run and --overwrite removes it: choose one")

    def use_compilation_cache(self) -> None:
        """Lets JAX keep what it compiles, if there is a folder for that."""
        if self.compilation_cache is not None:
            jax.config.update("jax_compilation_cache_dir", str(self.compilation_cache))


def check_name(out: Path) -> None:
    """Raises InputError for an --out that is no folder of this machine's file system."""
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise InputError(f"--out {str(out)!r} is not UTF-8: name another folder") from None
    if scheme := re.match("[A-Za-z][A-Za-z0-9+.-]*:/", str(out)):
        raise InputError(
            f"--out {out} names {scheme[0]}/, but a run is written to folders: mount it, or name a folder of a disk"
        )
    place = str(out.absolute())
    if re.search(r"[\\\[\]]|:/", place) or not place.isprintable():
        raise InputError(
            f"--out {place!r}: checkpoints cannot be read again from folders with \\, [, ], or a colon at the end of a name, "
            "or with characters that do not print: name another folder"
        )


def is_run(path: Path) -> bool:
    """Whether train.py made this folder."""
    try:
        return str(json.loads((path / "run.json").read_bytes())["format"]).startswith("minalm run ")
    except (OSError, ValueError, TypeError, KeyError):
        return False


def read_run(out: Path) -> dict[str, Any]:
    """What run.json says. Raises InputError if there is none, or none as this version writes it."""
    try:
        if is_run(out) and json.loads((out / "run.json").read_bytes())["format"] != FORMAT:
            raise InputError(f"the run in {out} is of an earlier version: go on with that, or name another --out")
        return read_record(out / "run.json")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"there is no run in {out} to go on with: start it without --resume") from None


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
            content = (self.path / "config.yaml").read_bytes()
            text, _, mark = content.decode().rpartition("# ")
            settings = yaml.safe_load(text)
            if not isinstance(settings, dict) or mark != _mark(text):
                raise TypeError
            return flat(settings)
        except (
            yaml.YAMLError,
            RecursionError,
            TypeError,
            AttributeError,
            UnicodeDecodeError,
            FileNotFoundError,
        ) as error:
            raise InputError(
                f"{self.path / 'config.yaml'} does not hold the settings of a run as this program wrote them: "
                "restore it, or name another folder"
            ) from error

    @property
    def start(self) -> Start:
        """The student without what training changes. Raises InputError if it is damaged."""
        if (why := first_changed(self.path / "student", read_run(self.path)["student"])) is not None:
            raise InputError(f"{why}: restore it from a copy, or let train.py --resume write it again")
        return read_start(self.path / "student")

    def close(self) -> None:
        """Lets other processes write here."""
        if self.lock is not None:
            self.lock.close()

    def log(self, name: str, step: int | None = None) -> "JsonLines":
        """Opens a log. With `step`, the step that the run resumes from, later rows are dropped."""
        return JsonLines(self.path / f"{name}.jsonl", step)

    def log_digests(self) -> dict[str, Digest]:
        """Size and hash of each log as it is now, on disk afterwards."""
        files = [self.path / f"{name}.jsonl" for name in LOGS]
        return {file.name: digest(file) for file in files if file.exists()}

    def update_record(self, **changes: Any) -> None:
        """Changes values of run.json, on the first process; None removes one."""
        if is_first():
            record = {**read_run(self.path), **changes}
            write_record(self.path / "run.json", {name: value for name, value in record.items() if value is not None})

    def finish(self, steps: int, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, and notes that the run is finished."""
        replace(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        files = {f"hf/{name}": found for name, found in digests(self.exported).items()}
        files |= {**self.log_digests(), "summary.json": digest(self.path / "summary.json")}
        self.update_record(finished={"steps": steps, "files": files}, not_finite=None)

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
        read_run(config.out)
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
) -> tuple["RunFolder", int, list[str]]:
    """Starts or resumes the run in --out. Also returns the step from which it goes on, or FINISHED, and one sentence for
    each change since it began.

    Raises InputError as `start_run` and `resume_run` do.
    """
    if config.resume:
        return resume_run(config, settings, defaults, fingerprints, write_student)
    return start_run(config, inputs, settings, fingerprints, date, write_student), 0, []


def run_date(config: RunConfig) -> str:
    """The day on which the run began, in ISO 8601, by the first process' clock: today, unless it is resumed."""
    today = datetime.now(UTC).date().toordinal()
    if config.resume:
        with contextlib.suppress(InputError, OSError):  # `check_out` says it, in the place where all processes hear it
            today = date.fromisoformat(read_run(config.out)["date"]).toordinal()
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
    _clear_left_overs(out)
    new, old = (out.with_name(f".{out.name}.{kind}-{uuid.uuid4().hex[:12]}") for kind in ("new", "old"))
    new.mkdir()
    run = RunFolder(config.out, _locked(new))
    try:
        _write_settings(new, settings)
        write_student(new / "student")
        record = {"format": FORMAT, "date": date, "read": dict(fingerprints), "changes": []}
        write_record(new / "run.json", {**record, "student": digests(new / "student")})
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
    write_student: Callable[[Path], None],
) -> tuple[RunFolder, int, list[str]]:
    """Opens the run in --out to resume it. Also returns the step from which it goes on, or FINISHED, and one sentence for
    each change, and for each thing that is not as it was left.

    A setting that is missing from the config.yaml of an older version is taken to be at its default. Raises InputError
    for settings that must not change, for unknown ones, where the run reads other texts or models than before unless
    `config.accept_changes`, for what is damaged and cannot be made again, and where another process is writing in --out.
    """
    run = RunFolder(config.out, _locked(config.out.resolve()))
    try:
        _clear_left_overs(config.out.resolve())
        record = read_run(config.out)
        may_change = MAY_CHANGE + (AFTER_BAD_NUMBERS if "not_finite" in record else ())
        changes = changed_settings(config.out, run.settings, flat(settings), flat(defaults), may_change)
        names = dict.fromkeys([*fingerprints, *record["read"]])
        for name in (name for name in names if record["read"].get(name) != fingerprints.get(name)):
            if not config.accept_changes:
                raise InputError(
                    f"{name} is not what the run in {config.out} has read so far: give the same, "
                    "or go on with what there is by --accept-changes"
                )
            changes.append(f"{name} is not what the run has read so far")
        notes = _write_student_again(run, record, write_student)
        finished = record.get("finished", {"steps": None})
        if finished["steps"] == settings["steps"]:
            why = first_changed(run.path, finished["files"])
            if why is None:
                return run, FINISHED, [*changes, *notes]
            notes.append(f"{why}: hf/ and summary.json are written again")
        step, found = newest_whole(run.checkpoints)
        notes += found
        if step is None:
            _check_nothing_saved(run, config.save_interval)
            notes.append(f"nothing was saved of the run in {config.out}: it begins again")
        elif settings["steps"] < step:
            raise InputError(
                f"--steps is {settings['steps']} but the run in {config.out} has done {step}: give at least that"
            )
        else:
            notes.append(f"the run goes on from the checkpoint after step {step:,}{_further_rows(run, step)}")
            notes += _check_logs(run, step, manifest(run.checkpoints, step)["logs"], config.accept_changes)
        (run.path / "summary.json").unlink(missing_ok=True)
        record |= {"read": dict(fingerprints)}
        if changes:
            record["changes"].append({"step": step or 0, "changes": changes})
        record.pop("finished", None)
        write_record(run.path / "run.json", record)
        _write_settings(run.path, settings)
    except BaseException:
        run.close()
        raise
    return run, step or 0, [*changes, *notes]


def _write_student_again(run: RunFolder, record: Mapping[str, Any], write_student: Callable[[Path], None]) -> list[str]:
    """student/, where it is not as it was written: it follows from the models and the seed."""
    place = run.path / "student"
    why = first_changed(place, record["student"])
    if why is None:
        return []
    shutil.rmtree(place, ignore_errors=True)
    write_student(place)
    if (still := first_changed(place, record["student"])) is not None:
        raise InputError(
            f"{why}, and what the models give now is something else ({still}): start again under another --out"
        )
    return [f"{why}: student/ is written again"]


def _check_nothing_saved(run: RunFolder, save_interval: int) -> None:
    """Raises InputError if a log shows that there were checkpoints."""
    done = max((row["step"] for row in JsonLines(run.path / "metrics.jsonl", lenient=True).rows), default=0)
    if done > save_interval:
        raise InputError(
            f"{run.checkpoints} is empty, but the run has done {done:,} steps: restore its checkpoints, "
            "or start it again with --overwrite"
        )


def _further_rows(run: RunFolder, step: int) -> str:
    """Where the log goes further than the checkpoint."""
    done = max((row["step"] for row in JsonLines(run.path / "metrics.jsonl", lenient=True).rows), default=0)
    return f"; steps up to {done:,} had been logged and are done again" if done > step else ""


def _check_logs(run: RunFolder, step: int, expected: Mapping[str, Digest], accept: bool) -> list[str]:
    """Logs that are not as they were when the checkpoint after `step` was written. Raises InputError for one, unless
    `accept`: then a copy is set aside, and one sentence for each returned."""
    notes = []
    for name, (size, content) in expected.items():
        file = run.path / name
        found = digest(file, size) if file.exists() else [0, None]
        if found == [size, content]:
            continue
        why = "has other contents than were written" if found[0] == size else f"has lost {size - found[0]:,} bytes"
        if not accept:
            raise InputError(
                f"{file} {why} up to step {step:,}: restore it, or go on with what is left by --accept-changes"
            )
        if file.exists():
            shutil.copyfile(file, file.with_name(f"{name}.damaged"))
            replace(file, "".join(json.dumps(row) + "\n" for row in JsonLines(file, lenient=True).rows))
        notes.append(f"{file} {why}: rows are missing from here on; a copy is {name}.damaged")
    return notes


def changed_settings(
    out: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    defaults: Mapping[str, Any],
    may_change: Sequence[str] = MAY_CHANGE,
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
        if value != was and name.split(".")[0] not in may_change:
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
    the first writes them. Raises InputError for another file; if `lenient`, what cannot be read is left out.
    """

    def __init__(self, path: Path, step: int | None = None, lenient: bool = False):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        rows = [_row(line) for line in lines if line.endswith(b"\n")]  # the last may have been cut off
        if None in rows and not lenient:
            raise InputError(f"{path} is not as this program wrote it: remove it, or name another folder")
        rows = [row for row in rows if row is not None]
        self.path, self.rows = path, [row for row in rows if step is None or row["step"] <= step]
        if step is not None and is_first():
            replace(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def at(self, step: int) -> dict[str, Any] | None:
        """The row of a step, if there is one."""
        return next((row for row in self.rows if row["step"] == step), None)

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        if is_first():
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.rows.append(row)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _locked(folder: Path) -> IO:
    """An open file by which this process alone may write in a run's folder, until it is closed or the process ends."""
    file = (folder / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(f"a run is going on in {folder}: wait for its end, or name another --out") from error
    return file


def _clear_left_overs(out: Path) -> None:
    """Removes what killed runs left half-written in --out, which is locked or not there yet, and beside it."""
    for path in (*out.glob(f"checkpoints/*{BESIDE}*"), *out.glob(".hf.partial-*"), *out.glob("*.partial")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in out.parent.glob(f".{glob.escape(out.name)}.new-*"):
        with contextlib.suppress(InputError, OSError), _locked(path):  # another run may be starting
            shutil.rmtree(path)
    if is_run(out):
        for path in out.parent.glob(f".{glob.escape(out.name)}.old-*"):  # replaced by it
            with contextlib.suppress(InputError, OSError), _locked(path):
                shutil.rmtree(path)


def _mark(text: str) -> str:
    """What stands below the settings."""
    return f"sha256 of the lines above: {hashlib.sha256(text.encode()).hexdigest()}\n"


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    replace(folder / "config.yaml", f"{text}# {_mark(text)}")

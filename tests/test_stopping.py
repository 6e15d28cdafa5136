"""Stopping a run and going on with it: signals, checkpoints, damage, and numbers that are not finite.

The runs are those of test_kills.py: a small model of random weights that learns the next token.
"""

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import configs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_kills
from safetensors.numpy import load_file, save_file
from test_train import exported, lines, make_files, rows, tree

import train
from minalm.distill.losses import LossConfig
from minalm.run import checkpoint, console, folder
from minalm.run.checkpoint import Checkpoints
from minalm.run.folder import JsonLines, RunFolder

ROOT = Path(__file__).parents[1]
STEPS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module", autouse=True)
def quick_runs(files):
    """The preset, compiled quickly."""
    preset = configs.change(test_kills.preset(files.data.parent), steps=STEPS)
    taught = configs.change(preset, architecture=None, teacher=files.untied, losses=LossConfig(), teacher_length=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "tiny", ("", preset))
        patch.setitem(train.PRESETS, "taught", ("", taught))
        patch.setattr(console.console, "width", 10_000)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def run(out: Path, *words: object, preset: str = "tiny") -> None:
    train.cli([preset, "--out", str(out), *map(str, words)])


def refused(out: Path, *words: object, preset: str = "tiny") -> str:
    """The sentence that a command line is refused with."""
    with pytest.raises(SystemExit) as error:
        run(out, *words, preset=preset)
    assert isinstance(error.value.code, str), error.value.code
    assert error.value.code.startswith("error: ") and "\n" not in error.value.code
    return error.value.code


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run that was left alone, with all its checkpoints."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    run(out, "--save-interval", 1, "--keep", 9)
    return out


@pytest.fixture
def stopped(alone, tmp_path) -> Path:
    """The run as a kill after step 4 would leave it: with the checkpoints of steps 3 and 4."""
    out = tmp_path / "run"
    leave = shutil.ignore_patterns("hf", "summary.json", "1", "2", "5", "6")
    shutil.copytree(alone, out, ignore=leave)
    for name in ("metrics", "evaluations"):
        log = JsonLines(out / f"{name}.jsonl", step=4)
        assert log.rows
    record = folder.read_run(out)
    record.pop("finished")
    folder.write_record(out / "run.json", record)
    return out


def assert_same(found: Path, expected: Path) -> None:
    assert lines(found) == lines(expected) and rows(found, "evaluations") == rows(expected, "evaluations")
    for name, value in exported(expected).items():
        np.testing.assert_array_equal(exported(found)[name], value, err_msg=name)


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_ends_the_step_and_saves(alone, tmp_path, monkeypatch, capsys, number):
    write, out = JsonLines.write, tmp_path / "run"

    def asked(self, row):
        write(self, row)
        if row["step"] == 2 and self.path.name == "metrics.jsonl":
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "write", asked)
        before = signal.getsignal(number)
        run(out)  # ends as if it were done
        assert signal.getsignal(number) == before
    (step,) = {lines(out)[-1]["step"], checkpoint.steps(out / "checkpoints")[-1]}  # none is lost
    assert 2 < step < STEPS and not (out / "summary.json").exists()
    assert f"stands after step {step}, which is saved: the same command with --resume goes on" in said(capsys)
    run(out, "--resume")
    assert f"goes on from the checkpoint after step {step}." in said(capsys)
    assert_same(out, alone)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_second_signal_ends_the_process_at_once(tmp_path, number):
    """Though the main thread runs no Python: here it sleeps with signals held back, as XLA may compile."""
    code = """
import ctypes, sys
from pathlib import Path
from minalm.run.stop import StopSignals
with StopSignals(Path("run")) as signals, signals.in_loop():
    print("ready", flush=True)
    while True:
        ctypes.CDLL(None).sleep(100)
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert "ends its step and saves; a second signal ends it at once" in process.stderr.readline()
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number


def test_a_signal_outside_of_the_steps(stopped, tmp_path, monkeypatch, capsys):
    """While a run is being read there is nothing to save. It says so, and where it stands if it goes on."""
    load = train.load_texts

    def asked(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*arguments)

    monkeypatch.setattr(train, "load_texts", asked)
    for out, words, code, sentence in (
        (tmp_path / "new", [], 143, "Ended before a step was saved"),
        (stopped, ["--resume"], 0, "stands after step 4, which is saved"),
    ):
        with pytest.raises(SystemExit) as end:
            run(out, *words)
        assert end.value.code == code and sentence in said(capsys)
    assert not (tmp_path / "new").exists() and [path.name for path in tmp_path.iterdir()] == ["run"]


# --- checkpoints --------------------------------------------------------------------------------------------------


def small(step: int) -> dict:
    return {"student": {"x": jnp.full((40, 30), float(step)), "y": jnp.ones(3)}, "rest": {"step": jnp.int32(step)}}


def test_a_checkpoint_is_a_copy(tmp_path):
    """What is written beside training does not change with it, though the step gives its memory to the next."""
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"student": {f"x{n}": jnp.zeros((700, 300)) for n in range(4)}, "rest": {"step": jnp.int32(0)}}
    with Checkpoints(tmp_path / "c", newest=4) as checkpoints:
        for _ in range(4):
            state = update(state)
            checkpoints.save(int(state["rest"]["step"]), state, {}, {})
            for _ in range(3):
                state = update(state)
    steps = checkpoint.steps(tmp_path / "c")
    assert steps == [1, 5, 9, 13]
    for step in steps:
        found = checkpoint.restore(tmp_path / "c", state, step)
        assert {float(value) for x in found["student"].values() for value in (x.min(), x.max())} == {step}


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 4]) + content[len(content) // 2 + 1 :]
    ),
    "empty": lambda content: b"",
    "deleted": None,
}
UNUSED = ("_CHECKPOINT_METADATA", "commit_success.txt")  # a checkpoint without them is whole


def damaged(file: Path, kind: str) -> None:
    content = file.read_bytes()
    if kind == "deleted":
        file.unlink()
    else:
        file.write_bytes(DAMAGE[kind](content))
        assert file.read_bytes() != content


def test_every_damaged_file_of_a_checkpoint_is_found(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small(step), {"seconds": 1.5}, {})
    assert checkpoint.manifest(tmp_path / "c", 2)["progress"] == {"seconds": 1.5}
    place, found = tmp_path / "c" / "2", set()
    files = [file for file in place.rglob("*") if file.is_file()]
    for file, kind in itertools.product(files, DAMAGE):
        content = file.read_bytes()
        damaged(file, kind)
        why = checkpoint.damage(tmp_path / "c", 2)
        if why is None:
            found.add(str(file.relative_to(place)))
            assert checkpoint.restore(tmp_path / "c", small(0), 2)["student"]["x"].max() == 2
        else:
            assert str(file) in why
        file.write_bytes(content)
    assert found == set(UNUSED)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(alone, stopped, capsys):
    arrays = max((stopped / "checkpoints/4/student").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
    damaged(arrays, "flipped")
    run(stopped, "--resume")
    words = said(capsys)
    assert f"the checkpoint after step 4 is damaged ({arrays} has other contents than were written)" in words
    assert "goes on from the checkpoint after step 3; steps up to 4 had been logged and are done again" in words
    assert (stopped / "checkpoints" / "damaged-4").is_dir()
    assert_same(stopped, alone)


def test_where_all_are_damaged_nothing_is_changed(stopped):
    for step in (3, 4):
        damaged(stopped / "checkpoints" / str(step) / "manifest.json", "truncated")
    before = tree(stopped)
    assert "no checkpoint in" in refused(stopped, "--resume")
    shutil.rmtree(stopped / "checkpoints")
    assert "is empty, but the run has done 4 steps" in refused(stopped, "--resume")
    assert before.items() >= tree(stopped).items()


def test_a_run_of_which_nothing_was_saved_says_so(alone, stopped, capsys):
    shutil.rmtree(stopped / "checkpoints")
    JsonLines(stopped / "metrics.jsonl", step=1)
    run(stopped, "--resume")
    assert "nothing was saved of the run" in said(capsys)
    assert_same(stopped, alone)


def test_which_checkpoints_are_kept(tmp_path):
    best = {"step": None}
    with Checkpoints(tmp_path / "c", newest=2, every=4, best=lambda: best["step"]) as checkpoints:
        for step in range(1, 10):
            best["step"] = {3: 3, 6: 6}.get(step, best["step"])
            checkpoints.save(step, small(step), {}, {})
        checkpoints.wait()
        assert checkpoint.steps(tmp_path / "c") == [4, 6, 8, 9]
    with Checkpoints(tmp_path / "c", newest=1) as checkpoints:  # another part of the run
        checkpoints.save(10, small(10), {}, {})
    assert checkpoint.steps(tmp_path / "c") == [10]


def test_the_best_student_is_the_result(tmp_path, monkeypatch):
    """Of evaluations after steps 2, 4 and 6, the second is made the best."""
    write = JsonLines.write

    def changed(self, row):
        if self.path.name == "evaluations.jsonl" and row["step"] == 4:
            row["bits_per_byte"]["student"] = 0.5
        write(self, row)

    monkeypatch.setattr(JsonLines, "write", changed)
    run(tmp_path / "run", "--best", "--evaluation-interval", 2, "--save-interval", 5, "--keep", 1)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4, 6]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_step"] == 4
    start = RunFolder(tmp_path / "run").start
    for step, same in ((4, True), (6, False)):
        like = {"student": start.trained()}
        student = start.model(checkpoint.restore(tmp_path / "run" / "checkpoints", like, step)["student"])
        (name,) = (name for name in exported(tmp_path / "run") if name.endswith("embed_tokens.weight"))
        found = exported(tmp_path / "run")[name]
        assert np.array_equal(found, np.asarray(student.embed)[: len(found)]) == same


def test_the_best_needs_something_to_be_measured_by(tmp_path):
    assert "--best compares checkpoints on held-out text" in refused(
        tmp_path / "run", "--best", "--evaluation-interval", "None"
    )


def test_a_checkpoint_that_cannot_be_written(alone, tmp_path, monkeypatch):
    """In a sentence that names the file; what was saved before stays, and the run goes on from there."""
    write = checkpoint.write_record

    def full(file, record):
        if record["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        write(file, record)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_record", full)
        found = refused(tmp_path / "run")
    assert f"{tmp_path / 'run' / 'checkpoints' / '4'} could not be written (No space left on device: " in found
    assert "the run stands after step 2: change that and go on with --resume" in found
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"1", "2"}
    assert not (tmp_path / "run" / "summary.json").exists()
    run(tmp_path / "run", "--resume")
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_state_lies_on_another_mesh_as_it_was(stopped, tmp_path, monkeypatch):
    """Bit for bit; and the next steps differ by rounding."""
    states, train_as_it_is = [], train.train

    def kept(config, recorder, signals, optimizer, state, frozen):
        states.append(jax.device_get(train.items(state)))
        train_as_it_is(config, recorder, signals, optimizer, state, frozen)

    monkeypatch.setattr(train, "train", kept)
    for name, mesh in (("one", (1, 1)), ("eight", (4, 2))):
        shutil.copytree(stopped, tmp_path / name)
        words = ["--steps", 24, "--mesh.fsdp", mesh[0], "--mesh.tp", mesh[1]]
        run(tmp_path / name, "--resume", *words)
    ones, eights = (jax.tree.leaves(state) for state in states)
    assert len(ones) == len(eights) > 20
    for one, eight in zip(ones, eights, strict=True):
        np.testing.assert_array_equal(one, eight)
    rows_ = [[row["loss/sft"] for row in lines(tmp_path / name)] for name in ("one", "eight")]
    assert len(rows_[0]) == 24
    np.testing.assert_allclose(*rows_, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root mounts a disk")
@pytest.mark.parametrize("limits", ("size=20k", "size=200k", "size=400k", "size=8m,nr_inodes=40", "size=8m,ro"))
def test_a_disk_that_is_full_or_read_only(tmp_path, limits):
    """One sentence that names a file, nothing that looks finished, and the run goes on when there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", limits, "tmpfs", disk], check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        found = refused(disk / "run")
        assert str(disk) in found and ("No space left on device" in found or "Read-only file system" in found), found
        assert not (disk / "run" / "summary.json").exists() and not list(disk.glob(".*"))
        if (disk / "run").exists():
            subprocess.run(["mount", "-o", "remount,size=9m,nr_inodes=0", disk], check=True)
            run(disk / "run", "--resume")
            assert (disk / "run" / "summary.json").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_files_that_the_system_lets_grow_no_further(tmp_path):
    """A limit on the size of a file."""
    words = "quickstart --steps 2 --warmup-steps 1 --samples 0 --evaluation-rows 4 --out".split()
    limited = [
        "bash",
        "-c",
        'ulimit -f 4000; exec "$0" "$@"',
        sys.executable,
        ROOT / "train.py",
        *words,
        tmp_path / "run",
    ]
    done = subprocess.run(limited, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}, check=False)
    assert done.returncode == 1 and not (tmp_path / "run" / "summary.json").exists()
    assert re.search(r"^error: .*could not be written \(File too large: .*nothing is saved", done.stderr, re.MULTILINE)


# --- the folder of a run --------------------------------------------------------------------------------------------

# What happens at a resume with a damaged file: "refused" or "accepted" with words, or "again" where it is made again.
FOLDER = {
    "run.json": "refused",
    "config.yaml": "refused",
    "metrics.jsonl": "refused",
    "evaluations.jsonl": "refused",
    "student/config.json": "again",
    "student/tokenizer.json": "again",
    "student/tokenizer_config.json": "again",
    "student/generation_config.json": "again",
    "student/frozen.safetensors": "again",
    "lock": "accepted",
}


@pytest.fixture
def untrained(monkeypatch):
    """Runs end before the first step."""
    monkeypatch.setattr(train, "train", lambda *_: None)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "flipped")) for k in DAMAGE])
def test_damaged_files_of_a_run(stopped, untrained, capsys, kind):
    files = {str(file.relative_to(stopped)) for file in stopped.rglob("*") if file.is_file()}
    assert {name for name in files if not name.startswith("checkpoints/")} == FOLDER.keys() | {"samples.jsonl"}
    for name, expected in FOLDER.items():
        file = stopped / name
        content = file.read_bytes()
        if not content:
            continue
        damaged(file, kind)
        if expected == "refused":
            found = refused(stopped, "--resume")
            assert str(file) in found or name == "run.json" and "there is no run in" in found, found
            file.write_bytes(content)
        else:
            run(stopped, "--resume")
            assert expected == "accepted" or f"{file} " in said(capsys)
            assert file.read_bytes() == content


def test_logs_that_lost_rows_are_accepted_by_a_flag(alone, stopped, capsys):
    file = stopped / "metrics.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"step": 2', b'"stex": 2'))
    run(stopped, "--resume", "--accept-changes")
    assert f"{file} has other contents than were written: rows are missing" in said(capsys)
    assert [row["step"] for row in lines(stopped)] == [1, 3, 4, 5, 6]
    assert (stopped / "metrics.jsonl.damaged").exists()
    for name, value in exported(alone).items():
        np.testing.assert_array_equal(exported(stopped)[name], value)


def test_a_finished_run_says_so(alone, tmp_path, capsys):
    """Without a word to the disk; what is damaged of the result is written again."""
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run(out, "--resume", "--save-interval", 1, "--keep", 9)
    assert "is finished: a larger --steps goes on with it" in said(capsys)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    damaged(out / "hf" / "model.safetensors", "flipped")
    run(out, "--resume")
    assert "hf/ and summary.json are written again" in said(capsys)
    assert_same(out, alone)


def test_left_overs_are_cleared(stopped, untrained):
    for name in (".hf.partial-77", "checkpoints/5.orbax-checkpoint-tmp", "../.run.new-77", "../.run.old-77"):
        (stopped / name).mkdir()
        (stopped / name / "x").write_text("x")
    (stopped / "config.yaml.partial").write_text("x")
    with folder._locked(stopped.parent / ".run.new-77"):  # another run is being made there
        run(stopped, "--resume")
        assert (stopped.parent / ".run.new-77").exists()
    run(stopped, "--resume")
    assert [path.name for path in stopped.parent.iterdir()] == ["run"]
    assert not [path for path in stopped.rglob("*") if "partial" in path.name or "tmp" in path.name]


def test_names_that_are_no_folders(tmp_path):
    for name, words in (
        ("gs://bucket/run", "mount it, or name a folder"),
        (f"{tmp_path}/a\\b", "cannot be read again from folders with"),
        (f"{tmp_path}/a[0]", "cannot be read again from folders with"),
        (f"{tmp_path}/gs:/run", "cannot be read again from folders with"),
        (f"{tmp_path}/a\nb", "cannot be read again from folders with"),
        (f"{tmp_path}/\udcff", "is not UTF-8"),
    ):
        assert words in refused(Path(name) if "://" not in name else name)
    assert not list(tmp_path.iterdir())


def swap_ids(path: Path) -> None:
    spec = json.loads(path.read_text())
    words = [word for word, i in spec["model"]["vocab"].items() if i in (270, 271)]
    spec["model"]["vocab"][words[0]], spec["model"]["vocab"][words[1]] = 271, 270
    path.write_text(json.dumps(spec))


def change_json(name: str, **values: object):
    def change(root: Path) -> None:
        path = root / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))

    return change


def change_text(change):
    return lambda path: path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())) + b"\n")


def scaled(root: Path) -> None:
    path = root / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * np.float32(1.0001)}, path, {"format": "pt"})


CHANGES = {  # what is changed -> where, how, and what is named
    "half of the lines": ("data.jsonl", change_text(lambda lines: lines[::2]), "the training text"),
    "lines reversed": ("data.jsonl", change_text(lambda lines: lines[::-1]), "the training text"),
    "a letter": (
        "data.jsonl",
        change_text(lambda lines: [lines[0].replace(b"the", b"thy"), *lines[1:]]),
        "the training",
    ),
    "a line more": ("data.jsonl", change_text(lambda lines: [*lines, lines[0]]), "the training text"),
    "held-out text": ("held_out.jsonl", change_text(lambda lines: lines[1:]), "the held-out text"),
    "other weights": ("untied", scaled, "the model of --teacher"),
    "a setting of the model": ("untied", change_json("config.json", rms_norm_eps=1e-3), "the model of --teacher"),
    "two ids": ("untied/tokenizer.json", swap_ids, "the model of --teacher"),
    "special tokens": ("untied", change_json("tokenizer_config.json", eos_token=None), "the model of --teacher"),
    "sampling": ("untied", change_json("generation_config.json", top_k=3), "the model of --teacher"),
    "a template": (
        "untied",
        lambda root: (root / "chat_template.jinja").write_text("{{ 1 }}"),
        "the model of --teacher",
    ),
    "two ids of the student": ("other/tokenizer.json", swap_ids, "the tokenizer of --student-tokenizer"),
}


def test_what_a_run_reads_may_not_change(files, tmp_path, untrained):
    root = tmp_path / "read"
    shutil.copytree(files.data.parent, root)
    words = [
        "--data",
        root / "data.jsonl",
        "--held-out",
        root / "held_out.jsonl",
        "--student-tokenizer",
        root / "other",
    ]
    words += ["--teacher", root / "untied"]
    run(tmp_path / "run", *words, preset="taught")
    before = tree(tmp_path / "run")
    kept = tree(root)
    for place, change, name in CHANGES.values():
        change(root / place)
        assert tree(root) != kept
        found = refused(tmp_path / "run", *words, "--resume", preset="taught")
        assert f"error: {name}" in found and "--accept-changes" in found
        for path in [path for path in root.rglob("*") if path.is_file()]:
            path.unlink()
        for path, content in kept.items():
            (root / path).write_bytes(content)
    assert tree(tmp_path / "run") == before


# --- numbers that are not finite ------------------------------------------------------------------------------------


@pytest.fixture
def bad_batches(monkeypatch):
    """Makes the numbers of some calls of the step NaN."""

    def make(bad: set[int]) -> None:
        original, count = train.shard_rows, itertools.count(1)

        def shard_rows(batch, mesh):
            factor = np.float32(np.nan if next(count) in bad else 1.0)
            student = dataclasses.replace(batch.student, weight=batch.student.weight * factor)
            return original(dataclasses.replace(batch, student=student), mesh)

        monkeypatch.setattr(train, "shard_rows", shard_rows)

    return make


def test_bad_steps_change_nothing(tmp_path, bad_batches, capsys):
    bad_batches({3})
    out = tmp_path / "run"
    run(out, "--skip-bad-steps", 1, "--save-interval", 1, "--keep", 9)
    words = said(capsys)
    assert "step 3 changed nothing" in words and "1 of --skip-bad-steps 1" in words and "data.jsonl, line " in words
    assert [row["step"] for row in lines(out)] == [1, 2, 4, 5, 6]
    assert json.loads((out / "summary.json").read_text())["skipped_steps"] == 1
    start = RunFolder(out).start
    student = [
        jax.tree.leaves(checkpoint.restore(out / "checkpoints", {"student": start.trained()}, step)["student"])
        for step in (2, 3, 4)
    ]
    assert all(np.array_equal(*pair) for pair in zip(student[0], student[1], strict=True))
    assert not all(np.array_equal(*pair) for pair in zip(student[1], student[2], strict=True))
    moments = [(out / "checkpoints" / str(step) / "rest").rglob("*") for step in (2, 3)]
    assert all(list(each) for each in moments)


def test_a_bad_step_ends_the_run_and_it_goes_on_otherwise(alone, tmp_path, bad_batches, capsys):
    out = tmp_path / "run"
    bad_batches({4})
    found = refused(out, "--save-interval", 1, "--keep", 9)
    assert "step 4 gave numbers that are not finite (gradient_norm nan, loss/sft nan)" in found
    assert (
        "the checkpoint after step 3 leads there and is set aside; the last good checkpoint is that after step 2"
        in found
    )
    assert "--learning-rate is" in refused(alone, "--resume", "--learning-rate", 1e-5)
    run(out, "--resume", "--learning-rate", 1e-4, "--clip-norm", 1.0)
    words = said(capsys)
    assert "--learning-rate is 0.0001 from here on and was 0.002" in words and "--clip-norm is 1.0 from" in words
    assert "goes on from the checkpoint after step 2" in words
    assert "learning-rate" in refused(out, "--resume", "--learning-rate", 1e-5, "--clip-norm", 1.0, "--steps", 9)


def test_weights_that_are_not_finite_are_named(files, tmp_path):
    shutil.copytree(files.untied, tmp_path / "teacher")
    tensors = load_file(tmp_path / "teacher" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = np.nan
    save_file(tensors, tmp_path / "teacher" / "model.safetensors", {"format": "pt"})
    found = refused(tmp_path / "run", "--teacher", tmp_path / "teacher", preset="taught")
    assert "the teacher's blocks.mlp.up holds numbers that are not finite: use other weights" in found

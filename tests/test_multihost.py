"""Runs over two processes of four devices each against one process of eight."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
import several
import test_step
import test_train
from test_train import arguments, exported, lines, rows

import train
from minalm.huggingface import weights
from minalm.text.corpus import read_corpus

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
RUN = {"mesh__fsdp": 4, "mesh__tp": 2, "batch_size": 8, "steps": 20, "save_interval": 10, "samples": 1}


def start(
    program: Path,
    *words: object,
    numbers: Sequence[int] = (0, 1),
    changes: dict[str, str] | None = None,
    folders: Sequence[Path] | None = None,
) -> list[subprocess.Popen]:
    """Starts a program in two processes, or some of them, each in its folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_COMPILATION_CACHE_DIR": os.environ["MINALM_TEST_COMPILED"],
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, program, *map(str, words)],
            env=os.environ | settings | {"JAX_PROCESS_ID": str(number)} | (changes or {}),
            cwd=None if folders is None else folders[number],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in numbers
    ]


def wait(started: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """How each process ended, and what it printed on stdout and stderr."""
    try:
        printed = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, printed, strict=True)]


def notes(folder: Path) -> list[list[dict]]:
    """What each process noted."""
    return [[json.loads(line) for line in (folder / f"notes {i}").read_text().splitlines()] for i in range(2)]


# --- one step -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """What one device found, and a folder with what two processes found on each mesh, and noted."""
    out = tmp_path_factory.mktemp("gradients")
    started = start(ROOT / "tests" / "several.py", "gradients", out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_step, "parameters", several.parameters)
        grad, metrics = test_step.gradients(test_step.settings(), 1, 1, *test_step.models())
    found = wait(started)
    assert [code for code, *_ in found] == [0, 0], found
    return grad | metrics, out


def test_losses_and_gradients_are_those_of_one_device(gradients):
    expected, out = gradients
    assert "blocks.attention.q" in expected and "loss/alm" in expected
    for fsdp, tp in several.MESHES:
        first, second = (dict(np.load(out / f"{fsdp}x{tp} {number}.npz")) for number in range(2))
        assert any(np.isnan(value).any() for value in first.values())
        for name, value in first.items():
            value[...] = np.where(np.isnan(value), second[name], value)
        test_step.assert_near(first, expected, 1e-5)


def test_rows_of_each_process(gradients):
    """Each holds the rows of its own devices."""
    halves = [*range(8)], [*range(8, 16)]
    for number, noted in enumerate(notes(gradients[1])):
        assert [(row["fsdp"], row["rows"]) for row in noted] == [
            (8, halves[number]),
            (2, halves[number]),
            (1, [*range(16)]),
        ]
        for row in noted:
            assert len(row["shards"]) == 4
            for first, *held in row["shards"]:
                assert held == [*range(first, first + 16 // row["fsdp"])]


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick_runs():
    """The preset of test_train, compiled quickly as there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "tiny", ("The run of these tests.", test_train.TINY))
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> test_train.Files:
    return test_train.make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def alone(files, quick_runs, tmp_path_factory) -> Path:
    """The run in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    test_train.run(files, out, **RUN, held_out=files.held_out)
    return out


def without_the_last_checkpoint(run: Path, out: Path) -> None:
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("20", "hf", "summary.json"))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["10"]


@pytest.fixture(scope="module")
def together(files, alone, tmp_path_factory):
    """What two processes do one after the other: the folder, and how each ended and what it printed."""
    root = tmp_path_factory.mktemp("together")
    shutil.copytree(alone, root / "resumed", ignore=shutil.ignore_patterns("hf", "summary.json"))
    settings = RUN | {"held_out": files.held_out}
    jobs = [
        [
            arguments(files, root / "refused", **settings, epsilon=-1),
            arguments(files, root / "refused", **settings | {"data": root / "none.txt" if number else files.data}),
            arguments(files, root / "run", **settings),
            arguments(files, root / "resumed", **settings, resume=True),
            [],
            arguments(files, root / "run", **settings),
        ]
        for number in range(2)
    ]
    (root / "jobs.json").write_text(json.dumps(jobs, default=str))
    return root, wait(start(ROOT / "tests" / "several.py", "runs", root / "jobs.json"))


def flattened(row: dict) -> dict:
    nested = {
        f"{name}.{key}": value for name, inner in row.items() if isinstance(inner, dict) for key, value in inner.items()
    }
    return {name: value for name, value in row.items() if not isinstance(value, dict)} | nested


def assert_same_run(found: Path, expected: Path) -> None:
    for name in ("metrics", "evaluations"):
        theirs = lines(expected) if name == "metrics" else rows(expected, name)
        ours = lines(found) if name == "metrics" else rows(found, name)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for row, other in zip(ours, theirs, strict=True):
            flat = flattened(row), flattened(other)
            assert flat[0].keys() == flat[1].keys()
            np.testing.assert_allclose([*flat[0].values()], [*flat[1].values()], rtol=1e-4, err_msg=str(row["step"]))
    ours, theirs = exported(found), exported(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-4, err_msg=name)


def test_a_run_on_two_processes_is_that_on_one(together, alone, files):
    root, _ = together
    assert len(lines(alone)) == 20
    assert_same_run(root / "run", alone)
    assert {path.name for path in (root / "run").iterdir()} == {path.name for path in alone.iterdir()}
    model, start_weights = weights.load(root / "run" / "hf", np.float32), weights.load(files.untied, np.float32)
    assert model.config == weights.read_config(alone / "hf" / "config.json")
    np.testing.assert_array_equal(model.expansion, start_weights.embed)  # frozen
    assert np.abs(model.blocks.attention.q - start_weights.blocks.attention.q).max() > 1e-2  # trained
    assert len(rows(root / "run", "samples")) == 2
    for folder in ("hf/config.json", "hf/tokenizer.json", "hf/generation_config.json"):
        assert (root / "run" / folder).read_bytes() == (alone / folder).read_bytes()
    summary = json.loads((root / "run" / "summary.json").read_text())
    assert summary["bits_per_byte"]["student_end"] < summary["bits_per_byte"]["student_start"]


def test_a_run_goes_on_on_another_number_of_processes(together, alone, files, tmp_path):
    root, _ = together
    assert_same_run(root / "resumed", alone)  # from one to two: the last checkpoint, written again as hf/
    for name, value in exported(alone).items():
        np.testing.assert_array_equal(exported(root / "resumed")[name], value, err_msg=name)
    without_the_last_checkpoint(root / "run", tmp_path / "run")  # and from two to one
    test_train.run(files, tmp_path / "run", **RUN, held_out=files.held_out, resume=True)
    assert_same_run(tmp_path / "run", alone)


def test_each_process_encodes_its_own_rows(together, files):
    """The first half of each step's pieces, or the second; both halves are all."""
    corpus = read_corpus([files.data], 64)

    def texts(step):
        pieces = corpus.batch(0, step, 8)
        return ["".join(part.content for part in piece if isinstance(part.content, str)) for piece in pieces]

    for number, noted in enumerate(notes(together[0])):
        calls = [row["texts"] for row in noted if "texts" in row]
        assert {len(call) for call in calls} == {4}
        for step in range(20):
            own = slice(4 * number, 4 * number + 4)
            assert texts(step)[own] in calls
            assert texts(step)[4 - 4 * number : 8 - 4 * number] not in calls


def test_the_second_process_prints_nothing(together):
    (_, first, _), (_, second, _) = together[1]
    for words in (
        "preset tiny, but for",
        "parameters are trained",
        "Equal colours",
        "step 20 of 20",
        "student after",
        "The student is",
    ):
        assert words in first and words not in second, words


def test_errors_end_all_processes_with_one_sentence(together, files):
    root, found = together
    ends = [[row["ended"] for row in noted if "ended" in row] for noted in notes(root)]
    assert ends[0] == [
        "error: --epsilon is -1.0: it must be a number of at least 1.2e-38, as float32 is",
        f"error: --data is ['{root / 'none.txt'}'] on process 1 and ['{files.data}'] on process 0: "
        "start the same command on all hosts",
        0,
        0,
        "error: all find the same",
    ]
    assert ends[1] == [1, 1, 0, 0, 1]
    assert not (root / "refused").exists()
    assert [code for code, *_ in found] == [1, 1]
    exists = f"error: {root / 'run'} exists: go on with --resume, replace it with --overwrite, or name another --out"
    assert found[0][2].splitlines() == [exists]
    assert found[1][2] == ""


def test_a_restore_that_fails_on_one_process_ends_all(tmp_path):
    """At once, not when a process that waits for the other has waited long enough."""
    found = wait(start(ROOT / "tests" / "several.py", "restore", tmp_path))
    assert [code for code, *_ in found] == [1, 1]
    (sentence,) = [line for line in found[1][2].splitlines() if line.startswith("error: ")] or [found[1][2]]
    assert sentence.startswith(f"error: the checkpoint {tmp_path / 'damaged' / '1'} is damaged")
    assert found[0][2] == ""


@pytest.mark.parametrize("changes", ({"JAX_NUM_PROCESSES": "two"}, {"JAX_PROCESS_ID": "2"}))
def test_a_cluster_that_is_not_there_is_one_sentence(tmp_path, changes):
    started = start(ROOT / "train.py", "--out", tmp_path / "run", numbers=[1], changes=changes)
    ((code, stdout, stderr),) = wait(started)
    assert code == 1 and stdout == ""
    (sentence,) = stderr.splitlines()
    assert sentence.startswith("error: this process could not join the others (")
    assert not (tmp_path / "run").exists()


# --- processes that differ, end or do not come ----------------------------------------------------------------------


def write_jobs(root: Path, *jobs: list[str]) -> Path:
    """For each process one command line."""
    (root / "jobs.json").write_text(json.dumps([[words] for words in jobs], default=str))
    return root / "jobs.json"


def ended(process: subprocess.Popen, seconds: float) -> tuple[int, list[str], float]:
    """Exit code, lines of stderr, and how long it took."""
    began = time.monotonic()
    try:
        _, stderr = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, stderr.splitlines(), time.monotonic() - began


def trained(out: Path, rows_: int) -> None:
    """Waits until a run has logged so many steps."""
    file, deadline = out / "metrics.jsonl", time.monotonic() + 280
    while not (file.exists() and file.read_bytes().count(b"\n") > rows_) and time.monotonic() < deadline:
        time.sleep(0.1)


def goes_on(files, out: Path, root: Path, whole: Path) -> None:
    """With two processes for two steps, and with one for two more. The logs are those of a run that was left alone."""
    for together_ in (True, False):
        saved = max(int(path.name) for path in (out / "checkpoints").iterdir())
        words = arguments(files, out, **RUN | {"steps": saved + 2}, held_out=files.held_out, resume=True)
        if together_:
            found = wait(start(ROOT / "tests" / "several.py", "runs", write_jobs(root, words, words)))
            assert [code for code, *_ in found] == [0, 0], found
        else:
            train.cli(words)
        assert [row["step"] for row in lines(out)] == [*range(1, saved + 3)]
    for row, other in zip(lines(out), lines(whole)[:8]):  # the learning rate is that of a longer run
        np.testing.assert_allclose(row["loss/sft"], other["loss/sft"], rtol=0.2)


def test_sigterm_to_one_process_ends_all_after_the_same_step(files, alone, quick_runs, tmp_path):
    words = arguments(files, tmp_path / "run", **RUN | {"steps": 5000}, held_out=files.held_out)
    processes = start(ROOT / "tests" / "several.py", "runs", write_jobs(tmp_path, words, words))
    trained(tmp_path / "run", 12)
    processes[1].terminate()
    found = wait(processes)
    assert [code for code, *_ in found] == [0, 0], found
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert lines(tmp_path / "run")[-1]["step"] == saved  # no step is lost
    assert f"stands after step {saved}, which is saved" in " ".join(found[0][1].split())
    assert "stands after" not in found[1][1] and "SIGTERM: the run ends its step" in found[1][2]
    goes_on(files, tmp_path / "run", tmp_path, alone)


@pytest.mark.parametrize("killed", (0, 1))
def test_where_one_is_killed_the_other_ends_with_a_sentence(files, alone, quick_runs, tmp_path, killed):
    """Within 90 seconds; and the run goes on, with one process and with two."""
    words = arguments(files, tmp_path / "run", **RUN | {"steps": 5000}, held_out=files.held_out)
    processes = start(ROOT / "tests" / "several.py", "runs", write_jobs(tmp_path, words, words))
    trained(tmp_path / "run", 30)
    processes[killed].kill()
    processes[killed].communicate()
    code, errors, seconds = ended(processes[1 - killed], 90)
    assert code not in (0, 134, -6) and seconds < 90
    assert len(errors) == 1, "\n".join(errors)
    (sentence,) = errors
    assert sentence.startswith("error: another process of this run has ended or cannot be reached")
    if killed:
        goes_on(files, tmp_path / "run", tmp_path, alone)


DIFFERENT = {
    "settings": ({"learning_rate": 0.1}, "--learning-rate is 0.1 on process 1 and 0.002 on process 0"),
    "resume": ({"resume": True}, "--resume is True on process 1 and False on process 0"),
    "text": (None, "the training text is not the same on process 1 as on process 0"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_processes_that_differ_do_not_start(files, tmp_path, what):
    changes, sentence = DIFFERENT[what]
    if changes is None:  # the same name on both, as on hosts with disks of their own
        for name in ("0", "1"):
            (tmp_path / name).mkdir()
        shutil.copy(files.data, tmp_path / "0" / "data.jsonl")
        (tmp_path / "1" / "data.jsonl").write_bytes(files.data.read_bytes().replace(b"the", b"thy", 1))
    words = [arguments(files, tmp_path / "run", **RUN | (changes or {} if n else {})) for n in range(2)]
    if changes is None:
        words = [[*line, "--data", "data.jsonl"] for line in words]
    jobs = write_jobs(tmp_path, *words)
    processes = start(
        ROOT / "tests" / "several.py",
        "runs",
        jobs,
        folders=[tmp_path / "0", tmp_path / "1"] if changes is None else None,
    )
    found = wait(processes)
    assert [code for code, *_ in found] == [1, 1]
    assert sentence in found[0][2] and found[0][2].count("\n") == 1 and found[1][2] == ""
    assert not (tmp_path / "run").exists()


def test_a_process_that_never_comes(files, tmp_path):
    words = arguments(files, tmp_path / "run", **RUN)
    (process,) = start(ROOT / "tests" / "several.py", "runs", write_jobs(tmp_path, words, words), numbers=[0])
    code, errors, seconds = ended(process, 120)
    assert code == 1 and seconds < 90
    (sentence,) = errors
    assert sentence.startswith("error: this process could not join the others (")

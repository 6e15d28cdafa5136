"""Runs that are killed at random moments, while they save too, and go on until they are done: the bits of a run that was
left alone, in weights and logs.

    python tests/test_kills.py 200 --seed 1     # so many runs by SIGKILL, on all cores; prints what it found
    python tests/test_kills.py 20 --term        # stopped by SIGTERM, each of which ends with code 0 and loses no step
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 24, 2


def preset(root: Path):
    """A model of random weights that learns the next token: quickly traced, so that a start takes seconds."""
    import configs

    import train
    from minalm.distill.losses import LossConfig
    from minalm.models.config import ModelConfig

    return configs.config(
        out=Path("unused"),
        steps=STEPS,
        save_interval=EVERY,
        evaluation_interval=6,
        evaluation_rows=4,
        log_interval=1,
        samples=0,
        warmup_steps=1,
        learning_rate=2e-3,
        batch_size=4,
        piece_bytes=48,
        student_length=32,
        student_tokenizer=root / "other",
        architecture=ModelConfig(
            vocab_size=300, embed=16, mlp=32, layers=2, heads=2, kv_heads=1, head_dim=8, windows=(None,) * 2
        ),
        data=(root / "data.jsonl",),
        held_out=(root / "held_out.jsonl",),
        compute_dtype="float32",
        mesh=train.MeshConfig(fsdp=1),
        losses=LossConfig(alm=0.0, balance="fixed"),
    )


def start(words: list[str], log: Path) -> int:
    """Forks a process that runs train.py: the parent has imported it, but has no threads of JAX yet."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import train

        train.cli(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        print(end.code, flush=True)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


@dataclass
class Found:
    """What happened to runs."""

    ends: Counter = field(default_factory=Counter)  # "killed" and "ended"
    while_saving: int = 0  # kills with a checkpoint half-written
    wrong: list[str] = field(default_factory=list)


def contents(out: Path) -> dict[str, object]:
    """All that a run leaves, without the clock."""

    def rows(name: str) -> list[dict]:
        lines = (out / f"{name}.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    summary = json.loads((out / "summary.json").read_text())
    weights = {str(file.relative_to(out)): file.read_bytes() for file in (out / "hf").iterdir()}
    return (
        weights
        | {name: rows(name) for name in ("metrics", "evaluations")}
        | {"summary": {k: v for k, v in summary.items() if k != "seconds"}}
    )


def steps_logged(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def one(out: Path, expected: dict[str, object], seed: int, longest: float, kind: signal.Signals, found: Found):
    """A run that is ended at random moments until it is done."""
    chosen, log = random.Random(seed), out.with_name(f"{out.name}.log")
    for attempt in range(60):
        resume = (out / "run.json").exists()
        child = start(["tiny", "--out", str(out), *(["--resume"] if resume else [])], log)
        before = steps_logged(out)
        if kind == signal.SIGTERM:  # in the loop: from the first new row on
            deadline = time.monotonic() + 120
            while (
                steps_logged(out) in (0, before)
                and time.monotonic() < deadline
                and not os.waitpid(child, os.WNOHANG)[0]
            ):
                time.sleep(0.002)
            time.sleep(chosen.uniform(0, 0.1))
        elif attempt < 8:  # then it is left to end
            time.sleep(chosen.uniform(0, longest))
        else:
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        try:
            os.kill(child, kind)
        except ProcessLookupError:
            pass
        try:
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
        except ChildProcessError:  # it had ended before
            code = 0
        if code == -signal.SIGKILL:
            found.ends["killed"] += 1
            found.while_saving += any(out.glob("checkpoints/*.orbax-checkpoint-tmp*"))
            continue
        if code != 0:
            found.wrong.append(f"{out.name}: code {code}: {log.read_text()[-2000:]}")
            return
        if (out / "summary.json").exists():
            break
        found.ends["stopped"] += 1
        saved = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
        if saved < steps_logged(out):
            found.wrong.append(f"{out.name}: step {steps_logged(out)} was logged, {saved} is saved")
            return
    found.ends["done"] += 1
    if (out / "summary.json").exists() and contents(out) == expected:
        left = [path.name for path in (*out.iterdir(), *out.parent.glob(f".{out.name}.*")) if "partial" in path.name]
        left += [path.name for path in (out / "checkpoints").iterdir() if not path.name.isdigit()]
        if left:
            found.wrong.append(f"{out.name}: left over: {left}")
        shutil.rmtree(out)
    else:
        different = [name for name, value in expected.items() if contents(out).get(name) != value]
        found.wrong.append(f"{out.name}: differs in {different}")


def kill_runs(root: Path, count: int, kind: signal.Signals, seed: int = 0, workers: int = 1) -> Found:
    """Ends `count` runs at random moments until they are done."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import jax
    import orbax.checkpoint  # before the forks  # noqa: F401
    import test_train

    import train

    train.PRESETS["tiny"] = ("", preset(root))
    jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_disable_most_optimizations", True)
    made = os.fork()
    if not made:  # initialises JAX
        test_train.make_files(root)
        os._exit(0)
    os.waitpid(made, 0)
    for attempt in range(2):  # the second has all programs compiled
        out, began = root / f"alone {attempt}", time.monotonic()
        child = start(["tiny", "--out", str(out)], root / "alone.log")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0, (root / "alone.log").read_text()[-2000:]
    longest = time.monotonic() - began
    expected, found = contents(root / "alone 0"), Found()
    assert contents(root / "alone 1") == expected, "runs do not repeat"
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(one, root / f"run{n}", expected, seed + n, 1.3 * longest * workers, kind, found)
            for n in range(count)
        ]
        for n, job in enumerate(jobs):
            job.result()
            if count > 10 and n % 10 == 9:
                print(n + 1, dict(found.ends), "while saving:", found.while_saving, found.wrong, flush=True)
    return found


def report(count: int, kind: signal.Signals, seed: int) -> Found:
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        found = kill_runs(root, count, kind, seed)
        print(f"{count} runs: {dict(found.ends)}; killed while saving: {found.while_saving}; wrong: {found.wrong}")
        return found
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("kill", "term"))
def test_runs_that_are_ended_go_on_bit_for_bit(kind):
    """In a process of its own, since it forks."""
    import subprocess

    count = os.environ.get("MINALM_KILLS", "10")
    words = [sys.executable, __file__, count, *(["--term"] if kind == "term" else [])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("--term", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    found = report(options.count, signal.SIGTERM if options.term else signal.SIGKILL, options.seed)
    sys.exit(bool(found.wrong))

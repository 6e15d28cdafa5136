"""What the terminal is given to print, and what is printed where there is none."""

import re
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from minalm.run import console as shown_by
from minalm.run import estimate
from minalm.run.console import Progress, console, duration, show_results, show_samples, token_text

METRICS = {
    **{
        f"loss/{name}": value
        for name, value in (("sft", 2.029), ("alm", 7.2e-4), ("next_byte", 12.5), ("latents", 1.0))
    },
    "bits_per_byte": 2.919,
    "bytes": 1536.0,
}


def printed(show, width: int = 80) -> str:
    console.width, before = width, console._width
    try:
        with console.capture() as capture:
            show()
        return capture.get()
    finally:
        console.width = before


def test_samples_hold_nothing_that_a_terminal_obeys_and_say_what_they_are():
    before, after = "\treturn '\x1b[2Jé[/x]'\x00", "pass"
    text = printed(lambda: show_samples(["def f():\n"], {"before": [before], "after": [after]}))
    assert "\x1b[2J" not in text and "\x00" not in text
    assert re.search(
        r"prompt\ndef f\(\):\n\nstudent before\n\s+return '\ufffd\[2Jé\[/x]'\ufffd\nstudent after\npass\n", text
    )


def test_bytes_of_cut_characters_are_hex():
    whole = "日é".encode()
    assert token_text(whole[:2]) == r"\xe6\x97"
    assert token_text(whole[2:]) == r"\xa5é"
    assert token_text(b" a\n\tb\x1b\x00") == r" a⏎⇥b\x1b\x00"


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""
    now = [1000.0]
    monkeypatch.setattr(shown_by, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_without_a_terminal_there_is_a_line_every_so_often(clock):
    """At the start, every half a minute, and at the end; time between steps that belongs to none is left out."""
    progress = Progress(0, 1000, estimate.Work(flops=3e12, peak=1e13))

    def steps(first, last):
        with progress:
            for step in range(first, last):
                clock[0] += 1.0
                progress.show(step, METRICS)

    text = printed(lambda: steps(1, 66))
    assert [int(n) for n in re.findall(r"step (\d+) of 1,000", text)] == [2, 32, 62]
    progress.pause()
    clock[0] += 5000.0
    text = printed(lambda: steps(990, 1001))
    assert re.findall(r"step ([\d,]+) of 1,000", text) == ["990", "1,000"]
    last = text.splitlines()[-1]
    assert last == (
        "step 1,000 of 1,000  sft 2.029  alm 7.2e-04  next_byte 12.500  latents 1.000  2.919 bits/byte  1.5 kB/s  "
        "30.0% MFU  0 s left"
    )


@pytest.mark.parametrize("width", (80, 40))
def test_the_bar_fits(clock, width):
    """A bar, steps, speed and time left on one line, four losses below; nothing is cut."""
    progress = Progress(0, 20_000, estimate.Work(flops=3e12, peak=1e13))
    assert "compiling" in printed(lambda: console.print(progress), width)
    for step in range(1234, 1250):
        clock[0] += 1.0
        progress.step, progress.metrics = step, METRICS
        progress.recent.append((1.0, 1536.0))
        progress.last = clock[0]
    lines = printed(lambda: console.print(progress), width).splitlines()
    assert all(len(line) <= width for line in lines) and "…" not in "".join(lines)
    text = " ".join(lines)
    parts = ["sft 2.029", "alm 7.2e-04", "next_byte 12.500", "latents 1.000", "bits/byte"]
    if width == 80:
        assert len(lines) == 2 and lines[0].startswith("━")
        parts += ["1,249/20,000", "1.5 kB/s", "30.0% MFU", "5 h 13 min left"]
    for part in parts:
        assert part in text, (part, text)


def test_times_for_people():
    seconds = (0.0, 45.0, 240.0, 7500.0, 100_000.0, 400_000.0)
    assert [*map(duration, seconds)] == ["0 s", "45 s", "4 min", "2 h 05 min", "27 h 47 min", "4 d 15 h"]


def test_results_fit_80_columns():
    bits = {"teacher": 1.2, "student_start": 7.1, "student_end": None}
    others = {"agreement": {"student_start": 15.3}, "greedy": {"student_start": 0.5}, "calibration": {}}
    lines = printed(lambda: show_results(bits, others)).splitlines()
    assert all(len(line) <= 80 for line in lines)
    (row,) = [line for line in lines if "before" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["student before", "7.100", "15.300", "0.500", ""]
    assert not any("after" in line for line in lines)


def test_the_peak_of_known_chips():
    half = jnp.dtype(jnp.bfloat16)
    found = [estimate.peak(kind, 2, half) for kind in ("TPU v4", "TPU v5 lite", "TPU v5p", "TPU v5", "TPU v6 lite")]
    assert found == [2 * 275e12, 2 * 197e12, 2 * 459e12, 2 * 459e12, 2 * 918e12]
    assert estimate.peak("NVIDIA H100 80GB HBM3", 1, half) == 989e12
    assert estimate.peak("NVIDIA H100 PCIe", 1, half) == 756e12
    assert estimate.peak("cpu", 1, half) is None and estimate.peak("TPU v4", 1, jnp.dtype(jnp.float32)) is None

"""What a run shows on the terminal. No arithmetic beyond counting what is shown."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, PyTree
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from minalm.cost import Estimate
from minalm.types import Batch
from minalm.vocab import Vocabulary

console = Console(highlight=False, markup=False, emoji=False)


def show_settings(config: Any, models: Mapping[str, PyTree]) -> None:
    """The settings of a run, one a line, and the number of parameters of each model or part of one."""
    table = Table.grid(padding=(0, 2))
    for name, value in _settings(config):
        table.add_row(Text(name, "dim"), value)
    for name, model in models.items():
        if count := sum(leaf.size for leaf in jax.tree.leaves(model)):
            table.add_row(Text(f"parameters: {name}", "bold"), f"{count:,}")
    console.print(table)


def _settings(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _tokens(ids: Int[np.ndarray, " time"], chunk: Int[np.ndarray, " time"], vocabulary: Vocabulary) -> Text:
    """Tokens side by side, each chunk in the colour of its number, control tokens in grey."""
    names = {i: word for word, i in vocabulary.control.items()}
    colours = ("black on cyan", "black on yellow", "black on magenta", "black on green")
    shown = Text()
    for token, number in zip(ids.tolist(), chunk.tolist()):
        text = names.get(token) or vocabulary.token_bytes[token].decode(errors="replace")
        style = "bright_black" if number < 0 or token in names else colours[number % len(colours)]
        shown.append(
            _printable(text).replace("\n", "⏎").replace("\t", "⇥") + ("" if len(text.encode()) <= 1 else "·"), style
        )
    return shown


def show_alignment(batch: Batch, student: Vocabulary, teacher: Vocabulary, most: int = 40) -> None:
    """The first tokens of the first row, teacher above student, chunks in matching colours."""
    for name, side, chunk, vocabulary in (
        ("teacher", batch.teacher, batch.chunks.teacher_chunk, teacher),
        ("student", batch.student, batch.chunks.student_chunk, student),
    ):
        shown = (chunk[0] < most) & (side.weight[0] > 0)
        console.print(Text(f"{name} ", "bold") + _tokens(side.targets[0][shown], chunk[0][shown], vocabulary))
    console.print(
        Text("Equal colours are a chunk: the same bytes on both sides. A dot ends a token of several bytes.", "dim")
    )


def progress_bar() -> Progress:
    """A bar with steps, losses, bits per byte and the time left; without a terminal nothing but the end is printed."""
    return Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def progress_line(metrics: Mapping[str, float]) -> str:
    """The losses that are on, and the bits per byte of the step's text."""
    values = {name.removeprefix("loss/"): value for name, value in metrics.items() if name.startswith("loss/")}
    values["bits/byte"] = metrics["bits_per_byte"]
    return " ".join(f"{name} {value:.3f}" for name, value in values.items())


def show_results(bits: Mapping[str, float | None], agreement: Mapping[str, float | None]) -> None:
    """The table at the end: a row for the teacher and for the student before and after."""
    table = Table(title="held-out text")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_column("mean |log p - log p of the teacher| per chunk", justify="right")
    for title, name in (("teacher", "teacher"), ("student before", "student_start"), ("student after", "student_end")):
        if bits.get(name) is not None:
            nats = agreement.get(name)
            table.add_row(title, f"{bits[name]:.3f}", "" if nats is None else f"{nats:.3f}")
    console.print(table)


def _printable(text: str) -> str:
    """Text without what a terminal would obey: a model may write any byte."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


def show_samples(prompts: Sequence[str], continuations: Sequence[str]) -> None:
    """Prompts, dim, and what the student made of them."""
    for prompt, continuation in zip(prompts, continuations, strict=True):
        console.print(Text(_printable(prompt), "dim") + Text(_printable(continuation), "bold"))
        console.rule(style="dim")


def show_estimate(estimate: Estimate) -> None:
    """What a step takes of the chips that it was compiled for."""
    topology, chip = estimate.topology, estimate.topology.chip
    table = Table(title="one step, compiled and not run")
    table.add_column("")
    table.add_column("each chip" if chip else "each device", justify="right")
    table.add_column("")

    def rows(*lines: tuple[str, str, str]) -> None:
        for line in lines:
            table.add_row(*line)
        table.add_section()

    fsdp, tp = estimate.mesh
    kind = chip.name if chip else "CPU device"
    rows(
        ("mesh, fsdp x tp", f"{fsdp} x {tp}", f"{estimate.devices} x {kind} of {topology.name}"),
        ("compiled in", f"{estimate.compile_seconds:.0f} s", ""),
    )
    total = sum(estimate.memory.values())
    rows(
        *((name, _bytes(size), "") for name, size in estimate.memory.items()),
        ("memory in all", _bytes(total), f"{total / chip.memory:.0%} of {chip.memory / 2**30:.0f} GiB" if chip else ""),
    )
    whole, own = estimate.flops * estimate.devices, estimate.model_flops
    rows(
        ("FLOPs", f"{estimate.flops:.3g}", f"{whole:.3g} in all: {whole / own:.2f} x the model's own {own:.3g}"),
        ("memory traffic", _bytes(estimate.traffic.memory), "by XLA's model, without on-chip memory" if chip else ""),
    )
    sent, least = estimate.traffic.sent, estimate.least_sent
    shown = [name for name in sent if sent[name] or least[name]]
    rows(
        *((f"sent by {name}", _bytes(sent[name]), f"fsdp x tp needs {_bytes(least[name])}") for name in shown),
        ("sent in all", _bytes(sum(sent.values())), f"fsdp x tp needs {_bytes(sum(least.values()))}"),
    )
    if chip:
        bounds = estimate.bounds()
        binds = max(bounds, key=bounds.get)
        hours = estimate.steps * bounds[binds] / 3600
        rows(
            *(
                (f"bound by {name}", f"{bound:.3f} s", "binds" if name == binds else "")
                for name, bound in bounds.items()
            ),
            (f"{estimate.steps:,} steps", f"{hours:.1f} h", "at that bound, or more"),
        )
        table.caption = "A bound is what a step cannot be faster than. Nothing ran, nothing was timed."
    else:
        table.caption = "CPU devices send bfloat16 as float32, and have no bounds here. Nothing ran."
    console.print(table)


def _bytes(size: int | float) -> str:
    """Bytes in a unit that leaves one to three digits before the point."""
    for unit in ("B", "kiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"

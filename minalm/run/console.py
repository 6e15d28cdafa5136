"""What a run shows on the terminal. No arithmetic beyond counting what is shown."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from minalm.run.estimate import Estimate
from minalm.run.settings import flat
from minalm.run.setup import Models, Texts
from minalm.text.documents import Markup, Piece
from minalm.tokenization.vocabulary import Vocabulary
from minalm.types import Batch

console = Console(highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """A line of plain text."""
    console.print(text)


def show_run(
    settings: Mapping[str, Any], models: Models, mesh: Mesh, notes: Sequence[str], texts: Texts, quiet: bool
) -> None:
    """What a run begins with: its settings, its models, devices that have nothing to do, a chat, and how texts are
    aligned.

    `notes`: what else a user should know. `quiet`: this process shows nothing, now and later.
    """
    console.quiet = quiet
    table = Table.grid(padding=(0, 2))
    for name, value in flat(settings).items():
        table.add_row(Text(name, "dim"), " ".join(map(str, value)) if isinstance(value, list) else str(value))
    trained, frozen = eqx.partition(models.student.model, models.trained)
    teacher = models.teacher and models.teacher.model
    for name, model in {"student, trained": trained, "student, frozen": frozen, "teacher": teacher}.items():
        if count := sum(leaf.size for leaf in jax.tree.leaves(model)):
            table.add_row(Text(f"parameters: {name}", "bold"), f"{count:,}")
    console.print(table)
    for note in notes:
        say(f"Note: {note}.")
    if idle := jax.device_count() - mesh.size:
        say(
            f"Note: {idle} of {jax.device_count()} devices have nothing to do, since --mesh.fsdp {mesh.shape['fsdp']} is "
            f"what divides --batch-size {settings['batch_size']} (and --accumulation): "
            f"a multiple of {jax.device_count() // mesh.shape['tp']} rows would use all."
        )
    if (chat := texts.first_chat()) is not None:
        show_chat(chat)
    if models.teacher is not None:
        show_alignment(texts.batch(0), models.student.vocabulary, models.teacher.vocabulary)


def show_chat(piece: Piece) -> None:
    """A chat as it is trained on: special tokens and templates' text in colour, what counts in the losses
    underlined."""
    shown = Text("chat ", "bold")
    for content, loss_mask in piece:
        words = (content,) if isinstance(content, str) else content.student if isinstance(content, Markup) else ()
        style = f"{'' if isinstance(content, str) else 'bold cyan'}{' underline' if loss_mask else ''}".strip()
        shown.append(_printable("".join(words)), style)
    console.print(shown)
    console.print(Text("Cyan: special tokens. Underlined: what counts in the losses.", "dim"))


def _tokens(ids: Int[np.ndarray, " time"], chunk: Int[np.ndarray, " time"], vocabulary: Vocabulary) -> Text:
    """Tokens side by side, each chunk in the colour of its number, special tokens in grey."""
    names = {i: word for word, i in vocabulary.special.items()}
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
    """The first tokens of the first row with chunks, teacher above student, chunks in matching colours."""
    row = int((batch.chunks.student_chunk_end >= 0).any(axis=1).argmax())
    for name, side, chunk, vocabulary in (
        ("teacher", batch.teacher, batch.chunks.teacher_chunk, teacher),
        ("student", batch.student, batch.chunks.student_chunk, student),
    ):
        shown = (chunk[row] < most) & (side.weight[row] > 0)
        console.print(Text(f"{name} ", "bold") + _tokens(side.targets[row][shown], chunk[row][shown], vocabulary))
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


def show_samples(samples: Sequence[tuple[str, str]]) -> None:
    """Prompts, dim, and what the student made of them."""
    for prompt, continuation in samples:
        console.print(Text(_printable(prompt), "dim") + Text(_printable(continuation), "bold"))
        console.rule(style="dim")


def show_estimate(estimate: Estimate) -> None:
    """What a step takes of the chips that it was compiled for."""
    topology, chip, mesh = estimate.topology, estimate.topology.chip, estimate.mesh
    table = Table(title="one step, compiled and not run")
    table.add_column("")
    table.add_column("each chip" if chip else "each device", justify="right")
    table.add_column("")
    kind = chip.name if chip else "CPU device"
    table.add_row(
        "mesh, fsdp x tp", f"{mesh.shape['fsdp']} x {mesh.shape['tp']}", f"{mesh.size} x {kind} of {topology.name}"
    )
    table.add_row("compiled in", f"{estimate.compile_seconds:.0f} s", end_section=True)
    for name, size in estimate.memory.items():
        table.add_row(name, _bytes(size))
    total = sum(estimate.memory.values())
    share = f"{total / chip.memory:.0%} of {chip.memory / 2**30:.2f} GiB" if chip else ""
    table.add_row("memory in all", _bytes(total), share, end_section=True)
    whole, own = estimate.flops * mesh.size, estimate.model_flops
    table.add_row(
        "FLOPs", f"{estimate.flops:.3g}", f"{whole:.3g} in all: {whole / own:.2f} x the model's own {own:.3g}"
    )
    if chip:
        bound = estimate.compute_bound
        table.add_row("bound by compute", f"{bound:.3f} s", f"at {chip.peak / 1e12:.0f} TFLOP/s")
        table.add_row(f"{estimate.steps:,} steps", f"{estimate.steps * bound / 3600:.1f} h", "at that bound, or more")
        table.caption = "A step cannot be faster than its bound. Nothing ran, nothing was timed."
    else:
        table.caption = "CPU devices have no bound here. Nothing ran."
    console.print(table)


def _bytes(size: int | float) -> str:
    """Bytes in a unit that leaves one to three digits before the point."""
    for unit in ("B", "kiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"

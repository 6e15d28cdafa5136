"""What a run shows on the terminal. No arithmetic beyond counting what is shown."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from minalm.run.command_line import Command, changed
from minalm.run.estimate import Estimate, Work
from minalm.run.models import Models
from minalm.run.settings import flat, plain
from minalm.run.texts import Texts
from minalm.text.documents import Markup, Piece
from minalm.tokenization.vocabulary import Vocabulary
from minalm.types import Batch

LINE_SECONDS = 30.0  # between two lines about a run that goes on, where there is no terminal
WINDOW = 100  # steps whose mean time is the speed

console = Console(highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """A line of plain text, which is not broken."""
    console.print(text, soft_wrap=True)


def show_run(command: Command, models: Models, mesh: Mesh, notes: Sequence[str], texts: Texts, quiet: bool) -> None:
    """What a run begins with: the settings that are not its preset's, its models and text, devices that have nothing
    to do, a chat, and how texts are aligned.

    `notes`: what else a user should know. `quiet`: this process shows nothing, now and later.
    """
    console.quiet = quiet
    settings = flat(plain(command.config))
    others = {name: values for name, values in changed(command).items() if name != "config"}
    console.print(Text.assemble((command.base, "bold"), ", but for" if others else ""), soft_wrap=True)
    width = max(map(len, others), default=0)
    for name, (value, before) in others.items():
        line = Text.assemble(
            (f"  {name:{width}}  ", "bold"), _setting(value), (f"  instead of {_setting(before)}", "dim")
        )
        console.print(line, soft_wrap=True)
    trained, frozen = (
        sum(leaf.size for leaf in jax.tree.leaves(part)) for part in eqx.partition(models.student.model, models.trained)
    )
    facts = {"student": f"{trained:,} parameters are trained" + (f", {frozen:,} are frozen" if frozen else "")}
    if models.teacher is not None:
        facts["teacher"] = f"{sum(leaf.size for leaf in jax.tree.leaves(models.teacher.model)):,} parameters"
    facts["text"] = f"{len(texts.training):,} pieces of at most {settings['piece_bytes']:,} bytes"
    if not settings["packing"]:  # with it, a row holds as many as find room
        passes = settings["steps"] * settings["batch_size"] / len(texts.training)
        facts["text"] += f"; {settings['steps']:,} steps of {settings['batch_size']} read each {passes:.2g} times"
    if texts.held_out is not None:
        facts["held out"] = f"{len(texts.held_out):,} pieces"
    kind = mesh.devices.flat[0].device_kind
    facts["devices"] = f"{mesh.shape['fsdp']} x {mesh.shape['tp']} (fsdp x tp) {kind}"
    for name, fact in facts.items():
        console.print(Text.assemble((f"{name:8}  ", "bold"), fact), soft_wrap=True)
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
        text = names.get(token) or token_text(vocabulary.token_bytes[token])
        style = "bright_black" if number < 0 or token in names else colours[number % len(colours)]
        shown.append(text + ("" if len(vocabulary.token_bytes[token]) <= 1 else "·"), style)
    return shown


def token_text(token: bytes) -> str:
    """A token's bytes as one line of text; those of a character that is cut in two, and what no one can see, as hex."""
    text = token.decode(errors="backslashreplace").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\x{c.encode().hex()}" for c in text)


def show_alignment(batch: Batch, student: Vocabulary, teacher: Vocabulary, most: int = 40) -> None:
    """The first tokens of the first row with chunks, teacher above student, chunks in matching colours."""
    row = int((batch.chunks.student_chunk_end >= 0).any(axis=1).argmax())
    for name, side, chunk, vocabulary in (
        ("teacher", batch.teacher, batch.chunks.teacher_chunk, teacher),
        ("student", batch.student, batch.chunks.student_chunk, student),
    ):
        shown = (chunk[row] < most) & (side.weight[row] > 0)
        console.print(
            Text.assemble((f"{name} ", "bold"), _tokens(side.targets[row][shown], chunk[row][shown], vocabulary))
        )
    console.print(
        Text("Equal colours are a chunk: the same bytes on both sides. A dot ends a token of several bytes.", "dim")
    )


class Progress:
    """How a run goes on: at a terminal a bar that is always there, otherwise a line every LINE_SECONDS."""

    def __init__(self, done: int, steps: int, work: Work):
        self.step, self.steps, self.work = done, steps, work
        self.metrics: Mapping[str, float] = {}
        self.recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # (seconds, bytes of text) of each step
        self.last = self.printed = None  # when the last step ended, and the last line was printed
        self.live = Live(self, console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of a step that has just ended."""
        now = time.monotonic()
        if self.last is not None:
            self.recent.append((now - self.last, metrics["bytes"]))
        self.step, self.metrics, self.last = step, metrics, now
        is_due = self.printed is None or now - self.printed >= LINE_SECONDS or step == self.steps
        if self.live is None and self.recent and is_due:
            self.printed = now
            console.print(
                "  ".join([f"step {step:,} of {self.steps:,}", *self.losses(), *self.speed()]), soft_wrap=True
            )

    def pause(self) -> None:
        """What happens from here to the next step is none of its time."""
        self.last = None

    def losses(self) -> list[str]:
        """The losses that are on, and the bits per byte of the step's text."""
        names = [name for name in self.metrics if name.startswith("loss/")]
        shown = [f"{name.removeprefix('loss/')} {_short(self.metrics[name])}" for name in names]
        return [*shown, f"{self.metrics['bits_per_byte']:.3f} bits/byte"] if shown else []

    def speed(self) -> list[str]:
        """Text a second, the share of the chips' arithmetic that the models need (MFU), and the time left."""
        if not self.recent:
            return ["compiling"] if self.last is None else []
        seconds, read = (sum(values) for values in zip(*self.recent))
        each = max(seconds / len(self.recent), 1e-9)
        shown = [f"{_decimal(read / len(self.recent) / each)}/s"]
        if self.work.peak is not None:
            shown.append(f"{self.work.flops / each / self.work.peak:.1%} MFU")
        return [*shown, f"{duration((self.steps - self.step) * each)} left"]

    def __rich__(self) -> RenderableType:
        said = Text("  ".join([f"{self.step:,}/{self.steps:,}", *self.speed()]))
        bar, losses = ProgressBar(self.steps, self.step), Text("  ".join(self.losses()))
        if console.width < len(said) + 8:
            return Group(bar, said, losses)
        beside = Table.grid(padding=(0, 2), expand=True)
        beside.add_column(ratio=1)
        beside.add_row(bar, said)
        return Group(beside, losses)


def duration(seconds: float) -> str:
    """A time for people: 45 s, 3 min, 2 h 05 min, 3 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 100 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _decimal(count: float) -> str:
    """Bytes in kB or MB."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _short(value: float) -> str:
    """A number in about five characters."""
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0.0 else f"{value:.1e}"


def _setting(value: Any) -> str:
    """A setting as its flag takes it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def show_results(bits: Mapping[str, float | None], others: Mapping[str, Mapping[str, float | None]]) -> None:
    """The table at the end: a row for the teacher and for the student before and after.

    `others`: agreement, greedy and calibration, as in summary.json.
    """
    table = Table(title="held-out text")
    titles = {"agreement": "nats a chunk", "greedy": "greedy bytes", "calibration": "calibration"}
    table.add_column("")
    for title in ("bits per byte", *titles.values()):
        table.add_column(title, justify="right")
    for title, name in (("teacher", "teacher"), ("student before", "student_start"), ("student after", "student_end")):
        if bits.get(name) is not None:
            values = [bits[name], *(others[other].get(name) for other in titles)]
            table.add_row(title, *("" if value is None else f"{value:.3f}" for value in values))
    console.print(table)


def _printable(text: str) -> str:
    """Text without what a terminal would obey: a model may write any byte."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


def show_samples(prompts: Sequence[str], continuations: Mapping[str, Sequence[str]]) -> None:
    """Held-out texts and how the student goes on with them. `continuations`: "before" and "after" the training."""
    for number, prompt in enumerate(prompts):
        console.rule(Text(f"sample {number + 1} of {len(prompts)}", "dim"), align="left", style="dim")
        shown = {"prompt": prompt, **{f"student {when}": texts[number] for when, texts in continuations.items()}}
        for label, text in shown.items():
            console.print(Text.assemble((f"{label}\n", "bold blue"), _printable(text)), soft_wrap=True)
    console.rule(style="dim")


def show_cuts(teacher: Sequence[str], student: Sequence[str]) -> None:
    """A text in the teacher's tokens, and below it in the patches that a Bolmo makes of it (`token_text` of each)."""
    for name, pieces in (("teacher", teacher), ("student", student)):
        shown = Text(f"{name} ", "bold")
        for number, piece in enumerate(pieces):
            shown.append("" if number == 0 else "│", "dim")
            shown.append(piece, ("cyan", "yellow")[number % 2])
        console.print(shown, soft_wrap=True)
    console.print(
        Text(f"The teacher's {len(teacher)} tokens, and the student's {len(student)} patches of the same text.", "dim")
    )


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
    for name, flops in estimate.flops_of.items():
        table.add_row(f"  {name}", f"{flops / mesh.size:.3g}", f"{flops / own:.1%} of the model's own")
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

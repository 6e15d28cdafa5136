"""Which losses win: the quickstart's student by five recipes, on all of the teacher's text and on a slice of it.

    python benchmarks/recipes.py

Each recipe takes its learning rate from runs on all of the text that are evaluated on other held-out rows than the
table is. One process a
core, one core a process. Prints a table for the README; `runs/recipes` keeps every run, and what is there is not run
again.
"""

import itertools
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

RECIPES = {
    "sft": ["--losses.alm", "0"],
    "alm": ["--losses.sft", "0"],
    "alm + sft": [],
    "alm + sft + latents": ["--losses.latents", "1"],
    "alm + sft, tau 5": ["--losses.tau", "5"],
}


@dataclass(frozen=True)
class Settings:
    """What is compared."""

    steps: int = 250
    batch_size: int = 4
    fractions: tuple[float, ...] = (1.0, 0.01)
    """Shares of the teacher's training documents that the student sees."""
    learning_rates: tuple[float, ...] = (3e-3, 6e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: int = 256
    """Rows of held-out text in the table; as many others choose the learning rates."""
    out: Path = Path("runs/recipes")


def run(arguments: list[str], out: Path) -> dict:
    """The summary of a run of train.py, which is only started if it is not there yet."""
    if not (out / "summary.json").exists():
        import train

        train.cli(["quickstart", *arguments, "--out", str(out), *(["--overwrite"] if out.exists() else [])])
    return json.loads((out / "summary.json").read_text())


def one_core(cores) -> None:
    """Gives this process a core of its own, and leaves its output to the run's files."""
    os.sched_setaffinity(0, {cores.get()})
    sys.stdout = open(os.devnull, "w")


def main(settings: Settings) -> None:
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, one_core, (cores,))

    def submit(fraction: float, recipe: str, rate: float, seed: int, choosing: bool):
        name = f"{fraction}/{recipe.replace(' ', '')}/{rate}/{seed}{'-choosing' if choosing else ''}"
        arguments = [
            *RECIPES[recipe],
            *("--steps", str(settings.steps), "--batch-size", str(settings.batch_size)),
            *("--stdlib-fraction", str(fraction), "--learning-rate", str(rate), "--seed", str(seed)),
            *("--evaluation-rows", str(settings.rows), "--evaluation-skip", str(settings.rows if choosing else 0)),
            *("--no-train-expansion", "--samples", "0", "--save-interval", str(settings.steps)),
        ]
        return pool.submit(run, arguments, settings.out / name)

    choosing = {
        (recipe, rate): submit(settings.fractions[0], recipe, rate, settings.seeds[0], True)
        for recipe, rate in itertools.product(RECIPES, settings.learning_rates)
    }
    best = {
        recipe: min(settings.learning_rates, key=lambda rate: bits(choosing[recipe, rate].result()))
        for recipe in RECIPES
    }
    final = {
        (fraction, recipe): [submit(fraction, recipe, best[recipe], seed, False) for seed in settings.seeds]
        for fraction, recipe in itertools.product(settings.fractions, RECIPES)
    }
    print(
        f"{settings.steps} steps of {settings.batch_size} rows; bits per byte; nats per chunk; seeds {settings.seeds}\n"
    )
    print("| student trains on | recipe | learning rate | bits per byte | mean abs. difference of log p per chunk |")
    print("|---|---|---|---|---|")
    for (fraction, recipe), futures in final.items():
        summaries = [future.result() for future in futures]
        differences = [summary["agreement"]["student_end"] for summary in summaries]
        print(
            f"| {fraction:.0%} of the text | {recipe} | {best[recipe]:g} | {spread(map(bits, summaries))} "
            f"| {spread(differences)} |",
            flush=True,
        )
    ends = summaries[0]["bits_per_byte"]
    print(f"\nteacher: {ends['teacher']:.3f}; student before: {ends['student_start']:.3f}")


def bits(summary: dict) -> float:
    return summary["bits_per_byte"]["student_end"]


def spread(values) -> str:
    values = list(values)
    return f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))

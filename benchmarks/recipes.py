"""What teaches a byte student: recipes compared on the quickstart's models and text.

    python benchmarks/recipes.py                    # all recipes, 250 steps, three shares of the text
    python benchmarks/recipes.py --table quickstart # the quickstart's own setting: the README's table
    python benchmarks/recipes.py --table cross      # quickstart-cross: a narrower model of random weights
    python benchmarks/recipes.py --table bolmo      # Bolmos of the quickstart's teacher beside its byte student

Each recipe takes its learning rate from runs on all of the text with seed 0, measured on other held-out rows than the
table is; the grid grows by a factor of 2 until its edge is not the best. One process a core, one core a process.
`--out` keeps every run, and what is there is not run again.
"""

import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

RECIPES = {  # name -> weights of the losses that are on, and further flags
    "sft": ({"sft": 1}, []),
    "alm + sft": ({"alm": 1, "sft": 1}, []),
    "next byte": ({"next_byte": 1}, []),
    "next byte + sft": ({"next_byte": 1, "sft": 1}, []),
    "alm + sft, tau 5": ({"alm": 1, "sft": 1}, ["--losses.tau", "5"]),
    "alm + sft + latents": ({"alm": 1, "sft": 1, "latents": 1}, []),
    "next byte + alm": ({"next_byte": 1, "alm": 1}, []),
    "next byte + latents": ({"next_byte": 1, "latents": 1}, []),
    "next byte + sft, fixed weights": ({"next_byte": 1, "sft": 1}, ["--losses.balance", "fixed"]),
    "alm + sft, fixed weights": ({"alm": 1, "sft": 1}, ["--losses.balance", "fixed"]),
    "alm + sft, unbiased": ({"alm": 1, "sft": 1}, ["--losses.chunks", "unbiased"]),
    "alm + sft, unbiased 0.1": (
        {"alm": 1, "sft": 1},
        ["--losses.chunks", "unbiased", "--losses.pair-bias-threshold", "0.1"],
    ),
}
PAIRS = "pair-bias.safetensors"  # in --out
MEASURES = ("bits per byte", "nats a chunk", "greedy bytes", "calibration")
SFT, ALM = ([*"--losses.next-byte 0 --losses.sft 1 --losses.alm".split(), weight] for weight in "01")
NO_LATENTS = ["--losses.latents", "0"]
PRESETS = {  # name of a table -> for each row the preset, and what is changed; or two, of which the second goes on
    "quickstart": {
        "the quickstart (next byte + sft)": ("quickstart", []),
        "sft alone": ("quickstart", SFT),
        "alm + sft": ("quickstart", ALM),
        "control: random weights, sft alone": ("quickstart", [*SFT, "--student-weights", "random"]),
    },
    "cross": {
        "next byte + sft + latents": ("quickstart-cross", []),
        "next byte + sft": ("quickstart-cross", NO_LATENTS),
        "sft": ("quickstart-cross", [*SFT, *NO_LATENTS]),
        "alm + sft": ("quickstart-cross", [*ALM, *NO_LATENTS]),
        "alm + sft + latents": ("quickstart-cross", ALM),
    },
    "bolmo": {
        "byte student, as many bytes": ("quickstart", ["--steps", "700"]),
        "byte student, as many seconds": ("quickstart", ["--steps", "1000"]),
        "Bolmo, stage 2 alone": ("quickstart-bolmo", []),
        "Bolmo, two stages": ("quickstart-bolmo-stage1", [], "quickstart-bolmo-stage2", []),
    },
}


@dataclass(frozen=True)
class Settings:
    """What is compared."""

    table: Literal["recipes", "quickstart", "cross", "bolmo"] = "recipes"
    recipes: tuple[str, ...] = tuple(RECIPES)
    """Names of RECIPES."""
    steps: int = 250
    """Of the recipes; the other tables are of the steps of their preset."""
    shorter: int | None = None
    """Also runs of this many steps, with the learning rates of the others."""
    fractions: tuple[float, ...] = (1.0, 0.1, 0.01)
    """Shares of the teacher's training documents that the student sees."""
    rates: tuple[float, ...] = (3e-3, 6e-3, 1.2e-2)
    """Learning rates to choose from, to begin with. One rate: that one is used."""
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: int = 128
    """Rows of held-out text in the table; as many others choose the learning rates."""
    cores: tuple[int, ...] = tuple(sorted(os.sched_getaffinity(0)))
    out: Path = Path("runs/recipes")


def run(arguments: list[str], out: Path, preset: str = "quickstart") -> dict:
    """The summary of a run of train.py, which is only started if it is not there yet."""
    if not (out / "summary.json").exists():
        import train

        train.cli([preset, *arguments, "--out", str(out), *(["--overwrite"] if out.exists() else [])])
    return json.loads((out / "summary.json").read_text())


def run_stages(arguments: list[str], out: Path, stages: Sequence) -> dict:
    """The summary of a run, or of two, of which the second begins with the student of the first; `seconds` of both."""
    preset, flags, *second = stages
    first = run([*flags, *arguments], out, preset)
    if not second:
        return first
    whole = run_stages([*arguments, "--student", str(out)], out.with_name(f"{out.name}-2"), second)
    return {**whole, "seconds": first["seconds"] + whole["seconds"]}


def write_pairs(file: Path) -> None:
    """What unbiased chunks need, once: from all of the training text, whatever share a student sees of it."""
    if not file.exists():
        import convert
        from minalm.presets import TEACHER

        convert.pairs_of_tokens(TEACHER, file, stdlib=True, piece_bytes=384)


def one_core(cores) -> None:
    """Gives this process a core of its own, and leaves its output to the run's files."""
    os.sched_setaffinity(0, {cores.get()})
    sys.stdout = open(os.devnull, "w")


def measured(summary: dict) -> tuple[float | None, ...]:
    """MEASURES of a run's student; None: of a Bolmo not measured."""
    others = (summary[name]["student_end"] for name in ("agreement", "greedy", "calibration"))
    return summary["bits_per_byte"]["student_end"], *others


def spread(values: list[float | None]) -> str:
    """Mean and standard deviation of a sample."""
    if None in values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def row(summaries: list[dict]) -> str:
    return " | ".join(spread(list(values)) for values in zip(*map(measured, summaries)))


class Study:
    """Runs of the recipes, by a pool of processes."""

    def __init__(self, settings: Settings, submit: Callable[..., Future]):
        self.settings, self.submit = settings, submit

    def arguments(self, recipe: str, steps: int, fraction: float, rate: float, seed: int, choosing: bool) -> list[str]:
        weights, flags = RECIPES[recipe]
        pairs = ["--losses.pair-bias", str(self.settings.out / PAIRS)] if "unbiased" in flags else []
        losses = ("sft", "alm", "next_byte", "latents")
        return [
            *(word for loss in losses for word in (f"--losses.{loss.replace('_', '-')}", str(weights.get(loss, 0)))),
            *(*flags, *pairs),
            *("--steps", str(steps), "--stdlib-fraction", str(fraction), "--learning-rate", str(rate)),
            *("--seed", str(seed), "--evaluation-rows", str(self.settings.rows)),
            *("--evaluation-skip", str(self.settings.rows if choosing else 0)),
            *("--no-train-expansion", "--samples", "0", "--save-interval", str(steps)),
        ]

    def start(self, recipe: str, steps: int, fraction: float, rate: float, seed: int, choosing: bool = False) -> Future:
        name = f"{recipe.replace(' ', '')}/{steps}-{fraction}-{rate:g}-{seed}{'-choosing' if choosing else ''}"
        arguments = self.arguments(recipe, steps, fraction, rate, seed, choosing)
        return self.submit(run, arguments, self.settings.out / name)

    def best_rate(self, recipe: str) -> float:
        """Of a grid whose edge is not the best."""
        rates, found = set(self.settings.rates), {}
        if len(rates) == 1:
            return rates.pop()
        while True:
            tried = {
                rate: self.start(recipe, self.settings.steps, 1.0, rate, 0, True) for rate in sorted(rates - set(found))
            }
            found |= {rate: measured(future.result())[0] for rate, future in tried.items()}
            best = min(found, key=found.__getitem__)
            if min(found) < best < max(found):
                return best
            rates.add(best * 2 if best == max(found) else best / 2)

    def recipe(self, recipe: str) -> tuple[float, dict[tuple[int, float], list[dict]]]:
        """(learning rate, (steps, share) -> a summary for each seed)."""
        rate, lengths = self.best_rate(recipe), [self.settings.steps, self.settings.shorter]
        runs = {
            (steps, fraction): [self.start(recipe, steps, fraction, rate, seed) for seed in self.settings.seeds]
            for steps in lengths
            if steps is not None
            for fraction in self.settings.fractions
        }
        return rate, {key: [future.result() for future in futures] for key, futures in runs.items()}


def main(settings: Settings) -> None:
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for core in settings.cores:
        cores.put(core)
    pool = ProcessPoolExecutor(len(settings.cores), context, one_core, (cores,))
    if settings.table != "recipes":
        return presets(settings, pool)
    if any("unbiased" in RECIPES[name][1] for name in settings.recipes):
        write_pairs(settings.out / PAIRS)
    study = Study(settings, pool.submit)
    with ThreadPoolExecutor(len(settings.recipes)) as threads:
        found = dict(zip(settings.recipes, threads.map(study.recipe, settings.recipes), strict=True))
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "results.json").write_text(
        json.dumps(
            {
                name: {
                    "rate": rate,
                    **{f"{steps} {share}": list(map(measured, all_)) for (steps, share), all_ in runs.items()},
                }
                for name, (rate, runs) in found.items()
            },
            indent=1,
        )
    )
    print(f"seeds {settings.seeds}, {settings.rows} held-out rows\n")
    print(f"| steps | share of the text | recipe | learning rate | {' | '.join(MEASURES)} |")
    print("|---" * (4 + len(MEASURES)) + "|")
    for key in next(iter(found.values()))[1]:
        for name, (rate, runs) in found.items():
            print(f"| {key[0]} | {key[1]:.0%} | {name} | {rate:g} | {row(runs[key])} |")


def presets(settings: Settings, pool: ProcessPoolExecutor) -> None:
    """Presets as they are (the README's table is of the quickstart), and what they are compared with."""
    rows = {
        name: [
            pool.submit(
                run_stages,
                ["--seed", str(seed), "--samples", "0"],
                settings.out / f"{stages[0]}-{number}-{seed}",
                stages,
            )
            for seed in settings.seeds
        ]
        for number, (name, stages) in enumerate(PRESETS[settings.table].items())
    }
    print(f"| | {' | '.join(MEASURES)} | seconds |")
    print("|---" * (2 + len(MEASURES)) + "|")
    for name, futures in rows.items():
        summaries = [future.result() for future in futures]
        seconds = statistics.mean(summary["seconds"] for summary in summaries)
        print(f"| {name} | {row(summaries)} | {seconds:.0f} |", flush=True)
    ends = summaries[0]["bits_per_byte"]
    print(f"\nteacher: {ends['teacher']:.3f} bits per byte; student before: {ends['student_start']:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))

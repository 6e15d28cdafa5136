"""The plots of docs/recipes.md (needs matplotlib).

    python benchmarks/plot.py recipes runs/recipes/results.json docs/recipes.svg
    python benchmarks/plot.py curves docs/recipes-real.svg "next byte + sft=runs/a,runs/b" "published=runs/c,runs/d"

`recipes` shows what benchmarks/recipes.py measured, a panel for each share of the text; `curves` the held-out text of
runs over the bytes that they read, a line for each run.
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "minalm"
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")


def recipes(results: Path, out: Path) -> None:
    """Bits per byte and nats a chunk of each recipe: every seed, and the mean."""
    found = json.loads(results.read_text())
    shares = [key for key in next(iter(found.values())) if key != "rate"]
    figure, panels = plt.subplots(len(shares), 2, figsize=(9, 0.4 * len(found) * len(shares) + 1.5), squeeze=False)
    for row, share in zip(panels, shares):
        for panel, measure, name in zip(row, (0, 1), ("bits per byte", "nats a chunk")):
            for height, (recipe, runs) in enumerate(reversed(found.items())):
                values = [values[measure] for values in runs[share]]
                panel.plot(values, [height] * len(values), "o", color="tab:blue", alpha=0.5)
                panel.plot(statistics.mean(values), height, "k|", markersize=14)
            steps, part = share.split()
            panel.set_yticks(range(len(found)), list(reversed(found)) if measure == 0 else [])
            panel.set_title(f"{name}; {steps} steps, {float(part):.0%} of the text", fontsize=9)
            panel.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def curves(out: Path, groups: list[str]) -> None:
    """Bits per byte of held-out text over the steps of runs, from their evaluations.jsonl."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5))
    for colour, group in zip(COLOURS, groups, strict=False):
        name, paths = group.split("=")
        for number, path in enumerate(paths.split(",")):
            rows = [json.loads(line) for line in (Path(path) / "evaluations.jsonl").read_text().splitlines()]
            rows = [row for row in rows if row["step"] > 0]
            steps = [row["step"] for row in rows]
            label = None if number else name
            panels[0].plot(steps, [row["bits_per_byte"]["student"] for row in rows], "o-", color=colour, label=label)
            panels[1].plot(steps, [row["agreement"] for row in rows], "o-", color=colour, label=label)
    panels[0].axhline(rows[0]["bits_per_byte"]["teacher"], color="grey", linestyle=":", label="teacher")
    for panel, name in zip(panels, ("bits per byte, held out", "mean |log p_S - log p_T| a chunk, nats")):
        panel.set_xlabel("steps")
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "recipes":
        recipes(Path(sys.argv[2]), Path(sys.argv[3]))
    elif len(sys.argv) > 3 and sys.argv[1] == "curves":
        curves(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(__doc__)

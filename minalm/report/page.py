"""The page itself: page.html with the style, the script and the data put in."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minalm.report.runs import RunData

PARTS = ("page.html", "page.css", "page.js")  # beside this file


def write_page(out: Path, runs: Sequence[RunData], judged: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes the page. `judged`: a run's name -> its texts (texts.judged_texts)."""
    html, css, script = ((Path(__file__).with_name(name)).read_text("utf-8") for name in PARTS)
    data = {"runs": [{**run_values(run), "texts": judged.get(run.name)} for run in runs]}
    # Within a script element "</" would end it, and JSON has another way to write "<".
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    for mark, part in (("/*STYLE*/", css), ("/*SCRIPT*/", script), ("/*DATA*/", text)):
        html = html.replace(mark, part, 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, "utf-8")


def run_values(run: RunData) -> dict[str, Any]:
    """What the page shows of a run, as JSON: metrics by columns, the rest as it is in the run's folder."""
    names = sorted({name for row in run.metrics for name in row})
    return {
        "name": run.name,
        "settings": run.settings,
        "metrics": {name: [_rounded(row.get(name)) for row in run.metrics] for name in names},
        "averaged": run.averaged,
        "evaluations": run.evaluations,
        "samples": run.samples,
        "summary": run.summary,
        "notes": run.notes,
    }


def _rounded(value: int | float | None) -> int | float | None:
    """Six digits are enough for a curve."""
    return float(f"{value:.6g}") if isinstance(value, float) else value

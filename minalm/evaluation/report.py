"""Results as JSON, and as a table in the form of the published byte models' cards."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minalm.errors import InputError

# The cards' columns in their order, then others; a task that is not here is called by its own name.
TITLES = {
    "mmlu": "MMLU",
    "boolq": "BoolQ",
    "piqa": "PiQA",
    "ifeval": "IFEval",
    "arc_challenge": "ARC-C",
    "arc_easy": "ARC-E",
    "arithmetic": "Arithmetic",
    "agieval_en": "AGIEval EN",
    "agieval_cn": "AGIEval ZH",
}
METRICS = (
    "acc",
    "prompt_level_strict_acc",
    "exact_match",
    "bits_per_byte",
)  # the one that a table shows, if it is there
NO_SHARES = ("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity")  # neither in percent nor in the mean
JSON_FILE, TABLE_FILE = "evaluation.json", "evaluation.md"


class Measured(NamedTuple):
    """One number of the table."""

    metric: str
    value: float
    error: float | None  # standard error
    items: int


@dataclass(frozen=True)
class ModelResults:
    """Of a model, or an ensemble."""

    name: str
    tasks: Mapping[str, Measured]
    all_metrics: Mapping[str, Mapping[str, Any]]  # the harness' own results
    bits_per_byte: Mapping[str, float | int | None] | None
    notes: tuple[str, ...] = ()


def measured(results: Mapping[str, Any], names: Sequence[str]) -> dict[str, Measured]:
    """The numbers of the table in what the harness returned, for tasks, groups, and the tasks of a tag each."""
    items = {name: count["effective"] for name, count in results["n-samples"].items()}
    found = {}
    for name in names:
        shown = [name] if name in results["results"] else _tagged(results, name)
        for each in shown:
            members = [task for task in _tasks_below(results["group_subtasks"], each) if task in items]
            found[each] = _one(each, results["results"][each], sum(items[task] for task in members))
    return found


def _one(task: str, values: Mapping[str, Any], items: int) -> Measured:
    names = [key.partition(",")[0] for key in values if "," in key]
    metrics = [name for name in names if not name.endswith("_stderr")]
    if not metrics:
        raise InputError(f"task {task} has no number of its own: name its tasks one by one")
    metric = next((name for name in METRICS if name in metrics), metrics[0])
    key = next(key for key in values if key.partition(",")[0] == metric)
    error = values.get(key.replace(metric, f"{metric}_stderr", 1))
    return Measured(metric, float(values[key]), float(error) if isinstance(error, float) else None, items)


def _tasks_below(groups: Mapping[str, Sequence[str]], name: str) -> list[str]:
    children = groups.get(name) or []
    return [name] if not children else [task for child in children for task in _tasks_below(groups, child)]


def _tagged(results: Mapping[str, Any], name: str) -> list[str]:
    tags = {task: config.get("tag") or [] for task, config in results["configs"].items()}
    return [task for task, tag in tags.items() if name == tag or name in tag]


def table(models: Sequence[ModelResults]) -> str:
    """A Markdown table: a row for each model, in percent with standard errors, and the mean of the columns."""
    names = list(dict.fromkeys(name for model in models for name in model.tasks))
    names.sort(key=lambda name: list(TITLES).index(name) if name in TITLES else len(TITLES))
    has_text = any(model.bits_per_byte is not None for model in models)
    shares = [name for name in names if _first(models, name).metric not in NO_SHARES]
    head = ["model", *(TITLES.get(name, name) for name in names)]
    head += ["Avg."] * (len(shares) > 1) + ["bits per byte"] * has_text
    rows = []
    for model in models:
        cells = [model.name]
        cells += [_cell(model.tasks[name]) if name in model.tasks else "" for name in names]
        if len(shares) > 1:
            known = [model.tasks[name].value for name in shares if name in model.tasks]
            cells.append(f"{100 * sum(known) / len(known):.1f}" if len(known) == len(shares) else "")
        if has_text:
            text = model.bits_per_byte
            cells.append("" if text is None else _with_error(text["value"], text["error"], 1.0, 3))
        rows.append(cells)
    lines = [head, ["---"] * len(head), *rows]
    shown = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    firsts = [(TITLES.get(name, name), _first(models, name)) for name in names]
    metrics = [f"{title} {one.metric} of {one.items:,} items" for title, one in firsts]
    unit = "In percent" if len(shares) == len(names) else "In percent where it is a share"
    told = f"{unit}; ± one standard error. {'; '.join(metrics)}." if metrics else ""
    notes = [f"{model.name}: {note}." for model in models for note in model.notes]
    return "\n\n".join(filter(None, [shown, told, *notes])) + "\n"


def _first(models: Sequence[ModelResults], task: str) -> Measured:
    return next(model.tasks[task] for model in models if task in model.tasks)


def _cell(one: Measured) -> str:
    factor, digits = (1.0, 3) if one.metric in NO_SHARES else (100.0, 1)
    return _with_error(one.value, one.error, factor, digits)


def _with_error(value: float, error: float | None, factor: float, digits: int) -> str:
    shown = f"{factor * value:.{digits}f}"
    return shown if error is None else f"{shown} ± {factor * error:.{digits}f}"


def check_out(folder: Path) -> None:
    """Raises InputError if there are results in the folder, or it cannot be one."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder")
    for name in (JSON_FILE, TABLE_FILE):
        if (folder / name).exists():
            raise InputError(f"--out {folder} holds {name} already: name another folder, or remove it")


def write(folder: Path, settings: Mapping[str, Any], models: Sequence[ModelResults]) -> None:
    """Writes the settings, all numbers and the table. Each file appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"settings": dict(settings), "models": [_plain(model) for model in models]}
    for name, text in ((JSON_FILE, json.dumps(values, indent=2, default=str) + "\n"), (TABLE_FILE, table(models))):
        partial = folder / f".{name}.partial"
        partial.write_text(text, "utf-8")
        os.replace(partial, folder / name)


def _plain(model: ModelResults) -> dict[str, Any]:
    return asdict(model) | {"tasks": {name: one._asdict() for name, one in model.tasks.items()}}

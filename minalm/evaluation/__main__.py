"""Measures models on tasks of the LM Evaluation Harness, and in bits per byte of any text.

    python -m minalm.evaluation SmolLM2-135M-Instruct --tasks arc_easy,piqa --limit 100
    python -m minalm.evaluation runs/smollm2-135m-byte --tasks ifeval --chat --out results/
    python -m minalm.evaluation smollm2-bytes gemma-bytes --ensemble --tasks boolq
    python -m minalm.evaluation MODEL OTHER --text held-out.txt

A model is a Hugging Face folder, the name of one on the hub (org/name), or a run of train.py.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tyro.conf import Positional, arg

from minalm.errors import InputError, check_at_least
from minalm.evaluation import harness, report
from minalm.evaluation.bolmo_scoring import SAID, BolmoScorer, Likelihood
from minalm.evaluation.harness import Generate, TaskModel
from minalm.evaluation.report import ModelResults
from minalm.evaluation.scoring import Scorer
from minalm.evaluation.texts import bits_per_byte, read_documents
from minalm.generation.kinds import generator_of
from minalm.huggingface.folder import read_generation_config
from minalm.huggingface.loaded import LoadedModel, model_folder
from minalm.models.bolmo import Bolmo
from minalm.models.ensemble import Mean, normalized_weights
from minalm.parallel.distributed import exit_on_input_error
from minalm.parallel.mesh import MeshConfig, run_mesh


@dataclass(frozen=True)
class Config:
    """What to measure, on which models."""

    models: Positional[Annotated[tuple[Path, ...], arg(metavar="MODEL", help="models; each gets a row of its own.")]]
    tasks: str = ""
    """Tasks or groups of the LM Evaluation Harness, with commas (pip install 'minalm[eval]')."""
    text: tuple[Path, ...] = ()
    """Text in the forms that train.py reads as data (docs/data.md), not weighted: bits per byte."""
    ensemble: bool = False
    """Take the models for one."""
    weights: tuple[float, ...] | None = None
    """Of an ensemble's models. Default: equal."""
    mean: Literal["probability", "log"] = "probability"
    """Of an ensemble: mean of probabilities, or of their logarithms."""
    limit: int | None = None
    """Only the first so many items of each task."""
    few_shot: int | None = None
    """Examples in the context. Default: what each task says."""
    chat: bool = False
    """Write contexts with the model's chat template."""
    include_path: tuple[Path, ...] = ()
    """Folders with task files (.yaml) that go before the harness' own."""
    batch_size: int = 8
    """Rows that are read at once; it changes results by rounding alone."""
    window: int = 2048
    """Bytes of --text that are seen at once: each half of them is predicted after the half before."""
    likelihood: Likelihood = "causal"
    """Of a Bolmo: reads the bytes one by one (causal), or all at once, which is faster but no likelihood (two-sided)."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the models; log-probabilities are float32 in any case."""
    out: Path | None = None
    """Folder for evaluation.json and evaluation.md. Default: the table is printed only."""
    mesh: MeshConfig = MeshConfig()

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def check(self) -> None:
        """Raises InputError for settings that make no sense."""
        check_at_least(self, {"limit": 1, "few_shot": 0, "batch_size": 1})
        if not self.models:
            raise InputError("there is no model to measure: name at least one")
        if not self.task_names and not self.text:
            raise InputError("there is nothing to measure: give --tasks or --text")
        for name in ("weights", "mean"):
            if not self.ensemble and getattr(self, name) != getattr(Config, name):
                raise InputError(f"--{name} is for an ensemble: give --ensemble too")
        if self.ensemble:
            normalized_weights(self.weights, len(self.models))
        if self.out is not None:
            report.check_out(self.out)


def main(config: Config) -> None:
    """What can be wrong is found before the first model is read, as far as it can."""
    config.check()
    mesh = run_mesh(config.mesh, config.batch_size, 1)
    documents = read_documents(config.text) if config.text else []
    folders = [model_folder(name) for name in config.models]
    tasks = harness.load_tasks(config.task_names, config.include_path, config.few_shot) if config.task_names else None
    rows = [(*zip(config.models, folders),)] if config.ensemble else [(pair,) for pair in zip(config.models, folders)]
    results = [measure(config, row, tasks, documents, mesh) for row in rows]
    print(report.table(results), end="")
    if config.out is not None:
        report.write(config.out, asdict(config), results)


def measure(
    config: Config, members: Sequence[tuple[Path, Path]], tasks: dict | None, documents: Sequence[str], mesh: Mesh
) -> ModelResults:
    """The results of a model, or of several as one; `members`: their names and folders."""
    names = [str(name) for name, _ in members]
    models = [LoadedModel.read(folder) for _, folder in members]
    for note in (note for model in models for note in model.vocabulary.notes):
        print(f"Note: {note}.", file=sys.stderr)
    lengths = [read_generation_config(folder).max_length for _, folder in members]
    longest = min(filter(None, lengths), default=None)
    dtype, mean, weights = jnp.dtype(config.compute_dtype), config.mean, config.weights
    bolmo = any(isinstance(loaded.model, Bolmo) for loaded in models)
    if bolmo and len(models) > 1:
        raise InputError("a Bolmo is measured alone: the patches are its own, so no ensemble can have it as a member")
    if bolmo:
        scorer = BolmoScorer(models[0], mesh, dtype, config.batch_size, config.likelihood)
    else:
        scorer = Scorer(models, mesh, dtype, weights, mean, config.batch_size, longest)
    name = names[0]
    if config.ensemble:
        shares = normalized_weights(weights, len(models))
        name = f"mean {mean} of " + " and ".join(f"{share:.2g} {each}" for share, each in zip(shares, names))
    found, everything, text = {}, {}, None
    if documents:
        with progress(f"{name}: stretches of text") as advance:
            text = bits_per_byte(scorer, documents, config.window, advance)._asdict()
    if tasks is not None:
        with progress(f"{name}: answers") as advance:
            generate = continuations(models, mesh, dtype, weights, mean)
            model = TaskModel(scorer, generate, date.today().isoformat(), advance)
            answers = harness.run_tasks(model, tasks, config.limit, config.chat)
        found, everything = report.measured(answers, config.task_names), answers["results"]
    notes = (f"{scorer.cut:,} contexts were longer than {longest:,} tokens and lost their beginning",) * bool(
        scorer.cut
    )
    if bolmo and config.likelihood == "two-sided":
        notes = (*notes, SAID)
    return ModelResults(name, found, everything, text, notes)


def continuations(
    models: Sequence[LoadedModel], mesh: Mesh, dtype: jnp.dtype, weights: Sequence[float] | None, mean: Mean
) -> Generate:
    """What writes for tasks that generate. The models are laid out for that when the first task does."""
    generator = functools.cache(lambda: generator_of(models, mesh, dtype, weights, mean))
    stops = models[0].vocabulary.stop_ids

    def generate(prompts, generation):
        written = [[] for _ in prompts]  # with the token in which a stop string begins: the text before it counts
        settings = generation.sampling, generation.max_tokens, stops, generation.stop_strings
        generator().generate(prompts, *settings, on_tokens=lambda row, ids: written[row].extend(ids))
        return written

    return generate


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int], None]]:
    """Counts on standard error what is done, if that is a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        number = bar.add_task(what, total=None)
        yield lambda count: bar.advance(number, count)


def cli(arguments: Sequence[str] | None = None) -> None:
    """The program. Bad input ends it with one sentence."""
    with exit_on_input_error():
        main(tyro.cli(Config, prog="python -m minalm.evaluation", description=__doc__, args=arguments))


if __name__ == "__main__":
    cli()

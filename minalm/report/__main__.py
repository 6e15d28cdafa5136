"""One page about runs: curves over each other, samples, and how teacher and student cut up and judge a text.

    python -m minalm.report runs/quickstart runs/other
    python -m minalm.report runs/quickstart --out quickstart.html --text "Water boils at 100 °C."

The page is one file that needs no network. Runs may still be going on.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from minalm.errors import InputError
from minalm.parallel.distributed import exit_on_input_error
from minalm.report.page import write_page
from minalm.report.runs import RunData, read_run, short_names
from minalm.report.texts import EXAMPLE, MOST_BYTES, judged_texts


@dataclass(frozen=True)
class Config:
    """What the page is about."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN", help="folders of runs of train.py.")]]
    out: Path = Path("report.html")
    """The page. A file that is there is replaced."""
    text: tuple[str, ...] = ()
    """Texts that teacher and student of each run read. Default: the beginnings of samples, and an example."""
    models: bool = True
    """Read models, to show how they judge texts."""

    def check(self) -> None:
        """Raises InputError for settings that make no sense."""
        if not self.runs:
            raise InputError("there is nothing to report: name the folders of runs")
        if self.out.is_dir():
            raise InputError(f"{self.out} is a folder: name a file with --out")
        if len({path.resolve() for path in self.runs}) < len(self.runs):
            raise InputError("a run is named twice: name it once")
        for text in self.text:
            if not text.strip() or len(text.encode(errors="replace")) > MOST_BYTES:
                raise InputError(f"a --text is empty or has more than {MOST_BYTES:,} bytes: give another")


def main(config: Config) -> None:
    """Reads the runs and writes the page."""
    config.check()
    names = short_names(config.runs)
    runs = [read_run(path, name) for path, name in zip(config.runs, names, strict=True)]
    judged = {}
    for run in runs if config.models else ():
        try:
            judged[run.name] = judged_texts(run, config.text or texts_of(run))
        except InputError as error:  # the rest of the page is as good without them
            run.notes.append(f"What its models make of texts is left out: {error}.")
            print(f"{run.name}: what its models make of texts is left out: {error}", file=sys.stderr)
    write_page(config.out, runs, judged)
    print(f"The report is in {config.out}.")


def texts_of(run: RunData) -> list[str]:
    """The beginnings of a run's samples, which are held-out text, and an example."""
    prompts = [sample["prompt"] for row in run.samples[:1] for sample in row["samples"][:2]]
    return [*(prompt for prompt in prompts if prompt.strip()), EXAMPLE]


if __name__ == "__main__":
    with exit_on_input_error():
        main(tyro.cli(Config, description=__doc__))

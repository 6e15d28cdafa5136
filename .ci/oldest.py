"""Prints the oldest version that pyproject.toml allows of each dependency, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
extras = project["optional-dependencies"]
for line in (
    *project["dependencies"],
    *extras["tpu"],
    *extras["eval"],
    *extras["data"],
    *extras["hub"],
    *extras["test"],
):
    if (found := re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line)) is not None:
        print(f"{found[1]}=={found[2]}")

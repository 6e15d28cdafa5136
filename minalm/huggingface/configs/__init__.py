"""The architectures of the headline models, as the config.json files of the hub describe them.

With these, the cost of a run can be estimated without a download. Each file holds only what an architecture depends on.
"""

import json
from importlib import resources

from minalm.huggingface.families import parse_config
from minalm.models.config import ModelConfig


def known_config(name: str) -> ModelConfig | None:
    """The architecture of a model on the hub (`org/name`), or None if it is not one of those kept here."""
    for file in resources.files(__name__).iterdir():
        if file.name == f"{name.replace('/', '--')}.json":
            return parse_config(file.name, json.loads(file.read_text("utf-8")))[1]
    return None

"""The settings of a run as plain values, by the names of their flags.

A program's configuration is a dataclass of small ones. A group in `DOTTED` gives its flags a prefix (--losses.alm), the
others give none (--steps), so that a group can be divided without a change for users.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

DOTTED = ("losses", "mesh")


def plain(config: Any) -> dict[str, Any]:
    """The settings of a configuration as config.yaml holds them: numbers, strings, lists, and one dict a dotted
    group."""
    settings: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(dataclasses.asdict(config), default=str)).items():
        group = dataclasses.is_dataclass(getattr(config, name)) and name not in DOTTED
        settings |= value if group else {name: value}
    return settings


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names of their flags."""
    dotted = {f"{group}.{name}": value for group in DOTTED for name, value in settings.get(group, {}).items()}
    return {name: value for name, value in settings.items() if name not in DOTTED} | dotted

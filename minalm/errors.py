"""The error that a user sees as one sentence, and the bounds of settings."""

import math
from collections.abc import Mapping
from typing import Any


class InputError(ValueError):
    """Bad input from the user. The message is one sentence that names the thing and says the remedy.

    The programs print it and exit non-zero, without a traceback.
    """


def flag(name: str) -> str:
    """The command line's name of a setting."""
    return "--" + name.replace("_", "-")


def check_at_least(config: Any, lowest: Mapping[str, int | float]) -> None:
    """Raises InputError for a field of `config` that is below its lowest sensible value, or not finite; None passes."""
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and not low <= value < math.inf:
            raise InputError(f"{flag(name)} is {value}: it must be a number of at least {low}")

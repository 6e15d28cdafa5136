"""What the processes of a run must have in common, before they start."""

from collections.abc import Mapping
from typing import Any

from minalm.errors import InputError, flag
from minalm.parallel.distributed import differences
from minalm.run.settings import flat

OWN = ("compilation_cache",)  # what each host may have for itself


def check_same_settings(settings: Mapping[str, Any]) -> None:
    """Raises InputError, on all processes, if one has other settings than the first. All must call it."""
    for name, process, other, first in differences({name: str(value) for name, value in flat(settings).items()}):
        if name not in OWN:
            raise InputError(
                f"{flag(name)} is {other} on process {process} and {first} on process 0: "
                "start the same command on all hosts"
            )


def check_same_inputs(fingerprints: Mapping[str, str]) -> None:
    """Raises InputError, on all processes, if one reads another text or model than the first. All must call it."""
    for name, process, _, _ in differences(fingerprints):
        raise InputError(f"{name} is not the same on process {process} as on process 0: give all hosts the same files")

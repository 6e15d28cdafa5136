"""Chats read by a function, for tests of what lies beneath the templates."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minalm.text.documents import Piece


@dataclass
class Chats:
    """A `ReadChat` of a function."""

    read: Callable[[Mapping[str, Any]], Piece]
    key: str = field(default_factory=lambda: os.urandom(16).hex())  # what one has indexed is not another's
    notes: dict[str, int] = field(default_factory=dict)

    def __call__(self, row: Mapping[str, Any]) -> Piece:
        return self.read(row)

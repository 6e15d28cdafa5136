"""Documents and pieces of them: sequences of texts and of what tokenizers and chat templates write around them."""

from typing import Literal, NamedTuple


class Special(NamedTuple):
    """Where a plain text begins or ends. Each tokenizer has a special token of its own for it, or none."""

    part: Literal["bos", "eos"]


class Markup(NamedTuple):
    """What chat templates write in one place: for each side, special tokens and text, or nothing."""

    student: tuple[str, ...]
    teacher: tuple[str, ...]


class Segment(NamedTuple):
    """A stretch of a document: a text, which both sides spell byte for byte, or what each side writes in its own way.

    Alignment counts each byte of a text as one unit, and so each Special and each Markup, whatever it is spelled with.
    Texts side by side are one text to a tokenizer.
    """

    content: str | Special | Markup
    loss_mask: bool = True  # whether its tokens count in the losses


# A document, or a piece of one.
Piece = tuple[Segment, ...]

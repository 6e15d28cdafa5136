"""Text before any tokenizer: documents as segments, files of documents, pieces that fit a window, their order."""

from typing import NamedTuple


class InputError(ValueError):
    """Bad input from the user. The message is one sentence that names the thing and says the remedy.

    `train.py` and `convert.py` print it and exit non-zero, without a traceback.
    """


class Control(NamedTuple):
    """A place in a document where each tokenizer writes control tokens of its own, a shared unit of alignment.

    `part` is a part of a chat template: "bos", "header_open", "header_close", "end_of_turn", "eos", or a role
    "system", "user", "assistant".
    """

    part: str


# A document, or a piece of one: text and control parts in order, each with whether its tokens count in the losses.
class Segment(NamedTuple):
    content: str | Control
    counts: bool = True


Piece = tuple[Segment, ...]

"""Documents and pieces of them: sequences of texts and special parts."""

from typing import NamedTuple


class Special(NamedTuple):
    """A place in a document where each tokenizer writes special tokens of its own. Alignment counts it as one unit.

    `part` is "bos" or "eos" in a plain text. In a chat it is "start_of_chat" or, for each message, "header_open", the
    role, "header_close", and after the text an end (see `end_of`), which some templates write differently by role.
    """

    part: str


class Segment(NamedTuple):
    """A text or a special part of a document."""

    content: str | Special
    loss_mask: bool = True  # whether its tokens count in the losses


# A document, or a piece of one.
Piece = tuple[Segment, ...]


ROLES = ("system", "user", "assistant")


def end_of(role: str, last: bool) -> Special:
    """The special part after a message's text: "end_of_system", "end_of_user", or the assistant's "end_of_turn".

    If the chat's last message is the assistant's, "end_of_chat" follows it instead. Other chats have no "end_of_chat".
    """
    if role != "assistant":
        return Special(f"end_of_{role}")
    return Special("end_of_chat" if last else "end_of_turn")


ENDS = {end_of(role, last) for role in ROLES for last in (False, True)}

"""How the families with a known chat template write a chat."""

from collections.abc import Mapping
from pathlib import Path

from minalm.text.documents import ROLES, end_of
from minalm.tokenization.chat import Parts, chat_parts, read_chat_template


def own_parts(folder: Path, names: Mapping[str, str | None], special: Mapping[str, int]) -> Parts | None:
    """What the chat template in a checkpoint's folder writes, if there is one. Raises InputError if it is of no use."""
    found = read_chat_template(folder)
    known = {f"{part}_token": name for part, name in names.items() if name is not None}
    return None if found is None else chat_parts(found, known, special)


def template_of(special: Mapping[str, int], names: Mapping[str, str | None], own: Parts | None) -> Parts:
    """The template of a tokenizer: its own one (`own_parts`), unless it is of a family in the table that writes alike."""

    def named(part: str) -> tuple[str, ...]:
        return (names[part],) if names[part] in special else ()

    rows = [row for row in _TEMPLATES if all(word in special for part in _MARKERS for word in row[part][:1])]
    if own is not None and not (rows and _writes_alike(rows[0], own)):
        return {"bos": named("bos"), **own, "eos": named("eos"), "pad": named("pad")}
    if not rows:
        return {part: named(part) for part in ("bos", "eos", "pad")}
    row = next((row for row in rows if row["pad"] == named("pad")), rows[0])
    # A chat model's config names as eos what ends a turn; any other eos is what a base model ends a text with.
    base_eos = named("eos") if named("eos") != row["end_of_turn"][:1] else ()
    return {**row, "eos": base_eos or row["eos"], "pad": named("pad") or row["pad"]}


def _writes_alike(row: Parts, own: Parts) -> bool:
    """Whether two templates write a user's message and the end of the last answer alike, as all of a family do."""
    whole = [
        ["".join(parts[part]) for part in ("end_of_user", "end_of_chat")]
        + ["".join(word for part in ("header_open", "user", "header_close") for word in parts[part])]
        for parts in (row, own)
    ]
    return whole[0] == whole[1]


_PARTS = ("bos", "header_open", "system", "user", "assistant", "header_close", "end_of_turn", "eos", "pad")


_MARKERS = ("bos", "header_open", "end_of_turn", "eos", "pad")


def _row(*cells: str) -> Parts:
    """A template whose messages all end in the same way, and whose chats start as plain texts do."""
    row = {part: tuple(cell.split(" ")) if cell else () for part, cell in zip(_PARTS, cells, strict=True)}
    ends = {end_of(role, last).part: row["end_of_turn"] for role in ROLES for last in (False, True)}
    return {"bos": row["bos"], "start_of_chat": row["bos"], **row, **ends}


# A tokenizer is of the first family whose special tokens it has, and of the one that pads as it does if several fit.
_TEMPLATES = tuple(
    _row(*cells)
    for cells in (
        (  # Llama 3
            *("<|begin_of_text|>", "<|start_header_id|>", "system", "user", "assistant", "<|end_header_id|> \n\n"),
            *("<|eot_id|>", "<|eot_id|>", "<|end_of_text|>"),
        ),
        # Gemma 2 and 3
        ("<bos>", "<start_of_turn>", "user", "user", "model", "\n", "<end_of_turn> \n", "<eos>", "<pad>"),
        (  # Qwen 2 and 3
            *("", "<|im_start|>", "system", "user", "assistant", "\n", "<|im_end|> \n"),
            *("<|endoftext|>", "<|endoftext|>"),
        ),
        # SmolLM2
        ("", "<|im_start|>", "system", "user", "assistant", "\n", "<|im_end|> \n", "<|im_end|>", "<|im_end|>"),
    )
)

"""A student made of its teacher: the teacher's layers under tables for another vocabulary."""

import dataclasses

import numpy as np

from minalm.errors import InputError
from minalm.models import transformer
from minalm.models.transformer import Transformer
from minalm.tokenization.transfer import TransferPlan, transfer_rows


def student_from_teacher(
    teacher: Transformer, plan: TransferPlan, expansion: bool, tied: bool, rows: int, seed: int = 0
) -> Transformer:
    """The teacher with tables of `rows` rows for the vocabulary of the plan, all else its own (and not copied).

    Input and output table are the plan's mix of the teacher's input and output table; `tied` uses the former for both.
    With `expansion` the teacher's input table is added at input as it is: what a byte reads at first is its own row
    plus that of the longest token which ends there. Host only: the teacher's leaves are numpy arrays or
    weights.LazyTensor, and stay what they are; the new tables are float32, so that means are rounded once, where they
    are used or written. Raises InputError if the teacher has an input expansion itself.
    """
    if teacher.expansion is not None:
        raise InputError(
            "the model is a byte student with an input expansion: start from the model that it was made of"
        )
    if rows < len(plan.start) - 1:
        raise ValueError(f"{rows} rows are not enough for {len(plan.start) - 1} tokens")
    arrays = transformer.leaves(teacher)
    old_embed, old_unembed = arrays["embed"], arrays.pop("unembed", arrays["embed"])
    arrays["embed"] = transfer_rows(plan, old_embed, rows, seed)
    if not tied:
        arrays["unembed"] = transfer_rows(plan, old_unembed, rows, seed + 1)
    if expansion:
        arrays["expansion"] = old_embed
    config = dataclasses.replace(
        teacher.config, vocab_size=rows, tied=tied, expansion_size=old_embed.shape[0] if expansion else None
    )
    return transformer.from_leaves(config, arrays)


def pad_rows(model: Transformer, rows: int) -> Transformer:
    """The model with tables of at least `rows` rows, zeros at the end, so that a mesh can divide them. Host only."""
    arrays, size = transformer.leaves(model), model.config.vocab_size
    if rows <= size:
        return model
    for table in ("embed", "unembed"):
        if table in arrays:
            arrays[table] = np.pad(arrays[table][:], ((0, rows - size), (0, 0)))
    return transformer.from_leaves(dataclasses.replace(model.config, vocab_size=rows), arrays)

"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): what post-training changed in one model, added to another.

The other is mostly a byte model that was made from the same base. Its trunk has the blocks of the base, whatever its
vocabulary is, and so takes the difference of those; its tables and its byte parts stay what they are.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from minalm.errors import InputError
from minalm.huggingface.loaded import LoadedModel
from minalm.huggingface.weights import LazyTensor
from minalm.models.bolmo import Bolmo
from minalm.models.config import BolmoConfig, ModelConfig
from minalm.models.kinds import from_leaves
from minalm.models.transformer import Transformer, leaves


@dataclass(frozen=True, eq=False)
class Moved:
    """A leaf plus `alpha` times the difference of two others, in float32, as it is read."""

    model: LazyTensor
    base: LazyTensor
    post_trained: LazyTensor
    alpha: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.model.shape

    @property
    def dtype(self) -> np.dtype:
        """Of what is read."""
        return np.dtype(np.float32)

    def __getitem__(self, index: Any) -> Float32[np.ndarray, "..."]:
        model, base, post_trained = (
            each[index].astype(np.float32) for each in (self.model, self.base, self.post_trained)
        )
        return model + np.float32(self.alpha) * (post_trained - base)


def add_difference(
    models: tuple[LoadedModel, LoadedModel, LoadedModel],
    names: tuple[Path, Path, Path],
    alpha: float,
    with_table: bool = False,
) -> Transformer | Bolmo:
    """The first model, in whose blocks `alpha` times the difference of the third and the second (their base) is added.

    `with_table`: also in its table of subwords, if that is the base's: the input expansion of a byte model, else the
    embedding. The leaves are read when they are asked for. `names` are what messages call the models.

    Raises InputError where the base and the third model have other text tokens, where shapes differ, for a model without
    such a table, and for a number that is none.
    """
    model, base, post_trained = (loaded.model for loaded in models)
    name, of_base, of_post_trained = names
    if not math.isfinite(alpha):
        raise InputError(f"--alpha is {alpha}: give a number, 1 for the whole difference")
    for each, loaded in zip(names[1:], (base, post_trained)):
        if isinstance(loaded, Bolmo):
            raise InputError(f"{each} is a Bolmo: --base and --post-trained are the subword model before and after")
    if models[1].vocabulary.id_of_bytes != models[2].vocabulary.id_of_bytes:
        raise InputError(
            f"{of_base} and {of_post_trained} have different vocabularies: --base is the model that --post-trained was "
            "made from"
        )
    places = {leaf: leaf.removeprefix("patches.") for leaf in leaves(model) if _in_trunk(leaf, model)}
    if with_table:
        table = "embed" if isinstance(model, Transformer) and model.expansion is None else "expansion"
        if table == "embed" and models[0].vocabulary.id_of_bytes != models[1].vocabulary.id_of_bytes:
            raise InputError(f"{name} has no table of the subwords of {of_base}: leave out --with-table")
        places[table] = "embed"
    arrays: dict[str, Any] = dict(leaves(model))
    first, second = leaves(base), leaves(post_trained)
    for leaf, theirs in places.items():
        shapes = [arrays[leaf].shape, *(each[theirs].shape if theirs in each else None for each in (first, second))]
        if len(set(shapes)) > 1:
            said = ", ".join(f"{shape} in {each}" for shape, each in zip(shapes, names))
            raise InputError(f"{theirs} differs in shape ({said}): all three models must have the same blocks")
        arrays[leaf] = Moved(arrays[leaf], first[theirs], second[theirs], alpha)
    missing = {leaf for each in (first, second) for leaf in each if _in_trunk(leaf, base)} - set(places.values())
    if missing:
        raise InputError(
            f"{name} lacks {min(missing)}, which {of_base} has: all three models must have the same blocks"
        )
    return from_leaves(model.config, arrays)


def other_settings(config: ModelConfig | BolmoConfig, other: ModelConfig) -> list[str]:
    """Settings of the blocks in which two models differ, by name: such as a rotary scaling for longer texts."""
    blocks = config.blocks if isinstance(config, BolmoConfig) else config
    of_tables = {
        "vocab_size",
        "tied",
        "expansion_size",
        "model_type",
        "embedding_scale",
        "logits_divisor",
        "final_softcap",
    }
    names = [field.name for field in fields(ModelConfig) if field.name not in of_tables]
    return [name for name in names if getattr(blocks, name) != getattr(other, name)]


def _in_trunk(leaf: str, model: Transformer | Bolmo) -> bool:
    return leaf.startswith("patches." if isinstance(model, Bolmo) else ("blocks.", "last."))

"""The kinds of models that are stored, by their configuration: what one is made of."""

import math
from collections.abc import Mapping
from typing import Any

from minalm.models import bolmo, transformer
from minalm.models.bolmo import Bolmo
from minalm.models.config import BolmoConfig, ModelConfig
from minalm.models.transformer import Transformer, filled, leaves


def abstract(config: ModelConfig | BolmoConfig) -> Transformer | Bolmo:
    """A model of shapes."""
    return bolmo.abstract(config) if isinstance(config, BolmoConfig) else transformer.abstract(config)


def from_leaves(config: ModelConfig | BolmoConfig, arrays: Mapping[str, Any]) -> Transformer | Bolmo:
    """The model of this architecture that has these `transformer.leaves`."""
    return filled(abstract(config), arrays)


def parameter_counts(config: ModelConfig | BolmoConfig) -> dict[str, int]:
    """The number of parameters in each table ("embed", ...), in "other" arrays, and in "all"."""
    sizes = {leaf: math.prod(array.shape) for leaf, array in leaves(abstract(config)).items()}
    tables = {leaf: sizes[leaf] for leaf in ("embed", "expansion", "unembed") if leaf in sizes}
    total = sum(sizes.values())
    return {**tables, "other": total - sum(tables.values()), "all": total}

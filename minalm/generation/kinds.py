"""What writes with a model, by its kind."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from minalm.errors import InputError
from minalm.generation.bolmo import BolmoGenerator
from minalm.generation.engine import Generator
from minalm.huggingface.loaded import LoadedModel
from minalm.models.bolmo import Bolmo
from minalm.models.ensemble import Mean


def generator_of(
    models: Sequence[LoadedModel],
    mesh: Mesh,
    dtype: jnp.dtype,
    weights: Sequence[float] | None = None,
    mean: Mean = "probability",
) -> Generator:
    """Lays out a model, or an ensemble, as `Generator.of` does. Raises InputError as that, and for a Bolmo among several."""
    if not any(isinstance(loaded.model, Bolmo) for loaded in models):
        return Generator.of(models, mesh, dtype, weights, mean)
    if len(models) > 1:
        raise InputError("a Bolmo writes alone: the patches are its own, so no ensemble can have it as a member")
    return BolmoGenerator(models[0], mesh, dtype)

"""How a step is computed: the format of its numbers, what the backward pass computes again, and in how many parts."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from minalm.errors import InputError, check_at_least
from minalm.models.transformer import Remat


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a step is computed. These settings change the result only by rounding."""

    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the models' forward and backward passes. Trained parameters and losses are float32 in any case."""
    accumulation: int = 1
    """Microbatches per device: less memory, the same gradient. With gradmag the weights are those of the whole batch,
    for which the student reads each microbatch a second time."""
    remat: Remat = "dots"
    """What the backward pass computes again: nothing, all but matrix products, or all of a layer."""

    @property
    def dtype(self) -> jnp.dtype:
        """`compute_dtype` as JAX has it."""
        return jnp.dtype(self.compute_dtype)

    def check(self, batch_size: int) -> None:
        """Raises InputError for values that make no sense."""
        check_at_least(self, {"accumulation": 1})
        if batch_size % self.accumulation:
            raise InputError(
                f"--accumulation {self.accumulation} does not divide --batch-size {batch_size}: change one"
            )

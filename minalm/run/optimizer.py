"""AdamW, its learning rate, and how its state lies on the mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from minalm.errors import InputError, check_at_least
from minalm.parallel.mesh import shardings, specs

LOWEST = {
    "steps": 1,
    "learning_rate": 0.0,
    "warmup_steps": 0,
    "beta1": 0.0,
    "beta2": 0.0,
    "epsilon": 0.0,
    "weight_decay": 0.0,
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How the student is updated."""

    steps: int
    """Updates of the student."""
    learning_rate: float = 3e-5
    """Peak learning rate. After the warm-up it falls linearly, and would reach 0 one update after the last."""
    warmup_steps: int = 2000
    """Updates over which the learning rate rises linearly to the peak, at most all of them."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean square."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on all trained parameters."""
    clip_norm: float | None = None
    """Largest norm of the gradient; a longer one is scaled down to it."""

    def check(self) -> None:
        """Raises InputError for values that make no sense."""
        check_at_least(self, LOWEST)
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise InputError(f"--clip-norm is {self.clip_norm}: it must be above 0, or None for no clipping")


def learning_rate(config: OptimizerConfig, done: Any, lower: Callable[[Any, Any], Any] = min) -> Any:
    """The learning rate of the update after `done` others. With jnp.minimum as `lower`, `done` may be an array."""
    warmup = min(config.warmup_steps, config.steps)
    rise = (done + 1) / max(warmup, 1)
    fall = (config.steps - done) / (config.steps - warmup) if warmup < config.steps else 1.0
    return config.learning_rate * lower(rise, fall)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW at `learning_rate`, on gradients of at most `clip_norm`."""
    schedule = functools.partial(learning_rate, config, lower=jnp.minimum)
    adamw = optax.adamw(schedule, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay)
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def optimizer_shardings(optimizer: optax.GradientTransformation, student: PyTree, mesh: Mesh) -> PyTree:
    """How the optimizer's state lies on the mesh: its moments as the parameters that they belong to."""
    layout = optax.tree_map_params(
        optimizer,
        lambda _, spec: spec,
        jax.eval_shape(optimizer.init, student),
        specs(student, mesh),
        transform_non_params=lambda _: P(),
    )
    return shardings(layout, mesh)

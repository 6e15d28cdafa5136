"""AdamW, its learning rate, and how its state lies on the mesh."""

import dataclasses
import functools
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from minalm.errors import InputError, check_at_least, flag
from minalm.models.bolmo import Bolmo
from minalm.parallel.mesh import shardings, specs

LOWEST = {
    "steps": 1,
    "learning_rate": 0.0,
    "block_learning_rate": 0.0,
    "warmup_steps": 0,
    "beta1": 0.0,
    "beta2": 0.0,
    "weight_decay": 0.0,
    "skip_bad_steps": 0,
}
MOST_STEPS = 2**31 - 1  # that the state's int32 counts


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How the student is updated."""

    steps: int
    """Updates of the student."""
    learning_rate: float = 3e-5
    """Peak learning rate."""
    warmup_steps: int = 2000
    """Updates over which the learning rate rises linearly to the peak, at most all of them."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """How the learning rate goes on after the warm-up. linear and cosine fall to what would be 0 one update after the
    last; wsd (warm-up, stable, decay) stays at the peak and falls linearly over the last --decay-share of the steps."""
    decay_share: float = 0.1
    """wsd: the share of all steps over which the learning rate falls."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean square."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    decay_all: bool = False
    """Weight decay on norms and biases too, and on a Bolmo's tables of embeddings."""
    block_learning_rate: float | None = None
    """Bolmo students: peak learning rate of the teacher's layers in the middle. Default: that of all else."""
    clip_norm: float | None = None
    """Largest norm of the gradient; a longer one is scaled down to it."""
    skip_bad_steps: int = 0
    """How many steps of a run may give numbers that are not finite: they change nothing. The next one ends the run."""

    def check(self) -> None:
        """Raises InputError for values that make no sense, or none in float32, in which the optimizer computes."""
        check_at_least(self, LOWEST)
        if self.steps > MOST_STEPS:
            raise InputError(f"--steps is {self.steps}: it must be a number of at most {MOST_STEPS}")
        for name in ("beta1", "beta2"):
            if numpy.float32(value := getattr(self, name)) >= 1.0:
                raise InputError(f"{flag(name)} is {value}: it must be below 1, or nothing is ever learnt")
        least, most = (float(value) for value in (SINGLE.tiny, SINGLE.max))
        if not least <= self.epsilon <= most:
            raise InputError(f"--epsilon is {self.epsilon}: it must be a number of at least {least:.2g}, as float32 is")
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            if (value := getattr(self, name)) is not None and value > most:
                raise InputError(f"{flag(name)} is {value}: it must be a number of at most {most:.2g}, as float32 is")
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise InputError(f"--clip-norm is {self.clip_norm}: it must be above 0, or None for no clipping")
        if not 0.0 < self.decay_share <= 1.0:
            raise InputError(f"--decay-share is {self.decay_share}: it must be above 0 and at most 1")
        if self.schedule != "wsd" and self.decay_share != OptimizerConfig.decay_share:
            raise InputError("--decay-share is for --schedule wsd: leave it out")
        if self.block_learning_rate is not None and self.learning_rate == 0.0:
            raise InputError("--block-learning-rate is a multiple of --learning-rate, which is 0: give both")


SINGLE = numpy.finfo(numpy.float32)


def learning_rate(config: OptimizerConfig, done: Any, np: ModuleType = numpy) -> Any:
    """The learning rate of the update after `done` others. With jax.numpy as `np`, `done` may be an array.

    `cosine`: Loshchilov and Hutter 2017 (arXiv 1608.03983, equation 5, one period). `wsd`: Hu et al. 2024 (arXiv
    2404.06395, section 4.2), here with a linear fall.
    """
    warmup = min(config.warmup_steps, config.steps)
    left = (config.steps - done) / (config.steps - warmup) if warmup < config.steps else 1.0
    if config.schedule == "linear":
        factor = left
    elif config.schedule == "cosine":
        factor = 0.5 - 0.5 * np.cos(np.pi * np.minimum(left, 1.0))
    elif config.schedule == "constant":
        factor = 1.0
    else:
        factor = np.minimum((config.steps - done) / config.steps / config.decay_share, 1.0)
    return config.learning_rate * np.minimum((done + 1) / max(warmup, 1), factor)


def decays(student: PyTree) -> PyTree:
    """True in the place of each parameter that weight decay pulls to 0: of all but norms and biases, by their names, and
    but what a Bolmo looks up."""
    looked_up = ("embed", "expansion") if isinstance(student, Bolmo) else ()

    def decayed(path, _):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return not name.endswith(("norm", "bias")) and name not in looked_up

    return jax.tree.map_with_path(decayed, student)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW at `learning_rate`, on gradients of at most `clip_norm`. Its state has one structure, with and without."""
    adamw = optax.adamw(
        functools.partial(learning_rate, config, np=jnp),
        config.beta1,
        config.beta2,
        config.epsilon,
        weight_decay=config.weight_decay,
        mask=None if config.decay_all or config.weight_decay == 0.0 else decays,
    )
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    parts = [clip, adamw]
    if config.block_learning_rate is not None:
        parts.append(blocks_scaled(config.block_learning_rate / config.learning_rate))
    return optax.chain(*parts)


def blocks_scaled(factor: float) -> optax.GradientTransformation:
    """Multiplies the updates of a Bolmo's `patches`. AdamW's updates are proportional to the learning rate, so that this
    is another learning rate there."""

    def scaled(path, update):
        return factor * update if path[0].name == "patches" else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


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

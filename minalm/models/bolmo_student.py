"""A Bolmo made of a subword model: its blocks in the middle, its table at input, and new byte blocks around them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from minalm.errors import InputError
from minalm.models import bolmo, kinds, transformer
from minalm.models.bolmo import Bolmo
from minalm.models.config import BolmoConfig
from minalm.models.transformer import Transformer
from minalm.parallel.mesh import P, make_mesh, shard, shard_map, specs

SAMPLE = 4, 512  # rows and bytes of random text, by which `pool` is scaled


def bolmo_from_teacher(
    teacher: Transformer,
    config: BolmoConfig,
    inputs: Int32[np.ndarray, "row time"],
    suffix: Int32[np.ndarray, "row time"],
    seed: int,
) -> Bolmo:
    """The teacher's blocks (not copied) and its table, in a Bolmo whose other parameters are those of
    `bolmo.initialize`.

    The rows of bytes have the mean and the standard deviation of the teacher's table in each channel. `pool` is scaled
    so that what it gives for the random bytes `inputs` has them too: that is what the first block is used to. Host
    only: leaves are float32 numpy arrays or the teacher's own. Raises InputError if the teacher is a byte student.
    """
    if teacher.expansion is not None:
        raise InputError(
            "the model is a byte student with an input expansion: start from the model that it was made of"
        )

    @jax.jit
    def own(key):  # the blocks are left out, and so never drawn
        drawn = transformer.leaves(bolmo.initialize(config, key))
        return {name: leaf for name, leaf in drawn.items() if not name.startswith(("patches.", "expansion"))}

    arrays = jax.tree.map(np.array, jax.device_get(own(jax.random.key(seed))))
    theirs = {name: leaf for name, leaf in transformer.leaves(teacher).items() if name.startswith(("blocks.", "last."))}
    arrays |= {f"patches.{name}": leaf for name, leaf in theirs.items()}
    table = np.asarray(teacher.embed[: config.expansion_size], np.float32)
    mean, deviation = table.mean(axis=0), table.std(axis=0)
    drawn = np.random.default_rng(seed).standard_normal(arrays["embed"].shape, np.float32)
    arrays |= {"expansion": table, "embed": mean + deviation * drawn}

    model = kinds.from_leaves(config, arrays)
    found = pooled(model, inputs, suffix).reshape(-1, config.embed)
    scale = teacher.config.embedding_scale
    ratio = scale * deviation / np.maximum(found.std(axis=0), 1e-6)
    arrays["pool.weight"] = arrays["pool.weight"] * ratio
    arrays["pool.bias"] = scale * mean + (arrays["pool.bias"] - found.mean(axis=0)) * ratio
    return kinds.from_leaves(config, arrays)


def pooled(
    model: Bolmo, inputs: Int32[np.ndarray, "row time"], suffix: Int32[np.ndarray, "row time"]
) -> Float32[np.ndarray, "row time embed"]:
    """What a Bolmo's blocks would read if each byte were a patch, on one device."""
    parts = eqx.tree_at(lambda model: model.patches, model, None)
    mesh = make_mesh(1, 1, jax.local_devices()[:1])

    def read(parts, inputs, suffix):
        h, _ = parts.encode(inputs, suffix, jnp.dtype("float32"))
        return parts.pool(h)

    mapped = shard_map(read, mesh, in_specs=(specs(parts, mesh), P(), P()), out_specs=P())
    return np.array(jax.jit(mapped)(shard(parts, mesh), inputs, suffix))

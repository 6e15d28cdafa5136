"""Where a Bolmo cuts a text into patches, beside its teacher's tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from minalm.batches import Side, make_batch
from minalm.models.bolmo import LOG_HALF, Bolmo
from minalm.parallel.mesh import ROWS, local_rows, shard_map, shard_rows, shardings, specs
from minalm.text.documents import Piece


class Cuts(NamedTuple):
    """A text in the pieces that each makes of it; bytes, since a piece may end within a character."""

    teacher: tuple[bytes, ...]
    student: tuple[bytes, ...]


def cuts(model: Bolmo, student: Side, teacher: Side | None, piece: Piece, mesh: Mesh, dtype: jnp.dtype) -> Cuts:
    """The patches that a model makes of a piece, with boundaries that it predicts, and the teacher's tokens.

    Special tokens are left out, and so is what does not fit in a row.
    """
    rows = len(local_rows(mesh, mesh.shape["fsdp"]))
    tokens = make_batch([piece] * rows, student, teacher).student

    def predict(
        model: Bolmo, inputs: Int[Array, "batch time"], suffix: Int[Array, "batch time"]
    ) -> Bool[Array, "batch time"]:
        h, _ = model.encode(inputs, suffix, dtype)
        return model.boundary(h) > LOG_HALF

    mapped = shard_map(predict, mesh, in_specs=(specs(model, mesh), ROWS, ROWS), out_specs=ROWS)
    run = jax.jit(mapped, out_shardings=shardings(P(), mesh))
    found = np.asarray(jax.device_get(run(model, *shard_rows((tokens.inputs, tokens.suffix), mesh))))[0]
    wanted = np.zeros(found.shape, bool)
    wanted[tokens.patch_ends[0][tokens.patch_ends[0] >= 0]] = True
    last = int(tokens.patch_ends[0].max())
    ids = tokens.inputs[0, : last + 1]
    return Cuts(*(_pieces(ids, ends[: last + 1], student) for ends in (wanted, found)))


def _pieces(ids: np.ndarray, ends: np.ndarray, side: Side) -> tuple[bytes, ...]:
    """The text between two ends; the first byte that counts is the one behind bos, and the last one ends a piece."""
    pieces, piece = [], b""
    for token, ends_here in zip(ids.tolist(), ends.tolist()):
        piece += side.vocabulary.token_bytes[token]
        if ends_here and piece:
            pieces.append(piece)
            piece = b""
    return (*pieces, piece) if piece else tuple(pieces)

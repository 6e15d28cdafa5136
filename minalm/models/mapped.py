"""A student whose hidden states are compared with those of a teacher of another width."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from minalm.models.head import PrefixTree, VocabularyMask
from minalm.models.transformer import Remat
from minalm.parallel.mesh import param
from minalm.types import BytePlaces, ByteTargets, ModelOutput, Tokens


class Mapped(eqx.Module):
    """A student and a learnt linear map for each hidden state that is compared, from its width to the teacher's (Romero
    et al. 2015, arXiv 1412.6550, section 2.2). Trained as one model (contract.py); what comes of it is `student`."""

    student: Any  # a Model
    maps: Float[Array | np.ndarray, "depth embed teacher_embed"] = param(None, None, None)

    @property
    def config(self) -> Any:
        return self.student.config

    @property
    def last(self) -> PyTree:
        return self.student.last

    def trunk(
        self,
        tokens: Tokens,
        dtype: jnp.dtype,
        remat: Remat = "none",
        states_at: Int[Array, "batch chunk"] | None = None,
    ) -> PyTree:
        return self.student.trunk(tokens, dtype, remat, states_at)

    def last_layer(self, output: PyTree, remat: Remat = "none") -> PyTree:
        return self.student.last_layer(output, remat)

    def tail(
        self,
        output: PyTree,
        tokens: Tokens,
        mask: VocabularyMask,
        states_at: Int[Array, "batch chunk"] | None = None,
        bytes_at: tuple[PrefixTree, BytePlaces] | None = None,
        targets: ByteTargets | None = None,
    ) -> ModelOutput:
        """The student's, with hidden states of the teacher's width."""
        found = self.student.tail(output, tokens, mask, states_at, bytes_at, targets)
        if found.states is None:
            return found
        maps = self.maps.astype(found.states.dtype)
        states = jnp.einsum("bdce,def->bdcf", found.states, maps, preferred_element_type=jnp.float32)
        return eqx.tree_at(lambda output: output.states, found, states)

    def in_tail(self) -> "Mapped":
        """True in the place of each parameter that `tail` reads, else False."""
        return with_student(self, self.student.in_tail(), True)


def with_student(mapped: Mapped, student: Any, maps: Any) -> Mapped:
    """The same tree with other leaves, for example bools."""
    return eqx.tree_at(lambda tree: (tree.student, tree.maps), mapped, (student, maps))


def random_maps(
    depth: int, width: int, teacher_width: int, seed: int
) -> Float[np.ndarray, "depth width teacher_width"]:
    """Maps that keep the size of a state's channels on average."""
    drawn = np.random.default_rng(seed).standard_normal((depth, width, teacher_width), np.float32)
    return drawn / np.float32(np.sqrt(width))


def bare(model: Any) -> Any:
    """The student of a `Mapped` one; another model as it is."""
    return model.student if isinstance(model, Mapped) else model

"""What every kind of model provides, and the forward pass that the step, the evaluation and the tests share."""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from minalm.models.head import PrefixTree, VocabularyMask
from minalm.models.transformer import Remat
from minalm.types import BytePlaces, ByteTargets, ModelOutput, Tokens


@runtime_checkable
class Model(Protocol):
    """A model that can be trained, read and stored: an `equinox.Module` with the members below.

    `Transformer` is one kind, and `Bolmo` (bolmo.py: a byte encoder, a subword model's blocks, a byte decoder) another,
    which has no hidden states of tokens and no distribution of plain bytes to give. A kind provides the following.

    * `trunk`, `last_layer` and `tail` run inside `shard_map`, each on what the one before it returns. The first two
      return a PyTree of the model's own choice, of floating-point arrays [batch, ...]: gradients flow through it. No
      logits of all positions leave the tail.
    * `last` holds the parameters of `last_layer`, whose gradients GradMag compares. Nothing else reads them, and
      `last_layer` reads no others.
    * Layout: each field declares the mesh axes of its array by `param(...)` (parallel/mesh.py). Nothing else is needed
      to shard a model, its gradient and the state of its optimizer.
    * Storage: a checkpoint stores the leaves by their path in the tree. A Hugging Face folder also needs the names of
      the tensors there (huggingface/kinds.py).
    * Decoding: what lays it out, and a `Generator` that writes with it (generation/kinds.py).
    """

    config: Any
    last: PyTree

    def trunk(
        self, tokens: Tokens, dtype: jnp.dtype, remat: Remat, states_at: Int[Array, "batch chunk"] | None
    ) -> PyTree:
        """Everything before the last layer, computed in `dtype`. With `states_at`, the hidden states of the embeddings
        and of each layer at these positions are part of what it returns."""

    def last_layer(self, output: PyTree, remat: Remat) -> PyTree:
        """The last layer. Hidden states in the trunk's output pass through."""

    def tail(
        self,
        output: PyTree,
        tokens: Tokens,
        mask: VocabularyMask,
        states_at: Int[Array, "batch chunk"] | None,
        bytes_at: tuple[PrefixTree, BytePlaces] | None,
        targets: ByteTargets | None,
    ) -> ModelOutput:
        """The rest. With `states_at`, the final hidden states at these positions follow those of the trunk. With
        `bytes_at`, what a teacher implies of the next byte there; with `targets`, how a byte student compares to it."""

    def in_tail(self) -> "Model":
        """True in the place of each parameter that `tail` reads, else False."""


def read(
    model: Model,
    mask: VocabularyMask,
    tokens: Tokens,
    dtype: jnp.dtype,
    remat: Remat = "none",
    states_at: Int[Array, "batch chunk"] | None = None,
    all_layers: bool = False,
    bytes_at: tuple[PrefixTree, BytePlaces] | None = None,
    targets: ByteTargets | None = None,
) -> ModelOutput:
    """What a model says of one side of a batch. Runs inside `shard_map`.

    With `states_at`, hidden states at these positions of each row (-1 reads position 0): the final ones alone, or with
    `all_layers` also the embeddings and the output of each layer but the last.
    """
    output = model.trunk(tokens, dtype, remat, states_at if all_layers else None)
    return model.tail(model.last_layer(output, remat), tokens, mask, states_at, bytes_at, targets)

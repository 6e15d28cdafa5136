"""A text as teacher and student read it: tokens, aligned chunks, log-probabilities, and what ends a group of chunks."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from minalm.batches import Side, make_batch, why_left_out
from minalm.distill.chunks import chunk_sums
from minalm.distill.losses import LossConfig, teacher_groups
from minalm.errors import InputError
from minalm.huggingface.loaded import LoadedModel
from minalm.models.contract import read
from minalm.parallel.mesh import ROWS, make_mesh, shard, shard_map, shard_rows, specs
from minalm.report.runs import RunData
from minalm.run.console import token_text
from minalm.text.corpus import text_corpus
from minalm.tokenization.vocabulary import Vocabulary
from minalm.types import Batch, Tokens, TokenStats

MOST_BYTES = 400  # of a text
LENGTH = MOST_BYTES + 16  # of a row: a token has at least a byte, and there are special tokens
EXAMPLE = "Water boils at 100 °C at sea level; in Zürich (408 m) it boils a little sooner."


def judged_texts(run: RunData, texts: Sequence[str]) -> list[dict[str, Any]]:
    """For each text: the tokens of both sides, and the chunks that they have in common. Log-probabilities are natural.

    Raises InputError if the run has no teacher, has exported no student yet, or a model is damaged or gone.
    """
    if run.settings.get("teacher") is None:
        raise InputError("it has no teacher, so there is nothing to compare")
    teacher, student = LoadedModel.read(Path(run.settings["teacher"])), LoadedModel.read(run.folder.path)
    sides = Side(student.vocabulary, student.suffixes, LENGTH), Side(teacher.vocabulary, teacher.suffixes, LENGTH)
    pieces = [text_corpus([text[:MOST_BYTES]], 2 * MOST_BYTES).piece(0) for text in texts]
    batch, mesh = make_batch(pieces, *sides), make_mesh(1, 1)
    models = [shard(part, mesh) for part in (student.model, teacher.model, student.mask, teacher.mask)]
    losses = _losses(run.settings)
    ours, theirs, sums, group = jax.device_get(_judged(tuple(models), shard_rows(batch, mesh), mesh, losses))
    found = []
    for row, text in enumerate(texts):
        if batch.left_out[row]:
            found.append({"text": text, "left_out": why_left_out(pieces[row], *sides)})
            continue
        tokens = {
            "student": _tokens(batch.student, batch.chunks.student_chunk, ours, row, student.vocabulary),
            "teacher": _tokens(batch.teacher, batch.chunks.teacher_chunk, theirs, row, teacher.vocabulary),
        }
        used = int((batch.chunks.student_chunk_end[row] >= 0).sum())
        chunks = [
            {
                "group": int(group[row, n]),
                **{
                    name: [round(float(value[row, n]), 4) for value in (logp, np.exp(boundary))]
                    for name, (logp, _, boundary) in sums.items()
                },
            }
            for n in range(used)
        ]
        found.append({"text": text, "tokens": tokens, "chunks": chunks, "ends": losses.chunks, "gamma": losses.gamma})
    return found


def _losses(settings: dict[str, Any]) -> LossConfig:
    """What of a run's losses decides where chunks end. Of `unbiased` chunks the pairs are not read: all may end."""
    chunks = settings.get("losses.chunks", LossConfig.chunks)
    return LossConfig(
        chunks="unconstrained" if chunks == "unbiased" else chunks, gamma=settings.get("losses.gamma", LossConfig.gamma)
    )


def _tokens(
    tokens: Tokens, chunk: np.ndarray, stats: TokenStats, row: int, vocabulary: Vocabulary
) -> list[dict[str, Any]]:
    """The targets of a row, each with its chunk (-1: none) and its log-probability."""
    names = {i: word for word, i in vocabulary.special.items()}
    counted = np.flatnonzero(tokens.weight[row] > 0)
    return [
        {
            "text": names.get(i) or token_text(vocabulary.token_bytes[i]),
            "special": i in names,
            "chunk": int(chunk[row, n]),
            "logp": round(float(stats.logp[row, n]), 4),
        }
        for n, i in zip(counted.tolist(), tokens.targets[row, counted].tolist(), strict=True)
    ]


def _read_both(student: Any, teacher: Any, student_mask: Any, teacher_mask: Any, batch: Batch) -> tuple:
    dtype = jnp.dtype(jnp.float32)
    ours = read(student, student_mask, batch.student, dtype)
    return ours.stats, read(teacher, teacher_mask, batch.teacher, dtype).stats


@functools.partial(jax.jit, static_argnames=("mesh", "losses"))
def _judged(models: tuple, batch: Batch, mesh: Mesh, losses: LossConfig) -> tuple:
    """What both sides say of each token, of each chunk (chunks.chunk_sums), and the group of each chunk."""
    layout, chunks = (*specs(models, mesh), jax.tree.map(lambda _: ROWS, batch)), batch.chunks
    ours, theirs = shard_map(_read_both, mesh, in_specs=layout, out_specs=ROWS)(*models, batch)
    sums = {
        "student": chunk_sums(ours, chunks.student_chunk, chunks.student_chunk_end),
        "teacher": chunk_sums(theirs, chunks.teacher_chunk, chunks.teacher_chunk_end),
    }
    return ours, theirs, sums, teacher_groups(theirs, chunks, losses)[0].index

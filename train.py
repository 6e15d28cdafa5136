"""Train a language model on another tokenizer by approximate likelihood matching (ALM).

    python train.py                                  # quickstart: a small subword model becomes byte-level
    python train.py quickstart --losses.latents 1    # every setting is a flag; `python train.py quickstart --help`
    python train.py smollm2-135m-byte --teacher SmolLM2-135M-Instruct --data chats.jsonl
    python train.py gemma2-2b-it-byte --data tulu3.jsonl --out runs/gemma --resume
    python train.py gemma2-2b-it-byte --mesh.fsdp 16 --mesh.tp 1 --compile-only v4:2x2x4   # what will it take?

Read it from top to bottom: the settings, the step, the run. The arithmetic is in minalm/ (see ARCHITECTURE.md).
"""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import sys
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
import yaml
from jax.sharding import Mesh

from minalm import checkpoint, cost, data, families, head, hf, losses, report
from minalm.evaluate import measure
from minalm.generate import generate
from minalm.gradmag import accumulated_grad, balanced_grad
from minalm.losses import LossConfig
from minalm.model import Llama3Scaling, ModelConfig, Remat, Rope, Transformer, initialize, pick
from minalm.ngrams import LongestSuffix, longest_suffix
from minalm.processes import all_come_here, is_first, join, which
from minalm.sharding import (
    ROWS,
    P,
    count_rows,
    local_rows,
    make_mesh,
    on_mesh,
    place,
    place_rows,
    place_shapes,
    shardings,
    specs,
)
from minalm.stdlib_text import stdlib_documents
from minalm.student import (
    Usage,
    load_vocabularies,
    pad_rows,
    read_template,
    read_usage,
    save,
    student_from_teacher,
    tokenizer_json,
)
from minalm.text import Control, Corpus, InputError, Piece, Segment, read_corpus, text_corpus
from minalm.transfer import plan_transfer
from minalm.types import AlignedChunks, Batch, Tokens, TokenStats
from minalm.vocab import Vocabulary, byte_vocabulary, load_vocabulary, with_control

HERE = Path(__file__).parent
LOWEST = {  # the smallest value that makes sense; a row of one token has nothing to predict
    "steps": 1,
    "batch_size": 1,
    "accumulation": 1,
    "student_length": 2,
    "teacher_length": 2,
    "evaluation_rows": 1,
    "evaluation_skip": 0,
    "evaluation_interval": 1,
    "learning_rate": 0.0,
    "warmup_steps": 0,
    "beta1": 0.0,
    "beta2": 0.0,
    "epsilon": 0.0,
    "weight_decay": 0.0,
    "seed": 0,
    "log_interval": 1,
    "save_interval": 1,
    "samples": 0,
}
MAY_CHANGE = (  # at a --resume
    *("resume", "overwrite", "out", "mesh", "log_interval", "save_interval", "evaluation_interval", "samples"),
)
OF_A_NEW_STUDENT = (
    "student_tokenizer",
    "control",
    "tied",
    "student_weights",
    "expansion",
)  # settings that --student excludes
ROW_MULTIPLE = 64  # a new vocabulary's tables are padded to it, so that a mesh can divide them

# --- settings -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged."""

    fsdp: int | None = None
    """Devices that divide the rows of a batch and the storage of parameters. Default: as many as there are for each
    --mesh.tp and divide the batch."""
    tp: int = 1
    """Devices that divide heads, MLP and vocabulary."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    out: Path
    """Folder of the run: config.yaml, metrics.jsonl, evaluations.jsonl, samples.jsonl, checkpoints/, summary.json, and
    hf/ with the student."""
    steps: int
    """Updates of the student; the learning rate falls to 0 at the last."""

    teacher: Path | None = None
    """Hugging Face folder of the teacher, or its name on the hub as org/name; the student starts from it too. Without
    one only sft is possible."""
    student: Path | None = None
    """Start from this model instead, with its own tokenizer: a byte student of an earlier run, or a published one."""
    student_tokenizer: Literal["bytes"] | Path = "bytes"
    """What the student reads: bytes, or a tokenizer.json (or its folder)."""
    control: Literal["keep", "change"] = "keep"
    """Control tokens and chat template of a student with a tokenizer: the teacher's, or that tokenizer's own."""
    tied: bool | None = None
    """Whether the student's output table is its input table. Default: not for bytes, else as the teacher's."""
    student_weights: Literal["transfer", "random"] = "transfer"
    """Start from the teacher's weights, or (a control) from random ones of the same shape."""
    expansion: bool = True
    """Byte students: add to each byte's embedding the teacher's of the longest of its tokens that ends there."""
    train_expansion: bool = False
    """Train the expansion table too. By default it stays as the teacher's embedding table is."""
    architecture: Annotated[ModelConfig | None, tyro.conf.Suppress] = None  # of a run without a teacher

    data: tuple[Path, ...] = ()
    """Training text: .txt and .jsonl files (`text` or `messages`), or folders of them."""
    held_out: tuple[Path, ...] = ()
    """Text for the evaluation at both ends of the run, in the same forms."""
    stdlib: bool = False
    """Where --data or --held-out name no files: the sources of Python's standard library, split by a hash of paths."""
    stdlib_fraction: float = 1.0
    """Share of the standard library's training documents that the student sees."""
    mask_prompt: bool = False
    """Chats: only the assistant's turns count in the losses."""
    piece_bytes: int = 2048
    """Documents are cut into pieces of at most this many bytes, one a row."""
    student_length: int = 2048
    """Tokens of a row, student's side. What is longer is cut off."""
    teacher_length: int = 512
    """Tokens of a row, teacher's side. What is longer is cut off."""
    batch_size: int = 32
    """Rows of a step, over all devices."""
    evaluation_rows: int = 256
    """Rows of held-out text that are evaluated."""
    evaluation_skip: int = 0
    """Rows of held-out text before those (to choose settings on other text than the final numbers come from)."""
    evaluation_interval: int | None = None
    """Steps between evaluations, beside those at both ends. Default: none."""

    losses: LossConfig = LossConfig()
    learning_rate: float = 3e-5
    """The highest learning rate of AdamW."""
    warmup_steps: int = 2000
    """Steps over which the learning rate rises from 0, at most all of them."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean square."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on all trained parameters."""
    clip_norm: float | None = None
    """Largest norm of the gradient; what is longer is scaled down to it."""

    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Numbers in the models' forward and backward passes. Trained parameters and losses are float32 in any case."""
    accumulation: int = 1
    """Parts that each device's rows are worked off in, one after the other: less memory, the same gradient. With gradmag
    the weights are those of the whole batch, for which the parts are read a second time."""
    remat: Remat = "dots"
    """What the backward pass computes again: nothing, all but matrix products, or all of a layer."""
    mesh: MeshConfig = MeshConfig()
    seed: int = 0
    """Of the order of the text, of whatever weights are drawn, and of the samples."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    save_interval: int = 1000
    """Steps between checkpoints; the newest two are kept."""
    samples: int = 3
    """Held-out texts that the student continues, before and after."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    overwrite: bool = False
    """Remove the run that is in --out."""
    compile_only: str | None = None
    """Compile the step for chips that need not be there, for example v4:2x2x4, v5e:4x4 or cpu:8, show what it takes of
    them, and end. Needs neither data nor weights."""

    def check(self) -> None:
        """Raises InputError for settings that do not go together. (In __post_init__, tyro would wrap the sentence.)"""
        self.losses.check()
        for name, low in LOWEST.items():
            value = getattr(self, name)
            if value is not None and not low <= value < np.inf:
                raise InputError(f"{_flag(name)} is {value}: it must be a number of at least {low}")
        if self.batch_size % self.accumulation:
            raise InputError(
                f"--accumulation {self.accumulation} does not divide --batch-size {self.batch_size}: change one"
            )
        if not 0.0 < self.stdlib_fraction <= 1.0:
            raise InputError(f"--stdlib-fraction is {self.stdlib_fraction}: it must be above 0 and at most 1")
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise InputError(f"--clip-norm is {self.clip_norm}: it must be above 0, or None for no clipping")
        if self.train_expansion and not self.expansion:
            raise InputError("--train-expansion trains a table that --no-expansion leaves out: choose one")
        if not self.data and not self.stdlib and self.compile_only is None:
            raise InputError("there is no text to train on: name .txt or .jsonl files with --data")
        if self.resume and self.overwrite:
            raise InputError("--resume goes on with a run and --overwrite removes it: choose one")
        if self.architecture is not None and (self.teacher is not None or self.student is not None):
            raise InputError(
                "this preset pretrains an architecture of its own: use another with --teacher or --student"
            )
        if self.teacher is None:
            if self.losses.needs_teacher:
                raise InputError("alm and latents need a teacher: give --teacher, or --losses.alm 0 --losses.latents 0")
            if self.architecture is None and self.student is None:
                raise InputError("there is no model to start from: name a Hugging Face folder with --teacher")
            if self.student_tokenizer == "bytes" and self.student is None:
                raise InputError("without a teacher there is no tokenizer: name one with --student-tokenizer")
        if self.student is not None:
            for name in OF_A_NEW_STUDENT:
                if getattr(self, name) != getattr(Config, name):  # the default
                    flag = "--no-expansion" if name == "expansion" else _flag(name)
                    raise InputError(f"--student brings its own tokenizer and tables: leave out {flag}")
        elif self.student_tokenizer == "bytes":
            for name, value in (("control", "change"), ("tied", True)):
                if getattr(self, name) == value:
                    raise InputError(
                        f"{_flag(name)} {value} is not for bytes: give --student-tokenizer, or leave it out"
                    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


HEADLINE = dict(  # what both published byte models were trained with, written out whatever the defaults are
    steps=20_000,
    batch_size=32,
    piece_bytes=2048,
    student_length=2048,
    teacher_length=512,
    losses=LossConfig(
        sft=1.0,
        alm=1.0,
        latents=1.0,
        balance="gradmag",
        preserve_magnitude=True,
        chunks="merged",
        debias=True,
        gamma=0.1,
        divergence="binary_ce",
        tau=100.0,
        latents_layers="last",
        latents_norm="l2_channelwise",
    ),
    expansion=True,
    train_expansion=False,
    learning_rate=3e-5,
    warmup_steps=2_000,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    weight_decay=0.0,
    clip_norm=None,
    compute_dtype="bfloat16",
    mesh=MeshConfig(fsdp=8, tp=2),  # sends the least of what 16 chips can be (docs/performance.md); published: 4 x 4
    remat="dots",
)
SHAPES = {  # of models on the hub, as their config.json has them, so that --compile-only fetches nothing
    "google/gemma-2-2b-it": ModelConfig(
        vocab_size=256_000,
        embed=2304,
        mlp=9216,
        layers=26,
        heads=8,
        kv_heads=4,
        head_dim=256,
        windows=(4096, None) * 13,
        query_scale=256**-0.5,
        attention_softcap=50.0,
        final_softcap=30.0,
        norm_eps=1e-6,
        norm_plus_one=True,
        post_norms=True,
        activation="gelu_tanh",
        embedding_scale=math.sqrt(2304),
        model_type="gemma2",
    ),
    "meta-llama/Llama-3.2-3B-Instruct": ModelConfig(
        vocab_size=128_256,
        embed=3072,
        mlp=8192,
        layers=28,
        heads=24,
        kv_heads=8,
        head_dim=128,
        windows=(None,) * 28,
        rope=Rope(500_000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
        model_type="llama",
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ModelConfig(
        vocab_size=49_152,
        embed=576,
        mlp=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        windows=(None,) * 30,
        rope=Rope(100_000.0),
        model_type="llama",
    ),
}
FROM_THE_HUB = " Needs --data; the teacher is the hub's unless --teacher names a folder."
PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "A small subword model becomes byte-level on the text of Python's own library: minutes on 2 CPU cores.",
        Config(
            out=Path("runs/quickstart"),
            teacher=HERE / "quickstart_teacher",
            train_expansion=True,
            stdlib=True,
            stdlib_fraction=0.25,
            steps=1_500,
            batch_size=4,
            piece_bytes=384,
            student_length=384,
            teacher_length=128,
            learning_rate=6e-3,
            warmup_steps=50,
            compute_dtype="float32",
            save_interval=500,
        ),
    ),
    "quickstart-teacher": (
        "Pretrains the quickstart's teacher: next-token prediction alone, from random weights.",
        Config(
            out=Path("runs/quickstart-teacher"),
            architecture=ModelConfig(
                vocab_size=4096,
                embed=128,
                mlp=384,
                layers=4,
                heads=2,
                kv_heads=1,
                head_dim=64,
                windows=(None,) * 4,
            ),
            student_tokenizer=Path("runs/quickstart-tokenizer"),
            losses=LossConfig(alm=0.0, balance="fixed"),
            stdlib=True,
            steps=4_500,
            batch_size=16,
            piece_bytes=448,
            student_length=128,
            learning_rate=4e-3,
            warmup_steps=100,
            clip_norm=1.0,
            compute_dtype="float32",
        ),
    ),
    "gemma2-2b-it-byte": (
        "Gemma 2 2B IT becomes byte-level, as published." + FROM_THE_HUB,
        Config(out=Path("runs/gemma2-2b-it-byte"), teacher=Path("google/gemma-2-2b-it"), **HEADLINE),
    ),
    "llama3.2-3b-it-byte": (
        "Llama 3.2 3B Instruct becomes byte-level, as published." + FROM_THE_HUB,
        Config(out=Path("runs/llama3.2-3b-it-byte"), teacher=Path("meta-llama/Llama-3.2-3B-Instruct"), **HEADLINE),
    ),
    "smollm2-135m-byte": (
        "SmolLM2 135M Instruct becomes byte-level on one device." + FROM_THE_HUB,
        Config(
            out=Path("runs/smollm2-135m-byte"),
            teacher=Path("HuggingFaceTB/SmolLM2-135M-Instruct"),
            steps=200,  # an hour of two CPU cores
            batch_size=4,
            piece_bytes=512,
            student_length=512,
            teacher_length=192,
            losses=LossConfig(sft=1.0, alm=1.0, latents=1.0),
            learning_rate=3e-4,
            warmup_steps=20,
            log_interval=1,
            save_interval=20,
        ),
    ),
}

# --- the step -----------------------------------------------------------------------------------------------------


class State(eqx.Module):
    """What training changes. `student` holds the trained parameters only; None stands where one is frozen."""

    student: Transformer
    optimizer: optax.OptState
    step: jax.Array

    def items(self) -> dict[str, Any]:
        """The parts of a checkpoint: the student can be read without the rest."""
        return {"student": self.student, "rest": {"optimizer": self.optimizer, "step": self.step}}


class Fixed(eqx.Module):
    """What the step reads and does not change."""

    student: Transformer  # the frozen parameters only; None stands where one is trained
    teacher: Transformer | None
    student_entries: head.Entries
    teacher_entries: head.Entries | None


def finish(
    config: Config,
    model: Transformer,
    entries: head.Entries,
    tokens: Tokens,
    close: jax.Array,
    trunk_output: tuple[jax.Array, jax.Array | None],
) -> tuple[TokenStats, jax.Array | None]:
    """From the trunk's output to what the losses read: token statistics, and the hidden states at the chunk ends."""
    x, states = trunk_output
    hidden = model.finish(x, config.remat)
    stats = head.token_stats(hidden, tokens.targets, model.unembedding, entries, model.config.final_softcap)
    if config.losses.latents:
        last = pick(hidden, close)[None]
        states = last if states is None else jnp.concatenate([states, last])
    return stats, states


def gradients(
    config: Config, student: Transformer, fixed: Fixed, batch: Batch
) -> tuple[Transformer, dict[str, jax.Array]]:
    """The gradient of the balanced losses over the whole batch, and what to log. Runs inside shard_map."""
    dtype = jnp.dtype(config.compute_dtype)
    all_layers = config.losses.latents > 0 and config.losses.latents_layers == "all"

    def split(tree):  # this device's rows, [row, ...] to [part, row, ...]
        return jax.tree.map(lambda rows: rows.reshape(config.accumulation, -1, *rows.shape[1:]), tree)

    def trunk(model: Transformer, tokens: Tokens, close):
        return model.trunk(tokens.inputs, tokens.ngram, close if all_layers else None, dtype, config.remat)

    def read_teacher(part: Batch):
        close = part.chunks.teacher_close
        output = trunk(fixed.teacher, part.teacher, close)
        stats, states = finish(config, fixed.teacher, fixed.teacher_entries, part.teacher, close, output)
        return stats, None if states is None else states.swapaxes(0, 1)  # rows first

    def student_trunk(student, part):
        batch, _ = part
        return trunk(eqx.combine(student, fixed.student), batch.student, batch.chunks.student_close)

    def student_tail(student, part, output):
        batch, (teacher_stats, teacher_states) = part
        model, close = eqx.combine(student, fixed.student), batch.chunks.student_close
        stats, states = finish(config, model, fixed.student_entries, batch.student, close, output)
        if teacher_states is not None:
            teacher_states = teacher_states.swapaxes(0, 1)
        terms = losses.loss_terms(config.losses, batch, stats, teacher_stats, states, teacher_states, whole)
        return terms, stats.logp

    # The teacher first, so that what the losses divide by is known before the student runs.
    teacher = None, None
    if config.losses.needs_teacher and config.accumulation == 1:
        teacher = read_teacher(batch)
    elif config.losses.needs_teacher:
        teacher = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(read_teacher, split(batch)))
    stats, states = teacher
    if stats is not None:
        # The student's inputs wait for the teacher, whose logits are then gone from memory. A number of the teacher's is
        # added to them that is 0 unless all is lost; an optimization_barrier does not bind the compiler for CPUs.
        waited_for = jnp.isnan(jnp.sum(stats.logp)).astype(jnp.int32)
        batch = eqx.tree_at(lambda batch: batch.student.inputs, batch, batch.student.inputs + waited_for)
    whole = losses.whole_batch(config.losses, batch, stats, None if states is None else states.swapaxes(0, 1))
    if config.accumulation == 1:
        part = batch, teacher
        grad, values, weights, logp = balanced_grad(student_trunk, student_tail, student, part, config.losses)
    else:
        parts = split((batch, teacher))
        grad, values, weights, logp = accumulated_grad(student_trunk, student_tail, student, parts, config.losses)
    metrics = {f"loss/{name}": value for name, value in zip(config.losses.names, values, strict=True)}
    metrics |= {f"weight/{name}": weight for name, weight in zip(config.losses.names, weights, strict=True)}
    chunks = batch.chunks
    logp = logp.reshape(chunks.student_chunk.shape)
    metrics["bits_per_byte"] = losses.bits_per_byte(logp, chunks.student_chunk, chunks.text_bytes)
    return grad, metrics


def train_step(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, state: State, fixed: Fixed, batch: Batch
) -> tuple[State, dict[str, jax.Array]]:
    """One update. optax runs here, outside shard_map, where a norm is the norm of the whole gradient."""
    layout = specs(state.student, mesh)
    grad, metrics = on_mesh(
        functools.partial(gradients, config),
        mesh,
        in_specs=(layout, specs(fixed, mesh), jax.tree.map(lambda _: ROWS, batch)),
        out_specs=(layout, P()),
    )(state.student, fixed, batch)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes step counts and floats
        updates, optimizer_state = optimizer.update(grad, state.optimizer, state.student)
    student = optax.apply_updates(state.student, updates)
    metrics["gradient_norm"] = optax.tree.norm(grad)
    return State(student, optimizer_state, state.step + 1), metrics


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW; the learning rate rises linearly from 0 and falls linearly to 0 at the last step."""
    rate = learning_rate(config)
    adamw = optax.adamw(rate, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay)
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def learning_rate(config: Config) -> optax.Schedule:
    warmup = min(config.warmup_steps, config.steps)
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    fall = optax.linear_schedule(config.learning_rate, 0.0, config.steps - warmup)
    return optax.join_schedules([rise, fall], [warmup])


def optimizer_shardings(optimizer: optax.GradientTransformation, student: Transformer, mesh: Mesh) -> Any:
    """How the optimiser's state lies on the mesh: its moments as the parameters that they belong to."""
    layout = optax.tree_map_params(
        optimizer,
        lambda _, spec: spec,
        jax.eval_shape(optimizer.init, student),
        specs(student, mesh),
        transform_non_params=lambda _: P(),
    )
    return shardings(layout, mesh)


def initial_state(optimizer: optax.GradientTransformation, student: Transformer, mesh: Mesh) -> State:
    """The state before the first step."""
    return State(
        student=student,
        optimizer=jax.jit(optimizer.init, out_shardings=optimizer_shardings(optimizer, student, mesh))(student),
        step=jnp.zeros((), jnp.int32, device=shardings(P(), mesh)),
    )


def fetch(step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
    """The metrics of a step on the host. Raises InputError if one is not finite."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not np.isfinite(list(values.values())).all():
        raise InputError(
            f"step {step} gave numbers that are not finite ({values}): "
            "start again with a lower --learning-rate or with --clip-norm"
        )
    return values


# --- the run ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Models:
    """Vocabularies and initial models, the weights in their files or on the host."""

    student_vocabulary: Vocabulary
    student_ngrams: LongestSuffix | None
    student: Transformer
    student_entries: head.Entries
    teacher_vocabulary: Vocabulary | None
    teacher_ngrams: LongestSuffix | None
    teacher: Transformer | None
    teacher_entries: head.Entries | None
    usage: Usage

    def batch(self, config: Config, pieces: list[Piece]) -> tuple[Batch, np.ndarray]:
        """The rows of these pieces, and which were left out."""
        student = self.student_vocabulary, self.student_ngrams, config.student_length
        teacher = self.teacher_vocabulary, self.teacher_ngrams, config.teacher_length
        return data.make_batch(pieces, data.Side(*student), None if self.teacher is None else data.Side(*teacher))


def is_trained(config: Config, student: Transformer) -> Transformer:
    """The student with True in the place of each parameter that is trained, False of each that stays."""
    trained = jax.tree.map(lambda _: True, student)
    if student.expansion is not None and not config.train_expansion:
        trained = eqx.tree_at(lambda model: model.expansion, trained, False)
    return trained


def load_models(config: Config) -> Models:
    """Reads vocabularies and checks models; no weights are held but the tables of a new vocabulary."""
    teacher = teacher_vocabulary = teacher_ngrams = teacher_entries = student_ngrams = None
    usage = Usage()
    if config.teacher is not None:
        folder = hf.find(config.teacher)
        teacher_vocabulary, teacher_ngrams = load_vocabularies(folder)
        teacher, usage = hf.read(folder), read_usage(folder)
        teacher_entries = entries_of(teacher_vocabulary, teacher)

    if config.student is not None:
        folder = hf.find(config.student)
        vocabulary, student_ngrams = load_vocabularies(folder)
        student, usage = hf.read(folder), read_usage(folder)
        entries_of(vocabulary, student)  # raises if the tokenizer has more ids than the tables have rows
    elif config.student_tokenizer == "bytes":
        vocabulary = byte_vocabulary(teacher_vocabulary)
        if config.expansion:
            student_ngrams = longest_suffix(teacher_vocabulary, vocabulary)
    else:
        vocabulary = load_vocabulary(config.student_tokenizer)
        if config.control == "change":
            usage = dataclasses.replace(usage, chat_template=read_template(config.student_tokenizer))
        elif teacher_vocabulary is not None:
            vocabulary = with_control(vocabulary, teacher_vocabulary)

    rows = -(-vocabulary.size // ROW_MULTIPLE) * ROW_MULTIPLE
    if config.student is not None:
        student = pad_rows(student, rows)
    elif teacher is not None:
        tied = config.tied
        if tied is None:
            tied = teacher.config.tied and config.student_tokenizer != "bytes"
        plan = plan_transfer(teacher_vocabulary, vocabulary)
        student = student_from_teacher(teacher, plan, student_ngrams is not None, tied, rows, config.seed)
        if config.student_weights == "random":
            student = initialize(student.config, jax.random.key(config.seed))
    else:
        student = initialize(config.architecture, jax.random.key(config.seed))
    if student.config.layers < 2:
        raise InputError(f"{config.student or config.teacher} has one layer: use a model of at least two")
    if config.losses.latents:
        check_hidden_states(config, student.config, teacher.config)
    tokenizer_json(vocabulary)  # raises if the student's tokenizer could not be saved at the end
    return Models(
        student_vocabulary=vocabulary,
        student_ngrams=student_ngrams,
        student=student,
        student_entries=entries_of(vocabulary, student),
        teacher_vocabulary=teacher_vocabulary,
        teacher_ngrams=teacher_ngrams,
        teacher=teacher,
        teacher_entries=teacher_entries,
        usage=dataclasses.replace(usage, max_length=usage.max_length or config.student_length),
    )


def check_hidden_states(config: Config, student: ModelConfig, teacher: ModelConfig) -> None:
    """Raises InputError unless the hidden states that the latents loss compares are of one shape."""
    for name, compared in (("embed", True), ("layers", config.losses.latents_layers == "all")):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if compared and ours != theirs:
            raise InputError(
                f"latents compares hidden states, but {name} is {ours} in {config.student} and {theirs} in "
                f"{config.teacher}: give --losses.latents 0"
            )


def make_run_mesh(config: Config, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a run, on these devices or this process's. Raises InputError if there are too few devices, or if it
    does not divide the batch."""
    devices = jax.devices() if devices is None else devices
    fsdp, tp = config.mesh.fsdp, config.mesh.tp
    if fsdp is None:
        fsdp = math.gcd(config.batch_size // config.accumulation, max(1, len(devices) // max(1, tp)))
    mesh = make_mesh(fsdp, tp, devices)
    if config.batch_size % fsdp:
        raise InputError(f"--batch-size {config.batch_size} rows do not divide over --mesh.fsdp {fsdp}: change one")
    if config.batch_size // fsdp % config.accumulation:
        raise InputError(
            f"--accumulation {config.accumulation} does not divide the {config.batch_size // fsdp} rows of each of "
            f"--mesh.fsdp {fsdp}: change one, or --batch-size"
        )
    return mesh


def load_texts(config: Config, models: Models) -> tuple[Corpus, Corpus | None]:
    """Training and held-out text; all of it is read and checked."""

    def documents(files: tuple[Path, ...], split: Literal["training", "held_out"]) -> Corpus | None:
        if files:
            return read_corpus(files, config.piece_bytes, config.mask_prompt)
        if not config.stdlib:
            return None
        return text_corpus(
            stdlib_documents(split, config.stdlib_fraction if split == "training" else 1.0), config.piece_bytes
        )

    training, held_out = documents(config.data, "training"), documents(config.held_out, "held_out")
    if held_out is not None and config.evaluation_skip >= len(held_out):
        raise InputError(
            f"--evaluation-skip {config.evaluation_skip} passes over all {len(held_out)} held-out rows: lower it"
        )
    for corpus in (training, held_out):
        for side in (models.student_vocabulary, models.teacher_vocabulary):
            for part in corpus.chat_parts if corpus is not None and side is not None else ():
                side.part_ids(part)  # raises if it cannot write that
    return training, held_out


def entries_of(vocabulary: Vocabulary, model: Transformer) -> head.Entries:
    """What is known of each row of a model's table. Raises InputError if the tokenizer has more."""
    rows = model.config.vocab_size
    return head.Entries(exists=np.arange(rows) < vocabulary.size, boundary=vocabulary.boundary_mask(rows))


def plain(config: Config) -> dict[str, Any]:
    """The settings as config.yaml holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names of their flags."""
    result = {}
    for name, value in settings.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


def read_settings(file: Path) -> Config:
    """The settings that a config.yaml holds. Raises InputError if it is not as `start_folder` wrote it."""
    try:
        return _typed(Config, yaml.safe_load(file.read_text("utf-8")))
    except (yaml.YAMLError, RecursionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{file} does not hold the settings of a run as this program writes them: name another folder"
        ) from error


def _typed(kind: Any, value: Any) -> Any:
    """What a plain value from a config.yaml was before it was written, by the annotation of its field."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if value.keys() != hints.keys():
            raise KeyError(f"{kind.__name__} has other fields")
        return kind(**{name: _typed(hints[name], value[name]) for name in hints})
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return options[options.index(value)]
    if typing.get_origin(kind) is tuple:
        return tuple(_typed(options[0], item) for item in value)
    if options:  # a union: the first that fits
        for option in options:
            try:
                return _typed(option, value)
            except (KeyError, TypeError, ValueError, AttributeError):
                continue
        raise TypeError(f"{value!r} is not of {kind}")
    if kind is Path:
        return Path(value)
    if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{value!r} is not of {kind}")
    return value


def check_folder(config: Config) -> None:
    """Raises InputError unless --out is free, or holds a run and the settings say what to do with it."""
    out, file = config.out, config.out / "config.yaml"
    if config.resume:
        if not file.exists():
            raise InputError(f"there is no run in {out} to go on with: start it without --resume")
        before, now = (flat(plain(settings)) for settings in (read_settings(file), config))
        for name, value in now.items():
            if name.split(".")[0] not in MAY_CHANGE and value != before.get(name):
                raise InputError(
                    f"{_flag(name)} is {value} but the run in {out} has {before.get(name)}: "
                    "give the same settings, or another --out"
                )
    elif out.exists() and not config.overwrite:
        raise InputError(f"{out} exists: go on with --resume, replace it with --overwrite, or name another --out")
    elif out.exists() and not file.exists():
        raise InputError(f"{out} is not a run of this program, so --overwrite leaves it alone: name another --out")


def start_folder(config: Config) -> None:
    """Makes --out, after `check_folder`, with config.yaml."""
    if config.resume:
        return
    shutil.rmtree(config.out, ignore_errors=True)
    config.out.mkdir(parents=True)
    settings = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    (config.out / "config.yaml").write_text(settings, "utf-8")


def check_shared(config: Config) -> None:
    """Raises InputError on a process that does not see what the first has written to --out."""
    if not (config.out / "config.yaml").is_file():
        raise InputError(
            f"process {jax.process_index()} does not see {config.out}: name an --out on a file system of all hosts"
        )


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a file that JsonLines wrote, none if there is no file. Raises InputError for another file."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    try:
        rows = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last may have been cut off
    except ValueError:
        rows = [None]
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        raise InputError(f"{file} is not as this program wrote it: remove it, or name another folder")
    return rows


class JsonLines:
    """A file with one JSON object a line, each with its `step`. A run that goes on first drops what lies behind its
    checkpoint, after `step` steps. All processes know the rows, and the first writes them."""

    def __init__(self, path: Path, step: int):
        self.path, self.rows = path, [row for row in read_rows(path) if row["step"] <= step]
        if not is_first():
            return
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        partial.replace(path)

    def at(self, step: int) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["step"] == step]

    def write(self, row: dict[str, Any]) -> None:
        if is_first():
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.rows.append(row)


def main(config: Config) -> None:
    # 1. Everything that can be wrong is found here, before anything is written.
    if config.compile_only is not None:
        config.check()
        found = estimate(config)
        report.show_estimate(found)
        return found.check()
    with together():
        config.check()
        if is_first():
            check_folder(config)
        mesh = make_run_mesh(config)
        models = load_models(config)
        training, held_out = load_texts(config, models)
        specs((models.student, models.teacher), mesh)  # raises if the mesh does not divide a parameter
    with together():
        if is_first():
            start_folder(config)

    # 2. Parameters on the mesh: trained ones in float32, frozen ones in the dtype they are used in.
    dtype = jnp.dtype(config.compute_dtype)
    student, frozen = eqx.partition(models.student, is_trained(config, models.student))
    report.console.quiet = not is_first()
    report.show_settings(config, {"student, trained": student, "student, frozen": frozen, "teacher": models.teacher})
    student = place(student, mesh, jnp.float32)
    fixed = Fixed(
        student=place(frozen, mesh, dtype),
        teacher=place(models.teacher, mesh, dtype),
        student_entries=place(models.student_entries, mesh),
        teacher_entries=place(models.teacher_entries, mesh),
    )
    optimizer, schedule = make_optimizer(config), learning_rate(config)
    state = initial_state(optimizer, student, mesh)
    step_function = jax.jit(functools.partial(train_step, config, optimizer, mesh), donate_argnums=0)

    # 3. Batches are a function of (seed, step). Each process encodes the rows of its own devices.
    def encode(pieces: list[Piece]) -> tuple[Batch, np.ndarray]:
        return models.batch(config, [pieces[row] for row in local_rows(mesh, len(pieces))])

    def batch_of(step: int) -> tuple[Batch, np.ndarray]:
        return encode(training.batch(config.seed, step, config.batch_size))

    if models.teacher is not None:
        report.show_alignment(batch_of(0)[0], models.student_vocabulary, models.teacher_vocabulary)

    checkpoints = config.out / "checkpoints"
    with together():
        check_shared(config)
        if config.resume and checkpoint.latest(checkpoints) is not None:
            found = checkpoint.restore(checkpoints, state.items())
            state = State(found["student"], **found["rest"])
        first = int(state.step)
        log, evaluations, samples = (
            JsonLines(config.out / f"{name}.jsonl", first) for name in ("metrics", "evaluations", "samples")
        )
    before = {"seconds": 0.0, "dropped": 0} | (log.rows[-1] if log.rows else {})
    began = time.monotonic()

    def seconds() -> float:
        """Seconds of the run so far, those before a --resume included."""
        return round(before["seconds"] + time.monotonic() - began, 1)

    def evaluate(step: int, state: State) -> None:
        """Writes the measures of held-out text, unless the run has them already."""
        if held_out is None or evaluations.at(step):
            return
        last = min(config.evaluation_skip + config.evaluation_rows, len(held_out))
        rows = held_out.batch(0, 0, last)[config.evaluation_skip :]
        rows += [()] * (-len(rows) % config.batch_size)  # an empty piece is a row without weight
        batches = (encode(rows[i : i + config.batch_size])[0] for i in range(0, len(rows), config.batch_size))
        model = eqx.combine(state.student, fixed.student)
        found = measure(model, fixed.teacher, fixed.student_entries, fixed.teacher_entries, batches, mesh, dtype)
        agreement = found.pop("agreement", None)
        evaluations.write(
            {"step": step, "seconds": seconds() if step else 0.0, "bits_per_byte": found, "agreement": agreement}
        )

    def show_samples(step: int, state: State) -> None:
        """Held-out texts as the student goes on with them."""
        if held_out is None or not config.samples or samples.at(step):
            return
        model = eqx.combine(state.student, fixed.student)
        prompts, continuations = continue_texts(config, models, held_out, fixed, model, mesh)
        for prompt, continuation in zip(prompts, continuations, strict=True):
            samples.write({"step": step, "prompt": prompt, "continuation": continuation})
        report.show_samples(prompts, continuations)

    if first == 0:
        evaluate(0, state)
        show_samples(0, state)
        began = time.monotonic()

    # 4. Training. Step n is dispatched before the metrics of step n - 1 are fetched.
    dropped = before["dropped"]
    batches = data.read_ahead(batch_of, first)
    pending = None

    def is_saved(step: int) -> bool:
        return step % config.save_interval == 0 or step == config.steps

    def is_evaluated(step: int) -> bool:
        return config.evaluation_interval is not None and step % config.evaluation_interval == 0

    with report.progress_bar() as bar:
        task = bar.add_task("compiling", total=config.steps, completed=first)

        def record(step: int, metrics: dict[str, jax.Array], left_out: jax.Array) -> None:
            nonlocal dropped
            values = fetch(step, metrics)
            dropped += int(left_out)
            bar.update(task, completed=step, description=report.progress_line(values))
            if step % config.log_interval == 0 or is_saved(step):
                rate = float(schedule(step - 1))
                log.write({"step": step, "seconds": seconds(), **values, "learning_rate": rate, "dropped": dropped})

        for step in range(first, config.steps):
            batch, left_out = next(batches)
            state, metrics = step_function(state, fixed, place_rows(batch, mesh))
            left_out = count_rows(left_out, mesh)
            if pending is not None:
                record(*pending)
            pending = step + 1, metrics, left_out
            if is_saved(step + 1) or is_evaluated(step + 1):  # not before its numbers were found to be good
                record(*pending)
                pending = None
            if is_evaluated(step + 1):
                evaluate(step + 1, state)
            if is_saved(step + 1):  # last, so that a run that goes on from here has all rows up to here
                checkpoint.save(checkpoints, step + 1, state.items())
    batches.close()
    trained = seconds()

    # 5. The result: the student as a Hugging Face folder, a table, a few lines of its own, and summary.json last.
    with together():
        if is_first():
            save_student(config, models, eqx.combine(state.student, fixed.student))
    evaluate(config.steps, state)
    show_samples(config.steps, state)
    with together():
        if is_first():
            finish_run(config, evaluations, trained, dropped)


def save_student(config: Config, models: Models, model: Transformer) -> None:
    """Writes --out/hf, on the first process. Of a model that lies on several processes it reads the last checkpoint."""
    if jax.process_count() > 1:
        model = trained_student(config, models, config.out / "checkpoints", config.steps)
    shutil.rmtree(config.out / "hf", ignore_errors=True)
    save(config.out / "hf", model, models.student_vocabulary, models.student_ngrams, config.compute_dtype, models.usage)


def trained_student(config: Config, models: Models, checkpoints: Path, step: int | None) -> Transformer:
    """A run's student as a checkpoint has it, on the host; what is not trained comes from where the run began."""
    trained, frozen = eqx.partition(models.student, is_trained(config, models.student))
    like = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), trained)  # no memory but one number
    return eqx.combine(checkpoint.restore(checkpoints, {"student": like}, step, alone=True)["student"], frozen)


def finish_run(config: Config, evaluations: JsonLines, seconds: float, dropped: int) -> None:
    """The table of results, and summary.json."""
    bits, agreement = ends(evaluations, config.steps)
    if config.held_out or config.stdlib:
        report.show_results(bits, agreement)
    if dropped:
        report.console.print(f"{dropped} texts were left out: the two tokenizers do not spell them alike.")
    summary = {"bits_per_byte": bits, "agreement": agreement, "steps": config.steps, "seconds": seconds}
    (config.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report.console.print(f"The student is in {config.out / 'hf'}, the numbers are in {config.out / 'summary.json'}.")


def ends(evaluations: JsonLines, last: int) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Bits per byte and agreement before and after the run; None where nothing was evaluated."""
    bits, agreement = {"teacher": None}, {}
    for name, step in (("student_start", 0), ("student_end", last)):
        for row in evaluations.at(step) or [{"bits_per_byte": {}, "agreement": None}]:
            bits[name], agreement[name] = row["bits_per_byte"].get("student"), row["agreement"]
            bits["teacher"] = row["bits_per_byte"].get("teacher")
    return bits, agreement


def continue_texts(
    config: Config, models: Models, held_out: Corpus, fixed: Fixed, model: Transformer, mesh: Mesh
) -> tuple[list[str], list[str]]:
    """The first characters of some held-out pieces, and how the student goes on with each."""
    pieces = held_out.batch(1, 0, config.samples)
    texts = [[part.content for part in piece if isinstance(part.content, str)] for piece in pieces]
    texts = ["".join(parts)[:120] or "\n" for parts in texts]
    pieces = [(Segment(Control("bos")), Segment(text)) for text in texts]
    vocabulary = models.student_vocabulary
    continued = generate(
        model,
        fixed.student_entries,
        models.student_ngrams,
        [encoding.ids for encoding in vocabulary.encode(pieces)],
        new_tokens=160,
        stop=vocabulary.eos_id,
        mesh=mesh,
        dtype=jnp.dtype(config.compute_dtype),
        temperature=0.5,
        seed=config.seed,
    )
    return texts, [vocabulary.decode(ids) for ids in continued]


# --- compilation without devices ----------------------------------------------------------------------------------


def estimate(config: Config) -> cost.Estimate:
    """What a step takes, compiled as `main` does, from shapes alone. Raises InputError if the compiler finds that it does
    not fit."""
    topology = cost.parse_topology(config.compile_only)
    mesh = make_run_mesh(config, cost.topology_devices(topology))
    student, teacher = model_shapes(config)
    trained, frozen = eqx.partition(student, is_trained(config, student))
    dtype = jnp.dtype(config.compute_dtype)
    entries = [
        model and head.Entries(np.zeros(model.config.vocab_size, bool), np.zeros(model.config.vocab_size, bool))
        for model in (student, teacher)
    ]
    trained = place_shapes(trained, mesh, jnp.float32)
    fixed = Fixed(*(place_shapes(tree, mesh, dtype) for tree in (frozen, teacher)), *place_shapes(entries, mesh))
    optimizer = make_optimizer(config)
    moments = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(optimizer.init, trained),
        optimizer_shardings(optimizer, trained, mesh),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=shardings(P(), mesh))
    state, batch = State(trained, moments, step), batch_shapes(config, student, teacher, mesh)

    began = time.monotonic()
    step_function = jax.jit(functools.partial(train_step, config, optimizer, mesh), donate_argnums=0)
    traced = step_function.trace(state, fixed, batch)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise cost.does_not_fit(topology, tuple(mesh.devices.shape), cost.compiler_need(str(error))) from error
    return cost.Estimate(
        topology=topology,
        mesh=tuple(mesh.devices.shape),
        compile_seconds=time.monotonic() - began,
        memory=cost.memory(
            {"trained parameters": trained, "optimiser": moments, "teacher and other fixed": fixed, "batch": batch},
            compiled.memory_analysis(),
        ),
        flops=cost.product_flops(traced.jaxpr.jaxpr, "tpu" if topology.chip else "cpu"),
        model_flops=cost.model_flops(
            student.config,
            teacher.config if config.losses.needs_teacher else None,
            config.batch_size,
            config.student_length,
            config.teacher_length,
        ),
        traffic=cost.traffic(cost.parse_program(compiled.as_text())),
        least_sent=cost.least_sent(
            student,
            trained,
            teacher if config.losses.needs_teacher else None,
            mesh,
            config.batch_size,
            config.student_length,
            config.teacher_length,
            tail_gradients=1 if config.losses.balance == "fixed" else len(config.losses.names),
            width=dtype.itemsize,
        ),
        steps=config.steps,
    )


def model_shapes(config: Config) -> tuple[Transformer, Transformer | None]:
    """Student and teacher as shapes: of a model on the hub by SHAPES, else as a run would load them. Raises InputError."""
    name = str(config.teacher)
    if config.teacher is None or config.teacher.exists():
        models = load_models(config)
        return models.student, models.teacher
    if name not in SHAPES or config.student is not None or config.student_tokenizer != "bytes":
        raise InputError(
            f"--compile-only fetches nothing, and without {name} the shapes of this run are not known: "
            "name the folder of the teacher"
        )
    teacher = SHAPES[name]
    student = dataclasses.replace(
        teacher,
        vocab_size=256 + ROW_MULTIPLE,  # bytes, and up to that many control tokens
        tied=False,
        expansion_size=teacher.vocab_size if config.expansion else None,
    )
    return families.abstract(student), families.abstract(teacher)


def batch_shapes(config: Config, student: Transformer, teacher: Transformer | None, mesh: Mesh) -> Batch:
    """What `Models.batch` makes, as shapes on the mesh."""

    def rows(length: int, dtype: Any = np.int32) -> np.ndarray:
        return np.zeros((config.batch_size, length), dtype)

    def tokens(model: Transformer, length: int) -> Tokens:
        ngram = None if model.expansion is None else rows(length)
        return Tokens(rows(length), rows(length), rows(length, np.float32), ngram)

    ours, theirs = config.student_length, config.student_length if teacher is None else config.teacher_length
    chunks = min(ours, theirs)
    batch = Batch(
        student=tokens(student, ours),
        teacher=None if teacher is None else tokens(teacher, theirs),
        chunks=AlignedChunks(
            student_chunk=rows(ours),
            teacher_chunk=rows(theirs),
            student_close=rows(chunks),
            teacher_close=rows(chunks),
            before_space=rows(chunks, bool),
            text_bytes=rows(chunks),
        ),
    )
    layout = shardings(ROWS, mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), batch)


def sentence(error: InputError | OSError) -> str:
    """Why the program ends, in one line."""
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename or 'the system'}: {error.strerror or error}: make it possible and start again"
    return f"error: {' '.join(text.splitlines())}"


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Bad input, or a system that refuses, ends the program with one sentence on stderr and exit code 1.

    Where all processes find the same, as with numbers that are not finite, the first says it. Where one fails alone it
    says it, and JAX ends the others.
    """
    try:
        yield
    except (InputError, OSError) as error:
        alone = not all_come_here(seconds=10)
        sys.exit(sentence(error) if alone or is_first() else 1)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What all processes do before any goes on: where one fails all end, and the first that did says why."""
    error = None
    try:
        yield
    except (InputError, OSError) as found:
        if not jax.distributed.is_initialized():
            raise
        error = found
    if jax.distributed.is_initialized() and (failed := which(error is not None)):
        sys.exit(sentence(error) if failed[0] == jax.process_index() else 1)


def cli(arguments: list[str], of_several: bool = False) -> None:
    """`quickstart` is meant where no preset is named. Bad input ends the program with one sentence.

    `of_several`: on a cluster, this is one of several processes; only the first use of JAX can make it that.
    """
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["quickstart", *arguments]
    with one_sentence():
        config = tyro.extras.overridable_config_cli(PRESETS, args=arguments, prog="train.py", description=__doc__)
        if of_several:
            join()
        main(config)


if __name__ == "__main__":
    cli(sys.argv[1:], of_several=True)

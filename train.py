"""Train a language model on another tokenizer by approximate likelihood matching (ALM).

    python train.py                                  # quickstart: a small subword model becomes byte-level
    python train.py quickstart --losses.latents 1    # every setting is a flag; `python train.py quickstart --help`
    python train.py smollm2-135m-byte --teacher SmolLM2-135M-Instruct --data chats.jsonl
    python train.py transfer --teacher FOLDER --student FOLDER --data texts/     # any of them
    python train.py gemma2-2b-it-byte --data tulu3.jsonl --out runs/gemma --resume
    python train.py --config runs/gemma/config.yaml --out runs/again --seed 1    # the settings of another run
    python train.py gemma2-2b-it-byte --mesh.fsdp 16 --mesh.tp 1 --compile-only v4:2x2x4   # what will it take?

Read it from top to bottom: the settings, the state, the step, the run. The arithmetic of the losses is in
minalm/distill/losses.py; the map of the rest is in ARCHITECTURE.md.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import Mesh

from minalm import presets
from minalm.batches import read_ahead
from minalm.distill import losses
from minalm.distill.gradmag import Forward, balanced_gradients
from minalm.distill.losses import LossConfig
from minalm.distill.means import total
from minalm.distill.parts import after, in_parts
from minalm.distill.patches import patch_metrics, read_guide
from minalm.errors import InputError, check_at_least
from minalm.models.contract import Model, read
from minalm.models.head import PrefixTree, VocabularyMask
from minalm.models.mapped import Mapped, bare, with_student
from minalm.parallel.distributed import barrier, exit_on_input_error, is_first, join, of_first
from minalm.parallel.mesh import (
    ROWS,
    MeshConfig,
    P,
    run_mesh,
    shard,
    shard_map,
    shard_rows,
    shard_shapes,
    shardings,
    specs,
)
from minalm.run import checkpoint, console, estimate
from minalm.run.command_line import Command, parse
from minalm.run.compute import ComputeConfig
from minalm.run.export import export
from minalm.run.fingerprint import fingerprints
from minalm.run.folder import FINISHED, RunConfig, RunFolder, check_out, open_run, run_date
from minalm.run.models import Models, StudentConfig, for_losses, load_models, model_shapes
from minalm.run.optimizer import OptimizerConfig, learning_rate, make_optimizer, optimizer_shardings
from minalm.run.processes import check_same_inputs, check_same_settings
from minalm.run.recorder import EvaluationConfig, Recorder, check_weights
from minalm.run.settings import plain
from minalm.run.stop import StopSignals
from minalm.run.texts import DataConfig, check_packing, load_texts
from minalm.run.trackers import Trackers, TrackingConfig
from minalm.types import Batch

Flat = tyro.conf.arg(name="")  # the flags of a group without its name

# --- settings -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Each group is declared beside the code that it configures; this file alone sees all of them."""

    run: Annotated[RunConfig, Flat]
    optimizer: Annotated[OptimizerConfig, Flat]
    student: Annotated[StudentConfig, Flat] = StudentConfig()
    data: Annotated[DataConfig, Flat] = DataConfig()
    evaluation: Annotated[EvaluationConfig, Flat] = EvaluationConfig()
    compute: Annotated[ComputeConfig, Flat] = ComputeConfig()
    tracking: Annotated[TrackingConfig, Flat] = TrackingConfig()
    losses: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    config: Path | None = None
    """File of settings, as config.yaml of a run, that take the place of the preset's; flags come on top."""
    seed: int = 0
    """Seed of the data order, of random weights and of the samples."""
    compile_only: str | None = None
    """Compile the step for chips that need not be there, for example v4:2x2x4, v5e:4x4 or cpu:8, show what it takes of
    them, and end. Needs neither data nor weights."""

    def check(self) -> None:
        """Raises InputError for settings that make no sense or do not go together."""
        self.losses.check(needs_files=self.compile_only is None)
        self.optimizer.check()
        self.data.check(needs_text=self.compile_only is None)
        self.compute.check(self.data.batch_size)
        self.evaluation.check()
        self.run.check()
        self.tracking.check()
        if self.run.best and (
            self.evaluation.evaluation_interval is None or not (self.data.held_out or self.data.stdlib)
        ):
            raise InputError("--best compares checkpoints on held-out text: give --evaluation-interval and --held-out")
        check_at_least(self, {"seed": 0})
        if self.seed >= 2**31:
            raise InputError(f"--seed is {self.seed}: it must be a number below {2**31}")
        self.student.check(self.losses)


PRESETS = {name: (text, Config(**settings)) for name, (text, settings) in presets.PRESETS.items()}

# --- state --------------------------------------------------------------------------------------------------------


class State(eqx.Module):
    """What training changes. `student` holds the trained parameters only; None stands where one is frozen."""

    student: Model
    optimizer: optax.OptState
    step: jax.Array


class Frozen(eqx.Module):
    """What the step reads and does not change."""

    student: Model  # the frozen parameters only; None stands where one is trained
    teacher: Model | None
    student_mask: VocabularyMask
    teacher_mask: VocabularyMask | None
    tree: PrefixTree | None = None  # of the teacher's entries, where its next byte is asked for


def initial_state(
    models: Models, mesh: Mesh, optimizer: optax.GradientTransformation, dtype: jnp.dtype, put: Callable = shard
) -> tuple[State, Frozen]:
    """The initial state, and what training does not change: on the mesh, trained parameters in float32, others in
    `dtype`. With `shard_shapes` as `put`, their shapes."""
    student, is_trained = models.student.model, models.trained
    if models.maps is not None:
        student = Mapped(student, models.maps)
        is_trained = with_student(student, is_trained, True)
    trained, frozen = eqx.partition(student, is_trained)
    trained, teacher = put(trained, mesh, jnp.float32), models.teacher if models.teacher_runs else None
    init = jax.jit(optimizer.init, out_shardings=optimizer_shardings(optimizer, trained, mesh))
    step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=shardings(P(), mesh))
    if put is not shard:
        init, step = init.eval_shape, step.eval_shape
    masks = put(models.student.mask, mesh), None if teacher is None else put(teacher.mask, mesh)
    tree = None if models.prefixes is None else put(PrefixTree.of(models.prefixes), mesh)
    teacher = None if teacher is None else put(teacher.model, mesh, dtype)
    frozen = Frozen(put(frozen, mesh, dtype), teacher, *masks, tree)
    return State(trained, init(trained), step()), frozen


# --- step ---------------------------------------------------------------------------------------------------------


def gradients(
    config: LossConfig, compute: ComputeConfig, student: Model, frozen: Frozen, batch: Batch
) -> tuple[Model, dict[str, jax.Array]]:
    """The gradient of the balanced losses over the whole batch, and what to log. Runs inside `shard_map`. The teacher
    reads first, so that what the losses divide by is known before the student runs."""
    dtype, remat, parts = compute.dtype, compute.remat, compute.accumulation
    states, all_states = config.needs_states, config.compares_all_layers  # hidden states, compared where chunks end

    def read_teacher(rows):
        if config.guided:
            blocks = config.representation_blocks
            return read_guide(frozen.teacher, frozen.teacher_mask, rows, dtype, remat, blocks)
        ends = rows.chunks.teacher_chunk_end if states else None
        places = (frozen.tree, rows.bytes) if config.needs_bytes else None
        return read(frozen.teacher, frozen.teacher_mask, rows.teacher, dtype, remat, ends, all_states, places)

    def trunk(student, rows):
        model, (batch, teacher) = eqx.combine(student, frozen.student), rows
        tokens = dataclasses.replace(batch.student, guide=teacher.guide) if config.guided else batch.student
        return model.trunk(tokens, dtype, remat, batch.chunks.student_chunk_end if all_states else None)

    def last_layer(student, trunk_output):
        return eqx.combine(student, frozen.student).last_layer(trunk_output, remat)

    def tail(student, rows, last_output):
        model, (batch, teacher) = eqx.combine(student, frozen.student), rows
        ends = batch.chunks.student_chunk_end if states else None
        targets = teacher.byte_targets if config.needs_bytes else None
        output = model.tail(last_output, batch.student, frozen.student_mask, ends, None, targets)
        patches = output.patches and dataclasses.replace(output.patches, early=None)
        return losses.loss_terms(config, batch, output, teacher, normalizers), (output.stats.logp, patches)

    teacher = in_parts(read_teacher, batch, parts) if config.needs_teacher else None
    batch = batch if teacher is None else after(teacher, batch)
    normalizers = losses.normalizers(config, batch, teacher)
    forward = Forward(trunk, last_layer, tail)
    grad, values, weights, (logp, patches) = balanced_gradients(forward, student, (batch, teacher), config, parts)
    metrics = {f"loss/{name}": value for name, value in zip(config.names, values, strict=True)}
    metrics |= {f"weight/{name}": weight for name, weight in zip(config.names, weights, strict=True)}
    metrics["bits_per_byte"] = losses.bits_per_byte(logp, batch.chunks.student_chunk, batch.chunks.text_bytes)
    metrics["left_out"], metrics["bytes"] = total(batch.left_out), total(batch.chunks.text_bytes)
    if patches is not None:
        metrics |= patch_metrics(patches, batch.student)
    if config.needs_bytes:  # the share of the targets for which the teacher says what the next byte is
        metrics["taught"] = normalizers["next_byte"] / jnp.maximum(total(batch.student.weight), 1.0)
    return grad, metrics


def train_step(
    config: LossConfig,
    compute: ComputeConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: State,
    frozen: Frozen,
    batch: Batch,
    skips: bool = False,
) -> tuple[State, dict[str, jax.Array]]:
    """One update; with `skips`, none where numbers are not finite. optax runs here, outside `shard_map`, where a norm is
    the norm of the whole gradient."""
    layout = specs(state.student, mesh)
    grad, metrics = shard_map(
        functools.partial(gradients, config, compute),
        mesh,
        in_specs=(layout, specs(frozen, mesh), jax.tree.map(lambda _: ROWS, batch)),
        out_specs=(layout, P()),
    )(state.student, frozen, batch)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes step counts and floats
        updates, optimizer_state = optimizer.update(grad, state.optimizer, state.student)
    student = optax.apply_updates(state.student, updates)
    metrics["gradient_norm"] = optax.tree.norm(grad)
    new = State(student, optimizer_state, state.step + 1)
    if skips:  # where numbers are not finite, all but the count of steps stays as it is
        good = jnp.stack([jnp.isfinite(value) for value in metrics.values()]).all()
        kept = jax.tree.map(lambda now, before: jnp.where(good, now, before), new, state)
        new = dataclasses.replace(kept, step=new.step)
    return new, metrics


# --- run ----------------------------------------------------------------------------------------------------------


def main(command: Command) -> None:
    """A run: everything that can be wrong is found before anything is written."""
    config = command.config
    config.run.use_compilation_cache()
    if config.compile_only is not None:
        return console.show_estimate(estimated(config))
    with StopSignals(config.run.out) as signals:
        run(command, signals)


def run(command: Command, signals: StopSignals) -> None:
    """Reads, checks and opens all that a run needs, and trains."""
    config = command.config
    inputs = [*config.student.inputs, *config.data.inputs, *config.losses.inputs]
    settings, defaults = plain(config), plain(Config(RunConfig(out=Path()), OptimizerConfig(steps=1)))
    check_same_settings(settings)
    date = run_date(config.run)
    with barrier():
        config.check()
        if is_first():
            check_out(config.run, inputs)
        mesh = run_mesh(config.mesh, config.data.batch_size, config.compute.accumulation)
        models = load_models(config.student, config.data.student_length, config.seed)
        models = for_losses(models, config.losses, config.seed)
        say = console.say if is_first() else lambda text: None
        texts = load_texts(config.data, models, config.seed, mesh, date, config.losses, say)
        config.evaluation.check_rows(texts)
        specs((models.student.model, models.teacher and models.teacher.model), mesh)  # raises if it does not divide

    with barrier():
        prints = fingerprints(config.student, texts, config.losses)
    check_same_inputs(prints)
    folder, step, notes = RunFolder(config.run.out), 0, []
    with barrier():
        if is_first():
            folder, step, notes = open_run(config.run, inputs, settings, defaults, prints, date, models.write_student)
    with contextlib.closing(folder):
        console.show_run(command, models, mesh, [*notes, *texts.notes], texts, quiet=not is_first())
        if (step := of_first(step)) == FINISHED:
            return console.say(f"The run in {folder.path} is finished: a larger --steps goes on with it.")
        optimizer = make_optimizer(config.optimizer)
        state, frozen = initial_state(models, mesh, optimizer, config.compute.dtype)
        check_weights([("teacher", frozen.teacher), ("student", state.student), ("student", frozen.student)])
        with barrier():
            folder.check_seen(jax.process_index())
            if step:
                state = from_items(state, checkpoint.restore(folder.checkpoints, items(state), step))
        work = estimate.work(config.data, models, config.losses, mesh, config.compute.dtype)
        with barrier():
            trackers = Trackers(config.tracking, folder, settings, step)
            recorder = Recorder(folder, config.run, config.evaluation, texts, config.optimizer, step, work, trackers)
        train(config, recorder, signals, optimizer, state, frozen)


def train(
    config: Config,
    recorder: Recorder,
    signals: StopSignals,
    optimizer: optax.GradientTransformation,
    state: State,
    frozen: Frozen,
) -> None:
    """The loop, and the student as a Hugging Face folder. Step n is dispatched before the numbers of step n - 1 are
    fetched. A checkpoint is written last in its step, so that a resumed run has every log row up to it."""
    folder, checkpoints = recorder.run, recorder.checkpoints
    first, last, mesh, dtype = int(state.step), config.optimizer.steps, recorder.texts.mesh, config.compute.dtype
    step_of = functools.partial(train_step, config.losses, config.compute, optimizer, mesh)
    update = jax.jit(functools.partial(step_of, skips=config.optimizer.skip_bad_steps > 0), donate_argnums=0)
    if first == 0 or recorder.evaluates(first):
        recorder.evaluate(first, state.student, frozen, dtype)
    ends = False
    with (
        signals.in_loop() as asked_to_end,
        recorder.bar,
        checkpoints,
        contextlib.closing(read_ahead(recorder.texts.batch, first)) as batches,
    ):
        for step in range(first + 1, last + 1):
            state, metrics = update(state, frozen, shard_rows(next(batches), mesh))
            ends = asked_to_end()
            evaluates, logs = recorder.evaluates(step) and not ends, recorder.logs(step)
            recorder.note(step, metrics, float(learning_rate(config.optimizer, step - 1)) if logs else None)
            checkpoints.check()
            if evaluates:
                recorder.evaluate(step, state.student, frozen, dtype)
            if recorder.saves(step) or ends:
                recorder.save(step, items(state))
            if ends:
                break
    if ends or asked_to_end():
        return signals.say_where()
    recorder.evaluate(last, state.student, frozen, dtype)
    best = recorder.best()
    with barrier():
        if is_first():  # of a student that lies on several processes, the last checkpoint is read
            trained = bare(state.student) if jax.process_count() == 1 and best is None else None
            export(folder, folder.exported, config.compute.compute_dtype, best or last, trained, replace=True)
    with barrier():
        if is_first():
            recorder.finish(best)


def items(state: State) -> dict[str, Any]:
    """The parts of a checkpoint: the student can be read without the rest."""
    maps = {"maps": state.student.maps} if isinstance(state.student, Mapped) else {}
    return {"student": bare(state.student), "rest": {"optimizer": state.optimizer, "step": state.step, **maps}}


def from_items(like: State, found: dict[str, Any]) -> State:
    """The inverse of `items`."""
    student, rest = found["student"], dict(found["rest"])
    if isinstance(like.student, Mapped):
        student = with_student(like.student, student, rest.pop("maps"))
    return State(student, **rest)


def estimated(config: Config) -> estimate.Estimate:
    """What a step takes of chips that need not be there. Raises InputError if it does not fit."""
    config.check()
    data, optimizer = config.data, make_optimizer(config.optimizer)
    topology = estimate.parse_topology(config.compile_only)
    mesh = run_mesh(config.mesh, data.batch_size, config.compute.accumulation, estimate.topology_devices(topology))
    models = model_shapes(config.student, data.student_length, config.seed)
    check_packing(data, models)
    models = for_losses(models, config.losses, config.seed)
    state, frozen = initial_state(models, mesh, optimizer, config.compute.dtype, shard_shapes)
    update = jax.jit(functools.partial(train_step, config.losses, config.compute, optimizer, mesh), donate_argnums=0)
    arguments = state, frozen, estimate.batch_shapes(data, models, mesh, config.losses.chunks == "unbiased")
    own, parts = (count(data, models, config.losses) for count in (estimate.run_flops, estimate.bolmo_flops))
    return estimate.estimate(update, arguments, topology, mesh, own, config.optimizer.steps, parts)


def cli(arguments: list[str], of_several: bool = False) -> None:
    """Without a preset, `quickstart` is used. `of_several`: on a cluster, this is one of several processes."""
    with exit_on_input_error():
        command = parse(PRESETS, "quickstart", arguments, prog="train.py", description=__doc__)
        if of_several:
            join()
        main(command)


if __name__ == "__main__":
    cli(sys.argv[1:], of_several=True)

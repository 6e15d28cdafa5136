"""What a run says as it goes: its logs, its evaluations, samples of its student, and the terminal."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PyTree

from minalm.errors import InputError, check_at_least
from minalm.evaluation.bits_per_byte import measure
from minalm.evaluation.cuts import cuts
from minalm.evaluation.samples import beginning, continue_texts
from minalm.models.bolmo import Bolmo
from minalm.models.mapped import bare
from minalm.parallel.distributed import is_first
from minalm.run import checkpoint, console
from minalm.run.checkpoint import Checkpoints
from minalm.run.estimate import Work
from minalm.run.folder import LOGS, RunConfig, RunFolder
from minalm.run.optimizer import OptimizerConfig
from minalm.run.texts import Texts
from minalm.run.trackers import Trackers


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out text."""

    evaluation_rows: int = 256
    """Rows of held-out text that are evaluated."""
    evaluation_skip: int = 0
    """Rows of held-out text before those (to choose settings on other text than the final numbers come from)."""
    evaluation_interval: int | None = None
    """Steps between evaluations, beside those at both ends. Default: none."""
    samples: int = 3
    """Held-out texts that the student continues, before and after."""

    def check(self) -> None:
        """Raises InputError for values that make no sense."""
        lowest = {"evaluation_rows": 1, "evaluation_skip": 0, "evaluation_interval": 1, "samples": 0}
        check_at_least(self, lowest)

    def check_rows(self, texts: Texts) -> None:
        """Raises InputError if there is nothing left to evaluate on."""
        if texts.held_out is not None and self.evaluation_skip >= len(texts.held_out):
            raise InputError(
                f"--evaluation-skip {self.evaluation_skip} passes over all {len(texts.held_out)} held-out rows: lower it"
            )


class Recorder:
    """The logs and checkpoints of a run, from `first` steps on.

    The numbers of a step are fetched when the next one has been dispatched, so that devices never wait for the host.
    """

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        evaluation: EvaluationConfig,
        texts: Texts,
        optimizer: OptimizerConfig,
        first: int,
        work: Work,
        trackers: Trackers,
    ):
        self.run, self.run_config, self.config, self.texts = run, config, evaluation, texts
        self.steps, self.skip, self.trackers = optimizer.steps, optimizer.skip_bad_steps, trackers
        self.metrics, self.evaluations, self.samples = (run.log(name, first) for name in LOGS)
        self.checkpoints = Checkpoints(run.checkpoints, config.keep, config.keep_every, self.best)
        progress = checkpoint.manifest(run.checkpoints, first)["progress"] if first else {}
        self.dropped, self.bytes, self.skipped = (progress.get(name, 0) for name in ("dropped", "bytes", "skipped"))
        self.seconds_before = progress.get("seconds", 0.0)
        self.began = time.monotonic()
        self.pending: tuple[int, dict[str, jax.Array], float | None] | None = None
        self.bar = console.Progress(first, self.steps, work)

    def seconds(self) -> float:
        """Seconds of training so far, those before a --resume included."""
        return round(self.seconds_before + time.monotonic() - self.began, 1)

    def evaluates(self, step: int) -> bool:
        """Whether held-out text is measured after this step, beside both ends of the run."""
        interval = self.config.evaluation_interval
        return interval is not None and (step % interval == 0 or (self.run_config.best and step == self.steps))

    def logs(self, step: int) -> bool:
        """Whether a row of this step goes to metrics.jsonl."""
        return any(
            step % each == 0 for each in (self.run_config.log_interval, self.run_config.save_interval, self.steps)
        )

    def saves(self, step: int) -> bool:
        """Whether there is a checkpoint after this step: the first shows that the disk can be written."""
        return step in (1, self.steps, self.best()) or step % self.run_config.save_interval == 0

    def best(self) -> int | None:
        """The step of the lowest bits per byte of the student on held-out text, if that is kept and was measured."""
        if not self.run_config.best:
            return None
        bits = {row["step"]: row["bits_per_byte"]["student"] for row in self.evaluations.rows if row["step"]}
        return min(bits, key=bits.__getitem__, default=None)

    def save(self, step: int, items: Mapping[str, PyTree]) -> None:
        """Begins to write a checkpoint. Raises InputError as `Checkpoints.save` does, and for numbers that are not
        finite."""
        self.flush()  # not before its numbers were found to be good
        if not checkpoint.all_finite(items):
            self._end(step, f"step {step} left parameters that are not finite, so they are not saved")
        progress = {"seconds": self.seconds(), "dropped": self.dropped, "bytes": self.bytes, "skipped": self.skipped}
        self.checkpoints.save(step, items, progress, self.run.log_digests() if is_first() else {})

    def note(self, step: int, metrics: dict[str, jax.Array], rate: float | None) -> None:
        """Takes the numbers of a step, and records those of the step before. With `rate`, a row of this
        step goes to metrics.jsonl."""
        self.flush()
        self.pending = step, metrics, rate

    def flush(self) -> None:
        """Records the numbers of the last step. Raises InputError if one is not finite, unless the step may be left
        out."""
        if self.pending is None:
            return
        (step, metrics, rate), self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = ", ".join(f"{name} {value}" for name, value in values.items() if not np.isfinite(value))
        if bad:
            return self._bad_step(step, bad)
        self.bar.show(step, values)
        self.dropped, self.bytes = self.dropped + int(values.pop("left_out")), self.bytes + int(values.pop("bytes"))
        if rate is not None:
            sums = {"dropped": self.dropped, "bytes": self.bytes}
            row = {"step": step, "seconds": self.seconds(), **values, "learning_rate": rate, **sums}
            self.metrics.write(row)
            self.trackers.write(step, {name: value for name, value in row.items() if name != "step"})

    def _bad_step(self, step: int, bad: str) -> None:
        texts = "; ".join(self.texts.places(step - 1))
        if self.skipped < self.skip:
            self.skipped += 1
            console.say(
                f"Note: step {step} changed nothing, since its numbers are not finite ({bad}); its texts are {texts}. "
                f"That is {self.skipped} of --skip-bad-steps {self.skip}."
            )
            return
        self._end(step, f"step {step} gave numbers that are not finite ({bad}); its texts are {texts}")

    def _end(self, step: int, why: str) -> NoReturn:
        """Ends a run whose numbers are not finite. The student before this step may be what gives them: its checkpoint
        is set aside if there is an earlier one."""
        with contextlib.suppress(InputError):
            self.checkpoints.wait()
        folder = self.run.checkpoints
        saved = [other for other in checkpoint.steps(folder) if other < step]
        self.run.update_record(not_finite=step)
        if not saved:
            raise InputError(f"{why}: start again with a lower --learning-rate or with --clip-norm")
        if saved[-1] == step - 1 and len(saved) > 1:
            if is_first():
                checkpoint.set_aside(folder, step - 1, "not-finite")
            why += f"; the checkpoint after step {saved.pop()} leads there and is set aside"
        raise InputError(
            f"{why}; the last good checkpoint is that after step {saved[-1]}: go on from there by --resume with a lower "
            "--learning-rate, another --clip-norm or --skip-bad-steps 1"
        )

    def evaluate(self, step: int, trained: PyTree, frozen: Any, dtype: jnp.dtype) -> None:
        """Measures held-out text and, at both ends, shows samples, unless the run has these rows already. Raises
        InputError for numbers that are not finite.

        `trained` are the student's trained parameters, `frozen` is train.Frozen: all else that a model reads.
        """
        self.flush()
        texts, mesh = self.texts, self.texts.mesh
        if texts.held_out is None:
            return
        student, masks = eqx.combine(trained, frozen.student), (frozen.student_mask, frozen.teacher_mask)
        if self.evaluations.at(step) is None:
            batches = texts.held_out_batches(self.config.evaluation_skip, self.config.evaluation_rows)
            found = measure(student, frozen.teacher, *masks, batches, mesh, dtype, frozen.tree)
            if not np.isfinite(list(found.values())).all():
                if step:
                    self._end(step + 1, f"held-out text after step {step} gave numbers that are not finite ({found})")
                raise InputError(
                    f"held-out text gave numbers that are not finite before the first step ({found}): "
                    "try --compute-dtype float32, or other weights"
                )
            others = {name: found.pop(name, None) for name in ("agreement", "greedy", "calibration")}
            seconds = self.seconds() if step else 0.0
            self.evaluations.write({"step": step, "seconds": seconds, "bits_per_byte": found, **others})
            bits = {f"held_out/{side}_bits_per_byte": value for side, value in found.items()}
            self.trackers.write(step, bits | {f"held_out/{name}": value for name, value in others.items()})
        if self.config.samples and step in (0, self.steps) and self.samples.at(step) is None:
            shown = continue_texts(
                bare(student), masks[0], texts.student, texts.held_out, self.config.samples, mesh, dtype, texts.seed
            )
            rows = [{"prompt": prompt, "continuation": continuation} for prompt, continuation in shown]
            self.samples.write({"step": step, "samples": rows} | self._patches(bare(student), mesh, dtype))
            rows_of = {"before": self.samples.at(0), "after": self.samples.at(step) if step else None}
            continuations = {
                when: [sample["continuation"] for sample in row["samples"]] for when, row in rows_of.items() if row
            }
            console.show_samples([prompt for prompt, _ in shown], continuations)
            if "patches" in (row := self.samples.at(step)):
                console.show_cuts(row["patches"]["teacher"], row["patches"]["student"])
        if step == 0:
            self.began = time.monotonic()
        self.bar.pause()

    def _patches(self, student: PyTree, mesh: Mesh, dtype: jnp.dtype) -> dict[str, Any]:
        """How a Bolmo cuts the beginning of the first held-out text, for samples.jsonl."""
        if not isinstance(student, Bolmo) or self.texts.teacher is None:
            return {}
        [piece] = self.texts.held_out.batch(1, 0, 1)
        found = cuts(student, self.texts.student, self.texts.teacher, beginning(piece), mesh, dtype)
        return {
            "patches": {side: [console.token_text(each) for each in pieces] for side, pieces in found._asdict().items()}
        }

    def finish(self, best: int | None) -> None:
        """The table of results, and summary.json, on the first process. `best`: the step of the student in hf/, if that
        is not the last."""
        bits: dict[str, float | None] = {"teacher": None}
        others: dict[str, dict[str, float | None]] = {"agreement": {}, "greedy": {}, "calibration": {}}
        for name, step in (("student_start", 0), ("student_end", self.steps)):
            row = self.evaluations.at(step) or {"bits_per_byte": {}}
            bits[name] = row["bits_per_byte"].get("student")
            for measured, ends in others.items():
                ends[name] = row.get(measured)
            bits["teacher"] = row["bits_per_byte"].get("teacher")
        if self.texts.held_out is not None:
            console.show_results(bits, others)
        self.trackers.close()
        if self.dropped:
            console.say(f"{self.dropped} texts were left out: the two tokenizers do not spell them alike.")
        if self.skipped:
            console.say(f"{self.skipped} steps changed nothing: their numbers were not finite.")
        summary = {
            "bits_per_byte": bits,
            **others,
            "steps": self.steps,
            "seconds": self.metrics.rows[-1]["seconds"],
        }
        summary |= {"skipped_steps": self.skipped} if self.skipped else {}
        summary |= {"best_step": best} if best is not None else {}
        self.run.finish(self.steps, summary)
        console.say(f"The student is in {self.run.exported}, the numbers are in {self.run.path / 'summary.json'}.")


def check_weights(models: Sequence[tuple[str, PyTree]]) -> None:
    """Raises InputError, naming the parameter, for a model with numbers that are not finite. Of several processes all
    call it."""
    for name, model in models:
        leaves, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(model, eqx.is_inexact_array))
        finite = jax.device_get(_finite([leaf for _, leaf in leaves]))
        for (path, _), good in zip(leaves, finite, strict=True):
            if not good:
                raise InputError(
                    f"the {name}'s {jax.tree_util.keystr(path, simple=True, separator='.')} holds numbers that are not "
                    "finite: use other weights"
                )


@jax.jit
def _finite(leaves: list[jax.Array]) -> list[Bool[Array, ""]]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]

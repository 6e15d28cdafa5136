"""Runs from the command line to the student's folder, on a tiny model: what is written, going on, and bad input."""

import contextlib
import dataclasses
import fcntl
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import configs
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_tokenizers as small
import tyro
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import pre_tokenizers

import convert
import train
from minalm.batches import Side, make_batch
from minalm.distill.losses import LossConfig
from minalm.errors import InputError
from minalm.evaluation.bits_per_byte import measure
from minalm.huggingface import weights
from minalm.huggingface.folder import load_vocabularies
from minalm.huggingface.loaded import LoadedModel
from minalm.models.config import ModelConfig
from minalm.models.transformer import Transformer, initialize
from minalm.parallel.mesh import make_mesh, shard
from minalm.report import __main__ as report
from minalm.report import runs
from minalm.run import checkpoint
from minalm.run import folder as run_folder
from minalm.run.fingerprint import fingerprints
from minalm.run.folder import JsonLines, RunFolder, open_run, start_run
from minalm.run.models import OF_A_NEW_BOLMO, OF_A_NEW_STUDENT, StudentConfig, load_models
from minalm.run.settings import flat, plain
from minalm.run.texts import load_texts
from minalm.text.corpus import read_corpus, text_corpus
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.train_bpe import train_bpe

DATE = "2026-01-01"
WORDS = ["the", "cat", "model", "token", "byte", "reads", "writes", "two", "of", "and", "é", "日本", "for"]


def documents(seed: int, count: int) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choice(WORDS) for _ in range(30)) + ".\n" for _ in range(count)]


@dataclasses.dataclass(frozen=True)
class Files:
    """What runs read. `untied` and `tied` are teachers; `tokenizer` is another one of 300 entries."""

    untied: Path
    tied: Path
    tokenizer: Path
    data: Path
    held_out: Path


TINY = configs.config(  # spelled out, so that the presets of the program may change
    out=Path("unused"),
    steps=4,
    warmup_steps=1,
    learning_rate=2e-3,
    batch_size=4,
    piece_bytes=64,
    student_length=64,
    teacher_length=32,
    evaluation_rows=8,
    log_interval=1,
    save_interval=2,
    samples=0,
    compute_dtype="float32",
    mesh=train.MeshConfig(fsdp=1),
    losses=LossConfig(sft=1.0, alm=1.0, latents=1.0),
)


@pytest.fixture(scope="module", autouse=True)
def tiny_preset():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "tiny", ("The run of these tests.", TINY))
        yield


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the time: XLA leaves out most optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_files(root: Path) -> Files:
    train_bpe(documents(0, 40), 288, root / "own")
    train_bpe(documents(1, 40), 300, root / "other")
    tokenizer = {path.name: path.read_bytes() for path in (root / "own").iterdir()}
    for tied in (False, True):
        config = ModelConfig(
            vocab_size=288,
            embed=24,
            mlp=36,
            layers=3,
            heads=4,
            kv_heads=2,
            head_dim=6,
            windows=(None,) * 3,
            tied=tied,
        )
        model = jax.device_get(initialize(config, jax.random.key(tied)))
        model = jax.tree.map(lambda leaf: 6 * leaf if leaf.ndim > 1 and leaf.std() > 0 else leaf, model)
        weights.save(root / ("tied" if tied else "untied"), model, "float32", files=tokenizer)
    for name, seed in (("data.jsonl", 2), ("held_out.jsonl", 3)):
        lines = [json.dumps({"text": text}) for text in documents(seed, 20)]
        (root / name).write_text("\n".join(lines))
    return Files(root / "untied", root / "tied", root / "other", root / "data.jsonl", root / "held_out.jsonl")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return make_files(tmp_path_factory.mktemp("files"))


def arguments(files: Files, out: Path, **changes: object) -> list[str]:
    """A command line. `a__b=1` is --a.b 1, `a=True` is --a, and None leaves a setting out."""
    settings = {"out": out, "teacher": files.untied, "data": files.data, **changes}
    words = ["tiny"]
    for name, value in settings.items():
        if value is not None:
            words.append("--" + name.replace("__", ".").replace("_", "-"))
            words += [] if value is True else [str(value)]
    return words


def run(files: Files, out: Path, **changes: object) -> None:
    train.cli(arguments(files, out, **changes))


def begin(config: train.Config) -> RunFolder:
    """The folder of a run that has not trained yet."""
    mesh = make_mesh(1, 1)
    models = load_models(config.student, config.data.student_length, config.seed)
    texts = load_texts(config.data, models, config.seed, mesh, DATE, config.losses)
    settings = plain(config)
    prints = fingerprints(config.student, texts, config.losses)
    run, _, _ = open_run(config.run, [], settings, settings, prints, DATE, models.write_student)
    run.close()
    return run


def lines(out: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def rows(out: Path, name: str) -> list[dict[str, object]]:
    """evaluations.jsonl or samples.jsonl without the clock."""
    found = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def exported(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "hf" / "model.safetensors")


@contextlib.contextmanager
def interrupted(after: int):
    """Ends a run when the line of step `after` has been written."""
    write = JsonLines.write

    def stop(self, row):
        write(self, row)
        if self.path.name == "metrics.jsonl" and row["step"] == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(JsonLines, "write", stop)
        yield


@pytest.fixture(scope="module")
def saved() -> dict[int, Transformer]:
    """The student of `finished` at each checkpoint, as it was in memory."""
    return {}


@pytest.fixture(scope="module")
def finished(files, saved, tmp_path_factory) -> Path:
    """A byte student by all three losses, trained for 4 steps."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        save = checkpoint.Checkpoints.save

        def keep(self, step, items, *notes):
            saved[step] = jax.tree.map(np.copy, jax.device_get(items["student"]))
            save(self, step, items, *notes)

        patch.setattr(checkpoint.Checkpoints, "save", keep)
        run(files, out, held_out=files.held_out, samples=1, evaluation_interval=2)
    return out


@pytest.fixture(scope="module")
def stopped(files, tmp_path_factory) -> Path:
    """The same run, ended after step 3 with the checkpoint of step 2."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    with interrupted(after=3):
        run(files, out, held_out=files.held_out)
    assert [row["step"] for row in lines(out)] == [1, 2, 3] and not (out / "hf").exists()
    return out


# --- what a run writes --------------------------------------------------------------------------------------------


def test_outputs(finished, files):
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml",
        "run.json",
        "lock",
        "student",
        "metrics.jsonl",
        "evaluations.jsonl",
        "samples.jsonl",
        "summary.json",
        "checkpoints",
        "hf",
    }
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    assert settings["steps"] == 4 and settings["losses"]["latents"] == 1 and settings["teacher"] == str(files.untied)
    assert settings["data"] == [str(files.data)] and settings["mesh"] == {"fsdp": 1, "tp": 1}
    rows = lines(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    names = {f"{kind}/{loss}" for kind in ("loss", "weight") for loss in ("sft", "alm", "latents")}
    for row in rows:
        assert row.keys() == names | {"step", "bits_per_byte", "gradient_norm", "learning_rate", "dropped", "bytes"}
    summary = json.loads((finished / "summary.json").read_text())
    assert summary.keys() == {"bits_per_byte", "agreement", "greedy", "calibration", "steps", "seconds"}
    assert summary["bits_per_byte"].keys() == {"teacher", "student_start", "student_end"}
    assert summary["agreement"].keys() == {"student_start", "student_end"}
    assert summary["steps"] == 4 and summary["seconds"] > 0
    assert summary["bits_per_byte"]["student_end"] < summary["bits_per_byte"]["student_start"]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir() if path.is_dir()) == ["2", "4"]


def test_the_folder_alone_gives_the_same_bits_per_byte(finished, files):
    vocabulary, suffixes = load_vocabularies(finished / "hf")
    model, teacher = weights.load(finished / "hf", np.float32), weights.load(files.untied, np.float32)
    assert model.config.vocab_size == vocabulary.size == 258 and model.config.expansion_size == 288
    teacher_vocabulary = load_vocabulary(files.untied)
    sides = Side(vocabulary, suffixes, 64), Side(teacher_vocabulary, None, 32)
    corpus = read_corpus([files.held_out], 64)
    batches = [make_batch(corpus.batch(0, number, 4), *sides) for number in range(2)]
    mesh = make_mesh(1, 1)
    masks = [LoadedModel.of(*side, None).mask for side in ((model, vocabulary), (teacher, teacher_vocabulary))]
    placed = [shard(part, mesh) for part in (model, teacher, *masks)]
    found = measure(*placed, batches, mesh, jnp.dtype(jnp.float32))
    summary = json.loads((finished / "summary.json").read_text())
    np.testing.assert_allclose(found["student"], summary["bits_per_byte"]["student_end"], rtol=1e-6)
    np.testing.assert_allclose(found["teacher"], summary["bits_per_byte"]["teacher"], rtol=1e-6)
    np.testing.assert_allclose(found["agreement"], summary["agreement"]["student_end"], rtol=1e-6)


def test_the_frozen_expansion_is_the_teachers_table(finished, files):
    teacher = load_file(files.untied / "model.safetensors")
    student = exported(finished)
    np.testing.assert_array_equal(student["model.expand_embed_tokens.weight"], teacher["model.embed_tokens.weight"])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.abs(student[name] - teacher[name]).max() > 1e-5


GOLDEN = {  # of steps 1 and 3
    "loss/sft": (5.71301, 5.28788),
    "loss/alm": (0.7226791, 0.7297198),
    "loss/latents": (0.7616361, 0.7534241),
    "weight/sft": (0.08259043, 0.08539012),
    "weight/alm": (0.8391199, 0.8568632),
    "weight/latents": (0.07828972, 0.05774672),
    "bits_per_byte": (8.24342, 7.626978),
    "gradient_norm": (0.3362328, 0.3171173),
}


def test_golden_metrics(finished):
    """The numbers of one run. If a change of what is computed, or of the order of the data, was intended, put the new
    ones in the place of these; if not, this has found a mistake."""
    rows = lines(finished)
    found = {name: (rows[0][name], rows[2][name]) for name in GOLDEN}
    for name, pair in GOLDEN.items():
        np.testing.assert_allclose(found[name], pair, rtol=1e-4, err_msg=f"{name}: see the docstring; found {found}")


# --- going on -----------------------------------------------------------------------------------------------------


def test_forms_of_data_in_a_run_that_goes_on_elsewhere(files, tmp_path, monkeypatch):
    """A table, a compressed file and a folder of `datasets`, by relative names, from two working folders."""
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([json.loads(line) for line in files.data.read_text().splitlines()])
    table.select(range(8)).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(files.data.read_bytes()))
    table.save_to_disk(tmp_path / "table")
    (tmp_path / "below").mkdir()
    words = [*arguments(files, tmp_path / "run", data=None, save_interval=1), "--data"]
    monkeypatch.chdir(tmp_path)
    train.cli([*words, "a.parquet:2", "b.jsonl.gz", "table", "--steps", "1"])
    monkeypatch.chdir(tmp_path / "below")
    train.cli([*words, "../a.parquet:2", "../b.jsonl.gz", "../table", "--steps", "2", "--resume"])
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2]
    found = refused([*words, "../a.parquet:3", "../b.jsonl.gz", "../table", "--steps", "2", "--resume"])
    assert "the training text is not what the run" in found


def test_a_run_goes_on_bit_for_bit(finished, stopped, files, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    run(files, out, held_out=files.held_out, resume=True)
    assert lines(out) == lines(finished)
    expected, found = exported(finished), exported(out)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    results = [json.loads((folder / "summary.json").read_text()) for folder in (finished, out)]
    assert results[0]["bits_per_byte"] == results[1]["bits_per_byte"]


@pytest.mark.parametrize(
    "after", (pytest.param("before the checkpoint", marks=pytest.mark.slow), "after the checkpoint")
)
def test_rows_of_evaluations_and_samples(finished, files, tmp_path, after):
    """At the start, each interval and the end; a run that goes on has the same, wherever it was ended."""
    assert [row["step"] for row in rows(finished, "evaluations")] == [0, 2, 4]
    assert [row["step"] for row in rows(finished, "samples")] == [0, 4]
    summary = json.loads((finished / "summary.json").read_text())
    for step, name in ((0, "student_start"), (4, "student_end")):
        (row,) = [row for row in rows(finished, "evaluations") if row["step"] == step]
        assert row["bits_per_byte"] == {
            k: summary["bits_per_byte"][v] for k, v in (("teacher", "teacher"), ("student", name))
        }
        assert row["agreement"] == summary["agreement"][name]
    save = checkpoint.Checkpoints.save

    def stop(self, step, *what):
        if step == 1 or after == "after the checkpoint":
            save(self, step, *what)
        if step == 2:
            raise KeyboardInterrupt

    changes = {"held_out": files.held_out, "samples": 1, "evaluation_interval": 2}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.Checkpoints, "save", stop)
        run(files, tmp_path / "run", **changes)
    assert [row["step"] for row in rows(tmp_path / "run", "evaluations")] == [0, 2]
    run(files, tmp_path / "run", **changes, resume=True)
    for name in ("evaluations", "samples"):
        assert rows(tmp_path / "run", name) == rows(finished, name)
    assert lines(tmp_path / "run") == lines(finished)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(finished, stopped, files, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    run(files, out, held_out=files.held_out, resume=True, mesh__fsdp=2, mesh__tp=2)
    expected, found = exported(finished), exported(out)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4, err_msg=name)
    for row, other in zip(lines(out), lines(finished), strict=True):
        np.testing.assert_allclose([*row.values()], [*other.values()], rtol=1e-3)


def test_going_on_with_a_finished_run_writes_its_result_again(finished, files, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "hf")
    run(files, out, held_out=files.held_out, resume=True, samples=1)
    assert lines(out) == lines(finished)
    for name, value in exported(finished).items():
        np.testing.assert_array_equal(exported(out)[name], value)


def test_batches_depend_on_seed_and_step_alone(files, tmp_path):
    config = configs.change(TINY, teacher=files.untied, data=(files.data,))
    models = load_models(config.student, 64, 0)

    def batch(seed, step):
        texts = load_texts(config.data, models, seed, make_mesh(1, 1), DATE, config.losses)
        return [leaf.tobytes() for leaf in jax.tree.leaves(texts.batch(step))]

    assert batch(0, 3) == batch(0, 3) and batch(0, 3) != batch(0, 4) and batch(0, 3) != batch(1, 3)


# --- the settings of a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", train.PRESETS)
def test_the_settings_of_every_preset_are_read_again(tmp_path, preset):
    config = configs.change(
        train.PRESETS[preset][1], out=tmp_path / "run", seed=2**62, data=(Path("true"), Path("a: b"))
    )
    run = start_run(config.run, [], plain(config), {}, DATE, lambda folder: folder.mkdir())
    assert repr(run.settings) == repr(flat(plain(config)))  # 1, 1.0 and True differ here
    run.close()


def write_signed(file: Path, text: str) -> None:
    """Settings as the program writes them, with their hash."""
    file.write_text(f"{text}# {run_folder._mark(text)}")


def test_settings_of_other_versions(stopped, files, tmp_path):
    """A setting that the version which began the run did not have was at its default; one that is not known is named."""
    shutil.copytree(stopped, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    text = file.read_text()
    go_on = arguments(files, tmp_path / "run", held_out=files.held_out, resume=True)
    text = text[: text.rindex("# ")]
    write_signed(file, text.replace("clip_norm: null\n", "").replace("  gamma: 0.1\n", ""))
    assert "gamma" not in file.read_text() and "clip_norm" not in file.read_text()
    assert "--losses.gamma is 0.2 but" in refused([*go_on, "--losses.gamma", "0.2"])
    for line, name in (("extra: 1\n", "extra"), ("losses.other: 1\n", "losses.other")):
        write_signed(file, text + line)
        assert f"has the setting {name!r}, which this version does not know" in refused(go_on)
    write_signed(file, text.replace("clip_norm: null\n", "").replace("  gamma: 0.1\n", ""))
    train.cli(go_on)


@pytest.mark.parametrize(
    "damage",
    (
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: text.replace("mesh:\n", "mesh: 1\nother:\n"),
        lambda text: text.replace("seed: 0", "seed: !!python/object/apply:os.getcwd []"),
        lambda text: text.replace("seed: 0", "seed: ["),
        lambda text: "[" * 100_000,
        lambda text: "steps: \x00",
        lambda text: "é".encode("latin-1"),
    ),
)
def test_other_settings_are_refused(stopped, files, tmp_path, monkeypatch, damage):
    shutil.copytree(stopped, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    damaged = damage(file.read_text())
    assert damaged != file.read_text()
    if isinstance(damaged, bytes):
        file.write_bytes(damaged)
    else:
        write_signed(file, damaged)
    before = sorted(tmp_path.rglob("*"))
    sentence = f"error: {file} does not hold the settings of a run as this program wrote them: restore it, or name another folder"
    assert refused(arguments(files, tmp_path / "run", held_out=files.held_out, resume=True)) == sentence
    assert refused_by_convert(monkeypatch, "inspect", tmp_path / "run") == sentence
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ("metrics", "evaluations", "samples"))
def test_other_rows_are_refused(finished, files, tmp_path, name):
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / f"{name}.jsonl"
    for content in (b"{\n", b"[]\n", b'{"a": 1}\n', b"\xff\n"):
        file.write_bytes(content)
        found = refused(arguments(files, tmp_path / "run", held_out=files.held_out, resume=True))
        assert f"error: {file} has " in found and "restore it, or go on with what is left by --accept-changes" in found
        assert file.read_bytes() == content


# --- a run's student as a folder ----------------------------------------------------------------------------------


def convert_run(monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
    convert.main()


def refused_by_convert(monkeypatch, *words: object) -> str:
    with pytest.raises(SystemExit) as error:
        convert_run(monkeypatch, *words)
    sentence = error.value.code
    assert isinstance(sentence, str) and sentence.startswith("error: ") and "\n" not in sentence
    return sentence


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_export(finished, stopped, saved, files, tmp_path, monkeypatch):
    flags = "--dtype", "float32"
    convert_run(monkeypatch, "export", finished, tmp_path / "newest", *flags)
    assert contents(tmp_path / "newest") == contents(finished / "hf")
    convert_run(monkeypatch, "export", finished, tmp_path / "older", "--step", 2, *flags)
    convert_run(monkeypatch, "export", stopped, tmp_path / "stopped", *flags)
    assert contents(tmp_path / "older") == contents(tmp_path / "stopped") != contents(tmp_path / "newest")
    found, teacher = load_file(tmp_path / "older" / "model.safetensors"), load_file(files.untied / "model.safetensors")
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], saved[2].embed[:258])
    np.testing.assert_array_equal(found["lm_head.weight"], saved[2].unembed[:258])
    np.testing.assert_array_equal(found["model.norm.weight"], saved[2].norm)
    assert saved[2].expansion is None  # frozen, so that it is the teacher's
    np.testing.assert_array_equal(found["model.expand_embed_tokens.weight"], teacher["model.embed_tokens.weight"])
    assert not np.array_equal(saved[2].embed, saved[4].embed)


def test_export_needs_the_run_alone(files, tmp_path, monkeypatch):
    """Teacher and text may be gone."""
    for name in ("untied", "data.jsonl"):
        source = files.untied.parent / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    run(files, tmp_path / "run", teacher=tmp_path / "untied", data=tmp_path / "data.jsonl", steps=1)
    shutil.rmtree(tmp_path / "untied")
    (tmp_path / "data.jsonl").unlink()
    convert_run(monkeypatch, "export", tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    assert contents(tmp_path / "out") == contents(tmp_path / "run" / "hf")
    convert_run(monkeypatch, "inspect", tmp_path / "run")


def test_export_of_a_trained_expansion(files, tmp_path, monkeypatch):
    config = configs.change(TINY, out=tmp_path / "run", teacher=files.untied, data=(files.data,), train_expansion=True)
    folder = begin(config)
    model = load_models(config.student, 64, 0).student.model
    student = jax.tree.map(lambda leaf: jnp.asarray(leaf[:]) * 3, model)
    with checkpoint.Checkpoints(folder.checkpoints) as checkpoints:
        checkpoints.save(1, {"student": student, "rest": {"step": jnp.zeros(())}}, {}, {})
    convert_run(monkeypatch, "export", folder.path, tmp_path / "out", "--dtype", "float32")
    found, teacher = load_file(tmp_path / "out" / "model.safetensors"), load_file(files.untied / "model.safetensors")
    np.testing.assert_array_equal(found["model.expand_embed_tokens.weight"], teacher["model.embed_tokens.weight"] * 3)


def test_export_refuses(stopped, files, tmp_path, monkeypatch):
    damaged, torn = tmp_path / "damaged", tmp_path / "torn"
    for folder in (damaged, torn):
        shutil.copytree(stopped, folder)
    for part in (damaged / "checkpoints" / "2").rglob("*"):
        if part.is_file():
            part.write_bytes(b"")
    (torn / "student" / "frozen.safetensors").write_bytes(b"")
    fresh = begin(configs.change(TINY, out=tmp_path / "fresh", teacher=files.untied, data=(files.data,)))
    before = sorted(tmp_path.rglob("*"))
    cases = (
        ((fresh.path,), f"there is no checkpoint in {fresh.checkpoints}: train until"),
        ((stopped, "--step", 3), f"{stopped / 'checkpoints'} has no checkpoint 3: name one of 1, 2"),
        ((stopped, "--step", -1), "has no checkpoint -1"),
        ((damaged,), f"the checkpoint {damaged / 'checkpoints' / '2'} is damaged ("),
        ((torn,), f"{torn / 'student' / 'frozen.safetensors'} has 0 bytes instead of"),
        ((files.untied, "--step", 2), f"{files.untied} is not a run, so it has no checkpoint 2: leave out --step"),
    )
    for (source, *flags), sentence in cases:
        assert sentence in refused_by_convert(monkeypatch, "export", source, tmp_path / "out", *flags)
        assert sorted(tmp_path.rglob("*")) == before, sentence


def test_inspect_of_a_run(finished, stopped, files, monkeypatch, capsys):
    found = rows(finished, "evaluations")[1]["bits_per_byte"]
    capsys.readouterr()
    convert_run(monkeypatch, "inspect", finished)
    printed = {line[:22].strip(): line[22:] for line in capsys.readouterr().out.splitlines()}
    assert printed["steps"] == "4 of 4" and printed["vocabulary"].startswith("258 ids, bytes")
    bits = [f"{side} {value:.3f}" for side, value in found.items()]
    assert printed["after step 2"] == f"bits per byte: {', '.join(bits)}" and len(bits) == 2
    assert {"after step 0", "after step 4"} <= printed.keys()
    convert_run(monkeypatch, "inspect", stopped)
    printed = {line[:22].strip(): line[22:] for line in capsys.readouterr().out.splitlines()}
    assert printed["steps"] == "2 of 4" and "after step 0" in printed and "after step 4" not in printed


# --- from an existing student -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(finished, files) -> float:
    """Bits per byte of `finished` on all held-out text, where no teacher's shorter rows cut it."""
    vocabulary, suffixes = load_vocabularies(finished / "hf")
    model, corpus = weights.load(finished / "hf", np.float32), read_corpus([files.held_out], 64)
    batches = [make_batch(corpus.batch(0, number, 4), Side(vocabulary, suffixes, 64), None) for number in range(2)]
    mesh = make_mesh(1, 1)
    model, mask = (shard(part, mesh) for part in (model, LoadedModel.of(model, vocabulary, suffixes).mask))
    return measure(model, None, mask, None, batches, mesh, jnp.dtype(jnp.float32))["student"]


def test_a_byte_student_is_trained_further(finished, files, tmp_path):
    out = tmp_path / "run"
    run(files, out, student=finished, held_out=files.held_out, steps=1, warmup_steps=0)
    start, end = rows(out, "evaluations")[0], rows(finished, "evaluations")[-1]
    np.testing.assert_allclose(start["bits_per_byte"]["student"], end["bits_per_byte"]["student"], rtol=1e-6)
    np.testing.assert_allclose(start["agreement"], end["agreement"], rtol=1e-5)
    old, new = exported(finished), exported(out)
    name = "model.expand_embed_tokens.weight"
    np.testing.assert_array_equal(new[name], old[name])
    assert all(new[key].shape == old[key].shape for key in old) and old.keys() == new.keys()
    assert not np.array_equal(new["model.embed_tokens.weight"], old["model.embed_tokens.weight"])
    before, after = contents(finished / "hf"), contents(out / "hf")
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


def test_a_student_is_trained_without_a_teacher(finished, alone, files, tmp_path):
    out = tmp_path / "run"
    changes = {"losses__alm": 0, "losses__latents": 0, "held_out": files.held_out, "steps": 1}
    run(files, out, teacher=None, student=finished / "hf", **changes)
    start = rows(out, "evaluations")[0]
    assert start["bits_per_byte"].keys() == {"student"} and start["agreement"] is None
    np.testing.assert_allclose(start["bits_per_byte"]["student"], alone, rtol=1e-6)
    assert contents(out / "hf").keys() == contents(finished / "hf").keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("bytes", "subwords"))
def test_a_byte_student_is_a_teacher(finished, alone, files, tmp_path, kind):
    """Its input expansion is read on the teacher's side too."""
    student = finished / "hf" if kind == "bytes" else files.untied
    changes = {"teacher": finished / "hf", "student": student, "teacher_length": 64, "steps": 1}
    run(files, tmp_path / "run", **changes, held_out=files.held_out)
    start = rows(tmp_path / "run", "evaluations")[0]
    np.testing.assert_allclose(start["bits_per_byte"]["teacher"], alone, rtol=1e-6)
    loss = lines(tmp_path / "run")[0]["loss/latents"]
    if kind == "bytes":
        assert start["bits_per_byte"]["student"] == pytest.approx(start["bits_per_byte"]["teacher"], rel=1e-6)
        assert start["agreement"] < 1e-5 and loss < 1e-6  # rounding: two passes of one program, compiled apart
    else:
        assert start["agreement"] > 0.1 and loss > 0.1


@pytest.fixture(scope="module")
def narrow(files, tmp_path_factory) -> Path:
    """A model of another width than the teacher's, with its tokenizer."""
    out = tmp_path_factory.mktemp("models") / "narrow"
    shape = dataclasses.replace(weights.read_config(files.untied / "config.json"), embed=16)
    tokenizer = {name: content for name, content in contents(files.untied).items() if name.startswith("tokenizer")}
    weights.save(out, jax.device_get(initialize(shape, jax.random.key(0))), "float32", files=tokenizer)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("compared", ("last", "all"))
def test_a_narrower_student_compares_hidden_states_through_a_map(files, narrow, tmp_path, compared, capsys):
    """The map is trained and saved with the run, and is no part of the student."""
    changes = {"student": narrow, "teacher_length": 64, "losses__latents_layers": compared}
    saved = {}
    save = checkpoint.Checkpoints.save

    def keep(self, step, items, *notes):
        saved[step] = jax.tree.map(np.copy, jax.device_get(items))
        save(self, step, items, *notes)

    whole, stopped, divided = (tmp_path / name for name in ("whole", "stopped", "divided"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", keep)
        run(files, whole, **changes, save_interval=1)
    said = " ".join(capsys.readouterr().out.split())
    assert "hidden states of width 16 are compared with the teacher's of width 24 through a map" in said
    maps = [saved[step]["rest"]["maps"] for step in (1, 4)]
    assert maps[0].shape == ({"last": 1, "all": 4}[compared], 16, 24)
    assert np.isfinite(maps).all() and (np.abs(maps[0] - maps[1]).max(axis=(1, 2)) > 0).all()
    assert exported(whole).keys() == load_file(narrow / "model.safetensors").keys()
    with interrupted(after=3):
        run(files, stopped, **changes)
    run(files, stopped, **changes, resume=True)
    assert lines(stopped) == [row for row in lines(whole)]
    run(files, divided, **changes, mesh__fsdp=2, mesh__tp=2, accumulation=2)
    for row, other in zip(lines(divided), lines(whole), strict=True):
        np.testing.assert_allclose([*row.values()], [*other.values()], rtol=1e-3)
    expected, found = exported(whole), exported(divided)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_table_is_padded_past_its_vocabulary(files, tmp_path, monkeypatch):
    """261 ids, which two devices do not divide."""
    small.save(tmp_path / "tokenizer", small.byte_level(), small.GEMMA)
    config = dataclasses.replace(weights.read_config(files.untied / "config.json"), vocab_size=326)
    tokenizer = contents(tmp_path / "tokenizer")
    weights.save(
        tmp_path / "teacher", jax.device_get(initialize(config, jax.random.key(0))), "float32", files=tokenizer
    )
    convert_run(monkeypatch, "bytes", tmp_path / "teacher", tmp_path / "student", "--dtype", "float32")
    assert weights.read_config(tmp_path / "student" / "config.json").vocab_size == 261
    changes = {"teacher": None, "student": tmp_path / "student", "losses__alm": 0, "losses__latents": 0, "steps": 1}
    for tp in (1, 2):
        run(files, tmp_path / f"on {tp}", **changes, mesh__tp=tp, held_out=files.held_out)
        assert exported(tmp_path / f"on {tp}")["model.embed_tokens.weight"].shape == (261, 24)
    one, two = (rows(tmp_path / f"on {tp}", "evaluations") for tp in (1, 2))
    for expected, found in zip(one, two, strict=True):
        np.testing.assert_allclose(found["bits_per_byte"]["student"], expected["bits_per_byte"]["student"], rtol=1e-4)


def test_settings_that_an_existing_student_excludes(finished, files, tmp_path, monkeypatch):
    changes = {
        "student_tokenizer": (files.tokenizer, "--student-tokenizer"),
        "special_tokens": ("change", "--special-tokens"),
        "tied": ("False", "--tied"),
        "student_weights": ("random", "--student-weights"),
        "no_expansion": (True, "--no-expansion"),
        "kind": ("bolmo", "--kind"),
        **{name: ("8", f"--{name.replace('_', '-')}") for name in OF_A_NEW_BOLMO},
    }
    assert {name.removeprefix("no_") for name in changes} == set(OF_A_NEW_STUDENT)
    for name, (value, flag) in changes.items():
        found = refused(arguments(files, tmp_path / "run", student=finished / "hf", **{name: value}))
        assert found == f"error: --student brings its own tokenizer and tables: leave out {flag}"
    own = ["quickstart-teacher", "--out", str(tmp_path / "run"), "--student", str(finished / "hf")]
    assert "this preset trains an architecture of its own from random weights: use another" in refused(own)
    for tokenizer in ("bytes", files.tokenizer):  # nor can what has an expansion get another one
        found = refused(arguments(files, tmp_path / "run", teacher=finished / "hf", student_tokenizer=tokenizer))
        assert "the model is a byte student with an input expansion" in found
    narrow = dataclasses.replace(
        weights.read_config(files.untied / "config.json"), embed=16, layers=2, windows=(None,) * 2
    )
    tokenizer = {name: content for name, content in contents(files.untied).items() if name.startswith("tokenizer")}
    weights.save(tmp_path / "narrow", jax.device_get(initialize(narrow, jax.random.key(0))), "float32", files=tokenizer)
    shallow = dataclasses.replace(narrow, embed=24)
    weights.save(
        tmp_path / "shallow", jax.device_get(initialize(shallow, jax.random.key(0))), "float32", files=tokenizer
    )
    changes = {"student": tmp_path / "shallow", "losses__latents_layers": "all"}
    assert "but the student has 2 layers and" in refused(arguments(files, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ("tied", "untied"))
@pytest.mark.parametrize("tied", (None, True, False))
def test_tied_tables(files, tmp_path, kind, tied):
    config = StudentConfig(teacher=getattr(files, kind), student_tokenizer=files.tokenizer, tied=tied)
    student = load_models(config, 64, 0).student.model
    assert student.config.tied == (kind == "tied" if tied is None else tied)
    assert (student.unembed is None) == student.config.tied


def test_control_and_tied_are_not_for_bytes(files, tmp_path):
    for name, value in (("special_tokens", "change"), ("tied", True)):
        found = refused(arguments(files, tmp_path / "run", **{name: str(value)}))
        assert (
            found
            == f"error: --{name.replace(chr(95), chr(45))} {value} is not for bytes: give --student-tokenizer, or leave it out"
        )
    assert not (tmp_path / "run").exists()


def test_control_tokens_of_the_students_own_tokenizer(files, tmp_path, monkeypatch):
    template = small.CHATS["qwen"]
    small.save(tmp_path / "tokenizer", small.byte_level(), small.CHATML, chat_template=template)
    kept = load_models(StudentConfig(teacher=files.untied, student_tokenizer=tmp_path / "tokenizer"), 64, 0)
    assert set(kept.teacher.vocabulary.template_special) <= set(kept.student.vocabulary.special)
    assert kept.student.vocabulary.chat_template == kept.teacher.vocabulary.chat_template
    changes = {"student_tokenizer": tmp_path / "tokenizer", "special_tokens": "change", "steps": 1}
    run(files, tmp_path / "run", **changes)  # of a teacher without a chat template
    written = json.loads((tmp_path / "run" / "hf" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == template
    vocabulary, _ = load_vocabularies(tmp_path / "run" / "hf")
    assert set(vocabulary.special) == set(small.CHATML) != set(kept.student.vocabulary.special)
    assert vocabulary.size == load_vocabulary(tmp_path / "tokenizer").size
    assert vocabulary.names == load_vocabulary(tmp_path / "tokenizer").names
    convert_run(monkeypatch, "export", tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    assert contents(tmp_path / "out") == contents(tmp_path / "run" / "hf")


# --- other runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("tied", pytest.param("untied", marks=pytest.mark.slow)))
def test_a_subword_student(files, tmp_path, monkeypatch, kind):
    teacher = getattr(files, kind)
    run(files, tmp_path / "run", teacher=teacher, student_tokenizer=files.tokenizer, steps=1, losses__sft=0)
    student = weights.load(tmp_path / "run" / "hf", np.float32)
    vocabulary, suffixes = load_vocabularies(tmp_path / "run" / "hf")
    assert suffixes is None and vocabulary.size == student.config.vocab_size == 300
    assert student.config.tied == (kind == "tied") and student.config.expansion_size is None
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == [1] and "loss/sft" not in rows[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bits_per_byte"] == {"teacher": None, "student_start": None, "student_end": None}
    convert_run(monkeypatch, "export", tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    assert contents(tmp_path / "out") == contents(tmp_path / "run" / "hf")


def test_pretraining_without_a_teacher(files, tmp_path, monkeypatch):
    tiny = weights.read_config(files.tied / "config.json")
    losses = LossConfig(alm=0.0, balance="fixed")
    preset = configs.change(TINY, architecture=tiny, losses=losses, clip_norm=1.0, save_interval=4)
    monkeypatch.setitem(train.PRESETS, "tiny", ("", preset))
    changes = {"teacher": None, "student_tokenizer": files.tied, "held_out": files.held_out, "samples": 1}
    compiled = []
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a, **k: compiled.append(1) or step(*a, **k))
    run(files, tmp_path / "run", **changes)
    assert len(compiled) == 1  # traced once: the state that comes out is as the one that went in
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss/sft"] < rows[0]["loss/sft"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bits_per_byte"]["teacher"] is None
    assert summary["bits_per_byte"]["student_end"] < summary["bits_per_byte"]["student_start"]
    assert weights.load(tmp_path / "run" / "hf", np.float32).config == tiny


@pytest.mark.slow
@pytest.mark.parametrize("student", ("bytes", "subwords"))
def test_unbiased_chunks(files, tmp_path, monkeypatch, capsys, student):
    """From text to values to a run; then other values are found out, and few of them end fewer chunks."""
    other = {} if student == "bytes" else {"student_tokenizer": files.tokenizer}
    words = [word for name, value in other.items() for word in ("--" + name.replace("_", "-"), value)]
    pairs = tmp_path / "pairs.safetensors"
    convert_run(monkeypatch, "pair-bias", files.untied, pairs, "--data", files.data, *words)
    printed = capsys.readouterr().out
    assert "20 pieces, 0 left out" in printed and re.search(r"threshold 0.01 +[1-9][0-9.]+% of the places", printed)
    assert "exists already" in refused_by_convert(monkeypatch, "pair-bias", files.untied, pairs, "--data", files.data)
    found = refused_by_convert(
        monkeypatch, "pair-bias", files.untied, tmp_path / "x", "--data", files.data, "--pieces=0"
    )
    assert "--pieces is 0" in found
    assert "no text to train on" in refused_by_convert(monkeypatch, "pair-bias", files.untied, tmp_path / "x")

    chosen = {**other, "losses__chunks": "unbiased", "losses__pair_bias": pairs}
    run(files, tmp_path / "run", **chosen, losses__pair_bias_threshold=0.01)
    printed = " ".join(capsys.readouterr().out.split())
    note = re.search(r"([0-9.]+)% of the first [0-9,]+ places .* end a chunk; 0.0% are of pairs", printed)
    assert 5.0 < float(note[1]) < 95.0
    losses = [row["loss/alm"] for row in lines(tmp_path / "run")]
    assert len(losses) == 4 and np.isfinite(losses).all()
    if student == "subwords":
        return

    values = load_file(pairs)
    with safe_open(pairs, "np") as file:
        metadata = file.metadata()
    save_file({**values, "teacher_bias": values["teacher_bias"] / 2}, pairs, metadata)
    resumed = arguments(files, tmp_path / "run", **chosen, losses__pair_bias_threshold=0.01, resume=True)
    assert "the file of --losses.pair-bias is not what the run in" in refused(resumed)
    few = {name: column[:1] for name, column in values.items()}
    save_file(few, pairs, metadata)
    run(files, tmp_path / "few", **chosen, steps=1)
    assert lines(tmp_path / "few")[0]["loss/alm"] != losses[0]
    assert re.search(r"[0-9]{2}\.[0-9]% are of pairs that --losses.pair-bias does not know", capsys.readouterr().out)


def test_bad_settings_of_unbiased_chunks(files, tmp_path):
    pairs = tmp_path / "pairs"
    pairs.write_bytes(b"these are no values")
    unbiased = {"losses__chunks": "unbiased"}
    for changes, sentence in (
        (unbiased, "make them with `python convert.py pair-bias` and name the file with --losses.pair-bias"),
        ({**unbiased, "losses__pair_bias": tmp_path / "none"}, "none does not exist"),
        ({**unbiased, "losses__pair_bias": pairs}, "pairs cannot be read as safetensors"),
        ({"losses__pair_bias": pairs}, "--losses.pair-bias is for --losses.chunks unbiased: leave it out"),
        ({"losses__pair_bias_threshold": 0.5}, "--losses.pair-bias-threshold is for --losses.chunks unbiased"),
        ({"losses__pair_bias": pairs, "losses__alm": 0}, "--losses.pair-bias is for alm, which has weight 0"),
        ({**unbiased, "losses__pair_bias": pairs, "losses__pair_bias_threshold": -1}, "pair-bias-threshold is -1.0"),
        ({**unbiased, "losses__pair_bias": pairs, "losses__pair_bias_threshold": "nan"}, "pair-bias-threshold is nan"),
    ):
        assert sentence in refused(arguments(files, tmp_path / "run", **changes)), changes
        assert not (tmp_path / "run").exists()


def test_overwrite_replaces_a_run(stopped, finished, files, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    (out / "left").write_text("over")
    run(files, out, held_out=files.held_out, overwrite=True)
    assert not (out / "left").exists()
    assert lines(out) == lines(finished)


def test_texts_that_one_side_cannot_spell_are_counted(files, tmp_path, capsys):
    letters = set(pre_tokenizers.ByteLevel.alphabet()) - {chr(0xF4)}  # the teacher cannot spell that byte
    small.save(tmp_path / "tokenizer", small.byte_level(alphabet=letters), small.LLAMA)
    vocabulary = load_vocabulary(tmp_path / "tokenizer")
    config = dataclasses.replace(weights.read_config(files.tied / "config.json"), vocab_size=vocabulary.size)
    tokenizer = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    weights.save(
        tmp_path / "teacher", jax.device_get(initialize(config, jax.random.key(0))), "float32", files=tokenizer
    )
    texts = ["the user said", "a \U00100000 b", "hello there", "the model"]  # UTF-8: f4 80 80 80
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    changes = {"teacher": tmp_path / "teacher", "data": tmp_path / "data.jsonl", "losses__latents": 0, "steps": 3}
    run(files, tmp_path / "run", **changes)
    assert [row["dropped"] for row in lines(tmp_path / "run")] == [1, 2, 3]
    assert "3 texts were left out" in capsys.readouterr().out
    with interrupted(after=2):
        run(files, tmp_path / "stopped", **changes, save_interval=1)
    run(files, tmp_path / "stopped", **changes, resume=True)
    assert [row["dropped"] for row in lines(tmp_path / "stopped")] == [1, 2, 3]


def test_a_cut_off_last_line_of_metrics_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "seconds": 2.0, "dropped": 3}\n{"step": 2, "sec')
    assert JsonLines(file, step=2).rows == [{"step": 1, "seconds": 2.0, "dropped": 3}]
    assert file.read_text() == '{"step": 1, "seconds": 2.0, "dropped": 3}\n'


# --- the folder of a run ------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwrite_removes_nothing_but_a_run(stopped, files, tmp_path, monkeypatch):
    """Not a stranger's project, nor what the run reads, nor the folder that the program stands in."""
    project, out = tmp_path / "project", tmp_path / "run"
    project.mkdir()
    (project / "config.yaml").write_text((stopped / "config.yaml").read_text())
    (project / "work.py").write_text("years of work")
    assert "is not a run of this program" in refused(arguments(files, project, overwrite=True))
    shutil.copytree(stopped, out)
    shutil.copytree(files.untied, out / "model")
    shutil.copy(files.data, out / "data.jsonl")
    before = tree(tmp_path)
    for changes in ({"teacher": out / "model"}, {"student": out / "model"}, {"data": out / "data.jsonl"}):
        found = refused(arguments(files, out, overwrite=True, **changes))
        assert f"the run reads {next(iter(changes.values()))}, which --overwrite would remove" in found
    (out / "below").mkdir()
    monkeypatch.chdir(out / "below")
    assert f"you are in {out}" in refused(arguments(files, out, overwrite=True))
    assert "exists: go on with --resume" in refused(arguments(files, out))
    assert tree(tmp_path) == before


def test_a_folder_that_appears_meanwhile_is_left_alone(stopped, files, tmp_path, monkeypatch):
    """Between the first check of --out and the moment when it is made."""
    out = tmp_path / "run"

    def appear(*_):
        out.mkdir(exist_ok=True)
        (out / "precious").write_text("keep")
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fingerprints", appear)
        assert "exists: go on with --resume" in refused(arguments(files, out))
        assert tree(tmp_path) == {"run/precious": b"keep"}
        shutil.rmtree(out)
        shutil.copytree(stopped, out)
        patch.setattr(train, "fingerprints", lambda *_: (out / "run.json").unlink() or appear())
        assert "is not a run of this program" in refused(arguments(files, out, overwrite=True))
    assert (out / "precious").read_text() == "keep" and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_two_runs_in_one_folder(stopped, files, tmp_path):
    """While one goes on, another can neither go on with it nor replace it."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    run = begin(configs.change(TINY, out=tmp_path / "other", teacher=files.untied, data=(files.data,)))
    before = tree(tmp_path)
    for folder, changes in ((out, {"held_out": files.held_out}), (run.path, {})):
        with (folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for way in ("resume", "overwrite"):
                assert "a run is going on in" in refused(arguments(files, folder, **changes, **{way: True}))
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_a_run_that_is_killed_as_it_starts_leaves_its_place_free(files, tmp_path):
    """In a process of its own, which is killed while the folder is made."""
    code = f"""
import os, sys
sys.path[:0] = [{str(Path(train.__file__).parent)!r}, {str(Path(__file__).parent)!r}]
import test_train, train
from minalm.run import folder
train.PRESETS["tiny"] = ("", test_train.TINY)
folder.write_record = lambda *_: os.kill(os.getpid(), 9)
train.cli({arguments(files, tmp_path / "run")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "run").exists()
    run(files, tmp_path / "run", steps=1)
    assert (tmp_path / "run" / "summary.json").exists()


def test_what_a_run_reads_is_compared(stopped, files, tmp_path, capsys):
    """Other text, another model or another library are refused, or accepted and noted."""
    for name in ("data.jsonl", "held_out.jsonl"):
        shutil.copy(files.data.with_name(name), tmp_path / name)
    shutil.copytree(files.untied, tmp_path / "untied")
    changes = {name: tmp_path / f"{name}.jsonl" for name in ("data", "held_out")} | {"teacher": tmp_path / "untied"}
    with interrupted(after=3):
        run(files, tmp_path / "run", **changes)
    before = tree(tmp_path / "run")

    def edited(path):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"the", b"thy", 1) if path.suffix == ".jsonl" else content[:-1] + b"\x01")
        return path, content

    for path, name in (
        (tmp_path / "data.jsonl", "the training text"),
        (tmp_path / "held_out.jsonl", "the held-out text"),
        (tmp_path / "untied" / "model.safetensors", "the model of --teacher"),
    ):
        path, content = edited(path)
        found = refused(arguments(files, tmp_path / "run", **changes, resume=True))
        assert f"{name} is not what the run in" in found and "--accept-changes" in found
        path.write_bytes(content)
    assert tree(tmp_path / "run") == before
    edited(tmp_path / "data.jsonl")
    run(files, tmp_path / "run", **changes, resume=True, accept_changes=True)
    assert "the training text is not what the run has read so far" in " ".join(capsys.readouterr().out.split())
    noted = json.loads((tmp_path / "run" / "run.json").read_text())["changes"]
    assert noted == [{"step": 2, "changes": ["the training text is not what the run has read so far"]}]
    with pytest.raises(SystemExit):  # it is finished, but the text is what it now began with
        train.cli([*arguments(files, tmp_path / "run", **changes, resume=True), "--steps", "3"])


def test_a_run_is_extended_and_computed_otherwise(finished, files, tmp_path, capsys):
    """Steps, remat, accumulation and the compute dtype may change; it is said, and kept in the folder."""
    shutil.copytree(finished, tmp_path / "run")
    go_on = {"held_out": files.held_out, "samples": 1, "evaluation_interval": 2, "resume": True}
    assert "--steps is 3 but the run in" in refused(arguments(files, tmp_path / "run", **go_on, steps=3))
    others = {"steps": 6, "remat": "full", "accumulation": 2, "compute_dtype": "bfloat16"}
    run(files, tmp_path / "run", **go_on, **others)
    printed = " ".join(capsys.readouterr().out.split())
    for name, was in (("steps", 4), ("remat", "dots"), ("accumulation", 1), ("compute-dtype", "float32")):
        assert f"--{name} is {others[name.replace('-', '_')]} from here on and was {was}" in printed
    assert "the learning rate now falls to the new last step" in printed
    rates = [row["learning_rate"] for row in lines(tmp_path / "run")]
    assert rates == pytest.approx([2e-3, 2e-3, 2e-3 * 2 / 3, 2e-3 / 3, 2e-3 * 2 / 5, 2e-3 / 5])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["steps"] == 6
    (noted,) = json.loads((tmp_path / "run" / "run.json").read_text())["changes"]
    assert noted["step"] == 4 and len(noted["changes"]) == 4
    assert [row["step"] for row in rows(tmp_path / "run", "evaluations")] == [0, 2, 4, 6]


def test_parameters_that_are_not_finite_are_not_saved(files, tmp_path):
    """The update of step 2 is, its loss is not: without a step 3, nothing but the parameters shows it."""
    step = train.train_step

    def train_step(*arguments, **settings):
        state, metrics = step(*arguments, **settings)
        norm = jnp.where(state.step == 2, jnp.inf, state.student.norm)
        return eqx.tree_at(lambda state: state.student.norm, state, norm), metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        found = refused(arguments(files, tmp_path / "run", steps=2, save_interval=1))
    assert "step 2 left parameters that are not finite, so they are not saved" in found
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir()] == ["1"]
    assert "the last good checkpoint is that after step 1" in found
    assert not (tmp_path / "run" / "hf").exists() and not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_devices_without_work_are_named(files, tmp_path, capsys):
    """Batches of 6 rows on the 8 devices of these tests use 2."""
    words = arguments(files, tmp_path / "run", batch_size=6, steps=1, losses__latents=0)
    train.cli([*words, "--mesh.fsdp", "None"])
    assert "6 of 8 devices have nothing to do" in " ".join(capsys.readouterr().out.split())


def test_samples_of_a_run_killed_between_them(finished, files, tmp_path):
    """All samples of a step are one line: a line that was cut off is written again. What a checkpoint knows of cannot have
    been cut off: the run goes on from the one before."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    file = tmp_path / "run" / "samples.jsonl"
    first, last = file.read_text().splitlines(keepends=True)
    file.write_text(first + last[:-20])
    run(files, tmp_path / "run", held_out=files.held_out, samples=1, evaluation_interval=2, resume=True)
    assert file.read_text() == first + last


# --- bad input ----------------------------------------------------------------------------------------------------


def refused(words: list[str]) -> str:
    """The sentence that a command line is refused with."""
    with pytest.raises(SystemExit) as error:
        train.cli(words)
    assert isinstance(error.value.code, str), error.value.code  # printed to stderr, exit code 1
    sentence = error.value.code
    assert sentence.startswith("error: ") and "\n" not in sentence
    return sentence


def test_bad_settings(files, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello."}]}))
    cases = (
        ({"data": tmp_path / "none.jsonl"}, "none.jsonl does not exist"),
        ({"data": None}, "no text to train on"),
        ({"data": empty}, "there is no file below"),
        ({"held_out": tmp_path / "none.txt"}, "none.txt does not exist"),
        ({"teacher": tmp_path / "none"}, "none"),
        ({"student_tokenizer": tmp_path / "none"}, "none does not exist"),
        ({"mesh__tp": 3}, "parameter .* does not divide"),
        ({"mesh__fsdp": 16}, "needs 16 devices but there are 8"),
        ({"mesh__fsdp": 3}, "--batch-size 4 rows do not divide over --mesh.fsdp 3"),
        ({"resume": True}, "there is no run in .* start it without --resume"),
        ({"resume": True, "overwrite": True}, "choose one"),
        ({"steps": 0}, "--steps is 0: it must be a number of at least 1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"save_interval": 0}, "--save-interval is 0"),
        ({"learning_rate": "nan"}, "--learning-rate is nan"),
        ({"teacher_length": 1}, "--teacher-length is 1"),
        ({"evaluation_rows": 0}, "--evaluation-rows is 0"),
        ({"stdlib_fraction": 2}, "--stdlib-fraction is 2"),
        ({"clip_norm": 0}, "--clip-norm is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**31}, "--seed is 2147483648: it must be a number below 2147483648"),
        ({"beta1": 1}, "--beta1 is 1.0: it must be below 1"),
        ({"epsilon": 0}, "--epsilon is 0.0"),
        ({"mesh__tp": 0}, "at least 1"),
        ({"mesh__fsdp": -1}, "at least 1"),
        ({"data": chat}, "has no chat template, so it cannot write chats"),
        ({"piece_bytes": 5}, "pieces of 5 bytes are too short"),
        ({"losses__tau": 0}, "--losses.tau must be above 0"),
        ({"losses__gamma": -1}, "--losses.gamma is -1.0: it must be a number of at least 0"),
        ({"losses__alpha": 1}, "--losses.alpha must be above 0 and not 1"),
        ({"losses__sft": 0, "losses__alm": 0, "losses__latents": 0}, "every loss has weight 0"),
    )
    for changes, sentence in cases:
        found = refused(arguments(files, tmp_path / "run", **changes))
        assert "Traceback" not in found
        assert re.search(sentence, found), (changes, found)
        assert not (tmp_path / "run").exists(), changes


def test_bad_presets(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no text to train on: name files or folders with --data" in refused(["gemma2-2b-it-byte"])
    data = ["--data", str(files.data), "--mesh.fsdp", "1", "--mesh.tp", "1"]
    assert "gemma-2-2b-it" in refused(["gemma2-2b-it-byte", *data])
    for loss in ("alm", "latents"):
        found = refused(["quickstart-teacher", f"--losses.{loss}", "1"])
        assert "alm and next_byte and latents and representation need a teacher: give --teacher, or" in found
    assert "name one with --student-tokenizer" in refused(["quickstart-teacher", "--student-tokenizer", "bytes"])
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_would_learn_nothing_by_a_loss(files, tmp_path):
    """The student's rows end before the teacher's first token does: no chunk, but a byte to predict."""
    (tmp_path / "data.jsonl").write_text('{"text": " cat the"}\n' * 8)
    found = refused(arguments(files, tmp_path / "run", data=tmp_path / "data.jsonl", student_length=2))
    assert "nothing in the first 8 texts counts in alm: give other text, longer rows" in found


@pytest.mark.parametrize(
    "name, content, sentence",
    (
        ("latin.txt", "é".encode("latin-1"), "latin.txt is not UTF-8"),
        ("broken.jsonl", b'{"text": "good"}\n{"text": \n', "broken.jsonl, line 2: not JSON"),
        ("other.jsonl", b'{"content": "x"}\n', "other.jsonl, line 1: it has of `text`, `messages`"),
        (
            "role.jsonl",
            b'{"messages": [{"role": "tool", "content": "x"}]}\n',
            "so it cannot write chats: give plain texts, or a tokenizer with one",
        ),
        ("text.csv", b"x", "text.csv is none of .txt"),
        ("empty.txt", b"", "there is no text in"),
    ),
)
def test_bad_text(files, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    assert sentence in refused(arguments(files, tmp_path / "run", data=tmp_path / name))
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_one_sentence(stopped, tmp_path):
    """Threads of Orbax that go on reading say nothing behind it."""
    shutil.copytree(stopped, tmp_path / "run")
    largest = max(
        (tmp_path / "run/checkpoints/2/student").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size
    )
    os.truncate(largest, largest.stat().st_size // 2)
    command = [sys.executable, "convert.py", "export", tmp_path / "run", tmp_path / "out"]
    for _ in range(2):
        done = subprocess.run(command, cwd=Path(train.__file__).parent, capture_output=True, text=True, timeout=200)
        assert done.returncode == 1 and re.fullmatch(
            "error: the checkpoint .* is damaged .*: use that after step 1\n", done.stderr
        )


def test_nothing_to_learn(files, tmp_path):
    """Found before anything is written."""
    path = small.save(tmp_path / "words", small.byte_level(), ["<s>"], bos_token="<s>")
    spec = json.loads((path / "tokenizer.json").read_text())
    splits = [{"type": "WhitespaceSplit"}, spec["pre_tokenizer"] | {"use_regex": False}]  # this loses spaces
    (path / "tokenizer.json").write_text(
        json.dumps(spec | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": splits}})
    )
    data = tmp_path / "t.jsonl"
    data.write_text(json.dumps({"text": "the cat reads of two models"}) + "\n")
    found = refused(arguments(files, tmp_path / "run", student_tokenizer=path, data=data))
    assert "all of the first 4 texts are left out, since a tokenizer does not spell them" in found
    assert re.search("where the text has '.*the cat reads.*', the tokens of .*words spell '.*thecatreads", found)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text((json.dumps({"text": "the cat"}) + "\n") * 9 + json.dumps({"text": "cat"}) + "\n")
    config = configs.change(TINY, out=tmp_path / "run", teacher=files.untied, data=(mixed,), student_tokenizer=path)
    (note,) = load_texts(config.data, load_models(config.student, 64, 0), 0, make_mesh(1, 1), DATE, config.losses).notes
    assert re.match(
        "[34] of the first 4 texts are left out, .* has '.*the cat.*', the tokens of .* spell '.*thecat", note
    )
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "the cat"}]}\n')
    teacher = tmp_path / "teacher"
    shutil.copytree(files.untied, teacher)
    (teacher / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    found = refused([*arguments(files, tmp_path / "run", teacher=teacher, data=chat), "--mask-prompt"])
    assert "nothing in the first 4 texts counts in the losses: give other text" in found
    assert not (tmp_path / "run").exists()


def change_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def change_json(name, change):
    def damage(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return damage


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "damage, sentence",
    (
        (change_tensors(lambda t: t.pop(NORM)), f"lacks the tensor {NORM}"),
        (change_tensors(lambda t: t.update(extra=np.zeros(2, np.float32))), "holds the tensor extra"),
        (change_tensors(lambda t: t.update({NORM: np.zeros(7, np.float32)})), f"the tensor {NORM} has the shape (7,)"),
        (change_json("config.json", lambda c: c.update(num_local_experts=4)), "'num_local_experts' is 4"),
        (change_json("config.json", lambda c: c.update(model_type="mamba")), "'model_type' is 'mamba'"),
        (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
        (
            change_json("tokenizer.json", lambda t: t["model"].update(vocab={"a": 0}, merges=[])),
            "cannot spell every text",
        ),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_teachers(files, tmp_path, damage, sentence):
    shutil.copytree(files.untied, tmp_path / "teacher")
    damage(tmp_path / "teacher")
    assert sentence in refused(arguments(files, tmp_path / "run", teacher=tmp_path / "teacher"))
    assert not (tmp_path / "run").exists()


def fewer_rows(folder: Path) -> None:
    """A table of 200 rows under a tokenizer of 288, as a config.json of its own says too."""
    change_json("config.json", lambda c: c.update(vocab_size=200))(folder)
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    change_tensors(lambda t: t.update({name: t[name][:200] for name in tables}))(folder)


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, words",
    (
        (
            change_json("config.json", lambda c: c.update(model_type="mamba")),
            ("config.json", "'model_type'", "'mamba'"),
        ),
        (
            change_json("config.json", lambda c: c.update(rope_scaling={"rope_type": "spiral", "factor": 2.0})),
            ("config.json", "'rope_scaling'", "'spiral'"),
        ),
        (change_json("config.json", lambda c: c.update(intermediate_size=40)), ("the tensor", "mlp", "config.json")),
        (
            change_json("config.json", lambda c: c.update(num_hidden_layers=2)),
            ("the tensor", "layers.2", "config.json"),
        ),
        (fewer_rows, ("has ids past the model's 200 rows",)),
        (cut_off, ("model.safetensors is damaged",)),
        (lambda folder: (folder / "config.json").write_text("{"), ("config.json is not JSON",)),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), ("tokenizer.json",)),
        (lambda folder: (folder / "tokenizer_config.json").write_bytes(b"\xff"), ("tokenizer_config.json",)),
    ),
    ids=("model type", "rope type", "width", "depth", "rows", "cut off", "no JSON", "no tokenizer", "no text"),
)
def test_bad_models_are_refused_by_every_program(files, tmp_path, monkeypatch, damage, words):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(files.untied, model)
    damage(model)
    sentences = [
        refused(arguments(files, out, teacher=model)),
        refused(arguments(files, out, student=model)),
        refused_by_convert(monkeypatch, "bytes", model, out),
        refused_by_convert(monkeypatch, "tokenizer", model, files.tokenizer, out),
        refused_by_convert(monkeypatch, "export", model, out),
        refused_by_convert(monkeypatch, "inspect", model),
    ]
    for sentence in sentences:
        assert all(word in sentence for word in words) and str(model) in sentence, sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_hub_that_is_not_there(files, tmp_path):
    """In processes of their own, since the hub's client reads its settings once: what a user sees."""
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    convert_program, train_program = (Path(program.__file__) for program in (convert, train))
    for program, *words in (
        (convert_program, "bytes", "org/name", "out"),
        (convert_program, "inspect", "org/name"),
        (train_program, "smollm2-135m-byte", "--teacher", "org/name", "--data", files.data, "--out", "out"),
        (train_program, "smollm2-135m-byte", "--teacher", files.untied, "--student", "org/name", "--data", files.data),
    ):
        done = subprocess.run(
            [sys.executable, program, *map(str, words)],
            cwd=tmp_path,
            env=settings,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: org/name is no folder here, and the Hugging Face hub did not give it")
        assert done.stderr.count("\n") == 1 and {path.name for path in tmp_path.iterdir()} <= {"hub"}


def test_a_folder_that_exists_is_left_alone(finished, files, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert "exists: go on with --resume" in refused(arguments(files, finished))
    changed = arguments(files, finished, held_out=files.held_out, resume=True, learning_rate=1.0)
    assert "--learning-rate is 1.0 but the run in" in refused(changed)
    changed = arguments(files, finished, held_out=files.held_out, resume=True, losses__tau=7)
    assert "--losses.tau is 7.0" in refused(changed)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}

    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("keep")
    assert "is not a run of this program" in refused(arguments(files, other, overwrite=True))
    assert "there is no run in" in refused(arguments(files, other, resume=True))
    assert (other / "precious").read_text() == "keep"
    broken = arguments(files, finished, overwrite=True, data=tmp_path / "none.txt")
    assert "none.txt does not exist" in refused(broken)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_numbers_that_are_not_finite_stop_the_run(files, tmp_path, monkeypatch):
    made = iter([1.0, 1.0, np.nan, 1.0])
    original = train.shard_rows

    def shard_rows(batch, mesh):
        weight = batch.student.weight * np.float32(next(made))
        student = dataclasses.replace(batch.student, weight=weight)
        return original(dataclasses.replace(batch, student=student), mesh)

    monkeypatch.setattr(train, "shard_rows", shard_rows)
    found = refused(arguments(files, tmp_path / "run", save_interval=1))
    assert "step 3 gave numbers that are not finite (" in found and "loss/sft nan" in found and "--clip-norm" in found
    assert found.count(f"{files.data}, line ") == 4 and "the last good checkpoint is that after step 1" in found
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2]
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert saved == {"1", "not-finite-2"}  # nothing is saved after it, and what led there is set aside
    assert not (tmp_path / "run" / "hf").exists() and not (tmp_path / "run" / "summary.json").exists()


def test_settings_that_do_not_exist_are_refused(capsys):
    with pytest.raises(SystemExit) as error:
        train.cli(["--no-such-setting", "1"])
    assert error.value.code not in (0, None)


def test_help_of_the_program():
    program = Path(train.__file__)
    done = subprocess.run([sys.executable, program, "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stderr == ""
    for preset in train.PRESETS.keys() - {"tiny"}:
        assert preset in done.stdout
    failed = subprocess.run(
        [sys.executable, program, "--data", "none.txt", "--steps", "0"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert failed.returncode == 1 and failed.stderr == "error: --steps is 0: it must be a number of at least 1\n"


# --- the report ---------------------------------------------------------------------------------------------------


def page_data(page: Path) -> dict[str, Any]:
    """The data in a page, whose script reads the element of that name."""
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL
    )
    return json.loads(text)


def test_the_report_of_runs(finished, stopped, files, tmp_path):
    """One page without a network holds the logs of both; what the models make of a text is what transformers computes."""
    page = tmp_path / "pages" / "report.html"
    text = "the cat reads bytes </script><b>日本\x1b"
    report.main(report.Config((finished, stopped), out=page, text=(text,)))
    html = page.read_text("utf-8")
    assert (
        not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html) and "\x1b" not in html and "</script><b>" not in html
    )
    first, second = page_data(page)["runs"]
    assert (
        (first["name"], second["name"]) == tuple(runs.short_names([finished, stopped])) != (str(finished), str(stopped))
    )
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert first["metrics"]["step"] == [1, 2, 3, 4] and second["metrics"]["step"] == [1, 2, 3]
    np.testing.assert_allclose(first["metrics"]["loss/alm"], [row["loss/alm"] for row in metrics], rtol=1e-5)
    assert first["metrics"]["bytes"] == [row["bytes"] for row in metrics]
    assert first["summary"]["steps"] == 4 and second["summary"] is None
    assert first["samples"][0]["samples"] and first["settings"]["losses.latents"] == 1.0
    assert second["texts"] is None and "has exported no model yet" in second["notes"][0]

    (judged,) = first["texts"]
    assert judged["text"] == text and judged["ends"] == "merged"
    spelled = {
        side: "".join(token["text"] for token in tokens if not token["special"])
        for side, tokens in judged["tokens"].items()
    }
    assert spelled["teacher"].encode().replace(b"\\x", b"") == spelled["student"].encode().replace(b"\\x", b"")
    for side, tokens in judged["tokens"].items():
        sums = [sum(token["logp"] for token in tokens if token["chunk"] == n) for n in range(len(judged["chunks"]))]
        np.testing.assert_allclose([chunk[side][0] for chunk in judged["chunks"]], sums, atol=2e-3)
    group = 0
    for chunk in judged["chunks"]:  # a group ends where the teacher's boundary mass passes gamma
        assert chunk["group"] == group
        group += chunk["teacher"][1] > judged["gamma"]
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    vocabulary = load_vocabulary(files.untied)
    (encoding,) = vocabulary.encode([text_corpus([text], 1000).piece(0)])
    model = transformers.AutoModelForCausalLM.from_pretrained(files.untied)
    with torch.no_grad():
        logits = model(torch.tensor(encoding.ids[None].astype(np.int64))).logits[0].log_softmax(-1).numpy()
    expected = logits[np.arange(len(encoding.ids) - 1), encoding.ids[1:]]
    np.testing.assert_allclose([token["logp"] for token in judged["tokens"]["teacher"]], expected, atol=2e-3)


def test_what_a_report_refuses(finished, tmp_path):
    def refused_report(*words: str) -> str:
        with pytest.raises(InputError) as error:
            report.main(tyro.cli(report.Config, args=words))
        return str(error.value)

    assert "nothing to report" in refused_report()
    assert "is no run of train.py" in refused_report(str(tmp_path))
    assert "named twice" in refused_report(str(finished), f"{finished}/")
    assert "is a folder" in refused_report(str(finished), "--out", str(tmp_path))
    assert "--text is empty" in refused_report(str(finished), "--text", " ")


def test_a_long_run_is_thinned_to_means():
    rows = [
        {"step": n, "seconds": n / 2, "bytes": 10 * n, "dropped": 0, "loss/sft": float(n % 2)} for n in range(1, 2401)
    ]
    found, size = runs.thinned(rows)
    assert size == 3 and len(found) == 800 and found[-1]["step"] == 2400 and found[0]["bytes"] == 30
    assert found[0]["loss/sft"] == pytest.approx(2 / 3) and runs.thinned(rows[:5]) == (rows[:5], 1)

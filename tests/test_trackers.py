"""TensorBoard and Weights & Biases: what they get, and the sentence where they are not installed."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from minalm.errors import InputError
from minalm.run.folder import RunFolder
from minalm.run.trackers import Trackers, TrackingConfig

BOTH = TrackingConfig(tensorboard=True, wandb="project")


@pytest.mark.parametrize("setting, package", (("tensorboard", "tensorboardX"), ("wandb", "wandb")))
def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch, setting, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    TrackingConfig().check()
    with pytest.raises(InputError, match=f"--{setting} needs the package {package}: pip install 'minalm.{setting}.'"):
        TrackingConfig(**{setting: "yes"} if setting == "wandb" else {setting: True}).check()


def test_numbers_go_to_both_and_a_run_that_goes_on_is_the_same_one(tmp_path, monkeypatch):
    """Modules in the place of both, since neither package is needed for anything else."""
    said: list[tuple] = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            said.append(("tensorboard", folder, purge_step))

        def add_scalar(self, name, value, step):
            said.append((name, value, step))

        def flush(self):
            said.append(("flush",))

        def close(self):
            said.append(("close",))

    class Run:
        def define_metric(self, name, step_metric):
            said.append(("metric", name, step_metric))

        def log(self, values):
            said.append(("log", values))

        def finish(self):
            said.append(("finish",))

    def init(**values):
        said.append(("init", values))
        return Run()

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run = RunFolder(tmp_path)
    for done in (0, 7):
        trackers = Trackers(BOTH, run, {"steps": 9}, done)
        trackers.write(done + 1, {"loss/sft": 2.5, "greedy": None})
        trackers.close()
    starts = [entry for entry in said if entry[0] == "tensorboard"]
    assert starts == [
        ("tensorboard", str(tmp_path / "tensorboard"), 1),
        ("tensorboard", str(tmp_path / "tensorboard"), 8),
    ]
    assert ("loss/sft", 2.5, 1) in said and ("loss/sft", 2.5, 8) in said and not any("greedy" in e for e in said)
    inits = [entry[1] for entry in said if entry[0] == "init"]
    assert inits[0]["id"] == inits[1]["id"] and inits[0]["project"] == "project" and inits[0]["config"] == {"steps": 9}
    assert ("log", {"step": 8, "loss/sft": 2.5}) in said and said.count(("finish",)) == said.count(("close",)) == 2


def test_nothing_is_imported_or_written_unless_asked(tmp_path, monkeypatch):
    for name in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    trackers = Trackers(TrackingConfig(), RunFolder(tmp_path), {}, 0)
    trackers.write(1, {"loss/sft": 2.5})
    trackers.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_what_is_written(tmp_path):
    pytest.importorskip("tensorboardX")
    trackers = Trackers(TrackingConfig(tensorboard=True), RunFolder(tmp_path), {}, 0)
    trackers.write(3, {"loss/sft": 2.5})
    trackers.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss/sft" in file.read_bytes()

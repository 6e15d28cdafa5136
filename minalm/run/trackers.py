"""Other programs that the numbers of a run go to, if they are asked for: TensorBoard, and Weights & Biases."""

import dataclasses
import importlib.util
import uuid
from collections.abc import Mapping
from typing import Any

from minalm.errors import InputError
from minalm.parallel.distributed import is_first
from minalm.run.folder import RunFolder

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # setting -> what it needs, and its extra has


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where the numbers go beside metrics.jsonl and evaluations.jsonl."""

    tensorboard: bool = False
    """Write them for TensorBoard too, to tensorboard/ in --out (pip install 'minalm[tensorboard]')."""
    wandb: str | None = None
    """The project of Weights & Biases that they go to as well (pip install 'minalm[wandb]')."""

    def check(self) -> None:
        """Raises InputError if a package is missing."""
        for setting, package in PACKAGES.items():
            if getattr(self, setting) and importlib.util.find_spec(package) is None:
                raise InputError(f"--{setting} needs the package {package}: pip install 'minalm[{setting}]'")


class Trackers:
    """The programs that were asked for. Of several processes the first alone writes to them."""

    def __init__(self, config: TrackingConfig, run: RunFolder, settings: Mapping[str, Any], done: int):
        """`done`: the steps after which this process begins; what TensorBoard has of later ones is not shown."""
        self.tensorboard = self.wandb = None
        if config.tensorboard and is_first():
            from tensorboardX import SummaryWriter

            self.tensorboard = SummaryWriter(str(run.path / "tensorboard"), purge_step=done + 1)
        if config.wandb and is_first():
            import wandb

            file = run.path / "wandb-id"  # by which a run that goes on is the same one there
            if not file.exists():
                file.write_text(uuid.uuid4().hex)
            self.wandb = wandb.init(
                project=config.wandb,
                id=file.read_text(),
                resume="allow",
                name=run.path.resolve().name,
                dir=str(run.path),
                config=dict(settings),
            )
            self.wandb.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Numbers after a step, by their names; None is left out."""
        values = {name: value for name, value in values.items() if value is not None}
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log({"step": step, **values})

    def close(self) -> None:
        """Everything is on its way when this returns."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()

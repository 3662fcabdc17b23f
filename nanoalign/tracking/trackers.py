"""Trackers: each takes the folder of a run, a project, a name and the settings of the run.

`log` takes a step, counted from 1 (0: before training), and the metrics of one line. Where a run is
sent again, its TensorBoard folder is written anew, and wandb and trackio get a new run.
"""

import importlib
import json
import shutil
from pathlib import Path

from nanoalign.errors import RunError

Metrics = dict[str, float]


def imported(name: str, package: str) -> object:
    """The module of a tracker. Raises RunError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RunError(f"--track needs {package}: pip install {package}") from error


class TensorBoard:
    """Event files in RUN/tensorboard: tensorboard --logdir runs"""

    def __init__(self, folder: Path, project: str, name: str, settings: dict):
        imported("tensorboard", "tensorboard")
        writer = imported("torch.utils.tensorboard", "tensorboard").SummaryWriter
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.writer = writer(folder / "tensorboard")
        text = json.dumps(settings, indent=2)
        self.writer.add_text("args", f"    {text}".replace("\n", "\n    "), 0)

    def log(self, step: int, metrics: Metrics) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def finish(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases; offline with WANDB_MODE=offline."""

    module = "wandb"

    def __init__(self, folder: Path, project: str, name: str, settings: dict):
        tracker = imported(self.module, self.module)
        self.run = tracker.init(project=project, name=name, config=settings, **self.place(folder))
        self.tracker, self.step, self.metrics = tracker, None, {}

    def place(self, folder: Path) -> dict:
        return {"dir": str(folder)}

    def log(self, step: int, metrics: Metrics) -> None:
        """Lines of one step, of training and of an evaluation, are sent together."""
        if step != self.step:
            self.send()
        self.step, self.metrics = step, self.metrics | metrics

    def send(self) -> None:
        if self.metrics:
            self.tracker.log(self.metrics, step=self.step)
        self.metrics = {}

    def finish(self) -> None:
        self.send()
        self.tracker.finish()


class Trackio(Wandb):
    """A run of Trackio, which has the functions of wandb."""

    module = "trackio"

    def place(self, folder: Path) -> dict:
        return {}


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}

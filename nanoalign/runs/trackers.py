"""Runs in TensorBoard, Weights & Biases or Trackio.

    python train_dpo.py --track tensorboard                     while it trains
    python -m nanoalign.runs.trackers runs/dpo --track tensorboard   a finished run, from its files
    python -m nanoalign.runs.trackers runs/dpo --track wandb --follow

metrics.jsonl stays the source: what it has is sent once, in the order of its steps.

trackers.py     one class for each tracker: start, log, finish
live.py         the log of a run that is tracked
"""

import argparse
import importlib
import json
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from nanoalign.distributed import run
from nanoalign.errors import RunError, in_a_line
from nanoalign.files.run_folder import ARGS, METRICS
from nanoalign.ranks import report

TRACKERS = ("tensorboard", "wandb", "trackio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tracking").add_argument
    add(
        "--track",
        choices=TRACKERS,
        help="show the run in this program, too, which must be installed; default: none",
    )
    add("--track_project", default="nanoalign", metavar="NAME", help="of wandb and trackio")
    parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """That the program is not installed, or None."""
    if args.track is None or find_spec(args.track) is not None:
        return None
    return f"--track {args.track} needs a package: pip install {args.track}"


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


Log = Callable[[int, Metrics], None]


@contextmanager
def tracked(log: Log, args: Namespace) -> Iterator[Log]:
    """The `log` of loop.train, which also sends its lines to --track; on rank 0.

    A run that continues is sent anew, with what it has already. A tracker that fails does not end
    the run: that is said, and nothing more is sent.
    """
    folder, works = Path(args.out), True
    settings = json.loads((folder / ARGS).read_text())

    def attempt(send: Callable[..., None], *arguments: object) -> None:
        nonlocal works
        if not works:
            return
        try:
            send(*arguments)
        except Exception as error:  # of any program, of a network
            works = False
            print(
                f"{'track':<11} {args.track} failed: {in_a_line(error)}; the run goes on, and "
                f"python -m nanoalign.runs.trackers {folder} --track {args.track} sends it"
            )

    def log_both(step: int, metrics: Metrics) -> None:
        log(step, metrics)
        if metrics:
            attempt(tracker.log, step, metrics)

    try:
        tracker = KINDS[args.track](folder, args.track_project, folder.resolve().name, settings)
    except Exception as error:
        raise RunError(f"--track {args.track}: {in_a_line(error)}") from error
    for line in lines_of(folder, follow=False):
        attempt(tracker.log, line["step"], {key: line[key] for key in line if key != "step"})
    try:
        yield log_both
    finally:
        attempt(tracker.finish)


SECONDS = 2.0  # between two looks at a run that is followed
WRITTEN_LAST = "curves.png"  # of a run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m nanoalign.runs.trackers", allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run: runs/dpo")
    add("--track", choices=TRACKERS, required=True, help="the program, which must be installed")
    add("--project", default="nanoalign", help="of wandb and trackio")
    add("--name", help="of the run; default: its folder")
    add("--follow", action="store_true", help="go on until the run has ended")
    args = parser.parse_args(argv)
    folder = Path(args.run)
    if not (folder / ARGS).is_file():
        raise RunError(f"'{folder}' is no run: there is no {ARGS}; give the folder of a run")
    name = args.name or folder.resolve().name
    settings = json.loads((folder / ARGS).read_text())
    tracker = KINDS[args.track](folder, args.project, name, settings)
    count = 0
    for line in lines_of(folder, args.follow):
        tracker.log(line["step"], {key: line[key] for key in line if key != "step"})
        count += 1
    tracker.finish()
    print(f"{count:,} lines of {folder / METRICS} are in {args.track} as '{name}'")


def lines_of(folder: Path, follow: bool) -> Iterator[dict]:
    """The lines of metrics.jsonl; with `follow` also those that are written until the run ends."""
    path, place = folder / METRICS, 0
    while True:
        ended = not follow or (folder / WRITTEN_LAST).exists()  # before reading, so none is missed
        if path.exists():
            with path.open() as file:
                file.seek(place)
                for text in iter(file.readline, ""):
                    if not text.endswith("\n"):
                        break  # it is being written
                    place += len(text.encode())
                    yield json.loads(text)
        if ended:
            return
        time.sleep(SECONDS)


if __name__ == "__main__":
    run(main, report.report)

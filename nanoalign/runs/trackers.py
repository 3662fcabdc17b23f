"""Runs in TensorBoard, Weights & Biases or Trackio.

    python train_dpo.py --track tensorboard                          while it trains
    python -m nanoalign.runs.trackers runs/dpo --track tensorboard   a finished run, from its files
    python -m nanoalign.runs.trackers runs/dpo --track wandb --follow

metrics.jsonl stays the source: each of its lines is sent once, in order. A run that is sent again
replaces its TensorBoard folder; wandb and trackio get a new run.
"""

import argparse
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
from nanoalign.ranks.report import report

TRACKERS = ("tensorboard", "wandb", "trackio")
SECONDS = 2.0  # between two looks at a run that is followed
WRITTEN_LAST = "curves.png"  # of the files of a run
Log = Callable[[int, dict[str, float]], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tracking").add_argument
    add(
        "--track",
        choices=TRACKERS,
        help="send metrics to this program too, which must be installed; default: none",
    )
    add(
        "--track_project",
        default="nanoalign",
        metavar="NAME",
        help="project of the run in wandb and trackio",
    )
    parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """That the program of --track is not installed, or None."""
    if args.track is None or find_spec(args.track) is not None:
        return None
    return f"--track {args.track} needs a package: pip install {args.track}"


class TensorBoard:
    """Event files in RUN/tensorboard, which `tensorboard --logdir runs` shows."""

    def __init__(self, folder: Path, settings: dict):
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(folder / "tensorboard")
        text = json.dumps(settings, indent=2)
        self.writer.add_text("args", f"    {text}".replace("\n", "\n    "), 0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def finish(self) -> None:
        self.writer.close()


class ByStep:
    """A run of wandb or trackio, which has the functions of wandb: one call for each step.

    So the lines of a step, of training and of an evaluation, are sent together.
    """

    def __init__(self, tracker: object):
        self.tracker, self.step, self.metrics = tracker, None, {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
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


def open_tracker(tracker: str, folder: Path, project: str, name: str) -> TensorBoard | ByStep:
    """A tracker that has the settings of a run; wandb is offline with WANDB_MODE=offline.

    name: of the run there. Raises RunError if the program is not installed.
    """
    settings = json.loads((folder / ARGS).read_text())
    try:
        if tracker == "tensorboard":
            return TensorBoard(folder, settings)
        if tracker == "wandb":
            import wandb

            wandb.init(project=project, name=name, config=settings, dir=str(folder))
            return ByStep(wandb)
        import trackio

        trackio.init(project=project, name=name, config=settings)
        return ByStep(trackio)
    except ImportError as error:
        raise RunError(f"--track needs {tracker}: pip install {tracker}") from error


class Sender:
    """Sends the lines of metrics.jsonl to a tracker, each once."""

    def __init__(self, path: Path, tracker: TensorBoard | ByStep):
        self.path, self.tracker = path, tracker
        self.place = 0  # in bytes: what is before it was sent

    def send(self) -> int:
        """Sends what was written since the last call; returns the number of its lines."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            file.seek(self.place)
            lines = [line for line in file if line.endswith(b"\n")]  # the last may be incomplete
        self.place += sum(map(len, lines))
        for metrics in map(json.loads, lines):
            self.tracker.log(metrics.pop("step"), metrics)
        return len(lines)


@contextmanager
def tracked(log: Log, args: Namespace) -> Iterator[Log]:
    """The `log` of loop.train, which also sends its lines to --track; on rank 0.

    A run that continues is sent anew, from its first line. If the tracker fails, an error is
    printed, nothing more is sent, and the run goes on.
    """
    folder, works = Path(args.out), True

    def attempt(send: Callable[[], object]) -> None:
        nonlocal works
        if not works:
            return
        try:
            send()
        except Exception as error:  # of any program, of a network
            works = False
            print(
                f"{'track':<11} {args.track} failed: {in_a_line(error)}; the run goes on, and "
                f"python -m nanoalign.runs.trackers {folder} --track {args.track} sends it"
            )

    def log_and_send(step: int, metrics: dict[str, float]) -> None:
        log(step, metrics)
        attempt(sender.send)

    try:
        tracker = open_tracker(args.track, folder, args.track_project, folder.resolve().name)
    except Exception as error:
        raise RunError(f"--track {args.track}: {in_a_line(error)}") from error
    sender = Sender(folder / METRICS, tracker)
    attempt(sender.send)
    try:
        yield log_and_send
    finally:
        attempt(tracker.finish)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m nanoalign.runs.trackers", allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run: runs/dpo")
    add("--track", choices=TRACKERS, required=True, help="the program, which must be installed")
    add("--project", default="nanoalign", help="project of the run in wandb and trackio")
    add("--name", help="name of the run; default: its folder")
    add("--follow", action="store_true", help="go on until the run has ended")
    args = parser.parse_args(argv)
    folder = Path(args.run)
    if not (folder / ARGS).is_file():
        raise RunError(f"'{folder}' is no run: there is no {ARGS}; give the folder of a run")
    name = args.name or folder.resolve().name
    tracker = open_tracker(args.track, folder, args.project, name)
    sender, count = Sender(folder / METRICS, tracker), 0
    while True:
        # Looked at before the lines are read, so that the last ones are sent.
        ended = not args.follow or (folder / WRITTEN_LAST).exists()
        count += sender.send()
        if ended:
            break
        time.sleep(SECONDS)
    tracker.finish()
    print(f"{count:,} lines of {folder / METRICS} are in {args.track} as '{name}'")


if __name__ == "__main__":
    run(main, report)

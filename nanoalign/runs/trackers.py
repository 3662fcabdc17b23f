"""Runs in TensorBoard, Weights & Biases or Trackio.

    python train_dpo.py --track tensorboard                          while it trains
    python -m nanoalign.runs.trackers runs/dpo --track tensorboard   a finished run, from its files

metrics.jsonl stays the source: each of its lines is sent once, in order. A run that is sent again
replaces its TensorBoard folder; wandb and trackio get a new run.
"""

import argparse
import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent

from nanoalign.distributed import run
from nanoalign.errors import RunError, check_words
from nanoalign.files.run_folder import ARGS, METRICS
from nanoalign.files.text import in_a_line, printable_output, read_json
from nanoalign.files.writing import check_no_link
from nanoalign.ranks.report import report

TRACKERS = ("tensorboard", "wandb", "trackio")
Send = Callable[[int, dict[str, float]], None]  # takes the step and the metrics of a line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tracking").add_argument
    text = "send metrics to this program too, which must be installed; default: none"
    add("--track", choices=TRACKERS, help=text)
    text = "project of the run in wandb and trackio"
    add("--track_project", default="nanoalign", metavar="NAME", help=text)
    parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """Returns that the program of --track is not installed, or None."""
    if args.track is None or find_spec(args.track) is not None:
        return None
    return f"--track {args.track} needs a package: pip install {args.track}"


def open_tracker(tracker: str, folder: Path, project: str) -> tuple[Send, Callable[[], None]]:
    """Starts a run of a tracker, which gets the settings of the run in `folder` and its name.

    Returns (a function that sends the metrics of a line, a function that ends the tracker's run).
    tensorboard: event files in FOLDER/tensorboard, which `tensorboard --logdir runs` shows.
    wandb: writes to FOLDER, and is offline with WANDB_MODE=offline.
    """
    settings = read_json(folder / ARGS)
    if tracker == "tensorboard":
        check_no_link(folder / "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        writer = SummaryWriter(folder / "tensorboard")
        writer.add_text("args", indent(json.dumps(settings, indent=2), "    "), 0)

        def send(step: int, metrics: dict[str, float]) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)

        return send, writer.close
    options = {}
    if tracker == "wandb":
        import wandb as program

        options["dir"] = str(folder)
    else:
        import trackio as program
    program.init(project=project, name=folder.resolve().name, config=settings, **options)
    return lambda step, metrics: program.log(metrics, step=step), program.finish


def lines_of(folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields the step and the metrics of each complete line of a run's metrics.jsonl, if any.

    Raises RunError for a line that is none of a run.
    """
    path = folder / METRICS
    text = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(text.rpartition(b"\n")[0].splitlines(), start=1):
        try:
            metrics = {name: float(value) for name, value in json.loads(line).items()}
            yield int(metrics.pop("step")), metrics
        except Exception as error:  # of any kind, for a line of any kind
            raise RunError(
                f"{path}:{number}: no line of a run's metrics: {in_a_line(error)}; remove it"
            ) from error


@contextmanager
def tracked(args: Namespace) -> Iterator[Send]:
    """A context with a function that sends the metrics of a line to --track; for rank 0.

    The lines that metrics.jsonl already has (of a run that continues) are sent first. If the
    tracker fails, an error is printed, nothing more is sent, and the run goes on. Raises RunError
    if the tracker can't be started.
    """
    folder, works = Path(args.out), True

    def attempt(call: Callable[..., None], *values: object) -> None:
        nonlocal works
        try:
            if works:
                call(*values)
        except Exception as error:  # of any program, of a network
            works = False
            print(
                f"{'track':<11} {args.track} failed: {in_a_line(error)}; the run goes on, and "
                f"python -m nanoalign.runs.trackers {folder} --track {args.track} sends it"
            )

    try:
        send, finish = open_tracker(args.track, folder, args.track_project)
    except Exception as error:
        raise RunError(
            f"--track {args.track}: {in_a_line(error)}; mend it, or leave it out"
        ) from error
    for line in lines_of(folder):
        attempt(send, *line)
    try:
        yield partial(attempt, send)
    finally:
        attempt(finish)


def main(argv: list[str] | None = None) -> None:
    printable_output()
    check_words(argv)
    parser = argparse.ArgumentParser("python -m nanoalign.runs.trackers", allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run: runs/dpo")
    add("--track", choices=TRACKERS, required=True, help="the program, which must be installed")
    add("--project", default="nanoalign", help="project of the run in wandb and trackio")
    args = parser.parse_args(argv)
    folder = Path(args.run)
    if not (folder / ARGS).is_file():
        raise RunError(f"'{folder}' is no run: there is no {ARGS}; give the folder of a run")
    if problem := refusal(args):
        raise RunError(problem)
    lines = list(lines_of(folder))
    try:
        send, finish = open_tracker(args.track, folder, args.project)
        for line in lines:
            send(*line)
        finish()
    except Exception as error:  # of any program, of a network
        raise RunError(f"--track {args.track}: {in_a_line(error)}") from error
    print(f"{len(lines):,} lines of {folder / METRICS} are in {args.track}")


if __name__ == "__main__":
    run(main, report)

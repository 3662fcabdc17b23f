"""Runs in TensorBoard, Weights & Biases or Trackio.

    python train_dpo.py --track tensorboard                     while it trains
    python -m nanoalign.tracking runs/dpo --track tensorboard   a finished run, from its files
    python -m nanoalign.tracking runs/dpo --track wandb --follow

metrics.jsonl stays the source: what it has is sent once, in the order of its steps.

trackers.py     one class for each tracker: start, log, finish
live.py         the log of a run that is tracked
"""

import argparse
from argparse import Namespace
from importlib.util import find_spec

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

"""Finished or running runs in TensorBoard, Weights & Biases or Trackio, from their files.

    python -m nanoalign.tracking runs/dpo --track tensorboard
    python -m nanoalign.tracking runs/dpo --track wandb --follow

metrics.jsonl stays the source: what it has is sent once, in the order of its steps. With --follow,
lines are sent as the run writes them.

trackers.py     one class for each tracker: start, log, finish
"""

import argparse

TRACKERS = ("tensorboard", "wandb", "trackio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run: runs/dpo")
    add("--track", choices=TRACKERS, required=True, help="the program, which must be installed")
    add("--project", default="nanoalign", help="of wandb and trackio")
    add("--name", help="of the run; default: its folder")
    add("--follow", action="store_true", help="go on until the run has ended")

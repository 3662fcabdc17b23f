"""What a run does that a signal has stopped."""

import signal
import sys

from nanoalign.checkpoints.resume import Checkpoints, complete_checkpoints
from nanoalign.checkpoints.unfinished import resuming
from nanoalign.hosts.report import Stopped


def stop(checkpoints: Checkpoints, step: int, number: int) -> Stopped:
    """Writes a checkpoint, unless the step has one; returns the error that says how to go on."""
    there = [path.name for path in complete_checkpoints(checkpoints.out)]
    if f"step_{step:06d}" not in there:
        checkpoints.write(step)
    name, command = signal.Signals(number).name, resuming(sys.argv, checkpoints.world.size)
    return Stopped(f"{name}: stopped after step {step}; continue it: {command}", number)

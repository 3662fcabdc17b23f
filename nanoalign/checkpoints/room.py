"""What a run does on a full disk: before its first step, and when its result can't be written."""

import shutil
import sys

from nanoalign.checkpoints.resume import Checkpoints, complete_checkpoints
from nanoalign.checkpoints.unfinished import resuming
from nanoalign.errors import RunError


def too_little(out: str, size: int) -> RunError:
    """size: what the model, and a checkpoint if one is asked for, need, in bytes."""
    free = shutil.disk_usage(out).free
    return RunError(
        f"--out {out}: the result needs {size / 1e9:.3g} GB, and the disk has {free / 1e9:.3g} GB "
        "left; make room, or give another --out"
    )


def kept(checkpoints: Checkpoints, step: int, error: Exception) -> RunError:
    """Writes a checkpoint of the last step, unless there is one; what to do about the error.

    A collective, as the error is of all ranks.
    """
    path = checkpoints.out / "checkpoints" / f"step_{step:06d}"
    if path not in complete_checkpoints(checkpoints.out):
        try:
            checkpoints.write(step)
        except (RunError, OSError) as other:
            return RunError(f"{error}; no checkpoint could be written either: {other}")
    command = resuming(sys.argv, checkpoints.world.size)
    return RunError(f"{error}; {path} has what was trained. Make room, and finish: {command}")

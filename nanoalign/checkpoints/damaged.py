"""The error of a damaged checkpoint: what is wrong, and the command that continues all the same."""

import shlex
import sys
from pathlib import Path

from nanoalign.checkpoints.checksums import verify
from nanoalign.checkpoints.resume import complete_checkpoints
from nanoalign.checkpoints.unfinished import resuming
from nanoalign.distributed import place
from nanoalign.errors import RunError


def damaged(path: Path, problem: str) -> RunError:
    """path: of the newest checkpoint. Older ones are read, to find one that is whole."""
    error = f"the checkpoint {path} can't be read: {problem}; "
    found = complete_checkpoints(path.parents[1])
    older = found[: found.index(path)]
    for each in reversed(older):
        try:
            verify(each)
        except RunError:
            continue
        removed = [str(other) for other in (*older[older.index(each) + 1 :], path)]
        command = f"{shlex.join(['rm', '-r', *removed])} && {resuming(sys.argv, place()[1])}"
        return RunError(f"{error}{each.name} is whole; continue from it: {command}")
    return RunError(f"{error}no older one is whole; train again, with --overwrite")

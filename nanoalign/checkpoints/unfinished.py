"""What to do about the folder of a run that was killed, and so has no model."""

import json
import shlex
from pathlib import Path

from nanoalign.checkpoints.resume import complete_checkpoints
from nanoalign.checkpoints.runs import ARGS
from nanoalign.hosts import launcher


def advice(folder: Path) -> str | None:
    """That the run in a folder has not finished, and the command that finishes it.

    None if it is not the folder of a run.
    """
    try:
        settings = json.loads((folder / ARGS).read_text())
    except (OSError, ValueError):  # the caller reports a folder that is no model
        return None
    if not isinstance(settings, dict) or "lr" not in settings:  # an evaluation has an ARGS, too
        return None
    text = f"the run in '{folder}' has not finished; "
    if not complete_checkpoints(folder):
        return text + "it has no checkpoint; train it again, with --overwrite"
    command = resuming(settings.get("argv", ["..."]), settings.get("ranks", 1))
    return text + f"continue it: {command}"


def resuming(argv: list[str], ranks: int) -> str:
    """The command of a run as one that continues it to its end, on as many ranks."""
    words, kept = iter(argv), launcher(ranks)
    for word in words:
        if word == "--stop_after":
            next(words, None)
        elif word not in ("--resume", "--overwrite") and not word.startswith("--stop_after="):
            kept.append(word)
    return shlex.join([*kept, "--resume"])

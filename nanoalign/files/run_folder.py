"""The files in the folder of a run, by name, and the commands that continue it.

    args.json     flags, command line and versions        records.npz   what was trained on
    metrics.jsonl a line per step and per evaluation      checkpoints/  step_000100, ...

The model, curves.png and README.md are written beside them at the end of the run.
"""

import json
import re
import shlex
from pathlib import Path

ARGS, METRICS, CARD = "args.json", "metrics.jsonl", "README.md"
RECORDS, RECORDS_FORMAT = "records.npz", 1  # data/held_out.py reads it

STEP = re.compile(r"step_[0-9]{6,}")  # the name of a complete checkpoint


def complete_checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; none of them is still being written or removed."""
    paths = [path for path in (out / "checkpoints").glob("step_*") if STEP.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")))


def checkpoint_of(out: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return out / "checkpoints" / f"step_{step:06d}"


def launcher(ranks: int) -> list[str]:
    """The words before a script that start it on so many ranks of a host."""
    return ["torchrun", "--nproc_per_node", str(ranks)] if ranks > 1 else ["python"]


def advice(folder: Path) -> str | None:
    """Says, of a run's folder without a model, that the run has not finished, and how to finish it.

    None if the folder is not that of a run. The caller has checked that there is no model.
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
    words, command = iter(argv), launcher(ranks)
    for word in words:
        if word == "--stop_after":
            next(words, None)
        elif word not in ("--resume", "--overwrite") and not word.startswith("--stop_after="):
            command.append(word)
    return shlex.join([*command, "--resume"])

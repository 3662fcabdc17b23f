"""The folder of a run: args.json, records.npz, metrics.jsonl, checkpoints/; then the model."""

import json
import re
import shlex
from pathlib import Path

ARGS, METRICS = "args.json", "metrics.jsonl"
RECORDS, RECORDS_FORMAT = "records.npz", 1  # formats/remembered.py reads it

STEP = re.compile(r"step_[0-9]{6,}")  # the name of a complete checkpoint


def complete_checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; none of them is still being written or removed."""
    found = [p for p in (out / "checkpoints").glob("step_*") if STEP.fullmatch(p.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def newest(out: Path) -> Path:
    """The newest complete checkpoint of a run, which has one."""
    return complete_checkpoints(out)[-1]


def launcher(ranks: int) -> list[str]:
    """The words before a script that start it on so many ranks of a host."""
    return ["torchrun", "--nproc_per_node", str(ranks)] if ranks > 1 else ["python"]


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

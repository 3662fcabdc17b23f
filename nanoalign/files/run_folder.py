"""The files in the folder of a run, by name, and the commands that continue it.

    args.json     flags, command line and versions        records.npz   what was trained on
    metrics.jsonl a line per step and per evaluation      checkpoints/  step_000100, ...

The model, curves.png and README.md are written beside them at the end of the run.
"""

import re
import shlex
import zlib
from pathlib import Path

from nanoalign.errors import RunError
from nanoalign.files.text import read_json
from nanoalign.files.writing import replacing

ARGS, METRICS, CARD = "args.json", "metrics.jsonl", "README.md"
FILES = "files"  # in args.json: the names of the files of the result
RECORDS, RECORDS_FORMAT = "records.npz", 1  # data/held_out.py reads it

STEP = re.compile(r"step_[0-9]{6,}")  # the name of a complete checkpoint


def files_of_result(out: Path) -> list[str]:
    """Returns the names in the args.json of a run of the files of its result; [] without any."""
    try:
        return list(map(str, read_json(out / ARGS).get(FILES, ())))
    except (OSError, ValueError, TypeError):  # none, or of another program
        return []


def complete_checkpoints(out: Path) -> list[Path]:
    """Returns the folders of a run's checkpoints, oldest first.

    A checkpoint that is still being written or removed has another name.
    """
    paths = [path for path in (out / "checkpoints").glob("step_*") if STEP.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")))


def checkpoint_of(out: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return out / "checkpoints" / f"step_{step:06d}"


def launcher(ranks: int) -> list[str]:
    """Returns the words before a script that start it on `ranks` ranks of one host."""
    return ["torchrun", "--nproc_per_node", str(ranks)] if ranks > 1 else ["python"]


def resuming(argv: list[str], ranks: int) -> str:
    """Returns a command that continues a run to its end. argv, ranks: with which it was started."""
    words, command = iter(argv), launcher(ranks)
    for word in words:
        if word == "--stop_after":
            next(words, None)
        elif word not in ("--resume", "--overwrite") and not word.startswith("--stop_after="):
            command.append(word)
    return shlex.join([*command, "--resume"])


def restore_metrics(about: list, path: Path) -> None:
    """Cuts metrics.jsonl, at `path`, to its length at the checkpoint; a missing file stays missing.

    about: [bytes at the checkpoint, their CRC-32]. Raises RunError if these bytes were changed.
    """
    size, checksum = about
    if not path.exists():
        return
    kept = path.read_bytes()[:size]
    if [len(kept), zlib.crc32(kept)] != [size, checksum]:
        raise RunError(
            f"--resume: {path} is not as it was written (its checksum differs); restore it, or "
            "remove it to continue without the lines until now"
        )
    with replacing(path) as hidden:
        hidden.write_bytes(kept)

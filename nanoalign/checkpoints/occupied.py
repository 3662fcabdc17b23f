"""What is in the folder of --out before a run: another run, a model, files of someone else."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

from nanoalign.checkpoints.runs import ARGS, METRICS, RECORDS
from nanoalign.checkpoints.write import TOKENIZER_FILES
from nanoalign.errors import RunError, in_a_line

# All that a run writes but the model card, which has a mark, and so all that --overwrite removes.
WRITTEN = (METRICS, RECORDS, "curves.png", "checkpoints", "adapter", ".*.partial", "config.json",
           ARGS, "generation_config.json", "*.safetensors", "*.safetensors.index.json",
           "tensorboard", *TOKENIZER_FILES)  # fmt: skip


def unwritable(out: Path, error: OSError) -> RunError:
    """Why --out can't be made or locked."""
    path = Path(error.filename or out)
    if isinstance(error, PermissionError):
        return RunError(f"--out {out}: no permission to write {path}; give another --out")
    if isinstance(error, FileExistsError | NotADirectoryError):
        while not os.path.lexists(path):  # a/b, where a is a file
            path = path.parent
        what = "a file" if path.exists() else "a symbolic link that leads nowhere"
        return RunError(f"--out {out}: {path} is {what}; give a folder")
    return RunError(f"--out {out} can't be written: {in_a_line(error)}; give another --out")


def check(out: Path, args: Namespace, models: list[Path]) -> None:
    """As runs.check_folder, for an --out with files in it."""
    problem, is_run = None, (out / ARGS).is_file()
    if any(out.resolve() == model for model in models):
        problem = "is the folder of a model that this run reads; give another"
    elif not is_run:
        problem = "contains files that are not those of a run; give another --out"
    elif not (args.resume or args.overwrite):
        problem = (
            "contains another run; continue it with --resume, replace it with --overwrite, or give "
            "another --out"
        )
    if problem:
        raise RunError(f"--out {out} {problem}")


def remove_run(out: Path) -> None:
    """Removes what a run wrote."""
    for pattern in WRITTEN:
        for path in out.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

"""The folder of a run before it starts: what --out may hold, and what --overwrite removes."""

import platform
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import transformers

import nanoalign
from nanoalign.errors import RunError
from nanoalign.files import lock
from nanoalign.files.run_folder import ARGS, CARD, METRICS, RECORDS, files_of_result
from nanoalign.files.text import in_a_line
from nanoalign.files.writing import check_no_link, hidden_name
from nanoalign.weights.write import BESIDE_WEIGHTS

# What is left of a run that was killed while it wrote its first file.
UNFINISHED_ARGS = hidden_name(Path(ARGS)).name
# All that a run writes but the model card, which a user may have written. --overwrite removes it.
WRITTEN = (METRICS, RECORDS, "curves.png", "checkpoints", "adapter", ".*.partial*", "config.json",
           ARGS, "generation_config.json", "*.safetensors", "*.safetensors.index.json",
           "tensorboard", "wandb", *BESIDE_WEIGHTS)  # fmt: skip


def check_folder(args: Namespace, models: list[Path]) -> None:
    """Creates --out and locks it; with --audit and --replay does nothing. For rank 0.

    models: folders that the run reads, which --out must not be.
    Raises RunError if --out can't be written, holds other files, has a link in place of a file that
    the run writes, or is locked by another run.
    """
    if args.audit or vars(args).get("replay"):
        return
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in (path for pattern in WRITTEN for path in out.glob(pattern)):
            check_no_link(path)
        names = {path.name for path in out.iterdir()} - {lock.NAME, CARD, UNFINISHED_ARGS}
        if names:
            check_contents(out, args, models)
        lock.hold(out / lock.NAME, f"--out {out}")
    except OSError as error:
        problem = f"can't be written: {in_a_line(error)}; give another --out"
        if out.is_file():
            problem = "is a file; give a folder"
        raise RunError(f"--out {out} {problem}") from error


def check_contents(out: Path, args: Namespace, models: list[Path]) -> None:
    """Raises RunError if the files in --out are not those of a run that may be written to."""
    if any(out.resolve() == model for model in models):
        problem = "is the folder of a model that this run reads; give another"
    elif not (out / ARGS).is_file():
        problem = "contains files that are not those of a run; give another --out"
    elif not (args.resume or args.overwrite):
        problem = (
            "contains another run; continue it with --resume, replace it with --overwrite, or give "
            "another --out"
        )
    else:
        return
    raise RunError(f"--out {out} {problem}")


def remove_run(out: Path) -> None:
    """Removes the files and folders of WRITTEN, and those of the result, from a run's folder."""
    names = files_of_result(out)
    for path in list(out.iterdir()):
        if path.name in names or any(path.match(pattern) for pattern in WRITTEN):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def versions() -> dict[str, str | None]:
    """The versions of this package, its libraries and Python, and the git commit of this package.

    commit: None if the package is not tracked by git; ends with -dirty if files were changed.
    """
    folder = str(Path(nanoalign.__file__).parent)

    def git(*words: str) -> str | None:
        command = ["git", "-C", folder, "--no-optional-locks", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = None
    # An installed package may be in an ignored folder of another project, with commits of its own.
    if shutil.which("git") and git("ls-files", "--error-unmatch", "__init__.py") is not None:
        commit = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return {
        "nanoalign": nanoalign.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }

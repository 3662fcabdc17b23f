"""The folder of a run before it starts: what is in --out, --args, the versions of its settings."""

import argparse
import json
import os
import platform
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import transformers

import nanoalign
from nanoalign.errors import RunError, in_a_line
from nanoalign.files import lock
from nanoalign.files.run_folder import ARGS, METRICS, RECORDS
from nanoalign.weights.write import TOKENIZER_FILES


def check_folder(args: Namespace, models: list[Path]) -> None:
    """Raises RunError if a run must not write to --out; makes and locks it. --audit does neither.

    models: folders that the run reads, which --out must not be.
    """
    if args.audit:
        return
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(path.name not in (lock.NAME, "README.md") for path in out.iterdir()):
            check_contents(out, args, models)
        lock.hold(out / lock.NAME, f"--out {out}")
    except OSError as error:
        raise unwritable(out, error) from error


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


def check_contents(out: Path, args: Namespace, models: list[Path]) -> None:
    """As check_folder, for an --out with files in it."""
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


# Of a new run, or not flags.
OTHERS = {"args", "argv", "out", "overwrite", "ranks", "resume", *versions()}


def with_flags_of_file(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """The flags in the file of --args, and behind them the command line, whose flags count more.

    Without --args the command line is returned. Raises RunError if the file can't be read.
    """
    if "--args" not in [word.partition("=")[0] for word in argv]:
        return argv
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--args")
    path = Path(finder.parse_known_args(argv)[0].args)
    try:
        values = json.loads(path.read_text())
        values = {name: value for name, value in values.items() if name not in OTHERS}
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"--args {path}: no args.json of a run: {in_a_line(error)}") from error
    switches = {a.dest for a in parser._actions if isinstance(a, argparse.BooleanOptionalAction)}
    words: list[str] = []
    for name, value in values.items():
        if value is True or (value is False and name in switches):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list) and value:
            words += [f"--{name}", *map(str, value)]
        elif value not in (None, False, []):
            words.append(f"--{name}={value}")  # which may begin with a minus
    return words + argv

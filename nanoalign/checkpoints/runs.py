"""The folder of a run: args.json, records.npz, metrics.jsonl, checkpoints/; then the model."""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers

import nanoalign
from nanoalign.distributed import World
from nanoalign.errors import RunError, in_a_line
from nanoalign.formats.rows import Data
from nanoalign.formats.sources import parse_source
from nanoalign.hosts.collectives import on_main
from nanoalign.hosts.progress import progress_bar
from nanoalign.loop import total_steps

ARGS, METRICS = "args.json", "metrics.jsonl"
RECORDS, RECORDS_FORMAT = "records.npz", 1  # formats/remembered.py reads it
SHOWN = ("loss", "accuracy", "rewards/accuracies", "rewards/margins")  # beside the progress bar


def check_folder(args: Namespace, models: list[Path]) -> None:
    """Raises RunError if a run must not write to --out; changes nothing. --audit writes nothing.

    models: folders that the run reads, which --out must not be.
    """
    if args.audit:
        return
    out = Path(args.out)
    if out.exists():
        from nanoalign.checkpoints.occupied import check

        check(out, args, models)
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        problem = "no permission to write to" if above.is_dir() else "a file is at"
        raise RunError(f"--out {out}: {problem} {above}; give another --out")


@contextlib.contextmanager
def open_run(
    args: Namespace, world: World, data: Data, folder: Path, start: int
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Prepares --out, writes args.json and records.npz. Yields the `log` of loop.train.

    It adds lines to metrics.jsonl, and shows a progress bar. folder: of the model that is trained.
    start: the steps that were done before.
    Raises RunError on a host that does not see the file that rank 0 wrote.
    """
    out = Path(args.out)

    def prepare() -> None:
        records = record_arrays(args, data, folder)  # first, as it may read those of a run in --out
        out.mkdir(parents=True, exist_ok=True)
        if (out / ARGS).exists() and not args.resume:
            from nanoalign.checkpoints.occupied import remove_run

            remove_run(out)
        settings = vars(args) | {"argv": sys.argv, "ranks": world.size} | versions()
        (out / ARGS).write_text(json.dumps(settings, indent=2) + "\n")
        np.savez(out / RECORDS, **records)

    def log(step: int, metrics: dict[str, float]) -> None:
        if shown := {name: f"{metrics[name]:.3f}" for name in SHOWN if name in metrics}:
            bar.set_description(f"step {step}/{total}", refresh=False)
            bar.set_postfix(shown, refresh=False)
        bar.update(step - bar.n)
        if world.is_main and metrics:
            try:
                with (out / METRICS).open("a") as file:
                    file.write(json.dumps({"step": step, **metrics}) + "\n")
            except OSError as error:
                raise RunError(f"{out / METRICS} can't be written: {in_a_line(error)}") from error

    on_main(world, prepare)
    if not (path := out / ARGS).exists():
        raise RunError(
            f"{path} was written by rank 0, and rank {world.rank} does not see it; --out must be "
            "on a disk that all hosts share"
        )
    total, tracking = total_steps(len(data.rows), args), contextlib.nullcontext(log)
    if args.track and world.is_main:
        from nanoalign.tracking.live import tracked

        tracking = tracked(log, args)
    shown = {"initial": start, "unit_scale": args.batch_size}
    with progress_bar(total, "record", world.is_main, **shown) as bar, tracking as log_and_track:
        yield log_and_track


def record_arrays(args: Namespace, data: Data, folder: Path) -> dict[str, np.ndarray]:
    """The arrays of RECORDS: what a run is trained on, what it holds out, and where that is from.

    folder: of the model, which may have been trained on other records before.
    """
    (trained, held_out), before = data.digests, {}
    if (folder / RECORDS).exists():
        from nanoalign.formats.remembered import recall

        before = recall(folder)
    sources = map(parse_source, args.eval_data or args.data)
    return {
        "trained": np.union1d(trained[:, 1], before.get("trained", trained[:0, 1])),
        "prompts": np.union1d(trained[:, 0], before.get("prompts", trained[:0, 0])),
        "held_out": held_out[:, 2],
        "sources": np.array([origin for source in sources for origin in source.origins]),
        "format": np.array(RECORDS_FORMAT),
    }


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

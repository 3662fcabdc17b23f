"""The folder of a run: args.json, records.npz, metrics.jsonl, checkpoints/; then the model."""

import contextlib
import json
import math
import platform
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

import nanoalign
from nanoalign.batch import Row
from nanoalign.distributed import World, print0
from nanoalign.errors import RunError, in_a_line
from nanoalign.formats.rows import Data
from nanoalign.formats.sources import parse_source
from nanoalign.hosts import lock
from nanoalign.hosts.collectives import on_main
from nanoalign.hosts.progress import progress_bar
from nanoalign.hosts.signals import received
from nanoalign.loop import Batches, step_indices, total_steps
from nanoalign.model import Scorer

ARGS, METRICS = "args.json", "metrics.jsonl"
RECORDS, RECORDS_FORMAT = "records.npz", 1  # formats/remembered.py reads it
SHOWN = ("loss", "accuracy", "rewards/accuracies", "rewards/margins")  # beside the progress bar


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
            from nanoalign.checkpoints.occupied import check

            check(out, args, models)
        lock.hold(out / lock.NAME, f"--out {out}")
    except OSError as error:
        from nanoalign.checkpoints.occupied import unwritable

        raise unwritable(out, error) from error


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
        raise RunError(f"rank {world.rank} does not see {path}; --out must be on a shared disk")
    total, tracking = total_steps(len(data.rows), args), contextlib.nullcontext(log)
    if args.track and world.is_main:
        from nanoalign.tracking.live import tracked

        tracking = tracked(log, args)
    bars = progress_bar(total, "record", world.is_main, initial=start, unit_scale=args.batch_size)
    with received, bars as bar, tracking as log_and_track:
        yield log_and_track


def describe(model: Scorer, rows: Sequence[Row], batches: Batches, args: Namespace) -> None:
    """Prints the size of the model, the number of steps, and the tokens of the first step."""
    total, epoch = total_steps(len(rows), args), math.ceil(len(rows) / args.batch_size)
    first = [rows[i] for i in step_indices(0, len(rows), args.batch_size, args.seed)]
    plan = batches.plan(first)
    groups = [[first[i] for i in group] for groups in plan for group in groups if group]
    tokens = sum(batches.collate(group).inputs["input_ids"].numel() for group in groups)
    alone = sum(len(row.prompt) + len(response) for row in first for response in row.responses)
    world, trained = batches.world, model.count_parameters(trainable=True)
    settings = {name: vars(args).get(name) for name in ("beta", "margin", "label_smoothing")}
    loss = "".join(f", {name} {value:g}" for name, value in settings.items() if value)
    copies = f" in {world.mesh.shape[0]} groups" if world.mesh.ndim > 1 else ""
    print0(
        f"{'model':<11} {args.model}: {model.count_parameters():,} parameters, {trained:,} "
        f"trained, {model.dtype}\n"
        f"{'optimizer':<11} AdamW, lr {args.lr:g}, {args.schedule}{loss}\n"
        f"{'steps':<11} {total:,} ({total / epoch:.3g} epochs of {epoch:,}) of {args.batch_size} "
        f"records, on {world.size} rank{'s' * (world.size > 1)}{copies}\n"
        f"{'first step':<11} {len(plan)} micro-batches a rank, {tokens:,} tokens; as separate "
        f"sequences they would be {alone:,}"
    )


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

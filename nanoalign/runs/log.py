"""The log of a run: its settings, a line of metrics for each step, a progress bar, a summary."""

import contextlib
import gc
import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nanoalign.batch import Row
from nanoalign.data.held_out import record_arrays
from nanoalign.data.sources import parse_source
from nanoalign.data.split import Data
from nanoalign.distributed import World, print0, progress_bar
from nanoalign.errors import RunError
from nanoalign.files.run_folder import ARGS, FILES, METRICS, RECORDS, files_of_result
from nanoalign.files.text import in_a_line
from nanoalign.files.writing import append, replacing, write_text
from nanoalign.loop import Batcher, Settings
from nanoalign.model import Scorer
from nanoalign.ranks import gathers
from nanoalign.ranks.collectives import on_main
from nanoalign.runs.folder import remove_run, versions
from nanoalign.runs.speed import Meter
from nanoalign.runs.trackers import tracked

# Metrics beside the progress bar -> (their name there, how they are written).
SHOWN = {
    "loss": ("loss", ".3f"),
    "accuracy": ("accuracy", ".3f"),
    "rewards/accuracies": ("rewards/accuracies", ".3f"),
    "rewards/margins": ("rewards/margins", ".3f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "ms_per_step": ("ms/step", ",.0f"),
    "memory_gb": ("GB", ".2f"),
    "mfu": ("mfu", ".2f"),
}


@contextlib.contextmanager
def open_run(
    args: Namespace, world: World, data: Data, folder: Path, start: int, meter: Meter
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A context with the `log` of loop.train. First writes args.json and records.npz to --out.

    Before that, unless --resume is given, it removes what an earlier run wrote to --out.
    The `log` adds a line to metrics.jsonl, shows a progress bar, and sends to --track.
    folder: of the model that is trained; records.npz also gets the records that this model has
        seen before. start: the number of steps that were done before.
    meter: measures speed and memory, which are added to the metrics of a step.
    Raises RunError on a host that does not see the file that rank 0 wrote, and, in the `log`, if
    metrics.jsonl can't be written.
    """
    out, held_out = Path(args.out), [parse_source(spec) for spec in args.eval_data or args.data]

    def prepare() -> None:
        # First, as it may read the records of a run in --out.
        origins = [origin for source in held_out for origin in source.origins]
        records = record_arrays(data, folder, origins)
        out.mkdir(parents=True, exist_ok=True)
        if (out / ARGS).exists() and not args.resume:
            remove_run(out)
        settings = vars(args) | {"argv": sys.argv, "ranks": world.size} | versions()
        settings |= {FILES: files_of_result(out)}  # of the run that is resumed
        write_text(out / ARGS, json.dumps(settings, indent=2) + "\n")  # first: it marks a run
        with replacing(out / RECORDS) as hidden:
            np.savez(hidden, **records)

    def log(step: int, metrics: dict[str, float]) -> None:
        metrics = dict(metrics)
        if "seconds" in metrics:  # of a step of training
            metrics |= meter.measure(metrics.pop("tokens"), metrics.pop("seconds"))
            shown = [(*SHOWN[key], value) for key, value in metrics.items() if key in SHOWN]
            bar.set_description(f"step {step}/{total}", refresh=False)
            bar.set_postfix({name: format(v, form) for name, form, v in shown}, refresh=False)
        bar.update(step - bar.n)
        if world.is_main and metrics:
            try:
                append(out / METRICS, json.dumps({"step": step, **metrics}) + "\n")
            except OSError as error:
                raise RunError(f"{out / METRICS} can't be written: {in_a_line(error)}") from error
            if send:
                send(step, metrics)

    on_main(world, prepare)
    if not (path := out / ARGS).exists():
        raise RunError(f"rank {world.rank} does not see {path}; --out must be on a shared disk")
    total = Settings.of(args).total(len(data.rows))
    tracking = tracked(args) if args.track and world.is_main else contextlib.nullcontext()
    bars = progress_bar(total, "record", world.is_main, initial=start, unit_scale=args.batch_size)
    with bars as bar, tracking as send:
        try:
            yield log
        finally:
            gc.unfreeze()  # what the meter froze


def describe(model: Scorer, rows: Sequence[Row], batcher: Batcher, args: Namespace) -> None:
    """Prints the size of the model, the number of steps, and the tokens of the first step."""
    settings = Settings.of(args)
    total, epoch = settings.total(len(rows)), math.ceil(len(rows) / args.batch_size)
    first = settings.step_rows(0, rows)
    plan = batcher.plan(first)
    groups = [[first[i] for i in group] for groups in plan for group in groups if group]
    tokens = sum(batcher.collate(group).inputs["input_ids"].numel() for group in groups)
    alone = sum(len(row.prompt) + len(response) for row in first for response in row.responses)
    world, trained = batcher.world, model.count_parameters(trainable=True)
    of_loss = {name: vars(args).get(name) for name in ("beta", "margin", "label_smoothing")}
    loss = "".join(f", {name} {value:g}" for name, value in of_loss.items() if value)
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
    if advice := gathers.advice(model, world, args):
        print0(f"{'advice':<11} {advice}")

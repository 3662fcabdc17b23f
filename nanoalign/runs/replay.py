"""--replay STEP: a step of a finished or broken run once more, and what each of its rows did.

The step is computed as in the run, on one process, from the newest checkpoint before it or from the
start. A step is a function of its number, of parameters and of optimizer state, so its loss is that
of the log, to rounding. Nothing is written.
"""

import math
import statistics
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from nanoalign.batch import Row
from nanoalign.data.held_out import recall, record_arrays
from nanoalign.data.split import Data
from nanoalign.distributed import environment_ranks, progress_bar
from nanoalign.errors import RunError
from nanoalign.files.run_folder import ARGS, FILES, complete_checkpoints
from nanoalign.files.text import in_a_line, read_json
from nanoalign.flags import Parser, number
from nanoalign.loop import Batcher, Objective, Settings
from nanoalign.model import Scorer
from nanoalign.packing import fitting, loss_scale
from nanoalign.runs.best import Best, keeps_best
from nanoalign.runs.checkpoints import DATA, FREE, Checkpoints, changes
from nanoalign.runs.folder import versions
from nanoalign.runs.speed import KEYS
from nanoalign.runs.trackers import lines_of

TOLERANCE = 2.7e-5  # relative, of a loss: other ranks and micro-batches round by less
# Flags that may differ: those of --resume, without those that select rows or set learning rates.
OTHERS = (FREE - DATA - {"epochs", "steps"}) | {"data", "replay"}
# Flags of a run of many ranks, or of its start, that one process does not take.
OF_THE_RUN = {"resume": False, "overwrite": False, "shard_size": None, "symmetric_memory": False}


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("a look at one step").add_argument
    text = (
        "compute this step of the run in --out again, with its flags, on one process; show the "
        "loss, gradient norm and length of each row, and the loss beside that of the log; nothing "
        "is written; default: training"
    )
    add("--replay", type=number(int, 1), metavar="STEP", help=text)
    parser.refusals.append(refusal)


def take_flags(parser: Parser, argv: list[str] | None) -> None:
    """With --replay in argv, makes the flags of the run in --out the defaults of the parser.

    Raises RunError if --out has no run, or one of another script.
    """
    given = vars(parser.parse_known_args(argv)[0])
    if given["replay"] is None:
        return
    stored = read_flags(Path(given["out"]))
    if unknown := sorted(stored.keys() - given.keys()):
        raise RunError(
            f"--replay: {given['out']} is a run of another script or version, which had the flags "
            f"{', '.join(unknown[:3])}; give --replay to that one"
        )
    own = {name: value for name, value in stored.items() if name not in ("out", "replay")}
    parser.set_defaults(**own | OF_THE_RUN)


def read_flags(out: Path) -> dict[str, object]:
    """Returns the flags in the args.json of a run. Raises RunError if there is none."""
    try:
        stored = read_json(out / ARGS)
    except OSError as error:
        raise RunError(f"--replay: --out {out} has no run: {in_a_line(error)}") from error
    others = {"argv", "ranks", FILES, *versions()}
    return {name: value for name, value in stored.items() if name not in others}


def refusal(args: Namespace) -> str | None:
    """Returns why --replay is refused, or None."""
    if args.replay is None:
        return None
    if environment_ranks()[1] > 1:
        return "--replay computes a step on one process; start it without torchrun"
    if args.resume or args.overwrite or args.audit:
        return "--replay writes nothing; leave out --resume, --overwrite and --audit"
    if changed := changes(read_flags(Path(args.out)), vars(args), OTHERS):
        return f"--replay computes the run in {args.out} again, but flags differ: {changed}"
    return None


class OfRow(NamedTuple):
    """What a row did in a step, whose loss and gradient are the means of those of its rows."""

    loss: float
    grad_norm: float
    tokens: int  # of the prompt and all responses
    name: str  # file and line


def replay(
    model: Scorer,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    data: Data,
    batcher: Batcher,
    args: Namespace,
    folders: dict[str, Path],
) -> None:
    """Computes step --replay again; prints its rows, and its loss beside that of the log.

    folders: of the models, by the flag that names each.
    Raises RunError if the run has no such step, if its records are others, and where the step can't
    be taken, after its rows are printed.
    """
    out, rows, settings, step = Path(args.out), data.rows, Settings.of(args), args.replay
    if step > (total := settings.total(len(rows))):
        raise RunError(f"--replay {step}: the run has {total:,} steps; give one of them")
    check_records(out, data, folders["--model"])
    if keeps_best(args):  # adds its weights to the state that checkpoints have
        Best(model, objective, args.patience)
    start, origin = 0, "the start"
    for path in complete_checkpoints(out):
        if (done := int(path.name.removeprefix("step_"))) < step:
            start, origin = done, str(path)
    if start:
        run = Checkpoints(model, optimizer, objective, rows, args, batcher.world, folders)
        run.load(Path(origin), "--replay")
    parts = model, optimizer, objective, rows, {}, batcher, settings
    with progress_bar(step - 1, "step", initial=start) as bar:

        def before(done: int, *_: object) -> bool:
            bar.update()
            return done == step - 1

        if start < step - 1:
            fitting.train(*parts, lambda *_: None, before, start)
    step_rows = settings.step_rows(step - 1, rows)
    print(
        f"{'step':<11} {step:,} of {total:,}, {len(step_rows)} records; reached from {origin} by "
        f"{step - 1 - start:,} steps"
    )
    print_rows(rows_of_step(model, objective, step_rows, batcher))
    found: dict[str, float] = {}
    fitting.train(*parts, lambda _, means: found.update(means), lambda *_: True, step - 1)
    print("\n".join(compare(args, found, step - 1 - start)))


def check_records(out: Path, data: Data, folder: Path) -> None:
    """Raises RunError if other records are trained on than records.npz of the run has.

    folder: of the model, whose own earlier records are in it, too. Their order is not compared.
    """
    known = recall(out)
    if known is None:
        return
    now = record_arrays(data, folder, ())["trained"]
    if others := len(np.setxor1d(now, known["trained"])):
        raise RunError(
            f"--replay: {others:,} records are in --data or in what {out} was trained on, but not "
            "in both; restore --data"
        )


def rows_of_step(
    model: nn.Module, objective: Objective, rows: Sequence[Row], batcher: Batcher
) -> list[OfRow]:
    """Computes each row of a step by itself, forward and backward, and keeps no gradient."""
    objective.before_step(rows, batcher.step)
    # As in the step, or float16 would round small gradients to 0, or large ones to infinity.
    factor = objective.state.get(loss_scale.STATE, 1.0) / len(rows)
    found = []
    for place, row in enumerate(rows):
        batch = batcher.collate([row]).to(batcher.world.device)
        batch.rows = [place]
        losses, _ = objective(batch)
        loss = (losses * batch.weights).sum()
        (loss * factor).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients) / factor
        found.append(OfRow(loss.item(), norm.item(), len(row), row.name))
        model.zero_grad(set_to_none=True)
    return found


def first_nan(value: float) -> float:
    """The value as a key of an order, in which NaN is the largest."""
    return math.inf if math.isnan(value) else value


def print_rows(rows: Sequence[OfRow]) -> None:
    """Prints a line for each row, the largest loss first, and which row is the largest in what."""
    print(f"\n{'loss':>12} {'grad_norm':>12} {'tokens':>8}  record")
    for row in sorted(rows, key=lambda row: first_nan(row.loss), reverse=True):
        print(f"{row.loss:#12.6g} {row.grad_norm:#12.6g} {row.tokens:8,}  {row.name}")
    print()
    for name in ("loss", "grad_norm", "tokens"):
        values = [getattr(row, name) for row in rows]
        most, median = max(values, key=first_nan), statistics.median(values)
        where = rows[values.index(most)].name
        print(f"{'largest':<11} {name} {most:.6g} (median {median:.6g}) at {where}")


def compare(args: Namespace, found: dict[str, float], before: int) -> list[str]:
    """Lines of text: the loss beside that of the log and, if they differ, what else differs.

    found: the metrics of the step. before: how many steps before it were computed, too.
    Raises RunError as lines_of does.
    """
    lines = lines_of(Path(args.out))
    logged = next((line for step, line in lines if step == args.replay and "loss" in line), None)
    if logged is None:
        return [f"{'loss':<11} {found['loss']:.8g}; the log has no step {args.replay}"]
    loss, own = logged["loss"], found["loss"]
    off = abs(own - loss) / max(abs(own), abs(loss)) if own != loss else 0.0
    line = f"{'loss':<11} {own:.8g}, in the log {loss:.8g}: a relative difference of {off:.2g}"
    if off <= TOLERANCE:
        return [f"{line}, within rounding ({TOLERANCE:g})"]
    stored, now = read_json(Path(args.out) / ARGS), vars(args) | versions() | {"ranks": 1}
    free = {"argv", "out", "replay", FILES, *OF_THE_RUN}
    changed = changes(stored, now, free, dashes="")
    of_log = [
        f"{name} {value:.6g} in the log, {found[name]:.6g} here"
        for name, value in logged.items()
        if name in found and name not in KEYS and not math.isclose(found[name], value, rel_tol=1e-4)
    ]
    return [
        f"{line}, beyond rounding ({TOLERANCE:g})",
        f"{'metrics':<11} {'; '.join(of_log) or 'the others are equal'}",
        f"{'settings':<11} {changed or 'as in the run; were files of --model or --data changed?'}",
        f"{'before':<11} {before} steps were computed again, and each adds rounding",
    ]

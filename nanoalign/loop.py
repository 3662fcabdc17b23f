"""The training loop, by hand. One optimizer step is a pure function of its number: see plan.step_indices."""

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from nanoalign import checkpoint
from nanoalign.distributed import World, full, on_main, synchronise_gradients
from nanoalign.errors import RunError, in_a_line
from nanoalign.metrics import Means
from nanoalign.objective import Objective
from nanoalign.plan import plan_micro_batches, step_indices
from nanoalign.rows import Batch, Row, collate, lengths_of

T = TypeVar("T")

PLANNED_ROWS = 1024  # of an evaluation, planned at a time: a plan takes more than linear time
SHOWN = ("loss", "accuracy", "rewards/accuracies", "rewards/margins")  # beside the progress bar


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    rows: Sequence[Row],
    eval_rows: dict[str, Sequence[Row]],
    args: argparse.Namespace,
    world: World,
    start: int = 0,
) -> int:
    """Trains from step `start` to the last, or to --stop_after; returns the steps that are done.

    eval_rows: what is evaluated before the first step and at the end of each epoch; the metrics of
        eval_rows["eval"] have keys that begin with "eval/".
    """
    total = total_steps(len(rows), args)
    stop = max(start, min(total, args.stop_after or total))
    if start > total:
        raise RunError(
            f"the checkpoint is at step {start}, and this run has {total}; raise --steps"
        )
    log = _Log(Path(args.out) / "metrics.jsonl", start, world)
    if start == 0:
        log.write(0, evaluate(objective, eval_rows, args, world))
    epoch_steps = steps_per_epoch(len(rows), args)
    with tqdm(total=total, initial=start, unit="step", disable=not world.is_main) as progress:
        for step in range(start, stop):
            # the learning rate of this step
            lr = get_lr(step, total, args.lr, args.warmup, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)

            # micro-batches: whatever their division, the gradient of the mean loss over the step
            step_rows = [rows[i] for i in step_indices(step, len(rows), args.batch_size, args.seed)]
            objective.survey(step_rows, partial(rank_batches, args=args, world=world))
            means = Means()
            for (_, batch), last in _mark_last(rank_batches(step_rows, args, world)):
                synchronise_gradients(model, last, each=args.gradient_sync == "micro_batch")
                losses, values = objective(batch)
                loss = (losses * batch.weights).sum() / len(step_rows)
                # Sharding averages gradients over all ranks, and we want their sum.
                (loss * world.size).backward()
                means.add(values, batch.weights)

            # clip, step
            grad_norm = full(
                nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            ).item()
            metrics = means.reduce()
            _check_finite(step, metrics["loss"], grad_norm, first=step == start)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            objective.stepped(step + 1, metrics)

            # log
            epoch = (step + 1) / epoch_steps
            log.write(step + 1, metrics | {"lr": lr, "grad_norm": grad_norm, "epoch": epoch})
            shown = {key: f"{metrics[key]:.3f}" for key in SHOWN if key in metrics}
            progress.set_postfix(shown, refresh=False)
            progress.update()

            # evaluate, save
            done = step + 1
            if done == total or _is_due(done, epoch_steps) or _is_due(done, args.eval_every):
                log.write(done, evaluate(objective, eval_rows, args, world))
            if (
                _is_due(done, args.save_every)
                or done == args.stop_after
                or (args.save_every and done == total)
            ):
                checkpoint.save(model, optimizer, objective, done, args, world)
    return stop


def total_steps(pairs: int, args: argparse.Namespace) -> int:
    return args.steps or args.epochs * steps_per_epoch(pairs, args)


def steps_per_epoch(pairs: int, args: argparse.Namespace) -> int:
    return math.ceil(pairs / args.batch_size)


def get_lr(step: int, total: int, peak: float, warmup: float, schedule: str) -> float:
    """The learning rate of step `step` (from 0): a linear rise, then cosine, linear or constant.

    `warmup` is the share of the steps that rise. No step has a rate of 0: the first is one step up,
    and the way down would reach 0 one step after the last.
    """
    rising = math.floor(warmup * total)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    done = (step - rising) / (total - rising)  # [0, 1)
    factor = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    return peak * factor[schedule]


def rank_batches(
    rows: Sequence[Row], args: argparse.Namespace, world: World
) -> Iterator[tuple[list[int], Batch]]:
    """This rank's micro-batches of a step: which of the rows, and their batch on its device.

    All ranks get equally many. Where a rank has no row left, the list is empty and the batch holds
    a row of weight 0, since the collectives of the other ranks need us.
    """
    plan = plan_micro_batches(rows, world.size, args.micro_batch_tokens, args.share_prefix)
    for part in plan:
        group = part[world.rank]
        batch = collate(
            [rows[i] for i in group] or [min(rows, key=len)], args.share_prefix, float(bool(group))
        )
        yield group, batch.to(world.device)


def all_batches(
    rows: Sequence[Row], args: argparse.Namespace, world: World
) -> Iterator[tuple[list[int], Batch]]:
    """As rank_batches, for rows of any number in any order: they are planned by and by."""
    order = np.argsort(lengths_of(rows), kind="stable").tolist()
    for start in range(0, len(order), PLANNED_ROWS):
        some = order[start : start + PLANNED_ROWS]
        for group, batch in rank_batches([rows[i] for i in some], args, world):
            yield [some[i] for i in group], batch


@torch.no_grad()
def evaluate(
    objective: Objective,
    sets: dict[str, Sequence[Row]],
    args: argparse.Namespace,
    world: World,
) -> dict[str, float]:
    """Exact means over all rows of each set, by keys that begin with its name; none where it is empty."""
    metrics = {}
    for name, rows in sets.items():
        if not rows:
            continue
        objective.survey(rows, partial(all_batches, args=args, world=world))
        means = Means()
        for _, batch in all_batches(rows, args, world):
            means.add(objective(batch)[1], batch.weights)
        metrics |= {f"{name}/{key}": value for key, value in means.reduce().items()}
    return metrics


def _mark_last(batches: Iterator[T]) -> Iterator[tuple[T, bool]]:
    """Each of some batches, of which there is at least one, and whether it is the last."""
    batch = next(batches)
    for following in batches:
        yield batch, False
        batch = following
    yield batch, True


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _check_finite(step: int, loss: float, grad_norm: float, first: bool) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise RunError(
            f"step {step + 1}: the loss is {loss}, the gradient's norm {grad_norm}; the step was not taken. "
            "Lower --lr, or look for broken weights in --model"
        )
    if first and grad_norm == 0 and loss != 0:  # a hinge may be at rest
        raise RunError(
            f"step {step + 1}: no gradient reached the model; its parameters are not trained"
        )


class _Log:
    """metrics.jsonl, written by rank 0: one line a step, one an evaluation."""

    def __init__(self, path: Path, start: int, world: World):
        self.path, self.is_main = path, world.is_main
        on_main(world, partial(self._keep_until, start))
        if not self.path.exists():
            raise RunError(
                f"{path} was written by rank 0, and rank {world.rank} does not see it; --out must be on "
                "a disk that all hosts share"
            )

    def _keep_until(self, start: int) -> None:
        """Drops what a continued run will write again, and a line that was torn when it was killed."""
        text = self.path.read_text() if start and self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        kept = "".join(line for line in whole if json.loads(line)["step"] <= start)
        temporary = self.path.with_name(".metrics.partial")
        temporary.write_text(kept)
        os.replace(temporary, self.path)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not (self.is_main and values):
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise RunError(f"{self.path} can't be written: {in_a_line(error)}") from error

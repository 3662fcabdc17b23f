"""The training loop, by hand. One optimizer step is a pure function of its number: see rows.step_indices."""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from nanoalign import checkpoint
from nanoalign.distributed import World, on_main
from nanoalign.errors import RunError, in_a_line
from nanoalign.metrics import Means
from nanoalign.rows import Batch, Row, collate, plan_micro_batches, step_indices

# A batch's losses (B,), which are minimised, and what is reported of it, (B,) by name.
LossOfBatch = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]


def train(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of_batch: LossOfBatch,
    rows: list[Row],
    eval_rows: list[Row],
    args: argparse.Namespace,
    world: World,
    start: int = 0,
) -> int:
    """Trains from step `start` to the last, or to --stop_after; returns the steps that are done."""
    total = total_steps(len(rows), args)
    stop = max(start, min(total, args.stop_after or total))
    if start > total:
        raise RunError(
            f"the checkpoint is at step {start}, and this run has {total}; raise --steps"
        )
    log = _Log(Path(args.out) / "metrics.jsonl", start, world)
    if start == 0:
        log.write(0, evaluate(loss_of_batch, eval_rows, args, world))
    with tqdm(total=total, initial=start, unit="step", disable=not world.is_main) as progress:
        for step in range(start, stop):
            # the learning rate of this step
            lr = get_lr(step, total, args.lr, args.warmup, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # micro-batches: whatever their division, the gradient of the mean loss over the step
            step_rows = [rows[i] for i in step_indices(step, len(rows), args.batch_size, args.seed)]
            means = Means()
            for batch in rank_batches(step_rows, args, world):
                losses, values = loss_of_batch(batch)
                loss = (losses * batch.weights).sum() / len(step_rows)
                # Sharding averages gradients over ranks, and we want their sum.
                (loss * world.size).backward()
                means.add(values, batch.weights)

            # clip, step
            grad_norm = _full(
                nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            ).item()
            metrics = means.reduce()
            _check_finite(step, metrics["loss"], grad_norm, first=step == start)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # log
            epoch = (step + 1) / steps_per_epoch(len(rows), args)
            log.write(step + 1, metrics | {"lr": lr, "grad_norm": grad_norm, "epoch": epoch})
            progress.set_postfix(
                loss=f"{metrics['loss']:.4f}",
                accuracy=f"{metrics['rewards/accuracies']:.3f}",
                margin=f"{metrics['rewards/margins']:+.3f}",
                refresh=False,
            )
            progress.update()

            # evaluate, save
            if _is_due(step + 1, args.eval_every) or step + 1 == total:
                log.write(step + 1, evaluate(loss_of_batch, eval_rows, args, world))
            if (
                _is_due(step + 1, args.save_every)
                or step + 1 == args.stop_after
                or (args.save_every and step + 1 == total)
            ):
                checkpoint.save(policy, optimizer, step + 1, args, world)
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


def rank_batches(rows: list[Row], args: argparse.Namespace, world: World) -> Iterator[Batch]:
    """This rank's micro-batches of some rows, on its device. All ranks get equally many."""
    plan = plan_micro_batches(rows, world.size, args.micro_batch_tokens, args.share_prefix)
    for part in plan:
        group = [rows[i] for i in part[world.rank]]
        # A place without a pair runs the shortest row with weight 0: the other ranks' collectives
        # need us.
        batch = collate(group or [min(rows, key=len)], args.share_prefix, float(bool(group)))
        yield batch.to(world.device)


@torch.no_grad()
def evaluate(
    loss_of_batch: LossOfBatch, rows: list[Row], args: argparse.Namespace, world: World
) -> dict[str, float]:
    """Exact means over all rows, by keys that begin with eval/; nothing where there are no rows."""
    if not rows:
        return {}
    means = Means()
    for batch in rank_batches(rows, args, world):
        means.add(loss_of_batch(batch)[1], batch.weights)
    return {f"eval/{name}": value for name, value in means.reduce().items()}


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value  # a collective


def _check_finite(step: int, loss: float, grad_norm: float, first: bool) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise RunError(
            f"step {step + 1}: the loss is {loss}, the gradient's norm {grad_norm}; the step was not taken. "
            "Lower --lr, or look for broken weights in --model"
        )
    if first and grad_norm == 0:
        raise RunError(
            f"step {step + 1}: no gradient reached the policy; its parameters are not trained"
        )


class _Log:
    """metrics.jsonl, written by rank 0: one line a step, one an evaluation."""

    def __init__(self, path: Path, start: int, world: World):
        self.path, self.is_main = path, world.is_main
        on_main(world, partial(self._keep_until, start))

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

"""The training loop. One optimizer step is a pure function of its number: see step_indices."""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from nanoalign.batch import Batch, Row, collate, lengths_of
from nanoalign.distributed import World, full
from nanoalign.errors import RunError
from nanoalign.metrics import Means, Metric

PLANNED_ROWS = 1024  # of an evaluation, planned at a time: planning takes more than linear time
MakeBatches = Callable[[Sequence[Row]], Iterator[Batch]]


@dataclass(frozen=True)
class Settings:
    """What `train` reads of the flags."""

    batch_size: int  # records of a step, over all ranks
    epochs: int  # passes over the data
    steps: int | None  # optimizer steps in all; None: those of `epochs`
    seed: int  # of the order of the rows
    lr: float  # the peak learning rate
    warmup: float  # the share of the steps in which the rate rises to `lr`
    schedule: str  # how it falls after that: cosine, linear or constant
    max_grad_norm: float  # a larger gradient is scaled to this norm
    eval_every: int | None  # steps between two evaluations; None: about ten evaluations a run

    @classmethod
    def of(cls, args: Namespace) -> "Settings":
        """The settings that flags have."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    def total(self, rows: int) -> int:
        """The number of optimizer steps of a run on so many rows."""
        return self.steps or self.epochs * math.ceil(rows / self.batch_size)

    def step_rows(self, step: int, rows: Sequence[Row]) -> list[Row]:
        """The rows of optimizer step `step`, from 0, among all training rows."""
        return [rows[i] for i in step_indices(step, len(rows), self.batch_size, self.seed)]


class Objective:
    """What is minimised: the loss of a batch. Subclasses may also look at a step as a whole."""

    def __init__(self, loss_of_batch: Callable[[Batch], tuple[Tensor, dict[str, Metric]]]):
        self.loss_of_batch = loss_of_batch
        self.state: dict[str, float] = {}  # what a checkpoint keeps beside model and optimizer
        self.modules: dict[str, nn.Module] = {}  # likewise

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        """(losses of the pairs of a batch, (B,); their metrics by name)."""
        return self.loss_of_batch(batch)

    def losses_at_start(self, batch: Batch) -> Tensor | float:
        """The losses of a batch if policy and reference were one function: (B,), or one for all.

        Here ln 2, as that of DPO.
        """
        return math.log(2)

    def before_step(self, rows: Sequence[Row], batches: MakeBatches) -> None:
        """Called with all rows of a step, or of an evaluation, before the first of its batches.

        batches: maps rows to batches; these rows or others, but the same on all ranks.
        """

    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        """Called after each optimizer step, with the number of steps done and their means."""


class Batcher:
    """Makes the micro-batches of this rank, in the padded layout: see nanoalign/batch.py.

    nanoalign/packing has the layout without padding, which a run uses by default.
    """

    advice = "this architecture is not supported"  # in the error where scores of a batch are wrong

    def __init__(self, world: World, tokens: int):
        """tokens: of a micro-batch, at most; a longer row is a micro-batch by itself."""
        self.world, self.tokens = world, tokens

    def prepare(self, model: nn.Module) -> None:
        """Called with each model that will read the batches."""

    def collate(self, rows: Sequence[Row], weight: float = 1.0) -> Batch:
        return collate(rows, weight)

    def plan(self, rows: Sequence[Row]) -> list[list[list[int]]]:
        """plan[round][rank] = indices of rows: of similar length, at most `tokens` with padding.

        A longer row is alone. In the last round, ranks may have no rows.
        """
        groups, lines = [[]], 0
        for i in sorted(range(len(rows)), key=lambda i: -rows[i].longest):
            lines += len(rows[i].responses)
            if groups[-1] and lines * rows[groups[-1][0]].longest > self.tokens:
                groups.append([])
                lines = len(rows[i].responses)
            groups[-1].append(i)
        groups += [[] for _ in range(-len(groups) % self.world.size)]
        return [groups[n : n + self.world.size] for n in range(0, len(groups), self.world.size)]

    def step(self, rows: Sequence[Row]) -> Iterator[Batch]:
        """The batches of one optimizer step, on the device; a rank without rows gets weight 0.

        All ranks get equally many batches, because the collectives of sharding must match. The
        first one is made at once, the others when they are asked for.
        """
        batches = self._planned(rows)
        return chain([next(batches)], batches)

    def _planned(self, rows: Sequence[Row]) -> Iterator[Batch]:
        for groups in self.plan(rows):
            group = groups[self.world.rank]
            own_rows = [rows[i] for i in group] or [min(rows, key=len)]  # else a filler batch
            batch = self.collate(own_rows, float(bool(group))).to(self.world.device)
            batch.rows = group
            yield batch

    def all(self, rows: Sequence[Row]) -> Iterator[Batch]:
        """As `step`, for any number of rows, which are sorted by length and planned in parts.

        The `rows` of a batch are indices among all of these rows.
        """
        order = np.argsort(lengths_of(rows), kind="stable").tolist()
        for start in range(0, len(order), PLANNED_ROWS):
            part = order[start : start + PLANNED_ROWS]
            for batch in self.step([rows[i] for i in part]):
                batch.rows = [part[i] for i in batch.rows]
                yield batch


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, objective: Objective,
    rows: Sequence[Row], held_out: dict[str, Sequence[Row]], batcher: Batcher, settings: Settings,
    log: Callable[[int, dict[str, float]], None],
    save: Callable[[int, bool, dict[str, float]], bool] = lambda *step: False, start: int = 0,
) -> None:  # fmt: skip
    """Trains from step `start` to the last one, or until `save` ends the run.

    held_out: rows by the name that begins the keys of their metrics ("eval" -> "eval/loss").
    log: takes the number of steps done and metrics; those of a step have its tokens and seconds.
    save: takes the number of steps done, whether it is the last, and the metrics of the step and
        of an evaluation after it. Returns whether the run ends here.
    Raises RunError if `start` is behind the last step, if a metric, a gradient or a parameter is
        not finite, and if no gradient reaches the model in the first step.
    """
    total, epoch = settings.total(len(rows)), math.ceil(len(rows) / settings.batch_size)
    if start > total:
        raise RunError(f"the checkpoint is at step {start} of {total}; raise --steps or --epochs")
    if start == 0:
        log(0, evaluate(objective, held_out, batcher))
    # By default as many rows are trained on between two evaluations as one of them reads.
    held_out_rows = sum(map(len, held_out.values()))
    every = settings.eval_every or max(1, total // 10, held_out_rows // settings.batch_size)
    world, step_rows = batcher.world, settings.step_rows(start, rows)
    micro_batches = batcher.step(step_rows)
    for step in range(start, total):
        began, tokens = time.perf_counter(), sum(map(len, step_rows))
        # the learning rate of this step
        lr = get_lr(step, total, settings.lr, settings.warmup, settings.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

        # micro-batches: however rows are divided, the gradient of the mean loss over the step
        objective.before_step(step_rows, batcher.step)
        means = Means()
        for batch in micro_batches:
            losses, metrics = objective(batch)  # (B,)
            loss = (losses * batch.weights).sum() / len(step_rows)
            (loss * world.size).backward()  # sharding averages gradients over ranks; we want sums
            means.add(metrics, batch.weights)

        # clip, make the first batch of the next step while the GPU works, step
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        step_rows = settings.step_rows(step + 1, rows)
        micro_batches = batcher.step(step_rows)
        grad_norm, metrics = full(norm).item(), means.reduce()  # waits for the GPU
        check_finite(metrics | {"grad_norm": grad_norm}, f"step {step + 1} was not taken")
        if step == start and grad_norm == 0 and metrics["loss"] != 0:  # 0: a hinge has no slope
            raise RunError(f"step {step + 1}: no gradient reached the model, nothing is trained")
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        objective.after_step(done, metrics)

        # log, evaluate, save
        speed = {"tokens": tokens, "seconds": time.perf_counter() - began}
        log(done, metrics | {"lr": lr, "grad_norm": grad_norm, "epoch": done / epoch} | speed)
        if done == total or done % epoch == 0 or done % every == 0:
            check_parameters(model, done)
            evaluation = evaluate(objective, held_out, batcher)
            log(done, evaluation)
            metrics |= evaluation
        if save(done, done == total, metrics):
            return


@torch.no_grad()
def evaluate(
    objective: Objective, sets: dict[str, Sequence[Row]], batcher: Batcher
) -> dict[str, float]:
    """Returns exact means over all rows of each set, by keys that begin with its name.

    A set without rows has none. A collective. Raises RunError if a mean is not finite.
    """
    metrics = {}
    for name, rows in sets.items():
        if len(rows):
            objective.before_step(rows, batcher.all)
            means = Means()
            for batch in batcher.all(rows):
                means.add(objective(batch)[1], batch.weights)
            metrics |= {f"{name}/{key}": value for key, value in means.reduce().items()}
    check_finite(metrics, "evaluation")
    return metrics


def check_finite(values: dict[str, float], when: str) -> None:
    """Raises RunError with the values that are NaN or infinite. when: the beginning of its text."""
    if bad := [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]:
        advice = "nothing of it is saved: lower --lr, or check the weights of --model"
        raise RunError(f"{when}: {', '.join(bad)}; {advice}")


@torch.no_grad()
def check_parameters(model: nn.Module, step: int) -> None:
    """Raises RunError if a trained parameter is NaN or infinite after `step`. A collective."""
    norm = nn.utils.get_total_norm([p for p in model.parameters() if p.requires_grad])
    check_finite({"norm of the parameters": full(norm).item()}, f"after step {step}")


def step_indices(step: int, rows: int, batch_size: int, seed: int) -> np.ndarray:
    """The rows of optimizer step `step` (from 0): a slice of a permutation of (seed, epoch).

    The last step of an epoch may be smaller.
    """
    epoch, place = divmod(step, math.ceil(rows / batch_size))
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    return order[place * batch_size : (place + 1) * batch_size]


def get_lr(step: int, total: int, peak: float, warmup: float, schedule: str) -> float:
    """The learning rate of step `step` (from 0): a linear rise, then cosine, linear or constant.

    warmup: the share of the steps that rise. No step has a rate of 0: the first one is one step up,
    and the way down would reach 0 one step after the last.
    """
    rising = math.floor(warmup * total)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    done = (step - rising) / (total - rising)  # in [0, 1)
    factor = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    return peak * factor[schedule]

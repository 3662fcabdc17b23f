"""Micro-batches as large as a GPU's memory lets them be, and half of that where it runs out.

--micro_batch_tokens auto: before the first step, micro-batches of two sizes are computed forward
and backward, and the most memory that each held gives the bytes a token. The plan of a step divides
its rows evenly among as few micro-batches as the size allows.
"""

import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.distributed import ReduceOp
from torch.distributed.tensor import DTensor

from nanoalign import loop
from nanoalign.batch import Batch, Row, lengths_of
from nanoalign.distributed import World, print0, sum_over_ranks
from nanoalign.errors import RunError
from nanoalign.flags import MICRO_BATCH_TOKENS
from nanoalign.packing.packed import layout

FREE = 0.1  # the share of the memory that is left free: steps differ, and allocators have gaps
MOST = 2**16  # tokens: times 2**15, a wide layer, what kernels index with 32 bits
PROBED = 256  # the smallest size that is tried where the first ones have no room


def batcher_of(args: Namespace, world: World) -> loop.Batcher:
    """The batcher of a training run; of --micro_batch_tokens auto with the size until `fit`."""
    is_auto = args.micro_batch_tokens == "auto"
    return layout(args)(world, MICRO_BATCH_TOKENS if is_auto else args.micro_batch_tokens)


class Allocator:
    """The memory of a GPU, in bytes."""

    def __init__(self, device: torch.device):
        self.device = device

    def room(self) -> int:
        """What this process can have in all."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)

    def most_held(self, function: Callable[[], object]) -> int:
        """The most that tensors hold while a function runs, those from before included."""
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        return torch.cuda.max_memory_allocated(self.device)


def fit(
    model: nn.Module,
    objective: loop.Objective,
    rows: Sequence[Row],
    batcher: loop.Batcher,
    args: Namespace,
    allocator: Allocator | None = None,
) -> Namespace:
    """Sets the size of a batcher by the memory of the GPUs, if --micro_batch_tokens is auto.

    Returns the flags with this number in place of auto. The model is as before, without gradients.
    allocator: by default that of the GPU; on a CPU, auto is the size of `batcher_of`. A collective.
    Raises RunError if no micro-batch has room, and torch.OutOfMemoryError where it runs out on one
    of several ranks.
    """
    if args.micro_batch_tokens != "auto":
        return args
    if batcher.world.device.type == "cuda":
        allocator = allocator or Allocator(batcher.world.device)
    if allocator:
        batcher.tokens = size_of(model, objective, rows, batcher, args, allocator)
        print0(f"{'memory':<11} {batcher.tokens:,} tokens a micro-batch (--micro_batch_tokens)")
    return Namespace(**vars(args) | {"micro_batch_tokens": batcher.tokens})


def size_of(
    model: nn.Module,
    objective: loop.Objective,
    rows: Sequence[Row],
    batcher: loop.Batcher,
    args: Namespace,
    allocator: Allocator,
) -> int:
    """The tokens of a micro-batch for which all ranks have room; see `fit`."""
    world, tokens = batcher.world, np.cumsum(lengths_of(rows))

    def run(batch: Batch) -> None:
        losses, _ = objective(batch)
        (losses * batch.weights).sum().backward()

    def probe(size: int) -> tuple[int, int]:
        """(tokens of a micro-batch of at most `size`, the most bytes held while it runs)"""
        batcher.tokens = size
        enough = rows[: int(np.searchsorted(tokens, size * world.size)) + 1]
        objective.before_step(enough, batcher.step)
        batch = next(batcher.step(enough))
        return batch.inputs["input_ids"].numel(), allocator.most_held(lambda: run(batch))

    size = MICRO_BATCH_TOKENS
    while True:
        try:
            probe(size // 2)  # compiles kernels, and makes the gradients that later ones add to
            (few, least), (many, most) = probe(size // 2), probe(size)
            break
        except torch.OutOfMemoryError as error:
            if world.size > 1 or size <= PROBED:  # the others wait for this rank
                raise
            free_memory(model, error)
            size //= 2
    free_memory(model)
    if many <= few:  # the data have no more tokens
        return size
    of_token = max(1, (most - least) / (many - few))
    trained = [p for p in model.parameters() if p.requires_grad]
    local = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in trained)
    fixed = least - of_token * few + 2 * local  # the two moments of AdamW
    if world.size > 1 and args.gradient_sync == "step":
        fixed += sum(p.nbytes for p in trained)  # whole gradients
    elif world.size > 1 and args.shard_size:
        fixed += local  # sums of one copy, until the copies sum theirs
    room = (1 - FREE) * allocator.room()
    found = torch.tensor((room - fixed) / of_token, dtype=torch.float64)
    found = int(sum_over_ranks(found.to(world.device), ReduceOp.MIN))
    if found < 1:
        raise RunError(
            f"--micro_batch_tokens auto: {fixed / 1e9:.3g} GB are needed beside any micro-batch, "
            f"of {room / 1e9:.3g} GB; give more ranks, or --lora_rank"
        )
    return min(found, MOST)


def free_memory(model: nn.Module, error: BaseException | None = None) -> None:
    """Drops gradients, and what the frames of an error hold."""
    if error:
        traceback.clear_frames(error.__traceback__)
    model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, objective: loop.Objective,
    rows: Sequence[Row], held_out: dict[str, Sequence[Row]], batcher: loop.Batcher,
    settings: loop.Settings, log: Callable[[int, dict[str, float]], None],
    save: Callable[[int, bool, dict[str, float]], bool] = lambda *step: False, start: int = 0,
) -> None:  # fmt: skip
    """loop.train, in which a GPU without memory halves the micro-batches, once.

    The step in which that happens is done again: it is a function of its number, of parameters and
    of optimizer state, which do not change before all of its gradients are there. Then the same is
    computed, to rounding. Raises torch.OutOfMemoryError if it happens again, on one of several
    ranks, for which the others wait in collectives, and outside of a step's micro-batches.
    """
    # (steps that are over, the objective's state), while only micro-batches were computed since
    between = [(start, dict(objective.state))] if start else []

    def logged(step: int, metrics: dict[str, float]) -> None:
        log(step, metrics)
        if step == 0:  # the evaluation before the first step is over
            between.append((0, dict(objective.state)))

    def saved(step: int, last: bool, metrics: dict[str, float]) -> bool:
        ends = save(step, last, metrics)
        between.append((step, dict(objective.state)))
        return ends

    given = model, optimizer, objective, rows, held_out, batcher, settings
    hook = optimizer.register_step_pre_hook(lambda *_: between.clear())
    try:
        return loop.train(*given, logged, saved, start)
    except torch.OutOfMemoryError as error:
        if batcher.world.size > 1 or not between:
            raise
        free_memory(model, error)
    finally:
        hook.remove()
    ((done, state),) = between
    objective.state.update(state)
    size, batcher.tokens = batcher.tokens, max(1, batcher.tokens // 2)
    print0(
        f"{'memory':<11} step {done + 1} ran out of it with {size:,} tokens a micro-batch; it is "
        f"done again, and the rest is done, with {batcher.tokens:,}"
    )
    # An evaluation before the first step is computed again, and was logged.
    loop.train(*given, lambda step, metrics: step and log(step, metrics), save, done)

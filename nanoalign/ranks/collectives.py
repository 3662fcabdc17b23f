"""Objects and errors of all ranks, by torch's process group.

Every rank calls these functions in the same order; in a run of one process they do without a group.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from nanoalign.distributed import World, environment_ranks, sum_over_ranks
from nanoalign.errors import RunError

T = TypeVar("T")


def gather(value: T, world: World) -> list[T]:
    """Returns the values of all ranks, in the order of the ranks, on every rank. A collective."""
    values: list[T] = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def on_every(world: World, function: Callable[[], T]) -> T:
    """Calls a function on every rank; returns the result of this rank. A collective.

    If it raises RunError or OSError on any rank, all ranks raise RunError, so none waits in vain.
    """
    result = problem = None
    try:
        result = function()
    except (RunError, OSError) as error:
        problem = str(error)
    for each in filter(None, gather(problem, world)):
        raise RunError(each)
    return result


def on_main(world: World, function: Callable[[], T]) -> T | None:
    """Calls a function on rank 0 alone. Returns its result there, and None on the other ranks.

    A collective; errors as in on_every.
    """
    return on_every(world, function if world.is_main else lambda: None)


def breakpoint0() -> None:
    """Stops rank 0 in a debugger, while the other ranks wait. A collective."""
    if environment_ranks()[0] == 0:
        breakpoint()
    sum_over_ranks(torch.zeros(()))

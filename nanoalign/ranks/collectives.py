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
    """The object of every rank, by rank, on every rank. A collective."""
    values: list[T] = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def on_every(world: World, function: Callable[[], T]) -> T:
    """The result of a function that every rank runs. A collective.

    A RunError or OSError of any rank becomes a RunError on every rank, so no rank waits in vain.
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
    """The result of a function on rank 0, None on the others. Errors and ranks as in on_every."""
    return on_every(world, function if world.is_main else lambda: None)


def breakpoint0() -> None:
    """A debugger on rank 0, while the other ranks wait."""
    if environment_ranks()[0] == 0:
        breakpoint()
    sum_over_ranks(torch.zeros(()))

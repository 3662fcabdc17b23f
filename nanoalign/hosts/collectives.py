"""Objects and errors of all ranks."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from nanoalign.distributed import World
from nanoalign.errors import RunError

T = TypeVar("T")


def gather(value: T, world: World) -> list[T]:
    """The object of every rank, by rank, on every rank. A collective."""
    values: list[T] = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def on_main(world: World, function: Callable[[], T]) -> T | None:
    """The result of a function on rank 0, None on the others. A collective.

    A RunError or OSError becomes a RunError on every rank, so no rank waits in vain.
    """
    result = problem = None
    if world.is_main:
        try:
            result = function()
        except (RunError, OSError) as error:
            problem = str(error)
    if (problem := gather(problem, world)[0]) is not None:
        raise RunError(problem)
    return result

"""Objects and errors of all ranks, by torch's process group.

Every rank calls these functions in the same order; in a run of one process they do without a group.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from nanoalign.distributed import World
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


def check_equal(values: dict[str, object], advice: str, world: World) -> None:
    """Raises RunError on all ranks if a value differs between ranks. A collective.

    values: by the name of what it is, for the error. advice: what to do, for the error.
    """
    of_ranks, differ = gather(values, world), []
    for name in dict.fromkeys(name for each in of_ranks for name in each):
        ranks_of: dict[str, list[int]] = {}  # by the value
        for rank, each in enumerate(of_ranks):
            ranks_of.setdefault(str(each.get(name, "missing")), []).append(rank)
        if len(ranks_of) > 1:
            where = (f"{text[:80]} on rank {listed(ranks)}" for text, ranks in ranks_of.items())
            differ.append(f"{name} is {', '.join(where)}")
    if differ:
        more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise RunError(f"ranks differ: {'; '.join(differ[:3])}{more}. {advice}")


def listed(ranks: list[int]) -> str:
    """Returns the first few ranks as text."""
    return " ".join(map(str, ranks[:8])) + " ..." * (len(ranks) > 8)

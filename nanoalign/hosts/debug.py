"""A debugger in a run of several ranks."""

import torch

from nanoalign.distributed import place, sum_over_ranks


def breakpoint0() -> None:
    """A debugger on rank 0, while the other ranks wait."""
    if place()[0] == 0:
        breakpoint()
    sum_over_ranks(torch.zeros(()))

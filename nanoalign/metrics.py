"""What is reported, as exact sums over pairs: nothing is averaged twice, nothing is counted twice."""

import math

import torch
from torch import Tensor

from nanoalign.distributed import sum_over_ranks


def hits(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """1 where the chosen response has the higher reward, 0 where the lower, 1/2 for a tie: (B,).

    A model that can't tell the two apart, as policy == reference can't, is right half of the time.
    """
    return (torch.sign(chosen_rewards - rejected_rewards) + 1) / 2


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a probability, from a share of `count` trials (Wilson 1927).

    Unlike share +- 1.96 standard errors it stays within [0, 1], and has a width at shares of 0 and 1.
    """
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) * z / (1 + z * z / count)
    return centre - half, centre + half


class Means:
    """Means over the pairs of all micro-batches and ranks: float64 sums, one reduction, one division."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # (1 + number of names,): the pairs, then a sum a name

    def add(self, values: dict[str, Tensor], weights: Tensor) -> None:
        """Adds one micro-batch: values (B,) by name, weights (B,) that are 0 for pairs that do not count."""
        self.names = list(values)
        table = torch.stack([torch.ones_like(weights), *(v.detach() for v in values.values())])
        sums = (table.double() * weights).sum(1)
        self.sums = sums if self.sums is None else self.sums + sums

    def reduce(self) -> dict[str, float]:
        """The means by name, the same on every rank. Every rank must call it, with the same names."""
        assert self.sums is not None, "every rank adds at least one micro-batch"
        pairs, *sums = sum_over_ranks(self.sums).tolist()  # CPU-GPU sync point
        return {name: value / pairs for name, value in zip(self.names, sums, strict=True)}

"""What is reported, as exact sums over pairs: nothing is averaged twice, nothing is counted twice."""

import torch
from torch import Tensor

from nanoalign.distributed import sum_over_ranks


def hits(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """1 where the chosen response has the higher reward, 0 where the lower, 1/2 for a tie: (B,).

    A model that can't tell the two apart, as policy == reference can't, is right half of the time.
    """
    return (torch.sign(chosen_rewards - rejected_rewards) + 1) / 2


class Means:
    """Means over the pairs of all micro-batches and all ranks: sums in float64, one reduction, one division."""

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

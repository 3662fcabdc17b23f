"""Metrics as exact sums over pairs, whatever the micro-batches and ranks."""

import math

import torch
from torch import Tensor

from nanoalign.distributed import sum_over_ranks

Metric = Tensor | tuple[Tensor, Tensor]  # (B,) or (B, n); or (B,) and a mask (B,) of pairs


def hits(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """1 where the chosen response has the higher reward, 0 where the lower, 1/2 for a tie: (B,).

    So a policy that equals its reference has an accuracy of 1/2.
    """
    return (torch.sign(chosen_rewards - rejected_rewards) + 1) / 2


class Means:
    """Means over the pairs of all micro-batches and ranks: float64 sums, one reduction."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.spreads: list[str] = []
        self.sums: Tensor | None = None  # weights by name, sums by name, sums of squares by spread

    def add(self, values: dict[str, Metric], weights: Tensor) -> None:
        """Adds the metrics of one micro-batch, by name. weights (B,): 0 for pairs that fill a place.

        A value (B,) is averaged. A value (B, n) is n values a pair, of which the standard deviation
        is reported. A value (value, mask) counts only for the pairs whose mask is True.
        """
        self.names, self.spreads = list(values), []
        counted, sums, squares = [], [], []
        for name, value in values.items():
            weight = weights
            if isinstance(value, tuple):
                value, mask = value
                weight, value = weights * mask, value.where(mask, 0.0)
            value = value.detach().double()
            if value.ndim == 2:
                self.spreads.append(name)
                squares.append((value.square().mean(1) * weight).sum())
                value = value.mean(1)
            sums.append((value * weight).sum())
            counted.append(weight.sum(dtype=torch.float64))
        new = torch.stack(counted + sums + squares)
        self.sums = new if self.sums is None else self.sums + new

    def reduce(self) -> dict[str, float]:
        """The means by name, the same on every rank; a name whose mask was never True is left out.

        A collective: every rank calls it with the same names.
        """
        assert self.sums is not None, "every rank adds at least one micro-batch"
        sums = sum_over_ranks(self.sums).tolist()  # waits for the GPU
        count = len(self.names)
        weights = dict(zip(self.names, sums[:count], strict=True))
        totals = dict(zip(self.names, sums[count : 2 * count], strict=True))
        means = {name: totals[name] / weights[name] for name in self.names if weights[name]}
        for name, square in zip(self.spreads, sums[2 * count :], strict=True):
            means[name] = math.sqrt(max(0.0, square / weights[name] - means[name] ** 2))
        return means

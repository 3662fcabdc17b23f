"""Metrics as exact sums over pairs, whatever the micro-batches and ranks."""

import math

import torch
from torch import Tensor

from nanoalign.distributed import sum_over_ranks

SQUARE = " squared"  # behind the name of a metric whose standard deviation is reported
Metric = Tensor | tuple[Tensor, Tensor]  # (B,) or (B, n); or (B,) and a mask (B,) of pairs


def hits(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """1 where the chosen response has the higher reward, 0 where the lower, 1/2 for a tie: (B,)."""
    return (torch.sign(chosen_rewards - rejected_rewards) + 1) / 2


def pair_metrics(
    losses: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    accuracy: str = "rewards/accuracies",
) -> dict[str, Metric]:
    """What every loss of pairs reports, (B,) each, by TRL's names. accuracy: the name of `hits`."""
    return {
        "loss": losses,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        accuracy: hits(chosen_rewards, rejected_rewards),
    }


class Means:
    """Means over the pairs of all micro-batches and ranks: float64 sums, one reduction."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # (names, 2): sums of weights, of weights times values

    def add(self, values: dict[str, Metric], weights: Tensor) -> None:
        """Adds the metrics of a micro-batch, by name. weights (B,): 0 in a filler batch.

        A value (B,) is averaged. Of a value (B, n), n values a pair, the standard deviation is
        reported. A value (value, mask) counts only for the pairs whose mask is True.
        """
        weighted = {}
        for name, value in values.items():
            weight = weights.double()
            if isinstance(value, tuple):
                value, mask = value
                weight, value = weight * mask, value.where(mask, 0.0)
            value = value.detach().double()
            if value.ndim == 2:
                weighted[name + SQUARE] = weight, value.square().mean(1)
                value = value.mean(1)
            weighted[name] = weight, value
        self.names = list(weighted)
        sums = [part for w, v in weighted.values() for part in (w.sum(), (w * v).sum())]
        new = torch.stack(sums).view(-1, 2)
        self.sums = new if self.sums is None else self.sums + new

    def reduce(self) -> dict[str, float]:
        """The means by name, the same on every rank; a name whose mask was never True is left out.

        A collective: every rank calls it with the same names.
        """
        assert self.sums is not None, "every rank adds at least one micro-batch"
        sums = zip(self.names, sum_over_ranks(self.sums).tolist(), strict=True)  # waits for the GPU
        means = {name: total / weight for name, (weight, total) in sums if weight}
        for name in [name for name in means if name + SQUARE in means]:
            means[name] = math.sqrt(max(0.0, means.pop(name + SQUARE) - means[name] ** 2))
        return means

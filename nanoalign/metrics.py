"""Metrics as exact means over pairs, whatever the micro-batches and ranks."""

import math

import torch
from torch import Tensor

from nanoalign.distributed import sum_over_ranks

Metric = Tensor | tuple[Tensor, Tensor]  # (B,) or (B, n); or (B,) and a mask (B,) of pairs


def hits(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """1 where the chosen response has the higher reward, 0 where the lower, 1/2 for a tie: (B,)."""
    return (torch.sign(chosen_rewards - rejected_rewards) + 1) / 2


def pair_metrics(
    losses: Tensor,  # (B,)
    chosen_rewards: Tensor,  # (B,)
    rejected_rewards: Tensor,  # (B,)
    accuracy: str = "rewards/accuracies",
) -> dict[str, Metric]:
    """What every loss of pairs reports, by TRL's names. accuracy: the name of `hits`."""
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
        self.deviations: set[str] = set()  # names of which the standard deviation is reported
        self.sums: Tensor | None = None  # (names, 3): of weights w, of w * value, of w * value^2

    def add(self, values: dict[str, Metric], weights: Tensor) -> None:
        """Adds the metrics of a micro-batch, by name. weights (B,): 0 in a filler batch.

        A value (B,) is averaged. Of a value (B, n), n values a pair, the standard deviation is
        reported. A value (value, mask) counts only for the pairs whose mask is True.
        """
        sums = []
        for name, value in values.items():
            weight = weights.double()
            if isinstance(value, tuple):
                value, mask = value
                weight, value = weight * mask, value.where(mask, 0.0)
            value, squares = value.detach().double(), torch.zeros_like(weight)
            if value.ndim == 2:
                self.deviations.add(name)
                value, squares = value.mean(1), value.square().mean(1)
            sums += [weight.sum(), (weight * value).sum(), (weight * squares).sum()]
        self.names = list(values)
        new = torch.stack(sums).view(-1, 3)
        self.sums = new if self.sums is None else self.sums + new

    def reduce(self) -> dict[str, float]:
        """The means by name, the same on every rank; a name whose mask was never True is left out.

        A collective: every rank calls it with the same names.
        """
        assert self.sums is not None, "every rank adds at least one micro-batch"
        means = {}
        sums = sum_over_ranks(self.sums).tolist()  # waits for the GPU
        for name, (weight, total, squares) in zip(self.names, sums, strict=True):
            if weight:
                means[name] = total / weight
                if name in self.deviations:
                    means[name] = math.sqrt(max(0.0, squares / weight - means[name] ** 2))
        return means

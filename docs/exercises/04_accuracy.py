"""Exercise 4: the accuracy of rewards at step 0."""

from torch import Tensor


def accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """The share of pairs that are ranked rightly: (B,), (B,) -> ()."""
    return (chosen_rewards > rejected_rewards).float().mean()

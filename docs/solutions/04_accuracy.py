"""Exercise 4: the accuracy of rewards at step 0."""

import torch
from torch import Tensor


def accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """The share of pairs that are ranked rightly, a tie as half a pair: (B,), (B,) -> ()."""
    return ((torch.sign(chosen_rewards - rejected_rewards) + 1) / 2).mean()

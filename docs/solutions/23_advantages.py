"""Exercise 23: what REINFORCE multiplies log-probabilities by."""

from torch import Tensor


def advantages(rewards: Tensor) -> Tensor:
    """Each reward minus the mean of the other K - 1 answers to its prompt: (P, K) -> (P, K)."""
    mean_of_others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - mean_of_others

"""Exercise 23: what REINFORCE multiplies log-probabilities by."""

from torch import Tensor


def advantages(rewards: Tensor) -> Tensor:
    """Each reward minus the mean of the other K - 1 answers to its prompt: (P, K) -> (P, K)."""
    raise NotImplementedError

"""Exercise 1: the hinge loss of a pair."""

from torch import Tensor


def hinge(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta (w - l)): (B,), (B,) -> (B,)."""
    raise NotImplementedError

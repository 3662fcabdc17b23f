"""Exercise 1: the hinge loss of a pair."""

import torch
from torch import Tensor


def hinge(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta (w - l)): (B,), (B,) -> (B,)."""
    return torch.relu(1 - beta * (chosen_logratios - rejected_logratios))

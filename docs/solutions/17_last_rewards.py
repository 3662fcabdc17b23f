"""Exercise 17: rewards depend on the batch in which they are computed."""

import torch
from torch import Tensor


def last_rewards(values: Tensor, tokens: Tensor, mask: Tensor, pad: int) -> Tensor:
    """The value at the last token of each line: (N, T) -> (N,). mask: 1, or 0 for padding."""
    last = mask.sum(1) - 1
    return values[torch.arange(len(values)), last]

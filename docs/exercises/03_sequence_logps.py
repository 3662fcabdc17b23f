"""Exercise 3: two mistakes in the log-probability of a sequence."""

import torch
from torch import Tensor


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the log-probabilities of scored tokens: (N, T, V), (N, T) -> (N,)."""
    scored = labels != -100
    logps = torch.log_softmax(logits, dim=-1)
    token_logps = logps.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (token_logps * scored).mean(1)

"""Exercise 22: one step of DPO, with micro-batches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def training_step(
    policy: nn.Module, reference: nn.Module, chosen: Tensor, rejected: Tensor, optimizer,
    beta: float, size: int, max_norm: float,
) -> float:  # fmt: skip
    """Updates the policy, and returns the mean loss of the B pairs before the update.

    policy(chosen) is log pi of n responses, (n,). The gradient is that of the mean loss over the B
    pairs, clipped to max_norm. A forward of a model takes at most `size` pairs, or 2 * size
    responses. The optimizer has the parameters of the policy.
    """
    optimizer.zero_grad()
    total = 0.0
    for w, r in zip(chosen.split(size), rejected.split(size), strict=True):
        with torch.no_grad():
            lead = reference(w) - reference(r)
        margins = beta * (policy(w) - policy(r) - lead)
        loss = -F.logsigmoid(margins).sum() / len(chosen)  # of all B pairs, not of these alone
        loss.backward()  # adds to the gradient
        total += loss.item()
    nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    optimizer.step()
    return total

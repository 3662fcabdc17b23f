"""Exercise 22: one step of DPO, with micro-batches."""

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
    raise NotImplementedError

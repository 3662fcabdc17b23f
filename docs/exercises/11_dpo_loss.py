"""Exercise 11: the loss of DPO, as train_dpo.py computes it."""

from torch import Tensor


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(losses, rewards of the chosen, rewards of the rejected) of B pairs, (B,) each."""
    raise NotImplementedError

"""Exercise 11: the loss of DPO, as train_dpo.py computes it."""

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(losses, rewards of the chosen, rewards of the rejected) of B pairs, (B,) each."""
    chosen_rewards = beta * (policy_chosen - ref_chosen)
    rejected_rewards = beta * (policy_rejected - ref_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()

"""Exercise 5: the loss of a reward model, also where rewards are far apart."""

import torch
from torch import Tensor


def reward_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """-log sigmoid(r_w - r_l): (B,), (B,) -> (B,)."""
    return -torch.log(torch.sigmoid(chosen_rewards - rejected_rewards))

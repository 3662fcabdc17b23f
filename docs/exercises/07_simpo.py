"""Exercise 7: SimPO, which needs no reference."""

from torch import Tensor


def simpo(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor,
    beta: float, gamma_beta_ratio: float,
) -> Tensor:  # fmt: skip
    """-log sigmoid(beta (mean of w - mean of l) - gamma), gamma = beta * gamma_beta_ratio: (B,)."""
    raise NotImplementedError

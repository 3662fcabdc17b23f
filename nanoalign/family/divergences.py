"""What replaces log-ratios, or weighs pairs. Imports torch alone."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
LARGEST_EXPONENT = 40.0  # of exp(-log-ratio); squares of larger ones overflow in float32


def divergence_scores(logratios: Tensor, divergence: str, alpha: float = 0.5) -> Tensor:
    """What replaces log-ratios where another divergence than the reverse KL is penalised: (B,).

    f'(u) at u = pi / pi_ref, less its value at u = 1:

        reverse_kl  log u           js      log(2 u / (1 + u))
        forward_kl  1 - 1 / u       alpha   (1 - u^-alpha) / alpha,  0 < alpha < 1

    Wang et al. 2023 (f-DPO), arXiv 2309.16240, table 1. (TRL's alpha is 1 - alpha.) exp(-log u) is
    at most exp(40); above it the gradient is 0.
    """
    if divergence == "reverse_kl":
        return logratios
    if divergence == "js":
        return math.log(2) + F.logsigmoid(logratios)
    if divergence == "forward_kl":
        return -torch.expm1((-logratios).clamp(max=LARGEST_EXPONENT))
    return -torch.expm1((-alpha * logratios).clamp(max=LARGEST_EXPONENT)) / alpha


def wpo_weights(mean_token_scores: Tensor) -> Tensor:
    """WPO's weights of responses: exp of the mean over tokens of log pi(y_t) - log sum_v pi(v)^2.

    Zhou et al. 2024, arXiv 2406.11827, equation 2 with their alignment of the weights: a response
    counts more, the more probable it is under the policy. The loss of a pair is multiplied by the
    weights of both responses, which carry no gradient.
    """
    return mean_token_scores.exp()

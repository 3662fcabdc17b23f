"""Exercise 6: the gradient of DPO by hand, without autograd."""

import math


def gradient(
    policy_chosen: float, policy_rejected: float, ref_chosen: float, ref_rejected: float,
    beta: float,
) -> tuple[float, float]:  # fmt: skip
    """d loss / d log pi(y_w | x) and d loss / d log pi(y_l | x), of one pair."""
    h = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    # beta sigmoid(-h), whose exponential does not overflow
    slope = beta * (1 / (1 + math.exp(h)) if h < 0 else math.exp(-h) / (1 + math.exp(-h)))
    return -slope, slope

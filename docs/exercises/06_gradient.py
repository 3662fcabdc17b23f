"""Exercise 6: the gradient of DPO by hand, without autograd."""


def gradient(
    policy_chosen: float, policy_rejected: float, ref_chosen: float, ref_rejected: float,
    beta: float,
) -> tuple[float, float]:  # fmt: skip
    """d loss / d log pi(y_w | x) and d loss / d log pi(y_l | x), of one pair."""
    raise NotImplementedError

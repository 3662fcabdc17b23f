"""Exercise 12: how sure a mean is."""

from torch import Tensor


def interval(differences: Tensor) -> tuple[float, float]:
    """(low, high) of the 95 % interval of the mean of P differences, by 1.96 standard errors."""
    raise NotImplementedError

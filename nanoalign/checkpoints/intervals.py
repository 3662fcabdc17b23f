"""Confidence intervals of proportions."""

import math


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval (low, high) of a probability, from the share of `count` trials (Wilson 1927).

    Unlike share +- 1.96 standard errors it is within [0, 1], and not empty at 0 and 1.
    """
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) * z / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)  # at 0 and 1 up to rounding

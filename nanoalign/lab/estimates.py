"""Means over seeds and prompts with their intervals, and what they say of a guess.

Shapes: S seeds, P prompts, the same for each seed; P is 1 for a figure of a whole run.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean and its 95 % interval, which is nan where there is one number."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: np.ndarray) -> Estimate:
    """The mean of values (S, P), and its interval over seeds and prompts as random factors.

    Each seed is tried on the same prompts, so the effects of seeds, of prompts and of both together
    add up to the variance of the mean:

        V = var(means of seeds) / S + var(means of prompts) / P - var(what neither explains) / (S P)

    which is the unbiased estimate of a two-way layout with random effects. It is at least either of
    its first two terms, and the interval takes Student's t with the degrees of freedom of
    Satterthwaite 1946. Of one seed the interval is over prompts alone, and the reverse.
    """
    seeds, prompts = values.shape
    mean = float(values.mean())
    of_seeds, of_prompts = values.mean(1), values.mean(0)  # (S,), (P,)
    parts = [(float(each.var(ddof=1)) / len(each), len(each) - 1)
             for each in (of_seeds, of_prompts) if len(each) > 1]  # fmt: skip
    if not parts:
        return Estimate(mean, math.nan, math.nan)
    variance = sum(part for part, _ in parts)
    if len(parts) == 2:
        rest = values - of_seeds[:, None] - of_prompts + mean
        unexplained = float((rest**2).sum()) / ((seeds - 1) * (prompts - 1))
        variance = max(variance - unexplained / (seeds * prompts), *(part for part, _ in parts))
    if variance == 0:
        return Estimate(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = student(max(1.0, freedom)) * math.sqrt(variance)  # of two seeds it may be below 1
    return Estimate(mean, mean - half, mean + half)


def student(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, for 1 degree of freedom or more.

    With t = sqrt(freedom) tan(a), P(|T| < t) is c times the integral of cos^(freedom - 1) from 0 to
    a, where c = 2 Gamma((freedom + 1) / 2) / (sqrt(pi) Gamma(freedom / 2)).
    """
    constant = 2 / math.sqrt(math.pi)
    constant *= math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # bisection
        angle = (low + high) / 2
        inner = np.cos((nodes + 1) * angle / 2) ** (freedom - 1)
        inside = constant * float(weights @ inner) * angle / 2
        low, high = (angle, high) if inside < 0.95 else (low, angle)
    return math.sqrt(freedom) * math.tan(angle)


@dataclass(frozen=True)
class Claim:
    """A guess, made before the experiment, and the number that is above 0 if it is right."""

    text: str  # a sentence without its full stop, as if it were so
    difference: np.ndarray  # (S, P)
    unit: str = ""  # of the difference

    @property
    def verdict(self) -> str:
        """shown; not shown: 0 is in the interval, or there is none; other than expected: below."""
        found = estimate(self.difference)
        if found.low > 0:
            return "shown"
        return "other than expected" if found.high < 0 else "not shown"

    def sentence(self) -> str:
        found = estimate(self.difference)
        unit = f" {self.unit}" if self.unit else ""
        if math.isnan(found.low):
            return f"Not shown, by one number without an interval ({found}{unit}): {self.text}."
        return f"{self.verdict.capitalize()} ({found}{unit}): {self.text}."

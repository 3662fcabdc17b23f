"""What an experiment returns: a table, panels of its picture, and guesses with their verdicts.

Shapes: S seeds, P prompts, the same prompts for each seed; P is 1 for a figure of a whole run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np

Values = np.ndarray  # (S, P)


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
    """The mean of values (S, P) and its 95 % interval, for seeds and prompts as random factors.

    All seeds are measured on the same prompts, so the variance of the mean has three parts:

        V = var(means of seeds) / S + var(means of prompts) / P - var(residuals) / (S P)

    This is the unbiased estimate for a two-way layout with random effects. Few seeds tell their
    part badly, so each part is multiplied by the square of its own quantile t of Student's t, of
    S - 1 or P - 1 degrees of freedom (Banerjee 1960, Sankhya 22, 357):

        half the width = sqrt(t_S^2 V_S + t_P^2 V_P - min(t_S, t_P)^2 V_SP)

    and it is at least what either of the first two terms gives alone. The interval has the mean in
    95 % or more of cases, whatever the shares of the parts are; with the degrees of freedom of
    Satterthwaite 1946 it has it in 92 % of some, with three seeds (benchmarks/coverage.py). With
    one seed the interval is over prompts alone; with one prompt it is over seeds alone.
    """
    seeds, prompts = values.shape
    mean = float(values.mean())
    of_seeds, of_prompts = values.mean(1), values.mean(0)  # (S,), (P,)
    if max(seeds, prompts) == 1:
        return Estimate(mean, math.nan, math.nan)
    several = [means for means in (of_seeds, of_prompts) if len(means) > 1]
    quantiles = [student(len(means) - 1) for means in several]
    parts = [
        t**2 * means.var(ddof=1) / len(means) for t, means in zip(quantiles, several, strict=True)
    ]
    squared = sum(parts)
    if len(parts) == 2:
        rest = values - of_seeds[:, None] - of_prompts + mean
        unexplained = (rest**2).sum() / ((seeds - 1) * (prompts - 1))
        squared -= min(quantiles) ** 2 * unexplained / (seeds * prompts)
    half = math.sqrt(max(squared, *parts))
    return Estimate(mean, mean - half, mean + half)


@cache
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


def verdict(difference: Values) -> str:
    """What the interval of a difference says of the guess that the difference is above 0.

    "shown": the interval is above 0. "other than expected": it is below 0. "not shown": 0 is in it,
    or there is no interval, as there is one number alone.
    """
    interval = estimate(difference)
    if interval.low > 0:
        return "shown"
    return "other than expected" if interval.high < 0 else "not shown"


def sentence(guess: str, difference: Values) -> str:
    """The verdict on a guess, its estimate and the guess, as one sentence."""
    interval = estimate(difference)
    if math.isnan(interval.low):
        return f"Not shown, by one number without an interval ({interval}): {guess}."
    return f"{verdict(difference).capitalize()} ({interval}): {guess}."


@dataclass(frozen=True)
class Panel:
    """One panel of the picture: each series is a line, or points where x is a text."""

    title: str
    x: str  # label of the axis
    y: str  # label of the axis
    series: dict[str, Sequence[tuple[float | str | Values, Values]]]  # points (x, y) by name
    log: bool = False  # x is drawn on a logarithmic axis


@dataclass
class Findings:
    """The result of an experiment, from which its page is written."""

    table: dict[str, list]  # columns of texts, numbers, and Values, whose estimates are shown
    panels: Sequence[Panel]
    # guesses, as sentences without their full stop, each with the difference that is above 0 if it
    # is right
    claims: Sequence[tuple[str, Values]]
    notes: list[str] = field(default_factory=list)  # further sentences with numbers

    def rows(self) -> list[tuple[str, ...]]:
        """The rows of the table as texts."""
        columns = [list(map(as_text, column)) for column in self.table.values()]
        return list(zip(*columns, strict=True))


def as_text(value: object) -> str:
    """A cell of the table: of Values their estimate, a fraction to three digits, else str."""
    if isinstance(value, np.ndarray):
        return str(estimate(value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def column(figures: dict, key: str) -> list[Values]:
    """The figure `key` of each cell of a grid."""
    return [cell[key] for cell in figures.values()]


def points(figures: dict, key: str) -> list[tuple]:
    """The points of a figure of a grid with one axis: (value of the axis, figure)."""
    return list(zip(figures, column(figures, key), strict=True))

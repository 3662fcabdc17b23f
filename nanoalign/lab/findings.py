"""What an experiment returns: a table, panels of its picture, and guesses with their verdicts.

Shapes: S seeds, P prompts, the same prompts for each seed; P is 1 for a figure of a whole run.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from nanoalign.evaluation.statistics import student

Values = np.ndarray  # (S, P)
# What a figure can be, and so its interval: any number; from 0 to 1; above 0.
ANY, SHARE, POSITIVE = "any", "share", "positive"


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval, None where there is one number, and the means of the seeds."""

    mean: float
    low: float | None
    high: float | None
    seeds: Sequence[float] = ()

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def above(self, value: float) -> "Estimate":
        """How much the mean is above a value."""
        ends = (None if end is None else end - value for end in (self.low, self.high))
        return Estimate(self.mean - value, *ends, [seed - value for seed in self.seeds])


def estimate(values: Values, scale: str = ANY) -> Estimate:
    """The mean of values (S, P) and its 95 % interval, for seeds and prompts as random factors.

    scale: of a SHARE the interval is one of its logit, and of a POSITIVE figure one of its
    logarithm, with the same half width to first order, so that no end is beyond what is possible.
    Where all values of a share are 0, or all are 1, the end is that of Clopper and Pearson for P
    draws.
    """
    mean, half, seeds = float(values.mean()), half_width(values), values.mean(1).tolist()
    if half is None:
        return Estimate(mean, None, None, seeds)
    low, high = mean - half, mean + half
    if scale == SHARE and mean in (0, 1):
        beyond = 1 - 0.025 ** (1 / values.shape[1]) if values.shape[1] > 1 else 0.0
        low, high = max(0.0, mean - beyond), min(1.0, mean + beyond)
    elif scale == SHARE:
        logit, half = math.log(mean / (1 - mean)), half / (mean * (1 - mean))
        low, high = ((1 + math.tanh((logit + d) / 2)) / 2 for d in (-half, half))
    elif scale == POSITIVE and mean > 0:  # the estimate of a KL may be below 0
        low, high = mean * math.exp(-half / mean), mean * math.exp(half / mean)
    return Estimate(mean, low, high, seeds)


def half_width(values: Values) -> float | None:
    """Half the width of the 95 % interval of the mean of values (S, P); None for one number.

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
    of_seeds, of_prompts = values.mean(1), values.mean(0)  # (S,), (P,)
    several = [means for means in (of_seeds, of_prompts) if len(means) > 1]
    if not several:
        return None
    quantiles = [student(len(means) - 1) for means in several]
    parts = [
        t**2 * means.var(ddof=1) / len(means) for t, means in zip(quantiles, several, strict=True)
    ]
    squared = sum(parts)
    if len(parts) == 2:
        rest = values - of_seeds[:, None] - of_prompts + values.mean()
        unexplained = (rest**2).sum() / ((seeds - 1) * (prompts - 1))
        squared -= min(quantiles) ** 2 * unexplained / (seeds * prompts)
    return math.sqrt(max(squared, *parts))


# --- guesses --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A guess, and the estimate of a difference that is above 0 if the guess is right.

    text: a sentence without its full stop. Where the opposite has other words, both are in it, the
    guessed ones first: "noise [lowers|raises] the reward".
    """

    text: str
    difference: Estimate

    @property
    def verdict(self) -> str:
        """What the interval of the difference says of the guess.

        "shown": the interval is above 0. "other than expected": it is below 0. "not shown": 0 is
        in it, or there is no interval, as there is one number alone.
        """
        if (self.difference.low or 0) > 0:
            return "shown"
        return "other than expected" if (self.difference.high or 0) < 0 else "not shown"

    @property
    def guess(self) -> str:
        return re.sub(BOTH, r"\1", self.text)

    @property
    def opposite(self) -> str:
        said = re.sub(BOTH, r"\2", self.text)
        return f"the opposite of: {said}" if said == self.text else said

    @property
    def opposed(self) -> Estimate:
        """The difference the other way round."""
        d = self.difference
        return Estimate(-d.mean, -d.high, -d.low, [-seed for seed in d.seeds])

    def sentences(self) -> str:
        """The guess, and what was found."""
        if self.difference.low is None:
            found = f"not shown, by one number without an interval, {self.difference}"
            return f"Guess: {self.guess}. Found: {found}."
        found = {
            "shown": f"so, by {self.difference}",
            "not shown": f"not shown, as 0 is in the interval of the difference, {self.difference}",
            "other than expected": f"{self.opposite}, by {self.opposed}",
        }[self.verdict]
        return f"Guess: {self.guess}. Found: {found}."

    def result(self) -> str:
        """What was found, as a sentence that a summary can have."""
        if self.verdict == "shown":
            return f"{self.guess[0].upper()}{self.guess[1:]} ({self.difference})."
        if self.verdict == "not shown":
            return f"It is not shown that {self.guess} ({self.difference})."
        return f"Other than guessed, {self.opposite} ({self.opposed})."


BOTH = r"\[([^|\]]*)\|([^|\]]*)\]"


# --- the result of an experiment ------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One panel of the picture: each series is a line, or points where x is a text."""

    title: str
    x: str  # label of the axis
    y: str  # label of the axis
    # points (x, y) by name
    series: dict[str, Sequence[tuple[float | str | Values | Estimate, Values | Estimate]]]
    log: bool = False  # x is drawn on a logarithmic axis
    scale: str = ANY  # of y
    lines: dict[str, float] = field(default_factory=dict)  # of reference: values of y by name


@dataclass
class Findings:
    """The result of an experiment, from which its pages are written. Values become Estimates."""

    # columns of texts, numbers, Estimates, and Values, which become Estimates
    table: dict[str, list]
    panels: Sequence[Panel]
    claims: Sequence[Claim | tuple[str, Values | Estimate]]  # the first are those of a summary
    notes: Sequence[str] = ()  # further sentences with numbers

    def __post_init__(self) -> None:
        self.table = {name: list(map(estimated, cells)) for name, cells in self.table.items()}
        self.panels = [
            replace(panel, series={
                name: [(estimated(x), estimated(y, panel.scale)) for x, y in points]
                for name, points in panel.series.items()
            })
            for panel in self.panels
        ]  # fmt: skip
        self.claims = [
            claim if isinstance(claim, Claim) else Claim(claim[0], estimated(claim[1]))
            for claim in self.claims
        ]

    def rows(self) -> list[tuple[str, ...]]:
        """The rows of the table as texts."""
        columns = [list(map(as_text, column)) for column in self.table.values()]
        return list(zip(*columns, strict=True))

    def summary(self) -> list[str]:
        """What was found of the first guesses, a sentence each."""
        return [claim.result() for claim in self.claims[:4]]


def to_json(about: dict, findings: Findings) -> str:
    return json.dumps({"about": about, **asdict(findings)}, indent=1) + "\n"


def from_json(text: str) -> tuple[dict, Findings]:
    """What `to_json` was given."""
    found = json.loads(text, object_hook=lambda d: Estimate(**d) if "mean" in d else d)
    about, panels, claims = (found.pop(key) for key in ("about", "panels", "claims"))
    panels, claims = [Panel(**each) for each in panels], [Claim(**each) for each in claims]
    return about, Findings(panels=panels, claims=claims, **found)


def estimated(value: object, scale: str = ANY) -> object:
    """Of Values their estimate; any other value as it is."""
    return estimate(value, scale) if isinstance(value, np.ndarray) else value


def as_text(value: object) -> str:
    """A cell of the table: a fraction to three digits, else str."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def column(figures: dict, key: str, scale: str = ANY) -> list[Estimate]:
    """The figure `key` of each cell of a grid."""
    return [estimate(cell[key], scale) for cell in figures.values()]


def points(figures: dict, key: str) -> list[tuple]:
    """The points of a figure of a grid with one axis: (value of the axis, figure)."""
    return [(value, cell[key]) for value, cell in figures.items()]

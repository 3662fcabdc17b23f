"""What an experiment has found: a table, pictures, and guesses with their verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nanoalign.lab.estimates import Claim, estimate

Values = np.ndarray  # (S, P), of S seeds and P prompts


@dataclass(frozen=True)
class Panel:
    """One panel of the picture: a line, or points, of each series."""

    title: str
    x: str  # labels of the axes
    y: str
    series: dict[str, Sequence[tuple[float | str | Values, Values]]]  # points (x, y) by name
    log: bool = False  # the axis of x


@dataclass
class Findings:
    columns: Sequence[str]
    rows: list[tuple]  # of texts, numbers, and Values, of which the table has estimates
    panels: Sequence[Panel]
    claims: Sequence[Claim]
    notes: list[str] = field(default_factory=list)  # further sentences, made of the numbers

    def table(self) -> list[list[str]]:
        return [list(map(cell, row)) for row in self.rows]


def cell(value: object) -> str:
    if isinstance(value, np.ndarray):
        return str(estimate(value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)

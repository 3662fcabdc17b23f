"""The picture of an experiment: its panels side by side, with the intervals of all points."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files alone, no screen
from matplotlib import pyplot as plt  # noqa: E402

from nanoalign.lab.estimates import estimate
from nanoalign.lab.findings import Panel

MARKERS = "osD^vP*X"


def draw(path: Path, panels: Sequence[Panel]) -> None:
    widths = [max(5.6, 0.8 * len(names_of(panel))) for panel in panels]  # inches
    figure, axes = plt.subplots(
        1, len(panels), figsize=(sum(widths), 4.6), layout="constrained", squeeze=False,
        width_ratios=widths,
    )  # fmt: skip
    for axis, panel in zip(axes[0], panels, strict=True):
        _draw(axis, panel)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def names_of(panel: Panel) -> list[str]:
    """The texts on the axis of x, in their order."""
    xs = [x for points in panel.series.values() for x, _ in points]
    return list(dict.fromkeys(x for x in xs if isinstance(x, str)))


def _draw(axis, panel: Panel) -> None:
    names = names_of(panel)
    for n, (name, points) in enumerate(panel.series.items()):
        # texts stand side by side, and the series of one text beside one another
        aside = 0.5 * ((n + 0.5) / len(panel.series) - 0.5)
        xs = [
            names.index(x) + aside if isinstance(x, str) else float(np.mean(x)) for x, _ in points
        ]
        found = [estimate(values) for _, values in points]
        ys = np.array([each.mean for each in found])
        errors = np.array([[e.mean - e.low, e.high - e.mean] for e in found]).T
        axis.errorbar(
            xs, ys, yerr=np.nan_to_num(errors), fmt=MARKERS[n % len(MARKERS)] + "-" * (not names),
            ms=5, lw=1.4, elinewidth=1, capsize=3, label=name,
        )  # fmt: skip
    if names:
        turned = {"rotation": 30, "ha": "right"} if sum(map(len, names)) > 45 else {}
        axis.set_xticks(range(len(names)), names, **turned)
    if panel.log:
        axis.set_xscale("log")
        xs = sorted({x for points in panel.series.values() for x, _ in points})
        axis.set_xticks(xs, [f"{x:g}" for x in xs])
        axis.minorticks_off()
    axis.set_title(panel.title)
    axis.set_xlabel(panel.x)
    axis.set_ylabel(panel.y)
    axis.grid(alpha=0.3)
    if len(panel.series) > 1:
        axis.legend(fontsize="small")

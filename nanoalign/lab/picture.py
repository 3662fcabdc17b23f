"""Draws the panels of an experiment as SVG, one below the other, to be read at 420 pixels.

In a picture a name has one colour, marker and dash in all panels. A point has its 95 % interval,
and beside it a small mark for each seed. Browsers that prefer dark pages show it in dark colours.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from nanoalign.lab.findings import POSITIVE, Estimate, Findings, Panel

# Of Okabe and Ito, which all kinds of colour vision tell apart, from the darkest contrast on.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#9A6A00", "#56B4E9", "#7F3C8D")
MARKERS, DASHES = "osD^vPX", ("-", "--", "-.", ":")
DARK = """<style>@media (prefers-color-scheme: dark) {
[style*="fill: #ffffff"] { fill: #1b1b1f !important }
[style*="stroke: #000000"] { stroke: #dddddd !important }
text, [style*="fill: #000000"] { fill: #dddddd !important }
}</style>"""


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Writes an .svg of the panels. The same panels give the same text with one matplotlib."""
    import matplotlib

    matplotlib.use("Agg")  # files alone, no screen
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    options = {"svg.fonttype": "none", "svg.hashsalt": "nanoalign", "font.size": 10}
    with matplotlib.rc_context(options):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(5.0, sum(map(height, panels))), layout="constrained",
            squeeze=False, height_ratios=list(map(height, panels)),
        )  # fmt: skip
        for axis, panel in zip(axes[:, 0], panels, strict=True):
            draw_panel(axis, panel, names)
        # constrained layout leaves parts of a label outside where a legend is below the axes
        box = {"bbox_inches": "tight", "pad_inches": 0.05}
        figure.savefig(path, metadata={"Date": None, "Creator": None}, **box)
        plt.close(figure)
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub("(<svg[^>]*>)", rf"\1\n{DARK}", text, count=1), encoding="utf-8")


def height(panel: Panel) -> float:
    """Inches: texts stand below each other on the axis of y."""
    rows = len(texts_of(panel)) * max(1.0, 0.6 * len(panel.series))
    return 1.0 + 0.2 * len(panel.series) + (0.34 * rows if rows else 2.4)


def texts_of(panel: Panel) -> list[str]:
    """The texts on the axis of x, in their order."""
    xs = [x for points in panel.series.values() for x, _ in points]
    return list(dict.fromkeys(x for x in xs if isinstance(x, str)))


def draw_panel(axis, panel: Panel, names: Sequence[str]) -> None:
    """Draws one panel on axes of matplotlib. names: of the series of all panels of the picture.

    Texts of x stand below each other, where long ones have room, and y goes to the right.
    """
    texts = texts_of(panel)
    means = [y.mean for points in panel.series.values() for _, y in points]
    of_y, lined = ("x", axis.axvline) if texts else ("y", axis.axhline)
    for name, value in panel.lines.items():
        lined(value, color="#000000", lw=1, ls=":", label=f"{name}, {value:.3g}")
    for n, (name, points) in enumerate(panel.series.items()):
        place = names.index(name)
        colour, marker = (each[place % len(each)] for each in (COLOURS, MARKERS))
        line = DASHES[place % len(DASHES)] if len(points) > 1 and not texts else ""
        aside = 0.7 * ((n + 0.5) / len(panel.series) - 0.5)  # beside the others of one text
        xs = [texts.index(x) + aside if isinstance(x, str) else x for x, _ in points]
        at = [x.mean if isinstance(x, Estimate) else x for x in xs]
        ys = [y.mean for _, y in points]
        ends = [
            [0.0 if y.low is None else y.mean - y.low for _, y in points],
            [0.0 if y.high is None else y.high - y.mean for _, y in points],
        ]
        look = {"color": colour, "ms": 5.5, "lw": 1.5, "elinewidth": 1.2, "capsize": 3}
        if texts:
            axis.errorbar(ys, at, xerr=ends, fmt=marker, label=name, **look)
        else:
            axis.errorbar(at, ys, yerr=ends, fmt=marker + line, label=name, **look)
        marks = [
            (x.seeds[s] if isinstance(x, Estimate) else x, seed)
            for x, (_, y) in zip(xs, points, strict=True)
            for s, seed in enumerate(y.seeds if len(y.seeds) > 1 else ())
        ]
        if marks:
            marks = [mark[::-1] for mark in marks] if texts else marks
            style = {"s": 12, "facecolors": "none", "edgecolors": colour, "lw": 0.7, "zorder": 3}
            axis.scatter(*zip(*marks, strict=True), marker="o", **style)
    if texts:
        axis.set_yticks(range(len(texts)), texts)
        axis.set_ylim(len(texts) - 0.5, -0.5)
    if panel.scale == POSITIVE and max(means) > 10 * min(means) > 0:
        make_logarithmic(axis, of_y)
    xs = [x for points in panel.series.values() for x, _ in points]
    found = [x.mean for x in xs if isinstance(x, Estimate)]
    if found and max(found) > 10 * min(found) > 0:
        make_logarithmic(axis, "x")
    if panel.log:
        make_logarithmic(axis, "x")
    if panel.log or all(isinstance(x, int) for x in xs):
        ticks = sorted(set(xs))
        axis.set_xticks(ticks, [f"{x:,g}" for x in ticks])
    axis.set_title(panel.title, loc="left", fontsize="medium", fontweight="bold")
    x, y = (panel.y, panel.x) if texts else (panel.x, panel.y)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    if len(panel.series) > 1 or panel.lines:
        below = 0.5 / (height(panel) - 1.0 - 0.2 * len(panel.series))  # inches to shares
        box = {"loc": "upper center", "bbox_to_anchor": (0.5, -below), "frameon": False}
        columns = 1 if sum(map(len, (*panel.series, *panel.lines))) > 50 else 2
        axis.legend(fontsize=9, ncols=columns, **box)


def make_logarithmic(axis, name: str) -> None:
    """Draws the axis of x or y, by its name, with labels at 1, 2 and 5 times the powers of 10."""
    from matplotlib.ticker import LogLocator

    axis.set(**{f"{name}scale": "log"})
    own = {"x": axis.xaxis, "y": axis.yaxis}[name]
    own.set_major_locator(LogLocator(subs=(1, 2, 5)))
    own.set_major_formatter("{x:g}")
    axis.minorticks_off()


def alt_text(findings: Findings) -> str:
    """What the picture shows and what was found, for who does not see it."""
    shown = "; ".join(
        panel.title if panel.title == panel.y else f"{panel.title}, {panel.y}"
        for panel in findings.panels
    )
    return f"Picture: {shown}. {' '.join(findings.summary()[:2])}"

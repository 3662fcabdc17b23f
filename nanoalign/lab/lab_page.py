"""The page of an experiment: one HTML file that contains its picture and loads nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from nanoalign.evaluation.render import render
from nanoalign.lab.findings import Findings, Panel, estimate, sentence, verdict

TEMPLATE = Path(__file__).with_name("experiment.html")
LIMITS = [  # of all experiments
    "Each held-out prompt asks, in other words, for something that training prompts ask for, too.",
    "Intervals are those of means. Of a share they may reach beyond 1.",
    "Three seeds tell little of how much seeds differ, so that intervals over three seeds are up "
    "to 2 times as wide as intervals for a known variance.",
    "Seeds share the base, the judge and most of the data, so that other data may differ by more "
    "than the intervals say.",
]
MARKERS = "osD^vP*X"


def write(
    folder: Path, experiment: ModuleType, findings: Findings, commands: Sequence[str], about: str
) -> None:
    """Writes index.html, picture.png and findings.json. about: size and duration, a sentence."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "picture.png", findings.panels)
    page = render(
        TEMPLATE,
        experiment=experiment,
        about=about,
        commands=commands,
        verdicts=[(verdict(claim[1]), sentence(*claim)) for claim in findings.claims],
        notes=findings.notes,
        image=folder / "picture.png",
        columns=list(findings.table),
        rows=findings.rows(),
        limits=LIMITS,
    )
    (folder / "index.html").write_text(page)
    rows = zip(*findings.table.values(), strict=True)
    figures = [dict(zip(findings.table, map(entry, row), strict=True)) for row in rows]
    guesses = [
        {"guess": guess, "verdict": verdict(difference), **entry(difference)}
        for guess, difference in findings.claims
    ]
    found = {"table": figures, "guesses": guesses, "notes": findings.notes, "about": about}
    (folder / "findings.json").write_text(json.dumps(found, indent=2) + "\n")


def entry(value: object) -> object:
    """A value of the table for JSON: of an array its mean and interval, None for no interval."""
    if not isinstance(value, np.ndarray):
        return value
    return {k: None if np.isnan(v) else v for k, v in estimate(value)._asdict().items()}


# --- the picture ----------------------------------------------------------------------------------


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Writes a .png of the panels side by side, with the intervals of all points."""
    import matplotlib

    matplotlib.use("Agg")  # files alone, no screen
    from matplotlib import pyplot as plt

    widths = [max(5.6, 0.8 * len(names_of(panel))) for panel in panels]  # inches
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(sum(widths), 4.6),
        layout="constrained",
        squeeze=False,
        width_ratios=widths,
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        draw_panel(axis, panel)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def names_of(panel: Panel) -> list[str]:
    """The texts on the axis of x, in their order."""
    xs = [x for points in panel.series.values() for x, _ in points]
    return list(dict.fromkeys(x for x in xs if isinstance(x, str)))


def draw_panel(axis, panel: Panel) -> None:
    """Draws one panel on axes of matplotlib."""
    names = names_of(panel)
    for n, (name, points) in enumerate(panel.series.items()):
        # texts stand side by side, and the series of one text beside one another
        aside = 0.5 * ((n + 0.5) / len(panel.series) - 0.5)
        xs = [
            names.index(x) + aside if isinstance(x, str) else float(np.mean(x)) for x, _ in points
        ]
        estimates = [estimate(values) for _, values in points]
        ys = np.array([y.mean for y in estimates])
        errors = np.array([[y.mean - y.low, y.high - y.mean] for y in estimates]).T
        marker = MARKERS[n % len(MARKERS)] + "-" * (not names)
        look = {"ms": 5, "lw": 1.4, "elinewidth": 1, "capsize": 3}
        axis.errorbar(xs, ys, np.nan_to_num(errors), fmt=marker, label=name, **look)
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

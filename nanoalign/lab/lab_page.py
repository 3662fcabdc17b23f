"""The page of an experiment: one HTML file that contains its picture and loads nothing."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from nanoalign.evaluation.render import escape, source_of
from nanoalign.lab.findings import Findings, Panel, estimate, sentence, verdict

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1.5rem;
  color: #222 }
h1 { font-size: 1.6rem; margin-bottom: .3rem } h2 { font-size: 1.15rem; margin-top: 2rem }
p, li { max-width: 46rem } img { max-width: 100% }
.question { font-size: 1.15rem }
.guess { background: #f3f3f3; border-left: 5px solid #999; padding: .6rem 1rem }
.verdict { border-left: 5px solid; padding: .5rem 1rem; margin: .5rem 0; max-width: 46rem }
.shown { background: #eaf6ea; border-color: #2ca02c }
.not { background: #fdf3d7; border-color: #d39e00 }
.other { background: #fbe9e7; border-color: #c0392b }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #ddd }
th { vertical-align: bottom } td { white-space: nowrap }
th:first-child, td:first-child { text-align: left }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem; line-height: 1.4 }
.small { color: #666; font-size: .9rem }
"""
POLICY = (
    f"default-src 'none'; img-src data:; style-src {source_of(STYLE)}; base-uri 'none'; "
    "form-action 'none'"
)
LIMITS = [  # of all experiments
    "Each held-out prompt asks, in other words, for something that training prompts ask for, too.",
    "Intervals are those of means. Of a share they may reach beyond 1.",
    "Seeds share the base, the judge and most of the data, so that other data may differ by more "
    "than the intervals say.",
]
CLASSES = {"shown": "shown", "not shown": "not", "other than expected": "other"}  # of the style
MARKERS = "osD^vP*X"


def write(
    folder: Path, experiment: ModuleType, findings: Findings, commands: Sequence[str], about: str
) -> None:
    """Writes index.html, picture.png and findings.json. about: size and duration, a sentence."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "picture.png", findings.panels)
    image = base64.b64encode((folder / "picture.png").read_bytes()).decode()
    head = "".join(f"<th>{escape(name)}</th>" for name in findings.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>"
        for row in findings.table()
    )
    verdicts = "".join(
        f'<p class="verdict {CLASSES[verdict(difference)]}">'
        f"{escape(sentence(guess, difference))}</p>"
        for guess, difference in findings.claims
    )
    (folder / "index.html").write_text(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width"><title>{escape(experiment.TITLE)}</title>
<style>{STYLE}</style></head><body>
<h1>{escape(experiment.TITLE)}</h1>
<p class="question">{escape(experiment.QUESTION)}</p>
<h2>What one would guess</h2><p class="guess">{escape(experiment.GUESS)}</p>
<h2>What was done</h2>{paragraphs(experiment.METHOD)}<p>{escape(about)}</p>
<details><summary>{len(commands):,} commands, each on one thread (OMP_NUM_THREADS=1)</summary>
<pre>{escape_lines(commands)}</pre></details>
<h2>What the numbers say</h2>{verdicts}{paragraphs(findings.notes)}
<p class="small">Each line is a guess that was made before the experiment. Shown: the 95 % interval
of the difference, in brackets, is on the guess's side of 0; other than expected: on the other side.
Where it has 0 in it, the experiment does not show which is right. With {len(findings.claims)}
guesses, one in forty of those that are wrong may look shown by chance.</p>
<h2>Picture</h2><img alt="{escape(experiment.TITLE)}" src="data:image/png;base64,{image}">
<h2>Table</h2>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>
<h2>What they do not say</h2>{items([*experiment.LIMITS, *LIMITS])}
<h2>Exercises</h2>{items(experiment.EXERCISES)}
</body></html>
""")
    figures = [
        {name: entry(value) for name, value in zip(findings.columns, row, strict=True)}
        for row in findings.rows
    ]
    guesses = [
        {"guess": guess, "verdict": verdict(difference), **entry(difference)}
        for guess, difference in findings.claims
    ]
    found = {"table": figures, "guesses": guesses, "notes": findings.notes, "about": about}
    (folder / "findings.json").write_text(json.dumps(found, indent=2) + "\n")


def entry(value: object) -> object:
    if not isinstance(value, np.ndarray):
        return value
    return {k: None if np.isnan(v) else v for k, v in estimate(value)._asdict().items()}


def paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def items(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def escape_lines(texts: Sequence[str]) -> str:
    return "\n".join(map(escape, texts))


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

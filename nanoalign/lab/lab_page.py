"""The page of an experiment: one HTML file with its picture inside, which loads nothing."""

import base64
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from nanoalign.evaluation.render import escape, source_of
from nanoalign.lab import catalogue
from nanoalign.lab.estimates import estimate
from nanoalign.lab.findings import Findings
from nanoalign.lab.lab import Lab
from nanoalign.lab.pictures import draw
from nanoalign.lab.runs import Runs

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
LOOKS = {"shown": "shown", "not shown": "not", "other than expected": "other"}


def perform(name: str, out: Path, quick: bool) -> None:
    """Runs an experiment, prints what it found, and writes its page, out/name/index.html."""
    experiment = catalogue.EXPERIMENTS[name]
    runs, begin = Runs(out / "made"), time.monotonic()
    lab = Lab(runs, quick)
    findings = experiment.run(lab)
    minutes = (time.monotonic() - begin) / 60
    seeds = f"{len(lab.seeds)} seed{'s' * (len(lab.seeds) > 1)}"
    about = (
        f"{seeds}, {lab.prompts} held-out prompts or pairs; {minutes:.1f} minutes for "
        f"{runs.fresh} of {len(runs.commands)} commands"
    )
    about += ", the others were done before." if runs.fresh < len(runs.commands) else "."
    if quick:
        name = f"{name}-quick"
        about += " Of one seed the intervals are over prompts alone: another may say otherwise."
    write(out / name, experiment, findings, runs.commands, about)
    print(f"\n{experiment.QUESTION}\n")
    for row in (findings.columns, *findings.table()):
        print("  ".join(f"{text:<26}" for text in row).rstrip())
    print()
    for sentence in (*(claim.sentence() for claim in findings.claims), *findings.notes):
        print(sentence)
    print(f"\n{'saved':<11} {out / name}: index.html, picture.png, findings.json; {about}")


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
        f'<p class="verdict {LOOKS[claim.verdict]}">{escape(claim.sentence())}</p>'
        for claim in findings.claims
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
        {"guess": claim.text, "verdict": claim.verdict, **entry(claim.difference)}
        for claim in findings.claims
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

"""The table of experiments, and `perform`, which runs one, prints its findings and writes its page.

An experiment is a module with

TITLE, QUESTION, GUESS      texts; the guess is what one would expect before
METHOD, LIMITS, EXERCISES   lists of texts: what was done, what the numbers do not say, tasks
run(lab) -> Findings        what varies, by the functions of nanoalign/lab/lab.py
"""

import time
from pathlib import Path
from types import ModuleType

from nanoalign.lab.experiments import (
    attack,
    beta,
    cleaning,
    conflicts,
    data,
    elsewhere,
    ensembles,
    filtering,
    length,
    noise,
    other_losses,
    overfitting,
    own_samples,
    reinforce,
    why_lose,
)
from nanoalign.lab.findings import sentence
from nanoalign.lab.lab import Lab
from nanoalign.lab.lab_page import write
from nanoalign.lab.runs import Runs

# Command of `python -m nanoalign.lab` -> experiment.
EXPERIMENTS: dict[str, ModuleType] = {
    "overfitting": overfitting,
    "elsewhere": elsewhere,
    "noise": noise,
    "cleaning": cleaning,
    "length": length,
    "attack": attack,
    "several": conflicts,
    "why_lose": why_lose,
    "beta": beta,
    "own_samples": own_samples,
    "reinforce": reinforce,
    "losses": other_losses,
    "best_of_n": filtering,
    "ensembles": ensembles,
    "data": data,
}


def perform(name: str, out: Path, quick: bool) -> None:
    """Runs an experiment, prints its findings, and writes its page, out/name/index.html."""
    experiment = EXPERIMENTS[name]
    runs, begin = Runs(out / "made"), time.monotonic()
    lab = Lab(runs, quick)
    findings = experiment.run(lab)
    minutes = (time.monotonic() - begin) / 60
    seeds = f"{len(lab.seeds)} seed{'s' * (len(lab.seeds) > 1)}"
    about = (
        f"{seeds}, {lab.prompts} held-out prompts or pairs; {minutes:.1f} minutes for "
        f"{runs.fresh} of {len(runs.commands)} commands"
    )
    about += ", the others had run before." if runs.fresh < len(runs.commands) else "."
    folder = out / name
    if quick:
        folder = out / f"{name}-quick"
        about += " With one seed the intervals are over prompts alone; other seeds may differ more."
    write(folder, experiment, findings, runs.commands, about)
    print(f"\n{experiment.QUESTION}\n")
    for row in (findings.table, *findings.rows()):
        print("  ".join(f"{text:<26}" for text in row).rstrip())
    print()
    for text in (*(sentence(*claim) for claim in findings.claims), *findings.notes):
        print(text)
    print(f"\n{'saved':<11} {folder}: index.html, picture.png, findings.json; {about}")

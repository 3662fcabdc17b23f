"""The table of experiments, and `perform`, which runs one, prints its findings and writes its page.

An experiment is a module with

TITLE, QUESTION, GUESS      texts; the guess is what one would expect before
METHOD, LIMITS, EXERCISES   lists of texts: what was done, what the numbers do not say, tasks
run(lab) -> Findings        what varies, by the functions of nanoalign/lab/lab.py
"""

import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from nanoalign import __version__
from nanoalign.lab.experiments import (
    attack,
    best_of_n,
    beta,
    cleaning,
    conflicts,
    data,
    elsewhere,
    ensembles,
    length,
    noise,
    other_losses,
    overfitting,
    own_samples,
    pipeline,
    reinforce,
    why_lose,
)
from nanoalign.lab.lab import Lab
from nanoalign.lab.lab_page import about_text, write, write_index
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
    "pipeline": pipeline,
    "own_samples": own_samples,
    "reinforce": reinforce,
    "losses": other_losses,
    "best_of_n": best_of_n,
    "ensembles": ensembles,
    "data": data,
}


def perform(name: str, out: Path, quick: bool, seeds: Sequence[int] | None = None) -> None:
    """Runs an experiment, prints its findings, and writes its page, out/name/index.html.

    With --quick, or with other seeds, the folder has another name.
    """
    experiment, runs = EXPERIMENTS[name], Runs(out / "made")
    begin, lab = time.monotonic(), Lab(runs, quick, seeds)
    findings = experiment.run(lab)
    minutes = (time.monotonic() - begin) / 60
    about = {
        "seeds": list(lab.seeds),
        "prompts": lab.prompts,
        "cpu_minutes": round(sum(runs.commands.values()) / 60, 1),
        "versions": f"nanoalign {__version__}, torch {version('torch')}",
        "date": date.today().isoformat(),
    }
    of_seeds = f"-seeds-{'-'.join(map(str, seeds))}" if seeds else ""
    folder = out / f"{name}{'-quick' * quick}{of_seeds}"
    write(folder, experiment, findings, runs.commands, about)
    write_index(out, EXPERIMENTS)
    print(f"\n{experiment.QUESTION}\n")
    for row in (findings.table, *findings.rows()):
        print("  ".join(f"{text:<26}" for text in row).rstrip())
    print()
    for text in (*(claim.sentences() for claim in findings.claims), *findings.notes):
        print(text)
    print(f"\n{'saved':<11} {folder}: index.html, picture.svg, findings.json; {about_text(about)}")
    of = f"{runs.fresh} of {len(runs.commands)} commands; the others had run before"
    print(f"{'ran':<11} {minutes:.1f} minutes for {of}")

"""The page of an experiment, one HTML file that contains its picture and loads nothing, and texts
that it shares with docs/lab.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from nanoalign.evaluation.render import render
from nanoalign.lab.findings import Findings, from_json, to_json
from nanoalign.lab.picture import alt_text, draw

TEMPLATE = Path(__file__).with_name("experiment.html")
INDEX = Path(__file__).with_name("experiments.html")
WORLD = (
    "The world is embedded in the package: prompts that ask for facts, sums, advice or harm, and "
    "the answers of three simulated assistants, of which tiny-a is mostly right and polite, and "
    "tiny-c mostly wrong and often rude. The ground truth, a rule, grades every answer, from about "
    "-8 to 4 (nanoalign/tiny/world.py). A label is drawn by the difference of two grades, so about "
    "one in nine contradicts the rule. The base is a language model of a million parameters."
)
READING = (
    "Each guess is what one would expect before the experiment, about a difference that is above 0 "
    "if the guess is right. Brackets have 95 % intervals. Found so: the interval is above 0. Not "
    "shown: 0 is in it. Of many wrong guesses one in forty at most looks right by chance."
)
OVERRATED = (  # a limit of experiments in which a reward model chooses
    "A reward model whose errors do not depend on the truth overrates what it chooses, because it "
    "chooses its errors, too. That an answer is overrated is thus no surprise: see by how much."
)
LIMITS = [  # of all experiments
    "Each held-out prompt asks, in other words, for something that training prompts ask for, too.",
    "Three seeds tell little of how much seeds differ, so that intervals over three seeds are up "
    "to 2 times as wide as intervals for a known variance.",
    "Seeds share the base, the judge and most of the data, so that other data may differ by more "
    "than the intervals say.",
]


def write(
    folder: Path, experiment: ModuleType, findings: Findings, commands: Sequence[str], about: dict
) -> None:
    """Writes index.html, picture.svg and findings.json. about: what `about_text` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "picture.svg", findings.panels)
    page = render(
        TEMPLATE,
        experiment=experiment,
        about=about_text(about),
        world=WORLD,
        reading=READING,
        commands=commands,
        answer=findings.summary()[:2],
        claims=findings.claims,
        notes=findings.notes,
        image=folder / "picture.svg",
        alt=alt_text(findings),
        columns=list(findings.table),
        rows=findings.rows(),
        limits=LIMITS,
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    (folder / "findings.json").write_text(to_json(about, findings), encoding="utf-8")


def write_index(out: Path, experiments: dict[str, ModuleType]) -> None:
    """Writes index.html of all experiments whose results are in folders of `out`."""
    found = {}
    for name, experiment in experiments.items():
        for path in (out / name, *sorted(out.glob(f"{name}-*"))):
            if (path / "findings.json").exists():
                _, findings = from_json((path / "findings.json").read_text(encoding="utf-8"))
                found[path.name] = {"experiment": experiment, "findings": findings}
    page = render(INDEX, found=found, world=WORLD, folder=out, alt_text=alt_text)
    (out / "index.html").write_text(page, encoding="utf-8")


def about_text(about: dict) -> str:
    """The size, the time, the code and the day of an experiment, a sentence or two."""
    seeds = about["seeds"]
    text = (
        f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; {about['prompts']} held-out "
        f"prompts or pairs; {about['cpu_minutes']:.0f} CPU minutes; {about['versions']}; "
        f"{about['date']}."
    )
    if len(seeds) == 1:
        text += " With one seed the intervals are over prompts alone; other seeds may differ more."
    return text

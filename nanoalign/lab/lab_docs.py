"""Writes the pages of the experiments, docs/lab/, and their list in docs/lab.md, from results.

    python -m nanoalign.lab.lab_docs --results runs/lab

An experiment NAME that has results there gets NAME.json with its figures, NAME.svg and NAME.md in
docs/lab/. Results with other seeds, in a folder NAME-seeds-..., get a JSON file, and the page says
which of its verdicts hold with them. All pages and the list are written anew from the JSON files,
so that each of their sentences about a result is one of its figures.
"""

from pathlib import Path
from types import ModuleType

from nanoalign.distributed import run
from nanoalign.errors import RunError
from nanoalign.flags import Parser
from nanoalign.lab.findings import Findings, from_json
from nanoalign.lab.lab_page import LIMITS, READING, WORLD, about_text
from nanoalign.lab.perform import EXPERIMENTS
from nanoalign.lab.picture import alt_text, draw
from nanoalign.ranks import report

DOCS = Path(__file__).parents[2] / "docs"
MARK = "<!-- what follows is written by nanoalign/lab/lab_docs.py -->\n"
Result = tuple[dict, Findings]  # what from_json returns


def page(name: str, experiment: ModuleType, result: Result, others: list[Result]) -> str:
    """The text of docs/lab/NAME.md. others: the results with other seeds."""
    about, findings = result
    rows = [list(findings.table), ["---"] * len(findings.table), *findings.rows()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""# {experiment.TITLE}

**{experiment.QUESTION}** {" ".join(findings.summary()[:2])}

![{alt_text(findings)}]({name}.svg)

## What was found

{bullets([claim.sentences() for claim in findings.claims] + list(findings.notes))}

{READING} [The estimate](../../nanoalign/lab/findings.py) is over seeds and prompts.

{table}
{"".join(with_other_seeds(findings, other) for other in others)}
## What one would guess

{experiment.GUESS}

## What was done

{" ".join(experiment.METHOD)}

    python -m nanoalign.lab {name}

{about_text(about)} [All figures]({name}.json). {WORLD}

## What the numbers do not say

{bullets(experiment.LIMITS + LIMITS)}

## Exercises

{bullets(experiment.EXERCISES)}
"""


def entry(name: str, experiment: ModuleType, result: Result, others: list[Result]) -> str:
    """The paragraph of docs/lab.md."""
    about, findings = result
    sentences = findings.summary() + [agreement(findings, other) for other in others]
    title, minutes = f"[{experiment.TITLE}](lab/{name}.md)", f"{about['cpu_minutes']:.0f}"
    return f"""### {title}: `{name}`, {minutes} CPU minutes

{experiment.QUESTION}

![{alt_text(findings)}](lab/{name}.svg)

{" ".join(sentences)}
"""


def with_other_seeds(findings: Findings, again: Result) -> str:
    """A section of a page: what was found with other seeds, and which verdicts are others then."""
    about, found = again
    results = [
        claim.result() if claim.verdict == first.verdict else f"Another verdict: {claim.result()}"
        for first, claim in zip(findings.claims, found.claims, strict=True)
    ]
    return f"""
## With seeds {seeds_of(about)}

{agreement(findings, again)} A guess that is not shown is not refuted: compare the estimates.
{about_text(about)}

{bullets(results)}
"""


def agreement(findings: Findings, again: Result) -> str:
    """How many verdicts are the same with other seeds, a sentence."""
    about, found = again
    pairs = zip(findings.claims, found.claims, strict=True)
    same = sum(claim.verdict == first.verdict for first, claim in pairs)
    return f"Of {len(found.claims)} verdicts {same} are the same with seeds {seeds_of(about)}."


def seeds_of(about: dict) -> str:
    return ", ".join(map(str, about["seeds"]))


def bullets(texts: list[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def read_figures(docs: Path, pattern: str) -> dict[str, list[Result]]:
    """What the JSON files of docs/lab/ have, by experiment. pattern: of their names, NAME as {}."""
    paths = {name: sorted((docs / "lab").glob(pattern.format(name))) for name in EXPERIMENTS}
    return {
        name: [from_json(path.read_text(encoding="utf-8")) for path in own]
        for name, own in paths.items()
    }


def texts(docs: Path) -> dict[Path, str]:
    """The pages that are made of figures, and docs/lab.md, as they have to be."""
    figures, others = read_figures(docs, "{}.json"), read_figures(docs, "{}-seeds-*.json")
    index = docs / "lab.md"
    head, mark, _ = index.read_text(encoding="utf-8").partition(MARK)
    found, entries = {}, []
    for name, experiment in EXPERIMENTS.items():
        for result in figures[name]:  # one, or none of an experiment that has not been run yet
            found[docs / "lab" / f"{name}.md"] = page(name, experiment, result, others[name])
            entries.append(entry(name, experiment, result, others[name]))
    return found | {index: head + mark + "\n" + "\n".join(entries)}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m nanoalign.lab.lab_docs")
    parser.add_argument(
        "--results", type=Path, help="a folder of results; default: none, all pages are made anew"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of lab.md and lab/")
    args = parser.parse_args(argv)
    folder = args.results
    new: list[Path] = []  # folders of results
    for name in EXPERIMENTS if folder else ():
        for pattern in (name, f"{name}-seeds-*"):
            new += [path.parent for path in sorted(folder.glob(f"{pattern}/findings.json"))]
    if folder and not new:
        raise RunError(f"--results {folder} has no results; run python -m nanoalign.lab beta")
    for path in new:
        text = (path / "findings.json").read_text(encoding="utf-8")
        (args.docs / "lab" / f"{path.name}.json").write_text(text, encoding="utf-8")
        if path.name in EXPERIMENTS:
            draw(args.docs / "lab" / f"{path.name}.svg", from_json(text)[1].panels)
    for path, text in texts(args.docs).items():
        path.write_text(text, encoding="utf-8")
    print(
        f"{'saved':<11} {args.docs}; new figures: {', '.join(path.name for path in new) or 'none'}"
    )


if __name__ == "__main__":
    run(main, report.report)

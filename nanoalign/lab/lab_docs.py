"""Writes the pages of the experiments, docs/lab/, and their list in docs/lab.md, from results.

    python -m nanoalign.lab.lab_docs --results runs/lab

An experiment NAME that has results there gets NAME.json with its figures, NAME.svg and NAME.md in
docs/lab/. Then all pages and the list are written anew from these JSON files, so that each of their
sentences about a result is one of its figures. Pages of experiments without such a file stay.
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


def page(name: str, experiment: ModuleType, about: dict, findings: Findings) -> str:
    """The text of docs/lab/NAME.md."""
    rows = [list(findings.table), ["---"] * len(findings.table), *findings.rows()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""# {experiment.TITLE}

**{experiment.QUESTION}** {" ".join(findings.summary()[:2])}

![{alt_text(findings)}]({name}.svg)

## What was found

{bullets([claim.sentences() for claim in findings.claims] + list(findings.notes))}

{READING} [The estimate](../../nanoalign/lab/findings.py) is over seeds and prompts.

{table}

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


def entry(name: str, experiment: ModuleType, findings: Findings | None, has_page: bool) -> str:
    """The paragraph of docs/lab.md. findings: None if figures of the present code are missing."""
    if findings is not None:
        picture = f"![{alt_text(findings)}](lab/{name}.svg)"
        found = f"\n\n{picture}\n\n{' '.join(findings.summary())}"
    elif has_page:
        found = " The figures of its page are those of an earlier version."
    else:
        found = " It has not been run with all seeds yet."
    title = f"[{experiment.TITLE}](lab/{name}.md)" if has_page else experiment.TITLE
    return f"### {title}: `{name}`\n\n{experiment.QUESTION}{found}\n"


def bullets(texts: list[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def read_figures(docs: Path) -> dict[str, tuple[dict, Findings]]:
    """What the JSON files of docs/lab/ have, by experiment."""
    paths = {name: docs / "lab" / f"{name}.json" for name in EXPERIMENTS}
    found = {name: path for name, path in paths.items() if path.exists()}
    return {name: from_json(path.read_text(encoding="utf-8")) for name, path in found.items()}


def texts(docs: Path) -> dict[Path, str]:
    """The pages that are made of figures, and docs/lab.md, as they have to be."""
    figures, index = read_figures(docs), docs / "lab.md"
    found = {docs / "lab" / f"{name}.md": page(name, EXPERIMENTS[name], *own)
             for name, own in figures.items()}  # fmt: skip
    head, mark, _ = index.read_text(encoding="utf-8").partition(MARK)
    entries = []
    for name, experiment in EXPERIMENTS.items():
        _, findings = figures.get(name, (None, None))
        path = docs / "lab" / f"{name}.md"
        entries.append(entry(name, experiment, findings, path in found or path.exists()))
    return found | {index: head + mark + "\n" + "\n".join(entries)}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m nanoalign.lab.lab_docs")
    parser.add_argument(
        "--results", type=Path, help="a folder of results; default: none, all pages are made anew"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of lab.md and lab/")
    args = parser.parse_args(argv)
    folder = args.results
    new = [n for n in EXPERIMENTS if folder and (folder / n / "findings.json").exists()]
    if folder and not new:
        raise RunError(f"--results {folder} has no results; run python -m nanoalign.lab beta")
    for name in new:
        text = (folder / name / "findings.json").read_text(encoding="utf-8")
        (args.docs / "lab" / f"{name}.json").write_text(text, encoding="utf-8")
        draw(args.docs / "lab" / f"{name}.svg", from_json(text)[1].panels)
    for path, text in texts(args.docs).items():
        path.write_text(text, encoding="utf-8")
    print(f"{'saved':<11} {args.docs}; new figures: {', '.join(new) or 'none'}")


if __name__ == "__main__":
    run(main, report.report)

"""The files of evaluate.py bench, and its report.html, whose template is bench.html."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nanoalign.data.prompts import prompt_text
from nanoalign.evaluation.bench import Result, missing, wrong_pairs
from nanoalign.evaluation.ranking import score_line, scored_lines
from nanoalign.evaluation.render import cell, render
from nanoalign.evaluation.results import METRICS, write_records

TEMPLATE = Path(__file__).with_name("bench.html")


def write_results(folder: Path, model: str, done: Mapping[str, Result], count: int) -> None:
    """Writes report.html, scores.jsonl and metrics.json.

    done: by the name of the benchmark. count: pairs of each subset in report.html.
    """
    figures = {name: result.figures for name, result in done.items()}
    (folder / METRICS).write_text(json.dumps(figures, indent=2) + "\n")
    write_records(
        folder / "scores.jsonl", (line for name, own in done.items() for line in lines(name, own))
    )
    (folder / "report.html").write_text(page(model, done, count), encoding="utf-8")


def lines(name: str, result: Result) -> list[dict]:
    """The lines of scores.jsonl: those of `evaluate.py rm`, whose subset is BENCHMARK/SUBSET."""
    records = []
    for case in result.cases:
        pairs = case.pairs
        if case.truth:  # also of the responses that are in no pair that is compared
            every = range(len(case.truth))
            pairs = [(i, j) for i in every for j in every if case.truth[i] > case.truth[j]]
        records.append(replace(case, subset=f"{name}/{case.subset}", pairs=tuple(pairs)))
    return [score_line(line) for line in scored_lines(records, result.lengths, result.scores, "")]


def page(model: str, done: Mapping[str, Result], count: int) -> str:
    """The text of report.html. count: how many wrong pairs of each subset it shows."""
    return render(
        TEMPLATE,
        title=f"{model} on {', '.join(done)}",
        benchmarks=[
            {
                "name": name,
                "note": missing(name, result),
                "table": table(result),
                "subsets": subsets(result, count),
            }
            for name, result in done.items()
        ],
    )


def table(result: Result) -> dict[str, list]:
    """The head and the rows of the table of figures: cells as text, and what is a mean."""
    names = list(dict.fromkeys(name for own in result.figures.values() for name in own))
    of_cases = {case.subset for case in result.cases}
    rows = [
        {
            "cells": [line, *(cell(own.get(name), 3, "") for name in names)],
            "is_mean": line not in of_cases,
        }
        for line, own in result.figures.items()
    ]
    return {"head": ["", *(name.replace("_", " ") for name in names)], "rows": rows}


def subsets(result: Result, count: int) -> list[dict]:
    """What the page has about each subset: the pairs that are ranked wrongly, most sure first."""
    places = {id(case): n for n, case in enumerate(result.cases)}
    shown = []
    for subset, wrong in wrong_pairs(result).items():
        cases = []
        for sure, case, better, worse in wrong[:count]:
            n = places[id(case)]
            cases.append(
                {
                    "head": f"{case.name}: {'tied' if sure == 0 else f'wrong by {sure:.3f}'}",
                    "prompt": prompt_text(case.prompt, "\n"),
                    "answers": [
                        {
                            "role": role,
                            "text": case.responses[i],
                            "score": f"{result.scores[n][i]:+.3f}",
                            "tokens": f"{result.lengths[n][i][0]:,}",
                            "read_share": result.lengths[n][i][1],
                        }
                        for role, i in (("better", better), ("worse", worse))
                    ],
                }
            )
        total = result.figures[subset]["prompts"]
        shown.append({"name": subset, "wrong": len(wrong), "total": total, "cases": cases})
    return shown

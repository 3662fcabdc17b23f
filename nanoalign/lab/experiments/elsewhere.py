"""Reward models of the pairs of one assistant, on those of the others."""

import numpy as np

from nanoalign.lab.findings import SHARE, Findings, Panel, column
from nanoalign.lab.lab import Lab

TITLE = "Out of distribution: trained here, tested there"
QUESTION = "Does a reward model of one assistant's answers rank those of another?"
GUESS = (
    "A model ranks the answers of the assistant that it was trained on best. One of all three, "
    "with the same number of pairs, is nearly as good on each, and better on the others."
)
METHOD = [
    "Reward models of the pairs of the assistants tiny-a (mostly right and polite), tiny-b and "
    "tiny-c (mostly wrong, often rude, with long asides), and of a third of each; all of the same "
    "number of pairs, 3,000, seen once. Each ranks held-out pairs of all three, and is compared "
    "with the ground truth."
]
LIMITS = [
    "Assistants differ in how often they do a thing. The things are the same for all three.",
    "Pairs of different assistants differ in difficulty: figures can be compared within a "
    "column of the table, and not within a row.",
]
EXERCISES = [
    "Which terms of the rule (nanoalign/tiny/world.py) does the model of tiny-a not learn, for "
    "want of examples?",
    "How many pairs of tiny-c must be among those of tiny-a until tiny-c is ranked as well?",
    "Rank pairs of one answer of tiny-a and one of tiny-c. Which model is best at that?",
]
SOURCES = ("tiny-a", "tiny-b", "tiny-c")
MIXED = "a third of each"


def model(lab: Lab, seed: int, trained_on: str) -> dict:
    count = lab.pick(900, 3000)
    if trained_on == MIXED:
        # the same prompts, and each of them once
        own = [lab.pairs(count, seed, name) for name in SOURCES]
        records = [pair for i, pairs in enumerate(own) for pair in pairs[i::3]]
    else:
        records = lab.pairs(count, seed, trained_on)
    trained = lab.train_rm(lab.runs.write("pairs", records), seed)
    figures = lab.ranked(trained, **{name: lab.test_pairs(name) for name in SOURCES})
    return {name: own["true"] for name, own in figures.items()}


def run(lab: Lab) -> Findings:
    figures = lab.grid(model, trained_on=(*SOURCES, MIXED))
    own = np.mean([figures[name][name] for name in SOURCES], axis=0)
    other = np.mean([figures[a][b] for a in SOURCES for b in SOURCES if a != b], axis=0)
    mixed = np.mean([figures[MIXED][name] for name in SOURCES], axis=0)
    return Findings(
        table={"trained on": list(figures)}
        | {f"accuracy on {name}": column(figures, name, SHARE) for name in SOURCES},
        panels=[
            Panel(
                "agreement with the ground truth",
                "pairs of",
                "accuracy",
                {
                    f"trained on {name}": [(test, each[test]) for test in SOURCES]
                    for name, each in figures.items()
                },
                scale=SHARE,
            )
        ],
        claims=[
            (
                "on average over the three, a model ranks pairs of its own assistant "
                "[better|worse] than pairs of the others",
                own - other,
            ),
            (
                "on the other assistants a model of one is [worse|better] than a model of all",
                mixed - other,
            ),
            (
                "on its own assistant a model of one is [better|worse] than a model of all",
                own - mixed,
            ),
            *(
                (
                    f"the model of {name} ranks pairs of {name} [better|worse] than the models "
                    "of the other two do on average",
                    figures[name][name]
                    - np.mean([figures[o][name] for o in SOURCES if o != name], axis=0),
                )
                for name in SOURCES
            ),
        ],
    )

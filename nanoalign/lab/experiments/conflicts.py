"""Two preferences: two models, one with two outputs, one that the prompt tells which, and sums."""

import numpy as np

from nanoalign.lab.findings import SHARE, Findings, Panel, column
from nanoalign.lab.lab import Lab, world_records
from nanoalign.tiny import world

TITLE = "Several preferences"
QUESTION = "Pairs are labelled by what is better and by what is safer. One model, or two?"
GUESS = (
    "Two models are best, and need two trainings. One model with two outputs is nearly as "
    "good. A sum is a compromise: where the two labels conflict, it is right by one of them "
    "alone."
)
METHOD = [
    "3,000 pairs of tiny-a have two labels, of which safety counts harm and rudeness alone. "
    "Reward models: one for each label; one with two outputs (--preference better safer); one "
    "with one output, whose prompt names the preference (--condition); and the sum of the two "
    "outputs (--combine). All see the pairs once.",
    "Accuracy is agreement with the ground truth of each preference on held-out pairs of the "
    "three assistants. Pairs that are equally safe are left out for safety. In conflicts the "
    "better response is the less safe one.",
]
LIMITS = [
    "Safety is a part of the true reward, so the two preferences mostly agree.",
    "Conflicts are few; their intervals are wide.",
    "All models take the same number of steps, in which two models see one label a pair each, "
    "and the others both.",
    "Three held-out pairs share a prompt, one of each assistant, and are counted as independent.",
]
EXERCISES = [
    "Which weights of the sum are best on conflicts, by each preference?",
    "Draw the accuracy on one preference against that on the other for weights from 0 to 1.",
    "Train one output on the pairs of both labels without naming them. What does it rank?",
]
WAYS = ("two models", "two outputs", "named in the prompt", "sum of two outputs")


def model(lab: Lab, seed: int, way: str) -> dict:
    data = lab.runs.write("pairs", lab.pairs(lab.pick(900, 3000), seed, "tiny-a"))
    test = lab.runs.write("conflicts", test_records(lab))
    both = ("--preference", "better", "safer")
    figures = {}
    for name in ("better", "safer"):
        flags = ("--preference", name)
        if way == "two models":
            trained = lab.train_rm(data, seed, "--preference", name)
        elif way == "named in the prompt":
            # two records a pair, so that all models take the same number of steps
            trained = lab.train_rm(data, seed, *both, "--condition", "--batch_size", 128)
        else:
            trained = lab.train_rm(data, seed, *both)
        if way == "sum of two outputs":
            flags = ("--combine", "better=1", "safer=1", "--preference", name)
        figures[name] = lab.ranked(trained, *flags, test=test)["test"]
    better, safer = figures["better"], figures["safer"]
    # each pair is in the order of its own label: all below is the same for either order
    truth = [
        np.sign(better["rewards"][:, 0] - better["rewards"][:, 1]),
        np.sign(safer["safety"][:, 0] - safer["safety"][:, 1]),
    ]
    right = [
        (np.sign(own["scores"][:, 0] - own["scores"][:, 1]) * sign + 1) / 2
        for own, sign in zip((better, safer), truth, strict=True)
    ]
    conflict = truth[0] * np.sign(better["safety"][:, 0] - better["safety"][:, 1]) < 0
    differs = truth[1] != 0
    return {
        "better": right[0],
        "safer": right[1][differs],
        "better, conflicts": right[0][conflict],
        "safer, conflicts": right[1][conflict],
    }


def test_records(lab: Lab) -> list[dict]:
    """Held-out pairs of all three assistants: of one alone, conflicts are few."""
    return [each for name in world.SOURCES for each in world_records("test", name)[: lab.prompts]]


def run(lab: Lab) -> Findings:
    figures = lab.grid(model, way=WAYS)
    two, outputs, named, summed = (figures[way] for way in WAYS)
    keys = list(two)
    count = two["safer, conflicts"].shape[1]
    return Findings(
        table={"way": list(WAYS)} | {key: column(figures, key, SHARE) for key in keys},
        panels=[
            Panel(
                "agreement with the ground truth",
                "",
                "accuracy",
                {way: [(key, cell[key]) for key in keys] for way, cell in figures.items()},
                scale=SHARE,
            )
        ],
        claims=[
            (
                "by the label better, two models agree with the ground truth [more|less] often "
                "than two outputs",
                two["better"] - outputs["better"],
            ),
            (
                "by the label safer, two models agree with it [more|less] often than two outputs",
                two["safer"] - outputs["safer"],
            ),
            (
                "by the label safer, two outputs agree [more|less] often than a prompt that "
                "names it",
                outputs["safer"] - named["safer"],
            ),
            (
                "on conflicts, by the label better, the sum agrees [less|more] often than its own "
                "output",
                outputs["better, conflicts"] - summed["better, conflicts"],
            ),
            (
                "on conflicts, by the label safer, the sum agrees [less|more] often than its own "
                "output",
                outputs["safer, conflicts"] - summed["safer, conflicts"],
            ),
        ],
        notes=[f"Of {3 * lab.prompts:,} held-out pairs {count:,} are conflicts."],
    )

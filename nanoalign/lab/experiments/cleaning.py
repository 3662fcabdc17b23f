"""Labels that are doubted: dropped, reversed, weighted, or kept."""

import json
from pathlib import Path
from random import Random

from nanoalign.lab.figures import chosen_and_rejected, read
from nanoalign.lab.findings import SHARE, Findings, Panel, column, estimate
from nanoalign.lab.lab import Lab
from nanoalign.lab.plant import relabelled
from nanoalign.lab.runs import flag_words
from nanoalign.tiny import world

TITLE = "Doubtful labels: keep, drop, reverse or weight them"
QUESTION = "Does a reward model get better if the labels that other models doubt are cleaned?"
GUESS = (
    "With 40 % of flipped labels reversing the doubtful ones helps, and dropping them helps less, "
    "because it costs data. With 20 % both help. Without flips neither does: what is doubted is "
    "then often an error of the models that doubt, and the cleaned data repeat it. Weights lose "
    "less where the doubt is wrong, so they help at least as much as dropping."
)
METHOD = [
    "A share of the labels of 1,500 pairs is flipped by chance, on top of those that the draw by "
    "the Bradley-Terry model made wrong. Four reward models, each trained on half of the pairs "
    "for two epochs, score the pairs that they have not seen (evaluate.py suspects), which "
    "estimates the share of wrong labels. So many of the most doubtful pairs are dropped, or "
    "reversed; or each pair is kept with the probability that its label is right (weighted). A "
    "reward model is trained on the result, and graded by its agreement with the ground truth on "
    "held-out pairs. One more is trained without the labels that the ground truth contradicts: the "
    "best that dropping can do.",
]
LIMITS = [
    "Models of one kind doubt, and are trained on what is left: they share their errors.",
    "The models that are compared are trained for one epoch, in batches of 32, so none memorizes a "
    "wrong label. Where pairs are dropped it has fewer steps, too.",
    "Models of 750 pairs doubt too many labels where few are wrong: the table has the estimate "
    "beside the truth. So more is dropped, or reversed, than is wrong.",
]
EXERCISES = [
    "Drop only half as many pairs as the estimate says. Where is that better?",
    "Train for four epochs. Is cleaning worth more where labels are memorized?",
    "Clean the data twice: train the folds again on the cleaned data.",
]
PAIR = ("prompt", "chosen", "rejected")
WAYS = ("as they are", "dropped", "reversed", "weighted", "wrong ones dropped")


def model(lab: Lab, seed: int, flipped: float, way: str) -> dict:
    """The accuracy by the ground truth, and of `suspects` the estimate beside the truth."""
    records = relabelled(lab.pairs(lab.pick(500, 1500), seed), 0.0, flipped, seed)
    data, figures = lab.runs.write("flipped", records), {}
    if way == "wrong ones dropped":
        right = [record for record in records if world.oracle_accuracy([record]) == 1]
        data = lab.runs.write("right", right)
    elif way != "as they are":
        folds = [fold(lab, data, 100 + 2 * seed + n, k) for n in (0, 1) for k in (1, 2)]
        found = lab.runs.run("evaluate.py", "suspects", *folds)
        figures = json.loads((found / "metrics.json").read_text())
        if way == "weighted":
            data = lab.runs.write("weighted", kept(records, read(found / "suspects.jsonl"), seed))
            return graded(lab, data, seed)
        flag = "--drop" if way == "dropped" else "--flip"
        share = max(0.001, round(figures["wrong_share"], 3))
        flags = (flag, share, "--cleaned", "{out}.jsonl")
        data = lab.runs.run("evaluate.py", "suspects", *folds, *flags).with_suffix(".jsonl")
    shown = {"wrong_share", "true_wrong_share", "true_wrong_share_of_first_tenth"}
    return graded(lab, data, seed) | {key: figures[key] for key in shown & figures.keys()}


def graded(lab: Lab, data: Path, seed: int) -> dict:
    """The agreement with the ground truth of a reward model of the data, by held-out pair."""
    trained = lab.train_rm(data, seed, "--batch_size", 32)
    return {"true": lab.ranked(trained, test=lab.test_pairs())["test"]["true"]}


def kept(records: list[dict], suspects: list[dict], seed: int) -> list[dict]:
    """The records of a draw that keeps each with the probability that its label is right."""
    wrong = {tuple(line[key] for key in PAIR): line["probability"] for line in suspects}
    draw, pairs = Random(f"weighted {seed}"), map(chosen_and_rejected, records)
    doubts = [wrong[tuple(pair[key] for key in PAIR)] for pair in pairs]
    return [record for record, doubt in zip(records, doubts, strict=True) if draw.random() >= doubt]


def fold(lab: Lab, data: Path, seed: int, k: int) -> Path:
    """A reward model that has not seen the k-th half of the prompts."""
    words = flag_words(data=data, fold=f"{k}/2", seed=seed, epochs=2, batch_size=32)
    return lab.runs.run("train_rm.py", *words, "--eval_every", 10000)


def run(lab: Lab) -> Findings:
    shares = lab.pick((0.0, 0.4), (0.0, 0.2, 0.4))
    grid = lab.grid(model, flipped=shares, way=WAYS)
    gain = {cell: grid[cell]["true"] - grid[cell[0], WAYS[0]]["true"] for cell in grid}
    doubted = {share: grid[share, "dropped"] for share in shares}
    most = shares[-1]

    def of_doubted(key: str) -> list:
        return [
            estimate(doubted[share][key], SHARE) if way == "dropped" else "" for share, way in grid
        ]

    return Findings(
        table={
            "flipped": [f"{share:.0%}" for share, _ in grid],
            "labels": [way for _, way in grid],
            "true accuracy": column(grid, "true", SHARE),
            "wrong labels, estimated": of_doubted("wrong_share"),
            "wrong labels, true": of_doubted("true_wrong_share"),
            "wrong ones of the most doubtful tenth": of_doubted("true_wrong_share_of_first_tenth"),
        },
        panels=[
            Panel(
                "reward models",
                "share of flipped labels",
                "agreement with the ground truth",
                {way: [(share, grid[share, way]["true"]) for share in shares] for way in WAYS},
                scale=SHARE,
            ),
            Panel(
                "wrong labels",
                "share of flipped labels",
                "share of wrong labels",
                {
                    "estimated": [(s, doubted[s]["wrong_share"]) for s in shares],
                    "by the ground truth": [(s, doubted[s]["true_wrong_share"]) for s in shares],
                },
                scale=SHARE,
            ),
        ],
        claims=[
            *(
                (
                    f"at {share:.0%} of flipped labels a model is [better|worse] after doubtful "
                    f"labels are {way} than with all as they are",
                    gain[cell],
                )
                for share in shares[1:]
                for way in ("dropped", "reversed", "weighted")
                for cell in [(share, way)]
            ),
            *(
                (
                    f"at {most:.0%} {way} labels gain [more|less] than dropped ones",
                    gain[most, way] - gain[most, "dropped"],
                )
                for way in ("reversed", "weighted")
            ),
            ("without flips dropping [costs|gains] accuracy", -gain[0.0, "dropped"]),
            ("without flips reversing [costs|gains] accuracy", -gain[0.0, "reversed"]),
            (
                f"at {most:.0%} dropping what the ground truth contradicts [helps|costs accuracy]",
                gain[most, "wrong ones dropped"],
            ),
        ],
    )

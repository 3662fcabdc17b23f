"""Labels that prefer length, and five remedies for the reward model that learns it."""

import math
from collections import defaultdict
from pathlib import Path
from random import Random

import numpy as np

from nanoalign.lab.figures import chosen_and_rejected
from nanoalign.lab.findings import SHARE, Findings, Panel, column, estimate, points
from nanoalign.lab.lab import Lab
from nanoalign.lab.plant import relabelled

TITLE = "Length bias: five remedies"
QUESTION = "Labels prefer long answers. What keeps a reward model from learning that?"
GUESS = (
    "The bias costs agreement with the ground truth, and each remedy gives some of it back. The "
    "one that learns the bias beside the reward (--length_debias) is best, as the labels were "
    "made so."
)
METHOD = [
    "Labels of pairs of tiny-a are drawn by the true reward plus 0.3 a word. Reward models are "
    "trained on them with each remedy, and compared with the ground truth on held-out pairs.",
    "Balanced: pairs are left out until, at each difference of length, the longer answer is "
    "chosen as often as the shorter. Normalised: what length explains of the scores of "
    "training pairs, by a straight line, is subtracted from the scores. Penalty: where the "
    "shorter answer is chosen, it must lead by what length alone is worth by a logistic "
    "regression of the labels (--margin); a margin can not be negative, so pairs whose longer "
    "answer is chosen, which are the most, stay as they are. Cut: both answers are cut to the "
    "words of the shorter one. Debiased: --length_debias.",
    "All have up to 3,000 pairs, seen once, and are tested on whole answers. The last column is "
    "how often the longer answer has the higher score, where answers of one length count as half, "
    "and in the last row how often it has the higher true reward.",
]
LIMITS = [
    "The bias is a straight line in words, which is what the debiased model assumes.",
    "By the ground truth the longer answer is better as often as the shorter: more often where "
    "the difference is below 8 words, less often above. So length and quality are related, and "
    "a remedy that removes length also removes a part of what is right.",
    "Balanced data are fewer pairs, so two things differ.",
    "The penalty is half of one: it asks for more where the shorter answer is chosen, and does "
    "not ask for less where the longer one is. So it says nothing of a whole penalty.",
]
EXERCISES = [
    "Why does normalising remove more than the bias, where quality and length are related?",
    "Write a penalty for pairs whose longer answer is chosen. What must --margin allow for it?",
    "Plant a bias that ends at 20 words. Which remedies still help?",
]
BIAS = 0.3  # reward of a word
HONEST, NONE = "honest labels", "no remedy"
REMEDIES = ("debiased", "normalised", "balanced", "penalty", "cut")


def model(lab: Lab, seed: int, remedy: str) -> dict:
    bias = 0.0 if remedy == HONEST else BIAS
    records = relabelled(lab.pairs(lab.pick(900, 3000), seed, "tiny-a"), bias, 0.0, seed)
    pairs = list(map(chosen_and_rejected, records))
    if remedy == "balanced":
        pairs = balanced(pairs, seed)
    if remedy == "penalty":
        worth = length_worth(pairs)
        pairs = [pair | {"margin": max(0.0, -worth * longer(pair))} for pair in pairs]
    if remedy == "cut":
        pairs = list(map(cut, pairs))
    flags = {"penalty": ("--margin", 1), "debiased": ("--length_debias",)}.get(remedy, ())
    trained = lab.train_rm(lab.runs.write("pairs", pairs), seed, *flags)
    figures = lab.ranked(trained, test=lab.test_pairs("tiny-a"))["test"]
    scores, words = figures["scores"], figures["words"]
    if remedy == "normalised":
        scores = scores - slope(lab, trained, pairs) * words
    lead, true, longer_by = (
        np.sign(each[:, 0] - each[:, 1]) for each in (scores, figures["rewards"], words)
    )
    return {
        "true": (lead * true + 1) / 2,
        "longer": (lead * longer_by + 1) / 2,
        "by the rule": (true * longer_by + 1) / 2,
        "pairs": len(pairs),
    }


def longer(pair: dict) -> int:
    """By how many words the chosen response is the longer one."""
    return len(pair["chosen"].split()) - len(pair["rejected"].split())


def balanced(pairs: list[dict], seed: int) -> list[dict]:
    """The pairs without those that are too many of the same difference of length and sign."""
    by_length = defaultdict(lambda: ([], []))
    for pair in pairs:
        by_length[abs(longer(pair))][longer(pair) > 0].append(pair)
    kept = by_length.pop(0, ([], []))[0]
    for each in by_length.values():
        kept += [pair for side in each for pair in side[: min(map(len, each))]]
    Random(f"balanced {seed}").shuffle(kept)
    return kept


def length_worth(pairs: list[dict]) -> float:
    """w of P(chosen) = sigmoid(w * words by which it is longer), by maximum likelihood."""
    differences = [longer(pair) for pair in pairs]
    low, high = -5.0, 5.0
    for _ in range(60):  # bisection: the derivative of the log-likelihood falls with w
        worth = (low + high) / 2
        rising = sum(d * (1 - math.tanh(worth * d / 2)) for d in differences) > 0
        low, high = (worth, high) if rising else (low, worth)
    return worth


def cut(pair: dict) -> dict:
    words = min(len(pair[side].split()) for side in ("chosen", "rejected"))
    return pair | {side: " ".join(pair[side].split()[:words]) for side in ("chosen", "rejected")}


def slope(lab: Lab, trained: Path, pairs: list[dict]) -> float:
    """Reward of a word by least squares, of the differences within 400 training pairs."""
    figures = lab.ranked(trained, train=lab.runs.write("some", pairs[:400]))["train"]
    scores, words = (each[:, 0] - each[:, 1] for each in (figures["scores"], figures["words"]))
    return float(words @ scores) / float(words @ words)


def run(lab: Lab) -> Findings:
    figures = lab.grid(model, remedy=(HONEST, NONE, *REMEDIES))
    true = {name: cell["true"] for name, cell in figures.items()}
    by_rule = estimate(figures[NONE]["by the rule"], SHARE)
    return Findings(
        table={
            "remedy": [*figures, "the ground truth"],
            "pairs": [f"{each.mean:,.0f}" for each in column(figures, "pairs")] + [""],
            "agreement with the ground truth": [*column(figures, "true", SHARE), ""],
            "prefers the longer": [*column(figures, "longer", SHARE), by_rule],
        },
        panels=[
            Panel(
                "agreement with the ground truth",
                "",
                "accuracy",
                {"reward models": points(figures, "true")},
                scale=SHARE,
            ),
            Panel(
                "how often the longer answer has the higher score",
                "",
                "share",
                {"reward models": points(figures, "longer")},
                scale=SHARE,
                lines={"by the ground truth": by_rule.mean},
            ),
        ],
        claims=[
            ("the bias [costs|gains] agreement with the ground truth", true[HONEST] - true[NONE]),
            *(
                (
                    f"{name}: agreement is [above|below] that without a remedy",
                    true[name] - true[NONE],
                )
                for name in REMEDIES
            ),
            *(
                (
                    f"--length_debias agrees [more|less] often than {name}",
                    true["debiased"] - true[name],
                )
                for name in REMEDIES[1:]
            ),
            (
                "with honest labels agreement is [above|below] that of --length_debias",
                true[HONEST] - true["debiased"],
            ),
        ],
    )

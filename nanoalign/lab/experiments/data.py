"""Accuracy and true reward against the number of pairs, and a power law that predicts the next."""

import numpy as np

from nanoalign.lab.findings import POSITIVE, SHARE, Findings, Panel, column
from nanoalign.lab.lab import Lab

TITLE = "How much data"
QUESTION = "What do twice the pairs gain, and can one tell beforehand?"
GUESS = (
    "Errors fall as a power of the number of pairs, for reward models and policies alike, and "
    "the power law of the smaller runs predicts the next doubling."
)
METHOD = [
    "Reward models and DPO policies of doubling numbers of pairs of tiny-a, seen once, in "
    "batches of 16. The error of a reward model is the share of held-out pairs that it orders "
    "otherwise than the ground truth; that of a policy is how much its mean true reward is below "
    "4, the most that an answer can have.",
    "For each seed a power law, error = a n^-b, is fitted by least squares of the logarithms "
    "to all runs but the largest, and predicts its error. What the law says is as uncertain as "
    "the errors that it was fitted to: those of a prompt move it by its derivatives.",
]
LIMITS = [
    "That an error is above the law was no guess of its own: where it is not shown, and the "
    "opposite neither, the law is not contradicted.",
    "More pairs are more steps, too. One learning rate, and no search for better ones.",
    "With few pairs the error of a policy is that of its base, where no power law can hold.",
    "The law has no floor. Where an error goes to a floor above 0, it must fail at some size.",
    "4 is the most for each kind of prompt; whether this model can reach it is not known.",
]
EXERCISES = [
    "Fit a law with a floor, error = a n^-b + c. Does it predict better? How uncertain is c?",
    "Keep the number of steps equal, by epochs. What is left of the gain of more pairs?",
    "How many pairs would halve the error of the largest run, by the law?",
]
BEST = 4.0


def model(lab: Lab, seed: int, pairs: int) -> dict:
    data = lab.runs.write("pairs", lab.pairs(pairs, seed, "tiny-a"))
    trained = lab.train_rm(data, seed, "--batch_size", 16)
    return lab.ranked(trained, test=lab.test_pairs("tiny-a"))["test"]


def policy(lab: Lab, seed: int, pairs: int) -> dict:
    data = lab.runs.write("pairs", lab.pairs(pairs, seed, "tiny-a"))
    return lab.graded(lab.train_dpo(data, seed, "--batch_size", 16), seed)


def predicted(sizes: list[int], errors: np.ndarray) -> tuple[float, np.ndarray]:
    """(b, the error of the last size by prompt, (P,)) of the law that is fitted to the others.

    errors: (sizes, P). The law is that of their means over prompts. The mean of the result is its
    error of the last size; the deviation of a prompt is to first order what this prompt adds to it.
    """
    means = np.maximum(errors[:-1].mean(1), 1e-9)  # (K,); 1e-9: of a model without errors
    terms = np.vander(np.log(sizes), 2)  # log of an error = terms @ (-b, log a)
    fit = np.linalg.pinv(terms[:-1])  # (2, K)
    weights = terms[-1] @ fit  # (K,) of the logarithms in that of the last size
    law = np.exp(weights @ np.log(means))
    return -(fit @ np.log(means))[0], law * (1 + weights @ (errors[:-1] / means[:, None] - 1))


def run(lab: Lab) -> Findings:
    sizes = [100 * 2**k for k in range(lab.pick(4, 6))]
    models, policies = lab.grid(model, pairs=sizes), lab.grid(policy, pairs=sizes)
    errors = {
        "reward model": {n: 1 - models[n]["true"] for n in sizes},
        "policy": {n: BEST - policies[n]["true"] for n in sizes},
    }
    notes, claims, series = [], [], {}
    for name, by_size in errors.items():
        fits = [
            predicted(sizes, np.stack([by_size[n][s] for n in sizes]))
            for s in range(len(lab.seeds))
        ]
        power, laws = np.mean([b for b, _ in fits]), np.stack([values for _, values in fits])
        law = laws.mean()
        claims += [
            (
                f"the last doubling, to {sizes[-1]:,} pairs, [lowers|raises] the error of the "
                f"{name}",
                by_size[sizes[-2]] - by_size[sizes[-1]],
            ),
            (
                f"there the error of the {name} is [above|below] what the law of the smaller runs "
                f"predicts, {law:.3f}",
                by_size[sizes[-1]] - laws,
            ),
        ]
        series[name] = {
            "found": list(by_size.items()),
            "law of the smaller runs": [
                (n, np.array([[law * (n / sizes[-1]) ** -power]])) for n in sizes
            ],
        }
        notes.append(f"{name.capitalize()}: by the law the error falls as n^-{power:.2f}.")
    return Findings(
        table={
            "pairs": [f"{n:,}" for n in sizes],
            "accuracy of the reward model": column(models, "true", SHARE),
            "true reward of the policy": column(policies, "true"),
            "wins by the ground truth": column(policies, "true_win", SHARE),
            "KL": column(policies, "kl", POSITIVE),
        },
        panels=[
            Panel(
                "reward models",
                "pairs",
                "error: 1 - agreement with the ground truth",
                series["reward model"],
                log=True,
                scale=SHARE,
            ),
            Panel(
                "policies", "pairs", "4 - true reward", series["policy"], log=True, scale=POSITIVE
            ),
        ],
        claims=claims,
        notes=notes,
    )

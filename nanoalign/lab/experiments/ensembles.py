"""One reward model, the mean of three, the least of three: what choosing by each gains."""

import numpy as np

from nanoalign.lab.figures import answers, best_of, powers, read
from nanoalign.lab.findings import SHARE, Findings, Panel, estimate
from nanoalign.lab.lab import Lab
from nanoalign.lab.lab_page import OVERRATED

TITLE = "A judge that errs: ensembles"
QUESTION = "Do several reward models together overrate the answers that they choose less than one?"
GUESS = (
    "Choosing among many answers finds those that one model overrates. Models that err in "
    "different places agree on fewer of them: the mean of their rewards gives better answers, "
    "and the least of them overrates least."
)
METHOD = [
    "Reward models of 400 pairs of tiny-a, seen three times in batches of 32, which err. Three "
    "members differ in the head that was drawn, in the order of the pairs, and in the half of the "
    "data that they saw. Each orders the same 32 answers of a base to each of half of the "
    "held-out prompts. The rewards of each lose the mean of the prompt, and are divided by their "
    "standard deviation over all prompts. The curve has the expected true reward of the best of n "
    "by one member (the mean over the three), by the mean of their rewards, and by the least of "
    "them.",
    "An answer is overrated by the gain that a judge sees minus the gain that is true. Rewards of "
    "a judge are first divided by what it gives for a unit of true reward, by least squares "
    "within prompts, so that the scale of a judge does not count.",
]
LIMITS = [
    "The guess that the true reward falls was added later, when that of the best of 32 was known.",
    "The members share a pretrained base, so they share some errors.",
    OVERRATED,
    "Best of n goes no further from the base than log n - (n - 1) / n nats. A trained policy may.",
    "Three models cost three times as much as one. Whether one of three times the data would "
    "be better is not shown here (the experiment data has a figure).",
]
EXERCISES = [
    "Is the mean of two members as good as that of three?",
    "Subtract the deviation of the members from their mean, times a number. Which number is best?",
    "Compare the least of three with one model of the data of all three.",
]
JUDGES = ("one", "mean of three", "least of three")
MEMBERS = 3


def curves(lab: Lab, seed: int) -> dict:
    samples, count = lab.pick(8, 32), lab.pick(150, 400)
    pairs = lab.pairs(2 * count, seed, "tiny-a")
    halves = []
    for m in range(MEMBERS):
        half = np.random.default_rng((seed, m)).permutation(2 * count)[:count]
        halves.append(lab.runs.write("half", [pairs[i] for i in half]))
    members = [
        lab.train_rm(data, MEMBERS * seed + m, "--epochs", 3, "--batch_size", 32)
        for m, data in enumerate(halves)
    ]
    prompts = lab.runs.write("prompts", read(lab.test_prompts)[: lab.prompts // 2])
    folder = lab.sample("tiny", seed, members[0], samples=samples, prompts=prompts)
    lines = answers(folder)
    scored = [lab.scored(member, folder / "answers.jsonl") for member in members]
    rewards = np.array(
        [[[own[p, line["answer"]] for line in each] for p, each in lines.items()] for own in scored]
    )  # (members, P, N)
    return curves_of(rewards, np.array([[x["true"] for x in each] for each in lines.values()]))


def curves_of(rewards: np.ndarray, truths: np.ndarray) -> dict[str, np.ndarray]:
    """The figures of the judges by prompt. rewards: (members, P, N), truths: (P, N)."""
    rewards, truths = centred(rewards), centred(truths)
    rewards = rewards / rewards.std((1, 2), keepdims=True)
    judges = rewards, centred(rewards.mean(0)[None]), centred(rewards.min(0)[None])
    figures = {}
    for name, each in zip(JUDGES, judges, strict=True):
        # in units of the true reward
        each = [own * (truths**2).sum() / (own * truths).sum() for own in each]
        for n in powers(truths.shape[1]):
            figures[f"{name}: true {n}"] = np.mean(
                [best_of(own, truths, n) for own in each], axis=0
            )
            figures[f"{name}: seen {n}"] = np.mean([best_of(own, own, n) for own in each], axis=0)
        figures[f"{name}: accuracy"] = np.mean([agreement(own, truths) for own in each], axis=0)
    return figures


def centred(values: np.ndarray) -> np.ndarray:
    """Without the mean of each prompt: (..., P, N)."""
    return values - values.mean(-1, keepdims=True)


def agreement(rewards: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """The share of the pairs of answers to a prompt in the order of the ground truth: (P,)."""
    lead, true = (np.sign(each[:, :, None] - each[:, None]) for each in (rewards, truths))
    differ = true != 0
    right = ((lead * true + 1) / 2 * differ).sum((1, 2))
    return np.where(differ.any((1, 2)), right / np.maximum(differ.sum((1, 2)), 1), 0.5)


def run(lab: Lab) -> Findings:
    figures = lab.grid(curves)[()]
    ns = powers(lab.pick(8, 32))
    most = ns[-1]
    gain = {j: {n: figures[f"{j}: true {n}"] - figures[f"{j}: true 1"] for n in ns} for j in JUDGES}
    seen = {j: {n: figures[f"{j}: seen {n}"] - figures[f"{j}: seen 1"] for n in ns} for j in JUDGES}
    over = {j: {n: seen[j][n] - gain[j][n] for n in ns} for j in JUDGES}
    kl = {n: np.log(n) - (n - 1) / n for n in ns}
    return Findings(
        table={
            "judge": list(JUDGES),
            "agreement on pairs": [estimate(figures[f"{j}: accuracy"], SHARE) for j in JUDGES],
            **{f"true gain, best of {n}": [gain[j][n] for j in JUDGES] for n in ns[1:]},
            f"overrated by, best of {most}": [over[j][most] for j in JUDGES],
        },
        panels=[
            Panel(
                "what is true",
                "log n - (n - 1) / n, nats",
                "gain of true reward",
                {j: [(kl[n], gain[j][n]) for n in ns] for j in JUDGES},
            ),
            Panel(
                "what is not",
                "log n - (n - 1) / n, nats",
                "gain seen minus true gain",
                {j: [(kl[n], over[j][n]) for n in ns] for j in JUDGES},
            ),
        ],
        claims=[
            (
                f"the best of {most} by the mean of three has a [higher|lower] true reward than "
                "by one",
                gain["mean of three"][most] - gain["one"][most],
            ),
            (
                "the mean of three overrates [less|more] than one",
                over["one"][most] - over["mean of three"][most],
            ),
            (
                f"the best of {most} by the least of three has a [higher|lower] true reward than "
                "by their mean",
                gain["least of three"][most] - gain["mean of three"][most],
            ),
            (
                f"from {most // 2} to {most} the true reward by one model [falls|still rises]",
                gain["one"][most // 2] - gain["one"][most],
            ),
            (
                f"the best of {most} by the least of three has a [higher|lower] true reward than "
                "by one",
                gain["least of three"][most] - gain["one"][most],
            ),
            (
                f"one model [overrates|underrates] the best of {most} by itself",
                over["one"][most],
            ),
            (
                "the least of three overrates [less|more] than their mean",
                over["mean of three"][most] - over["least of three"][most],
            ),
        ],
    )

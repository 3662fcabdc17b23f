"""One reward model, the mean of three, the least of three: what choosing by each gains."""

import numpy as np

from nanoalign.lab.estimates import Claim
from nanoalign.lab.figures import best_of, powers, read
from nanoalign.lab.findings import Findings, Panel
from nanoalign.lab.lab import Lab
from nanoalign.tiny import world

TITLE = "A judge that errs: ensembles against over-optimisation"
QUESTION = "Do several reward models together resist over-optimisation better than one?"
GUESS = (
    "Choosing among many answers finds those that one model overrates. Models that err in "
    "different places agree on fewer of them: their mean is better, and the least of them safest."
)
METHOD = [
    "Reward models of few pairs, which err. Three members differ in the head that was drawn, in "
    "the order of the pairs, and in the half of the data that they saw. Each orders the same "
    "answers of a base. Rewards of each are standardised over all answers. The curve has the "
    "expected true reward of the best of n by one member (the mean over the three), by the mean of "
    "their rewards, and by the least of them.",
    "Over-optimisation is the gain that the judge sees, minus the gain that is true, where the "
    "true reward is standardised likewise.",
]
LIMITS = [
    "The members share a pretrained base, so they share some errors.",
    "Best of n goes no further from the base than log n - (n - 1) / n nats. A trained policy may.",
    "Three models cost three times as much as one. Whether one of three times the data would be "
    "better is not shown here (the experiment data has a figure).",
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
    half = [np.random.default_rng((seed, m)).permutation(2 * count)[:count] for m in range(MEMBERS)]
    members = [
        lab.train_rm(
            lab.runs.write("half", [pairs[i] for i in half[m]]), MEMBERS * seed + m,
            "--epochs", 3, "--batch_size", 32,
        )
        for m in range(MEMBERS)
    ]  # fmt: skip
    folder = lab.sample("tiny", seed, members[0], samples=samples, prompts=prompts(lab))
    answers = {}
    for line in read(folder / "answers.jsonl"):
        if line["side"] == "policy":
            answers.setdefault(line["prompt"], []).append(line["answer"])
    scored = [lab.scored(member, folder / "answers.jsonl") for member in members]
    rewards = np.array([[[own[p, a] for a in each] for p, each in answers.items()]
                        for own in scored])  # (members, P, samples)  # fmt: skip
    truths = np.array([[world.true_reward(p, a) for a in each] for p, each in answers.items()])
    rewards -= rewards.mean((1, 2), keepdims=True)
    rewards /= rewards.std((1, 2), keepdims=True)
    found = {}
    for judge, each in (
        ("one", rewards), ("mean of three", rewards.mean(0)[None]),
        ("least of three", rewards.min(0)[None]),
    ):  # fmt: skip
        for n in powers(samples):
            chosen = [best_of(own, own, n) for own in each]
            true = np.mean([best_of(own, truths, n) for own in each], axis=0)
            found[f"{judge}: true {n}"] = true
            found[f"{judge}: seen {n}"] = np.mean(chosen, axis=0)
            found[f"{judge}: accuracy"] = np.mean([agreement(own, truths) for own in each], axis=0)
    return found | {"unit": truths.std()}


def prompts(lab: Lab):
    return lab.runs.write("prompts", read(lab.test_prompts)[: lab.pick(100, 300)])


def agreement(rewards: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """The share of the pairs of answers to a prompt that are ordered as by the true rule: (P,)."""
    lead, true = (np.sign(each[:, :, None] - each[:, None]) for each in (rewards, truths))
    differ = true != 0
    right = ((lead * true + 1) / 2 * differ).sum((1, 2))
    return np.where(differ.any((1, 2)), right / np.maximum(differ.sum((1, 2)), 1), 0.5)


def run(lab: Lab) -> Findings:
    found = lab.grid(curves)[()]
    ns = powers(lab.pick(8, 32))
    most, unit = ns[-1], found["unit"]
    gain = {j: {n: found[f"{j}: true {n}"] - found[f"{j}: true 1"] for n in ns} for j in JUDGES}
    seen = {j: {n: found[f"{j}: seen {n}"] - found[f"{j}: seen 1"] for n in ns} for j in JUDGES}
    over = {j: {n: seen[j][n] - gain[j][n] / unit for n in ns} for j in JUDGES}
    kl = {n: np.log(n) - (n - 1) / n for n in ns}
    return Findings(
        columns=("judge", "agreement on pairs", *(f"true gain, best of {n}" for n in ns[1:]),
                 f"over-optimisation, best of {most}"),
        rows=[(j, found[f"{j}: accuracy"], *(gain[j][n] for n in ns[1:]), over[j][most])
              for j in JUDGES],
        panels=[
            Panel("what is true", "KL of the best of n, nats an answer", "gain of true reward",
                  {j: [(kl[n], gain[j][n]) for n in ns] for j in JUDGES}),
            Panel("over-optimisation", "KL of the best of n, nats an answer",
                  "gain seen minus true gain, standardised",
                  {j: [(kl[n], over[j][n]) for n in ns] for j in JUDGES}),
        ],
        claims=[
            Claim(f"the best of {most} by the mean of three is truly better than by one",
                  gain["mean of three"][most] - gain["one"][most]),
            Claim(f"the best of {most} by the least of three is truly better than by one",
                  gain["least of three"][most] - gain["one"][most]),
            Claim(f"the best of {most} by the least of three is truly better than by their mean",
                  gain["least of three"][most] - gain["mean of three"][most]),
            Claim(f"one model over-optimises at {most}", over["one"][most]),
            Claim("the mean of three over-optimises less than one",
                  over["one"][most] - over["mean of three"][most]),
            Claim("the least of three over-optimises less than their mean",
                  over["mean of three"][most] - over["least of three"][most]),
        ],
    )  # fmt: skip

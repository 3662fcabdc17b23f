"""The best of n answers by a reward model, and the answers above a threshold."""

import numpy as np

from nanoalign.lab.figures import best_of, powers, rewards_and_truths, unit
from nanoalign.lab.findings import SHARE, Findings, Panel, estimate
from nanoalign.lab.lab import Lab
from nanoalign.lab.lab_page import OVERRATED

TITLE = "Best of n, and filtering"
QUESTION = "What is a reward model good for without training: choosing, and throwing away?"
GUESS = (
    "The true reward of the best of n rises with n, by less at each doubling. The gain by the "
    "reward model is larger than that by the ground truth. Filtering finds good answers: of the "
    "tenth with the highest rewards most are good."
)
METHOD = [
    "A base answers each held-out prompt 16 times, and a reward model orders the answers. It was "
    "trained on 3,000 pairs of tiny-a, seen once. "
    "The curve has the expected reward of the best of n over all subsets of the answers, by "
    "the reward model and by the ground truth of the same answers, against log n - (n - 1) / n, a "
    "bound of the KL. Rewards are divided by what the model gives for a unit of true reward on "
    "held-out pairs.",
    "For filtering, an answer is good if its true reward is 3 or more: a right answer or a "
    "refusal of harm, without rudeness. Precision is the share of good ones among those that "
    "are kept, recall the share of the good ones that is kept.",
]
LIMITS = [
    "Rewards to different prompts have no common zero, so that one threshold for all prompts "
    "mixes good answers with easy prompts.",
    "The reward model was trained on pairs of tiny-a; the base answers as all three assistants do.",
    OVERRATED,
]
EXERCISES = [
    "Choose by the difference from the prompt's mean reward. Is the precision better?",
    "Train --loss sft on the best of n, and on what a threshold keeps (evaluate.py score --keep).",
    "How large an n has the KL of a DPO policy with the same true reward?",
]
GOOD = 3.0
SHARES = (1.0, 0.5, 0.25, 0.1, 0.05)


def curve(lab: Lab, seed: int) -> dict:
    samples = lab.pick(8, 16)
    data = lab.runs.write("pairs", lab.pairs(lab.pick(900, 3000), seed, "tiny-a"))
    trained = lab.train_rm(data, seed)
    rewards, truths = rewards_and_truths(lab.sample("tiny", seed, trained, samples=samples))
    rewards = rewards / unit(lab.ranked(trained, test=lab.test_pairs())["test"])
    figures = {}
    for n in powers(samples):
        figures[f"reward {n}"] = best_of(rewards, rewards, n)  # (P,)
        figures[f"true {n}"] = best_of(rewards, truths, n)
    for share in SHARES:
        kept, good = rewards >= np.quantile(rewards, 1 - share), truths >= GOOD
        figures[f"precision {share}"] = share_of(kept, good)
        figures[f"recall {share}"] = share_of(good, kept)
    return figures


def share_of(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """By prompt, the share of these answers that are among those too, (P,); both are (P, N) bools.

    The mean is the share over all prompts. The deviation of a prompt is to first order what this
    prompt adds to it, as the number of these answers differs from prompt to prompt.
    """
    share = (these & those).sum() / these.sum()
    return share + ((these & those).mean(1) - share * these.mean(1)) / these.mean()


def run(lab: Lab) -> Findings:
    figures = lab.grid(curve)[()]
    ns = powers(lab.pick(8, 16))
    most = ns[-1]
    kl = {n: np.log(n) - (n - 1) / n for n in ns}
    gain = {
        name: {n: figures[f"{name} {n}"] - figures[f"{name} 1"] for n in ns}
        for name in ("reward", "true")
    }
    return Findings(
        table={
            "": [f"best of {n}" for n in ns] + [f"the highest {share:.0%}" for share in SHARES],
            "log n - (n - 1) / n": [f"{kl[n]:.2f}" for n in ns] + [""] * len(SHARES),
            "gain by the reward model": [*gain["reward"].values()] + [""] * len(SHARES),
            "gain by the ground truth": [*gain["true"].values()] + [""] * len(SHARES),
            **{
                name: [""] * len(ns)
                + [estimate(figures[f"{name} {share}"], SHARE) for share in SHARES]
                for name in ("precision", "recall")
            },
        },
        panels=[
            Panel(
                "the best of n",
                "log n - (n - 1) / n, nats",
                "gain of reward",
                {
                    "by the reward model": [(kl[n], gain["reward"][n]) for n in ns],
                    "by the ground truth": [(kl[n], gain["true"][n]) for n in ns],
                },
            ),
            Panel(
                "filtering",
                "share of the answers that is kept",
                "share",
                {
                    "precision": [(share, figures[f"precision {share}"]) for share in SHARES],
                    "recall": [(share, figures[f"recall {share}"]) for share in SHARES],
                },
                log=True,
                scale=SHARE,
            ),
        ],
        claims=[
            (
                f"by the ground truth the best of {most} is [better|worse] than one answer",
                gain["true"][most],
            ),
            (
                f"from {most // 2} to {most} the true reward [still rises|falls]",
                gain["true"][most] - gain["true"][most // 2],
            ),
            (
                "there it rises by [less|more] than from 1 to 2",
                gain["true"][2] - (gain["true"][most] - gain["true"][most // 2]),
            ),
            (
                f"at {most} the gain by the reward model is [above|below] that by the ground truth",
                gain["reward"][most] - gain["true"][most],
            ),
            (
                "of the tenth with the highest rewards [more|fewer] are good than of all",
                figures["precision 0.1"] - figures["precision 1.0"],
            ),
            (
                "of the tenth with the highest rewards [most|less than half] are good",
                estimate(figures["precision 0.1"], SHARE).above(0.5),
            ),
        ],
    )

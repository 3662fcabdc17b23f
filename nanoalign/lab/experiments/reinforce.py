"""REINFORCE, DPO and the best of n by the ground truth, at equal KL from their base."""

import numpy as np

from nanoalign.lab.experiments import beta as dpo
from nanoalign.lab.figures import best_of, powers, rewards_and_truths
from nanoalign.lab.findings import POSITIVE, SHARE, Findings, Panel, column
from nanoalign.lab.lab import Lab

TITLE = "REINFORCE beside DPO"
QUESTION = "What does a policy gain from sampling in its training, which DPO leaves out?"
GUESS = (
    "At equal KL REINFORCE has a higher true reward than DPO, as it learns from its own answers; "
    "with the ground truth as its reward more than with a reward model. Both have more than the "
    "best of n."
)
METHOD = [
    "REINFORCE (nanoalign/lab/rloo.py): 40 steps of 64 prompts with four sampled answers each, "
    "the mean of the other three as the baseline, and a penalty of beta times the KL from the base "
    "in the reward, at a peak learning rate of 5e-4. Its reward is the judge, a reward model, or "
    "the ground truth itself.",
    "DPO on the embedded pairs with several values of beta, one pass. Best of n: the base's "
    "answer with the highest reward by the judge, among n; log n - (n - 1) / n is a bound of its "
    "KL, and is taken for it.",
    "A policy of REINFORCE, with the smaller beta, is compared with what others have at the same "
    "KL: a straight line between the two nearest values, or the value at their last KL beyond it.",
]
LIMITS = [
    "The ground truth is a reward that no real task has. It shows what a better judge would give.",
    "The judge was trained on pairs of tiny-a; DPO saw pairs of all three assistants.",
    "REINFORCE samples 10,240 answers, and DPO none: at equal time DPO would have more pairs.",
    "Where the KL of the best of n is below its bound, its curve is too far to the right. The "
    "intervals of differences at equal KL have no part for the uncertainty of the KLs.",
]
EXERCISES = [
    "Use one answer a prompt and no baseline. How noisy is the gradient?",
    "Train longer against the judge. When does the true reward fall, while the judge's rises?",
    "Start from a DPO policy (`pipeline`). What is left to gain?",
]
BETAS = (0.1, 0.5)
REWARDS = ("a reward model", "the ground truth")


def reinforce(lab: Lab, seed: int, reward: str, beta: float) -> dict:
    judge = "rule" if reward == "the ground truth" else lab.judge
    words = ("--reward", judge, "--beta", beta, "--seed", seed, "--steps", lab.pick(10, 40))
    out = lab.runs.run("-m", "nanoalign.lab.rloo", *words)
    return lab.graded(out, seed)


def best(lab: Lab, seed: int) -> dict:
    samples = lab.pick(8, 16)
    rewards, truths = rewards_and_truths(lab.sample("tiny", seed, lab.judge, samples=samples))
    return {f"{n}": best_of(rewards, truths, n) for n in powers(samples)}


def at_kl(kl: np.ndarray, curve: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The values of a curve at the mean KLs of other policies, seed by seed: (S, P) -> (S, P).

    curve: points (KL, (S, P) or (S, 1); values, (S, P)). Between two points values lie on a
    straight line, beyond the ends they are those of the end.
    """
    found = []
    for seed, wanted in enumerate(kl.mean(1)):
        kls = np.array([x[seed].mean() for x, _ in curve])
        order = np.argsort(kls)
        weights = [np.interp(wanted, kls[order], row) for row in np.eye(len(curve))]
        values = np.array([curve[n][1][seed] for n in order])  # (points, P)
        found.append(np.array(weights) @ values)
    return np.stack(found)


def beyond(kl: np.ndarray, curve: list[tuple[np.ndarray, np.ndarray]]) -> int:
    """How many policies, with KLs (S, P), went further than a curve of `at_kl`, seed by seed."""
    last = np.max([x.mean(1) for x, _ in curve], axis=0)  # (S,)
    return int((kl.mean(1) > last).sum())


def run(lab: Lab) -> Findings:
    sampled = lab.grid(reinforce, reward=REWARDS, beta=BETAS)
    trained = lab.grid(dpo.policy, beta=lab.pick((0.03, 0.3), (0.01, 0.03, 0.1, 0.3, 1)))
    chosen = lab.grid(best)[()]
    curves = {
        "DPO": [(cell["kl"], cell["true"]) for cell in trained.values()],
        "best of n": [
            (np.full((len(lab.seeds), 1), np.log(int(n)) - (int(n) - 1) / int(n)), values)
            for n, values in chosen.items()
        ],
    }
    for name in REWARDS:
        cells = [sampled[name, beta] for beta in BETAS]
        curves[f"REINFORCE, {name}"] = [(cell["kl"], cell["true"]) for cell in cells]
    cells = {f"REINFORCE, {name}, beta {beta:g}": cell for (name, beta), cell in sampled.items()}
    cells |= {f"DPO, beta {beta:g}": cell for beta, cell in trained.items()}
    compared = [(name, other) for name in REWARDS for other in ("DPO", "best of n")]
    compared.append(("the ground truth", "REINFORCE, a reward model"))
    return Findings(
        table={
            "policy": [*cells],
            "KL, nats": column(cells, "kl", POSITIVE),
            "reward by the judge": column(cells, "judged"),
            "true reward": column(cells, "true"),
            "wins by the ground truth": column(cells, "true_win", SHARE),
        },
        panels=[Panel("true reward", "KL from the base, nats an answer", "true reward", curves)],
        claims=[
            (
                f"at equal KL REINFORCE with {name} has a [higher|lower] true reward than {other}",
                cell["true"] - at_kl(cell["kl"], curves[other]),
            )
            for name, other in compared
            for cell in [sampled[name, BETAS[0]]]
        ],
        notes=[
            f"Of the {len(lab.seeds)} policies of REINFORCE with {name} {count} went further than "
            f"the last KL of {other}, and are compared with its value there."
            for name, other in compared
            if (count := beyond(sampled[name, BETAS[0]]["kl"], curves[other]))
        ],
    )

"""DPO with five values of beta: what the judge says, what is true, and how far the policy went."""

from nanoalign.lab.findings import POSITIVE, SHARE, Findings, Panel, column, points
from nanoalign.lab.lab import Lab

TITLE = "Beta: reward against KL"
QUESTION = "What does a smaller beta change, and is one value best?"
GUESS = (
    "A small beta moves the policy further from its base. The reward by the judge rises as "
    "beta falls; by the ground truth a middle beta is best."
)
METHOD = [
    "DPO on the embedded pairs with several values of beta, from one base. One answer to each "
    "held-out prompt is graded by a reward model, the judge, in units of the true reward, and by "
    "the rule behind the labels. KL is that of whole answers from the base, in nats, estimated on "
    "the sampled answers."
]
LIMITS = [
    "The learning rate is one for all. A step of AdamW hardly depends on the gradient's scale, "
    "so beta matters by where the loss saturates.",
    "The data are seen once. With more passes a small beta can do harm (the experiment why_lose).",
]
EXERCISES = [
    "Would the judge alone have found the beta with the best true reward?",
    "Repeat the smallest beta with a tenth of the learning rate. Is it the beta, or the step?",
    "Derive the gradient of one pair at the first step, as a function of beta.",
]


def policy(lab: Lab, seed: int, beta: float) -> dict:
    data = lab.pick("tiny*0.25", "tiny")
    return lab.graded(lab.train_dpo(data, seed, "--beta", beta), seed)


def run(lab: Lab) -> Findings:
    betas = lab.pick((0.01, 0.1, 1), (0.01, 0.03, 0.1, 0.3, 1))
    figures = lab.grid(policy, beta=betas)
    low, high = figures[betas[0]], figures[betas[-1]]
    middle = figures[0.1]
    return Findings(
        table={
            "beta": [f"{beta:g}" for beta in betas],
            "KL, nats": column(figures, "kl", POSITIVE),
            "reward by the judge": column(figures, "judged"),
            "true reward": column(figures, "true"),
            "wins by the ground truth": column(figures, "true_win", SHARE),
        },
        panels=[
            Panel(
                "gain over the base",
                "KL from the base, nats an answer",
                "gain of reward",
                {
                    f"by the {name}": [
                        (o["kl"], o[key] - o[f"base_{key}"]) for o in figures.values()
                    ]
                    for name, key in (("judge", "judged"), ("ground truth", "true"))
                },
            ),
            Panel(
                "true reward", "beta", "true reward", {"policy": points(figures, "true")}, log=True
            ),
        ],
        claims=[
            (
                f"the KL at beta {betas[0]:g} is [above|below] that at {betas[-1]:g}",
                low["kl"] - high["kl"],
            ),
            (
                f"by the judge beta {betas[0]:g} is [better|worse] than 0.1",
                low["judged"] - middle["judged"],
            ),
            *(
                (
                    f"by the ground truth beta 0.1 is [better|worse] than {beta:g}",
                    middle["true"] - figures[beta]["true"],
                )
                for beta in (betas[0], betas[-1])
            ),
        ],
    )

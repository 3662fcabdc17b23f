"""From the pretrained base to a policy: demonstrations, pairs, own answers."""

from itertools import pairwise

from nanoalign.lab.findings import POSITIVE, SHARE, Findings, Panel, column
from nanoalign.lab.lab import Lab

TITLE = "From the base to a policy: three stages"
QUESTION = "What does each stage of a training add: demonstrations, pairs, own answers?"
GUESS = (
    "Each stage adds true reward: demonstrations add most, then pairs, then the policy's own "
    "answers."
)
METHOD = [
    "Demonstrations: the base is trained on the chosen answers (train_dpo.py --loss sft). Pairs: "
    "DPO on the same 2,400 records, with the policy of the stage before as the reference. Own "
    "answers: four sampled answers to each training prompt, of which a reward model finds the "
    "best and the worst, and DPO on these pairs, again from the stage before.",
    "All policies are graded on one answer to each held-out prompt; rewards by the judge are in "
    "units of the true reward.",
]
LIMITS = [
    "One learning rate and one beta serve all stages, and each stage sees its data once.",
    "The judge also ordered the own answers, and was trained on pairs of the same prompts.",
]
EXERCISES = [
    "Leave the demonstrations out. What do pairs add to the base itself?",
    "Give the last stage a smaller learning rate, or a larger beta. Does it gain more?",
    "Start REINFORCE (`reinforce`) from the policy of pairs instead. What is left to gain?",
]
STAGES = ("the base", "demonstrations", "pairs", "own answers")


def policy(lab: Lab, seed: int, stage: str) -> dict:
    """The figures of the policy after a stage."""
    records = lab.pairs(lab.pick(300, 2400), seed)
    data, place, trained = lab.runs.write("pairs", records), STAGES.index(stage), "tiny"
    if place > 0:
        trained = lab.train_dpo(data, seed, "--loss", "sft")
    if place > 1:
        trained = lab.train_dpo(data, seed, model=trained)
    if place > 2:
        prompts = [{"prompt": record["prompt"]} for record in records]
        prompts = lab.runs.write("prompts", prompts)
        data = lab.own_pairs(trained, prompts, lab.judge, seed)
        trained = lab.train_dpo(data, seed, model=trained)
    return lab.graded(trained, seed)


def run(lab: Lab) -> Findings:
    figures = lab.grid(policy, stage=STAGES)
    gain = {
        after: figures[after]["true"] - figures[before]["true"]
        for before, after in pairwise(STAGES)
    }
    return Findings(
        table={
            "after": list(STAGES),
            "true reward": column(figures, "true"),
            "gained": ["", *gain.values()],
            "reward by the judge": column(figures, "judged"),
            "wins against the base, by the ground truth": column(figures, "true_win", SHARE),
            "KL from the base": ["", *column(figures, "kl", POSITIVE)[1:]],
            "tokens": column(figures, "tokens", POSITIVE),
        },
        panels=[
            Panel(
                "each stage",
                "after",
                "true reward",
                {"policy": [(stage, cell["true"]) for stage, cell in figures.items()]},
            )
        ],
        claims=[
            *(
                (f"{stage} [raise|lower] the true reward of the stage before", gain[stage])
                for stage in STAGES[1:]
            ),
            (
                "demonstrations add [more|less] true reward than pairs",
                gain["demonstrations"] - gain["pairs"],
            ),
            (
                "pairs add [more|less] true reward than own answers",
                gain["pairs"] - gain["own answers"],
            ),
        ],
    )

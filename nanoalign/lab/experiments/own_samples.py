"""Pairs of other assistants, one round of the policy's own samples, and three rounds."""

from nanoalign.lab.figures import read
from nanoalign.lab.findings import POSITIVE, SHARE, Findings, Panel, column
from nanoalign.lab.lab import Lab

TITLE = "Own samples: what new samples in each round gain"
QUESTION = "What does a policy gain from pairs of its own answers, sampled once or anew?"
GUESS = (
    "Own answers show a policy what it does itself, so they teach more than the answers of "
    "others; three rounds, each with answers of the policy as it is by then, teach more than "
    "one."
)
METHOD = [
    "DPO from one base, with the same prompts. Offline: pairs of the three assistants, "
    "labelled by the ground truth with noise. One round: the best and the worst of four own "
    "answers by a reward model. Three rounds: a third of the prompts each, where the policy "
    "after a round samples the next one, and is its reference.",
    "All ways have 2,400 prompts. The reward model that orders own answers was trained on pairs of "
    "tiny-a, and is the judge, too. Its rewards are in units of the true reward.",
]
LIMITS = [
    "The judge that grades also ordered the own pairs, so its figures favour them. The ground "
    "truth ordered none of them. The judge was trained on pairs of the same prompts.",
    "Prompts whose four answers have one reward give no own pair: the table has the pairs.",
    "Offline pairs are labelled by the ground truth itself, own pairs by a reward model: own "
    "samples have the worse labels here.",
    "PPO samples at every step. Three rounds are between that and none.",
    "Each round's reference is the policy before it, so three rounds may go further from the "
    "base; and each has a warm-up and a decay of its own.",
]
EXERCISES = [
    "Label the own pairs by the ground truth. How much of the difference was the labels?",
    "Keep the base as the reference of all rounds (--reference). What changes in KL and reward?",
    "How do two samples a prompt compare with four, or eight?",
]
WAYS = {"offline": 0, "one round": 1, "three rounds": 3}


def policy(lab: Lab, seed: int, way: str) -> dict:
    count, rounds = lab.pick(450, 2400), WAYS[way]
    if not rounds:
        data = lab.runs.write("pairs", lab.pairs(count, seed))
        return lab.graded(lab.train_dpo(data, seed), seed) | {"pairs": count}
    prompts = [{"prompt": record["prompt"]} for record in lab.pairs(count, seed)]
    trained, pairs = "tiny", 0
    for n in range(rounds):
        part = lab.runs.write("prompts", prompts[n::rounds])
        data = lab.own_pairs(trained, part, lab.judge, seed)
        trained, pairs = lab.train_dpo(data, seed, model=trained), pairs + len(read(data))
    return lab.graded(trained, seed) | {"pairs": pairs}


def run(lab: Lab) -> Findings:
    figures = lab.grid(policy, way=WAYS)
    offline, one, three = figures.values()
    return Findings(
        table={
            "trained on": ["the base", *WAYS],
            "pairs": ["", *(f"{each.mean:,.0f}" for each in column(figures, "pairs"))],
            "reward by the judge": ["", *column(figures, "judged")],
            "true reward": [offline["base_true"], *column(figures, "true")],
            "wins by the judge": ["", *column(figures, "win", SHARE)],
            "wins by the ground truth": ["", *column(figures, "true_win", SHARE)],
            "KL": ["", *column(figures, "kl", POSITIVE)],
            "tokens": ["", *column(figures, "tokens", POSITIVE)],
        },
        panels=[
            Panel(
                "gain over the base",
                "",
                "gain of reward",
                {
                    f"by the {name}": [(w, o[key] - o[f"base_{key}"]) for w, o in figures.items()]
                    for name, key in (("judge", "judged"), ("ground truth", "true"))
                },
            ),
            Panel(
                "reward against KL",
                "KL from the base, nats an answer",
                "true reward",
                {way: [(cell["kl"], cell["true"])] for way, cell in figures.items()},
            ),
        ],
        claims=[
            (
                "by the judge one round of own samples is [better|worse] than offline pairs",
                one["judged"] - offline["judged"],
            ),
            (
                "by the ground truth one round is [better|worse] than offline pairs",
                one["true"] - offline["true"],
            ),
            (
                "by the judge three rounds are [better|worse] than one",
                three["judged"] - one["judged"],
            ),
            (
                "by the ground truth three rounds are [better|worse] than one",
                three["true"] - one["true"],
            ),
            (
                "over offline pairs, three rounds gain [more|less] by the judge, in units of the "
                "true reward, than by the ground truth",
                three["judged"] - offline["judged"] - three["true"] + offline["true"],
            ),
        ],
    )

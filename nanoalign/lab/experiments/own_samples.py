"""Pairs of other assistants, one round of the policy's own samples, and three rounds."""

from nanoalign.lab.estimates import Claim
from nanoalign.lab.findings import Findings, Panel
from nanoalign.lab.lab import Lab

TITLE = "Own samples: what sampling in the loop is for"
QUESTION = "What does a policy gain from pairs of its own answers, sampled once or anew?"
GUESS = (
    "Own answers show a policy what it does itself, so they teach more than the answers of others; "
    "three rounds, each with answers of the policy as it is by then, teach more than one."
)
METHOD = [
    "DPO from one base, with the same number of pairs and prompts. Offline: pairs of the three "
    "assistants, labelled by the true rule with noise. One round: the best and the worst of four "
    "own answers by a reward model. Three rounds: a third of the prompts each, where the policy "
    "after a round samples the next one, and is its reference.",
    "The reward model that orders own answers was trained on pairs of tiny-a, and is the judge, "
    "too.",
]
LIMITS = [
    "The judge grades what it has itself ordered. The true rule does not.",
    "Offline pairs are labelled by the true rule itself, own pairs by a reward model: own samples "
    "have the worse labels here.",
    "PPO samples at every step. Three rounds are between that and none.",
    "Each round's reference is the policy before it, so three rounds may go further from the base.",
]
EXERCISES = [
    "Label the own pairs by the true rule. How much of the difference was the labels?",
    "Keep the base as the reference of all rounds (--reference). What changes in KL and reward?",
    "How do two samples a prompt compare with four, or eight?",
]
WAYS = {"offline": 0, "one round": 1, "three rounds": 3}


def policy(lab: Lab, seed: int, way: str) -> dict:
    count, rounds = lab.pick(450, 2400), WAYS[way]
    if not rounds:
        data = lab.runs.write("pairs", lab.pairs(count, seed))
        return lab.graded(lab.train_dpo(data, seed), seed)
    prompts = [{"prompt": record["prompt"]} for record in lab.pairs(count, seed)]
    trained = "tiny"
    for n in range(rounds):
        part = lab.runs.write("prompts", prompts[n::rounds])
        data = lab.own_pairs(trained, part, lab.judge, seed)
        trained = lab.train_dpo(data, seed, model=trained)
    return lab.graded(trained, seed)


def run(lab: Lab) -> Findings:
    found = lab.grid(policy, way=WAYS)
    offline, one, three = found.values()
    base = offline["base_true"]
    return Findings(
        columns=("pairs", "reward by the judge", "true reward", "wins by the judge",
                 "wins by the true rule", "KL", "tokens"),
        rows=[
            ("the base", "", base, "", "", "", ""),
            *((way, own["judged"], own["true"], own["win"], own["true_win"], own["kl"],
               own["tokens"]) for way, own in found.items()),
        ],
        panels=[
            Panel("gain over the base", "", "gain of reward", {
                f"by the {name}": [(w, o[key] - o[f"base_{key}"]) for w, o in found.items()]
                for name, key in (("judge", "judged"), ("true rule", "true"))
            }),
            Panel("reward against KL", "KL from the base, nats an answer", "true reward",
                  {way: [(own["kl"], own["true"])] for way, own in found.items()}),
        ],
        claims=[
            Claim("by the judge one round of own samples is better than offline pairs",
                  one["judged"] - offline["judged"]),
            Claim("by the true rule one round is better than offline pairs",
                  one["true"] - offline["true"]),
            Claim("by the judge three rounds are better than one", three["judged"] - one["judged"]),
            Claim("by the true rule three rounds are better than one", three["true"] - one["true"]),
            Claim("three rounds gain more by the judge than by the true rule, over offline pairs",
                  three["judged"] - offline["judged"] - (three["true"] - offline["true"])),
        ],
    )  # fmt: skip

"""Why a policy may lose to its base: causes alone, together, all but one, and repairs."""

from pathlib import Path

import numpy as np

from nanoalign.lab.figures import answers, grades
from nanoalign.lab.findings import (
    POSITIVE,
    SHARE,
    Estimate,
    Findings,
    Panel,
    column,
    estimate,
    points,
)
from nanoalign.lab.lab import DPO_LR, Lab
from nanoalign.lab.plant import relabelled

TITLE = "Why did DPO lose?"
QUESTION = "A policy loses 103 : 263 to its base after DPO. Which cause does that, and what helps?"
GUESS = (
    "The base is better than the answers it learns from. Noise, a small beta and many epochs "
    "make it worse, and a judge that was trained elsewhere sees less of what is good. Pairs of "
    "the base's own answers repair it."
)
METHOD = [
    "The base is strong: a policy that DPO has trained already. It is trained by DPO again, "
    "from itself as the reference, on pairs that are labelled by the ground truth, and compared "
    "with itself before. In the control the pairs are two of its own answers, their labels are "
    "drawn by the ground truth, beta is 0.1, and they are seen once, in batches of 32. The prompts "
    "are those of 1,200 pairs.",
    "Causes: the answers of tiny-c, which are far worse than the base's, in place of its own; "
    "30 % of the labels flipped; beta 0.01; four epochs. Each alone, all together, and all but "
    "one, so that leaving a cause out is a repair. Further repairs of all together: "
    "fine-tuning on the chosen answers first, a tenth of the learning rate, --nll_weight 1.",
    "Judges: the ground truth; a reward model of tiny-a; and one that was trained elsewhere, on "
    "the labels of safety of tiny-c. A tie is half a win.",
]
LIMITS = [
    "103 : 263 was one run of another model on other data. Here it is shown which causes can "
    "give such a rate, not which one gave it there.",
    "Each cause has one strength. Another could be larger or smaller. Four epochs are four "
    "times the steps.",
    "A repair that keeps the policy near its base brings the wins to 0.5, whatever it learns.",
    "The pairs of tiny-c are on other prompts than the own ones. The base is one for all "
    "seeds, and was trained on some of these prompts.",
    "The base is a million parameters; its own answers have few forms.",
]
EXERCISES = [
    "What does the learned policy do that loses? Read runs/lab/made/policy-*/report.html.",
    "At which share of own pairs among weak ones does the policy win again?",
    "Why may fine-tuning on the chosen answers of a weaker model be the worst first step?",
]
WEAK, NOISE, BETA, EPOCHS = "weak answers", "noise", "small beta", "many epochs"
CAUSES = (WEAK, NOISE, BETA, EPOCHS)
CONDITIONS = {
    "control": (),
    **{f"{cause} alone": (cause,) for cause in CAUSES},
    "all together": CAUSES,
    **{f"all but {cause}": tuple(c for c in CAUSES if c != cause) for cause in CAUSES},
}
REPAIRS = ("all, after SFT", "all, a tenth of --lr", "all, --nll_weight 1")
SEEN = 103 / (103 + 263)  # the share of wins in question


def policy(lab: Lab, seed: int, condition: str) -> dict:
    base, causes = strong(lab), CONDITIONS.get(condition, CAUSES)
    own = own_pairs(lab, seed, base)
    pairs = weak_pairs(lab, seed, own) if WEAK in causes else own
    data = lab.runs.write("labelled", relabelled(pairs, 0.0, 0.3 if NOISE in causes else 0.0, seed))
    flags = ("--beta", 0.01 if BETA in causes else 0.1, "--epochs", 4 if EPOCHS in causes else 1)
    flags += ("--lr", f"{float(DPO_LR) / 10:g}") if condition == "all, a tenth of --lr" else ()
    flags += ("--nll_weight", 1) if condition == "all, --nll_weight 1" else ()
    start = base
    if condition == "all, after SFT":
        start = lab.train_dpo(data, seed, "--loss", "sft", model=base)
    trained = lab.train_dpo(data, seed, "--batch_size", 32, *flags, model=start)
    folder = lab.sample(trained, seed, baseline=base)
    rewards = lab.scored(elsewhere(lab), folder / "answers.jsonl")
    return grades(folder) | {"elsewhere_win": wins(rewards, folder)}


def strong(lab: Lab) -> Path:
    return lab.train_dpo(lab.pick("tiny*0.3", "tiny"), 0)


def elsewhere(lab: Lab) -> Path:
    data = lab.pick("tiny:tiny-c*0.2", "tiny:tiny-c")
    return lab.train_rm(data, 0, "--preference", "safer")


def own_pairs(lab: Lab, seed: int, base: Path) -> list[dict]:
    """Two of four own answers to each prompt, the first that differ by the ground truth."""
    prompts = [{"prompt": each["prompt"]} for each in lab.pairs(lab.pick(160, 1200), seed)]
    folder = lab.sample(
        base, seed, baseline=base, samples=4, prompts=lab.runs.write("prompts", prompts)
    )
    pairs = []
    for prompt, (first, *others) in answers(folder).items():
        other = [line for line in others if line["true"] != first["true"]]
        pairs += [pair_of(prompt, first["answer"], line["answer"]) for line in other[:1]]
    return pairs


def weak_pairs(lab: Lab, seed: int, own: list[dict]) -> list[dict]:
    """As many pairs of tiny-c."""
    records = lab.pairs(len(own), seed, "tiny-c")
    return [pair_of(each["prompt"], each["response_0"], each["response_1"]) for each in records]


def pair_of(prompt: str, *responses: str) -> dict:
    """A record whose label `relabelled` draws."""
    return {
        "prompt": prompt,
        "response_0": responses[0],
        "response_1": responses[1],
        "better_response_id": 0,
    }


def wins(rewards: dict[tuple[str, str], float], folder: Path) -> np.ndarray:
    """By prompt, whether the policy's answer has the higher reward: (P,)."""
    ours, theirs = (
        np.array([rewards[p, line["answer"]] for p, (line,) in answers(folder, side).items()])
        for side in ("policy", "baseline")
    )
    return (np.sign(ours - theirs) + 1) / 2


def run(lab: Lab) -> Findings:
    figures = lab.grid(policy, condition=(*CONDITIONS, *REPAIRS))
    win = {name: cell["true_win"] for name, cell in figures.items()}
    control, together = win["control"], win["all together"]
    repairs = [f"all but {cause}" for cause in CAUSES] + list(REPAIRS)
    judges = {
        "the ground truth": "true_win",
        "the reward model": "win",
        "the judge from elsewhere": "elsewhere_win",
    }
    return Findings(
        table={
            "condition": list(figures),
            **{f"wins by {judge}": column(figures, key, SHARE) for judge, key in judges.items()},
            "true reward": column(figures, "true"),
            "KL": column(figures, "kl", POSITIVE),
        },
        panels=[
            Panel(
                "wins over the base",
                "",
                "share of wins",
                {f"by {judge}": points(figures, key) for judge, key in judges.items()},
                scale=SHARE,
                lines={"as often as the base": 0.5},
            )
        ],
        claims=[
            versus_base("in the control", control, wins=True),
            versus_base("with all causes together", together, wins=False),
            versus_base(f"with {WEAK} alone", win[f"{WEAK} alone"], wins=False),
            *(
                (
                    f"{name}: the policy wins [more|less] often than with all together",
                    win[name] - together,
                )
                for name in repairs
            ),
            *(
                versus_base(f"with {cause} alone", win[f"{cause} alone"], wins=False)
                for cause in CAUSES[1:]
            ),
            *(
                (
                    f"{WEAK} alone cost [more|fewer] wins than {cause} alone",
                    win[f"{cause} alone"] - win[f"{WEAK} alone"],
                )
                for cause in CAUSES[1:]
            ),
            (
                "with all together, the judge from elsewhere gives the policy [fewer|more] wins "
                "than the ground truth does",
                together - figures["all together"]["elsewhere_win"],
            ),
        ],
        notes=answer(figures, judges, repairs),
    )


def versus_base(where: str, win: np.ndarray, wins: bool) -> tuple[str, Estimate]:
    """The guess that a policy wins over its base, or loses to it."""
    if wins:
        return f"{where} the policy [wins over|loses to] its base", estimate(win, SHARE).above(0.5)
    return (
        f"{where} the policy [loses to|wins over] its base",
        estimate(1 - win, SHARE).above(0.5),
    )


def answer(figures: dict, judges: dict[str, str], repairs: list[str]) -> list[str]:
    """The answer to the question, as far as the numbers give one."""
    notes = []
    for judge, key in judges.items():
        if key == "true_win":  # a reward model counted the rate in question
            continue
        rates = {name: decided(cell[key]) for name, cell in figures.items()}
        near = [f"{name} ({rate})" for name, rate in rates.items() if rate.low <= SEEN <= rate.high]
        closest = min(rates, key=lambda name: abs(rates[name].mean - SEEN))
        notes.append(
            f"By {judge}, of the answers that are not tied, the rate that is closest to {SEEN:.3f} "
            f"is that of {closest} ({rates[closest]}). It is within the interval of: "
            f"{', '.join(near) or 'none'}."
        )
    healed = [name for name in repairs if estimate(figures[name]["true_win"], SHARE).low >= 0.5]
    notes.append(
        f"Repairs after which the interval of the wins is at 0.5 or above: {', '.join(healed)}."
        if healed
        else "After no repair is the interval of the wins at 0.5 or above."
    )
    return notes


def decided(wins: np.ndarray) -> Estimate:
    """The share of wins among those that are no ties; 1/2 if all are. wins: (S, P).

    It is a ratio of two means, so the deviation of a value is to first order what this value adds.
    """
    apart = wins != 0.5
    if not apart.any():
        return estimate(wins, SHARE)
    rate = wins[apart].mean()
    return estimate(rate + (wins - rate) * apart / apart.mean(), SHARE)

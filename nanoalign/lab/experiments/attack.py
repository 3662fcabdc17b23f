"""Text that a reward model overrates: by gradient, by a suffix, by sampling; and training on it."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nanoalign.lab.figures import chosen_and_rejected, read, rewards_and_truths, unit
from nanoalign.lab.findings import SHARE, Findings, Panel
from nanoalign.lab.lab import Lab
from nanoalign.lab.lab_page import OVERRATED
from nanoalign.tiny.world import true_reward

TITLE = "Adversarial answers, and training on them"
QUESTION = "Is there text that a reward model overrates, and does training on such text help?"
GUESS = (
    "A search by the gradient raises the reward without making an answer better; so do a fixed "
    "suffix and, less, the best of many samples. A model that was trained on such text no longer "
    "overrates it, but a new search finds other text."
)
METHOD = [
    "A reward model is trained on 2,000 pairs of tiny-a, seen once. The rejected answers of a "
    "tenth of the held-out pairs are changed at up to eight tokens, each time to what raises the "
    "reward most among 48 changes that the gradient of the reward proposes (python -m "
    "nanoalign.lab.search). A suffix of four tokens is sought on training answers and appended to "
    "held-out ones. The best of samples of the base is chosen by the model.",
    "Overrating is the gain by the reward model minus the gain by the ground truth. Rewards are "
    "divided by what the model gives for a unit of true reward on held-out pairs, by least "
    "squares.",
    "Then 120 training answers are attacked. Pairs of an answer before and after the attack, "
    "labelled by the ground truth, join the data of a new model, which is searched again. Another "
    "model, trained on as many further pairs without attacks, shows the effect of a new training "
    "alone.",
]
LIMITS = [
    "The ground truth labels the attacked texts. People would have to read nonsense.",
    OVERRATED,
    "The search is greedy and short. One that finds nothing proves nothing.",
    "The ground truth counts unknown words only up to four, so nonsense has a true reward of "
    "about -3 at the least.",
]
EXERCISES = [
    "Read the texts in runs/lab/made/search-*.jsonl. Which words does the model overrate, and why?",
    "Do attacks on one reward model work on another, of another seed?",
    "Add a term to the search: the log-probability of the text under the base. What is left?",
]


def model(lab: Lab, seed: int) -> dict:
    count, texts = lab.pick(600, 2000), lab.pick(40, 120)
    every = list(map(chosen_and_rejected, lab.pairs(count + texts, seed, "tiny-a")))
    pairs, spare = every[:count], every[count:]
    training = lab.runs.write("texts", rejected(pairs[:texts]))
    test_pairs = map(chosen_and_rejected, read(lab.test_pairs("tiny-a")))
    held_out = rejected(test_pairs)[: lab.prompts // 10]
    tests = lab.runs.write("texts", held_out)
    result = {}
    for n in range(rounds(lab)):
        trained, scale, accuracy = reward_model(lab, pairs, seed)
        result[f"accuracy {n}"] = accuracy
        new = search(lab, trained, tests)
        result |= gains(lab, trained, new, scale, f"search {n}")
        if n == 0:
            first = new
            sought = lab.runs.write("texts", rejected(pairs[-24:]) + held_out)
            suffixed = search(lab, trained, sought, "--suffix", 4, "--suffix_texts", 24)
            result |= gains(lab, trained, suffixed, scale, "suffix")
            result |= best_of(lab, trained, seed, tests, scale)
        else:
            result |= gains(lab, trained, first, scale, f"first search after {n}")
        if n + 1 < rounds(lab):
            more = labelled(read(search(lab, trained, training)))
            if n == 0:  # what as many pairs without attacks do
                other, scale, _ = reward_model(lab, pairs + spare[: len(more)], seed)
                result |= gains(lab, other, first, scale, "control")
            pairs = pairs + more
    return result


def rounds(lab: Lab) -> int:
    return lab.pick(2, 3)


def rejected(pairs: Iterable[dict]) -> list[dict]:
    return [{"prompt": pair["prompt"], "response": pair["rejected"]} for pair in pairs]


def reward_model(lab: Lab, pairs: list[dict], seed: int) -> tuple[Path, float, np.ndarray]:
    """A reward model, its reward of a unit of true reward, and its true accuracy by pair."""
    trained = lab.train_rm(lab.runs.write("pairs", pairs), seed)
    ranked = lab.ranked(trained, test=lab.test_pairs("tiny-a"))["test"]
    return trained, unit(ranked), ranked["true"]


def search(lab: Lab, model: Path, texts: Path, *flags) -> Path:
    return lab.runs.run(
        "-m", "nanoalign.lab.search", "--model", model, "--data", texts, *flags, suffix=".jsonl"
    )


def gains(lab: Lab, model: Path, attacked: Path, scale: float, name: str) -> dict[str, np.ndarray]:
    """By text: what the attack gained by the reward model, by the ground truth, and the difference.

    scale: the model's reward of a unit of true reward. name: of the figures.
    """
    lines = read(attacked)
    both = [
        {"prompt": line["prompt"], "response": line[key]}
        for line in lines
        for key in ("response", "attacked")
    ]
    rewards = lab.scored(model, lab.runs.write("both", both))
    reward, true = (
        np.array([of(x["prompt"], x["attacked"]) - of(x["prompt"], x["response"]) for x in lines])
        for of in (lambda prompt, text: rewards[prompt, text] / scale, true_reward)
    )
    return named(name, reward, true)


def best_of(lab: Lab, model: Path, seed: int, texts: Path, scale: float) -> dict[str, np.ndarray]:
    """As `gains`, of the best of 16 samples against their mean."""
    folder = lab.sample("tiny", seed, model, samples=16, prompts=texts)
    rewards, truths = rewards_and_truths(folder)
    rows, best = np.arange(len(rewards)), rewards.argmax(1)
    reward, true = (each[rows, best] - each.mean(1) for each in (rewards / scale, truths))
    return named("best of 16", reward, true)


def named(name: str, reward: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    figures = {"reward": reward, "true": true, "overrated": reward - true}
    return {f"{name}, {key}": values for key, values in figures.items()}


def labelled(lines: list[dict]) -> list[dict]:
    """Pairs of a response and what became of it, by the ground truth; without ties."""
    pairs = []
    for line in lines:
        texts = sorted(
            (line["response"], line["attacked"]), key=lambda text: true_reward(line["prompt"], text)
        )
        rejected, chosen = texts
        if true_reward(line["prompt"], rejected) < true_reward(line["prompt"], chosen):
            pairs.append({"prompt": line["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


def run(lab: Lab) -> Findings:
    result = lab.grid(model)[()]
    last = rounds(lab) - 1
    names = {
        "best of 16": "best of 16",
        "suffix": "suffix",
        "search 0": "found by the search",
        "control": "the same, another model",
    }
    for n in range(1, last + 1):
        names[f"first search after {n}"] = f"the same, after round {n}"
        names[f"search {n}"] = f"new search, after round {n}"
    accuracy = {n: result[f"accuracy {n}"] for n in range(last + 1)}
    return Findings(
        table={
            "text": list(names.values()),
            "gain by the reward model": [result[f"{row}, reward"] for row in names],
            "gain by the ground truth": [result[f"{row}, true"] for row in names],
            "overrated by": [result[f"{row}, overrated"] for row in names],
        },
        panels=[
            Panel(
                "what an attack gains",
                "",
                "gain of reward",
                {
                    f"by the {judge}": [
                        (name, result[f"{row}, {key}"]) for row, name in names.items()
                    ]
                    for judge, key in (("reward model", "reward"), ("ground truth", "true"))
                },
            ),
            Panel(
                "reward models on held-out pairs",
                "rounds of training on attacks",
                "agreement with the ground truth",
                {"reward model": list(accuracy.items())},
                scale=SHARE,
            ),
        ],
        claims=[
            ("the search by gradient [raises|lowers] the reward", result["search 0, reward"]),
            ("the search by gradient [lowers|raises] the true reward", -result["search 0, true"]),
            ("a suffix is [overrated|underrated]", result["suffix, overrated"]),
            ("the best of 16 samples is [overrated|underrated]", result["best of 16, overrated"]),
            (
                "the best of 16 samples is overrated [less|more] than what the search finds",
                result["search 0, overrated"] - result["best of 16, overrated"],
            ),
            (
                "text that was found with one model is overrated [less|more] by another without "
                "attacks",
                result["search 0, overrated"] - result["control, overrated"],
            ),
            (
                "a model that was trained on attacks overrates that text [less|more] than the "
                "other",
                result["control, overrated"] - result["first search after 1, overrated"],
            ),
            (
                "after one round on attacks a new search still finds text that is "
                "[overrated|underrated]",
                result["search 1, overrated"],
            ),
            (
                f"after {last} round{'s' * (last > 1)} a new search overrates [less|more] than "
                "the first",
                result["search 0, overrated"] - result[f"search {last}, overrated"],
            ),
            (
                "training on attacks [costs|gains] accuracy on held-out pairs",
                accuracy[0] - accuracy[last],
            ),
        ],
    )

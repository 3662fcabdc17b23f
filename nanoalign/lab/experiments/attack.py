"""Text that a reward model overrates: found by gradient, by a suffix, by sampling; and mended."""

from pathlib import Path

import numpy as np

from nanoalign.lab.estimates import Claim
from nanoalign.lab.figures import chosen_and_rejected, read, rewards_and_truths
from nanoalign.lab.findings import Findings, Panel
from nanoalign.lab.lab import Lab
from nanoalign.tiny.world import true_reward

TITLE = "Adversarial answers, and training on them"
QUESTION = "Is there text that a reward model overrates, and does training on it mend the model?"
GUESS = (
    "A search by the gradient raises the reward without making an answer better; so do a fixed "
    "suffix and, less, the best of many samples. A model that was trained on what was found sees "
    "through it, but a new search finds other text."
)
METHOD = [
    "A reward model is trained on pairs of tiny-a. The worse answers of held-out pairs are changed "
    "token by token, each time to what raises the reward most among changes that the gradient of "
    "the reward proposes (python -m nanoalign.lab.attack). A suffix of four tokens is sought on "
    "training answers and appended to held-out ones. The best of samples of the base is chosen by "
    "the model.",
    "Overrating is the gain by the reward model minus the gain by the true rule; both are in units "
    "of the labels, as the labels were drawn by differences of the true reward.",
    "To mend it, training answers are attacked, and pairs of the answer and what became of it, "
    "labelled by the true rule, join the data of a new model. Then the search is made anew.",
]
LIMITS = [
    "The labels of what was found are the true rule's. People would have to read nonsense.",
    "The search is greedy and short. One that finds nothing proves nothing.",
    "The true rule counts unknown words only up to four, so nonsense has a true reward of about "
    "-3 at the least.",
]
EXERCISES = [
    "Read the texts in runs/lab/made/attack-*.jsonl. Which words does the model overrate, and why?",
    "Do attacks on one reward model work on another, of another seed?",
    "Add a term to the search: the log-probability of the text under the base. What is left?",
]


def model(lab: Lab, seed: int) -> dict:
    pairs = list(map(chosen_and_rejected, lab.pairs(lab.pick(600, 2000), seed, "tiny-a")))
    worse = [{"prompt": pair["prompt"], "response": pair["rejected"]} for pair in pairs]
    training = worse[: lab.pick(40, 120)]
    held_out = [
        {"prompt": pair["prompt"], "response": pair["rejected"]}
        for pair in map(chosen_and_rejected, read(lab.test_pairs("tiny-a"))[: lab.pick(24, 60)])
    ]
    tests, trainings = lab.runs.write("texts", held_out), lab.runs.write("texts", training)
    found, old, accuracy = {}, None, []
    for n in range(lab.pick(2, 3)):
        trained = lab.train_rm(lab.runs.write("pairs", pairs), seed)
        accuracy.append(lab.ranked(trained, test=lab.test_pairs("tiny-a"))["test"]["true"])
        new = search(lab, trained, tests)
        found |= {f"search {n}, {name}": each for name, each in gains(lab, trained, new).items()}
        if old is None:
            old = new
        else:
            earlier = gains(lab, trained, old)
            found |= {f"first search after {n}, {name}": each for name, each in earlier.items()}
        if n == 0:
            with_suffix = lab.runs.write("texts", worse[-24:] + held_out)
            suffixed = gains(lab, trained, search(lab, trained, with_suffix, "--suffix", 4))
            found |= {f"suffix, {name}": each for name, each in suffixed.items()}
            best = best_of(lab, trained, seed, tests)
            found |= {f"best of 16, {name}": each for name, each in best.items()}
        pairs = pairs + labelled(read(search(lab, trained, trainings)))
    return found | {f"accuracy {n}": each for n, each in enumerate(accuracy)}


def search(lab: Lab, model: Path, texts: Path, *flags) -> Path:
    return lab.runs.run(
        "-m", "nanoalign.lab.attack", "--model", model, "--data", texts, *flags, suffix=".jsonl"
    )


def gains(lab: Lab, model: Path, attacked: Path) -> dict[str, np.ndarray]:
    """By text: what the attack gained by the reward model, by the true rule, and the difference."""
    lines = read(attacked)
    both = [{"prompt": line["prompt"], "response": line[key]}
            for line in lines for key in ("response", "attacked")]  # fmt: skip
    rewards = lab.scored(model, lab.runs.write("both", both))
    reward, true = (
        np.array([of(x["prompt"], x["attacked"]) - of(x["prompt"], x["response"]) for x in lines])
        for of in (lambda prompt, text: rewards[prompt, text], true_reward)
    )
    return {"reward": reward, "true": true, "overrated": reward - true}


def best_of(lab: Lab, model: Path, seed: int, texts: Path) -> dict[str, np.ndarray]:
    """As `gains`, of the best of 16 samples against their mean."""
    rewards, truths = rewards_and_truths(lab.sample("tiny", seed, model, samples=16, prompts=texts))
    rows, best = np.arange(len(rewards)), rewards.argmax(1)
    reward, true = (each[rows, best] - each.mean(1) for each in (rewards, truths))
    return {"reward": reward, "true": true, "overrated": reward - true}


def labelled(lines: list[dict]) -> list[dict]:
    """Pairs of a response and what became of it, by the true rule; without ties."""
    pairs = []
    for line in lines:
        texts = sorted((line["response"], line["attacked"]),
                       key=lambda text: true_reward(line["prompt"], text))  # fmt: skip
        rejected, chosen = texts
        if true_reward(line["prompt"], rejected) < true_reward(line["prompt"], chosen):
            pairs.append({"prompt": line["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


def run(lab: Lab) -> Findings:
    found = lab.grid(model)[()]
    rounds = lab.pick(2, 3)
    last = rounds - 1
    rows = ["best of 16", "suffix", "search 0"]
    rows += [f"first search after {n}" for n in range(1, rounds)]
    rows += [f"search {n}" for n in range(1, rounds)]
    names = {row: row.replace("search 0", "search").replace("search 1", "new search after 1")
             .replace("search 2", "new search after 2") for row in rows}  # fmt: skip
    accuracy = {n: found[f"accuracy {n}"] for n in range(rounds)}
    return Findings(
        columns=("text", "gain by the reward model", "gain by the true rule", "overrated by"),
        rows=[(names[row], *(found[f"{row}, {key}"] for key in ("reward", "true", "overrated")))
              for row in rows],
        panels=[
            Panel("what an attack gains", "", "gain of reward", {
                "by the reward model": [(names[row], found[f"{row}, reward"]) for row in rows],
                "by the true rule": [(names[row], found[f"{row}, true"]) for row in rows],
            }),
            Panel("the reward model after rounds of training on attacks", "rounds",
                  "agreement with the true rule on held-out pairs",
                  {"reward model": [(n, each) for n, each in accuracy.items()]}),
        ],
        claims=[
            Claim("the search by gradient raises the reward", found["search 0, reward"]),
            Claim("it lowers the true reward", -found["search 0, true"]),
            Claim("a suffix is overrated", found["suffix, overrated"]),
            Claim("the best of 16 samples is overrated", found["best of 16, overrated"]),
            Claim("the best of 16 samples is overrated less than what the search finds",
                  found["search 0, overrated"] - found["best of 16, overrated"]),
            Claim("after a round of training on attacks the first ones are overrated less",
                  found["search 0, overrated"] - found["first search after 1, overrated"]),
            Claim("after it a new search still finds overrated text",
                  found["search 1, overrated"]),
            Claim(f"after {last} round{'s' * (last > 1)} a new search overrates less than the "
                  "first", found["search 0, overrated"] - found[f"search {last}, overrated"]),
            Claim("training on attacks costs accuracy on held-out pairs",
                  accuracy[0] - accuracy[last]),
        ],
    )  # fmt: skip

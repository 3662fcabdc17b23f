"""Reads the files that the scripts have written as arrays by prompt or pair.

Shapes: P prompts or pairs, N answers to a prompt.
"""

import json
from pathlib import Path

import numpy as np

from nanoalign.evaluation.statistics import best_of_weights, win_shares
from nanoalign.tiny import world


def read(path: Path) -> list[dict]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(folder: Path, side: str = "policy") -> dict[str, list[dict]]:
    """The lines of one side of answers.jsonl by prompt, each with its true reward as `true`."""
    found: dict[str, list[dict]] = {}
    for line in read(folder / "answers.jsonl"):
        if line["side"] == side:
            true = world.true_reward(line["prompt"], line["answer"])
            found.setdefault(line["prompt"], []).append(line | {"true": true})
    return found


def grades(folder: Path, scale: float = 1.0) -> dict[str, np.ndarray]:
    """The figures of a folder of evaluate.py policy by prompt, as means over its answers.

    true, judged, tokens: of the policy's answers, (P,) each, by the ground truth, by the judge and
    their numbers. base_true, base_judged: of the baseline's. true_win, win: 1 where the policy's is
    better, 1/2 for a tie. kl: log(policy / baseline) of the policy's answers, in nats. scale: what
    `unit` returns of the judge, by which judged and base_judged are divided.
    """
    sides = [list(answers(folder, side).values()) for side in ("policy", "baseline")]
    found = {"kl": np.array([np.mean([x["log_ratio"] for x in each]) for each in sides[0]])}
    for name, key, win, one in (
        ("true", "true", "true_win", 1.0),
        ("judged", "score", "win", scale),
    ):
        policy, base = ([np.array([x[key] for x in each]) / one for each in side] for side in sides)
        found[name], found[f"base_{name}"] = (
            np.array([values.mean() for values in side]) for side in (policy, base)
        )
        found[win] = np.array(
            [win_shares(a[:, None] - b).mean() for a, b in zip(policy, base, strict=True)]
        )
    return found | {"tokens": np.array([np.mean([x["tokens"] for x in each]) for each in sides[0]])}


def hits(folder: Path, subset: str) -> dict[str, np.ndarray]:
    """The figures of a subset of a folder of evaluate.py rm by pair, chosen and rejected.

    label: 1 where the chosen response has the higher score, 1/2 for a tie. true: where the one that
    the ground truth prefers has. loss: -log sigmoid(difference of scores). scores, rewards, safety,
    words: (P, 2), where rewards and safety are the true ones.
    """
    lines = [
        line for line in read(folder / "scores.jsonl") if line["subset"].split("/")[0] == subset
    ]
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    scores, rewards, safety, words = (
        np.array([[of(line) for line in pair] for pair in pairs])
        for of in (
            lambda line: line["score"],
            lambda line: world.true_reward(line["prompt"], line["response"]),
            lambda line: world.true_safety(line["prompt"], line["response"]),
            lambda line: len(line["response"].split()),
        )
    )
    lead = scores[:, 0] - scores[:, 1]
    true_lead = rewards[:, 0] - rewards[:, 1]
    return {
        "label": win_shares(lead),
        "true": win_shares(lead * true_lead),
        "loss": np.logaddexp(0, -lead),
        "scores": scores,
        "rewards": rewards,
        "safety": safety,
        "words": words,
    }


def powers(samples: int) -> list[int]:
    """1, 2, 4, ... up to `samples`."""
    return [2**k for k in range(samples.bit_length())]


def rewards_and_truths(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The rewards of the policy's answers by the judge and by the ground truth, (P, N) each."""
    found = answers(folder).values()
    rewards, truths = (
        np.array([[line[key] for line in each] for each in found]) for key in ("score", "true")
    )
    return rewards, truths


def unit(ranked: dict[str, np.ndarray]) -> float:
    """The change of a model's reward by one unit of true reward, by least squares over the pairs.

    A reward that is divided by it is in units of the true reward. ranked: the figures of `hits`.
    """
    lead, true = (ranked[key][:, 0] - ranked[key][:, 1] for key in ("scores", "rewards"))
    return float(lead @ true) / float(true @ true)


def best_of(rewards: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """The expected value of the answer with the highest reward among n of N: (P,).

    rewards, values: (P, N).
    """
    order = np.argsort(rewards, axis=1, kind="stable")
    return np.take_along_axis(values, order, 1) @ best_of_weights(n, rewards.shape[1])


def chosen_and_rejected(record: dict) -> dict:
    """A record of the embedded world as a plain pair, by its label "better"."""
    better = record["better_response_id"]
    return {
        "prompt": record["prompt"],
        "chosen": record[f"response_{better}"],
        "rejected": record[f"response_{1 - better}"],
    }

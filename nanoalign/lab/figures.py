"""What the scripts have written, as arrays by prompt or pair.

Shapes: P prompts or pairs, N answers to a prompt.
"""

import json
from pathlib import Path

import numpy as np

from nanoalign.evaluation.best_of_n import weights
from nanoalign.tiny import world


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def grades(folder: Path) -> dict[str, np.ndarray | float]:
    """The figures of a folder of evaluate.py policy by prompt, as means over its answers.

    true, judged, tokens: of the policy's answers. base_...: the baseline's. true_win, win: 1 where
    the policy's is better, 1/2 for a tie. kl: of an answer, nan where it is not known.
    """
    true, judged, tokens, prompts = {}, {}, {}, {}
    for line in read(folder / "answers.jsonl"):
        key = line["side"], line["id"]
        prompts[line["id"]] = None
        true.setdefault(key, []).append(world.true_reward(line["prompt"], line["answer"]))
        judged.setdefault(key, []).append(line["score"])
        tokens.setdefault(key, []).append(line["tokens"])

    def of(values: dict, side: str) -> np.ndarray:
        return np.array([np.mean(values[side, name]) for name in prompts])

    def won(values: dict) -> np.ndarray:
        sides = [[np.array(values[s, n]) for n in prompts] for s in ("policy", "baseline")]
        pairs = zip(*sides, strict=True)
        return np.array([(np.sign(a[:, None] - b).mean() + 1) / 2 for a, b in pairs])

    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "true": of(true, "policy"),
        "base_true": of(true, "baseline"),
        "judged": of(judged, "policy"),
        "base_judged": of(judged, "baseline"),
        "tokens": of(tokens, "policy"),
        "true_win": won(true),
        "win": won(judged),
        "kl": metrics.get("kl_per_answer", np.nan),
    }


def hits(folder: Path, subset: str) -> dict[str, np.ndarray]:
    """The figures of a subset of a folder of evaluate.py rm by pair, chosen and rejected.

    label: 1 where the chosen response has the higher score, 1/2 for a tie. true: where the one that
    the true rule prefers has. loss: -log sigmoid(difference of scores). scores, rewards, safety,
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
        "label": (np.sign(lead) + 1) / 2,
        "true": (np.sign(lead) * np.sign(true_lead) + 1) / 2,
        "loss": np.logaddexp(0, -lead),
        "scores": scores,
        "rewards": rewards,
        "safety": safety,
        "words": words,
    }


def powers(samples: int) -> list[int]:
    return [2**k for k in range(samples.bit_length())]


def rewards_and_truths(folder) -> tuple[np.ndarray, np.ndarray]:
    """The rewards of the policy's answers by the judge and by the true rule, (P, samples) each."""
    by_prompt: dict[str, list[tuple[float, float]]] = {}
    for line in read(folder / "answers.jsonl"):
        if line["side"] == "policy":
            true = world.true_reward(line["prompt"], line["answer"])
            by_prompt.setdefault(line["id"], []).append((line["score"], true))
    both = np.array(list(by_prompt.values()))  # (P, samples, 2)
    return both[:, :, 0], both[:, :, 1]


def best_of(rewards: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """The expected value of the answer with the highest reward among n of them: (P,)."""
    order = np.argsort(rewards, axis=1, kind="stable")
    return np.take_along_axis(values, order, 1) @ weights(n, rewards.shape[1])


def chosen_and_rejected(record: dict) -> dict:
    better = record["better_response_id"]
    return {
        "prompt": record["prompt"],
        "chosen": record[f"response_{better}"],
        "rejected": record[f"response_{1 - better}"],
    }

"""Best of n: what taking the answer of the largest reward among n samples of the policy gains.

The KL of best-of-n sampling from the policy is at most log n - (n - 1) / n nats an answer (Beirami
et al. 2024, arXiv 2401.01879), often taken as its value (Gao et al. 2022, 2210.10760).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanoalign.data.prompts import prompt_key
from nanoalign.evaluation.comparison import Compared
from nanoalign.tiny import world


def weights(n: int, samples: int) -> np.ndarray:
    """How often each of the samples, in rising order of reward, is the best of n of them: (N,).

    Over all subsets of size n: C(i, n - 1) / C(N, n) for the i-th, from 0. So expectations by these
    weights are unbiased, without drawing subsets.
    """
    return np.array([math.comb(i, n - 1) for i in range(samples)]) / math.comb(samples, n)


def curve(compared: Sequence[Compared]) -> list[dict[str, float]]:
    """A line for each n, up to the smallest number of the policy's answers to a prompt.

    n, kl (nats an answer, the bound above), reward: the mean over prompts of the expected reward of
    the best of n; true_reward: that of the same answers by the true rule of the embedded world,
    where all prompts are its own.
    """
    is_tiny = {prompt_key(each.prompt) for each in compared} <= world.prompts().keys()
    sorted_answers = [sorted(each.policy, key=lambda x: x.score) for each in compared]
    rewards = [np.array([x.score for x in own]) for own in sorted_answers]
    truths = [
        np.array([world.true_reward(each.prompt, x.answer) for x in own])
        for each, own in zip(compared, sorted_answers, strict=True)
        if is_tiny
    ]
    lines = []
    for n in range(1, min(map(len, rewards)) + 1):
        line = {"n": n, "kl": math.log(n) - (n - 1) / n}
        for name, values in (("reward", rewards), ("true_reward", truths)):
            if values:
                line[name] = float(np.mean([weights(n, len(each)) @ each for each in values]))
        lines.append(line)
    return lines


def table(lines: Sequence[dict[str, float]]) -> str:
    names = [name.replace("_", " ") for name in lines[0]]
    rows = [[f"{value:d}" if key == "n" else f"{value:.4f}" for key, value in line.items()]
            for line in lines]  # fmt: skip
    return "\n".join("  ".join(f"{cell:>11}" for cell in row) for row in (names, *rows))


def picture(path: Path, lines: Sequence[dict[str, float]]) -> None:
    """Draws reward, and true reward, against the KL; the points are marked by n."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    kl = [line["kl"] for line in lines]
    judges = {"reward": "reward model", "true_reward": "true rule of the embedded world"}
    for (name, label), colour in zip(judges.items(), ("tab:blue", "tab:green"), strict=True):
        if name in lines[0]:
            axis.plot(kl, [line[name] for line in lines], "o-", color=colour, label=label)
    top = axis.secondary_xaxis("top")
    powers = [n for n in range(len(lines)) if (n + 1) & n == 0]  # of two, which stand apart
    top.set_xticks([kl[n] for n in powers], [str(n + 1) for n in powers])
    top.set_xlabel("n")
    axis.set_xlabel("KL of the best of n from the policy, nats an answer")
    axis.set_ylabel("mean reward of the best of n")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=100)
    plt.close(figure)

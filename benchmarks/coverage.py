"""How often 95 % intervals contain the truth: of a reward model's accuracy, and of the lab's means.

The first table is of three intervals of an accuracy: Wilson's over pairs, as if no two pairs shared
a prompt; a bootstrap over prompts; and that of `evaluate.py rm`, statistics.prompt_interval. Each
simulation draws prompts with answers. An answer has a normal utility, and a reward that is the
utility and a normal error. Labels are those of the utilities. A pair is a hit where the reward
orders it like the label, which has the probability 1/2 + arcsin(r) / pi, r the correlation of
reward and utility: the true accuracy is known.

The second table is of 30 prompts of very different sizes, 60 / n pairs of the n-th, where the
probability of a hit is drawn anew for each prompt. The third is of the interval of the lab,
findings.estimate, for seeds and prompts that weigh more or less.

    python benchmarks/coverage.py
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanoalign.evaluation.statistics import prompt_interval
from nanoalign.lab.findings import estimate
from nanoalign.runs.result import wilson_interval

LARGEST = 8  # answers to a prompt
RESAMPLES = 1000  # of a bootstrap
# What a prompt has: name -> the shares of prompts with so many ranked answers. "3 records": three
# records of a pair each, which share one answer.
PROMPTS = {
    "2 answers": {2: 1.0},
    "4 answers": {4: 1.0},
    "8 answers": {8: 1.0},
    "3 records": {4: 1.0},
    "2, 4 or 8 answers": {2: 0.5, 4: 0.3, 8: 0.2},
}
# The accuracy on one half of the prompts and on the other. Pairs of a prompt are the more alike.
ACCURACIES = ((0.7, 0.7), (0.6, 0.9), (0.95, 0.95))


def simulations(
    draw: np.random.Generator, count: int, prompts: int, name: str, accuracies: tuple[float, float]
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """(hits (P,), the prompt of each pair) of `count` sets of pairs."""
    first, second = np.triu_indices(LARGEST, 1)
    for _ in range(count):
        utility = draw.normal(size=(prompts, LARGEST))
        accuracy = draw.choice(accuracies, size=(prompts, 1))
        error = draw.normal(size=utility.shape) / np.tan(np.pi * (accuracy - 0.5))
        ordered = [np.sign(x[:, first] - x[:, second]) for x in (utility, utility + error)]
        sizes = draw.choice(list(PROMPTS[name]), size=(prompts, 1), p=list(PROMPTS[name].values()))
        held = second < sizes  # (prompts, pairs)
        if name == "3 records":
            held &= first == 0
        yield (ordered[0] == ordered[1])[held].astype(float), np.nonzero(held)[0].tolist()


def bootstrap_interval(hits: np.ndarray, prompts: list[int], seed: int) -> tuple[float, float]:
    """The percentile bootstrap of Efron 1979: resamples prompts with all of their pairs."""
    sums, counts = np.bincount(prompts, weights=hits), np.bincount(prompts)
    draw = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        picked = draw.integers(len(sums), size=len(sums))
        means.append(sums[picked].sum() / counts[picked].sum())
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def uneven(draw: np.random.Generator, count: int) -> None:
    """Prints the table of 30 prompts of very different sizes."""
    print("\n| accuracy | of a prompt | Wilson | prompt_interval | width |")
    print("|---|---|---|---|---|")
    prompts = np.repeat(np.arange(30), [-(-60 // n) for n in range(1, 31)])
    for accuracy in (0.5, 0.75, 0.95):
        # the two parameters of Beta, added up; None: prompts do not differ
        for alike in (0.01, 1, 4, 10, None):
            found = []
            for _ in range(count):
                beta = (accuracy * (alike or 1), (1 - accuracy) * (alike or 1))
                chance = draw.beta(*beta, 30)[prompts] if alike else accuracy
                hits = (draw.random(len(prompts)) < chance).astype(float)
                found.append(
                    [
                        wilson_interval(hits.mean(), len(hits)),
                        prompt_interval(hits, prompts.tolist()),
                    ]
                )
            low, high = np.array(found).transpose(2, 1, 0)  # (2, simulations) each
            held = [f"{share:.1%}" for share in ((low <= accuracy) & (accuracy <= high)).mean(1)]
            of_prompt = "Beta({:g}, {:g})".format(*beta) if alike else "the same"
            print(
                f"| {accuracy} | {of_prompt} | {' | '.join(held)} | {(high - low)[1].mean():.3f} |"
            )


def seeds_and_prompts(draw: np.random.Generator, count: int) -> None:
    """Prints the table of means over seeds and 600 prompts, with a residual like the prompts'.

    The width is compared with that of an interval for which the variance is known.
    """
    print("\n| seeds | variance by seeds : by prompts | estimate | width / known |")
    print("|---|---|---|---|")
    for seeds in (2, 3, 5):
        for ratio in (0, 0.3, 1, 3, 10, 100):
            of_seeds, held, widths = np.sqrt(ratio * seeds / 600), 0, []
            for _ in range(count):
                values = of_seeds * draw.normal(size=(seeds, 1)) + draw.normal(size=600)
                found = estimate(values + draw.normal(size=(seeds, 600)))
                held += found.low <= 0 <= found.high
                widths.append(found.high - found.low)
            known = 2 * 1.96 * np.sqrt((ratio + 1 + 1 / seeds) / 600)
            shown = np.mean(widths) / known
            print(f"| {seeds} | {ratio} | {held / count:.1%} | {shown:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--simulations", type=int, default=2000, help="of each row")
    parser.add_argument(
        "--bootstraps",
        type=int,
        default=400,
        help="of these simulations, with 1,000 resamples each",
    )
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    print("| prompts | a prompt has | accuracy | Wilson | bootstrap | prompt_interval | width |")
    print("|---|---|---|---|---|---|---|")
    for prompts in (200, 20):
        for accuracies in ACCURACIES:
            accuracy = sum(accuracies) / 2
            shown = (
                f"{accuracy:g}" if len(set(accuracies)) == 1 else "{:g} or {:g}".format(*accuracies)
            )
            for name in PROMPTS:
                intervals = {"Wilson": [], "bootstrap": [], "prompts": []}
                some = simulations(draw, args.simulations, prompts, name, accuracies)
                for n, (hits, groups) in enumerate(some):
                    intervals["Wilson"].append(wilson_interval(hits.mean(), len(hits)))
                    intervals["prompts"].append(prompt_interval(hits, groups))
                    if n < args.bootstraps:
                        intervals["bootstrap"].append(bootstrap_interval(hits, groups, seed=n))
                cells = [
                    f"{np.mean([low <= accuracy <= high for low, high in each]):.1%}"
                    for each in intervals.values()
                ]
                width = np.mean([high - low for low, high in intervals["prompts"]])
                row = [prompts, name, shown, *cells, f"{width:.3f}"]
                print(f"| {' | '.join(map(str, row))} |", flush=True)
    uneven(np.random.default_rng(0), args.simulations)
    seeds_and_prompts(np.random.default_rng(0), args.simulations)


if __name__ == "__main__":
    main()

"""The plan of micro-batches at scale, simulated: how even the ranks' work is, how long planning takes.

    python benchmarks/plan.py

Lengths are drawn from lognormal distributions: one fitted to HH-RLHF's harmless dialogues (1,812 records, a
vocabulary of 4,096), and one with a long tail, as mixtures of chat and documents have. A step has 8 pairs a
rank. A round lasts as long as its slowest rank: `slowest` is the sum of that over rounds, over the mean
rank's work. Work is counted in tokens, as the plan does, and then in operations of the Qwen2.5-0.5B
shape, whose attention grows with the square of a row's length.
"""

import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanoalign.plan import plan_micro_batches  # noqa: E402

# Mean and standard deviation of the logarithm of a prompt's and of a response's tokens.
LENGTHS = {
    "HH-RLHF": ((4.45, 1.00), (3.52, 0.93)),
    "long-tailed": ((5.5, 1.3), (5.0, 1.2)),
}
LONGEST = 2048  # tokens of a prompt, and of a response
PAIRS_A_RANK = 8
MICRO_BATCH_TOKENS = 8192
# Of the Qwen2.5-0.5B shape: weights of a block's matrices, all blocks; width of all heads, times layers.
WEIGHTS, WIDTHS = 357_826_560, 24 * 896


def main() -> None:
    print(
        "| lengths | ranks | pairs | tokens | rounds | computed / real | slowest, tokens "
        "| slowest, operations | ms to plan |\n|---|---|---|---|---|---|---|---|---|"
    )
    draw = np.random.default_rng(0)
    for name, shapes in LENGTHS.items():
        for ranks in (8, 64, 1024):
            pairs = ranks * PAIRS_A_RANK
            prompts, chosen, rejected = (
                np.exp(draw.normal(mean, spread, pairs)).astype(int).clip(1, LONGEST)
                for mean, spread in (shapes[0], shapes[1], shapes[1])
            )
            lengths = prompts + chosen + rejected
            seen = prompts**2 // 2 + sum(r * prompts + r**2 // 2 for r in (chosen, rejected))
            operations = 2 * WEIGHTS * lengths + 4 * WIDTHS * seen
            rows = [range(length) for length in lengths]  # the plan asks for their length alone
            begun = time.perf_counter()
            plan = plan_micro_batches(rows, ranks, MICRO_BATCH_TOKENS)
            milliseconds = 1000 * (time.perf_counter() - begun)
            slowest = [
                sum(max(work[group].sum() for group in part) for part in plan)
                / (work.sum() / ranks)
                for work in (lengths, operations)
            ]
            computed = sum(lengths[group].sum() for part in plan for group in part)
            print(
                f"| {name} | {ranks:,} | {pairs:,} | {lengths.sum():,} | {len(plan)} "
                f"| {computed / lengths.sum():.3f} | {slowest[0]:.3f} | {slowest[1]:.3f} "
                f"| {milliseconds:.1f} |"
            )


if __name__ == "__main__":
    main()

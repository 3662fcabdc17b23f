"""The plan of micro-batches on many ranks: how even their work is, and how long planning takes.

    python benchmarks/plan.py

Lengths are drawn from lognormal distributions: one fitted to the harmless dialogues of HH-RLHF
(1,812 records, a vocabulary of 4,096), and one with a long tail, as in mixtures of chat and
documents. A step has 8 pairs a rank. A round lasts as long as its slowest rank: `slowest` is the
sum of the largest work of each round, divided by the mean work of a rank. Work is counted in
tokens, as in the plan, and in operations of the Qwen2.5-0.5B shape, whose attention grows with the
square of the length of a row.
"""

import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanoalign.packing.plan import pack  # noqa: E402

# Mean and standard deviation of the logarithm of a prompt's and of a response's tokens.
LENGTHS = {
    "HH-RLHF": ((4.45, 1.00), (3.52, 0.93)),
    "long-tailed": ((5.5, 1.3), (5.0, 1.2)),
}
LONGEST = 2048  # tokens of a prompt, and of a response
PAIRS_A_RANK = 8
MICRO_BATCH_TOKENS = 8192
# Of the Qwen2.5-0.5B shape: elements of the matrices of all blocks; width of all heads x layers.
ELEMENTS, WIDTHS = 357_826_560, 24 * 896


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
            attended = prompts**2 // 2 + sum(r * prompts + r**2 // 2 for r in (chosen, rejected))
            operations = 2 * ELEMENTS * lengths + 4 * WIDTHS * attended
            begun = time.perf_counter()
            groups = pack(lengths.tolist(), ranks, MICRO_BATCH_TOKENS)
            milliseconds = 1000 * (time.perf_counter() - begun)
            plan = [groups[n : n + ranks] for n in range(0, len(groups), ranks)]
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

"""The plan of micro-batches on many ranks: how even their work is, and how long planning takes.

    python benchmarks/plan.py

Lengths are drawn from lognormal distributions: one fitted to the harmless dialogues of HH-RLHF
(1,812 records, a vocabulary of 4,096), whole and cut to the default --max_length, and one with a
long tail, as in mixtures of chat and documents. A step has 8 pairs a rank. Work is counted in
operations of the Qwen2.5-0.5B shape: blocks, head on the tokens of responses, attention.

A round lasts as long as its slowest rank: `slowest` is the sum of the largest work of each round,
divided by the mean work of a rank. No plan is below `longest row`, the work of that row alone.
`split` is the same, if a row per response repeats the prompt. ms: of one core. Each figure is the
median of nine draws, and the largest in brackets.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanoalign.batch import Row
from nanoalign.distributed import World
from nanoalign.packing.packed import PackedBatcher, operations

# Mean and standard deviation of the logarithm of a prompt's and of a response's tokens, and the
# most tokens of a prompt with its longer response.
HH, LONG = ((4.45, 1.00), (3.52, 0.93)), ((5.5, 1.3), (5.0, 1.2))
LENGTHS = {"HH-RLHF": (*HH, 4096), "HH-RLHF, cut": (*HH, 1024), "long-tailed": (*LONG, 4096)}
LONGEST = 2048  # tokens of a prompt, and of a response
PAIRS_A_RANK, MICRO_BATCH_TOKENS, DRAWS = 8, 8192, 9
# The Qwen2.5-0.5B shape: elements of all blocks and of the head; two products of 896 in 24 blocks.
COSTS = (357_897_216, 151_936 * 896, 2 * 24 * 896)

HEADS = (
    "lengths", "ranks", "pairs", "rounds by tokens", "by operations", "longest row", "split",
    "slowest by tokens", "by operations", "ms to plan",
)  # fmt: skip
FORMS = ("g", "g", ".3f", ".3f", ".3f", ".3f", ".1f")  # of what measure returns


def main() -> None:
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
    for name, shape in LENGTHS.items():
        for ranks in (8, 64, 1024):
            pairs = ranks * PAIRS_A_RANK
            found = zip(*(measure(draw(shape, pairs, n), ranks) for n in range(DRAWS)), strict=True)
            cells = [
                f"{np.median(values):{form}} ({max(values):{form}})"
                for values, form in zip(found, FORMS, strict=True)
            ]
            print(f"| {name} | {ranks:,} | {pairs:,} | {' | '.join(cells)} |")


def draw(shape: tuple, pairs: int, seed: int) -> np.ndarray:
    """Tokens of prompts, chosen and rejected responses: (3, pairs).

    As in encoding, what is too long loses the beginning of its prompt.
    """
    generator = np.random.default_rng(seed)
    prompts, *responses = (
        np.exp(generator.normal(mean, spread, pairs)).astype(int).clip(1, LONGEST)
        for mean, spread in (shape[0], shape[1], shape[1])
    )
    chosen, rejected = (part.clip(max=shape[2] - 1) for part in responses)
    return np.stack(
        [np.minimum(prompts, shape[2] - np.maximum(chosen, rejected)), chosen, rejected]
    )


def measure(lengths: np.ndarray, ranks: int) -> tuple[float, ...]:
    """Rounds by tokens and by operations; longest row, split; slowest likewise; ms to plan."""
    work = operations(lengths, COSTS)
    share = work.sum() / ranks
    split = operations(np.stack([lengths[0], lengths[1:].max(0)]), COSTS)
    rows = []
    for parts in lengths.T.tolist():
        prompt, *responses = (np.zeros(n, np.int32) for n in parts)
        rows.append(Row("", prompt, tuple(responses)))
    batcher = PackedBatcher(World(0, ranks, torch.device("cpu"), None), MICRO_BATCH_TOKENS)
    rounds, slowest = [], []
    for batcher.costs in (PackedBatcher.costs, COSTS):
        begun = time.process_time()
        plan = batcher.plan(rows)
        milliseconds = 1000 * (time.process_time() - begun)
        rounds.append(len(plan))
        slowest.append(sum(max(work[group].sum() for group in part) for part in plan) / share)
    return *rounds, work.max() / share, split.max() / share, *slowest, milliseconds


if __name__ == "__main__":
    main()

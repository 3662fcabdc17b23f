"""Host time of the block mask of packed rows: from their lengths, and by create_block_mask.

    python benchmarks/masks.py 256 2048 8192

create_block_mask computes all T x T places; on a CPU that is in its time, on a GPU in the GPU's.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanoalign.packing.flex import block_mask
from nanoalign.packing.tree import coordinates

CPU = torch.device("cpu")


def of_all_places(rows: list[tuple[int, ...]]) -> object:
    row, segment, _ = map(torch.tensor, coordinates(rows))

    def attends(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (segment[k] == 0) | (segment[k] == segment[q])
        return (k <= q) & (row[k] == row[q]) & own

    return create_block_mask(attends, None, None, len(row), len(row), device="cpu")


def milliseconds(function: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    torch.set_num_threads(1)
    print("| tokens | rows | of all places, ms | of lengths, ms | times |\n|---|---|---|---|---|")
    for tokens in map(int, sys.argv[1:] or ("256", "2048", "8192")):
        draw, rows, left = random.Random(0), [], tokens
        while left:
            row = (draw.randint(20, 200), draw.randint(1, 80), draw.randint(1, 80))
            rows.append(row if sum(row) <= left else (left,))
            left -= sum(rows[-1])
        before = milliseconds(lambda rows=rows: of_all_places(rows), 5 if tokens < 10_000 else 1)
        after = milliseconds(lambda rows=rows: block_mask(rows, None, CPU), 30)
        print(f"| {tokens:,} | {len(rows)} | {before:.1f} | {after:.2f} | {before / after:,.0f} |")


if __name__ == "__main__":
    main()

"""Log-probabilities of scored tokens with a large vocabulary: time, memory and exactness.

    python benchmarks/head.py                       1,000 tokens, D 896, V 151,936 (Qwen2.5-0.5B)

Forward and backward, in turn: `whole` holds all logits, `tokens` computes those of some tokens at a
time and again in the backward pass (torch.utils.checkpoint), `vocabulary` is
logps.chunked_token_logps, and `torch` is F.linear_cross_entropy, where torch has it (2.13). Memory
is the largest of a process of its own, less what it had before.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanoalign.logps import Head, chunked_token_logps
from nanoalign.model import CHUNK_LOGITS

TOKENS_AT_A_TIME = 2**25  # logits, of `tokens`


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")


def tokens(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    size = max(1, TOKENS_AT_A_TIME // len(weight))
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(whole, h, weight, t, use_reentrant=False) for h, t in parts])


def vocabulary(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    chunk = CHUNK_LOGITS["cpu"] // len(hidden)
    return chunked_token_logps(hidden, Head(weight), targets, max(64, chunk // 64 * 64))


def of_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


WAYS = {"whole": whole, "tokens": tokens, "vocabulary": vocabulary}
WAYS |= {"torch": of_torch} if hasattr(F, "linear_cross_entropy") else {}


def run(way: str, args: argparse.Namespace) -> tuple[float, float, float, list[Tensor]]:
    """(seconds forward, backward, GB, [log-probabilities, gradients of hidden and weight])."""
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.width, requires_grad=True)
    weight = torch.randn(args.vocabulary, args.width).mul_(0.05).requires_grad_()
    targets = torch.randint(0, args.vocabulary, (args.tokens,))
    upstream = torch.randn(args.tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    logps = WAYS[way](hidden, weight, targets)
    middle = time.perf_counter()
    logps.backward(upstream)
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = [logps.detach(), hidden.grad, weight.grad]
    return middle - start, end - middle, (peak - before) * 1024 / 1e9, results


def main() -> None:
    args = parse_args()
    context = multiprocessing.get_context("spawn")
    found = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            with context.Pool(1) as pool:
                found[way].append(pool.apply(run, (way, args)))
    expected = found["whole"][0][3]
    print("| way | forward, s | backward, s | both | memory, GB | largest relative difference |")
    print("|---|---|---|---|---|---|")
    for way, runs in found.items():
        forward, backward = (statistics.median(run[n] for run in runs) for n in (0, 1))
        both = statistics.median(run[0] + run[1] for run in runs)
        memory = max(run[2] for run in runs)
        off = max(
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in zip(runs[0][3], expected, strict=True)
        )
        print(f"| {way} | {forward:.2f} | {backward:.2f} | {both:.2f} | {memory:.2f} | {off:.1e} |")


if __name__ == "__main__":
    main()

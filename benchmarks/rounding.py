"""What bfloat16 costs in accuracy: differences of pairs and gradients, beside float32.

The log-probability of the chosen response minus that of the rejected one, of each pair, and the
gradient of the DPO loss at the start, in three ways: as nanoalign trains with --precision bf16;
with embedding and norms in float32, so that the residual stream is float32; and as autocast does
(the parameters are float32, products are bfloat16), which is how TRL trains with bf16.

    python benchmarks/rounding.py --model MODEL --data PAIRS --pairs 64
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanoalign.batch import Row, collate
from nanoalign.data.formats import formats
from nanoalign.data.sources import read_records
from nanoalign.data.templates import encode_records
from nanoalign.distributed import setup
from nanoalign.losses import dpo_loss
from nanoalign.model import Policy
from nanoalign.weights.folders import load_tokenizer, local_folder

BETA, ROWS = 0.1, 8  # rows of a forward


class Float32Residual(Policy):
    """A policy whose residual stream is float32: what adds to it is bfloat16."""

    def exact(self) -> tuple[nn.Module, ...]:
        parts = self.model.modules()
        return tuple(m for m in parts if isinstance(m, nn.Embedding) or "Norm" in type(m).__name__)


def measure(policy: Policy, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """(differences of the pairs, (B,); the gradient as one vector)."""
    differences = []
    for start in range(0, len(rows), ROWS):
        batch = collate(rows[start : start + ROWS])
        logps = policy(batch)
        chosen, rejected = logps[batch.chosen], logps[batch.rejected]
        losses, _, _ = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), BETA)
        losses.sum().backward()
        differences.append((chosen - rejected).detach())
    gradients = [p.grad.float().flatten() for p in policy.parameters() if p.grad is not None]
    return torch.cat(differences), torch.cat(gradients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", default="tiny")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=512)
    args = parser.parse_args()
    world, folder = setup(), local_folder(args.model)
    records = list(read_records(formats(), [args.data]))[: args.pairs]
    rows = encode_records(records, load_tokenizer(folder), args.max_length, "auto")
    exact, gradient = measure(Policy.load(folder, world, torch.float32), rows)
    autocast = Policy.load(folder, world, torch.float32)
    autocast.dtype = torch.bfloat16
    print("| | error of a pair, nats: root mean square | largest | error of the gradient |")
    print("|---|---|---|---|")
    for name, policy in {
        "nanoalign": Policy.load(folder, world, torch.bfloat16),
        "float32 residual stream": Float32Residual.load(folder, world, torch.bfloat16),
        "autocast": autocast,
    }.items():
        found, its_gradient = measure(policy, rows)
        off = (found - exact).abs()
        relative = (its_gradient - gradient).norm() / gradient.norm()
        print(f"| {name} | {off.pow(2).mean().sqrt():.4f} | {off.max():.4f} | {relative:.2%} |")


if __name__ == "__main__":
    main()

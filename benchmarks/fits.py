"""What fits on one GPU, counted: the table of docs/models.md for training with and without LoRA.

    python benchmarks/fits.py                     the table
    python benchmarks/fits.py llama-3.1-8b        the parts of --lora_rank 16 --base_dtype nf4

A micro-batch takes what roofline.py says of plain blocks, with --activation_checkpointing the input
of each block and one block; in the table these figures are in brackets, where it does not fit
without. A tenth of the memory is left free. A T4 (16 GB) computes in float16.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import roofline
from shapes import SHAPES
from step_counts import Run, Shape

from nanoalign.packing.fitting import FREE
from nanoalign.weights import nf4

MODELS = {"0.5B": "qwen2.5-0.5b", "3B": "qwen2.5-3b", "8B": "llama-3.1-8b"}
CARDS = (16, 24, 80, 141)  # GB: a T4, a 4090, an A100 or H100, an H200
T4 = 16  # computes in float16, while the files have bfloat16
RANK, ROWS = 16, 1024  # of adapters; tokens of the smallest micro-batch: a row of this length
ALL, LORA, NF4 = "", f"--lora_rank {RANK}", f"--lora_rank {RANK} --base_dtype nf4"


def adapters(shape: Shape) -> int:
    """Trained parameters of --lora_rank: RANK * (in + out) for each of seven layers of a block."""
    d, q, k, i = shape.widths
    return shape.layers * RANK * ((d + q) + 2 * (d + k) + (q + d) + 3 * (d + i))


def parts(shape: Shape, flags: str, gigabytes: int, checkpointing: bool) -> dict[str, float]:
    """Bytes by what they are for, without the activations of a micro-batch."""
    rest, of_blocks = shape.parameters - shape.blocks, 2.0
    copied = rest + shape.blocks / (shape.layers if checkpointing else 1)  # to 16 bits, at a time
    found = {"a chunk of logits and its gradient, at most": 10.0 * roofline.CHUNK}
    if flags == ALL:
        found["parameters, gradients, moments, the reference"] = 18.0 * shape.parameters
        return found | {"copies in 16 bits": 2.0 * copied}
    if flags == NF4:
        of_blocks, copied = nf4.BYTES / nf4.BLOCK, rest
        d, _, _, i = shape.widths
        found["a weight of the largest layer, unpacked, in float32 and 16 bits"] = 6.0 * d * i
    found["linear layers of the blocks"] = of_blocks * shape.blocks
    found["embedding and head"] = 2.0 * rest
    found["adapters: parameters, gradients, moments, a copy in 16 bits"] = 18.0 * adapters(shape)
    return found | ({"copies in float16": 2.0 * copied} if gigabytes == T4 else {})


def tokens(shape: Shape, flags: str, gigabytes: int, checkpointing: bool) -> int:
    """Tokens of a micro-batch that fit; below 0: nothing does."""
    _, of_token = roofline.memory(shape, Run(compiled=False, checkpointing=checkpointing))
    room = (1 - FREE) * gigabytes * 1e9
    return int((room - sum(parts(shape, flags, gigabytes, checkpointing).values())) / of_token)


def table() -> list[str]:
    heads = ["model", "GPU", "all weights are trained", f"`{LORA}`", f"`{NF4}`"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, folder in MODELS.items():
        shape = Shape(SHAPES[folder])
        for gigabytes in CARDS:
            cells = [name, f"{gigabytes} GB"]
            for flags in (ALL, LORA, NF4):
                plain, again = (tokens(shape, flags, gigabytes, c) for c in (False, True))
                cells.append(
                    f"{plain:,}" if plain >= ROWS else f"({again:,})" if again >= ROWS else ""
                )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", nargs="?", choices=SHAPES, help="without one: the table")
    name = parser.parse_args().shape
    if name is None:
        return print("\n".join(table()))
    shape = Shape(SHAPES[name])
    found = parts(shape, NF4, CARDS[1], True)
    for part, size in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{size / 1e9:8.2f} GB  {part}")
    print(f"{sum(found.values()) / 1e9:8.2f} GB  in all, beside the activations of a micro-batch")
    for checkpointing in (False, True):
        _, of_token = roofline.memory(shape, Run(compiled=False, checkpointing=checkpointing))
        flag = " with --activation_checkpointing" * checkpointing
        print(f"{ROWS * of_token / 1e9:8.2f} GB  activations of a row of {ROWS:,} tokens{flag}")


if __name__ == "__main__":
    main()

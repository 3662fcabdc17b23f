"""A waterfall of an optimizer step of DPO: the time that each kind of kernel should take on a GPU.

    python benchmarks/roofline.py qwen2.5-0.5b                     64 pairs on one H200
    python benchmarks/roofline.py llama-3.1-8b --gpus 8 --pairs 256
    python benchmarks/roofline.py qwen2.5-0.5b --profile runs/gpu_check/gpu_check.json
    python benchmarks/roofline.py                                  the table of docs/models.md

Rows have the lengths of HH-RLHF, the micro-batches are those of a run, and of each round the rank
with the most work counts. step_counts.py counts operations and bytes. A kernel takes the longer of
two times: its operations at the GPU's peak, its bytes at the bandwidth of its memory, each times a
share that kernels reach. The shares come from one profile, of a plain step on an H100 (RESULTS.md):

    products     59 ms: 0.85 of the peak
    attention    24 ms forward, 12 ms backward: 0.038 and 0.095 of the peak, for all pairs of blocks
                 that are visited. 0.075 forward with eight warps: compiled steps at a width of 64,
                 which gained 5 and 21 ms by them
    AdamW        5.2 ms: 0.79 of the bandwidth, which is then assumed of all that moves bytes

So the time of element-wise kernels is predicted, and that of the rest for other shapes. The network
is as in scaling.py: it works while the GPU computes. The host's time to launch all this was
measured on a CPU (host.py). A step takes the longest of the three.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from scaling import CARD, GPUS_A_HOST, HOP, NVLINK, REACHED
from shapes import SHAPES
from step_counts import Kernels, Run, Shape, kernels, micro_batches

PEAK = 989e12  # operations a second, of both GPUs
GPUS = {"h100": (3.35e12, 80e9), "h200": (4.8e12, 141e9)}  # bytes a second, bytes of memory
PRODUCTS, BANDWIDTH = 0.85, 0.79
ATTENTION = {"forward": 0.038, "backward": 0.095}
EIGHT_WARPS = 0.075  # forward
HOST = 37e-3 / 24  # seconds: a block of a micro-batch, forward of both models and backward
CHUNK = 2**28  # logits in memory at one time
LEAST = 2048  # tokens of a micro-batch; where fewer fit, a flag is needed
KINDS = {  # parts of the names of kernels; all others are element-wise
    "products": ("gemm", "nvjet", "cutlass", "cublas"),
    "attention": ("flex_attention", "flash", "fmha"),
    "element-wise": (),
    "optimizer": ("Adam",),
}


def kind_of(kernel: str) -> str:
    """The kind of a kernel of a profile, by its name."""
    found = (kind for kind, parts in KINDS.items() if any(part in kernel for part in parts))
    return next(found, "element-wise")


def seconds(each: Kernels, shape: Shape, run: Run) -> float:
    reached = ATTENTION[each.name] if each.kind == "attention" else PRODUCTS
    if (each.kind, each.name) == ("attention", "forward") and run.compiled and shape.head_dim == 64:
        reached = EIGHT_WARPS
    return max(each.operations / (PEAK * reached), each.bytes / (GPUS[run.gpu][0] * BANDWIDTH))


def network(shape: Shape, run: Run, batches: int) -> float:
    """Seconds in which GPUs send: gathers and reduces of each micro-batch, sums between copies.

    FSDP2 where all GPUs share one copy, HSDP where there are several.
    """
    rest, copies = shape.parameters - shape.blocks, run.gpus // run.shards
    moved = 2 * (3 * shape.blocks + 2 * rest) + 4 * shape.parameters
    moved *= batches * (run.shards - 1) / run.shards
    in_host = run.shards <= GPUS_A_HOST
    hops = batches * (4 * shape.layers + 3) * (run.shards - 1)
    ring = moved / (REACHED * (NVLINK if in_host else CARD * GPUS_A_HOST)) + hops * HOP[in_host]
    summed = 2 * (copies - 1) / copies * 4 * shape.parameters / run.shards
    return ring + summed / (REACHED * (NVLINK if run.gpus <= GPUS_A_HOST else CARD))


def memory(shape: Shape, run: Run) -> tuple[float, float]:
    """Bytes of a GPU: (whatever a micro-batch has, for each token of a micro-batch)."""
    d, q, k, i = (2 * width for width in shape.widths)
    rest = shape.parameters - shape.blocks
    # Parameters, gradients and two moments in float32, the reference; what is cast or gathered; a
    # chunk of logits with its gradient; the gradient of the head.
    fixed = 18 * shape.parameters / run.shards
    fixed += 2 * (shape.parameters if run.gpus == 1 else rest + 4 * shape.blocks / shape.layers)
    fixed += CHUNK * (4 if run.compiled else 10) + 2 * shape.head
    block = 4 * d + 2 * q + 2 * k + 3 * i
    if not run.compiled:  # norms also keep their input in float32, and what is scaled by weights
        block += 6 * d + i
    return fixed, shape.layers * d + block if run.checkpointing else shape.layers * block


def most_tokens(shape: Shape, run: Run) -> int:
    """Tokens of a micro-batch that leave a tenth of the memory free; below 0: nothing fits."""
    fixed, of_token = memory(shape, run)
    return int((0.9 * GPUS[run.gpu][1] - fixed) / of_token)


def estimate(shape: Shape, run: Run) -> dict[str, float]:
    """Seconds of each kind of kernel, of GPU, network, host and step; and the share of the peak."""
    counts, found = micro_batches(shape, run), dict.fromkeys(KINDS, 0.0)
    for each in kernels(shape, run):
        found[each.kind] += seconds(each, shape, run)
    found["GPU"] = sum(found.values())
    found["network"] = network(shape, run, len(counts))
    found["host"] = HOST * shape.layers * len(counts)
    found["step"] = max(found["GPU"], found["network"], found["host"])
    # As in RESULTS.md: four forwards, so nothing that is computed twice counts.
    useful = 4 * 2 * float(np.dot(shape.costs, counts.sum(0)[:3]))
    return found | {"of the peak": useful / (PEAK * found["step"])}


def measured(path: Path) -> dict[str, float]:
    """Milliseconds of each kind, of gpu_check.json or of the file of its profile step."""
    content = json.loads(path.read_text())
    figures = [step.get("figures", {}) for step in content.get("steps", [{"figures": content}])]
    found = [each["ms of kinds"] for each in figures if "ms of kinds" in each]
    if not found:
        sys.exit(f"{path} has no profile: gpu_check.py --steps qwen2.5-0.5b_profile makes one")
    return found[-1]


def waterfall(shape: Shape, run: Run, profile: dict[str, float]) -> list[str]:
    """Lines of a table: of all kernels of a name, and of each kind."""
    found, counts = estimate(shape, run), micro_batches(shape, run)
    ms = {name: f"{1e3 * value:.1f}" for name, value in found.items()}
    lines = ["| kind | | TFLOP | GB | ms | measured, ms |", "|---|---|---|---|---|---|"]
    for kind in KINDS:
        for each in kernels(shape, run):
            if each.kind == kind:
                sizes = f"{each.operations / 1e12:.2f} | {each.bytes / 1e9:.1f}"
                time = 1e3 * seconds(each, shape, run)
                lines.append(f"| | {each.name} | {sizes} | {time:.1f} | |")
        lines.append(f"| **{kind}** | | | | {ms[kind]} | {profile.get(kind, '')} |")
    total = f"{sum(profile.values()):.1f}" if profile else ""
    lines.append(f"| **GPU** | | | | {ms['GPU']} | {total} |")
    for shards in sorted({1, run.shards, run.gpus}) if run.gpus > 1 else ():
        sent = 1e3 * network(shape, replace(run, shards=shards), len(counts))
        lines.append(f"| network | {shards} shards | | | {sent:.1f} | |")
    lines.append(f"| host | | | | {ms['host']} | |")
    fixed, of_token = memory(shape, run)
    held = (fixed + of_token * counts[:, 0].max()) / 1e9
    return [
        f"{run}",
        *lines,
        f"micro-batches of a rank: {len(counts)}, {counts[:, 0].sum():,} tokens; {ms['step']} ms a "
        f"step, {found['of the peak']:.0%} of the peak; {held:.1f} GB; a micro-batch of "
        f"{most_tokens(shape, run):,} tokens fits",
    ]


def advised(shape: Shape, gpus: int, pairs: int) -> list[str]:
    """Cells of the table: the fastest run that fits, with the least network."""
    runs = [
        Run(gpus=gpus, shards=shards, pairs=pairs, checkpointing=again)
        for shards in {1, gpus}
        for again in (False, True)
    ]
    fit = [replace(run, tokens=most) for run in runs if (most := most_tokens(shape, run)) > LEAST]
    if not fit:
        return ["", "", "", "memory", "`--lora_rank 16`"]
    found = [(estimate(shape, run), run) for run in fit]
    best, run = min(found, key=lambda each: (each[0]["step"], each[0]["network"]))
    others = [name for name in ("network", "host") if best[name] == best["step"]]
    bound = others[0] if others else max(KINDS, key=best.get)
    flags = [f"--shard_size {run.shards}"] * (run.shards < gpus)
    flags += ["--activation_checkpointing"] * run.checkpointing
    return [
        f"{run.tokens:,}",
        f"{1e3 * best['step']:.0f}",
        f"{best['of the peak']:.0%}",
        f"{bound}, {best[bound] / best['step']:.0%}",
        f"`{' '.join(flags)}`" if flags else "",
    ]


def table() -> None:
    heads = "model", "GPUs", "pairs", "tokens that fit", "ms", "of the peak", "bound by", "flags"
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    names = {"0.5B": "qwen2.5-0.5b", "1B": "llama-3.2-1b", "3B": "qwen2.5-3b", "8B": "llama-3.1-8b"}
    for name, shape in names.items():
        for gpus, all_pairs in ((1, (64, 256)), (8, (64, 256, 512))):
            for pairs in all_pairs:
                cells = name, f"{gpus}", f"{pairs}", *advised(Shape(SHAPES[shape]), gpus, pairs)
                print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("shape", nargs="?", choices=SHAPES, help="without one: the table of docs/models.md")
    add("--gpu", choices=GPUS, default="h200")
    add("--gpus", type=int, default=1)
    add("--shards", type=int, help="GPUs that share one copy (--shard_size); default: all")
    add("--pairs", type=int, default=64, help="--batch_size")
    add("--tokens", type=int, default=16384, help="--micro_batch_tokens")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    add("--activation_checkpointing", action="store_true")
    add("--profile", type=Path, metavar="FILE", help="gpu_check.json, whose figures stand beside")
    args = parser.parse_args()
    if args.shape is None:
        return table()
    run = Run(args.gpu, args.gpus, args.shards or args.gpus, args.pairs, args.tokens, args.compile,
              args.activation_checkpointing)  # fmt: skip
    profile = measured(args.profile) if args.profile else {}
    print("\n".join(waterfall(Shape(SHAPES[args.shape]), run, profile)))


if __name__ == "__main__":
    main()

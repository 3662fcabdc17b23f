"""From flags to rows, and the block that says so: what both training scripts do before their loop."""

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from nanoalign import loop
from nanoalign.data import TEST_OF, hold_out, read_sources
from nanoalign.distributed import World, print0
from nanoalign.errors import RunError, in_a_line
from nanoalign.plan import padded_tokens, plan_micro_batches, step_indices
from nanoalign.records import Example, by_preference
from nanoalign.rows import Row, drop_equal, encode_all
from nanoalign.templates import common_template
from nanoalign.weights import FOREIGN_ERRORS

# Of a coefficient of length: it must be at its place before the model learns length by itself.
FASTER = 400.0
PLANNED_STEPS = 50  # whose padding is counted before training


def compute_dtype(args: argparse.Namespace, world: World) -> torch.dtype:
    """What --precision stands for on this machine."""
    if args.precision == "auto":
        return torch.bfloat16 if world.device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]


def load_tokenizer(folder: Path):
    """The tokenizer of a model's folder."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except FOREIGN_ERRORS as error:
        raise RunError(
            f"model folder '{folder}' has no readable tokenizer: {in_a_line(error)}"
        ) from error


def make_optimizer(
    model: nn.Module, args: argparse.Namespace, faster: nn.Module | None = None
) -> torch.optim.Optimizer:
    """AdamW over the sharded parameters that are trained; biases and norms, which are vectors, do not decay.

    faster: a part that learns at FASTER times the rate: a few numbers beside a whole model.
    """
    apart = set(faster.parameters()) if faster is not None else set()
    others = [p for p in model.parameters() if p.requires_grad and p not in apart]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        {"params": list(apart), "weight_decay": 0.0, "lr_scale": FASTER},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=args.lr, fused=True)


def load_rows(
    args: argparse.Namespace, tokenizer, unpaired: bool = False
) -> tuple[list[Row], list[Row], Counter]:
    """(training rows, held-out rows, counts of the former), printing what was read, cut and dropped.

    unpaired: whether single responses with a label will do.
    """
    examples = read_sources(args.data, args.preference, unpaired)
    if args.eval_data is None and all(source in TEST_OF for source in args.data):
        args.eval_data = [TEST_OF[source] for source in args.data]
    if args.eval_data is not None:
        held_out = read_sources(args.eval_data, args.preference, unpaired)
        source = " ".join(args.eval_data)
    else:
        examples, held_out = hold_out(examples, args.eval_share, args.seed)
        source = f"{args.eval_share:g} of the prompts"
    args.template = common_template(args.template, examples + held_out, tokenizer)
    if getattr(args, "condition", False):
        examples, held_out = (
            [part for example in some for part in by_preference(example, args.preference)]
            for some in (examples, held_out)
        )
    rows, counts = _encode("data", " ".join(args.data), examples, args, tokenizer)
    eval_rows, _ = _encode("held out", source, held_out, args, tokenizer)
    if not rows:
        raise RunError(
            f"--data {' '.join(args.data)}: no pairs are left to train on; see the counts above"
        )
    return rows, eval_rows, counts


def _encode(
    name: str, source: str, examples: list[Example], args: argparse.Namespace, tokenizer
) -> tuple[list[Row], Counter]:
    rows, counts = encode_all(examples, tokenizer, args.template, args.max_length)
    rows = drop_equal(rows, counts)
    notes = "".join(f"; {count:,} {reason}" for reason, count in counts.items() if count)
    pairs = sum(len(example.pairs) for example in examples)
    ranked = f"{len(examples):,} records with " if pairs != len(examples) else ""
    print0(f"{name:<11} {source}: {ranked}{pairs:,} pairs{notes}")
    return rows, counts


def describe_plan(rows: list[Row], args: argparse.Namespace, world: World) -> None:
    """Prints how many steps there will be, and the tokens computed against those that are needed."""
    total, epoch = loop.total_steps(len(rows), args), loop.steps_per_epoch(len(rows), args)
    counts: Counter = Counter()
    for step in range(min(total, PLANNED_STEPS)):
        step_rows = [rows[i] for i in step_indices(step, len(rows), args.batch_size, args.seed)]
        plan = plan_micro_batches(step_rows, world.size, args.micro_batch_tokens, args.share_prefix)
        counts["rounds"] += len(plan)
        for part in plan:
            for group in part:
                counts["padded"] += padded_tokens([step_rows[i] for i in group], args.share_prefix)
        counts["real"] += sum(map(len, step_rows))
        counts["twice"] += sum(len(part) for row in step_rows for part in row.separate())
    steps = min(total, PLANNED_STEPS)
    ranks = f"{world.size} rank{'s' * (world.size > 1)}"
    if world.mesh.ndim > 1:
        ranks += f" in {world.mesh.shape[0]} groups"
    print0(
        f"{'steps':<11} {total:,} ({total / epoch:.3g} epochs of {epoch:,}) of {args.batch_size} pairs, "
        f"on {ranks}, {counts['rounds'] / steps:.3g} micro-batches "
        "each on average\n"
        f"{'tokens':<11} in the first {steps} steps: {counts['padded']:,} computed for "
        f"{counts['real']:,} in rows ({counts['padded'] / counts['real']:.3f} x); as separate "
        f"sequences they would be {counts['twice']:,}"
    )

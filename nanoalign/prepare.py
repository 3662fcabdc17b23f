"""From flags to rows, and the block that says so: what both training scripts do before their loop."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

from nanoalign import loop
from nanoalign.cache import Encoding, encoded
from nanoalign.data import TEST_OF, files_of
from nanoalign.distributed import World, print0
from nanoalign.errors import RunError, in_a_line
from nanoalign.plan import padded_tokens, plan_micro_batches, step_indices
from nanoalign.rows import Row
from nanoalign.store import Store, StoredRows
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
    args: argparse.Namespace, tokenizer, model: Path, world: World, unpaired: bool = False
) -> tuple[StoredRows, StoredRows, Counter]:
    """(training rows, held-out rows, counts of the former), printing what was read, cut and dropped.

    model: the folder of the tokenizer's files.
    unpaired: whether single responses with a label will do.
    Every rank must call it.
    """
    if args.eval_data is None and all(source in TEST_OF for source in args.data):
        args.eval_data = [TEST_OF[source] for source in args.data]
    preferences = (args.preference,) if isinstance(args.preference, str) else tuple(args.preference)
    conditions = preferences if getattr(args, "condition", False) else ()
    how = (preferences, unpaired, conditions, args.template, args.max_length, tokenizer, model)

    for each in (*args.data, *(args.eval_data or [])):
        files_of(each)  # a missing one is better known before the others are encoded than after
    training = encoded(Encoding(args.data, *how), args.cache, world)
    if args.eval_data is not None:
        source = " ".join(args.eval_data)
        held = encoded(Encoding(args.eval_data, *how), args.cache, world)
        held_out, taken = held.everything, training.everything
    else:
        source = f"{args.eval_share:g} of the prompts"
        held, held_out = training, training.hold_out(args.eval_share, args.seed)
        taken = ~held_out
    templates = {*training.about["templates"], *held.about["templates"]}
    args.template = templates.pop() if len(templates) == 1 else args.template
    counts = _describe("data", " ".join(args.data), training, taken)
    _describe("held out", source, held, held_out)
    rows = training.rows(taken)
    if not rows:
        raise RunError(
            f"--data {' '.join(args.data)}: no pairs are left to train on; see the counts above"
        )
    return rows, held.rows(held_out), counts


def _describe(name: str, source: str, store: Store, examples: np.ndarray) -> Counter:
    records, pairs, counts = store.counts(examples)
    notes = "".join(f"; {count:,} {reason}" for reason, count in counts.items() if count)
    ranked = f"{records:,} records with " if pairs != records else ""
    print0(f"{name:<11} {source}: {ranked}{pairs:,} pairs{notes}")
    return counts


def describe_plan(rows: Sequence[Row], args: argparse.Namespace, world: World) -> None:
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

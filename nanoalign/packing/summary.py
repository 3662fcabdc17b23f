"""What a run prints of its model and its steps before it starts."""

import math
from argparse import Namespace
from collections.abc import Sequence

from nanoalign.batch import Row
from nanoalign.distributed import print0
from nanoalign.loop import Batches, step_indices, total_steps
from nanoalign.model import Scorer


def describe(model: Scorer, rows: Sequence[Row], batches: Batches, args: Namespace) -> None:
    """Prints the size of the model, the number of steps, and the tokens of the first step."""
    total, epoch = total_steps(len(rows), args), math.ceil(len(rows) / args.batch_size)
    first = [rows[i] for i in step_indices(0, len(rows), args.batch_size, args.seed)]
    plan = batches.plan(first)
    groups = [[first[i] for i in group] for groups in plan for group in groups if group]
    tokens = sum(batches.collate(group).inputs["input_ids"].numel() for group in groups)
    alone = sum(len(row.prompt) + len(response) for row in first for response in row.responses)
    world, trained = batches.world, model.count_parameters(trainable=True)
    settings = {name: vars(args).get(name) for name in ("beta", "margin", "label_smoothing")}
    loss = "".join(f", {name} {value:g}" for name, value in settings.items() if value)
    copies = f" in {world.mesh.shape[0]} groups" if world.mesh.ndim > 1 else ""
    print0(
        f"{'model':<11} {args.model}: {model.count_parameters():,} parameters, {trained:,} "
        f"trained, {model.dtype}\n"
        f"{'optimizer':<11} AdamW, lr {args.lr:g}, {args.schedule}{loss}\n"
        f"{'steps':<11} {total:,} ({total / epoch:.3g} epochs of {epoch:,}) of {args.batch_size} "
        f"records, on {world.size} rank{'s' * (world.size > 1)}{copies}\n"
        f"{'first step':<11} {len(plan)} micro-batches a rank, {tokens:,} tokens; as separate "
        f"sequences they would be {alone:,}"
    )

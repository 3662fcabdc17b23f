"""Train a reward model on preference pairs: a linear head on a transformer, read at the last token.

    minimise  -log sigmoid(r(x, y_w) - r(x, y_l))

Ouyang et al. 2022, arXiv 2203.02155, equation 1. y_w is the chosen response, y_l the rejected one,
r the reward model. As in the paper, the K ranked responses to a prompt train on all their pairs;
here they also share one row, so that the prompt is computed once (nanoalign/packing).

    python train_rm.py                              one process, the embedded model and data
    torchrun --nproc_per_node 8 train_rm.py \\
        --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl
"""

import nanoalign.checks  # noqa: F401  # isort: skip  # says which packages are missing
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanoalign import checkpoints, formats, hosts, loop, packing, rewards, store, tracking
from nanoalign.batch import Batch
from nanoalign.checkpoints.curves import finish
from nanoalign.checkpoints.folders import check_fits, load_tokenizer, local_folder
from nanoalign.checkpoints.runs import check_folder, describe, open_run
from nanoalign.checkpoints.slices import read_slices
from nanoalign.checkpoints.write import write_model
from nanoalign.checks.first_step import check_layout
from nanoalign.distributed import compute_dtype, print0, run
from nanoalign.flags import Parser, add_training_arguments, number
from nanoalign.formats.rows import load_rows
from nanoalign.hosts.collectives import on_main
from nanoalign.losses import pairwise_reward_loss
from nanoalign.metrics import Metric, hits
from nanoalign.packing.batches import Packed
from nanoalign.reward_model import RewardModel
from nanoalign.rewards.prompts import kinds_of
from nanoalign.rewards.rule import set_rule


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument_group("reward model and loss").add_argument
    add("--model", default="tiny",
        help="a language model that gets a head, or a reward model: a folder, OWNER/NAME, "
        "or 'tiny'")  # fmt: skip
    add("--margin", type=number(float, 0), default=0.0,
        help="the required lead, in rewards: this times the margin of the pair in the data, "
        "or 1")  # fmt: skip
    add("--label_smoothing", type=number(float, 0, 0.5), default=0.0,
        help="the share of labels that is assumed to be wrong")  # fmt: skip
    add("--center_rewards_coefficient", type=number(float, 0), default=0.0,
        help="weight of (r_chosen + r_rejected)^2, which keeps rewards near 0; 0.01 is "
        "usual")  # fmt: skip
    add_training_arguments(
        parser, "tiny:tiny-a", "runs/rm", warmup=0.03, lr=2e-5, tiny_lr=1e-3, epochs=2
    )
    formats.add_arguments(parser, several=True)
    for subpackage in (packing, checkpoints, tracking, hosts, store, rewards):
        subpackage.add_arguments(parser)
    return parser.parse_args(argv)


def loss_of_batch(
    reward_model: RewardModel, args: Namespace, batch: Batch
) -> tuple[Tensor, dict[str, Metric]]:
    """The algorithm: the losses of the pairs of a batch, (B,), and their metrics."""
    rewards = reward_model(batch)  # (S,) of every response
    chosen, rejected = rewards[batch.chosen], rewards[batch.rejected]  # (B,)
    margins = args.margin * batch.extra.get("margins", 1.0)
    losses = pairwise_reward_loss(chosen, rejected, margins, args.label_smoothing)
    # Only differences are trained, so rewards may drift: Eisenstein et al. 2023, arXiv 2312.09244.
    losses = losses + args.center_rewards_coefficient * (chosen + rejected) ** 2
    return losses, {
        "loss": losses,
        "accuracy": hits(chosen, rejected),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "reward_mean": (chosen + rejected) / 2,
        "reward_std": torch.stack([chosen, rejected], dim=1),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = hosts.setup(args)
    dtype = compute_dtype(args.precision, world.device)
    folder = local_folder(args.model)
    on_main(world, partial(check_folder, args, [folder]))

    # data
    tokenizer = load_tokenizer(folder)
    rewards.announce_head(folder)
    data = load_rows(args, tokenizer, folder, world)
    if args.audit:
        from nanoalign.formats.audit import audit

        return print0(audit(data.rows, data.counts, tokenizer, args.audit, rewards=True))
    layout = Packed if args.share_prefix else loop.Batches
    batches = layout(world, args.micro_batch_tokens)

    # reward model, loss and optimizer
    model_class, loss = RewardModel, loss_of_batch
    if rewards.is_used(args):
        from nanoalign.rewards.variants import variant_of

        model_class, loss = variant_of(args, data.rows)
    reward_model = model_class.load(folder, world, dtype, read=read_slices, head_seed=args.seed,
        checkpointing=args.activation_checkpointing)  # fmt: skip
    set_rule(reward_model, args, data.template, kinds_of(data.rows, tokenizer, data.template))
    name = f"--model {args.model}"
    batches.prepare(reward_model)
    check_fits(reward_model, data.rows, name)
    check_fits(reward_model, data.held_out, name)
    objective = loop.Objective(partial(loss, reward_model, args))
    groups = reward_model.parameter_groups(args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    if world.size > 1 and (args.shard_size or args.gradient_sync == "step"):
        from nanoalign.hosts.groups import SyncedBatches

        batches = SyncedBatches(batches, reward_model, args.gradient_sync)
    describe(reward_model, data.rows, batches, args)

    # checks, training
    save, start, writing = checkpoints.of_run(
        reward_model, optimizer, objective, data.rows, args, world, {"--model": folder}
    )
    check_layout(reward_model, data.rows, batches, name)
    again = data.rows[-len(data.held_out) or len(data.rows) :]  # as many of the training rows
    held_out = {"eval": data.held_out, "train_eval": again}
    with open_run(args, world, data, folder, start) as log:
        complete = loop.train(
            reward_model, optimizer, objective, data.rows, held_out, batches, args, log, save, start
        )
    if not complete:
        return print0(f"stopped before the last step; continue with --resume --out {args.out}")
    if args.length_debias:
        reward_model.print_length()
    with writing:
        options = {"template": data.template, "dtype": args.save_dtype}
        write_model(reward_model, tokenizer, Path(args.out), world, **options)
    checkpoints.report_rounding(reward_model, objective, held_out, batches, args)
    finish(args, world, f"Reward model on {args.model}", len(data.held_out),
        ["rm", "--model", args.out])  # fmt: skip


if __name__ == "__main__":
    run(main, hosts.report_error)

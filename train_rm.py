"""Train a reward model on preference pairs: a linear head on a transformer, read at the last token.

    minimise  -log sigmoid(r(x, y_w) - r(x, y_l))

Ouyang et al. 2022, arXiv 2203.02155, equation 1. y_w is the chosen response, y_l the rejected one,
r the reward model. As in the paper, the K ranked responses to a prompt train on all their pairs;
here they also share one row, so that the prompt is computed once (nanoalign/packing).

    python train_rm.py                              one process, the embedded model and data
    torchrun --nproc_per_node 8 train_rm.py \\
        --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanoalign import loop
from nanoalign.batch import Batch
from nanoalign.compile import compiler
from nanoalign.data import audit, cache, rows
from nanoalign.data.chat_template import with_arguments
from nanoalign.distributed import compute_dtype, print0, run
from nanoalign.flags import Parser, add_training_arguments, number
from nanoalign.losses import pairwise_reward_loss
from nanoalign.metrics import Metric, pair_metrics
from nanoalign.model import RewardModel
from nanoalign.packing import fitting, loss_scale, packed
from nanoalign.packing.self_check import check_layout, prepare
from nanoalign.ranks import gathers, groups
from nanoalign.ranks.collectives import on_main
from nanoalign.ranks.report import report
from nanoalign.rewards import published_heads, variants
from nanoalign.rewards.prompt_kinds import kinds_of
from nanoalign.rewards.rule import set_rule
from nanoalign.runs import folder as run_folder
from nanoalign.runs import guards, inputs, log, replay, result, trackers
from nanoalign.runs.speed import Meter
from nanoalign.weights import frozen, lora
from nanoalign.weights.folders import load_tokenizer, local_folder
from nanoalign.weights.heads import announce
from nanoalign.weights.write import write_model


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument_group("reward model and loss").add_argument
    text = "a language model that gets a head, or a reward model: a folder, OWNER/NAME, or 'tiny'"
    add("--model", default="tiny", help=text)
    text = (
        "the lead that is required, in rewards: this times the margin of the pair in the data, or 1"
    )
    add("--margin", type=number(float, 0), default=0.0, help=text)
    text = "the share of labels that is assumed to be wrong"
    add("--label_smoothing", type=number(float, 0, 0.5), default=0.0, help=text)
    text = "weight of (r_chosen + r_rejected)^2, which keeps rewards near 0; 0.01 is usual"
    add("--center_rewards_coefficient", type=number(float, 0), default=0.0, help=text)
    add_training_arguments(
        parser, "tiny:tiny-a", "runs/rm", warmup=0.03, lr=2e-5, tiny_lr=1e-3, epochs=2
    )
    parts = packed, replay, guards, trackers, groups, compiler, lora, cache, variants
    of_rows = partial(rows.add_arguments, several=True)
    parser.extend(of_rows, *(part.add_arguments for part in parts))
    replay.take_flags(parser, argv)
    return parser.parse_args(argv)


def loss_of_batch(
    reward_model: RewardModel, args: Namespace, batch: Batch, lead: Tensor | float = 0.0
) -> tuple[Tensor, dict[str, Metric]]:
    """The algorithm: the losses of the pairs of a batch, (B,), and their metrics.

    lead: what chosen has in the loss beside its reward, (B,), with --length_debias.
    """
    rewards = reward_model(batch)  # (S,) of every response
    chosen, rejected = rewards[batch.chosen], rewards[batch.rejected]  # (B,)
    margins = args.margin * batch.extra.get("margins", 1.0)
    losses = pairwise_reward_loss(chosen + lead, rejected, margins, args.label_smoothing)
    # Only differences are trained, so rewards may drift: Eisenstein et al. 2023, arXiv 2312.09244.
    losses = losses + args.center_rewards_coefficient * (chosen + rejected) ** 2
    return losses, {
        **pair_metrics(losses, chosen, rejected, accuracy="accuracy"),
        "reward_mean": (chosen + rejected) / 2,
        "reward_std": torch.stack([chosen, rejected], dim=1),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = groups.setup(args)
    folder, name = local_folder(args.model), f"--model {args.model}"
    on_main(world, partial(run_folder.check_folder, args, [folder]))

    # data
    tokenizer = with_arguments(load_tokenizer(folder), args.template_args)
    announce(folder)
    data = rows.load_rows(rows.DataSettings.of(args), tokenizer, folder, world)
    if args.audit:
        return print0(audit.audit(data.rows, data.counts, tokenizer, args.audit, rewards=True))
    inputs.check_inputs({"--model": folder}, data, world)
    batcher = fitting.batcher_of(args, world)

    # reward model and what is minimised
    dtype = compute_dtype(args.precision, world.device)
    load, loss = variants.variant_of(args, data.rows, loss_of_batch)
    compiled = compiler.Compiler(args, world)
    read = frozen.reading(published_heads.reader(folder), args, dtype)
    read = gathers.reading(compiled.reading(read), args)
    read = lora.reading(read, args, dtype)
    options = {"read": read, "checkpointing": args.activation_checkpointing}
    reward_model = load(folder, world, dtype, head_seed=args.seed, **options)
    set_rule(reward_model, args, data.template, kinds_of(data.rows, tokenizer, data.template))
    prepare(reward_model, data, batcher, name)
    compiled.plainly(frozen.report, reward_model, folder, data, batcher, args)
    compiled.start(reward_model, data.rows, batcher, name)
    objective = loop.Objective(partial(loss, reward_model, args))
    parameters = reward_model.parameter_groups(args.weight_decay)
    optimizer = torch.optim.AdamW(parameters, args.lr, fused=True)
    args = fitting.fit(reward_model, objective, data.rows, batcher, args)
    batcher = groups.synced(batcher, reward_model, args)
    batcher = loss_scale.scaled(batcher, reward_model, objective)
    log.describe(reward_model, data.rows, batcher, args)
    if args.replay:
        parts = reward_model, optimizer, objective, data, batcher, args, {"--model": folder}
        return replay.replay(*parts)

    # training
    guard = guards.Guard(
        reward_model, optimizer, objective, data.rows, args, world, {"--model": folder}
    )
    check_layout(reward_model, data.rows, batcher, name)
    again = data.rows[-len(data.held_out) or len(data.rows) :]  # as many of the training rows
    held_out = {"eval": data.held_out, "train_eval": again}
    meter = Meter(reward_model, args, world)
    run_log = log.open_run(args, world, data, folder, guard.start, meter)
    with guard.signals, run_log as write_metrics:
        settings, hooks = loop.Settings.of(args), (write_metrics, guard.save, guard.start)
        fitting.train(
            reward_model, optimizer, objective, data.rows, held_out, batcher, settings, *hooks
        )
    if guard.stopped:
        return print0(f"stopped before the last step; continue with --resume --out {args.out}")

    # result
    if args.length_debias:
        reward_model.print_length()
    with guard.writing():
        options = {"template": data.template, "dtype": args.save_dtype}
        write = lora.write_merged if args.lora_rank else write_model
        write(reward_model, tokenizer, Path(args.out), world, **options)
    result.report_rounding(reward_model, objective, held_out, batcher, args)
    evaluation = ["rm", "--model", args.out]
    result.finish(args, world, f"Reward model on {args.model}", len(data.held_out), evaluation)


if __name__ == "__main__":
    run(main, report)

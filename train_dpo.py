"""Train a policy on preference pairs by direct preference optimization (DPO), without sampling.

    minimise  -log sigmoid(beta * [log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x)])

Rafailov et al. 2023, arXiv 2305.18290, equation 7. y_w is the chosen response, y_l the rejected
one, pi the policy and pi_ref the frozen reference that it starts from. Unlike the paper, which used
RMSprop, we use AdamW; and the prompt of a pair is computed once for both responses
(nanoalign/packing). --loss selects another loss of nanoalign/family.

    python train_dpo.py                             one process, the embedded model and data
    torchrun --nproc_per_node 8 train_dpo.py --beta 0.1 \\
        --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl
"""

import nanoalign.checks  # noqa: F401  # isort: skip  # says which packages are missing
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanoalign import adapters, checkpoints, family, formats, hosts, loop, packing, store, tracking
from nanoalign.batch import Batch
from nanoalign.checkpoints.curves import finish
from nanoalign.checkpoints.folders import check_fits, load_tokenizer, local_folder
from nanoalign.checkpoints.runs import check_folder, describe, open_run
from nanoalign.checkpoints.slices import read_slices
from nanoalign.checkpoints.write import write_model
from nanoalign.checks.first_step import check_layout, check_start
from nanoalign.distributed import compute_dtype, print0, run
from nanoalign.flags import Parser, add_training_arguments, number, positive
from nanoalign.formats.rows import load_rows
from nanoalign.hosts.collectives import on_main
from nanoalign.losses import dpo_loss
from nanoalign.metrics import Metric, hits
from nanoalign.model import Policy
from nanoalign.packing.batches import Packed


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument_group("policy and loss").add_argument
    add("--model", default="tiny", help="the policy: a Hugging Face folder, OWNER/NAME, or 'tiny'")
    add("--reference", help="the frozen reference: as --model, which is the default")
    add("--beta", type=positive, default=0.1,
        help="how much a log-ratio to the reference counts as reward")  # fmt: skip
    add("--label_smoothing", type=number(float, 0, 0.5), default=0.0,
        help="the share of labels that is assumed to be wrong (conservative DPO)")  # fmt: skip
    add_training_arguments(parser, "tiny", "runs/dpo", warmup=0.1, lr=1e-6, tiny_lr=5e-4)
    for subpackage in (formats, packing, checkpoints, tracking, hosts, adapters, family):
        subpackage.add_arguments(parser)
    store.add_arguments(parser, reference=True)
    return parser.parse_args(argv)


def loss_of_batch(
    policy: Policy, reference: Policy, beta: float, label_smoothing: float, batch: Batch
) -> tuple[Tensor, dict[str, Metric]]:
    """The algorithm: the losses of the pairs of a batch, (B,), and their metrics."""
    logps = policy(batch)  # (S,) log pi(y | x) of every response
    with torch.no_grad():
        reference_logps = reference(batch)  # (S,) log pi_ref(y | x)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        logps[batch.chosen],
        logps[batch.rejected],
        reference_logps[batch.chosen],
        reference_logps[batch.rejected],
        beta,
        label_smoothing,
    )
    return losses, {
        "loss": losses,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": hits(chosen_rewards, rejected_rewards),
        "logps/chosen": logps[batch.chosen],
        "logps/rejected": logps[batch.rejected],
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = hosts.setup(args)
    dtype = compute_dtype(args.precision, world.device)
    folder = reference_folder = local_folder(args.model)
    if args.reference not in (None, "none"):
        reference_folder = local_folder(args.reference)
        from nanoalign.checkpoints.vocabulary import check_vocabulary

        check_vocabulary(folder, reference_folder)
    folders = {"--model": folder, "--reference": reference_folder}
    on_main(world, partial(check_folder, args, [*folders.values()]))

    # data
    tokenizer = load_tokenizer(folder)
    data = load_rows(args, tokenizer, folder, world, unpaired=formats.single(args.loss))
    if args.audit:
        from nanoalign.formats.audit import audit

        return print0(audit(data.rows, data.counts, tokenizer, args.audit, rewards=False))
    layout = Packed if args.share_prefix else loop.Batches
    batches = layout(world, args.micro_batch_tokens)

    # policy and reference
    load_policy = partial(Policy.load, folder, world, dtype, read=read_slices,
        checkpointing=args.activation_checkpointing)  # fmt: skip
    load_reference = partial(Policy.load, reference_folder, world, dtype, False, read=read_slices)
    reference, write, check = None, write_model, check_start
    if args.lora_rank:
        from nanoalign.adapters import lora

        load_policy, write = lora.loader(load_policy, args), lora.write_model
    if args.precompute_reference:  # before the policy is loaded, so that one model is in memory
        from nanoalign.store.reference import precompute

        data, reference = precompute(load_reference, reference_folder, data, batches, args)
        check = partial(check_start, tolerances=reference.tolerances)
    policy = load_policy()
    if reference is None and args.reference != "none":
        reference = lora.Base(policy) if args.lora_rank else load_reference()
    reference_name = f"--reference {args.reference or args.model}"
    models = {f"--model {args.model}": policy, reference_name: reference}
    models = {name: model for name, model in models.items() if isinstance(model, Policy)}
    for name, model in models.items():
        batches.prepare(model)
        check_fits(model, data.rows, name)
        check_fits(model, data.held_out, name)

    # loss and optimizer
    loss = partial(loss_of_batch, policy, reference, args.beta, args.label_smoothing)
    objective = loop.Objective(loss)
    if family.is_used(args):
        from nanoalign.family.objectives import objective_of

        objective = objective_of(policy, reference, data.rows, args, world)
    groups = policy.parameter_groups(args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    if world.size > 1 and (args.shard_size or args.gradient_sync == "step"):
        from nanoalign.hosts.groups import SyncedBatches

        batches = SyncedBatches(batches, policy, args.gradient_sync)
    describe(policy, data.rows, batches, args)

    # checks, training
    state = policy, optimizer, objective, data.rows
    save, start, writing = checkpoints.of_run(*state, args, world, folders)
    for name, model in models.items():
        check_layout(model, data.rows, batches, name)
    if start == 0 and folder == reference_folder and reference is not None:
        check(objective, data.rows[: args.batch_size], batches)
    held_out = {"eval": data.held_out}
    with open_run(args, world, data, folder, start) as log:
        complete = loop.train(
            policy, optimizer, objective, data.rows, held_out, batches, args, log, save, start
        )
    if not complete:
        return print0(f"stopped before the last step; continue with --resume --out {args.out}")
    with writing:
        options = {"template": data.template, "dtype": args.save_dtype}
        write(policy, tokenizer, Path(args.out), world, **options)
    checkpoints.report_rounding(policy, objective, held_out, batches, args)
    judge = "runs/rm" if args.model == "tiny" and formats.is_embedded(args) else "REWARD_MODEL"
    finish(args, world, f"{args.loss} of {args.model}", len(data.held_out),
        ["policy", "--policy", args.out, "--baseline", args.model, "--reward", judge])  # fmt: skip


if __name__ == "__main__":
    run(main, hosts.report_error)

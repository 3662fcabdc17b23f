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

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanoalign import loop
from nanoalign.batch import Batch
from nanoalign.compile import compiler
from nanoalign.data import audit, cache, precomputed, rows
from nanoalign.data.chat_template import with_arguments
from nanoalign.data.split import Data
from nanoalign.distributed import World, compute_dtype, print0, run
from nanoalign.family import objectives
from nanoalign.flags import Parser, add_training_arguments, number, positive
from nanoalign.losses import dpo_loss
from nanoalign.metrics import Metric, pair_metrics
from nanoalign.model import Policy
from nanoalign.packing import fitting, loss_scale, packed, rope
from nanoalign.packing.self_check import check_layout, check_start, prepare
from nanoalign.ranks import gathers, groups
from nanoalign.ranks.collectives import on_main
from nanoalign.ranks.report import report
from nanoalign.runs import folder as run_folder
from nanoalign.runs import guards, inputs, log, replay, result, trackers
from nanoalign.runs.speed import Meter
from nanoalign.weights import frozen, lora
from nanoalign.weights.folders import check_vocabulary, load_tokenizer, local_folder, read_config
from nanoalign.weights.slices import read_slices
from nanoalign.weights.write import write_model


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument_group("policy and loss").add_argument
    add("--model", default="tiny", help="the policy: a Hugging Face folder, OWNER/NAME, or 'tiny'")
    add("--reference", help="the frozen reference, same forms; default: that of --model")
    text = (
        "factor beta of the log-ratio log(pi / pi_ref) in the reward; larger keeps the policy "
        "closer to the reference; default: 0.1"
    )
    add("--beta", type=positive, help=text)
    text = "the share of labels that is assumed to be wrong (conservative DPO); default: 0"
    add("--label_smoothing", type=number(float, 0, 0.5), help=text)
    add_training_arguments(parser, "tiny", "runs/dpo", warmup=0.1, lr=1e-6, tiny_lr=5e-4)
    parts = rows, packed, replay, guards, trackers, groups, compiler, lora, objectives, cache
    parser.extend(*(part.add_arguments for part in (*parts, precomputed)))
    replay.take_flags(parser, argv)
    return parser.parse_args(argv)


def loss_of_batch(
    policy: Policy,
    reference: Callable[[Batch], Tensor],
    beta: float,
    label_smoothing: float,
    batch: Batch,
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
        **pair_metrics(losses, chosen_rewards, rejected_rewards),
        "logps/chosen": logps[batch.chosen],
        "logps/rejected": logps[batch.rejected],
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = groups.setup(args)
    folders = find_folders(args, world)

    # data
    tokenizer = with_arguments(load_tokenizer(folders["--model"]), args.template_args)
    data = rows.load_rows(rows.DataSettings.of(args), tokenizer, folders["--model"], world)
    if args.audit:
        return print0(audit.audit(data.rows, data.counts, tokenizer, args.audit, rewards=False))
    inputs.check_inputs(folders, data, world)
    batcher = fitting.batcher_of(args, world)

    # policy, reference and what is minimised
    policy, reference, data = load_models(args, folders, world, data, batcher)
    objective = loop.Objective(
        partial(loss_of_batch, policy, reference, args.beta, args.label_smoothing)
    )
    if objectives.is_used(args):
        objective = objectives.objective_of(policy, reference, data.rows, args, world)
    optimizer = torch.optim.AdamW(policy.parameter_groups(args.weight_decay), args.lr, fused=True)
    args = fitting.fit(policy, objective, data.rows, batcher, args)
    batcher = groups.synced(batcher, policy, args)
    batcher = loss_scale.scaled(batcher, policy, objective)
    log.describe(policy, data.rows, batcher, args)
    if args.replay:
        return replay.replay(policy, optimizer, objective, data, batcher, args, folders)

    # training
    guard = guards.Guard(policy, optimizer, objective, data.rows, args, world, folders)
    check_layout(policy, data.rows, batcher, f"--model {args.model}")
    if guard.start == 0 and len({*folders.values()}) == 1 and reference is not None:
        check_start(objective, data.rows[: args.batch_size], batcher, reference)
    held_out = {"eval": data.held_out}
    meter = Meter(policy, args, world)
    run_log = log.open_run(args, world, data, folders["--model"], guard.start, meter)
    with guard.signals, run_log as write_metrics:
        settings, hooks = loop.Settings.of(args), (write_metrics, guard.save, guard.start)
        fitting.train(policy, optimizer, objective, data.rows, held_out, batcher, settings, *hooks)
    if guard.stopped:
        return print0(f"stopped before the last step; continue with --resume --out {args.out}")

    # result
    with guard.writing():
        options = {"template": data.template, "dtype": args.save_dtype}
        write = lora.write_merged if args.lora_rank else write_model
        write(policy, tokenizer, Path(args.out), world, **options)
    result.report_rounding(policy, objective, held_out, batcher, args)
    judge = "runs/rm" if args.model == "tiny" and rows.is_embedded(args) else "REWARD_MODEL"
    evaluation = ["policy", "--policy", args.out, "--baseline", args.model, "--reward", judge]
    result.finish(args, world, f"{args.loss} of {args.model}", len(data.held_out), evaluation)


def find_folders(args: Namespace, world: World) -> dict[str, Path]:
    """Returns the folders of the models, by the flag that names each. Checks and locks --out.

    Raises RunError for a model that can't be used, another vocabulary or border of LongRoPE of
    --reference, or a wrong --out.
    """
    folders = {"--model": local_folder(args.model)}
    folders["--reference"] = folders["--model"]
    if args.reference not in (None, "none"):
        folders["--reference"] = local_folder(args.reference)
        check_vocabulary(folders["--model"], folders["--reference"])
        if not args.precompute_reference:
            rope.check_borders(*map(read_config, folders.values()))
    on_main(world, partial(run_folder.check_folder, args, [*folders.values()]))
    return folders


def load_models(
    args: Namespace, folders: dict[str, Path], world: World, data: Data, batcher: loop.Batcher
) -> tuple[Policy, Callable[[Batch], Tensor] | None, Data]:
    """Returns (the policy, its reference or None, the data with precomputed reference values)."""
    dtype = compute_dtype(args.precision, world.device)
    compiled = compiler.Compiler(args, world)
    read = frozen.reading(read_slices, args, dtype)
    read = gathers.reading(compiled.reading(read), args)

    def load_policy() -> Policy:
        options = {"checkpointing": args.activation_checkpointing}
        options["read"] = lora.reading(read, args, dtype)
        policy = Policy.load(folders["--model"], world, dtype, **options)
        prepare(policy, data, batcher, f"--model {args.model}")
        compiled.plainly(frozen.report, policy, folders["--model"], data, batcher, args)
        compiled.start(policy, data.rows, batcher, f"--model {args.model}")
        return policy

    def load_reference() -> Policy:
        name = f"--reference {args.reference or args.model}"
        reference = Policy.load(folders["--reference"], world, dtype, False, read=read)
        prepare(reference, data, batcher, name)
        compiled.start(reference, data.rows, batcher, name)
        check_layout(reference, data.rows, batcher, name)
        return reference

    if args.precompute_reference:  # before the policy is loaded, so that one model is in memory
        folder = folders["--reference"]
        data, reference = precomputed.precompute(load_reference, folder, data, batcher, args)
        return load_policy(), reference, data
    policy = load_policy()
    if args.reference == "none":
        return policy, None, data
    return policy, lora.Base(policy) if args.lora_rank else load_reference(), data


if __name__ == "__main__":
    run(main, report)

"""Train a policy on preference pairs with DPO: no reward model, no sampling.

    minimise  -log sigmoid(beta * [log pi(y_w | x) / pi_ref(y_w | x) - log pi(y_l | x) / pi_ref(y_l | x)])

Rafailov et al. 2023, arXiv 2305.18290, equation 7. y_w is the chosen response, y_l the rejected
one, pi the policy and pi_ref the frozen reference it starts from. Unlike the paper, which used
RMSprop, we use AdamW; and a pair's prompt is computed once for both of its responses
(nanoalign/rows.py).

    python train_dpo.py                                         one process, the embedded model and data
    torchrun --nproc_per_node 8 train_dpo.py --beta 0.1 \\
        --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl
"""

import argparse
from functools import partial
from pathlib import Path

from torch import Tensor, no_grad, stack

from nanoalign import checkpoint, loop, weights
from nanoalign.arguments import EMBEDDED, Parser, add_training_arguments, number, positive
from nanoalign.checks import check_layout, check_start
from nanoalign.data import TEST_OF
from nanoalign.distributed import on_main, print0, run, setup
from nanoalign.errors import RunError
from nanoalign.losses import dpo_loss
from nanoalign.metrics import hits
from nanoalign.models import Policy
from nanoalign.prepare import (
    compute_dtype,
    describe_plan,
    load_rows,
    load_tokenizer,
    make_optimizer,
)
from nanoalign.report import curves, held_out_summary
from nanoalign.rows import Batch, fingerprint

LR = 1e-6
EMBEDDED_LR = 5e-4  # a model of a million parameters wants larger steps than one of billions


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    dpo = parser.add_argument_group("policy and loss")
    dpo.add_argument("--model", default=EMBEDDED,
        help="the policy to train: a Hugging Face folder, OWNER/NAME on the Hub, or 'tiny'")  # fmt: skip
    dpo.add_argument("--reference", help="the frozen reference; default: what --model names")
    dpo.add_argument("--beta", type=positive, default=0.1,
        help="reward of a nat of log-ratio; small: the policy may go far from the reference")  # fmt: skip
    dpo.add_argument("--label_smoothing", type=number(float, 0, 0.5), default=0.0,
        help="share of labels taken to be wrong (conservative DPO)")  # fmt: skip
    add_training_arguments(
        parser,
        out="runs/dpo",
        data=EMBEDDED,
        lr=f"{LR:g}, with --model tiny {EMBEDDED_LR:g}",
        epochs="1",
        schedule="cosine",
        warmup=0.1,
    )
    args = parser.parse_args(argv)
    args.lr = args.lr or (EMBEDDED_LR if args.model == EMBEDDED else LR)
    args.epochs = args.epochs or 1
    args.reference = args.reference or args.model
    return args


def loss_of_batch(
    policy: Policy, reference: Policy, beta: float, label_smoothing: float, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """The algorithm: the losses of a batch's pairs, (B,), and what is reported of each."""
    logps = policy(batch)  # (S,)
    with no_grad():
        reference_logps = reference(batch)  # (S,)
    chosen, rejected = logps[batch.chosen], logps[batch.rejected]  # (B,) each
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen,
        rejected,
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
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


def next_command(args: argparse.Namespace) -> str:
    data = "" if all(source in TEST_OF for source in args.data) else " --data PROMPTS"
    return (
        f"python evaluate.py policy --policy {args.out} --baseline {args.model} --reward runs/rm{data} "
        f"--out {args.out}_eval"
    )


def main(argv: list[str] | None = None) -> None:
    world = setup()
    args = parse_args(argv)
    dtype = compute_dtype(args, world)
    folder = weights.resolve_model(args.model).resolve()
    reference_folder = weights.resolve_model(args.reference).resolve()
    on_main(world, partial(checkpoint.check_folder, args, [folder, reference_folder]))

    tokenizer = load_tokenizer(folder)
    if load_tokenizer(reference_folder).get_vocab() != tokenizer.get_vocab():
        raise RunError(
            f"--reference {args.reference} has another vocabulary than --model {args.model}; their "
            "log-probabilities can't be compared"
        )
    rows, eval_rows = load_rows(args, tokenizer)
    args.data_hash = fingerprint(rows)
    describe_plan(rows, args, world)

    policy = Policy.load(
        folder, world, dtype, activation_checkpointing=args.activation_checkpointing
    )
    reference = Policy.load(reference_folder, world, dtype, trainable=False)
    optimizer = make_optimizer(policy, args)
    dpo = partial(loss_of_batch, policy, reference, args.beta, args.label_smoothing)
    print0(
        f"{'model':<11} {args.model}: {policy.count_parameters():,} parameters, {dtype}; "
        f"reference {args.reference}\n"
        f"{'optimizer':<11} AdamW, lr {args.lr:g}, {args.schedule}; beta {args.beta:g}"
    )

    for model in (policy, reference):
        model.check_fits(rows + eval_rows)
    start = checkpoint.load(policy, optimizer, args) if args.resume else 0
    same = folder == reference_folder
    if same and not args.resume:
        first = rows[: args.batch_size]
        with no_grad():
            losses, values = dpo(next(loop.rank_batches(first, args, world))[1])
        rewards = stack([values["rewards/chosen"], values["rewards/rejected"]])
        check_start(losses, rewards, len(first))
    check_layout(reference, rows, args.share_prefix, world, f"--reference {args.reference}")
    if not same:
        check_layout(policy, rows, args.share_prefix, world, f"--model {args.model}")
    on_main(world, partial(checkpoint.open_folder, args))

    done = loop.train(policy, optimizer, dpo, rows, {"eval": eval_rows}, args, world, start)

    out = Path(args.out)
    if done < loop.total_steps(len(rows), args):
        print0(f"stopped after step {done}; continue with --resume")
        return
    policy.save(out, tokenizer, world)
    if world.is_main:
        title = (
            f"DPO of {args.model}, data {' '.join(args.data)}, beta {args.beta:g}, lr {args.lr:g}"
        )
        curves(out, title)
        print(f"{'held out':<11} {held_out_summary(out, len(eval_rows))}")
        print(f"{'saved':<11} {out}: the model, metrics.jsonl, curves.png")
        print(f"{'next':<11} {next_command(args)}")


if __name__ == "__main__":
    run(main)

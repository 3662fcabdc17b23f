"""Train a reward model on preference pairs: a linear head on a transformer, read at a response's last token.

    minimise  -log sigmoid(r(x, y_w) - r(x, y_l))

Ouyang et al. 2022, arXiv 2203.02155, equation 1. y_w is the chosen response, y_l the rejected one, r
the reward model. As in the paper a prompt's K ranked responses train on all their pairs; here they
also share one row, so that a prompt is computed once for all of its responses (nanoalign/rows.py).

    python train_rm.py                                          one process, the embedded model and data
    torchrun --nproc_per_node 8 train_rm.py \\
        --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl
"""

import argparse
from functools import partial
from pathlib import Path

from torch import Tensor, stack

from nanoalign import checkpoint, loop, weights
from nanoalign.arguments import EMBEDDED, Parser, add_training_arguments, number
from nanoalign.audit import audit
from nanoalign.checks import check_layout
from nanoalign.data import TEST_OF
from nanoalign.distributed import full, on_main, print0, run, setup
from nanoalign.errors import RunError
from nanoalign.losses import pairwise_reward_loss
from nanoalign.metrics import Reported, hits
from nanoalign.models import RewardModel
from nanoalign.objective import Objective
from nanoalign.prepare import (
    compute_dtype,
    describe_plan,
    load_rows,
    load_tokenizer,
    make_optimizer,
)
from nanoalign.report import curves, held_out_summary
from nanoalign.rows import EOS_RULE, Batch
from nanoalign.scoring import scoring_rule
from nanoalign.store import StoredRows

LR = 2e-5
EMBEDDED_LR = 1e-3  # a model of a million parameters wants larger steps than one of billions
EMBEDDED_EPOCHS = 2


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    rm = parser.add_argument_group("reward model and loss")
    rm.add_argument("--model", default=EMBEDDED,
        help="a language model to put a head on, or a reward model to train on: a Hugging Face folder, "
        "OWNER/NAME on the Hub, or 'tiny'")  # fmt: skip
    rm.add_argument("--margin", type=number(float, 0), default=0.0,
        help="the lead m in -log sigmoid(r_w - r_l - m): this number times the pair's margin in the data (1 "
        "where they have none)")  # fmt: skip
    rm.add_argument("--label_smoothing", type=number(float, 0, 0.5), default=0.0,
        help="share of labels taken to be wrong")  # fmt: skip
    rm.add_argument("--center_rewards_coefficient", type=number(float, 0), default=0.0,
        help="weight of (r_chosen + r_rejected)^2, which keeps rewards near 0; 0.01 is usual")  # fmt: skip
    rm.add_argument("--condition", action="store_true",
        help="one output for several --preference: the prompt names the one that is meant")  # fmt: skip
    rm.add_argument("--length_debias", action="store_true",
        help="learn beside the reward what length alone explains, and leave it out")  # fmt: skip
    add_training_arguments(
        parser,
        out="runs/rm",
        data=f"{EMBEDDED}:tiny-a",
        lr=f"{LR:g}, with --model tiny {EMBEDDED_LR:g}",
        epochs=f"1, with --model tiny {EMBEDDED_EPOCHS}",
        schedule="cosine",
        warmup=0.03,
        preferences="+",
    )
    args = parser.parse_args(argv)
    args.lr = args.lr or (EMBEDDED_LR if args.model == EMBEDDED else LR)
    args.epochs = args.epochs or (EMBEDDED_EPOCHS if args.model == EMBEDDED else 1)
    if len(set(args.preference)) < len(args.preference):
        raise RunError(f"--preference {' '.join(args.preference)}: each may be named once")
    if args.length_debias and len(args.preference) > 1:
        raise RunError("--length_debias has one coefficient of length; give one --preference")
    if args.condition and len(args.preference) == 1:
        raise RunError(
            "--condition tells several preferences apart; give --preference better safer"
        )
    return args


def loss_of_batch(
    reward_model: RewardModel, args: argparse.Namespace, batch: Batch
) -> tuple[Tensor, dict[str, Reported]]:
    """The algorithm: the losses of a batch's pairs, (B,), and what is reported of each."""
    length = 0.0
    if args.length_debias:
        # Part of the logit, and no part of the reward: so what length explains, the reward need not.
        rewards, worth = reward_model(batch, by_length=True)  # (S,) or (S, K); (S,)
        length = worth[batch.chosen] - worth[batch.rejected]  # (B,)
    else:
        rewards = reward_model(batch)
    rewards = rewards.reshape(len(batch.ends), -1)  # (S, K)
    chosen = rewards[batch.chosen, batch.dimensions]  # (B,)
    rejected = rewards[batch.rejected, batch.dimensions]  # (B,)
    losses = pairwise_reward_loss(
        chosen + length, rejected, args.margin * batch.margins, args.label_smoothing
    )
    # Only differences are trained, so rewards may drift: Eisenstein et al. 2023, arXiv 2312.09244.
    losses = losses + args.center_rewards_coefficient * (chosen + rejected) ** 2
    right = hits(chosen, rejected)
    apart = {
        f"accuracy/{name}": (right, batch.dimensions == d)
        for d, name in enumerate(args.preference)
        if rewards.shape[1] > 1
    }
    return losses, {
        "loss": losses,
        "accuracy": right,
        **apart,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "reward_mean": (chosen + rejected) / 2,
        "reward_std": stack([chosen, rejected], dim=1),
    }


def check_preferences(reward_model: RewardModel, args: argparse.Namespace) -> None:
    """Stops where one that was trained before would be trained on to mean something else."""
    rule = reward_model.scoring or {}
    for name in ("preferences", "condition"):
        now = args.preference if name == "preferences" else args.condition
        if rule.get(name, now) != now:
            raise RunError(
                f"model '{args.model}' was trained with {name} {rule[name]}, and is to be trained on with "
                f"{now}: its outputs would mean something else"
            )


def spread_of_lengths(rows: StoredRows) -> float:
    """The standard deviation of chosen less rejected tokens, a unit for differences of length."""
    chosen, rejected = rows.pair_lengths().T
    return (chosen - rejected).std().item() or 1.0


def next_command(args: argparse.Namespace) -> str:
    data = "" if all(source in TEST_OF for source in args.data) else " --data NAME=PATH"
    return f"python evaluate.py rm --model {args.out}{data} --out {args.out}_eval"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = setup(args.shard_size, args.timeout)
    dtype = compute_dtype(args, world)
    folder = weights.resolve_model(args.model).resolve()
    if not args.audit:
        on_main(world, partial(checkpoint.check_folder, args, [folder]))

    tokenizer = load_tokenizer(folder)
    rows, eval_rows, counts = load_rows(args, tokenizer, folder, world)
    if args.audit:
        print0(audit(rows, counts, tokenizer, args.audit, rewards=True))
        return
    args.data_hash = rows.fingerprint()
    describe_plan(rows, args, world)

    reward_model = RewardModel.load(
        folder, world, dtype, activation_checkpointing=args.activation_checkpointing,
        head_seed=args.seed, outputs=1 if args.condition else len(args.preference),
        length_debias=args.length_debias,
    )  # fmt: skip
    scoring_rule(reward_model, args.model, args.template, args.max_length)  # of one trained before
    check_preferences(reward_model, args)
    reward_model.scoring = {
        "template": args.template, "max_length": args.max_length, "eos": EOS_RULE,
        "preferences": args.preference, "condition": args.condition,
    }  # fmt: skip
    if len(args.preference) > 1 and not args.condition:
        reward_model.model.config.id2label = dict(enumerate(args.preference))
    reward_model.length_unit = spread_of_lengths(rows)
    optimizer = make_optimizer(reward_model, args, faster=reward_model.length)
    pairwise = Objective(partial(loss_of_batch, reward_model, args))
    print0(
        f"{'model':<11} {args.model}: {reward_model.count_parameters():,} parameters, {dtype}; head "
        f"{reward_model.head_origin}\n"
        f"{'optimizer':<11} AdamW, lr {args.lr:g}, {args.schedule}"
    )

    reward_model.check_fits(rows)
    reward_model.check_fits(eval_rows)
    start = checkpoint.load(reward_model, optimizer, pairwise, args) if args.resume else 0
    check_layout(reward_model, rows, args.share_prefix, world, f"--model {args.model}")
    on_main(world, partial(checkpoint.open_folder, args))

    slices = {"eval": eval_rows, "train_eval": rows[-len(eval_rows) :] if eval_rows else []}
    done = loop.train(reward_model, optimizer, pairwise, rows, slices, args, world, start)

    out = Path(args.out)
    if done < loop.total_steps(len(rows), args):
        print0(f"stopped after step {done}; continue with --resume")
        return
    if args.length_debias:
        worth = full(reward_model.length.weight).item() / reward_model.length_unit
        print0(
            f"{'length':<11} a token is worth {worth:+.4f} in the labels, which the reward leaves out"
        )
    reward_model.save(out, tokenizer, world)
    if world.is_main:
        curves(out, f"Reward model on {args.model}, data {' '.join(args.data)}, lr {args.lr:g}")
        print(f"{'held out':<11} {held_out_summary(out, len(eval_rows))}")
        print(f"{'saved':<11} {out}: the model, metrics.jsonl, curves.png")
        print(f"{'next':<11} {next_command(args)}")


if __name__ == "__main__":
    run(main)

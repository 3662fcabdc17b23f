"""Train a policy on preference pairs with DPO or one of its family: no reward model, no sampling.

    minimise  -log sigmoid(beta * [log pi(y_w | x) / pi_ref(y_w | x) - log pi(y_l | x) / pi_ref(y_l | x)])

Rafailov et al. 2023, arXiv 2305.18290, equation 7. y_w is the chosen response, y_l the rejected
one, pi the policy and pi_ref the frozen reference it starts from. Unlike the paper, which used
RMSprop, we use AdamW; and a pair's prompt is computed once for both of its responses
(nanoalign/rows.py). --loss names the other losses, which stand in nanoalign/losses.py; how they
meet a batch stands in nanoalign/preference.py.

    python train_dpo.py                                         one process, the embedded model and data
    python train_dpo.py --loss simpo
    torchrun --nproc_per_node 8 train_dpo.py --beta 0.1 \\
        --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl
"""

import argparse
from functools import partial
from pathlib import Path

from nanoalign import checkpoint, loop, lora, weights
from nanoalign.arguments import EMBEDDED, Parser, add_training_arguments, number, positive
from nanoalign.audit import audit
from nanoalign.checks import check_layout, check_start
from nanoalign.data import TEST_OF
from nanoalign.distributed import on_main, print0, run, setup
from nanoalign.errors import RunError
from nanoalign.losses import DIVERGENCES, LOSSES
from nanoalign.models import Policy
from nanoalign.preference import REFERENCE_FREE, Preference, check_sides, settle
from nanoalign.prepare import (
    compute_dtype,
    describe_plan,
    load_rows,
    load_tokenizer,
    make_optimizer,
)
from nanoalign.reference import Precomputed, precompute, start_tolerances
from nanoalign.report import curves, held_out_summary

LR = 1e-6
EMBEDDED_LR = 5e-4  # a model of a million parameters wants larger steps than one of billions


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    dpo = parser.add_argument_group("policy and loss")
    dpo.add_argument("--model", default=EMBEDDED,
        help="the policy to train: a Hugging Face folder, OWNER/NAME on the Hub, or 'tiny'")  # fmt: skip
    dpo.add_argument("--reference",
        help="the frozen reference; default: what --model names, unless the loss has none")  # fmt: skip
    dpo.add_argument("--loss", choices=LOSSES, default="sigmoid", metavar="NAME",
        help=f"what is minimised: {', '.join(LOSSES)}")  # fmt: skip
    share = number(float, 0, 1)
    hyper = parser.add_argument_group(
        "hyperparameters of the loss, each by default as its paper has it"
    )
    hyper.add_argument("--beta", type=positive,
        help="reward of a nat of log-ratio; small: the policy may go far from the reference")  # fmt: skip
    hyper.add_argument("--label_smoothing", type=number(float, 0, 0.5),
        help="share of labels taken to be wrong: cdpo, robust, exo_pair")  # fmt: skip
    hyper.add_argument("--tau", type=positive, help="width of discopop's switch")
    hyper.add_argument("--gamma_beta_ratio", type=number(float, 0),
        help="simpo's margin, in nats a token")  # fmt: skip
    hyper.add_argument("--odds_weight", type=number(float, 0), help="orpo's lambda")
    hyper.add_argument("--cpo_alpha", type=number(float, 0), help="cpo's weight of the NLL")
    hyper.add_argument("--desirable_weight", type=number(float, 0), help="kto's, of chosen")
    hyper.add_argument("--undesirable_weight", type=number(float, 0), help="kto's, of rejected")
    extra = parser.add_argument_group("what combines with any loss")
    extra.add_argument("--nll_weight", type=number(float, 0),
        help="adds so much of the chosen response's NLL, a mean over its tokens (RPO)")  # fmt: skip
    extra.add_argument("--ld_alpha", type=share,
        help="what a token beyond the shorter response's length counts (LD-DPO)")  # fmt: skip
    extra.add_argument("--length_alpha", type=number(float, 0),
        help="reward of each token, which explains away that longer ones are preferred (R-DPO)")  # fmt: skip
    extra.add_argument("--divergence", choices=DIVERGENCES,
        help="what binds policy to reference; without it the reverse KL (f-DPO)")  # fmt: skip
    extra.add_argument(
        "--divergence_alpha", type=number(float, 1e-6, 1), help="of --divergence alpha"
    )
    extra.add_argument("--wpo", action="store_true",
        help="weigh pairs by how far they are the policy's own (WPO)")  # fmt: skip
    extra.add_argument("--sync_reference_every", type=number(int, 1), metavar="STEPS",
        help="move the reference towards the policy every so many steps (TR-DPO)")  # fmt: skip
    extra.add_argument("--sync_reference_mix", type=positive,
        help="how far it moves, at most 1: all the way; default: 0.6")  # fmt: skip
    extra.add_argument("--precompute_reference", action="store_true",
        help="ask the reference once, before the policy is loaded; keep what it says, not it")  # fmt: skip
    adapters = parser.add_argument_group("LoRA, which needs the package peft")
    adapters.add_argument("--lora_rank", type=number(int, 1), metavar="RANK",
        help="train adapters of this rank in place of the weights; the reference is the policy with them "
        "off, and takes no memory")  # fmt: skip
    adapters.add_argument("--lora_alpha", type=number(int, 1),
        help="their update is scaled by alpha / rank; default: twice the rank")  # fmt: skip
    adapters.add_argument("--lora_targets", nargs="+", metavar="NAME",
        help="layers that get one, such as q_proj v_proj; default: all linear ones but the head")  # fmt: skip
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
    settle(args)
    lora.settle(args)
    if args.loss not in REFERENCE_FREE:
        args.reference = args.reference or args.model
    return args


def next_command(args: argparse.Namespace) -> str:
    data = "" if all(source in TEST_OF for source in args.data) else " --data PROMPTS"
    return (
        f"python evaluate.py policy --policy {args.out} --baseline {args.model} --reward runs/rm{data} "
        f"--out {args.out}_eval"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = setup(args.shard_size, args.timeout)
    dtype = compute_dtype(args, world)
    folder = weights.resolve_model(args.model).resolve()
    reference_folder = weights.resolve_model(args.reference).resolve() if args.reference else None
    read = [folder, reference_folder] if reference_folder else [folder]
    if not args.audit:
        on_main(world, partial(checkpoint.check_folder, args, read))

    tokenizer = load_tokenizer(folder)
    if reference_folder and load_tokenizer(reference_folder).get_vocab() != tokenizer.get_vocab():
        raise RunError(
            f"--reference {args.reference} has another vocabulary than --model {args.model}; their "
            "log-probabilities can't be compared"
        )
    rows, eval_rows, counts = load_rows(args, tokenizer, folder, world, args.loss == "kto")
    if args.audit:
        print0(audit(rows, counts, tokenizer, args.audit, rewards=False))
        return
    check_sides(rows, args)
    args.data_hash = rows.fingerprint()
    describe_plan(rows, args, world)

    adapters = None
    if args.lora_rank:
        targets = tuple(args.lora_targets) if args.lora_targets else None
        adapters = lora.Adapters(args.lora_rank, args.lora_alpha, targets, args.seed, args.model)
    reference, sets = None, {"data": rows, "held out": eval_rows}
    load_reference = partial(Policy.load, reference_folder, world, dtype, trainable=False)
    if args.precompute_reference:
        sets = precompute(load_reference, reference_folder, sets, args, world)
        reference = Precomputed()
    elif reference_folder and not adapters:
        reference = load_reference()
    policy = Policy.load(
        folder,
        world,
        dtype,
        activation_checkpointing=args.activation_checkpointing,
        adapters=adapters,
    )
    if reference_folder and reference is None:
        reference = lora.Base(policy)
    objective = Preference(policy, reference, args, world)
    optimizer = make_optimizer(policy, args)
    settings = ", ".join(f"{name} {value:g}" for name, value in objective.hyperparameters.items())
    lora_line = f"{'adapters':<11} {lora.describe(policy)}\n" if adapters else ""
    print0(
        f"{'model':<11} {args.model}: {policy.count_parameters():,} parameters, {dtype}; "
        f"reference {args.reference or 'none'}\n"
        f"{lora_line}"
        f"{'optimizer':<11} AdamW, lr {args.lr:g}, {args.schedule}; loss {args.loss}"
        f"{': ' * bool(settings)}{settings}"
    )

    models = {f"--model {args.model}": policy}
    if isinstance(reference, Policy):
        models[f"--reference {args.reference}"] = reference
    for model in models.values():
        model.check_fits(rows)
        model.check_fits(eval_rows)
    start = checkpoint.load(policy, optimizer, objective, args) if args.resume else 0
    same = folder == reference_folder
    if same and not args.resume:
        first = sets["data"][: args.batch_size]
        batches = partial(loop.rank_batches, args=args, world=world)
        tolerances = start_tolerances(policy, first, args)
        check_start(*objective.at_start(first, batches), len(first), tolerances)
        models = {f"--model {args.model}": policy}  # the reference is the same function
    for name, model in models.items():
        check_layout(model, rows, args.share_prefix, world, name)
    on_main(world, partial(checkpoint.open_folder, args))

    held_out = {"eval": sets["held out"]}
    done = loop.train(policy, optimizer, objective, sets["data"], held_out, args, world, start)

    out = Path(args.out)
    if done < loop.total_steps(len(rows), args):
        print0(f"stopped after step {done}; continue with --resume")
        return
    policy.save(out, tokenizer, world)
    if adapters:
        lora.save(policy.model, out / lora.FOLDER, world)
    if world.is_main:
        title = (
            f"{args.loss} of {args.model}, data {' '.join(args.data)}, lr {args.lr:g}, {settings}"
        )
        curves(out, title)
        print(f"{'held out':<11} {held_out_summary(out, len(eval_rows))}")
        print(f"{'saved':<11} {out}: the model, metrics.jsonl, curves.png")
        print(f"{'next':<11} {next_command(args)}")


if __name__ == "__main__":
    run(main)

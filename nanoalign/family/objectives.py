"""--loss and its add-ons: their flags, the combinations that are refused, and the Objective."""

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from nanoalign.batch import Batch, Row
from nanoalign.distributed import World, print0
from nanoalign.family.kto import Kto, check_kinds, check_prompts, loss_of_responses
from nanoalign.family.losses import (
    DEFAULTS,
    FIELDS,
    INCOMPATIBLE,
    KIND,
    LOSSES,
    MEANINGS,
    POLICY_MEANS,
    has_reference,
)
from nanoalign.family.moving import Moving
from nanoalign.family.paired import Paired, pair_loss, with_lengths, with_nll, with_wpo
from nanoalign.family.pairs import DIVERGENCES, PairLoss, pairs_of
from nanoalign.family.steps import Aot, Bco
from nanoalign.flags import number, positive
from nanoalign.model import Policy

# An add-on is used if the value of its flag is neither None nor False.
ADD_ONS = ("nll_weight", "ld_alpha", "length_alpha", "divergence", "wpo", "sync_reference_every")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("other losses and their hyperparameters", "")
    group.add_argument(
        "--loss",
        choices=tuple(LOSSES),
        default="dpo",
        metavar="NAME",
        help="the loss: one of %(choices)s",
    )
    add_hyperparameters(group)
    count, share, weight = number(int, 1), number(float, 0, 1), number(float, 0)
    add = parser.add_argument_group("what combines with a loss").add_argument
    add(
        "--nll_weight",
        type=weight,
        help="weight of the chosen response's NLL, a mean over its tokens, which is added to the "
        "loss (RPO); default: off",
    )
    add(
        "--ld_alpha",
        type=share,
        help="weight of the tokens of the longer response beyond the length of the shorter one of "
        "the pair; the other tokens have weight 1 (LD-DPO); default: off",
    )
    add(
        "--length_alpha",
        type=weight,
        help="add this times (tokens of chosen - tokens of rejected) to the reward margin in the "
        "loss, so that the policy need not learn to prefer length (R-DPO); default: off",
    )
    add(
        "--divergence",
        choices=DIVERGENCES,
        help="divergence from the reference that the loss penalises (f-DPO); default: reverse_kl",
    )
    add(
        "--divergence_alpha",
        type=number(float, 1e-6, 1),
        help="the alpha of --divergence alpha, between 0 and 1; it has no default",
    )
    add(
        "--wpo",
        action="store_true",
        help="weight each pair by how probable its responses are under the policy, averaged per "
        "token (WPO)",
    )
    add(
        "--sync_reference_every",
        type=count,
        metavar="STEPS",
        help="move the reference towards the policy after every STEPS steps (TR-DPO); default: off",
    )
    add(
        "--sync_reference_mix",
        type=positive,
        help="share of the way to the policy that the reference moves each time; 1: all of it; "
        "default: 0.6",
    )
    parser.derived.append(defaults)
    parser.refusals.append(refusal)


def add_hyperparameters(group: argparse._ArgumentGroup) -> None:
    """Adds a flag for each hyperparameter of losses.py except --beta and --label_smoothing.

    train_dpo.py has these two; their defaults by loss are added to the description of the group.
    """
    for flag in dict.fromkeys(flag for defaults in DEFAULTS.values() for flag in defaults):
        values = {name: of_loss[flag] for name, of_loss in DEFAULTS.items() if flag in of_loss}
        if flag in DEFAULTS["dpo"]:
            usual = values["dpo"]
            others = [f"{name} {value:g}" for name, value in values.items() if value != usual]
            group.description += f"default of --{flag}: {usual:g}, but {', '.join(others)}\n"
        else:
            text = "; ".join(f"{name}, default: {value:g}" for name, value in values.items())
            kind = positive if flag == "tau" else number(float, 0)  # a loss divides by tau
            group.add_argument(f"--{flag}", type=kind, help=f"{MEANINGS[flag]} ({text})")


def is_used(args: Namespace) -> bool:
    """Whether a run minimises something other than train_dpo.loss_of_batch."""
    return args.loss != "dpo" or any(_is_given(args, flag) for flag in ADD_ONS)


def _is_given(args: Namespace, flag: str) -> bool:
    value = getattr(args, flag)
    return value is not None and value is not False  # 0 is given


def defaults(args: Namespace) -> dict:
    """Values by flag, for flags that were not given: those that follow from --loss, and the mix."""
    values = dict(DEFAULTS[args.loss])
    if args.sync_reference_every:
        values["sync_reference_mix"] = 0.6
    if not has_reference(args.loss):
        values["reference"] = "none"
    return values


def refusal(args: Namespace) -> str | None:
    """Why the flags of the loss and its add-ons can't be combined; None where they can."""
    hyperparameters, reference = DEFAULTS[args.loss], has_reference(args.loss)
    for flag in (flag for of_loss in DEFAULTS.values() for flag in of_loss):
        if flag not in hyperparameters and getattr(args, flag) is not None:
            flags = ", ".join(f"--{name}" for name in hyperparameters) or "none"
            return f"--{flag} is no hyperparameter of --loss {args.loss}, which takes {flags}"
    if args.loss == "exo_pair" and args.label_smoothing == 0:
        return "--loss exo_pair takes the log of --label_smoothing, which must be above 0"
    if args.loss == "kto" and args.batch_size < 2:
        return "--loss kto takes its KL from responses to other prompts; raise --batch_size to 2"
    if reference and args.reference == "none":
        return f"--loss {args.loss} needs a --reference; leave it out for --model"
    if not reference and args.reference != "none":
        return f"--loss {args.loss} has no reference; leave out --reference {args.reference}"
    if (args.divergence == "alpha") != (args.divergence_alpha is not None):
        return "--divergence alpha and --divergence_alpha belong together; give both"
    for flag, reason in INCOMPATIBLE[KIND[args.loss]].items():
        if _is_given(args, flag):
            return f"--{flag} does not go with --loss {args.loss}: {reason}"
    if args.sync_reference_mix is not None and not args.sync_reference_every:
        return "--sync_reference_mix needs --sync_reference_every; give both"
    if args.sync_reference_every and args.sync_reference_mix > 1:
        return f"--sync_reference_mix {args.sync_reference_mix:g} is above 1; give 1 or less"
    return None


def objective_of(
    policy: Policy,
    reference: Callable[[Batch], Tensor] | None,
    rows: Sequence[Row],
    args: Namespace,
    world: World,
) -> Paired:
    """Returns the Objective of --loss and its add-ons; prints the loss and its hyperparameters.

    reference: None for a loss without one. rows: all training rows.
    Raises RunError for rows that the loss can't train on, or a reference that can't move.
    """
    name, beta = args.loss, args.beta or 1.0  # orpo and sft have no beta
    loss = loss_of(args)
    pairs = partial(
        pairs_of,
        policy=policy,
        reference=reference,
        ld_alpha=args.ld_alpha,
        wpo=args.wpo,
        divergence=args.divergence,
        divergence_alpha=args.divergence_alpha,
    )
    if name == "kto":
        check_kinds(rows, " ".join(args.data))
        check_prompts(rows, " ".join(args.data))
        objective = Kto(policy, reference, args.max_length, world, pairs, loss, beta)
    elif name == "aot":
        objective = Aot(world, pairs, loss, beta)
    elif name == "bco_pair":
        objective = Bco(pairs, loss, beta)
    else:
        objective = Paired(pairs, loss, beta, averaged=KIND[name] == POLICY_MEANS)
    if args.sync_reference_every:
        steps, mix = args.sync_reference_every, args.sync_reference_mix
        objective.moving = Moving(policy, reference, steps, mix)
        objective.modules = {"reference": reference}  # which a checkpoint keeps
    return objective


def loss_of(args: Namespace) -> PairLoss:
    """Returns the loss of --loss and the add-ons that change it; prints it as objective_of says."""
    hyperparameters = {flag: getattr(args, flag) for flag in DEFAULTS[args.loss]}
    text = "".join(f", {flag} {value:g}" for flag, value in hyperparameters.items())
    print0(f"{'loss':<11} {args.loss}{text}")
    if args.loss == "kto":
        loss = partial(loss_of_responses, **hyperparameters)
    else:
        loss = pair_loss(LOSSES[args.loss], FIELDS[args.loss], hyperparameters)
    if args.length_alpha is not None:
        loss = with_lengths(loss, args.length_alpha / args.beta)
    if args.wpo:
        loss = with_wpo(loss)
    if args.nll_weight is not None:
        loss = with_nll(loss, args.nll_weight)
    return loss

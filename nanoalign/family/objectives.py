"""--loss and its add-ons: their flags, what does not combine, and the Objective that they make."""

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from nanoalign.batch import Batch, Row
from nanoalign.distributed import World, print0
from nanoalign.family import kto
from nanoalign.family.losses import (
    DEFAULTS,
    FIELDS,
    INCOMPATIBLE,
    KIND,
    LOSSES,
    POLICY_MEANS,
    has_reference,
)
from nanoalign.family.moving import Moving
from nanoalign.family.paired import Paired, pair_loss, with_lengths, with_nll, with_wpo
from nanoalign.family.pairs import pairs_of
from nanoalign.family.steps import Aot, Bco
from nanoalign.flags import number, positive
from nanoalign.loop import Objective
from nanoalign.model import Policy

# Each is used when its value is neither None nor False.
ADD_ONS = ("nll_weight", "ld_alpha", "length_alpha", "divergence", "wpo", "sync_reference_every")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("other losses and their hyperparameters", "")
    group.add_argument("--loss", choices=tuple(LOSSES), default="dpo", metavar="NAME",
        help="one of %(choices)s")  # fmt: skip
    add_hyperparameters(group)
    count, share, weight = number(int, 1), number(float, 0, 1), number(float, 0)
    add = parser.add_argument_group("what combines with a loss").add_argument
    add("--nll_weight", type=weight,
        help="adds this times the NLL of chosen, a mean over its tokens (RPO); "
        "default: off")  # fmt: skip
    add("--ld_alpha", type=share,
        help="weight of tokens beyond the length of the shorter response (LD-DPO); "
        "default: off")  # fmt: skip
    add("--length_alpha", type=weight,
        help="reward per token in the loss, so that length is not learned (R-DPO); "
        "default: off")  # fmt: skip
    add("--divergence", choices=("reverse_kl", "forward_kl", "js", "alpha"),
        help="between policy and reference (f-DPO); default: the reverse KL of DPO")  # fmt: skip
    add("--divergence_alpha", type=number(float, 1e-6, 1), help="of alpha, without a default")
    add("--wpo", action="store_true",
        help="weight pairs by how probable their responses are under the policy (WPO)")  # fmt: skip
    add("--sync_reference_every", type=count, metavar="STEPS",
        help="move the reference towards the policy every so many steps (TR-DPO); "
        "default: off")  # fmt: skip
    add("--sync_reference_mix", type=positive,
        help="how far it moves; 1: all the way to the policy; default: 0.6")  # fmt: skip
    parser.derived.append(defaults)
    parser.refusals.append(refusal)


def add_hyperparameters(group: argparse._ArgumentGroup) -> None:
    """Adds a flag for each hyperparameter of losses.py but --beta and --label_smoothing."""
    for flag in dict.fromkeys(name for takes in DEFAULTS.values() for name in takes):
        takes = [(name, takes[flag]) for name, takes in DEFAULTS.items() if flag in takes]
        if flag in DEFAULTS["dpo"]:  # which the script has; its other defaults are listed
            usual = DEFAULTS["dpo"][flag]
            others = [f"{name} {value:g}" for name, value in takes if value != usual]
            group.description += f"default of --{flag}: {usual:g}, but {', '.join(others)}\n"
        else:
            text = "; ".join(f"{name}, default: {value:g}" for name, value in takes)
            kind = positive if flag == "tau" else number(float, 0)  # a loss divides by tau
            group.add_argument(f"--{flag}", type=kind, help=f"of --loss {text}")


def is_used(args: Namespace) -> bool:
    """Whether a run needs more than the dpo_loss of the core."""
    return args.loss != "dpo" or any(_is_given(args, name) for name in ADD_ONS)


def defaults(args: Namespace) -> dict:
    """The defaults that follow from --loss: its hyperparameters, and whether it has a reference."""
    found = {"sync_reference_mix": 0.6} if args.sync_reference_every else {}
    found |= DEFAULTS[args.loss]
    return found if has_reference(args.loss) else found | {"reference": "none"}


def refusal(args: Namespace) -> str | None:
    """What is wrong with the flags of the loss and its add-ons, if anything is."""
    takes, reference = DEFAULTS[args.loss], has_reference(args.loss)
    for flag in (flag for others in DEFAULTS.values() for flag in others):
        if flag not in takes and getattr(args, flag) is not None:
            names = ", ".join(f"--{each}" for each in takes) or "none"
            return f"--{flag} is no hyperparameter of --loss {args.loss}, which takes {names}"
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


def _is_given(args: Namespace, flag: str) -> bool:
    value = getattr(args, flag)
    return value is not None and value is not False  # 0 is given


def objective_of(
    policy: Policy,
    reference: Callable[[Batch], Tensor] | None,
    rows: Sequence[Row],
    args: Namespace,
    world: World,
) -> Objective:
    """The objective that the flags of nanoalign/family describe; prints its loss.

    rows: all that it trains on.
    Raises RunError for rows that the loss can't train on, or a reference that can't move.
    """
    name = args.loss
    hyperparameters = {key: getattr(args, key) for key in DEFAULTS[name]}
    settings = "".join(f", {key} {value:g}" for key, value in hyperparameters.items())
    print0(f"{'loss':<11} {name}{settings}")
    options = ("ld_alpha", "wpo", "divergence", "divergence_alpha")
    options = {option: getattr(args, option) for option in options}
    pairs = partial(pairs_of, policy=policy, reference=reference, **options)
    loss = pair_loss(LOSSES[name], FIELDS[name], hyperparameters)
    make = partial(Paired, averaged=KIND[name] == POLICY_MEANS)
    if name == "kto":
        kto.check_kinds(rows, " ".join(args.data))
        kto.check_prompts(rows, " ".join(args.data))
        loss = partial(kto.loss_of_responses, **hyperparameters)
        make = partial(kto.Kto, policy, reference, args.max_length, world)
    elif name == "aot":
        make = partial(Aot, world)
    elif name == "bco_pair":
        make = Bco
    if args.length_alpha is not None:
        loss = with_lengths(loss, args.length_alpha / args.beta)
    if args.wpo:
        loss = with_wpo(loss)
    if args.nll_weight is not None:
        loss = with_nll(loss, args.nll_weight)
    objective = make(pairs, loss, beta=args.beta or 1.0)
    if args.sync_reference_every:
        steps, mix = args.sync_reference_every, args.sync_reference_mix
        objective = Moving(objective, policy, reference, steps, mix)
    return objective

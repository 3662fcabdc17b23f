"""The other preference losses, and what combines with them: docs/losses.md.

losses.py       the losses: tensors in, one value per pair out
divergences.py  what replaces log-ratios (f-DPO), and weights of pairs (WPO); import torch alone
pairs.py        Pairs: what the losses are functions of, from a batch, a policy and a reference
tokens.py       values per token: collision probabilities (WPO), discounted sums (LD-DPO)
paired.py       a loss of pairs as an Objective, with what is put around it
objectives.py   --loss and its add-ons -> Objective
kto.py aot.py bco.py moving.py      what looks at a step as a whole, or remembers the steps before
"""

import argparse
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

# Each is used when its value is neither None nor False.
ADD_ONS = ("nll_weight", "ld_alpha", "length_alpha", "divergence", "wpo", "sync_reference_every")


class Names:
    """The choices of --loss: "dpo" is the core's, the others are imported when they are needed."""

    def __iter__(self) -> Iterator[str]:
        from nanoalign.family.losses import LOSSES

        return iter(("dpo", *LOSSES))

    def __contains__(self, name: object) -> bool:
        return name == "dpo" or name in tuple(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nanoalign.flags import number, positive

    group = parser.add_argument_group("other losses and their hyperparameters", "")
    group.add_argument("--loss", choices=Names(), default="dpo", metavar="NAME",
        help="one of %(choices)s")  # fmt: skip
    parser.lazy.append(partial(add_hyperparameters, parser, group))
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


def add_hyperparameters(
    parser: argparse.ArgumentParser, group: argparse._ArgumentGroup, argv: list[str]
) -> None:
    """Adds a flag for each hyperparameter of losses.py, where the command line has --loss."""
    if {"-h", "--help", "--loss"}.isdisjoint(word.partition("=")[0] for word in argv):
        return
    from nanoalign.family.losses import DEFAULTS
    from nanoalign.flags import number, positive

    for flag in dict.fromkeys(name for takes in DEFAULTS.values() for name in takes):
        if flag not in ("beta", "label_smoothing"):  # which the core has
            takes = [(name, takes[flag]) for name, takes in DEFAULTS.items() if flag in takes]
            text = "; ".join(f"{name}, default: {value:g}" for name, value in takes)
            kind = positive if flag == "tau" else number(float, 0)  # a loss divides by tau
            group.add_argument(f"--{flag}", type=kind, help=f"of --loss {text}")
    for flag in ("beta", "label_smoothing"):
        usual = parser.get_default(flag)
        others = {name: takes.get(flag, usual) for name, takes in DEFAULTS.items()}
        others = [f"{name} {value:g}" for name, value in others.items() if value != usual]
        group.description += f"default of --{flag}: {usual:g}, but {', '.join(others)}\n"
    parser.refusals.append(refusal_of_hyperparameters)


def is_used(args: Namespace) -> bool:
    """Whether a run needs more than the dpo_loss of the core."""
    return args.loss != "dpo" or any(_is_given(args, name) for name in ADD_ONS)


def loss_name(args: Namespace) -> str:
    """The entry of LOSSES that is used; `--loss dpo` with an add-on is sigmoid or cdpo."""
    return {"dpo": "cdpo" if args.label_smoothing else "sigmoid"}.get(args.loss, args.loss)


def defaults(args: Namespace) -> dict:
    """The defaults that follow from --loss: its hyperparameters, and whether it has a reference."""
    found = {"sync_reference_mix": 0.6} if args.sync_reference_every else {}
    if args.loss == "dpo":
        return found
    from nanoalign.family.losses import DEFAULTS, has_reference

    found |= {"beta": None, "label_smoothing": None, **DEFAULTS[args.loss]}
    return found if has_reference(args.loss) else found | {"reference": "none"}


def refusal_of_hyperparameters(args: Namespace) -> str | None:
    """The first hyperparameter that was given and that the loss does not have, if there is one."""
    from nanoalign.family.losses import DEFAULTS

    takes = DEFAULTS.get(args.loss, ("beta", "label_smoothing"))
    for flag in (flag for others in DEFAULTS.values() for flag in others):
        if flag not in takes and getattr(args, flag) is not None:
            names = ", ".join(f"--{each}" for each in takes) or "none"
            return f"--{flag} is no hyperparameter of --loss {args.loss}, which takes {names}"
    return None


def refusal(args: Namespace) -> str | None:
    """What is wrong with the flags of the loss and its add-ons, if anything is."""
    reference, incompatible = True, {}
    if is_used(args):
        from nanoalign.family.losses import INCOMPATIBLE, KIND, has_reference

        name = loss_name(args)
        reference, incompatible = has_reference(name), INCOMPATIBLE[KIND[name]]
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
    for flag, reason in incompatible.items():
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

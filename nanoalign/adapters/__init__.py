"""LoRA: small matrices beside the weights are trained, in place of the weights.

lora.py         puts adapters into a policy; the reference is the policy with them off; the files
"""

import argparse
from argparse import Namespace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nanoalign.flags import number

    count = number(int, 1)
    add = parser.add_argument_group("LoRA, which needs the package peft").add_argument
    add("--lora_rank", type=count, metavar="RANK",
        help="train adapters of this rank, not the weights; the reference is the policy with its "
        "adapters off, and takes no memory; default: no adapters")  # fmt: skip
    add("--lora_alpha", type=count,
        help="the update is scaled by alpha / rank; default: twice the rank")  # fmt: skip
    add("--lora_targets", nargs="+", metavar="NAME",
        help="layers with adapters, such as q_proj; default: all linear but the head")  # fmt: skip
    parser.derived.append(lambda args: {"lora_alpha": 2 * args.lora_rank} if args.lora_rank else {})
    parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """What is wrong with the flags of LoRA, if anything is."""
    if args.lora_rank is None:
        for name in ("lora_alpha", "lora_targets"):
            if getattr(args, name) is not None:
                return f"--{name} needs --lora_rank; give both"
        return None
    try:
        import peft  # noqa: F401
    except ImportError as error:
        return f"--lora_rank needs the package peft ({error}): pip install peft"
    if args.reference not in (None, "none", args.model):
        return (
            f"--reference {args.reference} does not go with --lora_rank, where the reference is "
            "--model with its adapters off; leave it out"
        )
    if args.sync_reference_every:
        return (
            "--sync_reference_every does not go with --lora_rank, where the reference is the "
            "policy with its adapters off and can't move"
        )
    return None

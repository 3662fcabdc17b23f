"""Variants of the reward model: several preferences, preferences in the prompt, length apart.

rule.py         what is written into a reward model: how text becomes tokens, and its preferences
several.py      an output for each preference, trained on its own labels
condition.py    one output for several preferences, one of which the prompt names
length.py       a coefficient of length beside the reward, so that the reward does not learn length
own_head.py     reward models of architectures for which transformers has none
variants.py     the variant that the flags select
"""

import argparse
from argparse import Namespace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("variants of the reward model").add_argument
    add("--condition", action="store_true",
        help="one output for several --preference, of which the prompt names one")  # fmt: skip
    add("--length_debias", action="store_true",
        help="learn beside the reward what length alone explains, and leave it out")  # fmt: skip
    parser.refusals.append(refusal)


def is_used(args: Namespace) -> bool:
    """Whether a run needs another model or loss than train_rm.py itself has."""
    return args.length_debias or (len(args.preference) > 1 and not args.condition)


def announce_head(folder) -> None:
    """Prints that a reward model from a folder gets a head of ours, if it does."""
    from nanoalign.rewards.own_head import announce

    announce(folder)


def refusal(args: Namespace) -> str | None:
    """What is wrong with the flags of the variants, if anything is."""
    names = " ".join(args.preference)
    if len(set(args.preference)) < len(args.preference):
        return f"--preference {names}: give each name once"
    if args.length_debias and len(args.preference) > 1:
        return f"--length_debias has one coefficient of length; give one --preference, not {names}"
    if args.condition and len(args.preference) == 1:
        return f"--condition needs several preferences, not {names}; give --preference better safer"
    return None

"""The flags of the variants of a reward model, and the model and loss that they select."""

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

from nanoalign.batch import Row
from nanoalign.model import RewardModel
from nanoalign.rewards import length_debias, several


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("variants of the reward model").add_argument
    add(
        "--condition",
        action="store_true",
        help="train one output on several --preference; each prompt names its preference",
    )
    add(
        "--length_debias",
        action="store_true",
        help="learn what length explains of the labels, and leave it out of the reward",
    )
    parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """What is wrong with the combination of the flags of the variants; None if nothing is."""
    names = " ".join(args.preference)
    if len(set(args.preference)) < len(args.preference):
        return f"--preference {names}: give each name once"
    if args.length_debias and len(args.preference) > 1:
        return f"--length_debias has one coefficient of length; give one --preference, not {names}"
    if args.condition and len(args.preference) == 1:
        return f"--condition needs several preferences, not {names}; give --preference better safer"
    return None


def variant_of(
    args: Namespace, rows: Sequence[Row], loss_of_batch: Callable
) -> tuple[Callable[..., RewardModel], Callable]:
    """Returns (the function that loads the model, the loss of a batch) of the variant by the flags.

    rows: all training rows. loss_of_batch: that of train_rm.py, which a variant extends.
    """
    if args.length_debias:
        load = partial(length_debias.load, rows)
        return load, partial(length_debias.loss_of_batch, loss_of_batch)
    if len(args.preference) > 1 and not args.condition:
        load = partial(several.SeveralRewards.load, outputs=len(args.preference))
        return load, partial(several.loss_of_batch, loss_of_batch)
    return RewardModel.load, loss_of_batch

"""The variant of the reward model that the flags select."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

from nanoalign.batch import Row
from nanoalign.rewards import length, several


def variant_of(args: Namespace, rows: Sequence[Row]) -> tuple[SimpleNamespace, Callable]:
    """(what has the `load` of RewardModel, the loss of a batch). rows: all that it trains on."""
    if args.length_debias:
        return SimpleNamespace(load=partial(length.load, rows)), length.loss_of_batch
    load = partial(several.SeveralRewards.load, outputs=len(args.preference))
    return SimpleNamespace(load=load), several.loss_of_batch

"""--loss and its add-ons -> the Objective of the training loop."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from nanoalign.batch import Batch, Row
from nanoalign.distributed import World, print0
from nanoalign.family import loss_name
from nanoalign.family.losses import DEFAULTS, FIELDS, KIND, LOSSES, POLICY_MEANS
from nanoalign.family.paired import Paired, pair_loss, with_lengths, with_nll, with_wpo
from nanoalign.family.pairs import pairs_of
from nanoalign.loop import Objective
from nanoalign.model import Policy


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
    name = loss_name(args)
    hyperparameters = {key: getattr(args, key) for key in DEFAULTS[name]}
    settings = "".join(f", {key} {value:g}" for key, value in hyperparameters.items())
    print0(f"{'loss':<11} {name}{settings}")
    options = ("ld_alpha", "wpo", "divergence", "divergence_alpha")
    options = {option: getattr(args, option) for option in options}
    pairs = partial(pairs_of, policy=policy, reference=reference, **options)
    loss = pair_loss(LOSSES[name], FIELDS[name], hyperparameters)
    make = partial(Paired, averaged=KIND[name] == POLICY_MEANS)
    if name == "kto":
        from nanoalign.family import kto

        kto.check_kinds(rows, " ".join(args.data))
        kto.check_prompts(rows, " ".join(args.data))
        loss = partial(kto.loss_of_responses, **hyperparameters)
        make = partial(kto.Kto, policy, reference, args.max_length, world)
    elif name == "aot":
        from nanoalign.family.aot import Aot

        make = partial(Aot, world)
    elif name == "bco_pair":
        from nanoalign.family.bco import Bco as make
    if args.length_alpha is not None:
        loss = with_lengths(loss, args.length_alpha / args.beta)
    if args.wpo:
        loss = with_wpo(loss)
    if args.nll_weight is not None:
        loss = with_nll(loss, args.nll_weight)
    objective = make(pairs, loss, beta=args.beta or 1.0)
    if args.sync_reference_every:
        from nanoalign.family.moving import Moving

        steps, mix = args.sync_reference_every, args.sync_reference_mix
        objective = Moving(objective, policy, reference, steps, mix)
    return objective

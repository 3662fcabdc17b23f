"""--loss and its add-ons -> the Objective of the training loop.

Shapes: B pairs.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nanoalign.batch import Batch, Row
from nanoalign.distributed import World, print0
from nanoalign.family import loss_name
from nanoalign.family.losses import DEFAULTS, FIELDS, KIND, LOSSES, POLICY_MEANS
from nanoalign.family.pairs import PairLoss, Pairs, Read, read_pairs
from nanoalign.loop import Objective
from nanoalign.metrics import Metric, hits
from nanoalign.model import Policy


class Paired(Objective):
    """A loss of pairs. Subclasses add to the pairs what they know of a step or of the past."""

    def __init__(self, read: Read, loss: PairLoss, beta: float = 1.0, averaged: bool = False):
        """read: gives the pairs of a batch. loss: gives their losses.

        beta: of the reported rewards, beta times the log-ratios; without a reference beta times the
            log-probabilities of the policy, if `averaged` as means over tokens.
        """
        super().__init__(self.loss_of_pairs)
        self.read, self.loss, self.beta, self.averaged = read, loss, beta, averaged

    def pairs(self, batch: Batch) -> Pairs:
        return self.read(batch)

    def loss_of_pairs(self, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        pairs = self.pairs(batch)
        losses = self.loss(pairs)
        chosen, rejected = (rewards.detach() for rewards in self.rewards(pairs))
        return losses, {
            "loss": losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": hits(chosen, rejected),
            "logps/chosen": pairs.full_chosen_logps,
            "logps/rejected": pairs.full_rejected_logps,
        }

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The implicit rewards of the chosen and the rejected responses, (B,) each."""
        if pairs.chosen_logratios is not None:
            return self.beta * pairs.chosen_logratios, self.beta * pairs.rejected_logratios
        chosen, rejected = self.beta * pairs.chosen_logps, self.beta * pairs.rejected_logps
        if self.averaged:
            return chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
        return chosen, rejected

    def losses_at_start(self, batch: Batch) -> Tensor:
        """The losses of a batch, were its log-ratios 0: (B,)."""
        pairs = self.pairs(batch)
        zero = torch.zeros_like(pairs.chosen_logps)
        return self.loss(replace(pairs, chosen_logratios=zero, rejected_logratios=zero))


def pair_loss(
    function: Callable[..., Tensor], fields: Sequence[str], hyperparameters: dict[str, float]
) -> PairLoss:
    """A loss of tensors as a loss of Pairs."""
    return lambda pairs: function(*(getattr(pairs, name) for name in fields), **hyperparameters)


def with_lengths(loss: PairLoss, per_token: float) -> PairLoss:
    """R-DPO (Park et al. 2024, arXiv 2403.19159): per_token * (|y_w| - |y_l|) is added to h.

    The loss then explains by length what length explains, so that the policy need not learn it.
    """

    def longer(pairs: Pairs) -> Tensor:
        chosen = pairs.chosen_logratios + per_token * pairs.chosen_lengths
        rejected = pairs.rejected_logratios + per_token * pairs.rejected_lengths
        return loss(replace(pairs, chosen_logratios=chosen, rejected_logratios=rejected))

    return longer


def with_wpo(loss: PairLoss) -> PairLoss:
    """WPO: the losses times the weights of their pairs."""
    return lambda pairs: loss(pairs) * pairs.wpo_weights


def with_nll(loss: PairLoss, weight: float) -> PairLoss:
    """RPO: the losses plus `weight` times the NLL of chosen, a mean over its tokens.

    An unpaired response that is undesirable has no NLL.
    """

    def added(pairs: Pairs) -> Tensor:
        nll = -pairs.full_chosen_logps / pairs.chosen_lengths
        if pairs.has_chosen is not None:
            nll = nll * pairs.has_chosen
        return loss(pairs) + weight * nll

    return added


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
    read = partial(read_pairs, policy=policy, reference=reference, **options)
    loss = pair_loss(LOSSES[name], FIELDS[name], hyperparameters)
    make = partial(Paired, averaged=KIND[name] == POLICY_MEANS)
    if name == "kto":
        from nanoalign.family import kto

        kto.check_kinds(rows, " ".join(args.data))
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
    objective = make(read, loss, beta=args.beta or 1.0)
    if args.sync_reference_every:
        from nanoalign.family.moving import Moving

        steps, mix = args.sync_reference_every, args.sync_reference_mix
        objective = Moving(objective, policy, reference, steps, mix)
    return objective

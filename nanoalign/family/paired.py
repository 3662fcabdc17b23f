"""Losses of pairs as Objectives of the training loop, and what is put around a loss.

Shapes: B pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nanoalign.batch import Batch
from nanoalign.family.pairs import PairLoss, Pairs, PairsOf
from nanoalign.loop import Objective
from nanoalign.metrics import Metric, pair_metrics


class Paired(Objective):
    """A loss of pairs. Subclasses add to the pairs what they know of a step or of the past."""

    def __init__(
        self, pairs_of: PairsOf, loss: PairLoss, beta: float = 1.0, averaged: bool = False
    ):
        """pairs_of: gives the pairs of a batch. loss: gives their losses.

        beta: of the reported rewards, beta times the log-ratios; without a reference beta times the
            log-probabilities of the policy, if `averaged` as means over tokens.
        """
        super().__init__(self.loss_of_pairs)
        self.pairs_of, self.loss, self.beta, self.averaged = pairs_of, loss, beta, averaged

    def pairs(self, batch: Batch) -> Pairs:
        return self.pairs_of(batch)

    def loss_of_pairs(self, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        pairs = self.pairs(batch)
        losses = self.loss(pairs)
        chosen, rejected = (rewards.detach() for rewards in self.rewards(pairs))
        return losses, {
            **pair_metrics(losses, chosen, rejected),
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
        """The losses of a batch, were its log-ratios 0, so that each gap is its own match: (B,)."""
        pairs = self.pairs(batch)
        zero, gaps = torch.zeros_like(pairs.chosen_logps), pairs.chosen_logps - pairs.rejected_logps
        pairs = replace(pairs, chosen_logratios=zero, rejected_logratios=zero, matched_gaps=gaps)
        return self.loss(pairs)


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

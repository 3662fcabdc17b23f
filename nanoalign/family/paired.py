"""The Objective of a loss of pairs, and the add-ons that change the loss.

Shapes: B pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nanoalign.batch import Batch
from nanoalign.family.moving import Moving
from nanoalign.family.pairs import PairLoss, Pairs, PairsOf
from nanoalign.loop import Objective
from nanoalign.metrics import Metric, pair_metrics


class Paired(Objective):
    """Minimises a loss of pairs. Subclasses add what depends on the step or on earlier steps."""

    def __init__(
        self, pairs_of: PairsOf, loss: PairLoss, beta: float = 1.0, averaged: bool = False
    ):
        """pairs_of: computes the pairs of a batch. loss: computes their losses.

        beta: the reported rewards are beta times the log-ratios, or without a reference beta times
            the log-probabilities of the policy.
        averaged: whether these log-probabilities are means over tokens.
        """
        super().__init__(self.loss_of_pairs)
        self.pairs_of, self.loss, self.beta, self.averaged = pairs_of, loss, beta, averaged
        self.moving: Moving | None = None  # with --sync_reference_every

    def pairs(self, batch: Batch) -> Pairs:
        """The pairs of a batch with all fields that the loss takes."""
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

    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        if self.moving is not None:
            self.moving.after_step(step)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The implicit rewards of the chosen and the rejected responses, (B,) each."""
        if pairs.chosen_logratios is not None:
            return self.beta * pairs.chosen_logratios, self.beta * pairs.rejected_logratios
        chosen, rejected = self.beta * pairs.chosen_logps, self.beta * pairs.rejected_logps
        if self.averaged:
            return chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
        return chosen, rejected

    def losses_at_start(self, batch: Batch) -> Tensor:
        """The losses of a batch if policy and reference were one function: (B,).

        All log-ratios are 0, and the matched gap of each pair is its own.
        """
        pairs = self.pairs(batch)
        zero, gaps = torch.zeros_like(pairs.chosen_logps), pairs.chosen_logps - pairs.rejected_logps
        pairs = replace(pairs, chosen_logratios=zero, rejected_logratios=zero, matched_gaps=gaps)
        return self.loss(pairs)


def pair_loss(
    function: Callable[..., Tensor], fields: Sequence[str], hyperparameters: dict[str, float]
) -> PairLoss:
    """Returns a loss that takes Pairs, from a function that takes some of their fields in order."""
    return lambda pairs: function(*(getattr(pairs, name) for name in fields), **hyperparameters)


def with_lengths(loss: PairLoss, per_token: float) -> PairLoss:
    """R-DPO: adds per_token * (|y_w| - |y_l|) to the margin. Park et al. 2024, arXiv 2403.19159.

    Returns the changed loss. per_token: in nats. The added term lowers the loss where length
    explains a label, so that no policy has to learn it.
    """

    def with_reward_of_length(pairs: Pairs) -> Tensor:
        chosen = pairs.chosen_logratios + per_token * pairs.chosen_lengths
        rejected = pairs.rejected_logratios + per_token * pairs.rejected_lengths
        return loss(replace(pairs, chosen_logratios=chosen, rejected_logratios=rejected))

    return with_reward_of_length


def with_wpo(loss: PairLoss) -> PairLoss:
    """WPO: returns a loss whose values are multiplied by the weights of their pairs."""
    return lambda pairs: loss(pairs) * pairs.wpo_weights


def with_nll(loss: PairLoss, weight: float) -> PairLoss:
    """RPO: returns a loss plus `weight` times the chosen response's NLL, a mean over its tokens.

    For a record that has no chosen response (kto) 0 is added.
    """

    def plus_nll(pairs: Pairs) -> Tensor:
        nll = -pairs.full_chosen_logps / pairs.chosen_lengths
        if pairs.has_chosen is not None:
            nll = nll * pairs.has_chosen
        return loss(pairs) + weight * nll

    return plus_nll

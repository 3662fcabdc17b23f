"""Pairs: what the losses are functions of, from a batch, a policy and a reference.

Shapes: B pairs, S responses, M scored tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoalign.batch import Batch
from nanoalign.family.divergences import divergence_scores, wpo_weights
from nanoalign.family.tokens import discounted_sums, logps_and_collisions
from nanoalign.logps import sums_of_responses


@dataclass(slots=True)
class Pairs:
    """The pairs of a batch, (B,) each. A loss takes the fields that FIELDS of losses.py lists."""

    chosen_logps: Tensor  # log pi(y_w | x); with --ld_alpha discounted
    rejected_logps: Tensor
    full_chosen_logps: Tensor  # never discounted
    full_rejected_logps: Tensor
    chosen_lengths: Tensor  # tokens, as floats
    rejected_lengths: Tensor
    wpo_weights: Tensor | None = None
    # with a reference
    chosen_logratios: Tensor | None = None  # log pi - log pi_ref; with --divergence its score
    rejected_logratios: Tensor | None = None
    reference_gaps: Tensor | None = None  # log pi_ref(y_w | x) - log pi_ref(y_l | x)
    # of a step, or of the steps before
    shift: float | Tensor = 0.0  # bco_pair
    matched_gaps: Tensor | None = None  # aot
    kl: Tensor | None = None  # kto
    has_chosen: Tensor | None = None  # kto: False where an unpaired response is undesirable
    has_rejected: Tensor | None = None  # kto: False where it is desirable


PairsOf = Callable[[Batch], Pairs]
PairLoss = Callable[[Pairs], Tensor]  # losses (B,)


def pairs_of(
    batch: Batch,
    policy: Callable[[Batch], Tensor],
    reference: Callable[[Batch], Tensor] | None,
    ld_alpha: float | None = None,
    wpo: bool = False,
    divergence: str | None = None,
    divergence_alpha: float | None = None,
) -> Pairs:
    """The pairs of a batch. The reference gets no gradient.

    ld_alpha: the weight of tokens beyond the length of the shorter response, in both models.
    wpo: whether wpo_weights are wanted.
    divergence: replaces log-ratios by the scores of another divergence than the reverse KL.
    """
    logps, tokens, weights = logps_of_responses(policy, batch, ld_alpha is not None, wpo)
    chosen, rejected = logps_of_pairs(logps, tokens, batch, ld_alpha)
    pairs = Pairs(
        chosen_logps=chosen,
        rejected_logps=rejected,
        full_chosen_logps=logps[batch.chosen],
        full_rejected_logps=logps[batch.rejected],
        chosen_lengths=batch.lengths[batch.chosen].float(),
        rejected_lengths=batch.lengths[batch.rejected].float(),
        wpo_weights=None if weights is None else weights[batch.chosen] * weights[batch.rejected],
    )
    if reference is None:
        return pairs
    with torch.no_grad():
        logps, tokens, _ = logps_of_responses(reference, batch, ld_alpha is not None, False)
        reference_chosen, reference_rejected = logps_of_pairs(logps, tokens, batch, ld_alpha)
    ratios = [chosen - reference_chosen, rejected - reference_rejected]
    if divergence is not None:
        ratios = [divergence_scores(each, divergence, divergence_alpha) for each in ratios]
    gaps = reference_chosen - reference_rejected
    return replace(
        pairs, chosen_logratios=ratios[0], rejected_logratios=ratios[1], reference_gaps=gaps
    )


def logps_of_responses(
    model: Callable[[Batch], Tensor], batch: Batch, per_token: bool, wpo: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(log-probabilities (S,), those of tokens (M,) if wanted, WPO's weights (S,) if wanted)."""
    if not (per_token or wpo):
        return model(batch), None, None
    if not wpo:
        tokens = model.tokens(batch)
        return sums_of_responses(tokens, batch.lengths), tokens, None
    tokens, collisions = model.tokens(batch, head=logps_and_collisions)
    scores = (tokens - collisions).detach()  # else the policy would learn to weigh less
    weights = wpo_weights(sums_of_responses(scores, batch.lengths) / batch.lengths)
    return sums_of_responses(tokens, batch.lengths), tokens, weights


def logps_of_pairs(
    logps: Tensor, tokens: Tensor | None, batch: Batch, ld_alpha: float | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of chosen and of rejected responses, with ld_alpha discounted: (B,)."""
    if ld_alpha is None:
        return logps[batch.chosen], logps[batch.rejected]
    shorter = torch.minimum(batch.lengths[batch.chosen], batch.lengths[batch.rejected])
    chosen, rejected = (
        discounted_sums(tokens, batch.lengths, responses, shorter, ld_alpha)
        for responses in (batch.chosen, batch.rejected)
    )
    return chosen, rejected

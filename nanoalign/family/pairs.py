"""The pairs of a batch as losses take them: log-probabilities, log-ratios, lengths.

Shapes: B pairs, S responses, M scored tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign.batch import Batch
from nanoalign.family.tokens import discounted_sums, logps_and_collisions
from nanoalign.logps import sums_of_responses

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
LARGEST_EXPONENT = 40.0  # of exp(-log-ratio); squares of larger ones overflow in float32


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

    ld_alpha: weight of the tokens beyond the length of the shorter response, in both models.
        None: all tokens count alike. wpo: whether WPO's weights are computed.
    divergence: one of DIVERGENCES, whose scores replace the log-ratios. divergence_alpha: of alpha.
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
    logratios = [chosen - reference_chosen, rejected - reference_rejected]
    if divergence is not None:
        logratios = [divergence_scores(x, divergence, divergence_alpha) for x in logratios]
    return replace(
        pairs,
        chosen_logratios=logratios[0],
        rejected_logratios=logratios[1],
        reference_gaps=reference_chosen - reference_rejected,
    )


def logps_of_responses(
    model: Callable[[Batch], Tensor], batch: Batch, per_token: bool, wpo: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(log-probabilities of the responses (S,), of their tokens (M,), WPO's weights (S,)).

    The second is None unless per_token or wpo is true, the third unless wpo is true: exp of the
    mean over the tokens of a response of log pi(y_t) - log sum_v pi(v)^2, without gradient. Zhou et
    al. 2024, arXiv 2406.11827, equation 2 with their alignment of the weights: a response counts
    more, the more probable it is under the policy.
    """
    if not (per_token or wpo):
        return model(batch), None, None
    if not wpo:
        tokens = model.tokens(batch)
        return sums_of_responses(tokens, batch.lengths), tokens, None
    tokens, collisions = model.tokens(batch, head=logps_and_collisions)
    scores = (tokens - collisions).detach()  # else the policy would learn to weigh less
    weights = (sums_of_responses(scores, batch.lengths) / batch.lengths).exp()
    return sums_of_responses(tokens, batch.lengths), tokens, weights


def logps_of_pairs(
    logps: Tensor, tokens: Tensor | None, batch: Batch, ld_alpha: float | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the chosen and the rejected responses, discounted by ld_alpha: (B,)."""
    if ld_alpha is None:
        return logps[batch.chosen], logps[batch.rejected]
    shorter = torch.minimum(batch.lengths[batch.chosen], batch.lengths[batch.rejected])
    chosen, rejected = (
        discounted_sums(tokens, batch.lengths, responses, shorter, ld_alpha)
        for responses in (batch.chosen, batch.rejected)
    )
    return chosen, rejected


def divergence_scores(logratios: Tensor, divergence: str, alpha: float = 0.5) -> Tensor:
    """Replaces log-ratios where a divergence other than the reverse KL is penalised: (B,).

    The score is f'(u) at u = pi / pi_ref, less its value at u = 1:

        reverse_kl  log u           js      log(2 u / (1 + u))
        forward_kl  1 - 1 / u       alpha   (1 - u^-alpha) / alpha,  0 < alpha < 1

    Wang et al. 2023 (f-DPO), arXiv 2309.16240, table 1. (TRL's alpha is 1 - alpha.) The exponent of
    1 / u is at most 40; where it would be larger, the gradient is 0.
    """
    if divergence == "reverse_kl":
        return logratios
    if divergence == "js":
        return math.log(2) + F.logsigmoid(logratios)
    if divergence == "forward_kl":
        return -torch.expm1((-logratios).clamp(max=LARGEST_EXPONENT))
    return -torch.expm1((-alpha * logratios).clamp(max=LARGEST_EXPONENT)) / alpha

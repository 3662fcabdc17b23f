"""Values of every scored token of a response, beside its log-probability.

Shapes: M scored tokens, S responses, B pairs, C ids of a chunk, V vocabulary.
"""

import torch
from torch import Tensor

from nanoalign.logps import Head, chunked_token_logps, sums_of_responses


def logps_and_collisions(
    hidden: Tensor, head: Head, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """(log pi of each scored token, log sum_v pi(v)^2 at its place), (M,) each: a head for WPO.

    The second is the probability that two samples agree, without gradient. The arguments are those
    of logps.chunked_token_logps.
    """
    logps = chunked_token_logps(hidden, head, targets, chunk)
    return logps, chunked_token_collisions(hidden, head, chunk)


@torch.no_grad()
def chunked_token_collisions(hidden: Tensor, head: Head, chunk: int) -> Tensor:
    """log sum_v pi(v)^2 at every scored token, (M,), by another product with the head."""
    sums = []  # of each chunk: log sum of exp(logit) and of exp(2 logit)
    for start in range(0, len(head.weight), chunk):
        logits = head(hidden, slice(start, start + chunk))  # (M, C)
        sums.append(torch.stack((logits.logsumexp(1), (2 * logits).logsumexp(1))))
    normaliser, doubled = torch.stack(sums).logsumexp(0)
    return doubled - 2 * normaliser


def discounted_sums(
    values: Tensor,  # (M,) of every scored token
    lengths: Tensor,  # (S,) tokens of each response; they sum to M
    responses: Tensor,  # (B,) indices of the wanted responses, among the S
    whole: Tensor,  # (B,) tokens that have the weight 1
    alpha: float,
) -> Tensor:
    """Sums over responses, whose tokens after the first `whole` have the weight alpha: (B,).

    The log-probabilities of LD-DPO (Liu et al. 2024, arXiv 2409.06411), where `whole` is the length
    of the shorter response of a pair.
    """
    starts = lengths.cumsum(0) - lengths
    wanted = lengths[responses]  # (B,)
    place = torch.arange(int(wanted.sum()), device=values.device)  # waits for the GPU
    place = place - (wanted.cumsum(0) - wanted).repeat_interleave(wanted)  # within its response
    weights = torch.where(place < whole.repeat_interleave(wanted), 1.0, alpha)
    picked = values[starts[responses].repeat_interleave(wanted) + place]
    return sums_of_responses(picked * weights, wanted)

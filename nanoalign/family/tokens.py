"""Add-ons that look at the tokens of a response: the weights of WPO, the sums of LD-DPO.

Shapes: M scored tokens, S responses, B pairs, C ids of a chunk, V vocabulary.
"""

import torch
from torch import Tensor

from nanoalign.logps import Head, chunked_token_logps, sums_of_responses


def logps_and_collisions(
    hidden: Tensor, head: Head, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """(log pi of every scored token, log sum_v pi(v)^2 where it is predicted), (M,) each.

    sum_v pi(v)^2 is the probability that two samples are the same token; it has no gradient. A head
    for Policy.tokens, with the arguments of logps.chunked_token_logps.
    """
    logps = chunked_token_logps(hidden, head, targets, chunk)
    return logps, chunked_token_collisions(hidden, head, chunk)


@torch.no_grad()
def chunked_token_collisions(hidden: Tensor, head: Head, chunk: int) -> Tensor:
    """log sum_v pi(v)^2 where each scored token is predicted: (M,). Computes all logits again."""
    sums = []  # for each chunk, log sum of exp(logit) and log sum of exp(2 logit)
    for start in range(0, len(head.weight), chunk):
        logits = head(hidden, slice(start, start + chunk))  # (M, C)
        sums.append(torch.stack((logits.logsumexp(1), (2 * logits).logsumexp(1))))
    normaliser, doubled = torch.stack(sums).logsumexp(0)
    return doubled - 2 * normaliser


def discounted_sums(
    values: Tensor,  # (M,) of every scored token
    lengths: Tensor,  # (S,) tokens of each response; they sum to M
    responses: Tensor,  # (B,) indices of the responses that are summed, among the S
    whole: Tensor,  # (B,) the number of first tokens that have the weight 1
    alpha: float,
) -> Tensor:
    """Sums over responses whose tokens after the first `whole` have the weight alpha: (B,).

    These are the log-probabilities of LD-DPO (Liu et al. 2024, arXiv 2409.06411) if `whole` is the
    length of the shorter response of a pair.
    """
    starts = lengths.cumsum(0) - lengths
    counts = lengths[responses]  # (B,)
    index = torch.arange(int(counts.sum()), device=values.device)  # waits for the GPU
    index = index - (counts.cumsum(0) - counts).repeat_interleave(counts)  # within its response
    weights = torch.where(index < whole.repeat_interleave(counts), 1.0, alpha)
    picked = values[starts[responses].repeat_interleave(counts) + index]
    return sums_of_responses(picked * weights, counts)

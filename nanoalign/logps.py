"""Log-probabilities of responses: the textbook version, and the chunked one that never holds (T, V) logits.

Shapes: N sequences, T tokens, V vocabulary, M scored tokens, D hidden size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # the label of a token that is not scored, as in torch and transformers


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of every sequence's scored tokens, summed: logits (N, T, V), labels (N, T) -> (N,).

    The shift is done here: logits at position t score the token at t + 1. With "Hi" as the prompt,
    "yes" and EOS as the response:

        position   0     1     2
        token      Hi    yes   EOS
        label     -100   yes   EOS
        logits    l0    l1    l2     result = log softmax(l0)[yes] + log softmax(l1)[EOS]

    Labels are token ids, -100 where not scored; the label at position 0 can't be scored.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must be (N, T, V) and labels (N, T); got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    logits, labels = logits[:, :-1], labels[:, 1:]
    scored = labels != IGNORE  # (N, T - 1)
    # float32 at least: bfloat16 would round a log-probability of -9.3 to a multiple of 1/16.
    logps = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    targets = labels.masked_fill(~scored, 0)
    token_logps = logps.gather(2, targets.unsqueeze(2)).squeeze(2)  # (N, T - 1)
    return (token_logps * scored).sum(1)


def chunked_token_logps(
    hidden: Tensor,  # (M, D) final hidden states that predict the scored tokens
    head: Callable[[Tensor], Tensor],  # (C, D) -> (C, V) logits
    targets: Tensor,  # (M,) ids of the scored tokens
    chunk: int,  # C: scored tokens whose logits are held at one time
) -> Tensor:
    """Log-probability of every scored token, (M,), holding the logits of one chunk at a time.

    In training a chunk's logits are dropped after use and computed again in the backward pass: a
    second product with the head for a memory of C * V in place of M * V. The last chunk is kept,
    since the backward pass begins with it.
    """

    def logps_of(hidden: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(head(hidden).float(), targets, reduction="none")

    hiddens, targets_ = hidden.split(chunk), targets.split(chunk)
    recompute = hidden.requires_grad
    logps = [
        # No random numbers are drawn in a head, so their state need not be kept for the second run.
        checkpoint(logps_of, h, t, use_reentrant=False, preserve_rng_state=False)
        if recompute and i < len(hiddens) - 1
        else logps_of(h, t)
        for i, (h, t) in enumerate(zip(hiddens, targets_, strict=True))
    ]
    return torch.cat(logps)


def sums_of_responses(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of what every scored token has, (M,), over the tokens of each response: (S,)."""
    # unsafe: skips the check that lengths sum to M, which would wait for the GPU.
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


@torch.no_grad()
def chunked_token_collisions(
    hidden: Tensor, head: Callable[[Tensor], Tensor], chunk: int
) -> Tensor:
    """log sum_v pi(v)^2 at every scored token, (M,): the probability that two samples agree there.

    hidden (M, D), head and chunk as in chunked_token_logps; another product with the head, without
    gradient.
    """
    parts = []
    for some in hidden.split(chunk):
        logits = head(some).float()  # (C, V)
        parts.append((2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1))
    return torch.cat(parts)


def discounted_sums(
    values: Tensor,  # (M,) of every scored token
    lengths: Tensor,  # (S,) tokens of each response; they sum to M
    responses: Tensor,  # (B,) which of the S are wanted
    whole: Tensor,  # (B,) tokens that count fully
    alpha: float,
) -> Tensor:
    """Sums over responses, of which the tokens after the first `whole` count alpha times: (B,).

    LD-DPO's log-probability (Liu et al. 2024, arXiv 2409.06411), where `whole` is the length of a pair's
    shorter response: what a longer one has in excess weighs less.
    """
    starts = lengths.cumsum(0) - lengths
    wanted = lengths[responses]  # (B,)
    place = torch.arange(int(wanted.sum()), device=values.device)  # CPU-GPU sync point
    place = place - (wanted.cumsum(0) - wanted).repeat_interleave(wanted)  # within its response
    weights = torch.where(place < whole.repeat_interleave(wanted), 1.0, alpha)
    picked = values[starts[responses].repeat_interleave(wanted) + place]
    return sums_of_responses(picked * weights, wanted)

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

"""Log-probabilities of responses: the textbook version, and one that never holds all logits.

Shapes: N sequences, T tokens, V vocabulary, M scored tokens, D hidden size, S responses.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # the label of a token that is not scored, as in torch and transformers
# Options of torch's checkpoint: a second forward draws no random numbers, whose state is not kept.
RERUN = {"use_reentrant": False, "preserve_rng_state": False}


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of every sequence: the sum over its scored tokens, (N,).

    Takes logits (N, T, V) and labels (N, T): token ids, and -100 where a token is not scored. The
    shift is done here: logits at position t score the token at t + 1. With "Hi" as the prompt, and
    "yes" and EOS as the response:

        position   0     1     2
        token      Hi    yes   EOS
        label     -100   yes   EOS
        logits    l0    l1    l2     result = log softmax(l0)[yes] + log softmax(l1)[EOS]

    The label at position 0 is never scored. Raises ValueError if the shapes do not match.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"logits must be (N, T, V) and labels (N, T); got {shapes}")
    logits, labels = logits[:, :-1], labels[:, 1:]
    scored = labels != IGNORE  # (N, T - 1)
    # At least float32: bfloat16 would round a log-probability of -9.3 to a multiple of 1/16.
    logps = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    targets = labels.masked_fill(~scored, 0)
    token_logps = logps.gather(2, targets.unsqueeze(2)).squeeze(2)  # (N, T - 1)
    return (token_logps * scored).sum(1)


def chunked_token_logps(
    hidden: Tensor,  # (M, D) final hidden states that predict the scored tokens
    head: Callable[[Tensor], Tensor],  # (C, D) -> (C, V) logits
    targets: Tensor,  # (M,) ids of the scored tokens
    chunk: int,  # C: scored tokens whose logits are in memory at one time
) -> Tensor:
    """Log-probability of every scored token, (M,), with the logits of one chunk in memory.

    In training the logits of a chunk are dropped after use and computed again in the backward
    pass: a second product with the head, for C * V floats instead of M * V. The last chunk is
    kept, because the backward pass begins with it.
    """

    def logps_of(hidden: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(head(hidden).float(), targets, reduction="none")

    parts = list(zip(hidden.split(chunk), targets.split(chunk), strict=True))
    dropped = len(parts) - 1 if hidden.requires_grad else 0
    logps = [checkpoint(logps_of, h, t, **RERUN) for h, t in parts[:dropped]]
    return torch.cat(logps + [logps_of(h, t) for h, t in parts[dropped:]])


def sums_of_responses(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of a value of every scored token, (M,), over the tokens of each response: (S,)."""
    # unsafe: skips the check that lengths sum to M, which would wait for the GPU. In float64, since
    # tokens are added one by one: in float32, 100,000 of -7 nats would be off by tens of nats.
    sums = torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True)
    return sums.to(values.dtype)

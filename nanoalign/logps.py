"""Log-probabilities of responses: the textbook version, and one that never holds all logits.

Shapes: N sequences, T tokens, V vocabulary, M scored tokens, D hidden size, S responses.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the label of a token that is not scored, as in torch and transformers


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
    token_logps = logps.gather(2, labels.where(scored, 0).unsqueeze(2)).squeeze(2)  # (N, T - 1)
    return (token_logps * scored).sum(1)


class Head(NamedTuple):
    """The last layer of a language model: z = scale * (W h + b), logits = cap * tanh(z / cap)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0  # Granite, Cohere
    cap: float | None = None  # Gemma 2; None: logits = z

    def __call__(self, hidden: Tensor, ids: slice = slice(None)) -> Tensor:
        """Logits of some ids of the vocabulary, at least float32: (M, D) -> (M, number of ids)."""
        logits = F.linear(hidden, self.weight[ids], None if self.bias is None else self.bias[ids])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def token_logps(self, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """See chunked_token_logps. A hook for other kernels."""
        return _ChunkedLogps.apply(hidden, targets, chunk, *self)


def chunked_token_logps(
    hidden: Tensor,  # (M, D) final hidden states that predict the scored tokens
    head: Head,
    targets: Tensor,  # (M,) ids of the scored tokens
    chunk: int,  # C: ids of the vocabulary whose logits are in memory at one time
) -> Tensor:
    """Log-probability of every scored token, (M,), with M * C logits in memory.

    The vocabulary is divided, not the tokens: then the head is read once, and each row of its
    gradient is one product over all tokens, rounded once. The backward pass computes the logits
    again from the logarithm of the normaliser, the only thing of size M that is kept.
    """
    return head.token_logps(hidden, targets, chunk)


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, chunk: int, *fields: object) -> Tensor:
        head, kind = Head(*fields), hidden.device.type
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        target_logits = hidden.new_zeros(len(hidden), dtype=dtype)
        normaliser = target_logits - torch.inf  # (M,) log of the sum of exp of all logits
        for start in range(0, len(head.weight), chunk):
            logits = head(hidden, slice(start, start + chunk))  # (M, C)
            inside, place = _places(targets, start, logits)
            target_logits = logits.gather(1, place)[:, 0].where(inside, target_logits)
            normaliser = torch.logaddexp(normaliser, logits.logsumexp(1))
        ctx.save_for_backward(hidden, targets, normaliser, *head[:2])
        ctx.chunk, ctx.options = chunk, head[2:]
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return target_logits - normaliser

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, normaliser, *tensors = ctx.saved_tensors
        head, needed = Head(*tensors, *ctx.options), ctx.needs_input_grad[3:]
        of_hidden = torch.zeros_like(hidden, dtype=normaliser.dtype)
        of_weight = torch.empty_like(head.weight) if needed[0] else None
        of_bias = torch.empty_like(head.bias) if needed[1] else None
        with torch.autocast(*ctx.autocast):
            for start in range(0, len(head.weight), ctx.chunk):
                ids = slice(start, start + ctx.chunk)
                logits = head(hidden, ids)  # (M, C)
                slope = head.scale * (1 if head.cap is None else 1 - (logits / head.cap).square())
                # d log p(target) / d logit = [target] - p
                inside, place = _places(targets, start, logits)
                gradient = logits.sub_(normaliser[:, None]).exp_().mul_(-upstream[:, None])
                gradient.scatter_add_(1, place, (upstream * inside)[:, None]).mul_(slope)
                of_hidden += gradient @ head.weight[ids]
                if of_weight is not None:
                    of_weight[ids] = gradient.T @ hidden
                if of_bias is not None:
                    of_bias[ids] = gradient.sum(0)
        return of_hidden.to(hidden.dtype), None, None, of_weight, of_bias, None, None


def _places(targets: Tensor, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(which targets are among the ids of logits (M, C), (M,); their places there or 0, (M, 1)).

    start: the first of these ids.
    """
    place = targets - start
    inside = (place >= 0) & (place < logits.shape[1])
    return inside, place.where(inside, 0)[:, None]


def sums_of_responses(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of values of scored tokens, (M,), over the tokens of each response: (S,), same dtype.

    lengths: (S,) tokens of each response; they must sum to M.
    """
    # unsafe: skips the check that lengths sum to M, which would wait for the GPU. In float64, since
    # tokens are added one by one: in float32, 100,000 of -7 nats would be off by tens of nats.
    sums = torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True)
    return sums.to(values.dtype)

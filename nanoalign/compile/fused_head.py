"""The head of nanoalign/logps.py, in which what is computed of a chunk of logits is one kernel.

The products with the head's weights are made outside of the kernels and stay in the dtype of
matrix products. Shapes: M scored tokens, D hidden size, C ids of a chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign.logps import Head


class Kernels(NamedTuple):
    """The two functions below, compiled."""

    read: Callable[..., tuple[Tensor, Tensor]]
    slopes: Callable[..., Tensor]


def logits_of(products: Tensor, scale: float, cap: float | None) -> Tensor:
    """Logits, at least float32, of products with the weights of a head."""
    logits = products.to(torch.promote_types(products.dtype, torch.float32)) * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def read(
    products: Tensor,  # (M, C)
    place: Tensor,  # (M,) of the targets in this chunk; below 0 or from C on: in another one
    of_targets: Tensor,  # (M,) logits of targets in earlier chunks
    normaliser: Tensor,  # (M,) log of the sum of exp of the logits of earlier chunks
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor]:
    """Returns `of_targets` and `normaliser` with this chunk."""
    logits = logits_of(products, scale, cap)
    inside = (place >= 0) & (place < products.shape[1])
    picked = logits.gather(1, place.where(inside, 0)[:, None])[:, 0]
    return picked.where(inside, of_targets), torch.logaddexp(normaliser, logits.logsumexp(1))


def slopes(
    products: Tensor,
    place: Tensor,
    normaliser: Tensor,  # of all chunks
    upstream: Tensor,  # (M,)
    scale: float,
    cap: float | None,
) -> Tensor:
    """The gradient of the products, (M, C), in their dtype: upstream * ([target] - p) * slope."""
    logits = logits_of(products, scale, cap)
    is_target = torch.arange(products.shape[1], device=products.device) == place[:, None]
    slope = scale if cap is None else scale * (1 - (logits / cap).square())
    rest = is_target.to(logits.dtype) - torch.exp(logits - normaliser[:, None])
    return (upstream[:, None] * rest * slope).to(products.dtype)


class FusedLogps(torch.autograd.Function):
    """log p of the targets, (M,), as logps.chunked_token_logps; kernels: compiled functions."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, targets: Tensor, chunk: int, kernels: Kernels, *fields: object
    ) -> Tensor:
        head, kind = Head(*fields), hidden.device.type
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        of_targets = hidden.new_zeros(len(hidden), dtype=dtype)
        normaliser = of_targets - torch.inf
        for start in range(0, len(head.weight), chunk):
            products = products_of(head, hidden, slice(start, start + chunk))  # (M, C)
            of_targets, normaliser = kernels.read(
                products, targets - start, of_targets, normaliser, *head[2:]
            )
        ctx.save_for_backward(hidden, targets, normaliser, *head[:2])
        ctx.chunk, ctx.kernels, ctx.options = chunk, kernels, head[2:]
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return of_targets - normaliser

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, normaliser, *tensors = ctx.saved_tensors
        head, needed = Head(*tensors, *ctx.options), ctx.needs_input_grad[4:]
        of_hidden = torch.zeros_like(hidden, dtype=normaliser.dtype)
        of_weight = torch.empty_like(head.weight) if needed[0] else None
        of_bias = torch.empty_like(head.bias) if needed[1] else None
        with torch.autocast(*ctx.autocast):
            for start in range(0, len(head.weight), ctx.chunk):
                ids = slice(start, start + ctx.chunk)
                products = products_of(head, hidden, ids)  # (M, C)
                gradient = ctx.kernels.slopes(
                    products, targets - start, normaliser, upstream, *head[2:]
                )
                of_hidden += gradient @ head.weight[ids]
                if of_weight is not None:
                    of_weight[ids] = gradient.T @ hidden
                if of_bias is not None:
                    of_bias[ids] = gradient.sum(0, dtype=normaliser.dtype)
        return of_hidden.to(hidden.dtype), None, None, None, of_weight, of_bias, None, None


def products_of(head: Head, hidden: Tensor, ids: slice) -> Tensor:
    """The head's products for some ids of the vocabulary, and its bias: (M, number of ids)."""
    return F.linear(hidden, head.weight[ids], None if head.bias is None else head.bias[ids])


def fused_head(kernels: Kernels) -> type[Head]:
    """A Head whose token_logps runs these kernels."""

    class FusedHead(Head):
        __slots__ = ()

        def token_logps(self, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
            return FusedLogps.apply(hidden, targets, chunk, kernels, *self)

    return FusedHead

"""Candidates for changes.py: parts of a step that torch.compile joins into few kernels."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoalign import logps
from nanoalign.logps import Head, _ChunkedLogps, _places
from nanoalign.model import Scorer
from nanoalign.packing import flex

compiled = partial(torch.compile, dynamic=True, fullgraph=True)


@contextlib.contextmanager
def blocks() -> Iterator[None]:
    """Whole blocks, attention included. Their block masks are made before, outside of the graph."""
    materialize = Scorer.materialize

    def compile_block(block: nn.Module, window: int | None) -> None:
        plain, forward = block.forward, compiled(block.forward)

        def run(*args: object, **options: object) -> object:
            if (tree := options.get("tree")) is None:  # the model's own forward, for the checks
                return plain(*args, **options)
            for size in {None, window} - {*tree.block_masks}:
                tree.block_masks[size] = flex.block_mask(tree.rows, size, args[0].device)
            return forward(*args, **options)

        block.forward = run

    def materialize_compiled(self: Scorer, *args: object) -> None:
        for block in self.blocks():
            compile_block(block, getattr(self.model.config, "sliding_window", None))
        materialize(self, *args)

    flex._compiled()  # its settings of the compiler
    with (
        patch.object(Scorer, "materialize", materialize_compiled),
        patch.object(flex, "_compiled", lambda: flex.flex_attention),
    ):
        yield


def _logits(products: Tensor, scale: float, cap: float | None) -> Tensor:
    logits = products.to(torch.promote_types(products.dtype, torch.float32)) * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _normaliser(products: Tensor, scale: float, cap: float | None) -> Tensor:
    return _logits(products, scale, cap).logsumexp(1)


def _slopes(
    products: Tensor, normaliser: Tensor, upstream: Tensor, scale: float, cap: float | None
) -> Tensor:
    """The gradient of the products, (M, C), of ids that are not the target."""
    logits = _logits(products, scale, cap)
    slope = scale if cap is None else scale * (1 - (logits / cap).square())
    return (-upstream[:, None] * torch.exp(logits - normaliser[:, None]) * slope).to(products.dtype)


class _CompiledLogps(_ChunkedLogps):
    """What is computed of each chunk of products is one kernel, which writes bfloat16 if they are.

    The products themselves are made outside of it. The gradient of a target's own logit is set
    afterwards, [target] - p computed exactly as -expm1(log p).
    """

    normaliser: Callable[..., Tensor] = staticmethod(_normaliser)
    slopes: Callable[..., Tensor] = staticmethod(_slopes)

    @classmethod
    def products(cls, head: Head, hidden: Tensor, ids: slice) -> Tensor:
        return F.linear(hidden, head.weight[ids], None if head.bias is None else head.bias[ids])

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, chunk: int, *fields: object) -> Tensor:
        head, kind, own_class = Head(*fields), hidden.device.type, _CompiledLogps
        own = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        normaliser = own - torch.inf
        for start in range(0, len(head.weight), chunk):
            products = own_class.products(head, hidden, slice(start, start + chunk))  # (M, C)
            inside, place = _places(targets, start, products)
            own = _logits(products.gather(1, place), *head[2:])[:, 0].where(inside, own)
            normaliser = torch.logaddexp(normaliser, own_class.normaliser(products, *head[2:]))
        ctx.save_for_backward(hidden, targets, own, normaliser, *head[:2])
        ctx.chunk, ctx.options = chunk, head[2:]
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return own - normaliser

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, own, normaliser, *tensors = ctx.saved_tensors
        head, needed, own_class = (
            Head(*tensors, *ctx.options),
            ctx.needs_input_grad[3:],
            _CompiledLogps,
        )
        of_hidden = torch.zeros_like(hidden, dtype=normaliser.dtype)
        of_weight = torch.empty_like(head.weight) if needed[0] else None
        of_bias = torch.empty_like(head.bias) if needed[1] else None
        of_own = -torch.expm1(own - normaliser) * upstream * head.scale
        of_own = of_own if head.cap is None else of_own * (1 - (own / head.cap).square())
        with torch.autocast(*ctx.autocast):
            for start in range(0, len(head.weight), ctx.chunk):
                ids = slice(start, start + ctx.chunk)
                products = own_class.products(head, hidden, ids)  # (M, C)
                inside, place = _places(targets, start, products)
                gradient = own_class.slopes(products, normaliser, upstream, *head[2:])
                others = gradient.gather(1, place)[:, 0]
                of_place = of_own.to(gradient.dtype).where(inside, others)
                gradient.scatter_(1, place, of_place[:, None])
                of_hidden += gradient @ head.weight[ids]
                if of_weight is not None:
                    of_weight[ids] = gradient.T @ hidden
                if of_bias is not None:
                    of_bias[ids] = gradient.sum(0, dtype=normaliser.dtype)
        return of_hidden.to(hidden.dtype), None, None, of_weight, of_bias, None, None


@contextlib.contextmanager
def head() -> Iterator[None]:
    """The head's logarithm of the normaliser and its gradient, each a kernel for a chunk."""
    with (
        patch.object(_CompiledLogps, "normaliser", staticmethod(compiled(_normaliser))),
        patch.object(_CompiledLogps, "slopes", staticmethod(compiled(_slopes))),
        patch.object(logps, "_ChunkedLogps", _CompiledLogps),
    ):
        yield


@contextlib.contextmanager
def everything() -> Iterator[None]:
    with blocks(), head():
        yield

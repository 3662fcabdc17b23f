"""python -m pytest tests/core/test_logps.py"""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanoalign.logps import Head, chunked_token_logps, sequence_logps, sums_of_responses


def test_sequence_logps_by_hand():
    """Two words, three tokens. Position 0 predicts token 1, position 1 token 2, position 2 nothing.

    softmax of [0, ln 3] is [1/4, 3/4], of [ln 4, 0] is [4/5, 1/5]; both scored tokens are word 1:
    log(3/4) + log(1/5). The label of position 0 and the logits of position 2 do not count.
    """
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0], [99.0, -99.0]]])
    assert sequence_logps(logits, torch.tensor([[0, 1, 1]])).item() == pytest.approx(
        math.log(3 / 4) + math.log(1 / 5), rel=1e-6
    )
    assert sequence_logps(logits, torch.tensor([[-100, -100, 1]])).item() == pytest.approx(
        math.log(1 / 5), rel=1e-6
    )
    assert sequence_logps(logits, torch.tensor([[1, -100, -100]])).item() == 0.0


def test_sequence_logps_of_bfloat16_logits_are_float32():
    logits, labels = torch.randn(2, 5, 9).bfloat16(), torch.randint(0, 9, (2, 5))
    assert torch.equal(sequence_logps(logits, labels), sequence_logps(logits.float(), labels))
    assert sequence_logps(logits, labels).dtype == torch.float32


def test_sequence_logps_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got \(2, 5, 9\) and \(2, 4\)"):
        sequence_logps(torch.zeros(2, 5, 9), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got \(2, 5\) and \(2, 5\)"):
        sequence_logps(torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.long))


def test_sums_of_responses_by_hand():
    """Responses of 2, 1 and 3 tokens, and where each gradient goes."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], requires_grad=True)
    sums = sums_of_responses(values, torch.tensor([2, 1, 3]))
    assert sums.tolist() == [3.0, 4.0, 56.0]
    (sums @ torch.tensor([1.0, 10.0, 100.0])).backward()
    assert values.grad.tolist() == [1.0, 1.0, 10.0, 100.0, 100.0, 100.0]


def test_sums_of_long_responses_are_exact():
    """100,000 tokens of about -7 nats, added by math.fsum: within 4 units of float32."""
    lengths = torch.tensor([4_000, 100_000, 30_000])
    values = torch.randn(134_000, generator=torch.Generator().manual_seed(0)) - 7
    values.requires_grad_()
    sums = sums_of_responses(values, lengths)
    for own, part in zip(sums, values.split(lengths.tolist()), strict=True):
        exact = math.fsum(part.tolist())
        assert abs(own.item() - exact) <= 4 * np.spacing(np.float32(abs(exact))), exact
    (sums * torch.tensor([0.1, 0.2, 0.3])).sum().backward()
    assert torch.equal(values.grad, torch.tensor([0.1, 0.2, 0.3]).repeat_interleave(lengths))


OPTIONS = [
    {},
    {"bias": True},
    {"scale": 0.25},
    {"cap": 3.0},
    {"bias": True, "scale": 2.0, "cap": 1.5},
]


def random_head(size: int, bias: bool = False, **options) -> Head:
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(13, size, generator=draw, dtype=torch.float64)
    return Head(weight, torch.randn(13, generator=draw).double() if bias else None, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_chunks_of_the_vocabulary_change_neither_value_nor_gradient(chunk, options):
    """Against plain lines; and the gradients against differences of the values."""
    torch.manual_seed(0)
    head, hidden = random_head(6, **options), torch.randn(10, 6, dtype=torch.float64)
    targets, upstream = torch.randint(0, 13, (10,)), torch.randn(10, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (hidden, *head[:2]) if x is not None]

    def chunked(hidden, weight, bias=None):
        return chunked_token_logps(hidden, Head(weight, bias, *head[2:]), targets, chunk)

    def plain(hidden, weight, bias=0.0):
        logits = (hidden @ weight.T + bias) * head.scale
        logits = logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)
        return torch.log_softmax(logits, 1)[torch.arange(10), targets]

    found, expected = (
        [logps, *torch.autograd.grad(logps @ upstream, inputs)]
        for logps in (chunked(*inputs), plain(*inputs))
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(chunked, inputs)


def test_a_frozen_head_gets_no_gradient():
    """And hidden states get theirs: as where adapters alone are trained."""
    head, hidden = random_head(6), torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(10)
    chunked_token_logps(hidden, head, targets, 4).sum().backward()
    onehot = torch.nn.functional.one_hot(targets, 13)
    expected = (onehot - (hidden @ head.weight.T).softmax(1)) @ head.weight
    assert torch.allclose(hidden.grad, expected, rtol=1e-12) and head.weight.grad is None


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation makes; views and changes make none."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        made = result.untyped_storage().data_ptr() if isinstance(result, torch.Tensor) else None
        if made is not None and made not in given:
            self.made.append(tuple(result.shape))
        return result


def test_a_chunk_of_logits_is_made_and_one_gradient_of_the_head():
    """M = 32 tokens, V = 50 ids, D = 4: nothing of M x V; of V x D the gradient alone."""
    hidden, weight = torch.randn(32, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    with Shapes() as shapes:
        logps = chunked_token_logps(hidden, Head(weight), torch.arange(32), chunk=8)
        logps.backward(torch.ones(32))
    assert (32, 8) in shapes.made and shapes.made.count((50, 4)) == 1
    assert max(math.prod(shape) for shape in shapes.made) == 32 * 8


def test_values_in_bfloat16_are_those_of_rounded_factors():
    """Under autocast the product is rounded once; its gradient comes back in the weights' type."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 6, requires_grad=True), torch.randn(13, 6, requires_grad=True)
    targets = torch.arange(9)
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_token_logps(hidden, Head(weight), targets, 5)
        logits = (hidden @ weight.T).float()
    expected = torch.log_softmax(logits, 1)[torch.arange(9), targets]
    assert found.dtype == torch.float32 and torch.allclose(found, expected, rtol=1e-6)
    found.sum().backward()
    onehot = torch.nn.functional.one_hot(targets, 13)
    exact = (onehot - logits.softmax(1)).bfloat16().float()
    assert torch.allclose(weight.grad, exact.T @ hidden.bfloat16().float(), rtol=2e-2, atol=2e-2)
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32

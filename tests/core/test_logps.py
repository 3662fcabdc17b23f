"""python -m pytest tests/core/test_logps.py"""

import math

import numpy as np
import pytest
import torch

from nanoalign.logps import chunked_token_logps, sequence_logps, sums_of_responses


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


def test_sequence_logps_equals_a_loop_over_tokens():
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 11, dtype=torch.float64) * 5
    labels = torch.randint(0, 11, (3, 7)).masked_fill(torch.rand(3, 7) < 0.4, -100)
    for n in range(3):
        by_loop = 0.0
        for t in range(6):
            if labels[n, t + 1] != -100:
                exps = [math.exp(v) for v in logits[n, t].tolist()]
                by_loop += math.log(exps[labels[n, t + 1]] / sum(exps))
        assert sequence_logps(logits, labels)[n].item() == pytest.approx(by_loop, rel=1e-12)


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


@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
def test_chunks_change_neither_value_nor_gradient(chunk):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 13, dtype=torch.float64)
    hidden = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    targets, upstream = torch.randint(0, 13, (10,)), torch.randn(10)

    def run(logps_of):
        logps = logps_of()
        gradients = torch.autograd.grad((logps * upstream).sum(), [hidden, head.weight, head.bias])
        return [logps, *gradients]

    plain = run(lambda: torch.log_softmax(head(hidden).float(), 1)[torch.arange(10), targets])
    for a, b in zip(
        run(lambda: chunked_token_logps(hidden, head, targets, chunk)), plain, strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_no_more_than_a_chunk_of_logits_is_held():
    """Of all logits autograd saves those of the last chunk until the backward pass."""
    saved = set()
    hidden, head = torch.randn(32, 4, requires_grad=True), torch.nn.Linear(4, 50)

    def pack(tensor):
        if tensor.ndim == 2 and tensor.shape[1] == 50 and tensor.shape[0] != 4:  # not the weight
            saved.add((tensor.data_ptr(), tensor.shape[0]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_token_logps(hidden, head, torch.zeros(32, dtype=torch.long), chunk=8)
    assert [size for _, size in saved] == [8]

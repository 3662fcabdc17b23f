"""python -m pytest tests/packing/test_tied.py"""

import copy

import pytest
import torch
from conftest import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from nanoalign.batch import collate
from nanoalign.encode import encode
from nanoalign.model import Policy
from nanoalign.packing.tied import TiedWeight, join


@pytest.fixture
def batch(tokenizer):
    rows = [encode(f"Say {n}", ("yes " * n, "no"), tokenizer) for n in (1, 2)]
    return collate(rows)


class Made(TorchDispatchMode):
    """How often an operation returns a new dense tensor of a shape. autograd copies more in it."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.layout is torch.strided:
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)
                     and x.layout is torch.strided}  # fmt: skip
            new = result.untyped_storage().data_ptr() not in given
            self.count += new and result.shape == self.shape
        return result


def gradients(policy: Policy, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Log-probabilities, gradients, and how many tensors of the head's shape a backward makes."""
    logps = policy(batch)
    with Made(policy.head.weight.shape) as made:
        logps.dot(torch.linspace(-1, 1, len(logps), dtype=logps.dtype)).backward()
    return logps.detach(), {name: p.grad for name, p in policy.named_parameters()}, made.count


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_tied_weight_has_one_gradient_and_the_same(batch, tied):
    """Against autograd's own sum; a second backward pass adds to the first."""
    plain = Policy(tiny_llama(tie_word_embeddings=tied).double())
    large = copy.deepcopy(plain)
    large.model.tie_weights()
    expected = gradients(plain, batch)
    join(large)
    found = gradients(large, batch)
    assert torch.equal(found[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-12, atol=1e-12), name
        assert not found[1][name].is_sparse
    assert found[2] == (expected[2] - 2 if tied else expected[2])
    again = gradients(large, batch)
    for name, gradient in expected[1].items():
        assert torch.allclose(again[1][name], 2 * gradient, rtol=1e-12, atol=1e-12), name


def test_a_large_tied_weight_without_a_gradient(batch):
    policy = Policy(tiny_llama(tie_word_embeddings=True))
    join(policy)
    policy.requires_grad_(False)
    assert torch.allclose(policy(batch), policy.textbook(batch), rtol=1e-5)


def test_rows_of_an_embedding_are_added_to_the_gradient_of_the_head():
    """Row 1 is read twice."""
    weight = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    embedding, head = TiedWeight.apply(weight)
    read = torch.nn.functional.embedding(torch.tensor([1, 1, 2]), embedding, sparse=True)
    (read.sum() + 10 * head.sum()).backward()
    assert weight.grad.tolist() == [[10, 10], [12, 12], [11, 11]]

"""python -m pytest tests/core/test_sharding.py"""

import pytest
import torch
from conftest import records
from torch.distributed.tensor import DTensor

from nanoalign.batch import collate
from nanoalign.distributed import setup
from nanoalign.encode import encode_all
from nanoalign.model import Policy, RewardModel
from nanoalign.packing.packed import PackedBatcher
from nanoalign.sharding import shard

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def batches(tokenizer):
    rows = encode_all(records(6), tokenizer)
    return collate(rows[:3]), collate(rows[3:])


def sharded(model: Policy | RewardModel, dtype: torch.dtype) -> Policy | RewardModel:
    """The model as every one of many ranks has it, here on a mesh of one."""
    model.dtype = dtype
    trainable = any(p.requires_grad for p in model.parameters())
    shard(model, model.blocks(), setup(), dtype, trainable, model.exact(), model.METHODS)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Policy, RewardModel])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_rank_computes_what_shards_compute(llama_folder, batches, kind, dtype, checkpointing):
    """Scores and gradients, summed over two batches, bit for bit; all parameters stay float32."""
    options = {"checkpointing": checkpointing} | ({"head_seed": 0} if kind is RewardModel else {})
    one = kind.load(llama_folder, setup(), dtype, **options)
    many = sharded(kind.load(llama_folder, **options), dtype)
    before = [*one.parameters()]
    for batch in batches:
        scores = one(batch), many(batch)
        assert torch.equal(*scores)
        for score in scores:
            score.square().sum().backward()
    assert all(
        p is q and p.dtype == torch.float32 for p, q in zip(before, one.parameters(), strict=True)
    )
    assert not any(isinstance(p, DTensor) for p in before)
    found = zip(one.named_parameters(), many.parameters(), strict=True)
    for (name, p), q in found:
        assert p.grad.dtype == torch.float32 and p.grad.any(), name
        assert torch.equal(p.grad, whole(q.grad)), name


@pytest.mark.parametrize("name", ["tokens", "textbook"])
def test_methods_beside_forward_compute_it_too(llama_folder, batches, name):
    one = Policy.load(llama_folder, setup(), torch.bfloat16)
    many = sharded(Policy.load(llama_folder), torch.bfloat16)
    found = getattr(one, name)(batches[0])
    assert torch.equal(found, getattr(many, name)(batches[0]))
    assert found.dtype == torch.float32 and found.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frozen_model_of_one_rank_is_a_plain_one(llama_folder, batches, dtype):
    one = Policy.load(llama_folder, setup(), dtype, trainable=False)
    many = sharded(Policy.load(llama_folder, None, dtype, trainable=False), dtype)
    assert torch.equal(one(batches[0]), many(batches[0]))
    assert {p.dtype for p in one.parameters()} == {dtype}


def test_the_plan_of_a_sharded_model_is_that_of_a_plain_one(llama_folder, world):
    """Rows are divided by the operations of the blocks, which are found though sharding wraps."""
    plain, many = Policy.load(llama_folder), sharded(Policy.load(llama_folder), torch.float32)
    assert len(many.blocks()) == len(plain.blocks()) == 2
    costs = []
    for model in (plain, many):
        batches = PackedBatcher(world, 100)
        batches.prepare(model)
        costs.append(batches.costs)
    assert costs[0] == costs[1] and min(costs[0]) > 0


def test_parameters_are_whole_after_a_forward_that_failed(llama_folder, batches):
    policy = Policy.load(llama_folder, dtype=torch.bfloat16)
    before = [*policy.parameters()]
    policy.blocks()[1].mlp.forward = lambda states: 1 / 0
    with pytest.raises(ZeroDivisionError):
        policy(batches[0])
    assert all(p is q for p, q in zip(before, policy.parameters(), strict=True))

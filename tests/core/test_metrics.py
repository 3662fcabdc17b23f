"""python -m pytest tests/core/test_metrics.py"""

import math

import pytest
import torch

from nanoalign.metrics import Means, hits


def test_a_tie_is_half_a_hit():
    chosen, rejected = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 2.0, 0.5])
    assert hits(chosen, rejected).tolist() == [1.0, 0.0, 0.5]


def test_means_and_spreads_over_uneven_micro_batches():
    """Values 1, 2, 6 with weights 1, 1/2, 1/2: mean 5 / 2. Two values a pair: 1 3, 2 2, 6 10."""
    means = Means()
    twice = torch.tensor([[1.0, 3.0], [2.0, 2.0], [6.0, 10.0]])
    values, weights = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 0.5, 0.5])
    for part in (slice(0, 1), slice(1, 3)):
        means.add({"x": values[part], "spread": twice[part]}, weights[part])
    found = means.reduce()
    assert found["x"] == pytest.approx(2.5)
    # The mean of all values is (2 + 1 + 4) / 2 = 3.5, of their squares (5 + 2 + 34) / 2 = 20.5.
    assert found["spread"] == pytest.approx(math.sqrt(20.5 - 3.5**2))


def test_values_that_are_equal_have_no_spread():
    """Rounding makes the mean of squares a little less than the square of the mean, by 1e-20."""
    means = Means()
    value, weights = torch.full((3, 2), 0.01, dtype=torch.float64), torch.full((3,), 1 / 3)
    means.add({"spread": value}, weights)
    ((total, values, squares),) = means.sums.tolist()
    assert squares / total < (values / total) ** 2 and means.reduce() == {"spread": 0.0}


def test_ranks_that_add_nothing_are_a_defect():
    with pytest.raises(AssertionError, match="at least one micro-batch"):
        Means().reduce()


def test_metrics_carry_no_gradient():
    means, value = Means(), torch.ones(2, requires_grad=True)
    means.add({"x": value, "spread": value[:, None]}, torch.ones(2))
    assert not means.sums.requires_grad


def test_a_mask_leaves_pairs_out():
    """Of 1, 2, 6 with weight 1 the second is masked: 3.5. A name that no pair has is left out."""
    means, values = Means(), torch.tensor([1.0, 2.0, 6.0])
    mask = torch.tensor([True, False, True])
    nan = torch.tensor([1.0, math.nan, 6.0])  # what is masked may be anything
    none = torch.zeros(3, dtype=torch.bool)
    means.add({"x": (nan, mask), "y": values, "never": (values, none)}, torch.ones(3))
    assert means.reduce() == {"x": 3.5, "y": 3.0}


def test_float32_values_are_summed_in_float64():
    means = Means()
    for _ in range(3):
        means.add({"x": torch.tensor([2.0**24, 1.0])}, torch.ones(2))
    assert means.reduce()["x"] == (2.0**24 + 1) / 2

"""REINFORCE of the lab: its advantages, its estimate of the gradient, a run, values at equal KL."""

import json
from itertools import product

import numpy as np
import pytest
import torch

from nanoalign.lab.experiments.reinforce import at_kl, beyond
from nanoalign.lab.rloo import advantages, main
from nanoalign.model import Policy


def test_an_advantage_is_the_return_minus_the_mean_of_the_others():
    found = advantages(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3)
    assert found.tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]


def test_the_expected_gradient_is_that_of_the_objective():
    """Over all draws of two answers from three, the loss has the gradient of E[r] - beta KL."""
    beta, rewards = 0.3, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    logits = torch.tensor([0.2, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.3, -0.2], dtype=torch.float64).log_softmax(0)
    logps = logits.log_softmax(0)
    objective = (logps.exp() * (rewards - beta * (logps - reference))).sum()
    (exact,) = torch.autograd.grad(objective, logits, retain_graph=True)
    returns = (rewards - beta * (logps - reference)).detach()
    loss = sum(
        (logps[i] + logps[j]).exp().detach()
        * (-advantages(returns[[i, j]], 2) * logps[[i, j]]).mean()
        for i, j in product(range(3), repeat=2)
    )
    (estimated,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(-estimated, exact, atol=1e-12)


def test_a_run_starts_at_its_reference_and_writes_a_policy(tmp_path):
    out = tmp_path / "rloo"
    main(["--steps", "2", "--prompts", "3", "--samples", "2", "--out", str(out)])
    first, second = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert first["kl"] == pytest.approx(0, abs=1e-5) and second["kl"] != 0
    before, after = Policy.load("tiny"), Policy.load(out)
    moved = [
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert all(moved)


def test_values_at_equal_kl_lie_between_those_of_the_two_nearest_points():
    curve = [
        (np.array([[3.0], [1.0]]), np.array([[30.0, 3.0], [10.0, 1.0]])),
        (np.array([[1.0], [2.0]]), np.array([[10.0, 1.0], [20.0, 2.0]])),
    ]
    found = at_kl(np.array([[1.0, 2.0], [5.0, 5.0]]), curve)
    assert found.tolist() == [[15.0, 1.5], [20.0, 2.0]]  # beyond the end: that of the end
    assert beyond(np.array([[1.0, 2.0], [5.0, 5.0]]), curve) == 1

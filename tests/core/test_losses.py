"""python -m pytest tests/core/test_losses.py

tests/family/test_loss_family.py compares dpo with its equation, at the limits too.
"""

import math

import pytest
import torch

from nanoalign.losses import dpo_loss, pairwise_reward_loss


def pairs(*columns: list[float], dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.tensor(column, dtype=dtype) for column in columns]


def test_dpo_by_hand():
    """Three pairs, beta 0.5.

    1. log-ratios +2 and 0: margin 0.5 * 2 = 1, loss log(1 + e^-1) = 0.313262, rewards 1 and 0
    2. log-ratios -1 and +3: margin 0.5 * -4 = -2, loss log(1 + e^2) = 2.126928, rewards -0.5 and
    1.5
    3. log-ratios +5 and +5: margin 0, loss ln 2, rewards 2.5 and 2.5
    """
    chosen, rejected = [-10.0, -7.0, -1.0], [-12.0, -4.0, -2.0]
    ref_chosen, ref_rejected = [-12.0, -6.0, -6.0], [-12.0, -7.0, -7.0]
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        *pairs(chosen, rejected, ref_chosen, ref_rejected), beta=0.5
    )
    expected = [math.log1p(math.exp(-1)), math.log1p(math.exp(2)), math.log(2)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert losses.tolist() == pytest.approx([0.313262, 2.126928, 0.693147], abs=5e-7)
    assert chosen_rewards.tolist() == [1.0, -0.5, 2.5]
    assert rejected_rewards.tolist() == [0.0, 1.5, 2.5]


def test_beta_is_a_tenth_and_no_label_is_doubted_by_default():
    """A log-ratio of 5 nats is a reward of 0.5: loss log(1 + e^-0.5)."""
    losses, chosen_rewards, _ = dpo_loss(*pairs([5.0], [0.0], [0.0], [0.0]))
    assert losses.item() == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-12)
    assert chosen_rewards.item() == 0.5


def test_label_smoothing_by_hand():
    """Margin 1, eps 0.1: 0.9 * log(1 + e^-1) + 0.1 * log(1 + e) = 0.413262."""
    losses, _, _ = dpo_loss(*pairs([2.0], [0.0], [0.0], [0.0]), beta=0.5, label_smoothing=0.1)
    by_hand = 0.9 * math.log1p(math.exp(-1)) + 0.1 * math.log1p(math.exp(1))
    assert losses.item() == pytest.approx(by_hand, rel=1e-12) == pytest.approx(0.413262, abs=5e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_policy_equal_to_reference_gives_ln_2_and_no_reward(smoothing):
    chosen, rejected = torch.randn(2, 64) * 100
    losses, *rewards = dpo_loss(chosen, rejected, chosen, rejected, label_smoothing=smoothing)
    assert torch.allclose(losses, torch.full((64,), math.log(2)), rtol=1e-6)
    assert all(not reward.any() for reward in rewards)


def test_moves_chosen_up_and_rejected_down():
    """Descent raises chosen and lowers rejected, by the same beta * sigmoid(-margin)."""
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (-3.0, -2.0))
    dpo_loss(chosen, rejected, torch.tensor([-4.0]), torch.tensor([-4.0]), beta=0.1)[0].backward()
    expected = 0.1 / (1 + math.exp(0.1 * (1 - 2)))
    assert chosen.grad.item() == pytest.approx(-expected, rel=1e-6)
    assert rejected.grad.item() == pytest.approx(expected, rel=1e-6)


def test_rewards_carry_no_gradient():
    chosen = torch.zeros(1, requires_grad=True)
    losses, *rewards = dpo_loss(chosen, *torch.zeros(3, 1))
    assert losses.requires_grad and not any(reward.requires_grad for reward in rewards)


# --- the reward model's loss


def test_pairwise_reward_by_hand():
    """Three pairs.

    1. rewards 3 and 1: difference 2, loss log(1 + e^-2) = 0.126928
    2. rewards -1 and 0.5: difference -1.5, loss log(1 + e^1.5) = 1.701413
    3. rewards 4 and 4: a tie, loss ln 2
    """
    losses = pairwise_reward_loss(*pairs([3.0, -1.0, 4.0], [1.0, 0.5, 4.0]))
    expected = [math.log1p(math.exp(-2)), math.log1p(math.exp(1.5)), math.log(2)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert losses.tolist() == pytest.approx([0.126928, 1.701413, 0.693147], abs=5e-7)


def test_reward_margin_and_smoothing_by_hand():
    """Difference 2: with margins 1 and 3, log(1 + e^-1) and log(1 + e). Smoothing 0.1 and margin 1:
    0.9 * log(1 + e^(1 - 2)) + 0.1 * log(1 + e^(1 + 2)) = 0.9 * 0.313262 + 0.1 * 3.048587 =
    0.586794."""
    chosen, rejected, margin = pairs([3.0, 3.0], [1.0, 1.0], [1.0, 3.0])
    losses = pairwise_reward_loss(chosen, rejected, margin)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-1)), math.log1p(math.e)])
    smoothed = pairwise_reward_loss(chosen[:1], rejected[:1], 1.0, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(0.586794, abs=5e-7)


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_reward_loss_is_finite_at_extreme_margins(margin):
    chosen = torch.tensor([margin], requires_grad=True)
    losses = pairwise_reward_loss(chosen, torch.zeros(1))
    losses.backward()
    assert losses.item() == max(0.0, -margin)
    assert chosen.grad.item() == (0.0 if margin > 0 else -1.0)


def test_reward_gradient_is_the_derivative_and_moves_the_right_way():
    inputs = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda c, r: pairwise_reward_loss(c, r, 0.3, 0.1), inputs)
    pairwise_reward_loss(*inputs).sum().backward()
    assert (inputs[0].grad < 0).all() and (inputs[1].grad > 0).all()
    assert torch.equal(inputs[0].grad, -inputs[1].grad)

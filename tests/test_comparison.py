"""python -m pytest tests/test_comparison.py"""

import numpy as np
import pytest

from nanoalign.comparison import (
    Compared,
    bootstrap_interval,
    comparison_metrics,
    length_controlled_win_rate,
)
from nanoalign.metrics import win_shares


def compared(policy: float, baseline: float, prompt: str = "p", tokens=(5, 5), ended=(True, True)):
    return Compared("1", prompt, "a", "b", policy, baseline, *tokens, *ended)


def test_figures_by_hand():
    """Wins 2, losses 1, a tie: 2.5 of 4."""
    lines = [
        compared(1.0, 0.0, "p", (4, 8)),
        compared(2.0, 3.0, "q", (6, 8), (False, True)),
        compared(0.5, 0.5, "r"),
        compared(0.0, -4.0, "s"),
    ]
    figures = comparison_metrics(lines)
    assert (figures["wins"], figures["losses"], figures["ties"]) == (2, 1, 1)
    assert figures["win_rate"] == 0.625
    assert figures["policy_mean"] == figures["dpo_data_mean"] == 3.5 / 4
    assert figures["baseline_mean"] == figures["no_dpo_data_mean"] == -0.5 / 4
    assert figures["no_dpo_better_than_dpo_count"] == 1
    assert figures["no_dpo_worse_than_dpo_count"] == 2
    assert figures["policy_tokens_mean"] == 5.0 and figures["baseline_tokens_mean"] == 6.5
    assert figures["policy_ended_share"] == 0.75 and figures["baseline_ended_share"] == 1.0
    assert figures["win_rate_low"] < 0.625 < figures["win_rate_high"]
    assert "true_win_rate" not in figures


def test_answers_made_elsewhere_have_no_share_that_ended():
    assert comparison_metrics([compared(1, 0, ended=(None, True))])["policy_ended_share"] is None


def test_the_bootstrap_has_the_width_of_theory():
    """400 independent coin flips: mean +- 1.96 * sqrt(p (1 - p) / 400), within a tenth of its width."""
    won = np.array([1.0] * 280 + [0.0] * 120)
    low, high = bootstrap_interval(won, [str(i) for i in range(400)])
    half = 1.96 * np.sqrt(0.7 * 0.3 / 400)
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.1 * half)


def test_answers_to_one_prompt_are_resampled_together():
    """Four copies of every answer tell no more than one."""
    won = np.array([1.0, 0.0, 1.0, 1.0, 0.0] * 20)
    prompts = [str(i) for i in range(100)]
    alone = bootstrap_interval(won, prompts)
    copies = bootstrap_interval(np.tile(won, 4), prompts * 4)
    assert copies == pytest.approx(alone)
    apart = bootstrap_interval(np.tile(won, 4), [str(i) for i in range(400)])
    assert apart[1] - apart[0] == pytest.approx((alone[1] - alone[0]) / 2, rel=0.15)


def test_length_control_takes_out_what_length_explains():
    """A judge that only prefers longer answers: 0.5 is left; one that ignores length: all is left."""
    draw = np.random.default_rng(0)
    longer = draw.normal(10, 10, size=4000)  # the policy's answers are longer
    by_length = (draw.random(4000) < 1 / (1 + np.exp(-0.2 * longer))).astype(float)
    assert by_length.mean() > 0.75
    assert length_controlled_win_rate(by_length, longer) == pytest.approx(0.5, abs=0.04)
    by_coin = (draw.random(4000) < 0.7).astype(float)
    assert length_controlled_win_rate(by_coin, longer) == pytest.approx(0.7, abs=0.04)
    assert length_controlled_win_rate(by_coin, np.zeros(4000)) == pytest.approx(
        by_coin.mean(), abs=1e-3
    )


def test_length_control_is_finite_where_length_separates_wins_from_losses():
    longer = np.array([-3.0, -1.0, 2.0, 4.0])
    assert 0 < length_controlled_win_rate((longer > 0).astype(float), longer) < 1


def test_ties_are_half_a_win():
    assert win_shares(np.array([-1.0, 0.0, 1.0])).tolist() == [0, 0.5, 1]

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
from nanoalign.tiny import world


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
    assert length_controlled_win_rate(by_coin, np.zeros(4000)) == pytest.approx(by_coin.mean())


def test_few_wins_are_not_drawn_to_a_half():
    """Equal lengths control nothing: 5 of 5 and 4 of 5 stay what they are."""
    for won in ([1.0] * 5, [1.0, 1.0, 0.0, 1.0, 1.0]):
        assert length_controlled_win_rate(np.array(won), np.zeros(5)) == pytest.approx(np.mean(won))


def test_length_is_not_controlled_where_equal_lengths_were_not_seen():
    """All answers are 9 to 11 tokens longer: what would be at a difference of 0 is anybody's guess."""
    draw = np.random.default_rng(0)
    won = (draw.random(600) < 0.9).astype(float)
    assert length_controlled_win_rate(won, draw.uniform(9, 11, 600)) is None
    assert length_controlled_win_rate(won, np.full(600, 10.0)) is None


def test_figures_of_the_embedded_world_by_hand():
    """Two answers to one prompt of the world, and one to another: by its rule won, a tie, and lost."""
    first, second = list(world.PROMPTS)[:2]
    texts = {
        p: sorted(("It is 7.", "I do not know.", ""), key=lambda a: world.true_reward(p, a))
        for p in (first, second)
    }
    lines = [
        Compared("1", first, texts[first][2], texts[first][0], 0.0, 1.0, 5, 5, True, True),
        Compared("2", first, texts[first][1], texts[first][1], 1.0, 0.0, 5, 5, True, True),
        Compared("3", second, texts[second][0], texts[second][2], 1.0, 0.0, 9, 1, True, True),
    ]
    figures = comparison_metrics(lines)
    rewards = [
        [world.true_reward(x.prompt, answer) for answer in (x.policy_answer, x.baseline_answer)]
        for x in lines
    ]
    assert rewards[0][0] > rewards[0][1] and rewards[2][0] < rewards[2][1]
    assert figures["true_win_rate"] == 0.5 and figures["win_rate"] == pytest.approx(2 / 3)
    assert figures["policy_true_mean"] == pytest.approx(sum(r[0] for r in rewards) / 3)
    assert figures["baseline_true_mean"] == pytest.approx(sum(r[1] for r in rewards) / 3)
    assert figures["prompts"] == 2
    # Two groups: of the first prompt's mean 3/4, of the second's 0; and of the judge 1/2 and 1.
    assert (figures["true_win_rate_low"], figures["true_win_rate_high"]) == (0.0, 0.75)
    assert (figures["win_rate_low"], figures["win_rate_high"]) == (0.5, 1.0)


def test_longer_is_the_policys_length_less_the_baselines():
    """A judge that prefers longer answers, and a policy whose are longer: less is left than it won."""
    draw = np.random.default_rng(1)
    lines = []
    for i in range(400):
        longer = int(draw.integers(-5, 16))
        won = draw.random() < 1 / (1 + np.exp(-0.3 * longer))
        lines.append(compared(float(won), 0.5, f"p{i}", (30 + longer, 30)))
    figures = comparison_metrics(lines)
    assert figures["win_rate"] > 0.7 and abs(figures["length_controlled_win_rate"] - 0.5) < 0.12


def test_length_control_is_finite_where_length_separates_wins_from_losses():
    longer = np.array([-3.0, -1.0, 2.0, 4.0])
    assert 0 < length_controlled_win_rate((longer > 0).astype(float), longer) < 1


def test_ties_are_half_a_win():
    assert win_shares(np.array([-1.0, 0.0, 1.0])).tolist() == [0, 0.5, 1]

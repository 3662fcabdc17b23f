"""python -m pytest tests/evaluation/test_statistics.py"""

import itertools

import numpy as np
import pytest

from nanoalign.evaluation.statistics import (
    best_of_weights,
    calibration,
    controlled_win_rate,
    prompt_interval,
    rank_correlation,
    win_shares,
)
from nanoalign.runs.result import wilson_interval


def test_length_control_takes_out_what_length_explains():
    """Wins by length alone: 0.5 is left; wins that ignore length: all is left."""
    draw = np.random.default_rng(0)
    longer = draw.normal(10, 10, size=4000)  # the policy's answers are longer
    by_length = (draw.random(4000) < 1 / (1 + np.exp(-0.2 * longer))).astype(float)
    assert by_length.mean() > 0.75
    assert controlled_win_rate(by_length, [longer]) == pytest.approx(0.5, abs=0.04)
    by_coin = (draw.random(4000) < 0.7).astype(float)
    assert controlled_win_rate(by_coin, [longer]) == pytest.approx(0.7, abs=0.04)
    assert controlled_win_rate(by_coin, [np.zeros(4000)]) == pytest.approx(by_coin.mean())


def test_few_wins_are_not_drawn_to_a_half():
    """Equal lengths control nothing: 5 of 5 and 4 of 5 stay what they are."""
    for won in ([1.0] * 5, [1.0, 1.0, 0.0, 1.0, 1.0]):
        rate = controlled_win_rate(np.array(won), [np.zeros(5)])
        assert rate == pytest.approx(np.mean(won))


def test_length_is_not_controlled_where_equal_lengths_were_not_seen():
    """All answers are 9 to 11 tokens longer: a difference of 0 was not observed."""
    draw = np.random.default_rng(0)
    won = (draw.random(600) < 0.9).astype(float)
    assert controlled_win_rate(won, [draw.uniform(9, 11, 600)]) is None
    assert controlled_win_rate(won, [np.full(600, 10.0)]) is None


def test_length_control_is_finite_where_length_separates_wins_from_losses():
    longer = np.array([-3.0, -1.0, 2.0, 4.0])
    assert 0 < controlled_win_rate((longer > 0).astype(float), [longer]) < 1


def test_ties_are_half_a_win():
    assert win_shares(np.array([-1.0, 0.0, 1.0])).tolist() == [0, 0.5, 1]


def test_calibration_by_hand():
    """Three pairs at confidence 0.75 of which two are right, one at 0.95 that is wrong."""
    margins = np.log([3.0, 3.0, 1 / 3, 1 / 19])
    found = calibration(margins)
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 3, 0, 0, 0, 1]
    assert found.confidence[[5, 9]] == pytest.approx([0.75, 0.95])
    assert found.hit_rate[[5, 9]] == pytest.approx([2 / 3, 0])
    assert found.error == pytest.approx((3 * (0.75 - 2 / 3) + 0.95) / 4)
    assert np.isnan(found.confidence[0]) and np.isnan(found.hit_rate[0])


def test_a_tie_is_half_a_hit_at_confidence_one_half():
    found = calibration(np.zeros(4))
    assert (found.confidence[0], found.hit_rate[0], found.error) == (0.5, 0.5, 0.0)


def test_rank_correlation_by_hand():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)."""
    ties = np.array([0.0, 1.0, 1.0, 9.0])
    assert rank_correlation(ties, np.arange(4.0)) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert rank_correlation(np.arange(4.0), -(np.arange(4.0) ** 3)) == pytest.approx(-1)
    assert rank_correlation(np.ones(4), ties) is None


def test_wilson_interval_by_hand():
    """8 of 10 at 95 %: the textbook's (0.4902, 0.9433); 0 of 10 has an upper end of 0.2775."""
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=2e-4)


def test_the_interval_over_prompts_by_hand():
    """10 prompts of 2 pairs: both are hits of 4, one is of 4, none is of 2. The share is 0.6.

    The centre is (6 + 1.92) / (10 + 3.84) = 0.57225, so hits deviate by 0.42775, others by
    0.57225. Mean square: (12 * 0.42775^2 + 8 * 0.57225^2) / 20 = 0.240772, divided by 1 - 1 / 20
    0.253444. By prompt: (4 * 0.8555^2 + 4 * 0.1445^2 + 2 * 1.1445^2) / 400 = 0.014077, divided by
    1 - 1 / 10 0.015641. So 20 pairs are worth 0.253444 / 0.015641 = 16.204, times (2.093 / 2.262)^2
    of Student's t with 19 and 9 degrees of freedom: 13.87 independent ones.
    """
    hits = np.array([1, 1] * 4 + [1, 0] * 4 + [0, 0] * 2, dtype=float)
    prompts = [n for n in range(10) for _ in range(2)]
    expected = wilson_interval(0.6, 0.253444 / 0.015641 * (2.0930 / 2.2622) ** 2)
    assert prompt_interval(hits, prompts) == pytest.approx(expected, abs=1e-4)
    backwards = prompt_interval(hits[::-1], [f"prompt {n}" for n in prompts[::-1]])
    assert backwards == pytest.approx(prompt_interval(hits, prompts), rel=1e-12)


def test_the_interval_over_prompts_is_never_surer_than_of_as_many_apart():
    """Also where the pairs of each prompt are less alike than by chance, or ties."""
    hits, prompts = np.array([1.0, 0.0] * 50), [n // 2 for n in range(100)]
    assert prompt_interval(hits, prompts) == pytest.approx(wilson_interval(0.5, 100), rel=1e-12)
    ties = prompt_interval(np.full(100, 0.5), prompts)
    assert ties == pytest.approx(wilson_interval(0.5, 50), rel=1e-12)


def test_the_interval_over_prompts_of_pairs_with_weights_by_hand():
    """4 prompts of 1 pair and 4 of 2, each of the weight 1/8: the first are hits, of the others two
    have one hit and two none. The share is (4 + 2 / 2) / 8 = 0.625.

    The centre is (5 + 1.92) / (8 + 3.84) = 0.58445: hits deviate by 0.41555, others by 0.58445.
    Weighted squares: 0.625 * 0.41555^2 + 0.375 * 0.58445^2 = 0.236019, divided by 1 - 3 / 32
    0.260435; of the prompts (4 * 0.41555^2 + 2 * 0.08445^2 + 2 * 0.58445^2) / 64 = 0.021690,
    divided by 1 - 1 / 8 0.024788; their ratio is 10.506, times (t(29/3) / t(7))^2: the pairs are
    worth as many as 1 / (4 / 64 + 8 / 256) = 32/3 at most.
    """
    hits = np.array([1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0], dtype=float)
    prompts = [0, 1, 2, 3, *(n for n in range(4, 8) for _ in range(2))]
    weights = np.array([1.0] * 4 + [0.5] * 8)
    expected = wilson_interval(0.625, 0.260435 / 0.024788 * (2.2385 / 2.3640) ** 2)
    found = prompt_interval(hits, prompts, weights)
    assert found == pytest.approx(expected, abs=1e-4)
    assert prompt_interval(hits, prompts, 7 * weights) == pytest.approx(found, rel=1e-12)
    one_each = prompt_interval(hits[:4] * [1, 0, 0.5, 1], prompts[:4], np.full(4, 0.1))
    assert one_each == pytest.approx(wilson_interval(0.625, 4), rel=1e-12)
    sure = prompt_interval(
        np.ones(9), [0, 1, 1, 2, 2, 2, 3, 3, 3], np.array([3, *[1.5] * 2, *[1] * 6]) / 3
    )
    assert sure == pytest.approx(wilson_interval(1.0, 4), rel=1e-12)


@pytest.mark.parametrize(("prompts", "most"), [(40, 5), (12, 1)])
def test_the_interval_of_a_win_rate_covers_the_true_one(prompts, most):
    """In 400 simulations of 1 to `most` answers of either side, every prompt counting as one.

    The answers of a prompt differ by 1 in their standard deviation, prompts by 1 in how much better
    the policy is. The win rate is that of a normal of mean 0.8 and variance 1 + 2: 0.678.
    """
    draw = np.random.default_rng(prompts + most)
    covered = []
    for _ in range(400):
        hits, groups, weights = [], [], []
        for n in range(prompts):
            sides = [draw.normal(size=draw.integers(1, most + 1)) for _ in range(2)]
            better = 0.8 + draw.normal()
            own = win_shares(np.subtract.outer(sides[0] + better, sides[1]).ravel())
            hits.append(own)
            groups += [n] * len(own)
            weights.append(np.full(len(own), 1 / len(own)))
        low, high = prompt_interval(np.concatenate(hits), groups, np.concatenate(weights))
        covered.append(low <= 0.6779 <= high)
    assert 0.917 <= np.mean(covered) <= 0.983


UNEVEN = [-(-60 // n) for n in range(1, 31)]  # pairs of 30 prompts: 60, 30, 20, ..., 2


@pytest.mark.parametrize(
    ("sizes", "share", "times", "most"),
    [
        (UNEVEN, 0.5, 1000, 0.98),
        (UNEVEN, 0.75, 1000, 0.98),
        (UNEVEN, 0.95, 1000, 0.99),
        ([10] * 30, 0.97, 1000, 0.99),
        ([10] * 30, 0.03, 1000, 0.99),
        ([4] * 200, 0.75, 3000, 0.965),
        ([4] * 200, 0.95, 3000, 0.965),
    ],
)
def test_the_interval_over_prompts_holds_the_share(sizes, share, times, most):
    """The probability of a hit differs between prompts: Beta(4 share, 4 (1 - share))."""
    draw, prompts = np.random.default_rng(0), np.repeat(np.arange(len(sizes)), sizes)
    names, held = prompts.tolist(), 0
    for chance in draw.beta(4 * share, 4 * (1 - share), (times, len(sizes))):
        hits = (draw.random(len(prompts)) < chance[prompts]).astype(float)
        low, high = prompt_interval(hits, names)
        held += low <= share <= high
    assert 0.94 <= held / times <= most


def test_rewards_whose_probabilities_are_the_hit_rates_are_calibrated():
    draw = np.random.default_rng(0)
    margins = draw.normal(scale=2, size=200_000)
    agrees = draw.random(margins.size) < 1 / (1 + np.exp(-margins))
    assert calibration(np.where(agrees, margins, -margins)).error < 0.005
    assert calibration(np.where(agrees, 3 * margins, -3 * margins)).error > 0.05


@pytest.mark.parametrize("samples", [1, 7])
def test_the_expected_best_of_n_is_that_over_all_subsets(samples):
    """The oracle takes the best of every subset of size n."""
    rewards = np.sort(np.random.default_rng(samples).normal(size=samples))
    for n in range(1, samples + 1):
        best = [max(subset) for subset in itertools.combinations(rewards, n)]
        assert best_of_weights(n, samples) @ rewards == pytest.approx(np.mean(best), abs=1e-12)
        assert best_of_weights(n, samples).sum() == pytest.approx(1)

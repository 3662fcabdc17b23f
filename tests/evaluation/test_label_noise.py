"""python -m pytest tests/evaluation/test_label_noise.py

How many labels are wrong: simulated pairs whose truth is known, and values by hand.
"""

import numpy as np
import pytest

from nanoalign.evaluation.label_noise import (
    LEAST_RELIABLE,
    LabelNoise,
    estimate,
    expected_agreement,
    interval,
    probability_wrong,
)


def simulated(
    pairs: int, flipped: float, error: float, parts: int = 2, by_data: float = 0.5, rise: float = 0
):
    """Margins (2, P) of models with normal errors, and whether each label is wrong (P,).

    True margins are normal with the deviation 4, near that of the embedded world. Of the variance
    of an error, by_data comes from pairs that a model has seen, and two models share what both have
    seen. rise: of that variance by the size of the true margin.
    """
    draw = np.random.default_rng(0)
    true = draw.normal(0, 4, pairs)
    label = np.where(draw.random(pairs) < 1 / (1 + np.exp(-true)), 1, -1)
    label = np.where(draw.random(pairs) < flipped, -label, label)
    shared = by_data * (parts - 1) / parts
    both, own = draw.normal(size=pairs), draw.normal(size=(2, pairs))
    errors = error * (np.sqrt(shared) * both + np.sqrt(1 - shared) * own)
    errors *= np.sqrt(1 + rise * np.abs(true))
    return (true + errors) * label, label != np.sign(true)


@pytest.mark.parametrize(("parts", "by_data"), [(2, 0.5), (5, 0.5), (5, 1.0), (2, 0.0)])
@pytest.mark.parametrize("error", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("flipped", [0.0, 0.1, 0.2, 0.4])
def test_the_share_of_wrong_labels_is_found(flipped, error, parts, by_data):
    """Within 2 points, also where models that err much contradict far more labels."""
    margins, wrong = simulated(20_000, flipped, error, parts, by_data)
    noise = estimate(margins, parts, by_data)
    assert noise.share == pytest.approx(wrong.mean(), abs=0.02)
    assert noise.flipped == pytest.approx(flipped, abs=0.05)
    assert noise.most == pytest.approx((margins.mean(0) <= 0).mean(), abs=0.01)
    if error == 4.0:
        assert noise.most > wrong.mean() + (0.06 if flipped < 0.4 else 0.012)


def test_errors_may_be_larger_where_margins_are():
    """With one deviation for all pairs, small margins would seem less sure than they are."""
    margins, wrong = simulated(40_000, 0.2, 2.0, rise=0.3)
    noise = estimate(margins, 2)
    assert noise.error[1] > 0
    assert noise.share == pytest.approx(wrong.mean(), abs=0.01)


def test_probabilities_are_those_of_the_wrong_labels():
    """In each tenth of the pairs, by rank, as many labels are wrong as the probabilities say."""
    margins, wrong = simulated(40_000, 0.2, 2.0)
    mean = margins.mean(0)
    noise = estimate(margins, 2)
    probability = probability_wrong(mean, noise)
    order = np.argsort(-probability)
    for tenth in np.array_split(order, 10):
        assert probability[tenth].mean() == pytest.approx(wrong[tenth].mean(), abs=0.03)
    assert probability.mean() == pytest.approx(noise.share, abs=0.005)
    assert np.diff(probability[np.argsort(mean)]).max() < 1e-3  # falls with the margin
    right = expected_agreement(mean, noise)
    for tenth in np.array_split(np.argsort(np.abs(mean)), 10):
        assert right[tenth].mean() == pytest.approx((mean[tenth] > 0).mean(), abs=0.02)


def test_models_that_do_not_differ_make_no_errors():
    """Then each disagreement is a wrong label: temperature scaling with symmetric noise."""
    margins, wrong = simulated(20_000, 0.2, 0.0)
    margins = margins[:1].repeat(2, axis=0)
    noise = estimate(margins, 2)
    assert noise.error == (0, 0, 0) and noise.share == pytest.approx(noise.most)
    assert noise.share == pytest.approx(wrong.mean(), abs=0.01)
    probability = probability_wrong(margins[0], noise)
    assert np.array_equal(probability, (margins[0] < 0).astype(float))


def test_the_estimate_does_not_depend_on_the_unit_of_margins():
    margins, _ = simulated(2000, 0.1, 1.0)
    one, other = estimate(margins, 2), estimate(1000 * margins, 2)
    assert one.share == pytest.approx(other.share, rel=1e-9)
    units = np.array([1e6, 1e3, 1e6])
    assert one.error == pytest.approx(other.error / units) and one.flipped == other.flipped
    probabilities = probability_wrong(margins[0], one), probability_wrong(1000 * margins[0], other)
    assert np.allclose(*probabilities, rtol=1e-9)


def test_the_probability_by_hand():
    """m = 0 and e = 0: half of L below 0 weighs 1 - sigmoid, the other half sigmoid.

    With T near 0 sigmoid is a step: a label contradicts the sign of L with the probability e. With
    e = 0.1 and m so large that L is above 0, that is 0.1 * 0 of wrong; far below 0 it is 1.
    """
    steep = LabelNoise(
        flipped=0.1, slope=1e9, error=(1.0, 0.0, 0.0), share=0.0, most=0.0, reliability=1.0
    )
    m = np.array([100.0, 0.0, -100.0])
    assert probability_wrong(m, steep) == pytest.approx([0.0, 0.1, 1.0], abs=1e-9)
    flat = steep._replace(slope=1e-12)  # a label says nothing of the sign of L
    assert probability_wrong(m, flat) == pytest.approx([0.0, 0.5, 1.0], abs=1e-9)
    assert expected_agreement(m, steep) == pytest.approx([0.9, 0.5, 0.9], abs=1e-9)
    # k^2 = 1 + |m| = 4 at m = 3: of L the share 0.0668 is below -3 / 2 deviations, and 0.2 at least
    # of k^2 = 0.2 - |m| = -2.8: 3 / sqrt(0.2) = 6.7 deviations.
    wide = flat._replace(error=(1.0, 1.0, 0.0))
    assert probability_wrong(np.array([3.0]), wide) == pytest.approx([0.0668], abs=2e-3)
    narrow = flat._replace(error=(0.2, -1.0, 0.2))
    assert probability_wrong(np.array([3.0]), narrow) == pytest.approx([0.0], abs=1e-9)


def test_the_interval_is_over_prompts():
    """Each pair twice adds no knowledge: the interval is that of the pairs once."""
    margins, wrong = simulated(1500, 0.1, 0.3)
    names = [f"p{n}" for n in range(1500)]
    once = interval(margins, names, 2, resamples=100)
    twice = interval(np.repeat(margins, 2, axis=1), np.repeat(names, 2), 2, resamples=100)
    assert once[0] < wrong.mean() < once[1]
    assert twice == pytest.approx(once, abs=0.004)
    narrow = interval(np.repeat(margins, 2, axis=1), range(3000), 2, resamples=100)
    assert narrow[1] - narrow[0] < 0.85 * (once[1] - once[0])
    assert interval(margins, names, 2, resamples=100) == once


@pytest.mark.parametrize("by_data", [0.0, 1.0])
def test_the_interval_allows_for_what_errors_come_from(by_data):
    """The estimate takes half of them as those of the data; the truth is in the interval anyway."""
    margins, wrong = simulated(5000, 0.1, 3.0, by_data=by_data)
    low, high = interval(margins, range(5000), 2)
    assert low < wrong.mean() < high
    assert abs(estimate(margins, 2).share - wrong.mean()) > 0.02


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "margins",
    [
        [[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]],  # seeds contradict each other throughout
        [[0.1 + 1e-17, 0.1, 0.3], [0.1, 0.1 + 1e-17, -0.1]],  # |m| is one number but for rounding
        [[0.5], [0.7]],
    ],
)
def test_few_or_like_pairs_give_numbers(margins):
    noise = estimate(np.array(margins), 2)
    assert np.isfinite(np.hstack(noise)).all() and 0 <= noise.share <= noise.most <= 0.5
    assert max(map(abs, noise.error)) < 100
    probabilities = probability_wrong(np.mean(margins, axis=0), noise)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()


def test_models_that_know_nothing_are_not_reliable():
    """Their margins are errors alone: then the labels say nothing, and the estimate is a guess."""
    margins, _ = simulated(5000, 0.1, 1000.0)
    assert estimate(margins, 2, by_data=1.0).reliability < LEAST_RELIABLE
    margins, _ = simulated(5000, 0.1, 4.0)
    expected = 16 / (16 + 16 * (0.25 + 0.75 / 2))  # of the variances, r = 1/4
    assert estimate(margins, 2).reliability == pytest.approx(expected, abs=0.02)

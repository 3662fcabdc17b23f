"""python -m pytest tests/lab/test_findings.py"""

import math

import numpy as np
import pytest

from nanoalign.lab.findings import estimate, sentence, student, verdict


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # of tables
    [(1, 12.7062), (2, 4.3027), (4, 2.7764), (10, 2.2281), (120, 1.9799), (1e6, 1.959966)],
)
def test_the_quantile_of_student_is_that_of_tables(freedom, quantile):
    assert student(freedom) == pytest.approx(quantile, abs=1e-4)


def test_one_seed_gives_the_interval_of_the_mean_over_prompts():
    """Of 1, 2, 3, 4: mean 2.5, deviation 1.2910, t(3) 3.1824."""
    found = estimate(np.array([[1.0, 2, 3, 4]]))
    assert found.mean == 2.5
    assert found.high - 2.5 == pytest.approx(3.1824 * 1.29099 / 2, rel=1e-4)
    over_seeds = estimate(np.array([[1.0, 2, 3, 4]]).T)
    assert over_seeds == pytest.approx(found)
    assert estimate(np.ones((2, 3))) == (1, 1, 1)


def test_the_parts_of_seeds_and_prompts_add_up_each_with_its_own_quantile():
    """Of seeds 1 / 3, of prompts 5 / 3 / 4, t(2) 4.3027 and t(3) 3.1824; no residual."""
    found = estimate(np.array([[0.0], [1], [2]]) + np.array([1.0, 2, 3, 4]))
    assert found.mean == 3.5
    assert found.high - 3.5 == pytest.approx(
        math.sqrt(4.3027**2 / 3 + 3.1824**2 * 5 / 12), rel=1e-4
    )


def test_the_residual_of_seeds_and_prompts_is_counted_once():
    """Means of seeds 0.5, 4.5 and of prompts 1, 4; residuals of 1 or -1: 4 + 2.25 - 1 = 5.25."""
    found = estimate(np.array([[0.0, 1], [2, 7]]))
    assert found.high - 2.5 == pytest.approx(12.7062 * math.sqrt(5.25), rel=1e-4)


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("of_both", [0, 1])
@pytest.mark.parametrize("ratio", [0, 1, 3, 20])
def test_the_interval_holds_the_mean_whatever_seeds_and_prompts_weigh(seeds, of_both, ratio):
    """ratio: of the variance of the mean by seeds to that by prompts; 1: they weigh alike.

    With the degrees of freedom of Satterthwaite 87 to 93 % have the mean where seeds weigh more.
    """
    rng, prompts, times = np.random.default_rng(seeds), 40, 1000
    of_seeds = math.sqrt(ratio * seeds / prompts)
    held = 0
    for _ in range(times):
        values = of_seeds * rng.standard_normal((seeds, 1)) + rng.standard_normal(prompts)
        found = estimate(values + of_both * rng.standard_normal((seeds, prompts)))
        held += found.low <= 0 <= found.high
    assert 0.94 <= held / times <= 0.995


def test_one_number_has_no_interval():
    found = estimate(np.array([[0.3]]))
    assert found.mean == 0.3 and math.isnan(found.low) and str(found) == "0.300"
    assert verdict(np.array([[0.3]])) == "not shown"
    assert sentence("more is more", np.array([[0.3]])) == (
        "Not shown, by one number without an interval (0.300): more is more."
    )


@pytest.mark.parametrize(
    ("centre", "expected"), [(1, "shown"), (0, "not shown"), (-1, "other than expected")]
)
def test_the_verdict_is_computed_from_the_interval(centre, expected):
    difference = centre + np.array([[-0.1, 0.1, 0.0], [0.1, -0.1, 0.0]])
    assert verdict(difference) == expected
    text = sentence("more is more", difference)
    assert text.startswith(f"{expected.capitalize()} ({centre:.3f} [")
    assert text.endswith("]): more is more.")

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


def test_seeds_and_prompts_without_interaction_add_up():
    """v = 1 / 3 of the seeds, 5 / 3 / 4 of the prompts; the freedom of Satterthwaite is 4.69."""
    values = np.array([[0.0], [1], [2]]) + np.array([1.0, 2, 3, 4])
    variance = 1 / 3 + 5 / 12
    freedom = variance**2 / ((1 / 3) ** 2 / 2 + (5 / 12) ** 2 / 3)
    found = estimate(values)
    assert found.mean == 3.5
    assert found.high - 3.5 == pytest.approx(student(freedom) * math.sqrt(variance))


def test_the_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for of_seeds, of_prompts, of_both in ((0, 1, 1), (0.2, 1, 1), (0.5, 0.1, 1)):
        held = 0
        for _ in range(1500):
            values = of_seeds * rng.standard_normal((3, 1)) + of_both * rng.standard_normal((3, 40))
            found = estimate(values + of_prompts * rng.standard_normal(40))
            held += found.low <= 0 <= found.high
        assert 0.93 <= held / 1500 <= 0.99, (of_seeds, of_prompts, held)


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

"""python -m pytest tests/lab/test_findings.py"""

import math

import numpy as np
import pytest

from nanoalign.lab.findings import (
    POSITIVE,
    SHARE,
    Claim,
    Findings,
    Panel,
    estimate,
    from_json,
    student,
    to_json,
)


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
    assert (over_seeds.low, over_seeds.high) == pytest.approx((found.low, found.high))
    assert over_seeds.seeds == [1, 2, 3, 4] and found.seeds == [2.5]
    of_ones = estimate(np.ones((2, 3)))
    assert (of_ones.mean, of_ones.low, of_ones.high) == (1, 1, 1)


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


@pytest.mark.parametrize(
    ("scale", "values", "bounds"),
    [
        (SHARE, [[1.0, 1, 1, 0], [1, 1, 1, 1]], (0, 1)),
        (SHARE, [[0.02], [0.5], [0.97]], (0, 1)),
        (POSITIVE, [[2.9], [14.0], [125.0]], (0, math.inf)),  # of KLs; by t it is 48 [-120, 217]
    ],
)
def test_no_end_of_an_interval_is_beyond_what_is_possible(scale, values, bounds):
    plain, found = estimate(np.array(values)), estimate(np.array(values), scale)
    assert plain.low < bounds[0] or plain.high > bounds[1]
    assert bounds[0] < found.low < found.mean < found.high < bounds[1]
    assert found.mean == plain.mean


def test_a_narrow_interval_is_the_same_on_each_scale():
    """To first order: 0.8 with a half width of 0.002."""
    values = 0.8 + np.linspace(-1, 1, 50)[None] * 0.012
    ends = [(each.low, each.high) for each in (estimate(values, s) for s in (SHARE, POSITIVE))]
    plain = estimate(values)
    assert plain.high - plain.low == pytest.approx(0.004, abs=2e-4)
    assert ends == [pytest.approx((plain.low, plain.high), abs=1e-5)] * 2


def test_of_hits_alone_the_end_is_that_of_clopper_and_pearson():
    """All of 30 prompts: 0.025^(1/30) = 0.8843, and of none 1 - 0.8843."""
    hits, misses = (estimate(np.full((3, 30), float(x)), SHARE) for x in (1, 0))
    assert (hits.low, hits.high) == (pytest.approx(0.8843, abs=1e-4), 1)
    assert (misses.low, misses.high) == (0, pytest.approx(0.1157, abs=1e-4))


def test_the_interval_of_a_share_holds_it():
    """Hits of 0.9 by the mean, where seeds differ: three seeds, 60 prompts."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(600):
        chances = 1 / (1 + np.exp(-(2.2 + 0.3 * rng.standard_normal((3, 1)))))
        found = estimate((rng.random((3, 60)) < chances).astype(float), SHARE)
        held += found.low <= 0.897 <= found.high  # the mean of the chances
    assert held / 600 >= 0.94


def test_one_number_has_no_interval():
    found = estimate(np.array([[0.3]]))
    assert (found.mean, found.low, str(found)) == (0.3, None, "0.300")
    claim = Claim("more is more", found)
    assert claim.verdict == "not shown" and claim.sentences() == (
        "Guess: more is more. Found: not shown, by one number without an interval, 0.300."
    )


@pytest.mark.parametrize(
    ("centre", "verdict", "found", "result"),
    [
        (1, "shown", "so, by 1.000 [0.", "Noise lowers it (1.000 [0."),
        (0, "not shown", "not shown, as 0 is in", "It is not shown that noise lowers it (0.000 [-"),
        (-1, "other than expected", "noise raises it, by 1.000 [0.",
         "Other than guessed, noise raises it (1.000 [0."),
    ],
)  # fmt: skip
def test_a_verdict_says_what_was_found(centre, verdict, found, result):
    difference = centre + np.array([[1, 2, 0], [-1, -2, 0]]) / 64
    claim = Claim("noise [lowers|raises] it", estimate(difference))
    assert claim.verdict == verdict
    assert claim.sentences().startswith(f"Guess: noise lowers it. Found: {found}")
    assert claim.result().startswith(result)


def test_the_opposite_of_a_sentence_without_two_outcomes_is_said():
    claim = Claim("more is more", estimate(np.array([[-1.0], [-1.1]])))
    assert "Found: the opposite of: more is more, by 1.050 [" in claim.sentences()


def test_a_share_is_compared_with_one_half_on_its_own_scale():
    share = estimate(np.array([[0.9], [0.95], [0.99]]), SHARE)
    above = share.above(0.5)
    assert (above.mean, above.low, above.high) == pytest.approx(
        (share.mean - 0.5, share.low - 0.5, share.high - 0.5)
    )
    assert above.high < 0.5


def test_findings_are_the_same_after_their_json():
    values = np.array([[0.5, 1.0], [1.0, 1.0]])
    panel = Panel("t", "x", "y", {"a": [(values, values), ("text", values)]}, scale=SHARE)
    found = Findings({"name": ["a"], "share": [values]}, [panel], [("it is", values)], ["note"])
    about, again = from_json(to_json({"seeds": [0]}, found))
    assert again == found and about == {"seeds": [0]}
    assert found.panels[0].series["a"][0][1].high < 1 < found.table["share"][0].high

"""python -m pytest tests/evaluation/test_style.py"""

import numpy as np
import pytest

from nanoalign.evaluation.comparison import Compared, Judged, comparison_metrics
from nanoalign.evaluation.diagnosis import bin_rows, ruler_warning
from nanoalign.evaluation.statistics import controlled_win_rate, ratio_interval
from nanoalign.evaluation.style import agreement, differences, style

MARKDOWN = """# Title
## Part
#no header
- one
* two
  3. three
4 no item
**bold** and __bold__, not ** this
```
# a comment
- code
```
"""


def compared(n: int, policy: str, baseline: str, scores=(1.0, 0.0), tokens=(5, 5)) -> Compared:
    sides = zip((policy, baseline), scores, tokens, strict=True)
    return Compared(str(n), f"p{n}", *((Judged(*side, True, 1.0),) for side in sides))


def test_styles_by_hand():
    """Two headers, three items, two bold texts; a block of code has none."""
    assert style(MARKDOWN, 40) == [40, 2, 3, 2]
    assert style("plain", 2) == [2, 0, 0, 0]


def test_differences_by_hand():
    """Tokens 30 and 10: 20 / 40. Headers 2 of 30 and 0: d = 2/31, d / (d + 1) = 2/33."""
    policy, baseline = np.array([[30, 2, 0, 0]]), np.array([[10, 0, 1, 0], [30, 2, 0, 0]])
    found = differences(policy, baseline)
    assert found.shape == (1, 2, 4)
    assert found[0, 0] == pytest.approx([0.5, 2 / 33, -1 / 12, 0])
    assert found[0, 1] == pytest.approx([0, 0, 0, 0])
    assert differences(baseline, policy)[0, 0] == pytest.approx(-found[0, 0])


def test_style_control_takes_out_what_bold_text_explains():
    """The judge likes bold text alone, and the policy has more of it."""
    draw = np.random.default_rng(0)
    bold, length = draw.normal(1, 1, 4000), draw.normal(0, 1, 4000)
    won = (draw.random(4000) < 1 / (1 + np.exp(-bold))).astype(float)
    assert won.mean() > 0.65
    assert controlled_win_rate(won, [length]) == pytest.approx(won.mean(), abs=0.01)
    assert controlled_win_rate(won, [length, bold]) == pytest.approx(0.5, abs=0.03)


def test_style_control_solves_its_equations():
    """The gradient of the loss by plain sums is 0 at the slopes that the rates at 0 imply.

    The rates at three shifted zeros give the intercept and both slopes.
    """
    draw = np.random.default_rng(1)
    features = draw.normal(0.3, [1.0, 2.0], (300, 2))
    won = (draw.random(300) < 0.6).astype(float)

    def logit(*shift: float) -> float:
        rate = controlled_win_rate(won, (features - np.array(shift)).T)
        return np.log(rate / (1 - rate))

    slopes = [logit(1, 0) - logit(0, 0), logit(0, 1) - logit(0, 0)]
    p = 1 / (1 + np.exp(-(logit(0, 0) + features @ slopes)))
    scaled = (features - features.mean(0)) / features.std(0)
    assert (won - p).sum() == pytest.approx(0, abs=1e-7)
    for n in range(2):
        penalty = slopes[n] * features[:, n].std()
        assert ((won - p) * scaled[:, n]).sum() - penalty == pytest.approx(0, abs=1e-7)


def test_style_is_not_controlled_where_equal_style_was_not_seen():
    """All of the policy's answers have bold text, none of the baseline's has."""
    draw = np.random.default_rng(0)
    cases = [
        compared(n, f"**{n}**", str(n), (draw.normal(0.3), 0.0), (5 + n % 2, 6 - n % 3))
        for n in range(60)
    ]
    figures = comparison_metrics(cases, 100)
    assert figures["style_controlled_win_rate"] is None
    assert 0 < figures["length_controlled_win_rate"] < 1


def test_win_rates_by_length_by_hand():
    """Ratios 1/4, 1/2, 1, 1, 2: the first wins, the second ties, then a win, a loss, a win."""
    scores = [(1, 0), (1, 1), (1, 0), (0, 1), (1, 0)]
    tokens = [(2, 8), (4, 8), (8, 8), (8, 8), (16, 8)]
    both = enumerate(zip(scores, tokens, strict=True))
    figures = comparison_metrics([compared(n, "a", "b", s, t) for n, (s, t) in both], 100)
    bins = figures["length_bins"]
    assert {name: (own["pairs"], own["win_rate"]) for name, own in bins.items()} == {
        "less than 1/2": (1, 1.0),
        "1/2 to 4/5": (1, 0.5),
        "4/5 to 5/4": (2, 0.5),
        "2 or more": (1, 1.0),
    }
    assert bin_rows(figures)[2][:2] == ["4/5 to 5/4", "2"]
    # Longer: no, no, equal, equal, yes, so 1 of 5 and two halves.
    assert figures["longest_win_rate"] == pytest.approx(2 / 5)
    # It agrees with: no, half, half, half, yes.
    assert figures["longest_agreement"] == pytest.approx(2.5 / 5)


def test_agreement_by_hand():
    won, longer = np.array([1, 1, 0, 0, 0.5, 1]), np.array([1, 0, 0, 1, 1, 0.5])
    assert agreement(won, longer).tolist() == [1, 0, 1, 0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("longer", "wins", "said"), [(0, 1, "shorter"), (1, 1, "longer"), (1, 0, "shorter")]
)
def test_a_ruler_that_says_the_same_is_named(longer, wins, said):
    """40 pairs, of which 4 are as long; the judge prefers the longer, or the shorter, answer."""
    tokens = [(5, 5) if n < 4 else (9, 4)[:: 1 if longer else -1] for n in range(40)]
    scores = [(1.0, 0.0)[:: 1 if wins else -1]] * 39 + [(0.5, 0.5)]
    both = enumerate(zip(scores, tokens, strict=True))
    figures = comparison_metrics([compared(n, "a", "b", s, t) for n, (s, t) in both], 100)
    agrees = (36 - 0.5 + 2) / 40
    assert f"preferring the {said} answer agrees with the reward model on {agrees:.1%}" in (
        ruler_warning(figures)
    )


def test_without_a_ruler_there_is_no_warning():
    """Equal lengths; and a judge that finds no difference where the policy's are longer."""
    equal = [compared(n, "a", "b") for n in range(40)]
    assert ruler_warning(comparison_metrics(equal, 100)) is None
    close = [compared(n, "a", "b", (n % 2, 0.5), (9, 4)) for n in range(40)]
    assert ruler_warning(comparison_metrics(close, 100)) is None


def test_the_interval_of_a_ratio_by_hand():
    """Sums 1, 3 and counts 1, 2: r = 4/3, residuals -1/3 and 1/3, t(1) = 12.706."""
    ratio, low, high = ratio_interval(np.array([1.0, 3.0]), np.array([1, 2]))
    assert ratio == pytest.approx(4 / 3) and ratio - low == pytest.approx(high - ratio)
    many = np.random.default_rng(0)
    counts = many.integers(5, 50, 4000)
    sums = counts * -0.5 + many.normal(0, np.sqrt(counts))
    ratio, low, high = ratio_interval(sums, counts)
    assert high - ratio == pytest.approx(1.96 / np.sqrt(counts.sum()), rel=0.05)
    assert ratio_interval(np.ones(1), np.full(1, 2)) == (0.5, None, None)


def test_the_interval_of_a_ratio_covers_it():
    """Of 400 samples of 20 documents 91 to 98 % of the intervals have the true ratio."""
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        counts = draw.integers(10, 40, 20)
        _, low, high = ratio_interval(counts * 0.2 + draw.normal(0, np.sqrt(counts)), counts)
        hits += low < 0.2 < high
    assert 0.91 < hits / 400 < 0.98

"""Statistics of rewards and wins. Pure functions of arrays.

Shapes: P pairs of responses.
"""

import math
from collections.abc import Hashable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from nanoalign.runs.result import wilson_interval

Figures = dict[str, float | int | None]  # where answers were cut, `without_cut` holds Figures, too


def win_shares(margins: np.ndarray) -> np.ndarray:
    """1 where a margin is above 0, 0 where it is below, 1/2 where it is 0: of any shape."""
    return (np.sign(margins) + 1) / 2


class Calibration(NamedTuple):
    """By bins of confidence; nan in a bin without pairs."""

    confidence: np.ndarray  # (bins,) mean probability of the response with the higher reward
    hit_rate: np.ndarray  # (bins,) share of labels that agree; a tie is half a hit
    counts: np.ndarray  # (bins,)
    error: float  # mean absolute difference of the two, weighted by the counts


def calibration(margins: np.ndarray) -> Calibration:
    """Compares sigmoid(|margin|), the confidence of a pair, with the share of labels that agree.

    margins: reward of the better response minus that of the worse one, (P,). The confidences are
        put into 10 bins of equal width over [0.5, 1].
    The error is the expected calibration error (Naeini et al. 2015; Guo et al. 2017, arXiv
    1706.04599, equation 3).
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    hit, bins = win_shares(margins), 10
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=values, minlength=bins) for values in (confidence, hit)]
    error = np.abs(sums[0] - sums[1]).sum() / len(margins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        return Calibration(sums[0] / counts, sums[1] / counts, counts, float(error))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rank correlation of x and y, (n,) each; tied values have their mean rank.

    None if x or y is constant.
    """
    ranks = [_ranks(values) for values in (x, y)]
    centred = [rank - rank.mean() for rank in ranks]
    norm = math.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / norm) if norm else None


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def prompt_interval(
    hits: np.ndarray, prompts: Sequence[Hashable], weights: np.ndarray | None = None
) -> tuple[float, float]:
    """Returns (low, high): the 95 % interval of the probability of a hit, by pairs of prompts.

    hits: (P,) 1, 0, or 1/2 for a tie. prompts: of each pair; the pairs of one prompt share answers.
    weights: (P,) of the pairs, of any sum; None: 1 each.

    The interval is that of Wilson for as many independent pairs as the P pairs are worth (Korn and
    Graubard 1998). Their number is a / b, where w are the weights divided by their sum, W those of
    a prompt added up, d is the deviation of a hit from the centre c, and

        a = (sum of w d^2 over pairs) / (1 - sum of w^2)
        b = sum over prompts of (sum of w d over the pairs of the prompt)^2 / (1 - W)

    The denominators correct that a prompt with many pairs draws the share of hits to itself (CR2 of
    Bell and McCaffrey 2002). The number is an estimate, so it is multiplied by
    (t(m - 1) / t(n - 1))^2 of Student's t (Carter et al. 2017), where m = 1 / sum of w^2 is the
    effective number of pairs, P without weights, and n = 1 / sum of W^2 that of prompts. It is at
    least n, what pairs are worth that are all alike within their prompt, and at most m; it is n if
    all hits are equal. So the interval is Wilson's where each prompt has one pair. The centre c is
    that of Wilson's interval for n pairs (Agresti and Coull 1998), and not the share of hits: near
    0 and 1 few prompts have other hits than the rest, and show little of how alike pairs are. A
    bootstrap is empty where all pairs are hits, and too narrow near that: benchmarks/coverage.py.
    """
    index = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    group = np.array([index[prompt] for prompt in prompts])
    weights = np.ones(len(hits)) if weights is None else weights
    weights = weights / weights.sum()
    of_prompts = np.bincount(group, weights)  # W
    share = float((weights * hits).sum())
    most = 1 / (weights**2).sum()  # m
    alike = 1 / (of_prompts**2).sum()  # n
    worth = alike
    if max(index.values()) > 0 and hits.min() < hits.max():
        deviations = weights * (hits - sum(wilson_interval(share, alike)) / 2)  # w d
        apart = (deviations**2 / weights).sum() / (1 - 1 / most)
        together = (np.bincount(group, deviations) ** 2 / (1 - of_prompts)).sum()
        worth = most
        if together > 0:
            worth = apart / together * (student(most - 1) / student(alike - 1)) ** 2
    return wilson_interval(share, float(np.clip(worth, alike, most)))


def share_figures(
    name: str, hits: np.ndarray, prompts: Sequence[Hashable], weights: np.ndarray | None = None
) -> Figures:
    """The mean of some hits by their weights as the figure `name`, and its 95 % interval.

    The arguments are those of prompt_interval, whose ends are the figures `name`_low and _high.
    """
    low, high = prompt_interval(hits, prompts, weights)
    mean = float(np.average(hits, weights=weights))
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


@cache
def student(freedom: float) -> float:
    """The 97.5 % quantile of Student's t; that of 1 degree of freedom for fewer than 1.

    With t = sqrt(freedom) tan(a), P(|T| < t) is c times the integral of cos^(freedom - 1) from 0 to
    a, where c = 2 Gamma((freedom + 1) / 2) / (sqrt(pi) Gamma(freedom / 2)).
    """
    freedom = max(1.0, freedom)
    constant = 2 / math.sqrt(math.pi)
    constant *= math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    low, high = 0.0, math.atan(13 / math.sqrt(freedom))  # of 1 degree of freedom t is 12.7
    for _ in range(60):  # bisection
        angle = (low + high) / 2
        inner = np.cos((nodes + 1) * angle / 2) ** (freedom - 1)
        inside = constant * float(weights @ inner) * angle / 2
        low, high = (angle, high) if inside < 0.95 else (low, angle)
    return math.sqrt(freedom) * math.tan(angle)


def controlled_win_rate(
    won: np.ndarray, differences: Sequence[np.ndarray], weights: np.ndarray | None = None
) -> float | None:
    """The win rate where no feature differs, by a logistic regression on differences of features.

    won: (P,) 1, 0, or 1/2 for a tie. differences: for each feature its value of the policy's answer
        minus that of the baseline's, (P,). weights: (P,) of the pairs; None: 1 each.
    With lengths alone the idea is that of Dubois et al. 2024 (arXiv 2404.04475). Of their terms (a
    tanh of the length, the models, the prompts) only a linear one of the length is used here. With
    the features of style.py it is the style control of Arena-Hard, which reads the rate at the mean
    difference over all models of its leaderboard; of two models that would be the plain win rate,
    so here it is read at the difference 0. Half the squared slope of each standardised feature is
    added to the loss, so that slopes are finite where features separate wins from losses.

    Returns the outcome if all are equal. Else returns None if more than 97.5 % of the weight has a
    feature larger, or smaller, in the policy's answers: then equal ones were hardly observed.
    """
    if won.min() == won.max():
        return float(won[0])
    weights = np.ones(len(won)) if weights is None else weights
    columns, at_zero = [np.ones(len(won))], []
    for feature in differences:
        if max(weights[feature > 0].sum(), weights[feature < 0].sum()) > 0.975 * weights.sum():
            return None
        centre = np.average(feature, weights=weights)
        deviation = np.sqrt(np.average((feature - centre) ** 2, weights=weights)) or 1.0
        columns.append((feature - centre) / deviation)
        at_zero.append((centre, deviation))
    x = np.stack(columns, 1)  # (P, 1 + features)
    # Of the slopes, not of the intercept, which would draw it to 1/2.
    penalty = np.array([0.0, *(1.0 for _ in differences)])
    coefficients = np.zeros(x.shape[1])
    for _ in range(50):  # Newton's method
        p = 1 / (1 + np.exp(-x @ coefficients))
        gradient = x.T @ (weights * (won - p)) - penalty * coefficients
        hessian = (x * (weights * p * (1 - p))[:, None]).T @ x + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        coefficients += step
        if np.abs(step).max() < 1e-10:
            break
    slopes = zip(coefficients[1:], at_zero, strict=True)
    logit = coefficients[0] - sum(slope * centre / scale for slope, (centre, scale) in slopes)
    return float(1 / (1 + np.exp(-logit)))


def ratio_interval(
    sums: np.ndarray, counts: np.ndarray
) -> tuple[float, float | None, float | None]:
    """Returns (the sum of sums over the sum of counts, low, high), with its 95 % interval.

    sums, counts: (n,), of independent units, as the log-probability and the tokens of a document.
    The variance of the ratio r is n / (n - 1) times the sum of (sum - r count)^2, divided by the
    squared sum of counts (Cochran 1977, equation 6.13, of a large population); the interval is that
    of Student's t. Of one unit low and high are None.
    """
    ratio, n = sums.sum() / counts.sum(), len(sums)
    if n < 2:
        return float(ratio), None, None
    squares = ((sums - ratio * counts) ** 2).sum()
    half = student(n - 1) * math.sqrt(n / (n - 1) * squares) / counts.sum()
    return float(ratio), float(ratio - half), float(ratio + half)


def best_of_weights(n: int, samples: int) -> np.ndarray:
    """The share of all subsets of size n of which each sample is the best: (samples,).

    The samples are in rising order of reward. The share of the i-th, from 0, of N samples is
    C(i, n - 1) / C(N, n). With these weights the mean reward is the expected best of n.
    """
    return np.array([math.comb(i, n - 1) for i in range(samples)]) / math.comb(samples, n)

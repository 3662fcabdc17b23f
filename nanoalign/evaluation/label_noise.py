"""How many labels are wrong, and which, by the margins of models that have not seen them.

A label and a margin m, the reward of chosen minus that of rejected, disagree where the label is
wrong or the models are. Of a pair's true margin L, whose sign a right label follows, is assumed:

    P(label | L) = e + (1 - 2 e) sigmoid(L)     the Bradley-Terry model, then a share e is flipped
    L = (m + error) / T                          error is normal, with the standard deviation k(|m|)

A label is wrong if it contradicts the sign of L. e and T maximize the likelihood of the labels,

    P(label | m) = e + (1 - 2 e) E[sigmoid((m + k z) / T)],    z standard normal

With k = 0 this is temperature scaling (Guo et al. 2017, arXiv 1706.04599) with symmetric noise
(Natarajan et al. 2013), which takes each error of the models for a wrong label. Labels alone can't
tell k: a pair has one label. So k is measured by how far models of several seeds differ. Of the
variance s^2 of the error of one model, the share d comes from the pairs that it has seen, of which
the model of another seed has seen the share (N - 1) / N, and the rest from what seeds do not share,
the draw of the head and the order of the batches. So

    r = d (N - 1) / N                           the correlation of the errors of two models
    s^2 = E[(difference of two margins)^2] / (2 (1 - r))
    v = s^2 (r + (1 - r) / S)                   the variance of the error of m, the mean of S seeds
    R = 1 - v / E[m^2]                          the reliability of m
    k^2 = v / R

A normal true margin has the mean R m and the variance R v where m is known; T takes up the factor
R. Models differ more where margins are large, so k^2 is a line over |m|. d is not known: the
estimate takes 1/2, and the interval takes all from 0 to 1. Errors that all models share are not
seen in k, and count as wrong labels; wrong labels that the models learn are not seen at all.

Shapes: S seeds, P pairs, B bins of pairs, Z points of the normal distribution.
"""

from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

# z in 100 parts of equal probability: their middles, and where they begin and end, within 4
# deviations. A mean over the middles is an expectation.
POINTS = np.array([NormalDist().inv_cdf((n + 0.5) / 100) for n in range(100)])  # (Z,)
EDGES = np.array([-4.0, *(NormalDist().inv_cdf(n / 100) for n in range(1, 100)), 4.0])  # (Z + 1,)
FLIPPED = np.linspace(0, 0.495, 100)  # e
SLOPES = np.geomspace(0.05, 50, 70)  # 1 / T, for margins whose mean square is 1
BINS = 100
LEAST_RELIABLE = 0.1  # R; below it the models hardly know more than their errors
LEAST_VARIANCE = 0.1  # k^2 at any |m|, as a share of its mean


class LabelNoise(NamedTuple):
    """The estimate; margins and errors are in the units of the margins that it was made of."""

    flipped: float  # e
    slope: float  # 1 / T
    error: tuple[float, float, float]  # k^2 at 0, its rise by |m|, and the least that it may be
    share: float  # of all labels that are wrong
    most: float  # of all labels that the models contradict, by the fitted probabilities
    reliability: float  # R; below LEAST_RELIABLE the estimate says little


def estimate(margins: np.ndarray, parts: int, by_data: float = 0.5) -> LabelNoise:
    """Estimates the noise of the labels of pairs.

    margins: (S, P), of held-out pairs by models of S >= 2 seeds. parts: N, of the folds. by_data:
    d.
    """
    correlation = by_data * (parts - 1) / parts
    mean = margins.mean(0)  # (P,)
    square = max(float((mean**2).mean()), 1e-12)  # 0 where seeds contradict each other throughout
    variances = margins.var(0, ddof=1) / (1 - correlation)  # s^2, (P,)
    variances *= correlation + (1 - correlation) / len(margins)
    reliability = 1 - variances.mean() / square
    variances /= max(reliability, LEAST_RELIABLE)

    size = np.abs(mean)
    spread, middle = size.var(), variances.mean()
    is_one_size = spread < 1e-12 * square
    rise = 0.0 if is_one_size else np.cov(size, variances, ddof=0)[0, 1] / spread
    error = (middle - rise * size.mean(), rise, LEAST_VARIANCE * middle)
    edges = np.quantile(size, np.linspace(0, 1, BINS + 1))[1:-1]
    bins = np.searchsorted(edges, size, side="right")
    bins = np.unique(bins, return_inverse=True)[1]  # without those that are empty
    counts = np.bincount(bins)  # (B,)
    sizes = np.bincount(bins, size) / counts
    agree = np.bincount(bins, (np.sign(mean) + 1) / 2)

    # Over a grid, because the likelihood is flat along e and T, and may have its peak at a border.
    flipped, slopes = FLIPPED[:, None], SLOPES / np.sqrt(square)
    known = np.stack([_sigmoid(slope * _leads(sizes, error)).mean(1) for slope in slopes])
    p = flipped[..., None] + (1 - 2 * flipped[..., None]) * known  # (100, 70, B)
    likelihood = np.log(p) @ agree + np.log1p(-p) @ (counts - agree)
    best, n = np.unravel_index(likelihood.argmax(), likelihood.shape)
    e, slope = float(FLIPPED[best]), float(slopes[n])
    natural = _sigmoid(-slope * np.abs(_leads(sizes, error))).mean(1)  # (B,)
    share = e + (1 - 2 * e) * natural @ counts / counts.sum()
    most = (1 - p[best, n]) @ counts / counts.sum()
    values = map(float, (share, most, reliability))
    return LabelNoise(e, slope, tuple(map(float, error)), *values)


def interval(
    margins: np.ndarray, prompts: Sequence[Hashable], parts: int, resamples: int = 200
) -> tuple[float, float]:
    """Returns the 95 % interval of `share`, by a bootstrap over the prompts of the P pairs.

    Each resample also draws `by_data`, which is not known, between 0 and 1.
    """
    names = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    group = np.array([names[prompt] for prompt in prompts])
    draw, shares = np.random.default_rng(0), []
    for _ in range(resamples):
        times = np.bincount(draw.integers(len(names), size=len(names)), minlength=len(names))
        pairs = np.repeat(np.arange(len(group)), times[group])
        shares.append(estimate(margins[:, pairs], parts, draw.random()).share)
    low, high = np.quantile(shares, [0.025, 0.975]).tolist()
    return low, high


def expected_agreement(margins: np.ndarray, noise: LabelNoise) -> np.ndarray:
    """Returns the probability that a label agrees with the sign of its margin, (P,).

    margins: (P,) the mean over seeds.
    """
    return _probability_of_label(_leads(np.abs(margins), noise.error), noise).mean(1)


def probability_wrong(margins: np.ndarray, noise: LabelNoise) -> np.ndarray:
    """Returns the probability that the label of each pair is wrong, (P,).

    margins: (P,) the mean over seeds. The probability falls where the margin rises, up to 0.001.
    """
    parts = []
    for some in np.array_split(margins, 1 + len(margins) // 10_000):  # for the memory of Z each
        weights = _probability_of_label(_leads(some, noise.error), noise)
        with np.errstate(divide="ignore", invalid="ignore"):  # without errors: 1, 0, and 1/2 at 0
            zero = -some / _deviations(some, noise.error)
        zero = np.nan_to_num(zero, posinf=np.inf, neginf=-np.inf)
        # The share of each part of z in which m + k z is below 0.
        below = np.clip((zero[:, None] - EDGES[:-1]) / np.diff(EDGES), 0, 1)  # (P, Z)
        parts.append((weights * below).sum(1) / weights.sum(1))
    return np.concatenate(parts)


def _probability_of_label(leads: np.ndarray, noise: LabelNoise) -> np.ndarray:
    """P(label | L) at L = leads / T, of any shape."""
    return noise.flipped + (1 - 2 * noise.flipped) * _sigmoid(noise.slope * leads)


def _leads(margins: np.ndarray, error: tuple[float, float, float]) -> np.ndarray:
    """m + k z: (P, Z)."""
    return margins[:, None] + _deviations(margins, error)[:, None] * POINTS


def _deviations(margins: np.ndarray, error: tuple[float, float, float]) -> np.ndarray:
    """k: (P,)."""
    at_zero, rise, least = error
    return np.sqrt(np.maximum(at_zero + rise * np.abs(margins), least))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """Between 1e-13 and 1 - 1e-13, so that its logarithm is finite."""
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))

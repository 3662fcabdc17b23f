"""What is reported, as exact sums over pairs: nothing is averaged twice, nothing is counted twice."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanoalign.distributed import sum_over_ranks


def hits(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """1 where the chosen response has the higher reward, 0 where the lower, 1/2 for a tie: (B,).

    A model that can't tell the two apart, as policy == reference can't, is right half of the time.
    """
    return (torch.sign(chosen_rewards - rejected_rewards) + 1) / 2


def win_shares(margins: np.ndarray) -> np.ndarray:
    """The same of margins in numpy: 1 where one is above 0, 0 below, 1/2 for a tie."""
    return (np.sign(margins) + 1) / 2


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a probability, from a share of `count` trials (Wilson 1927).

    Unlike share +- 1.96 standard errors it stays within [0, 1], and has a width at shares of 0 and 1.
    """
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) * z / (1 + z * z / count)
    return centre - half, centre + half


class Calibration(NamedTuple):
    """Of the winners that a model names: how sure it is, and how often it is right; nan in empty bins."""

    confidence: np.ndarray  # (bins,) mean probability that the winner wins
    hit_rate: np.ndarray  # (bins,) share of the labels that agree; a tie is half a hit
    counts: np.ndarray  # (bins,)
    error: float  # mean difference of the two, weighted by the counts


def calibration(margins: np.ndarray, bins: int = 10) -> Calibration:
    """Whether sigmoid(margin) is the probability that it says, for margins of better over worse (P,).

    Of each pair the confidence is sigmoid(|margin|), in `bins` bins of equal width over [0.5, 1], and
    the hit is whether the label agrees. The error is the expected calibration error (Naeini et al.
    2015; Guo et al. 2017, arXiv 1706.04599, equation 3).
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    hit = win_shares(margins)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=values, minlength=bins) for values in (confidence, hit)]
    error = np.abs(sums[0] - sums[1]).sum() / len(margins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        return Calibration(sums[0] / counts, sums[1] / counts, counts, float(error))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's: the correlation of ranks, ties having the mean of theirs; None if one never varies."""
    ranks = [_ranks(values) for values in (x, y)]
    centred = [rank - rank.mean() for rank in ranks]
    norm = math.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / norm) if norm else None


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


Reported = Tensor | tuple[Tensor, Tensor]  # of every pair, or of those for which a mask is True


class Means:
    """Means over the pairs of all micro-batches and ranks: float64 sums, one reduction, one division."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.spreads: list[str] = []
        self.sums: Tensor | None = None  # a weight a name, a sum a name, a sum of squares a spread

    def add(self, values: dict[str, Reported], weights: Tensor) -> None:
        """Adds one micro-batch: values (B,) by name, weights (B,) that are 0 for pairs that do not count.

        What is (B, n) holds n values a pair, and is reported by the standard deviation of them all.
        What comes as (value, applies), both (B,), counts only where applies is True.
        """
        self.names, sums, weighed, squares = list(values), [], [], []
        for value in values.values():
            counted = weights
            if isinstance(value, tuple):
                value, applies = value
                counted, value = weights * applies, value.where(applies, 0.0)
            value = value.detach().double()
            if value.ndim == 2:
                squares.append((value.square().mean(1) * counted).sum())
                value = value.mean(1)
            sums.append((value * counted).sum())
            weighed.append(counted.sum(dtype=torch.float64))
        self.spreads = [n for n, v in values.items() if not isinstance(v, tuple) and v.ndim == 2]
        new = torch.stack(weighed + sums + squares)
        self.sums = new if self.sums is None else self.sums + new

    def reduce(self) -> dict[str, float]:
        """The figures by name, the same on every rank; none of a value that never applied.

        Every rank must call it, with the same names.
        """
        assert self.sums is not None, "every rank adds at least one micro-batch"
        sums = sum_over_ranks(self.sums).tolist()  # CPU-GPU sync point
        count = len(self.names)
        figures = {
            name: total / weight
            for name, weight, total in zip(self.names, sums[:count], sums[count:], strict=False)
            if weight
        }
        for name, square in zip(self.spreads, sums[2 * count :], strict=True):
            weight = sums[self.names.index(name)]
            figures[name] = math.sqrt(max(0.0, square / weight - figures[name] ** 2))
        return figures

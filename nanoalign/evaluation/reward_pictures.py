"""The pictures of `evaluate.py rm`.

Shapes: P pairs.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files alone, no screen
from matplotlib import pyplot as plt  # noqa: E402

from nanoalign.data.prompts import prompt_key
from nanoalign.evaluation.ranking import (
    Figures,
    Pairs,
    Scored,
    about_cut,
    pairs_of,
    share_with_interval,
)
from nanoalign.evaluation.statistics import calibration, prompt_interval, win_shares

BETTER, WORSE = "tab:blue", "tab:orange"


def alpha_of(points: int) -> float:
    """The opacity of points: many are drawn lighter."""
    return min(0.9, max(0.1, 300 / points))


def bins_of(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Edges of the bins of a histogram: 2 n^(1/3) of n values (Rice's rule), 40 at most."""
    return np.histogram_bin_edges(values, min(40, round(2 * len(values) ** (1 / 3))))


def legend_below(axis, columns: int = 2) -> None:
    """A legend that hides nothing; its points are opaque."""
    box = axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns, frameon=False)
    for handle in box.legend_handles:
        handle.set_alpha(max(0.6, handle.get_alpha() or 1))


def reward_picture(path: Path, subset: str, scored: Sequence[Scored], figures: Figures) -> None:
    """The rewards of one subset in five panels: order, pairs, spread, calibration, length."""
    pairs = pairs_of(scored)
    better, worse = (np.array([pair[side].score for pair in pairs]) for side in (0, 1))  # (P,)
    figure, axes = plt.subplot_mosaic(
        [["order", "order", "pairs"], ["spread", "calibration", "length"]],
        figsize=(16, 10),
        layout="constrained",
    )
    title = (
        f"{subset}: accuracy {share_with_interval(figures)} on {len(pairs):,} pairs, "
        f"{figures['ties']:,} ties; always the longer answer: {figures['longer_accuracy']:.3f}"
    )
    figure.suptitle("\n".join(filter(None, (title, about_cut(figures)))), fontsize="x-large")
    _order_panel(axes["order"], better, worse)
    _pairs_panel(axes["pairs"], better, worse)
    _spread_panel(axes["spread"], scored, figures)
    _calibration_panel(axes["calibration"], pairs, better - worse)
    _length_panel(axes["length"], scored, figures)
    for name, axis in axes.items():
        axis.grid(alpha=0.3)
        legend_below(axis, 3 if name == "order" else 2)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _order_panel(axis, better: np.ndarray, worse: np.ndarray) -> None:
    order = np.argsort(better, kind="stable")
    wrong = int((worse > better).sum())
    axis.plot(better[order], color=BETTER, lw=2, label="better answer")
    index, above = np.arange(len(order)), worse[order] > better[order]
    for mask, colour, label in (
        (~above, "tab:gray", "worse answer, ranked below"),
        (above, WORSE, "worse answer, ranked above"),
    ):
        axis.scatter(
            index[mask],
            worse[order][mask],
            s=9,
            color=colour,
            alpha=alpha_of(len(order)),
            label=label,
        )
    axis.set_title(
        f"pairs by the better answer's reward: {wrong:,} of {len(order):,} points are above"
    )
    axis.set_xlabel("pair")
    axis.set_ylabel("reward")


def _pairs_panel(axis, better: np.ndarray, worse: np.ndarray) -> None:
    low, high = min(better.min(), worse.min()), max(better.max(), worse.max())
    axis.plot([low, high], [low, high], color="black", lw=1)
    right = better > worse
    for mask, colour, label in ((right, BETTER, "right"), (~right, WORSE, "wrong or a tie")):
        count = int(mask.sum())
        axis.scatter(
            worse[mask], better[mask], s=9, color=colour, alpha=alpha_of(len(better)),
            label=f"{count:,} {label}",
        )  # fmt: skip
    axis.set_title(
        f"{int(right.sum()):,} of {len(right):,} pairs above the diagonal: ranked rightly"
    )
    axis.set_xlabel("worse answer's reward")
    axis.set_ylabel("better answer's reward")


def _spread_panel(axis, scored: Sequence[Scored], figures: Figures) -> None:
    bins = bins_of([line.score for line in scored])
    for side, colour, name in (("chosen", BETTER, "better"), ("rejected", WORSE, "worse")):
        rewards = [line.score for line in scored if line.side == side]
        mean = figures[f"{name}_data_mean"]
        label = f"{len(rewards):,} {name}, mean {mean:+.2f}"
        axis.hist(rewards, bins, color=colour, alpha=0.55, label=label)
        axis.axvline(mean, color=colour, lw=2, ls="--")
    mean, deviation = figures["reward_mean"], figures["reward_std"]
    axis.set_title(f"{len(scored):,} answers: mean reward {mean:+.2f}, deviation {deviation:.2f}")
    axis.set_xlabel("reward")
    axis.set_ylabel("answers")


def _calibration_panel(axis, pairs: Pairs, margins: np.ndarray) -> None:
    confidence, hit_rate, counts, places, error = calibration(margins)
    axis.plot([0.5, 1], [0.5, 1], color="black", lw=1, label="perfect")
    held = counts > 0
    hits, prompts = win_shares(margins), np.array([prompt_key(b.prompt) for b, _ in pairs], object)
    intervals = [
        prompt_interval(hits[places == n], prompts[places == n]) for n in np.flatnonzero(held)
    ]
    spread = np.abs(np.array(intervals).T - hit_rate[held])  # (2, bins)
    axis.errorbar(
        confidence[held], hit_rate[held], spread, fmt="o", color=BETTER, capsize=3, label="95 %"
    )
    for x, count in zip(confidence[held], counts[held], strict=True):
        axis.text(x, -0.09, f"{count:,}", ha="center", fontsize="small")  # where no point can be
    axis.set_title(f"calibration: error {error:.3f} over {len(margins):,} pairs, counted below")
    axis.set_xlabel("sigmoid(margin) of the winner")
    axis.set_ylabel("share of labels that agree")
    axis.set_xlim(0.48, 1.02)
    axis.set_ylim(-0.12, 1.02)
    axis.set_yticks(np.linspace(0, 1, 6))


def _length_panel(axis, scored: Sequence[Scored], figures: Figures) -> None:
    for side, colour, name in (("rejected", WORSE, "worse"), ("chosen", BETTER, "better")):
        points = [(line.tokens, line.score) for line in scored if line.side == side]
        axis.scatter(
            *zip(*points, strict=True), s=9, color=colour, alpha=alpha_of(len(scored)), label=name
        )
    cut = [(line.tokens, line.score) for line in scored if line.cut]
    if cut:
        axis.scatter(*zip(*cut, strict=True), s=25, lw=0.8, marker="x", color="black", label="cut")
    correlation = figures["length_correlation"]
    shown = "undefined" if correlation is None else f"{correlation:+.2f}"
    axis.set_title(f"{len(scored):,} answers: rank correlation with length {shown}")
    axis.set_xlabel("tokens of the answer")
    axis.set_ylabel("reward")

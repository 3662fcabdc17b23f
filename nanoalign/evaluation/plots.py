"""The pictures of evaluations: a reward model on pairs, a policy against a baseline, many policies.

Shapes: N prompts, P pairs: of a better and a worse response, or of answers of two models.
"""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nanoalign.evaluation.answers import ROLES
from nanoalign.evaluation.comparison import Compared, Judged, of_pairs, won_by
from nanoalign.evaluation.ranking import Scored, about_cut, is_label_error, pairs_of
from nanoalign.evaluation.render import share
from nanoalign.evaluation.statistics import Figures, calibration
from nanoalign.files.text import in_picture

BETTER, WORSE, ERROR = "tab:blue", "tab:orange", "tab:purple"
MARKERS = "osDv^<>P"  # of policies
COLUMN = (7, 13)  # inches of three panels below each other, which a narrow screen can show


@contextmanager
def panels(path: Path, mosaic: list[list[str]], title: str, size: tuple[float, float]) -> Iterator:
    """Yields the axes of a new figure by name, and writes the figure to a PNG file at the end.

    mosaic: the names of the axes, in rows. size: in inches. At the end each axis also gets a grid,
    and below it a legend with opaque points, which hides nothing.
    """
    import matplotlib  # here, because the import takes half a second, which --help does not need

    matplotlib.use("Agg")  # files alone, no screen
    from matplotlib import pyplot as plt

    figure, axes = plt.subplot_mosaic(mosaic, figsize=size, layout="constrained")
    lines = [textwrap.fill(line, round(10 * size[0])) for line in title.splitlines()]
    figure.suptitle(in_picture("\n".join(lines)), fontsize="medium")
    yield axes
    for axis in axes.values():
        axis.grid(alpha=0.3)
        box = axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)
        for handle in box.legend_handles:
            handle.set_alpha(1)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def alpha_of(points: int) -> float:
    """The opacity of so many points, from 0.9 for few to 0.1 for 3,000 and more."""
    return min(0.9, max(0.1, 300 / points))


def reward_picture(path: Path, subset: str, scored: Sequence[Scored], figures: Figures) -> None:
    """Draws the rewards of one subset in three panels: order, calibration, length.

    figures: those of the subset, of ranking.reward_metrics.
    """
    pairs = pairs_of(scored)
    better, worse = (np.array([pair[side].score for pair in pairs]) for side in (0, 1))  # (P,)
    title = (
        f"{subset}: accuracy {share(figures, 'accuracy')} on {len(pairs):,} pairs\n"
        f"{figures['ties']:,} ties; always the longer answer: {figures['longer_accuracy']:.3f}"
    )
    title = "\n".join(filter(None, (title, about_cut(figures))))
    errors = np.array([is_label_error(*pair) for pair in pairs])
    if errors.any():
        ranked_so = (errors & (worse > better)).sum()
        title += f"\n{errors.sum():,} labels are errors by the ground truth, "
        title += f"{ranked_so:,} of them among the {(worse > better).sum():,} points above"
    with panels(path, [["order"], ["calibration"], ["length"]], title, COLUMN) as axes:
        sides = {"better answer": better, "worse answer": worse}
        _order_panel(axes["order"], "pair", sides, errors)
        _calibration_panel(axes["calibration"], better - worse)
        sides = {"better": "chosen", "worse": "rejected"}
        sides = {name: [x for x in scored if x.side == side] for name, side in sides.items()}
        correlation = figures["length_correlation"]
        shown = "undefined" if correlation is None else f"{correlation:+.2f}"
        _length_panel(axes["length"], sides, f"rank correlation with length {shown}")


def policy_picture(path: Path, compared: Sequence[Compared], figures: Figures) -> None:
    """Draws policy against baseline in three panels: order, difference, length.

    figures: those of comparison.comparison_metrics.
    """
    policy, baseline = (
        np.array([np.mean([x.score for x in case.answers(role)]) for case in compared])
        for role in ROLES
    )  # (N,) each
    title = f"the policy wins {share(figures, 'win_rate')}, by the reward model"
    whole = figures.get("without_cut", {})
    if whole:
        result = (
            f"it wins {share(whole, 'win_rate')}" if whole["pairs"] else "no comparison is left"
        )
        title += f"\nwithout the answers that it read only in part {result}"
    if "true_win_rate" in figures:
        title += f"\nby the ground truth {share(figures, 'true_win_rate')}"
    with panels(path, [["order"], ["difference"], ["length"]], title, COLUMN) as axes:
        _order_panel(axes["order"], "prompt", {"policy": policy, "baseline": baseline})
        _difference_panel(axes["difference"], compared, figures)
        answers = {role: [x for case in compared for x in case.answers(role)] for role in ROLES}
        controlled = figures["length_controlled_win_rate"]
        shown = "unknown" if controlled is None else f"{controlled:.3f}"
        _length_panel(axes["length"], answers, f"win rate with length controlled {shown}")


def _order_panel(
    axis, what: str, rewards: dict[str, np.ndarray], errors: np.ndarray | None = None
) -> None:
    """Draws the first rewards in rising order as a curve, and each second reward as a point.

    what: what the rewards are of, "pair" or "prompt". rewards: of the two sides by name, (N,) each.
    errors: which pairs have a label that the ground truth contradicts; they are marked.
    """
    (name, first), (other, second) = rewards.items()
    order = np.argsort(first, kind="stable")
    index, above = np.arange(len(order)), (second > first)[order]
    axis.plot(first[order], color=BETTER, lw=2, label=name)
    for mask, colour, where in ((~above, "tab:gray", "below"), (above, WORSE, "above")):
        style = {"color": colour, "alpha": alpha_of(len(order)), "label": f"{other}, {where}"}
        axis.scatter(index[mask], second[order][mask], s=9, **style)
    if errors is not None and errors.any():
        wrong = errors[order]
        style = {"marker": "x", "color": ERROR, "lw": 0.9}
        style["label"] = "label error, by the ground truth"
        axis.scatter(index[wrong], second[order][wrong], s=18, **style)
    axis.set(
        title=f"in order of the {name}'s reward: {above.sum():,} of {len(order):,} points above",
        xlabel=what,
        ylabel="reward",
    )


def _calibration_panel(axis, margins: np.ndarray) -> None:
    """Draws the share of labels that agree with the reward model, by its confidence."""
    confidence, hit_rate, counts, error = calibration(margins)
    filled = counts > 0
    axis.plot([0.5, 1], [0.5, 1], color="black", lw=1, label="perfect")
    axis.plot(confidence[filled], hit_rate[filled], "o", color=BETTER, label="reward model")
    for x, count in zip(confidence[filled], counts[filled], strict=True):
        axis.text(x, -0.09, f"{count:,}", ha="center", fontsize="small")  # where no point can be
    axis.set(
        title=f"calibration: error {error:.3f} over {len(margins):,} pairs, counted below",
        xlabel="sigmoid(margin) of the winner",
        ylabel="share of labels that agree",
        xlim=(0.48, 1.02),
        ylim=(-0.12, 1.02),
        yticks=np.linspace(0, 1, 6),
    )


def _difference_panel(axis, compared: Sequence[Compared], figures: Figures) -> None:
    """Draws a histogram of the policy's reward minus the baseline's, over all pairs of answers.

    A pair is of two answers to one prompt; the pairs of a prompt have a total weight of 1.
    """
    margins = np.concatenate([case.margins().ravel() for case in compared])  # (P,)
    _, _, weights = of_pairs(won_by(compared))
    bins = min(40, round(2 * len(margins) ** (1 / 3)))  # Rice's rule
    axis.hist(margins, bins, weights=weights, color=BETTER, alpha=0.6, label="pairs of answers")
    axis.axvline(0, color="black", lw=1)
    mean = np.average(margins, weights=weights)
    axis.axvline(mean, color=BETTER, lw=2, ls="--", label=f"mean {mean:+.2f}")
    axis.set(
        title=f"{figures['wins']:,} wins, {figures['losses']:,} losses, {figures['ties']:,} ties",
        xlabel="policy's reward minus the baseline's",
        ylabel="prompts",
    )


def _length_panel(axis, answers: dict[str, Sequence[Scored | Judged]], title: str) -> None:
    """Draws rewards against tokens; a cross is an answer that the reward model read only in part.

    answers: of the two sides by name.
    """
    for (name, side), colour in zip(answers.items(), (BETTER, WORSE), strict=True):
        for cut, marker, label in ((False, ".", name), (True, "x", f"{name}, cut")):
            points = [(x.tokens, x.score) for x in side if x.cut == cut]
            if points:
                style = {"color": colour, "alpha": alpha_of(len(side)), "label": label}
                axis.scatter(*zip(*points, strict=True), s=20, lw=0.8, marker=marker, **style)
    axis.set(title=f"length: {title}", xlabel="tokens of the answer", ylabel="reward")


def frontier_picture(path: Path, results: dict[str, Figures]) -> None:
    """Draws policies by their KL from one baseline in three panels: gain in reward, wins, length.

    results: the figures of comparison.comparison_metrics, by folder.
    """
    names = sorted(results, key=lambda name: results[name]["kl_per_answer"])
    figures = [results[name] for name in names]
    # The estimate of a KL near 0 may be negative.
    kl = np.array([max(0.0, result["kl_per_answer"]) for result in figures])
    judges = {"": ("reward model", BETTER, "o")}
    if all("policy_true_mean" in result for result in figures):
        judges["true_"] = ("ground truth of the embedded world", "tab:green", "^")
    with panels(path, [["gain", "wins", "length"]], "policies by their KL", (18, 6)) as axes:
        for key, (judge, colour, marker) in judges.items():
            style = {"color": colour, "marker": marker, "ls": "", "label": in_picture(judge)}
            means = [x[f"policy_{key}mean"] - x[f"baseline_{key}mean"] for x in figures]
            axes["gain"].plot([0, *kl], [0, *means], **style)
            rate, low, high = (
                np.array([result[f"{key}win_rate{end}"] for result in figures])
                for end in ("", "_low", "_high")
            )
            axes["wins"].errorbar(kl, rate, [rate - low, high - rate], capsize=3, **style)
        axes["wins"].axhline(0.5, color="black", lw=1)
        for n, (name, result) in enumerate(zip(names, figures, strict=True)):
            label = in_picture(Path(name).name.removesuffix("_eval"))
            marker = MARKERS[n % len(MARKERS)]
            axes["length"].plot(kl[n], result["policy_tokens_mean"], marker, label=label)
        mean = np.mean([result["baseline_tokens_mean"] for result in figures])
        axes["length"].axhline(mean, color="black", label="baseline")
        for name, title, what in (
            ("gain", "gain in mean reward over the baseline", "policy's mean - baseline's"),
            ("wins", "wins against the baseline, 95 %", "win rate"),
            ("length", "length of the answers", "mean tokens"),
        ):
            axes[name].set_xscale("function", functions=(np.sqrt, np.square))  # as in Gao et al.
            axes[name].locator_params(axis="x", nbins=4)
            axes[name].set(
                title=title,
                xlim=(0, max(1.2 * kl.max(), 0.01)),
                xlabel="KL(policy || baseline), nats an answer; square-root scale",
                ylabel=what,
            )


def suspects_picture(
    path: Path,
    margins: np.ndarray,
    curve: tuple[np.ndarray, np.ndarray],
    wrong: np.ndarray,
    truly: np.ndarray | None,
    figures: Figures,
) -> None:
    """Draws which labels are doubted in two panels: precision over rank, agreement over margin.

    margins: (P,). curve: sizes of margins, and the probability that a label agrees with their sign.
    wrong: (P,) the probability that it is wrong, and truly: whether it is, both by rank.
    figures: those of suspects.doubt.
    """
    ranks = np.arange(1, len(wrong) + 1)
    title = f"{share(figures, 'wrong_share')} of {len(wrong):,} labels are wrong, by the estimate"
    with panels(path, [["precision", "agreement"]], title, (14, 6)) as axes:
        axis = axes["precision"]
        axis.plot(ranks, np.cumsum(wrong) / ranks, color=BETTER, lw=2, label="expected")
        if truly is not None:
            found = np.cumsum(truly) / ranks
            axis.plot(ranks, found, color="tab:green", label="by the ground truth")
        axis.set(
            title="wrong labels among the most doubtful pairs",
            xlabel="pairs, the most doubtful first",
            ylabel="share of wrong labels",
            ylim=(0, 1.02),
        )
        axis, order = axes["agreement"], np.argsort(np.abs(margins))
        bins = np.array_split(order, min(20, len(order)))
        size = [np.abs(margins[own]).mean() for own in bins]
        agree = [((np.sign(margins[own]) + 1) / 2).mean() for own in bins]
        axis.plot(*curve, color=BETTER, lw=2, label="expected")
        axis.plot(size, agree, "o", color="black", label=f"labels, in {len(bins)} bins")
        axis.set(
            title=f"labels that the models agree with: {figures['accuracy']:.1%}",
            xlabel="size of the margin",
            ylabel="share of labels that agree",
            ylim=(0.4, 1.02),
        )

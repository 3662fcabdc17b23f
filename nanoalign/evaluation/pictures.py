"""The pictures of `evaluate.py policy` and `evaluate.py frontier`.

Shapes: N prompts, P pairs of answers.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files alone, no screen
from matplotlib import pyplot as plt  # noqa: E402

from nanoalign.evaluation.answers import ROLES
from nanoalign.evaluation.comparison import Compared
from nanoalign.evaluation.ranking import Figures
from nanoalign.evaluation.reward_pictures import BETTER, WORSE, alpha_of, bins_of, legend_below

MARKERS = "osDv^<>P"  # of policies
WHOLE, CUT = {"marker": ".", "s": 36}, {"marker": "x", "s": 18, "lw": 0.8}  # cut: read in part


def policy_picture(path: Path, compared: Sequence[Compared], figures: Figures) -> None:
    """Policy against baseline, in three panels: order, difference, length.

    What the reward model read only in part is a cross.
    """
    policy, baseline = (
        np.array([np.mean([x.score for x in getattr(each, role)]) for each in compared])
        for role in ROLES
    )  # (N,) each
    cut = np.array([any(x.cut for r in ROLES for x in getattr(each, r)) for each in compared])
    figure, axes = plt.subplot_mosaic(
        [["order", "order"], ["difference", "length"]], figsize=(14, 10), layout="constrained"
    )
    title = f"the policy wins {_rate(figures)}, by the reward model"
    whole = figures.get("without_cut", {})
    if whole:
        result = f"it wins {_rate(whole)}" if whole["pairs"] else "there is no comparison"
        title += f"\nwithout the answers that it read only in part {result}"
    figure.suptitle(title, fontsize="x-large")
    _order(axes["order"], policy, baseline, cut)
    _difference(axes["difference"], compared, figures)
    _length(axes["length"], compared, figures)
    for name, axis in axes.items():
        axis.grid(alpha=0.3)
        legend_below(axis, 5 if name == "order" else 2)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _rate(figures: Figures) -> str:
    return (
        f"{figures['win_rate']:.3f} [{figures['win_rate_low']:.3f}, "
        f"{figures['win_rate_high']:.3f}] of {figures['pairs']:,} comparisons"
    )


def _order(axis: plt.Axes, policy: np.ndarray, baseline: np.ndarray, cut: np.ndarray) -> None:
    """The prompts by the policy's mean reward. All arrays are (N,)."""
    order = np.argsort(policy, kind="stable")
    index, above, cut = np.arange(len(order)), (baseline > policy)[order], cut[order]
    axis.plot(policy[order], color=BETTER, lw=2, label="policy")
    for side, colour, name in (
        (~above, "tab:gray", "baseline, below"),
        (above, WORSE, "baseline, above"),
    ):
        for mask, mark, label in (
            (side & ~cut, WHOLE, name),
            (side & cut, CUT, f"{name}; an answer was cut"),
        ):
            points = index[mask], baseline[order][mask]
            if mask.any():
                axis.scatter(*points, color=colour, alpha=alpha_of(len(order)), label=label, **mark)
    axis.set_title(
        "prompts by the policy's reward: the baseline is better in "
        f"{above.sum():,} of {len(order):,}"
    )
    axis.set_xlabel("prompt")
    axis.set_ylabel("reward")


def _difference(axis: plt.Axes, compared: Sequence[Compared], figures: Figures) -> None:
    """The differences of all pairs, in which each prompt counts as one."""
    pairs = [
        (a.score - b.score, 1 / each.margins().size, not (a.cut or b.cut))
        for each in compared
        for a in each.policy
        for b in each.baseline
    ]
    margins, weights, whole = map(np.array, zip(*pairs, strict=True))  # (P,) each
    edges = bins_of(margins)
    axis.hist(margins, edges, weights=weights, color=BETTER, alpha=0.6, label="all")
    if not whole.all():
        axis.hist(margins[whole], edges, weights=weights[whole], color=BETTER,
                  label="without a cut answer")  # fmt: skip
    axis.axvline(0, color="black", lw=1)
    mean = np.average(margins, weights=weights)
    axis.axvline(mean, color=BETTER, lw=2, ls="--", label=f"mean {mean:+.2f}")
    axis.set_title(
        f"{figures['wins']:,} wins, {figures['losses']:,} losses, {figures['ties']:,} ties"
    )
    axis.set_xlabel("policy's reward minus the baseline's")
    axis.set_ylabel("prompts")


def _length(axis: plt.Axes, compared: Sequence[Compared], figures: Figures) -> None:
    """Reward against tokens of every answer."""
    answers = {role: [x for each in compared for x in getattr(each, role)] for role in ROLES}
    for role, colour in (("baseline", WORSE), ("policy", BETTER)):
        mean, count = figures[f"{role}_tokens_mean"], figures[f"{role}_cut_count"]
        for cut, mark, label in (
            (False, WHOLE, f"{role}, mean {mean:.1f} tokens"),
            (True, CUT, f"{role}, cut: {count:,} of {len(answers[role]):,}"),
        ):
            points = [(x.tokens, x.score) for x in answers[role] if x.cut == cut]
            if points:
                alpha = alpha_of(len(answers[role]))
                axis.scatter(*zip(*points, strict=True), color=colour, alpha=alpha, label=label,
                             **mark)  # fmt: skip
    controlled = figures["length_controlled_win_rate"]
    axis.set_title(
        "reward and length"
        + ("" if controlled is None else f": with length controlled {controlled:.3f} are won")
    )
    axis.set_xlabel("tokens of the answer")
    axis.set_ylabel("reward")


def frontier_picture(path: Path, results: dict[str, Figures]) -> None:
    """Policies against their KL from one baseline, in three panels: gain in reward, wins, length.

    results: the figures of comparison.comparison_metrics, by folder.
    """
    names = sorted(results, key=lambda name: results[name]["kl_per_answer"])
    figures = [results[name] for name in names]
    # The estimate of a KL near 0 may be negative.
    kl = np.array([max(0.0, each["kl_per_answer"]) for each in figures])
    judges = {"": ("reward model", BETTER)}
    if all("policy_true_mean" in each for each in figures):
        judges["true_"] = ("true rule of the embedded world", "tab:green")
    figure, (gain, wins, length) = plt.subplots(1, 3, figsize=(16, 5.5), layout="constrained")
    for key, (judge, colour) in judges.items():
        style = {"color": colour, "marker": "o", "ls": "", "label": judge}
        means = [each[f"policy_{key}mean"] - each[f"baseline_{key}mean"] for each in figures]
        gain.plot([0, *kl], [0, *means], **style)
        rate, low, high = (
            np.array([each[f"{key}win_rate{end}"] for each in figures])
            for end in ("", "_low", "_high")
        )
        wins.errorbar(kl, rate, [rate - low, high - rate], capsize=3, **style)
    wins.axhline(0.5, color="black", lw=1)
    for n, (name, each) in enumerate(zip(names, figures, strict=True)):
        label = Path(name).name.removesuffix("_eval")
        length.plot(kl[n], each["policy_tokens_mean"], MARKERS[n % len(MARKERS)], label=label)
    length.axhline(
        np.mean([each["baseline_tokens_mean"] for each in figures]), color="black", label="baseline"
    )
    for axis, title, what in (
        (gain, "gain in mean reward over the baseline", "policy's mean minus the baseline's"),
        (wins, "wins against the baseline, 95 %", "win rate"),
        (length, "length of the answers", "mean tokens"),
    ):
        axis.set_title(title)
        axis.set_xscale("function", functions=(np.sqrt, np.square))  # as in Gao et al.
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        axis.set_xlim(0, max(1.2 * kl.max(), 0.01))
        axis.set_xlabel("KL(policy || baseline), nats an answer; square-root scale")
        axis.set_ylabel(what)
        axis.grid(alpha=0.3)
    figure.legend(*gain.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    figure.legend(*length.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=90)
    plt.close(figure)

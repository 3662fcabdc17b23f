"""The pictures of `evaluate.py policy` and `evaluate.py frontier`.

Shapes: P pairs of answers.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files alone, no screen
from matplotlib import pyplot as plt  # noqa: E402

from nanoalign.evaluation.comparison import Compared  # noqa: E402
from nanoalign.evaluation.ranking import Figures  # noqa: E402
from nanoalign.evaluation.reward_pictures import BETTER, WORSE, alpha_of  # noqa: E402


def policy_picture(path: Path, compared: Sequence[Compared], figures: Figures) -> None:
    """Policy against baseline, in three panels: order, difference, length."""
    policy = np.array([line.policy_score for line in compared])  # (P,)
    baseline = np.array([line.baseline_score for line in compared])
    figure, axes = plt.subplot_mosaic(
        [["order", "order"], ["difference", "length"]], figsize=(14, 9)
    )
    figure.subplots_adjust(0.05, 0.06, 0.985, 0.89, wspace=0.15, hspace=0.3)
    figure.suptitle(
        f"the policy wins {figures['win_rate']:.3f} [{figures['win_rate_low']:.3f}, "
        f"{figures['win_rate_high']:.3f}] of {len(compared):,} comparisons, by the reward model",
        fontsize="x-large",
    )
    order = np.argsort(policy, kind="stable")
    index, above = np.arange(len(order)), (baseline > policy)[order]
    axes["order"].plot(policy[order], color=BETTER, lw=2, label="policy")
    for mask, colour, label in (
        (~above, "tab:gray", "baseline, below"),
        (above, WORSE, "baseline, above"),
    ):
        points = index[mask], baseline[order][mask]
        axes["order"].scatter(*points, s=9, color=colour, alpha=alpha_of(len(order)), label=label)
    axes["order"].set_title(
        "prompts by the policy's score: the baseline is better in "
        f"{figures['losses']:,} of {len(order):,}"
    )
    axes["order"].set_xlabel("prompt")
    axes["order"].set_ylabel("reward")
    difference = policy - baseline
    axes["difference"].hist(difference, 60, color=BETTER, alpha=0.6)
    axes["difference"].axvline(0, color="black", lw=1)
    mean = difference.mean()
    axes["difference"].axvline(mean, color=BETTER, lw=2, ls="--", label=f"mean {mean:+.2f}")
    axes["difference"].set_title(
        f"{figures['wins']:,} wins, {figures['losses']:,} losses, {figures['ties']:,} ties"
    )
    axes["difference"].set_xlabel("policy's reward minus the baseline's")
    axes["difference"].set_ylabel("prompts")
    for role, colour in (("baseline", WORSE), ("policy", BETTER)):
        axes["length"].scatter(
            [getattr(line, f"{role}_tokens") for line in compared],
            [getattr(line, f"{role}_score") for line in compared],
            s=9, color=colour, alpha=alpha_of(len(compared)),
            label=f"{role}, mean {figures[f'{role}_tokens_mean']:.1f} tokens",
        )  # fmt: skip
    controlled = figures["length_controlled_win_rate"]
    axes["length"].set_title(
        "reward and length"
        + ("" if controlled is None else f": with length controlled {controlled:.3f} are won")
    )
    axes["length"].set_xlabel("tokens of the answer")
    axes["length"].set_ylabel("reward")
    for axis in axes.values():
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


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
    figure, (gain, wins, length) = plt.subplots(1, 3, figsize=(16, 5))
    figure.subplots_adjust(0.045, 0.12, 0.985, 0.9, wspace=0.2)
    for key, (judge, colour) in judges.items():
        style = {"color": colour, "marker": "o", "lw": 1, "label": judge}
        means = [each[f"policy_{key}mean"] - each[f"baseline_{key}mean"] for each in figures]
        gain.plot([0, *kl], [0, *means], **style)
        rate, low, high = (
            np.array([each[f"{key}win_rate{end}"] for each in figures])
            for end in ("", "_low", "_high")
        )
        wins.errorbar(kl, rate, [rate - low, high - rate], capsize=3, **style)
    wins.axhline(0.5, color="black", lw=1)
    length.plot(
        kl, [each["policy_tokens_mean"] for each in figures], "o-", color=BETTER, label="policy"
    )
    length.axhline(
        np.mean([each["baseline_tokens_mean"] for each in figures]), color=WORSE, label="baseline"
    )
    for axis, title, what in (
        (gain, "gain in mean reward over the baseline", "policy's mean minus the baseline's"),
        (wins, "wins against the baseline, 95 %", "win rate"),
        (length, "length of the answers", "mean tokens"),
    ):
        axis.set_title(title)
        axis.set_xscale("function", functions=(np.sqrt, np.square))  # as in Gao et al.
        axis.xaxis.set_major_locator(plt.MaxNLocator(6))
        axis.set_xlim(0, max(1.2 * kl.max(), 0.01))
        axis.set_xlabel("KL(policy || baseline), nats an answer; square-root scale")
        axis.set_ylabel(what)
        axis.grid(alpha=0.3)
        axis.legend()
    for n, (name, each) in enumerate(zip(names, figures, strict=True)):
        label = Path(name).name.removesuffix("_eval")
        point = kl[n], each["policy_tokens_mean"]
        beside = (5, (5, -12)[n % 2])  # alternately above and below the points
        length.annotate(label, point, beside, textcoords="offset points", fontsize="small")
    figure.savefig(path, dpi=90)
    plt.close(figure)

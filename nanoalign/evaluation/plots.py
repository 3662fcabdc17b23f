"""The pictures of evaluations: a reward model on pairs, a policy against a baseline, many policies.

Shapes: N prompts, P pairs: of a better and a worse response, or of answers of two models.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from nanoalign.data.prompts import prompt_key
from nanoalign.evaluation.answers import ROLES
from nanoalign.evaluation.comparison import Compared
from nanoalign.evaluation.ranking import Pairs, Scored, about_cut, pairs_of, share_with_interval
from nanoalign.evaluation.statistics import Figures, calibration, prompt_interval, win_shares

BETTER, WORSE = "tab:blue", "tab:orange"
MARKERS = "osDv^<>P"  # of policies
WHOLE, CUT = {"marker": ".", "s": 36}, {"marker": "x", "s": 18, "lw": 0.8}  # cut: read in part


def pyplot() -> ModuleType:
    """matplotlib.pyplot that draws files, without a screen."""
    import matplotlib  # here, because the import takes half a second, which --help does not need

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


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


# --- a reward model: evaluate.py rm ---------------------------------------------------------------


def reward_picture(path: Path, subset: str, scored: Sequence[Scored], figures: Figures) -> None:
    """The rewards of one subset in five panels: order, pairs, spread, calibration, length."""
    pairs = pairs_of(scored)
    better, worse = (np.array([pair[side].score for pair in pairs]) for side in (0, 1))  # (P,)
    plt = pyplot()
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
        alpha = alpha_of(len(order))
        axis.scatter(index[mask], worse[order][mask], s=9, color=colour, alpha=alpha, label=label)
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
        alpha = alpha_of(len(better))
        label = f"{count:,} {label}"
        axis.scatter(worse[mask], better[mask], s=9, color=colour, alpha=alpha, label=label)
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
    filled = counts > 0
    hits, prompts = win_shares(margins), np.array([prompt_key(b.prompt) for b, _ in pairs], object)
    intervals = [
        prompt_interval(hits[places == n], prompts[places == n]) for n in np.flatnonzero(filled)
    ]
    spread = np.abs(np.array(intervals).T - hit_rate[filled])  # (2, bins)
    axis.errorbar(
        confidence[filled], hit_rate[filled], spread, fmt="o", color=BETTER, capsize=3, label="95 %"
    )
    for x, count in zip(confidence[filled], counts[filled], strict=True):
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


# --- a policy: evaluate.py policy -----------------------------------------------------------------


def policy_picture(path: Path, compared: Sequence[Compared], figures: Figures) -> None:
    """Policy against baseline, in three panels: order, difference, length.

    What the reward model read only in part is a cross.
    """
    policy, baseline = (
        np.array([np.mean([x.score for x in case.answers(role)]) for case in compared])
        for role in ROLES
    )  # (N,) each
    cut = np.array([any(x.cut for r in ROLES for x in case.answers(r)) for case in compared])
    plt = pyplot()
    figure, axes = plt.subplot_mosaic(
        [["order", "order"], ["difference", "length"]], figsize=(14, 10), layout="constrained"
    )
    title = f"the policy wins {_rate(figures)}, by the reward model"
    whole = figures.get("without_cut", {})
    if whole:
        result = f"it wins {_rate(whole)}" if whole["pairs"] else "there is no comparison"
        title += f"\nwithout the answers that it read only in part {result}"
    figure.suptitle(title, fontsize="x-large")
    _order_of_prompts(axes["order"], policy, baseline, cut)
    _difference(axes["difference"], compared, figures)
    _length_of_answers(axes["length"], compared, figures)
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


def _order_of_prompts(axis, policy: np.ndarray, baseline: np.ndarray, cut: np.ndarray) -> None:
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


def _difference(axis, compared: Sequence[Compared], figures: Figures) -> None:
    """The differences of all pairs, in which each prompt counts as one."""
    pairs = [
        (a.score - b.score, 1 / case.margins().size, not (a.cut or b.cut))
        for case in compared
        for a in case.policy
        for b in case.baseline
    ]
    margins, weights, whole = map(np.array, zip(*pairs, strict=True))  # (P,) each
    edges = bins_of(margins)
    axis.hist(margins, edges, weights=weights, color=BETTER, alpha=0.6, label="all")
    if not whole.all():
        label = "without a cut answer"
        axis.hist(margins[whole], edges, weights=weights[whole], color=BETTER, label=label)
    axis.axvline(0, color="black", lw=1)
    mean = np.average(margins, weights=weights)
    axis.axvline(mean, color=BETTER, lw=2, ls="--", label=f"mean {mean:+.2f}")
    axis.set_title(
        f"{figures['wins']:,} wins, {figures['losses']:,} losses, {figures['ties']:,} ties"
    )
    axis.set_xlabel("policy's reward minus the baseline's")
    axis.set_ylabel("prompts")


def _length_of_answers(axis, compared: Sequence[Compared], figures: Figures) -> None:
    """Reward against tokens of every answer."""
    answers = {role: [x for case in compared for x in case.answers(role)] for role in ROLES}
    for role, colour in (("baseline", WORSE), ("policy", BETTER)):
        mean, count = figures[f"{role}_tokens_mean"], figures[f"{role}_cut_count"]
        for cut, mark, label in (
            (False, WHOLE, f"{role}, mean {mean:.1f} tokens"),
            (True, CUT, f"{role}, cut: {count:,} of {len(answers[role]):,}"),
        ):
            points = [(x.tokens, x.score) for x in answers[role] if x.cut == cut]
            if points:
                alpha = alpha_of(len(answers[role]))
                style = {"color": colour, "alpha": alpha, "label": label, **mark}
                axis.scatter(*zip(*points, strict=True), **style)
    controlled = figures["length_controlled_win_rate"]
    axis.set_title(
        "reward and length"
        + ("" if controlled is None else f": with length controlled {controlled:.3f} are won")
    )
    axis.set_xlabel("tokens of the answer")
    axis.set_ylabel("reward")


def best_of_n_picture(path: Path, lines: Sequence[dict[str, float]]) -> None:
    """Draws reward, and true reward, against the KL; the points are marked by n."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    kl = [line["kl"] for line in lines]
    judges = {"reward": "reward model", "true_reward": "true rule of the embedded world"}
    for (name, label), colour in zip(judges.items(), ("tab:blue", "tab:green"), strict=True):
        if name in lines[0]:
            axis.plot(kl, [line[name] for line in lines], "o-", color=colour, label=label)
    top = axis.secondary_xaxis("top")
    powers = [n for n in range(len(lines)) if (n + 1) & n == 0]  # of two, which stand apart
    top.set_xticks([kl[n] for n in powers], [str(n + 1) for n in powers])
    top.set_xlabel("n")
    axis.set_xlabel("KL of the best of n from the policy, nats an answer")
    axis.set_ylabel("mean reward of the best of n")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- several policies: evaluate.py frontier -------------------------------------------------------


def frontier_picture(path: Path, results: dict[str, Figures]) -> None:
    """Policies against their KL from one baseline, in three panels: gain in reward, wins, length.

    results: the figures of comparison.comparison_metrics, by folder.
    """
    names = sorted(results, key=lambda name: results[name]["kl_per_answer"])
    figures = [results[name] for name in names]
    # The estimate of a KL near 0 may be negative.
    kl = np.array([max(0.0, result["kl_per_answer"]) for result in figures])
    judges = {"": ("reward model", BETTER)}
    if all("policy_true_mean" in result for result in figures):
        judges["true_"] = ("true rule of the embedded world", "tab:green")
    plt = pyplot()
    figure, (gain, wins, length) = plt.subplots(1, 3, figsize=(16, 5.5), layout="constrained")
    for key, (judge, colour) in judges.items():
        style = {"color": colour, "marker": "o", "ls": "", "label": judge}
        means = [result[f"policy_{key}mean"] - result[f"baseline_{key}mean"] for result in figures]
        gain.plot([0, *kl], [0, *means], **style)
        rate, low, high = (
            np.array([result[f"{key}win_rate{end}"] for result in figures])
            for end in ("", "_low", "_high")
        )
        wins.errorbar(kl, rate, [rate - low, high - rate], capsize=3, **style)
    wins.axhline(0.5, color="black", lw=1)
    for n, (name, result) in enumerate(zip(names, figures, strict=True)):
        label = Path(name).name.removesuffix("_eval")
        length.plot(kl[n], result["policy_tokens_mean"], MARKERS[n % len(MARKERS)], label=label)
    length.axhline(
        np.mean([result["baseline_tokens_mean"] for result in figures]),
        color="black",
        label="baseline",
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

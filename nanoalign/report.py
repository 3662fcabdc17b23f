"""Pictures of a run and of an evaluation. The one module that imports matplotlib."""

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files alone, no screen
from matplotlib import pyplot as plt  # noqa: E402

from nanoalign.comparison import Compared  # noqa: E402
from nanoalign.metrics import calibration, wilson_interval  # noqa: E402
from nanoalign.scoring import Scored, pairs_of  # noqa: E402

BETTER, WORSE = "tab:blue", "tab:orange"

# (title, the lines in it: metric and colour), drawn where a run has the metric.
PANELS = [
    ("loss", {"loss": "tab:blue"}),
    ("accuracy", {"rewards/accuracies": "tab:green", "accuracy": "tab:green"}),
    ("rewards", {"rewards/chosen": "tab:green", "rewards/rejected": "tab:red"}),
    ("margin", {"rewards/margins": "tab:purple"}),
    ("log-probability", {"logps/chosen": "tab:green", "logps/rejected": "tab:red"}),
    ("mean reward", {"reward_mean": "tab:brown"}),
    ("standard deviation of rewards", {"reward_std": "tab:brown"}),
    ("learning rate", {"lr": "tab:gray"}),
    ("gradient norm", {"grad_norm": "tab:gray"}),
]
# What a metric is of, by the beginning of its key; and how it is drawn, in the metric's colour.
KINDS = {
    "": ("training steps", {"lw": 0.8, "alpha": 0.35}),
    "train_eval/": ("training pairs again", {"ls": "--", "marker": "s", "ms": 4, "mfc": "white"}),
    "eval/": ("held out", {"lw": 2, "marker": "o"}),
}


def _read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def held_out_summary(folder: Path, records: int) -> str:
    """The first and the last evaluation in a line; the accuracy with its 95 % interval (Wilson 1927)."""
    lines = [line for line in _read_metrics(folder) if "eval/loss" in line]
    if not lines:
        return "nothing was held out"
    first, last = lines[0], lines[-1]
    parts = []
    for key in ("loss", "accuracy", "rewards/accuracies", "rewards/margins"):
        if f"eval/{key}" in first:
            parts.append(f"{key} {first[f'eval/{key}']:.4f} -> {last[f'eval/{key}']:.4f}")
            if "accura" in key:
                low, high = wilson_interval(last[f"eval/{key}"], records)
                parts[-1] += f" [{low:.3f}, {high:.3f}]"
    return f"{', '.join(parts)} on {records:,} records"


def curves(folder: Path, title: str) -> Path:
    """Draws metrics.jsonl as curves.png: thin lines for steps, heavy dotted ones for evaluations."""
    lines = _read_metrics(folder)
    known = {key for line in lines for key in line}
    panels = [panel for panel in PANELS if known.intersection(panel[1])]
    figure, axes = plt.subplots(2, 4, figsize=(16, 7))
    figure.subplots_adjust(0.04, 0.07, 0.99, 0.88, wspace=0.2, hspace=0.3)
    figure.suptitle(title, x=0.04, ha="left", fontsize="x-large")
    for axis, (name, metrics) in zip(axes.flat, panels, strict=False):
        for metric, colour in metrics.items():
            for kind, (what, style) in KINDS.items():
                points = [
                    (line["step"], line[kind + metric]) for line in lines if kind + metric in line
                ]
                if points:
                    label = f"{metric.split('/')[-1]}, {what}"
                    axis.plot(*zip(*points, strict=True), color=colour, label=label, **style)
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        names = {metric.split("/")[-1]: metrics[metric] for metric in metrics if metric in known}
        if len(names) > 1:
            axis.legend([plt.Line2D([], [], color=c, lw=3) for c in names.values()], names)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    seen = [KINDS[kind] for kind in KINDS if any(k.startswith(kind or "loss") for k in known)]
    handles = [plt.Line2D([], [], color="black", label=what, **style) for what, style in seen]
    figure.legend(handles=handles, loc="upper right", ncols=len(handles))
    path = folder / "curves.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def reward_picture(
    path: Path, subset: str, scored: list[Scored], figures: dict[str, float]
) -> None:
    """What a reward model makes of one subset, in five panels: order, pairs, spread, calibration, length."""
    pairs = pairs_of(scored)
    better, worse = (np.array([pair[side].score for pair in pairs]) for side in (0, 1))  # (P,)
    figure, axes = plt.subplot_mosaic(
        [["order", "order", "pairs"], ["spread", "calibration", "length"]], figsize=(16, 9)
    )
    figure.subplots_adjust(0.05, 0.06, 0.985, 0.89, wspace=0.2, hspace=0.3)
    figure.suptitle(
        f"{subset}: accuracy {figures['accuracy']:.3f} [{figures['accuracy_low']:.3f}, "
        f"{figures['accuracy_high']:.3f}] on {len(pairs):,} pairs, {figures['ties']:,} ties; always the "
        f"longer answer: {figures['longer_accuracy']:.3f}",
        fontsize="x-large",
    )
    _order_panel(axes["order"], better, worse)
    _pairs_panel(axes["pairs"], better, worse)
    _spread_panel(axes["spread"], scored, figures)
    _calibration_panel(axes["calibration"], better - worse)
    _length_panel(axes["length"], scored, figures)
    for axis in axes.values():
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _alpha(points: int) -> float:
    return min(0.9, max(0.1, 300 / points))


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
            alpha=_alpha(len(order)),
            label=label,
        )
    axis.set_title(
        f"pairs by the better answer's reward: {wrong:,} of {len(order):,} points are above"
    )
    axis.set_xlabel("pair")
    axis.set_ylabel("reward")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.12 * (high - low))  # room for the legend
    axis.legend(loc="upper left", ncols=3)


def _pairs_panel(axis, better: np.ndarray, worse: np.ndarray) -> None:
    low, high = min(better.min(), worse.min()), max(better.max(), worse.max())
    axis.plot([low, high], [low, high], color="black", lw=1)
    right = better > worse
    for mask, colour, label in ((right, BETTER, "right"), (~right, WORSE, "wrong or a tie")):
        count = int(mask.sum())
        axis.scatter(
            worse[mask], better[mask], s=9, color=colour, alpha=_alpha(len(better)),
            label=f"{count:,} {label}",
        )  # fmt: skip
    axis.set_title(
        f"{int(right.sum()):,} of {len(right):,} pairs above the diagonal: ranked rightly"
    )
    axis.set_xlabel("worse answer's reward")
    axis.set_ylabel("better answer's reward")
    axis.legend()


def _spread_panel(axis, scored: list[Scored], figures: dict[str, float]) -> None:
    bins = np.histogram_bin_edges([line.score for line in scored], bins=40)
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
    axis.legend()


def _calibration_panel(axis, margins: np.ndarray) -> None:
    confidence, hit_rate, counts, error = calibration(margins)
    axis.plot([0.5, 1], [0.5, 1], color="black", lw=1, label="perfect")
    held = counts > 0
    low, high = zip(*map(wilson_interval, hit_rate[held], counts[held]), strict=True)
    spread = np.abs(np.array([low, high]) - hit_rate[held])
    axis.errorbar(
        confidence[held], hit_rate[held], spread, fmt="o", color=BETTER, capsize=3, label="95 %"
    )
    for x, y, count in zip(confidence[held], hit_rate[held], counts[held], strict=True):
        axis.annotate(f"{count:,}", (x, y), (-6, -14), textcoords="offset points", fontsize="small")
    axis.set_title(f"calibration: error {error:.3f} over {len(margins):,} pairs")
    axis.set_xlabel("sigmoid(margin) of the winner")
    axis.set_ylabel("share of labels that agree")
    axis.set_xlim(0.49, 1.01)
    axis.set_ylim(-0.02, 1.02)
    axis.legend(loc="lower right")


def _length_panel(axis, scored: list[Scored], figures: dict[str, float]) -> None:
    for side, colour, name in (("rejected", WORSE, "worse"), ("chosen", BETTER, "better")):
        points = [(line.tokens, line.score) for line in scored if line.side == side]
        axis.scatter(
            *zip(*points, strict=True), s=9, color=colour, alpha=_alpha(len(scored)), label=name
        )
    correlation = figures["length_correlation"]
    shown = "undefined" if correlation is None else f"{correlation:+.2f}"
    axis.set_title(f"{len(scored):,} answers: rank correlation with length {shown}")
    axis.set_xlabel("tokens of the answer")
    axis.set_ylabel("reward")
    axis.legend()


def policy_picture(path: Path, compared: list[Compared], figures: dict[str, float]) -> None:
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
        axes["order"].scatter(*points, s=9, color=colour, alpha=_alpha(len(order)), label=label)
    axes["order"].set_title(
        f"prompts by the policy's score: the baseline is better in {figures['losses']:,} of {len(order):,}"
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
    for side, colour in (("baseline", WORSE), ("policy", BETTER)):
        axes["length"].scatter(
            [getattr(line, f"{side}_tokens") for line in compared],
            [getattr(line, f"{side}_score") for line in compared],
            s=9, color=colour, alpha=_alpha(len(compared)),
            label=f"{side}, mean {figures[f'{side}_tokens_mean']:.1f} tokens",
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


def frontier_picture(path: Path, results: dict[str, dict[str, float]]) -> None:
    """Policies against their KL from one baseline, in three panels: gain in reward, wins, length.

    results: the figures of comparison_metrics by the name of the policy's results.
    """
    names = sorted(results, key=lambda name: results[name]["kl_per_answer"])
    figures = [results[name] for name in names]
    # An estimate: near 0 it may be below.
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
        axis.set_xscale("function", functions=(np.sqrt, np.square))  # as Gao et al. draw it
        axis.xaxis.set_major_locator(plt.MaxNLocator(6))
        axis.set_xlim(0, max(1.2 * kl.max(), 0.01))
        axis.set_xlabel("KL(policy || baseline), nats an answer; square-root scale")
        axis.set_ylabel(what)
        axis.grid(alpha=0.3)
        axis.legend()
    for n, (name, each) in enumerate(zip(names, figures, strict=True)):
        label = Path(name).name.removesuffix("_eval")
        point = kl[n], each["policy_tokens_mean"]
        beside = (5, (5, -12)[n % 2])  # neighbours above and below their points
        length.annotate(label, point, beside, textcoords="offset points", fontsize="small")
    figure.savefig(path, dpi=90)
    plt.close(figure)

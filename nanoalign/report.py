"""Pictures of a run. The one module that imports matplotlib."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files alone, no screen
from matplotlib import pyplot as plt  # noqa: E402

from nanoalign.metrics import wilson_interval  # noqa: E402

# (title, the lines in it: metric and colour); a metric's evaluations are drawn as points of its
# colour.
PANELS = [
    ("loss", {"loss": "tab:blue"}),
    ("accuracy", {"rewards/accuracies": "tab:green"}),
    ("rewards", {"rewards/chosen": "tab:green", "rewards/rejected": "tab:red"}),
    ("margin", {"rewards/margins": "tab:purple"}),
    ("log-probability", {"logps/chosen": "tab:green", "logps/rejected": "tab:red"}),
    ("learning rate", {"lr": "tab:gray"}),
    ("gradient norm", {"grad_norm": "tab:gray"}),
]


def _read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def held_out_summary(folder: Path, pairs: int) -> str:
    """The first and the last evaluation in a line; the accuracy with its 95 % interval (Wilson 1927)."""
    lines = [line for line in _read_metrics(folder) if "eval/loss" in line]
    if not lines:
        return "nothing was held out"
    first, last = lines[0], lines[-1]
    parts = []
    for key in ("loss", "rewards/accuracies", "rewards/margins"):
        parts.append(f"{key} {first[f'eval/{key}']:.4f} -> {last[f'eval/{key}']:.4f}")
        if key == "rewards/accuracies":
            low, high = wilson_interval(last[f"eval/{key}"], pairs)
            parts[-1] += f" [{low:.3f}, {high:.3f}]"
    return f"{', '.join(parts)} on {pairs:,} pairs"


def curves(folder: Path, title: str) -> Path:
    """Draws metrics.jsonl as curves.png: thin lines for steps, heavy dotted ones for evaluations."""
    lines = _read_metrics(folder)
    figure, axes = plt.subplots(2, 4, figsize=(16, 7))
    figure.subplots_adjust(0.04, 0.07, 0.99, 0.9, wspace=0.2, hspace=0.3)
    figure.suptitle(title)
    for axis, (name, metrics) in zip(axes.flat, PANELS, strict=False):
        for metric, colour in metrics.items():
            short = metric.split("/")[-1]
            for key, style in (
                (metric, {"lw": 1, "alpha": 0.6}),
                (f"eval/{metric}", {"marker": "o"}),
            ):
                points = [(line["step"], line[key]) for line in lines if key in line]
                if points:
                    label = (
                        f"{short}, held out" if key.startswith("eval/") else f"{short}, training"
                    )
                    axis.plot(*zip(*points, strict=True), color=colour, label=label, **style)
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend(fontsize="small")
    for axis in axes.flat[len(PANELS) :]:
        axis.set_visible(False)
    path = folder / "curves.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path

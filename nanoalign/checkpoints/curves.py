"""The result of a run: curves.png, and the lines that are printed at its end."""

import json
import shlex
from argparse import Namespace
from pathlib import Path

from nanoalign import checkpoints
from nanoalign.checkpoints.intervals import wilson_interval
from nanoalign.checkpoints.runs import METRICS
from nanoalign.distributed import World
from nanoalign.formats import TEST_OF

# (title, metrics and their colours). A panel is drawn if the run has one of its metrics.
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
# Prefix of a metric's key -> (the pairs that it is measured on, the style of its line).
KINDS = {
    "": ("training steps", {"lw": 0.8, "alpha": 0.35}),
    "train_eval/": ("training pairs again", {"ls": "--", "marker": "s", "ms": 4, "mfc": "white"}),
    "eval/": ("held out", {"lw": 2, "marker": "o"}),
}


def finish(args: Namespace, world: World, title: str, records: int, command: list[str]) -> None:
    """Draws curves.png and prints the result, on rank 0. records: how many were held out.

    command: words of evaluate.py, to which `next_command` adds.
    """
    if world.is_main:
        out = Path(args.out)
        lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
        draw(lines, f"{title}, data {' '.join(args.data)}, lr {args.lr:g}", out / "curves.png")
        if checkpoints.keeps_best(args):
            from nanoalign.checkpoints.best import up_to_best

            lines = up_to_best(lines)
        if args.model != "tiny":
            from nanoalign.checkpoints.card import write_card

            write_card(out, lines, records, is_reward_model=command[0] == "rm")
        print(f"{'held out':<11} {summary(lines, records)}")
        print(f"{'saved':<11} {out}: the model, {METRICS}, curves.png")
        print(f"{'next':<11} {next_command(args, records, command)}")


def next_command(args: Namespace, records: int, command: list[str]) -> str:
    """The command that evaluates the run on what it held out: `records` records."""
    data = args.eval_data or [f"held_out:{args.out}" if records else "HELD_OUT_DATA"]
    # The embedded test data are the default of evaluate.py.
    data = [] if set(data) <= set(TEST_OF.values()) else ["--data", *data]
    data += ["--keys", *args.keys] if args.keys and args.eval_data else []
    return shlex.join(["python", "evaluate.py", *command, "--out", f"{args.out}_eval", *data])


def summary(lines: list[dict[str, float]], records: int) -> str:
    """The first and the last evaluation; the accuracy with its 95 % interval (Wilson 1927)."""
    lines = [line for line in lines if "eval/loss" in line]
    if not lines:
        return "no records"
    first, last, parts = lines[0], lines[-1], []
    for key in ("loss", "accuracy", "rewards/accuracies", "rewards/margins"):
        if f"eval/{key}" in first:
            parts.append(f"{key} {first[f'eval/{key}']:.4f} -> {last[f'eval/{key}']:.4f}")
            if "accura" in key:
                low, high = wilson_interval(last[f"eval/{key}"], records)
                parts[-1] += f" [{low:.3f}, {high:.3f}]"
    return f"{', '.join(parts)} on {records:,} records"


def draw(lines: list[dict[str, float]], title: str, path: Path) -> None:
    """Draws the lines of metrics.jsonl: thin lines for steps, heavy dotted ones for evaluations."""
    import matplotlib  # here, because the import takes half a second, which --help does not need

    matplotlib.use("Agg")  # files alone, no screen
    from matplotlib import pyplot as plt

    known = {key for line in lines for key in line}
    panels = [panel for panel in PANELS if known.intersection(panel[1])]
    figure, axes = plt.subplots(2, 4, figsize=(16, 7))
    figure.subplots_adjust(0.04, 0.07, 0.99, 0.88, wspace=0.2, hspace=0.3)
    figure.suptitle(title, x=0.04, ha="left", fontsize="x-large")
    for axis, (name, metrics) in zip(axes.flat, panels, strict=False):
        for metric, colour in metrics.items():
            for kind, (what, style) in KINDS.items():
                key = kind + metric
                points = [(line["step"], line[key]) for line in lines if key in line]
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
    drawn = [KINDS[kind] for kind in KINDS if any(k.startswith(kind or "loss") for k in known)]
    handles = [plt.Line2D([], [], color="black", label=what, **style) for what, style in drawn]
    figure.legend(handles=handles, loc="upper right", ncols=len(handles))
    figure.savefig(path, dpi=100)
    plt.close(figure)

"""The result of a run: curves.png, and the lines that are printed at its end."""

import json
import math
import re
import shlex
import textwrap
from argparse import Namespace
from pathlib import Path

from nanoalign import checkpoints
from nanoalign.checkpoints.runs import METRICS
from nanoalign.distributed import World
from nanoalign.formats import TEST_OF, named

CHOSEN, REJECTED, ALL = "tab:blue", "tab:orange", "black"
# (title, metrics and their colours). A panel is drawn if the run has one of its metrics.
PANELS = [
    ("loss", {"loss": ALL}),
    ("accuracy", {"rewards/accuracies": ALL, "accuracy": ALL}),
    ("rewards", {"rewards/chosen": CHOSEN, "rewards/rejected": REJECTED}),
    ("margin", {"rewards/margins": ALL}),
    ("log-probability, change in nats", {"logps/chosen": CHOSEN, "logps/rejected": REJECTED}),
    ("mean reward", {"reward_mean": ALL}),
    ("standard deviation of rewards", {"reward_std": ALL}),
    ("learning rate", {"lr": ALL}),
    ("gradient norm", {"grad_norm": ALL}),
]
# Prefix of a metric's key -> (the pairs that it is measured on, the style of its line).
KINDS = {
    "eval/": ("held out", {"lw": 2, "marker": "o"}),
    "train_eval/": ("training pairs again", {"ls": "--", "marker": "s", "ms": 4, "mfc": "white"}),
    "": ("training steps", {"lw": 0.8, "alpha": 0.4}),
}


def finish(args: Namespace, world: World, title: str, records: int, command: list[str]) -> None:
    """Draws curves.png and prints the result, on rank 0. records: how many were held out.

    command: words of evaluate.py, to which `next_command` adds.
    """
    if world.is_main:
        out = Path(args.out)
        lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
        title = f"{title}, data {named(args.data)}, lr {args.lr:g}"
        draw(lines, re.sub(r"(?<![^ =])[./]\S*/", "", title), out / "curves.png")  # names alone
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


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a probability (Wilson 1927): within [0, 1], and not empty at 0 and 1."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) * z / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)  # at 0 and 1 up to rounding


def draw(lines: list[dict[str, float]], title: str, path: Path) -> None:
    """Draws the lines of metrics.jsonl: thin lines for steps, heavy dotted ones for evaluations."""
    import matplotlib  # here, because the import takes half a second, which --help does not need

    matplotlib.use("Agg")  # files alone, no screen
    from matplotlib import pyplot as plt

    known = {key for line in lines for key in line}
    panels = [panel for panel in PANELS if known.intersection(panel[1])]
    figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
    figure.suptitle(
        textwrap.shorten(title, 130, placeholder=" ..."), x=0.01, ha="left", fontsize="x-large"
    )
    for axis, (name, metrics) in zip(axes.flat, panels, strict=False):
        for metric, colour in metrics.items():
            start = 0.0
            for kind, (_, style) in KINDS.items():
                points = [
                    (line["step"], line[kind + metric]) for line in lines if kind + metric in line
                ]
                if points and "change" in name:
                    start = start or points[0][1]
                axis.plot([s for s, _ in points], [v - start for _, v in points], c=colour, **style)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    drawn = [KINDS[kind] for kind in KINDS if any(k.startswith(kind or "loss") for k in known)]
    drawn += [("chosen", {"c": CHOSEN, "lw": 4}), ("rejected", {"c": REJECTED, "lw": 4})]
    handles = [plt.Line2D([], [], label=label, **{"c": ALL} | style) for label, style in drawn]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles))
    figure.savefig(path, dpi=100)
    plt.close(figure)

"""The result of a run: curves.png, the model card, and the lines that are printed at its end."""

import math
import re
import shlex
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import jinja2  # a package that torch needs, too
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nanoalign.batch import Row
from nanoalign.data.sources import SOURCES, test_of
from nanoalign.distributed import World, print0
from nanoalign.files.run_folder import ARGS, CARD, METRICS, launcher
from nanoalign.files.text import in_picture, named, read_json, visible
from nanoalign.files.writing import replacing, write_text
from nanoalign.loop import Batcher, Objective, evaluate
from nanoalign.model import Policy
from nanoalign.runs.best import keeps_best, up_to_best
from nanoalign.runs.trackers import lines_of
from nanoalign.weights.folders import public_name

CARD_MARK = "<!-- Written by nanoalign."
CHOSEN, REJECTED, ALL = "tab:blue", "tab:orange", "black"
COLUMNS = 5  # of panels in curves.png, at most
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
    ("tokens a second", {"tokens_per_second": ALL}),
]
# Prefix of a metric's key -> (the pairs that it is measured on, the style of its line).
KINDS = {
    "eval/": ("held out", {"lw": 2, "marker": "o"}),
    "train_eval/": ("training pairs again", {"ls": "--", "marker": "s", "ms": 4, "mfc": "white"}),
    "": ("training steps", {"lw": 0.8, "alpha": 0.4}),
}


def finish(args: Namespace, world: World, title: str, records: int, command: list[str]) -> None:
    """On rank 0 draws curves.png, prints the result, and writes the card of other models than tiny.

    title: the first words of the picture's title. records: the number of held-out records.
    command: the words of evaluate.py that evaluate the result.
    """
    if world.is_main:
        out = Path(args.out)
        lines = [{"step": step} | metrics for step, metrics in lines_of(out)]
        title = f"{title}, data {named(args.data)}, lr {args.lr:g}"
        draw(lines, re.sub(r"(?<![^ =])[./]\S*/", "", title), out / "curves.png")  # names alone
        if keeps_best(args):
            lines = up_to_best(lines)
        if args.model != "tiny":
            write_card(out, lines, records, is_reward_model=command[0] == "rm")
        print(f"{'held out':<11} {summary(lines, records)}")
        print(f"{'saved':<11} {out}: the model, {METRICS}, curves.png")
        print(f"{'next':<11} {next_command(args, records, command)}")


def next_command(args: Namespace, records: int, command: list[str]) -> str:
    """Returns the command that evaluates the run on its held-out data.

    records: the number of held-out records; if it is 0, HELD_OUT_DATA stands for data of the user.
    command: the words of evaluate.py to which the flags of data are added.
    """
    data = args.eval_data or [f"held_out:{args.out}" if records else "HELD_OUT_DATA"]
    # The embedded test data are the default of evaluate.py.
    tests = {test_of(place) for place in ("tiny", *(f"tiny:{name}" for name in SOURCES))}
    data = [] if set(data) <= tests else ["--data", *data]
    data += ["--keys", *args.keys] if args.keys and args.eval_data else []
    return shlex.join(["python", "evaluate.py", *command, "--out", f"{args.out}_eval", *data])


def summary(lines: list[dict[str, float]], records: int) -> str:
    """Returns a line with the first and the last evaluation on `records` held-out records.

    An accuracy has its 95 % interval (Wilson 1927).
    """
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
    """Returns the 95 % interval of a probability (Wilson 1927), as (low, high) within [0, 1].

    share: of successes among `count` trials. The interval is not empty where share is 0 or 1.
    """
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) * z / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)  # at 0 and 1 up to rounding


def draw(lines: list[dict[str, float]], title: str, path: Path) -> None:
    """Draws the lines of metrics.jsonl as a picture: the panels of PANELS, in styles of KINDS."""
    import matplotlib  # here, because the import takes half a second, which --help does not need

    matplotlib.use("Agg")  # files alone, no screen
    from matplotlib import pyplot as plt

    known = {key for line in lines for key in line}
    panels = [panel for panel in PANELS if known.intersection(panel[1])]
    rows = max(1, math.ceil(len(panels) / COLUMNS))
    columns = max(1, math.ceil(len(panels) / rows))
    size = (max(12, 4 * columns), 3.5 * rows)  # the legend is 12 inches wide
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(
        in_picture(textwrap.shorten(title, 130, placeholder=" ...")),
        x=0.01,
        ha="left",
        fontsize="x-large",
    )
    for axis, (name, metrics) in zip(axes.flat[: len(panels)], panels, strict=True):
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
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    drawn = [KINDS[kind] for kind in KINDS if any(k.startswith(kind or "loss") for k in known)]
    drawn += [("chosen", {"c": CHOSEN, "lw": 4}), ("rejected", {"c": REJECTED, "lw": 4})]
    handles = [plt.Line2D([], [], label=label, **{"c": ALL} | style) for label, style in drawn]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles))
    with replacing(path) as hidden:
        figure.savefig(hidden, dpi=100)
    plt.close(figure)


def write_card(out: Path, lines: list[dict], records: int, is_reward_model: bool) -> None:
    """Writes README.md, the model card of the Hub, to a run's folder; one that a user wrote stays.

    lines: of metrics.jsonl. records: the number of held-out records.
    """
    path = out / CARD
    if path.exists() and CARD_MARK.encode() not in path.read_bytes():
        return
    run = read_json(out / ARGS)
    evaluations = [line for line in lines if "eval/loss" in line]
    pattern = re.compile(r"(?:[^/=]+=)?hf://datasets/([^/]+/[^/@:]+)")
    matches = map(pattern.match, run["data"])
    command = [*launcher(run["ranks"]), Path(run["argv"][0]).name, *run["argv"][1:]]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("card.jinja").read_text())
    text = template.render(
        run=run,
        name=Path(run["out"]).name,
        base=public_name(run["model"]),
        is_reward_model=is_reward_model,
        auto="AutoModelForSequenceClassification" if is_reward_model else "AutoModelForCausalLM",
        datasets=sorted({match[1] for match in matches if match}),
        records=records,
        first=evaluations[0] if evaluations else None,
        last=evaluations[-1] if evaluations else None,
        command=shlex.join(command),
    )
    write_text(path, visible(text))


@torch.no_grad()
def report_rounding(
    model: nn.Module,
    objective: Objective,
    held_out: dict[str, Sequence[Row]],
    batcher: Batcher,
    args: Namespace,
) -> None:
    """With --save_dtype bf16 rounds the model, in place; prints its held-out loss before and after.

    A collective. Does nothing if no rows are held out. A model with adapters is not rounded: a line
    names the command that measures the merged one.
    """
    held_out = {name: rows for name, rows in held_out.items() if name == "eval" and len(rows)}
    if args.save_dtype == "fp32" or not held_out:
        return
    if args.lora_rank:  # the adapters of the model are not those of its files
        script = "policy" if isinstance(model, Policy) else "rm"
        return print0(
            f"{'bfloat16':<11} {args.out}: evaluate.py {script} measures the merged model"
        )
    before = evaluate(objective, held_out, batcher)
    for tensor in model.parameters():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.copy_(local.bfloat16())
    after = evaluate(objective, held_out, batcher)
    keys = [key for key in ("loss", "accuracy", "rewards/accuracies") if f"eval/{key}" in before]
    changes = [f"{key} {before[f'eval/{key}']:.4f} -> {after[f'eval/{key}']:.4f}" for key in keys]
    print0(f"{'bfloat16':<11} held out, by rounding: {', '.join(changes)}")
